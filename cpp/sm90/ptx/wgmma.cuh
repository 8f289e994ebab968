// Warpgroup matrix multiply: synchronisation, and GEMMs over whole shared-memory tiles.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/layout.h"
#include "sm90/ptx/barrier.cuh"
#include "wgmma_shapes.cuh"  // generated: Wgmma<T, N>::ss, ::rs

namespace flashcore::sm90 {

// Before the first wgmma that touches registers written by other instructions.
FC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups of this warpgroup are in flight.
template <int kPending>
FC_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Ties registers to this point of the program, so that nothing that reads or writes them moves
// across an asynchronous wgmma.
template <int N>
FC_DEVICE void pin(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
template <int N>
FC_DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// Where a matrix begins in shared memory, in the units of a descriptor: 16 bytes. From a pointer it
// takes several instructions, which count in a loop: there, it is made before and moved on.
struct MatrixAt {
  uint32_t units;

  // In a cluster addresses also say which block, in bits that would fall into the next field.
  FC_DEVICE MatrixAt(const void* p) : units((smem_address(p) & 0x3ffff) >> 4) {}
  FC_DEVICE MatrixAt operator+(int bytes) const {
    MatrixAt moved = *this;
    moved.units += static_cast<uint32_t>(bytes >> 4);
    return moved;
  }
};
// The same x, in a register from here on: the compiler does not know what it is, or it would work
// it out again in every step of a loop, which it takes for cheaper.
FC_DEVICE int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
FC_DEVICE MatrixAt kept(MatrixAt at) {
  asm volatile("" : "+r"(at.units));
  return at;
}
// layout: what layout.h says of it, which is all but where it is.
FC_DEVICE uint64_t descriptor(uint64_t layout, MatrixAt at) { return layout | at.units; }

// S (64 x N) = A B^T over kDepth columns. A: rows_a x kDepth panels in shared memory starting at
// this warpgroup's row 0; B: rows_b x kDepth, from its first row. Both K-major. With kAdd, S +=.
// Issues, does not wait.
template <class T, int N, int kDepth, int kRowsA, int kRowsB = N, bool kAdd = false>
FC_DEVICE void gemm_abt(float (&s)[N / 2], MatrixAt a, MatrixAt b) {
  uint64_t const da = descriptor(k_major_descriptor(), a);
  uint64_t const db = descriptor(k_major_descriptor(), b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    int const panel = k / 4, step = k % 4;
    uint64_t const a_k = da + ((panel * kRowsA * kPanelBytes + step * 32) >> 4);
    uint64_t const b_k = db + ((panel * kRowsB * kPanelBytes + step * 32) >> 4);
    if (k == 0 && !kAdd)
      Wgmma<T, N>::template ss_first<0, 0>(s, a_k, b_k);
    else
      Wgmma<T, N>::template ss<0, 0>(s, a_k, b_k);
  }
}

// O (64 x N) += P B. P: 64 x kDepth in registers, packed; B: kDepth x N panels, MN-major.
template <class T, int N, int kDepth>
FC_DEVICE void gemm_pb(float (&o)[N / 2], const uint32_t (&p)[kDepth / 4], MatrixAt b) {
  uint64_t const db = descriptor(mn_major_descriptor(kDepth), b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    Wgmma<T, N>::template rs<1>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                                db + ((k * 16 * kPanelBytes) >> 4));
}

// The A operand that is 1 in its first three columns and 0 in the others: registers 0 and 1, 2 and
// 3. To be made before wgmma_fence().
FC_DEVICE void three_ones(uint32_t (&a)[2]) {
  int const pair = threadIdx.x % 4;  // of columns
  a[0] = pair == 0 ? 0x3f803f80u : pair == 1 ? 0x3f80u : 0u;
  a[1] = 0;
  pin(a);
}
// C (64 x N) += A B^T, to every row the sums of the first three columns of B. A: three_ones(); B: N
// rows of 8 bfloat16. One that is infinite or NaN makes its column of C NaN.
template <int N>
FC_DEVICE void gemm_ones(float (&c)[N / 2], const uint32_t (&a)[2], MatrixAt b) {
  Wgmma<__nv_bfloat16, N>::template rs<0>(c, a[0], a[0], a[1], a[1],
                                          descriptor(narrow_descriptor(), b));
}

// C (64 x N) = A B. A: this warpgroup's row 0 of rows_a x kDepth panels, K-major; B: kDepth rows,
// MN-major, from the panel of its first column on. Both in shared memory. With kAdd, C += A B.
template <class T, int N, int kDepth, int kRowsA, bool kAdd = false>
FC_DEVICE void gemm_ab(float (&c)[N / 2], MatrixAt a, MatrixAt b) {
  uint64_t const da = descriptor(k_major_descriptor(), a);
  uint64_t const db = descriptor(mn_major_descriptor(kDepth), b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    int const panel = k / 4, step = k % 4;
    uint64_t const a_k = da + ((panel * kRowsA * kPanelBytes + step * 32) >> 4);
    uint64_t const b_k = db + ((k * 16 * kPanelBytes) >> 4);
    if (k == 0 && !kAdd)
      Wgmma<T, N>::template ss_first<0, 1>(c, a_k, b_k);
    else
      Wgmma<T, N>::template ss<0, 1>(c, a_k, b_k);
  }
}

// C (64 x N) = A^T B^T. A: kDepth rows of one panel, MN-major; B: rows_b x kDepth panels, from its
// first row, K-major. Both in shared memory.
template <class T, int N, int kDepth>
FC_DEVICE void gemm_atbt(float (&c)[N / 2], MatrixAt a, MatrixAt b) {
  uint64_t const da = descriptor(mn_major_descriptor(kDepth), a);
  uint64_t const db = descriptor(k_major_descriptor(), b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    int const panel = k / 4, step = k % 4;
    uint64_t const a_k = da + ((k * 16 * kPanelBytes) >> 4);
    uint64_t const b_k = db + ((panel * N * kPanelBytes + step * 32) >> 4);
    if (k == 0)
      Wgmma<T, N>::template ss_first<1, 0>(c, a_k, b_k);
    else
      Wgmma<T, N>::template ss<1, 0>(c, a_k, b_k);
  }
}

// C (64 x N) += A^T B. A: kDepth rows of one panel; B: kDepth rows, from the panel of its first
// column on. Both MN-major, in shared memory.
template <class T, int N, int kDepth>
FC_DEVICE void gemm_atb(float (&c)[N / 2], MatrixAt a, MatrixAt b) {
  uint64_t const da = descriptor(mn_major_descriptor(kDepth), a);
  uint64_t const db = descriptor(mn_major_descriptor(kDepth), b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    Wgmma<T, N>::template ss<1, 1>(c, da + ((k * 16 * kPanelBytes) >> 4),
                                   db + ((k * 16 * kPanelBytes) >> 4));
}

}  // namespace flashcore::sm90
