// Tensor rows of any dtype and stride -> the operands of gemm.h, X being rows x cols:
//
//   pack_rows        X[r][c] -> dst[r * ld + c / u]     A of X Y^T, A of X Y    (kRowMajor)
//   pack_transposed  X[r][c] -> dst[(c / u) * ld + r]   B of Y X^T
//   pack_stacked     X[r][c] -> dst[(r / u) * ld + c]   B of Y X, A of X^T Y    (kColMajor)
//
// with u = kPerUnit<U>. The unit U is named at the call, the dtype E of X follows from src:
// Operand<E> for a tensor; any of float -> float, float -> BF16x2 (rounding), ... for P and dS.
// stride is in elements; ld in units. What a vector writes beyond the matrix is zero, so each row
// of dst needs room for a multiple of kLanes<Real<U>> units and ld must be at least that.
#pragma once
#include "cpu/gemm.h"

namespace flashcore::cpu {
namespace {

// kLanes units, from n elements along the reduction dimension (more exist only if n says so).
template <class U, class E>
FC_INLINE auto units_along(const E* p, int64_t n) {
  constexpr int lanes = kLanes<Real<U>>;
  if constexpr (kPerUnit<U> == 1) {
    return n >= lanes ? load_real(p) : load_real_n(p, static_cast<int>(n));
  } else if constexpr (sizeof(E) == 2) {
    Vec<uint32_t> v = {};
    if (n >= 2 * lanes) {
      __builtin_memcpy(&v, p, sizeof(v));
    } else {
      E tmp[2 * lanes] = {};
      for (int i = 0; i < static_cast<int>(n); ++i) tmp[i] = p[i];
      __builtin_memcpy(&v, tmp, sizeof(v));
    }
    return v;
  } else {
    Vec<float> const a = n >= lanes ? load(p) : load_real_n(p, static_cast<int>(n));
    Vec<float> b = {};
    if (n >= 2 * lanes)
      b = load(p + lanes);
    else if (n > lanes)
      b = load_real_n(p + lanes, static_cast<int>(n - lanes));
    return to_bf16x2(a, b);
  }
}

FC_INLINE void store_units(float* p, Vec<float> v) { store(p, v); }
FC_INLINE void store_units(double* p, Vec<double> v) { store(p, v); }
FC_INLINE void store_units(BF16x2* p, Vec<uint32_t> v) { store(&p->bits, v); }

template <class U, class E>
void pack_rows(const E* src, int64_t stride, int64_t rows, int64_t cols, U* dst, int64_t ld) {
  constexpr int step = kLanes<Real<U>> * kPerUnit<U>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += step)
      store_units(dst + r * ld + c / kPerUnit<U>, units_along<U>(src + r * stride + c, cols - c));
  }
}

FC_INLINE void transpose_units(Vec<float> (&x)[kLanes<float>]) { transpose<float>(x); }
FC_INLINE void transpose_units(Vec<double> (&x)[kLanes<double>]) { transpose<double>(x); }
FC_INLINE void transpose_units(Vec<uint32_t> (&x)[kLanes<uint32_t>]) { transpose<uint32_t>(x); }

template <class U, class E>
void pack_transposed(const E* src, int64_t stride, int64_t rows, int64_t cols, U* dst, int64_t ld) {
  constexpr int lanes = kLanes<Real<U>>;
  int64_t const units = ceil_div<int64_t>(cols, kPerUnit<U>);
  for (int64_t r0 = 0; r0 < rows; r0 += lanes) {
    int const valid = static_cast<int>(min_of<int64_t>(lanes, rows - r0));
    const E* block = src + r0 * stride;
    for (int64_t u0 = 0; u0 < units; u0 += lanes) {
      int64_t const c0 = u0 * kPerUnit<U>;
      decltype(units_along<U>(src, 0)) x[lanes];
      if (valid == lanes && cols - c0 >= lanes * kPerUnit<U>) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          x[i] = units_along<U>(block + i * stride + c0, lanes * kPerUnit<U>);
      } else {
        for (int i = 0; i < lanes; ++i) {
          x[i] = decltype(units_along<U>(src, 0)){};
          if (i < valid) x[i] = units_along<U>(block + i * stride + c0, cols - c0);
        }
      }
      transpose_units(x);
      U* out = dst + u0 * ld + r0;
      int const count = static_cast<int>(min_of<int64_t>(lanes, units - u0));
      if (count == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store_units(out + i * ld, x[i]);
      } else {
        for (int i = 0; i < count; ++i) store_units(out + i * ld, x[i]);
      }
    }
  }
}

// One vector of columns of row p; q is the row below it, or null past the last one.
template <class U, class E>
FC_INLINE auto units_across(const E* p, const E* q, int64_t n) {
  constexpr int lanes = kLanes<Real<U>>;
  auto const one = [n](const E* x) {
    return n >= lanes ? load_real(x) : load_real_n(x, static_cast<int>(n));
  };
  if constexpr (kPerUnit<U> == 1) {
    return one(p);
  } else {
    auto const widened = [&](const E* x) {  // rounded, where E is not bf16 already
      if constexpr (sizeof(E) == 2)
        if (n >= lanes) return widen(load_u16(x));
      return widen(f32_to_bf16(one(x)));
    };
    Vec<uint32_t> x = widened(p);
    if (q) x |= widened(q) << 16;
    return x;
  }
}

// Returns whether every element is finite: a product with P = 0 hides a finite row, but not NaN.
template <class U, class E>
bool pack_stacked(const E* src, int64_t stride, int64_t rows, int64_t cols, U* dst, int64_t ld) {
  constexpr int lanes = kLanes<Real<U>>;
  constexpr int u = kPerUnit<U>;
  Vec<Real<U>> zero_if_finite = {};
  for (int64_t r = 0; r < rows; r += u) {
    const E* p = src + r * stride;
    const E* q = u == 2 && r + 1 < rows ? p + stride : nullptr;
    for (int64_t c = 0; c < cols; c += lanes) {
      auto const x = units_across<U>(p + c, q ? q + c : nullptr, cols - c);
      if constexpr (u == 1) {
        zero_if_finite += x * Real<U>(0);
      } else {
        zero_if_finite += reinterpret_cast<Vec<float>>(x << 16) * 0.0f;
        zero_if_finite += reinterpret_cast<Vec<float>>(x & 0xffff0000u) * 0.0f;
      }
      store_units(dst + (r / u) * ld + c, x);
    }
  }
  return reduce_add<Real<U>>(zero_if_finite) == 0;
}

}  // namespace
}  // namespace flashcore::cpu
