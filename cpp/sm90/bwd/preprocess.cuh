// What the main kernel needs per query row, and zeros where it adds, or where it never comes.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/ptx/launch.cuh"
#include "sm90/ptx/memory.cuh"

namespace flashcore::sm90::bwd {

constexpr int kPreprocessThreads = 256;
// On a multiprocessor at once: a thread keeps 2 * block_m * head_dim_v / 256 elements on their way.
template <class T>
constexpr int kPreprocessBlocks = T::kBlockM * T::kPanelsV > 160 ? 2 : 4;

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
  if (!p.whole_heads) {
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

// Asks for the lines of a matrix's rows that this block's queries face, so that L2 has them when
// the main kernel begins.
template <int kCols, int kRows>
FC_DEVICE void prefetch_rows(const Matrix& m, int batch, int head, int row, int rows, int cols) {
  constexpr int kLines = ceil_div(kCols, 64);  // of 128 bytes, of a row
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kLines; i += kPreprocessThreads)
    if (i / kLines < rows && i % kLines * 64 < cols)
      prefetch_l2(row_address<uint16_t>(m, batch, head, row + i / kLines, i % kLines * 64));
}

// One block of threads takes one query block of one head.
template <class T>
__global__ void __launch_bounds__(kPreprocessThreads, kPreprocessBlocks<T>)
    flash_bwd_sm90_preprocess(const __grid_constant__ BwdParams p) {
  using Element = typename T::Element;
  let_next_kernel_begin();
  constexpr int kLanes = T::kPanelsV > 2 ? 32 : 8 * T::kPanelsV;  // of one row, 16 bytes each
  constexpr int kRows = kPreprocessThreads / kLanes;
  constexpr int kSteps = T::kBlockM / kRows;  // rows of a thread, kRows apart
  static_assert(T::kBlockM % kRows == 0 && kSteps <= kLanes && kLanes <= 32);

  int const block = blockIdx.x, head = block / p.head_blocks;
  QueryBlock at;
  int q_begin, rows;  // rows: of the block, if it has that many
  auto const find = [&](bool alike) {
    at = query_block(p, block % p.head_blocks, T::kBlockM, alike);
    tile::ShortSequence const seq = tile::short_sequence_of(p, at.batch, alike);
    q_begin = seq.q_begin;
    rows = seq.seqlen_q - at.row;
  };
  p.alike ? find(true) : find(false);  // one branch on the way to the first load
  int const lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;

  uint4 out[kSteps], dout[kSteps];
  auto begin = [&](const Matrix& m) {
    return row_address<const Element>(m, at.batch, head, q_begin + at.row + first, 8 * lane);
  };
  auto const *from_out = begin(p.out_ref), *from_dout = begin(p.dout_ref);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    out[i] = dout[i] = {0, 0, 0, 0};
    if (i * kRows + first < rows && 8 * lane < p.head_dim_v) {
      out[i] = *reinterpret_cast<const uint4*>(from_out);
      dout[i] = *reinterpret_cast<const uint4*>(from_dout);
    }
    from_out += kRows * p.out_ref.row_stride;
    from_dout += kRows * p.dout_ref.row_stride;
  }
  // Each lane finishes one of the rows.
  int const row = lane * kRows + first;
  bool const finishes = lane < kSteps, exists = finishes && row < rows;
  int64_t const row_of_tensor = q_begin + at.row + row;
  float lse = -INFINITY, dlse = 0.0f;
  if (exists) {
    lse = p.lse[at.batch * p.lse_batch_stride + head * p.lse_head_stride + row_of_tensor];
    if (p.dlse)
      dlse = p.dlse[at.batch * p.dlse_batch_stride + head * p.dlse_head_stride + row_of_tensor];
  }
  // While that is on its way.
  if (p.prefetch) {
    prefetch_rows<T::kHeadDim, T::kBlockM>(p.q_ref, at.batch, head, at.row, rows, p.head_dim);
    if (head < p.scheduler.heads) {  // as many as there are of keys
      int const keys = p.seqlen_k - at.row;
      prefetch_rows<T::kHeadDim, T::kBlockM>(p.k_ref, at.batch, head, at.row, keys, p.head_dim);
      prefetch_rows<T::kHeadDimV, T::kBlockM>(p.v_ref, at.batch, head, at.row, keys, p.head_dim_v);
    }
  }
  if (p.redo_queries && threadIdx.x < 16) p.redo_queries[int64_t{block} * 16 + threadIdx.x] = 0;
  if (at.written > 0) clear_dq<T>(p, at, q_begin, head);
  if (p.dq_heads && block < p.pairs && threadIdx.x < T::kConsumers)
    p.dq_heads[block * T::kConsumers + threadIdx.x] = {0, 0};

  float delta = 0.0f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float sum = 0.0f;
    uint32_t const os[] = {out[i].x, out[i].y, out[i].z, out[i].w};
    uint32_t const gs[] = {dout[i].x, dout[i].y, dout[i].z, dout[i].w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // Where O is zero dO may be anything: the row may see no key.
      float2 const o = unpack<Element>(os[c]), g = unpack<Element>(gs[c]);
      sum = o.x != 0.0f ? __fmaf_rn(o.x, g.x, sum) : sum;
      sum = o.y != 0.0f ? __fmaf_rn(o.y, g.y, sum) : sum;
    }
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    delta = lane == i ? sum : delta;
  }
  if (!finishes) return;
  bool const no_key = lse == -INFINITY;  // then P = exp(S - inf) = 0
  float const minus_delta = no_key ? 0.0f : dlse - delta;
  float const minus_lse = no_key ? -INFINITY : -lse / p.score_scale;
  int64_t const to = int64_t{block} * T::kBlockM + row;
  p.minus_delta[to] = minus_delta;
  p.minus_lse[to] = minus_lse;
  if constexpr (T::kStatProducts) {
    constexpr float kNever = StatParts::kNever;
    p.lse_parts[to] = StatParts::of(minus_lse < kNever ? kNever : minus_lse);
    p.delta_parts[to] = StatParts::of(minus_delta);
  }
}

}  // namespace flashcore::sm90::bwd
