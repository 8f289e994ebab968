// What the main kernel needs per query row, and zeros where it adds, or where it never comes.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

constexpr int kPreprocessThreads = 256;
// On a multiprocessor at once: a thread keeps 2 * block_m * head_dim_v / 256 elements on their way.
template <class T>
constexpr int kPreprocessBlocks = T::kBlockM * T::kPanelsV > 128 ? 2 : 4;

// True if a key tile visits the query block. Every thread of the block must call it.
template <class T>
FC_DEVICE bool visited(const BwdParams& p, QueryBlock at) {
  tile::ShortSequence const seq = tile::short_sequence_of(p, at.batch, p.alike);
  bool any = false;
  for (int n = threadIdx.x; n < key_tiles(p, at.batch, T::kBlockN); n += kPreprocessThreads) {
    tile::BlockRange<int> const rows = rows_of(seq, n, T::kBlockM, T::kBlockN);
    any |= rows.first <= at.row / T::kBlockM && at.row / T::kBlockM < rows.last;
  }
  return __syncthreads_or(any);
}

// The sums of dQ become zero if key tiles will add to them; else dQ itself does where no key tile
// comes.
template <class T>
FC_DEVICE void clear_dq(const BwdParams& p, QueryBlock at, int q_begin, int head) {
  using Element = typename T::Element;
  if (!p.dq.data) return;
  if (T::kLists || !p.whole_heads) {
    float4* const sums = reinterpret_cast<float4*>(dq_block<T>(p, blockIdx.x));
#pragma unroll
    for (int i = threadIdx.x; i < T::kBlockM * T::kHeadDim / 4; i += kPreprocessThreads)
      sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    return;
  }
  if (p.accumulate || visited<T>(p, at)) return;
  for (int i = threadIdx.x; i < T::kBlockM * p.head_dim; i += kPreprocessThreads) {
    int const row = i / p.head_dim, col = i % p.head_dim;
    if (row >= at.written) return;
    int64_t const to = q_begin + at.row + row;
    if (p.dq.f32)
      *row_address<float>(p.dq, at.batch, head, to, col) = 0.0f;
    else
      *row_address<Element>(p.dq, at.batch, head, to, col) = Element(0.0f);
  }
}

// One block of threads takes one query block of one head.
template <class T>
__global__ void __launch_bounds__(kPreprocessThreads, kPreprocessBlocks<T>)
    flash_bwd_sm90_preprocess(const __grid_constant__ BwdParams p) {
  using Element = typename T::Element;
  let_next_kernel_begin();
  constexpr int kLanes = T::kPanelsV > 2 ? 32 : 8 * T::kPanelsV;  // of one row, 16 bytes each
  constexpr int kRows = kPreprocessThreads / kLanes;
  static_assert(T::kBlockM % kRows == 0 && kLanes <= 32);

  int const block = blockIdx.x, head = block / p.head_blocks;
  QueryBlock at;
  int q_begin, rows;  // rows: of the sequence, from this thread's first on
  auto const find = [&](bool alike) {
    at = query_block(p, block % p.head_blocks, T::kBlockM, alike);
    tile::ShortSequence const seq = tile::short_sequence_of(p, at.batch, alike);
    q_begin = seq.q_begin;
    rows = seq.seqlen_q - at.row - threadIdx.x / kLanes;
  };
  p.alike ? find(true) : find(false);  // one branch on the way to the first load
  int const lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;

  uint4 out[T::kBlockM / kRows], dout[T::kBlockM / kRows];
  float lse[T::kBlockM / kRows];
  int64_t const row_of_tensor = q_begin + at.row + first;
  auto begin = [&](const Matrix& m) {
    return row_address<const Element>(m, at.batch, head, row_of_tensor, 8 * lane);
  };
  auto const *from_out = begin(p.out_ref), *from_dout = begin(p.dout_ref);
  const float* const from_lse =
      p.lse + at.batch * p.lse_batch_stride + head * p.lse_head_stride + row_of_tensor;
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    bool const exists = i * kRows < rows;
    out[i] = dout[i] = {0, 0, 0, 0};
    if (exists && 8 * lane < p.head_dim_v) {
      out[i] = *reinterpret_cast<const uint4*>(from_out + i * kRows * p.out_ref.row_stride);
      dout[i] = *reinterpret_cast<const uint4*>(from_dout + i * kRows * p.dout_ref.row_stride);
    }
    lse[i] = exists && lane == 0 ? from_lse[i * kRows] : -INFINITY;
  }
  // While that is on its way.
  if (p.redo_queries && threadIdx.x < 16) p.redo_queries[int64_t{block} * 16 + threadIdx.x] = 0;
  if (at.written > 0) clear_dq<T>(p, at, q_begin, head);
#pragma unroll
  for (int i = 0; i < T::kBlockM / kRows; ++i) {
    float delta = 0.0f;
    uint32_t const os[] = {out[i].x, out[i].y, out[i].z, out[i].w};
    uint32_t const gs[] = {dout[i].x, dout[i].y, dout[i].z, dout[i].w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // Where O is zero dO may be anything: the row may see no key.
      float2 const o = unpack<Element>(os[c]), g = unpack<Element>(gs[c]);
      delta = o.x != 0.0f ? __fmaf_rn(o.x, g.x, delta) : delta;
      delta = o.y != 0.0f ? __fmaf_rn(o.y, g.y, delta) : delta;
    }
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2)
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (lane != 0) continue;
    int const row = i * kRows + first;
    if (lse[i] == -INFINITY)  // no key: P = exp(S - inf) = 0
      delta = 0.0f;
    else if (p.dlse)
      delta -= p.dlse[at.batch * p.dlse_batch_stride + head * p.dlse_head_stride + q_begin + at.row +
                      row];
    int64_t const to = int64_t{block} * T::kBlockM + row;
    p.minus_delta[to] = -delta;
    float const minus_lse = lse[i] == -INFINITY ? -INFINITY : -lse[i] / p.score_scale;
    p.minus_lse[to] = minus_lse;
    if constexpr (T::kStatProducts) {
      constexpr float kNever = StatParts::kNever;
      p.lse_parts[to] = StatParts::of(minus_lse < kNever ? kNever : minus_lse);
      p.delta_parts[to] = StatParts::of(-delta);
    }
  }
}

}  // namespace flashcore::sm90::bwd
