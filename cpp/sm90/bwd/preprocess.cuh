// What the main kernel needs per query row, and zeros where it adds, or where it never comes.
#pragma once
#include "sm90/bwd/dq.cuh"

namespace flashcore::sm90::bwd {

constexpr int kPreprocessThreads = 256;

// True if a key tile visits the query block. Every thread of the block must call it.
FC_DEVICE bool visited(const BwdParams& p, int batch, int m_block, int block_m, int block_n) {
  int64_t const q_offset = p.q_offset_tensor ? p.q_offset_tensor[batch] : p.q_offset;
  bool any = false;
  for (int n = threadIdx.x; n < p.scheduler.m_blocks; n += kPreprocessThreads) {
    tile::BlockRange const rows = Work::rows_of(p, n, q_offset, block_m, block_n);
    any |= rows.first <= m_block && m_block < rows.last;
  }
  return __syncthreads_or(any);
}

// The sums of dQ become zero if key tiles will add to them; else dQ itself does where no key tile
// comes.
template <class T>
FC_DEVICE void clear_dq(const BwdParams& p, int batch, int head, int m_block) {
  using Element = typename T::Element;
  if (!p.dq.data) return;
  if (!p.whole_heads) {
    float4* const sums =
        reinterpret_cast<float4*>(dq_block<T>(p, p.dq_slot(0, batch, head), m_block));
#pragma unroll
    for (int i = threadIdx.x; i < T::kBlockM * T::kHeadDim / 4; i += kPreprocessThreads)
      sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    return;
  }
  if (p.accumulate || visited(p, batch, m_block, T::kBlockM, T::kBlockN)) return;
  for (int i = threadIdx.x; i < T::kBlockM * p.head_dim; i += kPreprocessThreads) {
    int const row = m_block * T::kBlockM + i / p.head_dim, col = i % p.head_dim;
    if (row >= p.seqlen_q) return;
    if (p.dq.f32)
      *row_address<float>(p.dq, batch, head, row, col) = 0.0f;
    else
      *row_address<Element>(p.dq, batch, head, row, col) = Element(0.0f);
  }
}

// One block of threads takes one query block of one head.
template <class T>
__global__ void __launch_bounds__(kPreprocessThreads)
    flash_bwd_sm90_preprocess(const __grid_constant__ BwdParams p) {
  using Element = typename T::Element;
  constexpr int kLanes = T::kHeadDim / 8;  // of one row, 16 bytes each
  constexpr int kRows = kPreprocessThreads / kLanes;
  static_assert(T::kBlockM % kRows == 0 && kLanes <= 32);

  int const m_block = blockIdx.x % p.m_blocks, pair = blockIdx.x / p.m_blocks;
  int const head = pair % p.heads, batch = pair / p.heads;
  clear_dq<T>(p, batch, head, m_block);
  int const lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;

  union Chunk {
    uint4 bits{0, 0, 0, 0};
    Element x[8];
    FC_DEVICE Chunk() {}
  } out[T::kBlockM / kRows], dout[T::kBlockM / kRows];
  auto load = [&](Chunk& chunk, const Matrix& m, int row) {
    if (row < p.seqlen_q && 8 * lane < p.head_dim_v)
      chunk.bits = *reinterpret_cast<const uint4*>(static_cast<const Element*>(m.data) +
                                                   batch * m.batch_stride + head * m.head_stride +
                                                   row * m.row_stride + 8 * lane);
  };
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    int const row = m_block * T::kBlockM + i * kRows + first;
    load(out[i], p.out_ref, row);
    load(dout[i], p.dout_ref, row);
  }
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    float delta = 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      delta = __fmaf_rn(static_cast<float>(out[i].x[c]), static_cast<float>(dout[i].x[c]), delta);
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2)
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (lane != 0) continue;
    int const row = m_block * T::kBlockM + i * kRows + first;
    float lse = -INFINITY;
    if (row < p.seqlen_q) lse = p.lse[batch * p.lse_batch_stride + head * p.lse_head_stride + row];
    if (lse == -INFINITY)  // no key: P = exp(S - inf) = 0
      delta = 0.0f;
    else if (p.dlse)
      delta -= p.dlse[batch * p.dlse_batch_stride + head * p.dlse_head_stride + row];
    int64_t const at = int64_t{pair} * p.m_blocks * T::kBlockM + row;
    p.minus_delta[at] = -delta;
    p.minus_lse[at] = lse == -INFINITY ? -INFINITY : -lse / p.scale;
  }
}

}  // namespace flashcore::sm90::bwd
