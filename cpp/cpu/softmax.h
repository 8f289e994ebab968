// Online softmax over the rows of a strip, and the log-sum-exp of a finished row.
//
// Scores s are kept in the units q·k comes in; scale_log2 turns them into powers of two. A row's
// state is its running maximum, and the sum of its P in kLanes partial sums (added up once, at the
// end). P = 2^((s - row_max) * scale_log2): the subtraction comes first, because a fused
// s * scale_log2 - row_max * scale_log2 keeps the rounding of one product but not of the other, and
// overflows when scores are so large that this rounding is.
#pragma once
#include "cpu/gemm.h"

namespace flashcore::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kMinusInf = -__builtin_huge_val();

// The most rows of a strip, in whole vectors.
constexpr int kStripState = 16;
static_assert(kTileM <= kStripState && kStripState % kLanes<float> == 0);

// What scores are taken relative to: a row that sees no key yet has row_max = -inf, and -inf - -inf
// would be NaN.
template <class T>
FC_INLINE Vec<T> finite_max(Vec<T> row_max) {
  return row_max == kMinusInf<T> ? Vec<T>{} : row_max;
}

// S -> P in place for `rows` rows of n columns, n a multiple of kTileN vectors or less than that.
// Updates row_max[rows] and row_sum[rows][kLanes]; correction[r] is what O must be multiplied by.
// Returns whether any correction differs from 1. kNarrow: P is stored as bf16 pairs, over S.
template <bool kNarrow, class T>
bool softmax_strip(T* s, int64_t lds, int rows, int64_t n, T scale_log2, T* row_max, T* row_sum,
                   T* correction) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T max_now[kStripState];
  alignas(64) T base[kStripState];
  for (int r = 0; r < kStripState; ++r) max_now[r] = kMinusInf<T>;
  for (int r = 0; r < rows; ++r) {
    const T* row = s + r * lds;
    Vec<T> a = load(row), b = a;
    int64_t j = lanes;
    for (; j + lanes < n; j += 2 * lanes) {
      a = max(a, load(row + j));
      b = max(b, load(row + j + lanes));
    }
    if (j < n) a = max(a, load(row + j));
    max_now[r] = reduce_max<T>(max(a, b));
  }
  alignas(64) T old_max[kStripState], factor[kStripState];
  for (int r = 0; r < kStripState; ++r) old_max[r] = r < rows ? row_max[r] : kMinusInf<T>;
  bool changed = false;
  for (int r = 0; r < rows; r += lanes) {
    Vec<T> const old = load(old_max + r);
    Vec<T> const now = max(old, load(max_now + r));
    Vec<T> const reference = finite_max<T>(now);
    store(max_now + r, now);
    store(base + r, reference);
    store(factor + r, exp2((old - reference) * scale_log2));
  }
  for (int r = 0; r < rows; ++r) {
    row_max[r] = max_now[r];
    correction[r] = factor[r];
    changed |= factor[r] != 1;
  }
  for (int r = 0; r < rows; ++r) {
    T* row = s + r * lds;
    Vec<T> const reference = splat(base[r]);
    Vec<T> sum = load(row_sum + r * lanes) * factor[r];
    if constexpr (kNarrow) {
      auto* pairs = reinterpret_cast<BF16x2*>(row);  // behind what is still to be read
      for (int64_t j = 0; j < n; j += 2 * lanes) {
        Vec<T> const a = exp2((load(row + j) - reference) * scale_log2);
        Vec<T> const b = exp2((load(row + j + lanes) - reference) * scale_log2);
        sum += a + b;
        store(&pairs[j / 2].bits, to_bf16x2(a, b));
      }
    } else {
      for (int64_t j = 0; j < n; j += lanes) {
        Vec<T> const a = exp2((load(row + j) - reference) * scale_log2);
        sum += a;
        store(row + j, a);
      }
    }
    store(row_sum + r * lanes, sum);
  }
  return changed;
}

// A finished row: P V is O * out_scale / sum.
struct RowResult {
  double lse;
  double max_logit;
  double out_scale;  // 0 where no key is visible
};

// score_scale: of row_max, to natural units.
template <class T>
RowResult finish_row(T row_max, T sum, double score_scale, const float* sink) {
  RowResult x{kMinusInf<double>, kMinusInf<double>, 0.0};
  bool const poisoned = sum != sum;  // max passes over NaN, a sum does not
  if (row_max != kMinusInf<T> || poisoned) {
    x.max_logit = static_cast<double>(row_max) * score_scale;
    x.lse = x.max_logit + __builtin_log(static_cast<double>(sum));
    if (poisoned && row_max < -kMinusInf<T>) x.max_logit = sum;
    x.out_scale = 1.0;
  }
  if (sink && *sink != kMinusInf<float>) {
    double const s = *sink;
    double const hi = x.lse < s ? s : x.lse, lo = x.lse < s ? x.lse : s;
    double const total = hi + __builtin_log1p(__builtin_exp(lo - hi));
    x.out_scale *= __builtin_exp(x.lse - total);
    x.lse = total;
  }
  return x;
}

}  // namespace
}  // namespace flashcore::cpu
