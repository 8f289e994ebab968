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
FC_DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// S (64 x N) = A B^T over kDepth columns. A: rows_a x kDepth panels in shared memory starting at
// this warpgroup's row 0; B: N x kDepth. Both K-major. Issues, does not wait.
template <class T, int N, int kDepth, int kRowsA>
FC_DEVICE void gemm_abt(float (&s)[N / 2], const void* a, const void* b) {
  uint64_t const da = k_major_descriptor() | (smem_address(a) >> 4);
  uint64_t const db = k_major_descriptor() | (smem_address(b) >> 4);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    int const panel = k / 4, step = k % 4;
    Wgmma<T, N>::template ss<0>(s, da + ((panel * kRowsA * kPanelBytes + step * 32) >> 4),
                                db + ((panel * N * kPanelBytes + step * 32) >> 4), k > 0);
  }
}

// O (64 x N) += P B. P: 64 x kDepth in registers, packed; B: kDepth x N panels, MN-major.
template <class T, int N, int kDepth>
FC_DEVICE void gemm_pb(float (&o)[N / 2], const uint32_t (&p)[kDepth / 4], const void* b) {
  uint64_t const db = mn_major_descriptor(kDepth) | (smem_address(b) >> 4);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    Wgmma<T, N>::template rs<1>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                                db + ((k * 16 * kPanelBytes) >> 4), 1);
}

}  // namespace flashcore::sm90
