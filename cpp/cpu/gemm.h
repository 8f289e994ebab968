// The register-tile matrix product that every CPU kernel is made of: C (+)= A B on packed operands.
//
// Units. The reduction dimension k is counted in units. A unit is one float or double, or BF16x2:
// two bf16 that are neighbours along k, multiplied and summed into float by one vdpbf16ps.
// Operand<E> says which unit a tensor of dtype E is packed into; bf16 without AVX512-BF16 and f16
// become float.
//
//   B (k x n)  is row-major: unit (p, j) at b[p * ldb + j], n a multiple of kLanes.
//   A (m x k)  element (i, p) is broadcast, so both orders cost the same:
//                kRowMajor  a[i * lda + p]     A as stored
//                kColMajor  a[p * lda + i]     A is the transpose of what is stored
//   C (m x n)  float or double, row-major: c[i * ldc + j].
//
// The five products of attention, with the packing (pack.h) of each operand:
//   S  = Q K^T      a = Q  pack_rows,  kRowMajor    b = K  pack_transposed
//   dP = dO V^T     a = dO pack_rows,  kRowMajor    b = V  pack_transposed
//   O  += P V       a = P  pack_rows,  kRowMajor    b = V  pack_stacked
//   dQ += dS K      a = dS pack_rows,  kRowMajor    b = K  pack_stacked
//   dV += P^T dO    a = P  pack_stacked, kColMajor  b = dO pack_stacked
//   dK += dS^T Q    a = dS pack_stacked, kColMajor  b = Q  pack_stacked
//
// Every entry of C is one chain of multiply-adds in ascending k: its bits do not depend on where in
// a tile it lies, nor on how rows and columns are grouped. Adding terms with A = 0 and finite B
// changes nothing.
#pragma once
#include "cpu/vec.h"

namespace flashcore::cpu {
namespace {

template <class E>
struct OperandOf {
  using type = Real<E>;
};
template <>
struct OperandOf<BF16> {
#if defined(__AVX512BF16__)
  using type = BF16x2;
#else
  using type = float;
#endif
};
template <class E>
using Operand = typename OperandOf<E>::type;  // the unit that tensors of E are packed into

template <class U>
constexpr int kPerUnit = 1;  // elements along k in a unit
template <>
constexpr int kPerUnit<BF16x2> = 2;

enum class Order { kRowMajor, kColMajor };

// What C holds before the product is added.
enum class Init {
  kZero,   // C = A B
  kAdd,    // C += A B
  kScale,  // C = row_scale[i] * C + A B
};

// Rows and vectors of C in registers: with kTileN vectors of B and one broadcast they fill the
// register file (24 + 4 + 1 of 32, or 12 + 2 + 1 of 16) and hide the latency of multiply-add.
constexpr int kTileM = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileN = 4;
#else
constexpr int kTileN = 2;
#endif

FC_INLINE Vec<float> splat_unit(const float* a) { return splat(*a); }
FC_INLINE Vec<double> splat_unit(const double* a) { return splat(*a); }
FC_INLINE Vec<uint32_t> splat_unit(const BF16x2* a) { return splat(a->bits); }
FC_INLINE Vec<float> load_unit(const float* b) { return load(b); }
FC_INLINE Vec<double> load_unit(const double* b) { return load(b); }
FC_INLINE Vec<uint32_t> load_unit(const BF16x2* b) { return load(&b->bits); }

FC_INLINE Vec<float> dot_add(Vec<float> c, Vec<float> a, Vec<float> b) { return a * b + c; }
FC_INLINE Vec<double> dot_add(Vec<double> c, Vec<double> a, Vec<double> b) { return a * b + c; }
#if defined(__AVX512BF16__)
FC_INLINE Vec<float> dot_add(Vec<float> c, Vec<uint32_t> a, Vec<uint32_t> b) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// One register tile: M rows, N vectors.
template <int M, int N, Order kOrder, class U>
[[gnu::noinline]] void gemm_tile(int64_t k, const U* a, int64_t lda, const U* b, int64_t ldb,
                                 Real<U>* c, int64_t ldc, Init init, const Real<U>* row_scale) {
  using T = Real<U>;
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      acc[i][j] = init == Init::kZero ? Vec<T>{} : load(c + i * ldc + j * kLanes<T>);
      if (init == Init::kScale) acc[i][j] *= row_scale[i];
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    decltype(load_unit(b)) bv[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) bv[j] = load_unit(b + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      auto const av = splat_unit(kOrder == Order::kRowMajor ? a + i * lda : a + i);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = dot_add(acc[i][j], av, bv[j]);
    }
    a += kOrder == Order::kRowMajor ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
  }
}

// M rows, n columns in chunks of nearly equal width: five vectors run as 3 + 2, not as 4 + 1.
template <int M, Order kOrder, class U>
FC_INLINE void gemm_rows(int64_t n, int64_t k, const U* a, int64_t lda, const U* b, int64_t ldb,
                         Real<U>* c, int64_t ldc, Init init, const Real<U>* row_scale) {
  int64_t const vectors = n / kLanes<Real<U>>;
  int64_t chunks = ceil_div<int64_t>(vectors, kTileN);
  for (int64_t j = 0; j < vectors; --chunks) {
    int64_t const width = ceil_div(vectors - j, chunks);
    int64_t const col = j * kLanes<Real<U>>;
    const U* bj = b + col;
    Real<U>* cj = c + col;
    switch (width) {
      case 1:
        gemm_tile<M, 1, kOrder>(k, a, lda, bj, ldb, cj, ldc, init, row_scale);
        break;
      case 2:
        gemm_tile<M, 2, kOrder>(k, a, lda, bj, ldb, cj, ldc, init, row_scale);
        break;
      case 3:
        if constexpr (kTileN >= 3)
          gemm_tile<M, 3, kOrder>(k, a, lda, bj, ldb, cj, ldc, init, row_scale);
        break;
      default:
        if constexpr (kTileN >= 4)
          gemm_tile<M, 4, kOrder>(k, a, lda, bj, ldb, cj, ldc, init, row_scale);
        break;
    }
    j += width;
  }
}

// One strip: m <= kTileM rows of C. n is a multiple of kLanes; k may be 0.
// row_scale (m entries) is read for Init::kScale only.
template <Order kOrder, class U>
void gemm_strip(int m, int64_t n, int64_t k, const U* a, int64_t lda, const U* b, int64_t ldb,
                Real<U>* c, int64_t ldc, Init init, const Real<U>* row_scale = nullptr) {
  static_assert(kTileM == 6);
  switch (m) {
    case 1:
      return gemm_rows<1, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
    case 2:
      return gemm_rows<2, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
    case 3:
      return gemm_rows<3, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
    case 4:
      return gemm_rows<4, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
    case 5:
      return gemm_rows<5, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
    default:
      return gemm_rows<6, kOrder>(n, k, a, lda, b, ldb, c, ldc, init, row_scale);
  }
}

// Any number of rows: strips of kTileM over the same B, which should fit in the first-level cache.
template <Order kOrder, class U>
void gemm(int64_t m, int64_t n, int64_t k, const U* a, int64_t lda, const U* b, int64_t ldb,
          Real<U>* c, int64_t ldc, Init init) {
  for (int64_t i = 0; i < m; i += kTileM) {
    gemm_strip<kOrder>(static_cast<int>(min_of<int64_t>(kTileM, m - i)), n, k,
                       a + (kOrder == Order::kRowMajor ? i * lda : i), lda, b, ldb, c + i * ldc,
                       ldc, init);
  }
}

}  // namespace
}  // namespace flashcore::cpu
