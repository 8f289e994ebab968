// Vectors: one set of names for SSE2, AVX2, AVX-512 and NEON.
//
// GCC vector extensions carry the arithmetic (a * b + c, a < b ? a : b work on a Vec<T>); the few
// things the compiler does not find by itself are intrinsics here and nowhere else: exp2, max,
// reductions, half-precision conversions, the bf16 dot product.
//
// This header and its users are compiled several times with different -m flags into one library.
// So everything lives in an unnamed namespace on raw pointers: an inline function with external
// linkage could be merged by the linker across those builds and run AVX-512 code on an old CPU.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/types.h"

namespace flashcore::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

#if defined(__AVX512BF16__)
constexpr bool kNativeBf16 = true;  // vdpbf16ps: pairs of bf16 multiplied, summed in float32
#else
constexpr bool kNativeBf16 = false;
#endif

#if defined(__AVX512F__)
// Passed to the zero-masking intrinsics: it costs nothing, and the plain ones draw a warning about
// their own undefined operand from GCC 12.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

#define FC_INLINE [[gnu::always_inline]] inline

// What a tensor holds. Arithmetic happens in Real<E>: float, or double for double.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
// Two bf16 values that are neighbours along the reduction dimension of a matrix product.
struct BF16x2 {
  uint32_t bits;
};

template <class E>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class E>
using Real = typename RealOf<E>::type;

template <class T, int kBytes = kVecBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

// The integer of the same size, for masks, bit tricks and shuffles.
template <class T>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using VecInt = Vec<typename IntOf<T>::type>;

