// dQ is summed over key tiles in float32, in global memory. Each query block of a head has
// block_m * head_dim floats there, in the order in which the threads hold them: first by warp of
// the consumers, then by quad of registers, then by lane. So a warp adds 512 contiguous bytes with
// one instruction, and postprocess.cuh finds the elements by the same rule.
#pragma once
#include "sm90/bwd/store.cuh"
#include "sm90/bwd/traits.cuh"
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::bwd {

template <class T>
FC_DEVICE float* dq_block(const BwdParams& p, int block) {
  return p.dq_sum + int64_t{block} * (T::kBlockM * T::kHeadDim);
}

// Where a consumer thread's quads begin in a block, in floats; quad i is 128 * i further.
template <class T>
FC_DEVICE int dq_offset(int thread) {
  return thread / 32 * (T::kDqCols / 2 * 32) + thread % 32 * 4;
}

// Sets or adds quads from `to` on.
template <class T, int N>
FC_DEVICE void set_dq(float* to, const float (&dq)[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    *reinterpret_cast<float4*>(to + 128 * i) = {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2],
                                                dq[4 * i + 3]};
}
template <class T, int N>
FC_DEVICE void add_dq(float* to, const float (&dq)[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    reduce_add_x4(to + 128 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}

// dq becomes the quads from `from` on, plus what it was. Not from the first-level cache, which
// does not see what add_dq does.
template <int N>
FC_DEVICE void add_sums(float (&dq)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float4 const x = __ldcg(reinterpret_cast<const float4*>(from + 128 * i));
    dq[4 * i] += x.x;
    dq[4 * i + 1] += x.y;
    dq[4 * i + 2] += x.z;
    dq[4 * i + 3] += x.w;
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

// This thread's sums of query block m of one head, from the consumer's quad kFirst on.
template <class T, int kFirst>
FC_DEVICE float* dq_sums(const BwdParams& p, const Work& work, int head, int m) {
  return dq_block<T>(p, work.sums + head * p.slot_blocks + m) + dq_offset<T>(thread_index() - 128) +
         128 * kFirst;
}

// Where dQ goes from here: to those sums, or to its rows.
template <class T, int kFirst, int N>
FC_DEVICE void put_dq(const BwdParams& p, const Work& work, int consumer, int head, int m,
                      float* sums, float (&dq)[N]) {
  if (!p.dq.data) return;
  if (!p.whole_heads || (m >= work.complete && m < work.fresh)) {
    add_dq<T>(sums, dq);
  } else if (m >= work.complete) {
    set_dq<T>(sums, dq);
  } else {
    if (m < work.fresh) add_sums(dq, sums);
    int const row = m * T::kBlockM + dq_row<T>(consumer);
    int const col = dq_col<T>(consumer) + 8 * kFirst;
    store_rows<typename T::Element>(p.dq, p.accumulate, dq, p.scale, work.batch, head,
                                    int64_t{work.q_begin} + row, work.seqlen_q - row,
                                    work.written_q - row, col, p.head_dim - col);
  }
}

}  // namespace flashcore::sm90::bwd
