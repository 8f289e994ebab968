// Rows of tensors by dtype, and the division of a block of memory into arrays.
#pragma once
#include "common/problem.h"
#include "cpu/vec.h"

namespace flashcore::cpu {
namespace {

template <DType D>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<DType::f16> {
  using type = F16;
};
template <>
struct ElementOf<DType::bf16> {
  using type = BF16;
};
template <>
struct ElementOf<DType::f64> {
  using type = double;
};
template <DType D>
using Element = typename ElementOf<D>::type;

// Row `row` of the tensor, which for packed sequences counts from the start of the tensor.
template <class E>
FC_INLINE E* row_of(const Rows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<E*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         row * x.row_stride;
}

// Calls f with a null pointer to the element type: what a tensor may hold beside arithmetic in T.
template <class T, class F>
FC_INLINE void with_element(DType dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::f16:
        return f(static_cast<F16*>(nullptr));
      case DType::bf16:
        return f(static_cast<BF16*>(nullptr));
      default:
        return f(static_cast<float*>(nullptr));
    }
  }
}

// to = from, or to += from.
template <class E, class T>
void write_row(E* to, const T* from, int64_t n, bool add) {
  int64_t c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) {
    Vec<T> const x = load(from + c);
    store_real(to + c, add ? x + load_real(to + c) : x);
  }
  if (int const rest = static_cast<int>(n - c)) {
    Vec<T> const x = load_real_n(from + c, rest);
    store_real_n(to + c, add ? x + load_real_n(to + c, rest) : x, rest);
  }
}

// Hands out aligned arrays from a block. From a null block it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <class X>
  X* take(int64_t n) {
    size_t const at = size_;
    size_ += round_up(static_cast<size_t>(n) * sizeof(X), size_t{64});
    return base_ ? reinterpret_cast<X*>(base_ + at) : nullptr;
  }
  size_t size() const { return size_; }

 private:
  std::byte* base_;
  size_t size_ = 0;
};

}  // namespace
}  // namespace flashcore::cpu