template <class T>
FC_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
FC_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
// v, loaded once. Where several instructions use a loaded vector, GCC may repeat the load as an
// operand of each of them, and loads become what a loop waits for.
template <class V>
FC_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}
template <class T>
FC_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // 0 + x would be an addition: it turns -0 into 0
}
// 0, 1, 2, ...
template <class T>
FC_INLINE VecInt<T> iota() {
  VecInt<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

// ---- max and reductions -------------------------------------------------------------------------

// The second operand where either is NaN, so max(acc, x) lets a NaN in x through.
FC_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(kAllLanes, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
FC_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// Lane i of the result is lane i ^ distance.
template <class T, int kDistance>
FC_INLINE Vec<T> swap_lanes(Vec<T> v) {
  return __builtin_shuffle(v, iota<T>() ^ kDistance);
}
// The order of these sums is fixed: halves, quarters, ...
template <class T>
FC_INLINE T reduce_add(Vec<T> v) {
  if constexpr (kLanes<T> >= 16) v += swap_lanes<T, 8>(v);
  if constexpr (kLanes<T> >= 8) v += swap_lanes<T, 4>(v);
  if constexpr (kLanes<T> >= 4) v += swap_lanes<T, 2>(v);
  v += swap_lanes<T, 1>(v);
  return v[0];
}
template <class T>
FC_INLINE T reduce_max(Vec<T> v) {
  if constexpr (kLanes<T> >= 16) v = max(v, swap_lanes<T, 8>(v));
  if constexpr (kLanes<T> >= 8) v = max(v, swap_lanes<T, 4>(v));
  if constexpr (kLanes<T> >= 4) v = max(v, swap_lanes<T, 2>(v));
  v = max(v, swap_lanes<T, 1>(v));
  return v[0];
}

// ---- conversions --------------------------------------------------------------------------------

typedef uint16_t U16Half __attribute__((vector_size(kVecBytes / 2)));  // one per float lane

FC_INLINE U16Half load_u16(const void* p) {
  U16Half v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

FC_INLINE Vec<float> f16_to_f32(U16Half h) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAllLanes, reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(reinterpret_cast<uint16x4_t>(h)));
#else
  // Exponent and mantissa moved into place, then the exponent bias corrected by a multiplication,
  // which also normalises subnormals. Inf and NaN need the exponent's top bits too.
  Vec<uint32_t> const x = __builtin_convertvector(h, Vec<uint32_t>);
  Vec<float> const scaled = reinterpret_cast<Vec<float>>((x & 0x7fffu) << 13) * 0x1p112f;
  Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(scaled);
  Vec<uint32_t> const special = reinterpret_cast<Vec<uint32_t>>((x & 0x7c00u) == 0x7c00u);
  bits |= special & 0x7f800000u;
  return reinterpret_cast<Vec<float>>(bits | (x & 0x8000u) << 16);
#endif
}

// Round to nearest even, like the hardware.
FC_INLINE U16Half f32_to_f16(Vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16Half>(_mm512_maskz_cvtps_ph(kAllLanes, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<U16Half>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return reinterpret_cast<U16Half>(vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  Vec<uint32_t> const x = reinterpret_cast<Vec<uint32_t>>(v);
  Vec<uint32_t> const magnitude = x & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 bits that fall off, ties to even.
  Vec<uint32_t> const normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 puts the last kept bit at the unit of a float's mantissa.
  Vec<uint32_t> const subnormal =
      reinterpret_cast<Vec<uint32_t>>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Vec<uint32_t> h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? Vec<uint32_t>{} + 0x7c00u : h;  // overflow and Inf
  h = magnitude > 0x7f800000u ? Vec<uint32_t>{} + 0x7e00u : h;   // NaN
  return __builtin_convertvector(h | (x >> 16 & 0x8000u), U16Half);
#endif
}

// GCC 12 makes five instructions of __builtin_convertvector here.
FC_INLINE Vec<uint32_t> widen(U16Half h) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<uint32_t>>(
      _mm512_maskz_cvtepu16_epi32(kAllLanes, reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<uint32_t>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, Vec<uint32_t>);
#endif
}

FC_INLINE Vec<float> bf16_to_f32(U16Half h) { return reinterpret_cast<Vec<float>>(widen(h) << 16); }

FC_INLINE U16Half f32_to_bf16(Vec<float> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<U16Half>(_mm512_cvtneps_pbh(v));
#else
  Vec<uint32_t> const x = reinterpret_cast<Vec<uint32_t>>(v);
  Vec<uint32_t> const rounded = x + 0x7fffu + (x >> 16 & 1u);
  Vec<uint32_t> const bits = (x & 0x7fffffffu) > 0x7f800000u ? x | 0x400000u : rounded;
  return __builtin_convertvector(bits >> 16, U16Half);
#endif
}

// kLanes<Real<E>> elements, converted to Real<E>.
FC_INLINE Vec<float> load_real(const float* p) { return load(p); }
FC_INLINE Vec<double> load_real(const double* p) { return load(p); }
FC_INLINE Vec<float> load_real(const F16* p) { return f16_to_f32(load_u16(p)); }
FC_INLINE Vec<float> load_real(const BF16* p) { return bf16_to_f32(load_u16(p)); }

FC_INLINE void store_real(float* p, Vec<float> v) { store(p, v); }
FC_INLINE void store_real(double* p, Vec<double> v) { store(p, v); }
FC_INLINE void store_real(F16* p, Vec<float> v) {
  U16Half const h = f32_to_f16(v);
  __builtin_memcpy(p, &h, sizeof(h));
}
FC_INLINE void store_real(BF16* p, Vec<float> v) {
  U16Half const h = f32_to_bf16(v);
  __builtin_memcpy(p, &h, sizeof(h));
}

// The first n < kLanes elements; the rest are zero.
template <class E>
FC_INLINE auto load_real_n(const E* p, int n) {
  E tmp[kLanes<Real<E>>] = {};
  for (int i = 0; i < n; ++i) tmp[i] = p[i];
  return load_real(tmp);
}
template <class E>
FC_INLINE void store_real_n(E* p, Vec<Real<E>> v, int n) {
  E tmp[kLanes<Real<E>>];
  store_real(tmp, v);
  for (int i = 0; i < n; ++i) p[i] = tmp[i];
}

// Lanes of a and b (in that order) as one vector of bf16.
FC_INLINE Vec<uint32_t> to_bf16x2(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec<uint32_t>>(_mm512_cvtne2ps_pbh(b, a));
#else
  U16Half const h[2] = {f32_to_bf16(a), f32_to_bf16(b)};
  Vec<uint32_t> v;
  __builtin_memcpy(&v, h, sizeof(v));
  return v;
#endif
}

// ---- exp2 ---------------------------------------------------------------------------------------
//
// 2^x for x < 127 (softmax asks for x <= 0): x = r + f with r = round(x), |f| <= 1/2, and
// 2^f = 1 + f q(f) with q the minimax polynomial. Exactly 1 at 0, exactly 0 at -inf, NaN stays NaN.
// Relative error below 1.9e-7 in float and 2.3e-16 in double; what would be subnormal is anything
// below the smallest normal number. Adding kMagic leaves r in the low bits of the sum, from where a
// shift takes it into the exponent of 2^f: faster than AVX-512's own reduce and scalef.

FC_INLINE Vec<float> exp2_of_fraction(Vec<float> f) {
  Vec<float> q = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  q = q * f + 0x1.c6b752p-5f;
  q = q * f + 0x1.ebf9bcp-3f;
  q = q * f + 0x1.62e42ap-1f;
  return q * f + 1.0f;
}
FC_INLINE Vec<double> exp2_of_fraction(Vec<double> f) {
  Vec<double> q = f * 4.13878738774277971e-10 + 7.08171083905599497e-09;
  q = q * f + 1.01804048222089992e-07;
  q = q * f + 1.32153853907286718e-06;
  q = q * f + 1.52527274622814559e-05;
  q = q * f + 0.000154035305666451336;
  q = q * f + 0.00133335581541093998;
  q = q * f + 0.00961812910749581911;
  q = q * f + 0.0555041086647826837;
  q = q * f + 0.240226506959104386;
  q = q * f + 0.693147180559945841;
  return q * f + 1.0;
}

FC_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float kMagic = 0x1.8p23f;
  x = max(splat(-127.0f), x);
  Vec<float> const shifted = x + kMagic;
  Vec<float> const y = exp2_of_fraction(x - (shifted - kMagic));
  return reinterpret_cast<Vec<float>>(reinterpret_cast<VecInt<float>>(y) +
                                      (reinterpret_cast<VecInt<float>>(shifted) << 23));
}
FC_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double kMagic = 0x1.8p52;
  x = max(splat(-1023.0), x);
  Vec<double> const shifted = x + kMagic;
  Vec<double> const y = exp2_of_fraction(x - (shifted - kMagic));
  return reinterpret_cast<Vec<double>>(reinterpret_cast<VecInt<double>>(y) +
                                       (reinterpret_cast<VecInt<double>>(shifted) << 52));
}

// ---- transpose ----------------------------------------------------------------------------------

// a0 b0 a1 b1 ... : the first and second half of the interleaved lanes.
template <class T>
FC_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b) {
  VecInt<T> const i = iota<T>();
  return __builtin_shuffle(a, b, (i >> 1) + (i & 1) * kLanes<T>);
}
template <class T>
FC_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b) {
  VecInt<T> const i = iota<T>();
  return __builtin_shuffle(a, b, (i >> 1) + (i & 1) * kLanes<T> + kLanes<T> / 2);
}

// A square of kLanes vectors, in place: log2(kLanes) rounds of perfect shuffles.
template <class T>
FC_INLINE void transpose(Vec<T> (&x)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<T> y[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = zip_low<T>(x[i], x[i + n / 2]);
      y[2 * i + 1] = zip_high<T>(x[i], x[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
}

}  // namespace
}  // namespace flashcore::cpu
