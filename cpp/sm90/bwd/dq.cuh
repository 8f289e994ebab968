// dQ is summed over key tiles in float32, in global memory. Each query block of a head has
// block_m * head_dim floats there, in the order in which the threads hold them: quad i of thread t
// is float4 number i * threads + t. So a warp adds 512 contiguous bytes with one instruction, with
// no staging in shared memory, and postprocess.cuh finds the elements by the same rule.
#pragma once
#include "sm90/bwd/traits.cuh"
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::bwd {

template <class T>
FC_DEVICE float* dq_block(const BwdParams& p, int batch, int head, int m_block) {
  return p.dq_sum +
         ((int64_t{batch} * p.heads + head) * p.m_blocks + m_block) * (T::kBlockM * T::kHeadDim);
}

// Adds quads kFirst, kFirst + 1, ... of a consumer thread.
template <class T, int kFirst, int N>
FC_DEVICE void add_dq(float* block, const float (&dq)[N], int thread) {
  float* const own = block + 4 * thread;
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    reduce_add_x4(own + 4 * (kFirst + i) * T::kConsumerThreads, dq[4 * i], dq[4 * i + 1],
                  dq[4 * i + 2], dq[4 * i + 3]);
}

template <class T>
FC_DEVICE void load_dq(typename T::DqTile& dq, const float* block, int thread) {
#pragma unroll
  for (int i = 0; i < T::kDqCols / 8; ++i) {
    float4 const x =
        *reinterpret_cast<const float4*>(block + 4 * (i * T::kConsumerThreads + thread));
    dq[4 * i] = x.x;
    dq[4 * i + 1] = x.y;
    dq[4 * i + 2] = x.z;
    dq[4 * i + 3] = x.w;
  }
}

// Where the consumer's 64 x kDqCols part lies in the block.
template <class T>
FC_DEVICE int dq_row(int consumer) {
  return T::kDqByRows ? 64 * consumer : 0;
}
template <class T>
FC_DEVICE int dq_col(int consumer) {
  return T::kDqByRows ? 0 : T::kDqCols * consumer;
}

}  // namespace flashcore::sm90::bwd
