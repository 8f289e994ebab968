// Partial results over disjoint keys, combined: the weights are the softmax of their lse.
#pragma once
#include "cpu/rows.h"
#include "registry.h"

namespace flashcore::cpu {
namespace {

// T: what lse holds and the sums are made in.
template <class T>
void merge_row(const MergeProblem& p, int64_t b, int64_t h, int64_t i) {
  T largest = -__builtin_inf();
  bool nan = false;  // which max_of passes over
  for (int s = 0; s < p.count; ++s) {
    T const lse = *row_of<T>(p.lses[s], b, h, i);
    nan |= lse != lse;
    largest = max_of(largest, lse);
  }
  bool const empty = largest == -static_cast<T>(__builtin_inf()) && !nan;
  T sum = 0;
  if (!empty)
    for (int s = 0; s < p.count; ++s) {
      T const lse = *row_of<T>(p.lses[s], b, h, i);
      sum += static_cast<T>(__builtin_exp(lse - largest));
    }
  constexpr int kChunk = 256;
  T acc[kChunk];
  for (int64_t c = 0; c < p.head_dim; c += kChunk) {
    int64_t const n = min_of<int64_t>(kChunk, p.head_dim - c);
    for (T& x : acc) x = 0;
    for (int s = 0; s < p.count && !empty; ++s) {
      T const lse = *row_of<T>(p.lses[s], b, h, i);
      // An empty partial's rows are not read: whatever they hold stays out.
      if (lse == -static_cast<T>(__builtin_inf())) continue;
      T const w = static_cast<T>(__builtin_exp(lse - largest)) / sum;
      with_element<T>(p.outs[s].dtype, [&](auto* type) {
        using E = std::remove_pointer_t<decltype(type)>;
        const E* const row = row_of<E>(p.outs[s], b, h, i) + c;
        int64_t k = 0;
        for (; k + kLanes<T> <= n; k += kLanes<T>)
          store(acc + k, load(acc + k) + w * load_real(row + k));
        if (k < n)
          store(acc + k, load(acc + k) + w * load_real_n(row + k, static_cast<int>(n - k)));
      });
    }
    with_element<T>(p.out.dtype, [&](auto* type) {
      using E = std::remove_pointer_t<decltype(type)>;
      write_row(row_of<E>(p.out, b, h, i) + c, acc, n, false);
    });
  }
  if (p.lse)
    *row_of<T>(p.lse, b, h, i) = empty ? largest : largest + static_cast<T>(__builtin_log(sum));
}

// Rows [begin, end), counted over batch, head and row.
inline void merge_rows(const MergeProblem& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    int64_t const i = r % p.num_rows, h = r / p.num_rows % p.num_heads,
                  b = r / p.num_rows / p.num_heads;
    if (p.lses[0].dtype == DType::f64)
      merge_row<double>(p, b, h, i);
    else
      merge_row<float>(p, b, h, i);
  }
}

}  // namespace
}  // namespace flashcore::cpu
