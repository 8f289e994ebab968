// What the main kernel needs per query row, and zeros where it adds, or where it never comes.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

constexpr int kPreprocessThreads = 256;

// True if a key tile visits the query block. Every thread of the block must call it.
template <class T>
FC_DEVICE bool visited(const BwdParams& p, const tile::Sequence& seq, QueryBlock at) {
  bool any = false;
  for (int n = threadIdx.x; n < key_tiles(p, at.batch, T::kBlockN); n += kPreprocessThreads) {
    tile::BlockRange const rows = rows_of(p, seq, n, T::kBlockM, T::kBlockN);
    any |= rows.first <= at.m && at.m < rows.last;
  }
  return __syncthreads_or(any);
}

// The sums of dQ become zero if key tiles will add to them; else dQ itself does where no key tile
// comes.
template <class T>
FC_DEVICE void clear_dq(const BwdParams& p, const tile::Sequence& seq, QueryBlock at, int head) {
  using Element = typename T::Element;
  if (!p.dq.data) return;
  if (T::kLists || !p.whole_heads) {
    float4* const sums = reinterpret_cast<float4*>(dq_block<T>(p, blockIdx.x));
#pragma unroll
    for (int i = threadIdx.x; i < T::kBlockM * T::kHeadDim / 4; i += kPreprocessThreads)
      sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    return;
  }
  if (p.accumulate || visited<T>(p, seq, at)) return;
  for (int i = threadIdx.x; i < T::kBlockM * p.head_dim; i += kPreprocessThreads) {
    int const row = i / p.head_dim, col = i % p.head_dim;
    if (row >= at.written) return;
    int64_t const to = seq.q_begin + at.row + row;
    if (p.dq.f32)
      *row_address<float>(p.dq, at.batch, head, to, col) = 0.0f;
    else
      *row_address<Element>(p.dq, at.batch, head, to, col) = Element(0.0f);
  }
}

// One block of threads takes one query block of one head.
template <class T>
__global__ void __launch_bounds__(kPreprocessThreads)
    flash_bwd_sm90_preprocess(const __grid_constant__ BwdParams p) {
  using Element = typename T::Element;
  let_next_kernel_begin();
  constexpr int kLanes = T::kPanelsV > 2 ? 32 : 8 * T::kPanelsV;  // of one row, 16 bytes each
  constexpr int kRows = kPreprocessThreads / kLanes;
  static_assert(T::kBlockM % kRows == 0 && kLanes <= 32);

  int const head = blockIdx.x / p.head_blocks;
  QueryBlock const at = query_block(p, blockIdx.x % p.head_blocks, T::kBlockM);
  tile::Sequence const seq = tile::sequence_of(p, at.batch);
  int const rows = static_cast<int>(seq.seqlen_q) - at.row;  // of the block, if it has that many
  if (p.redo_queries && threadIdx.x < 16)
    p.redo_queries[int64_t{blockIdx.x} * 16 + threadIdx.x] = 0;
  if (at.written > 0) clear_dq<T>(p, seq, at, head);
  int const lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;

  union Chunk {
    uint4 bits{0, 0, 0, 0};
    Element x[8];
    FC_DEVICE Chunk() {}
  } out[T::kBlockM / kRows], dout[T::kBlockM / kRows];
  auto load = [&](Chunk& chunk, const Matrix& m, int row) {
    if (row < rows && 8 * lane < p.head_dim_v)
      chunk.bits = *reinterpret_cast<const uint4*>(
          row_address<Element>(m, at.batch, head, seq.q_begin + at.row + row, 8 * lane));
  };
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    load(out[i], p.out_ref, i * kRows + first);
    load(dout[i], p.dout_ref, i * kRows + first);
  }
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    float delta = 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      // Where O is zero dO may be anything: the row may see no key.
      float const o = static_cast<float>(out[i].x[c]), g = static_cast<float>(dout[i].x[c]);
      delta = o != 0.0f ? __fmaf_rn(o, g, delta) : delta;
    }
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2)
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (lane != 0) continue;
    int const row = i * kRows + first;
    int64_t const of_tensor = seq.q_begin + at.row + row;
    float lse = -INFINITY;
    if (row < rows)
      lse = p.lse[at.batch * p.lse_batch_stride + head * p.lse_head_stride + of_tensor];
    if (lse == -INFINITY)  // no key: P = exp(S - inf) = 0
      delta = 0.0f;
    else if (p.dlse)
      delta -= p.dlse[at.batch * p.dlse_batch_stride + head * p.dlse_head_stride + of_tensor];
    int64_t const to = int64_t{blockIdx.x} * T::kBlockM + row;
    p.minus_delta[to] = -delta;
    float const minus_lse = lse == -INFINITY ? -INFINITY : -lse / p.score_scale;
    p.minus_lse[to] = minus_lse;
    if constexpr (T::kStatProducts) {
      constexpr float kNever = StatParts::kNever;
      p.lse_parts[to] = StatParts::of(minus_lse < kNever ? kNever : minus_lse);
      p.delta_parts[to] = StatParts::of(-delta);
    }
  }
}

}  // namespace flashcore::sm90::bwd
