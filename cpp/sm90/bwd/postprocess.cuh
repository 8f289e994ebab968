// dQ from its float32 sums, where no key tile could write it: scaled, converted, in rows.
#pragma once
#include "sm90/bwd/store_dq.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

// A transposed query block by way of shared memory: a thread then has eight neighbours of a row,
// and a warp some rows.
template <class T>
FC_DEVICE void store_transposed_dq(const BwdParams& p, QueryBlock at, int head, int q_begin,
                                   int rows, int valid, const typename T::DqTile& dq) {
  constexpr int kPadded = T::kHeadDim + 4;  // lanes that write meet no bank twice
  constexpr int kChunks = T::kHeadDim / 8, kWarpRows = 32 / kChunks;
  __shared__ alignas(16) float tile[T::kBlockM][kPadded];
#pragma unroll
  for (int i = 0; i < 4 * T::Dq::quads(0); ++i) {
    Coord const c = T::Dq::at(threadIdx.x / 128, accumulator_coord(threadIdx.x % 128, i));
    tile[c.row][c.col] = dq[i];
  }
  __syncthreads();
  int const col = threadIdx.x % kChunks * 8;
#pragma unroll 1
  for (int row = threadIdx.x / kChunks; row < T::kBlockM; row += T::Dq::kThreads / kChunks) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = tile[row][col + i];
    if (p.redo_keys && broken(x))
      Repair<T>::dq_rows(p, at.batch, head, at.row + row / kWarpRows * kWarpRows, kWarpRows, 0,
                         p.head_dim);
    else if (row < rows && col < p.head_dim)
      store_chunk<typename T::Element>(p.dq, p.accumulate, x, row < valid ? p.scale : 0.0f,
                                       at.batch, head, q_begin + at.row + row, col);
  }
}

template <class T>
__global__ void __launch_bounds__(T::Dq::kThreads, T::Dq::kTransposed ? 3 : 1)
    flash_bwd_sm90_postprocess(const __grid_constant__ BwdParams p) {
  int const block = blockIdx.x, head = block / p.head_blocks;
  QueryBlock const at = query_block(p, block % p.head_blocks, T::kBlockM);
  tile::ShortSequence const seq = tile::short_sequence_of(p, at.batch, p.alike);
  wait_for_kernel_before();
  if (at.written <= 0) return;
  typename T::DqTile dq = {};
  add_sums(dq, dq_block<T>(p, block) + T::Dq::offset(threadIdx.x), T::Dq::quads(threadIdx.x / 128));
  int const rows = at.written, valid = seq.seqlen_q - at.row;
  if constexpr (T::Dq::kTransposed)
    store_transposed_dq<T>(p, at, head, seq.q_begin, rows, valid, dq);
  else
    store_dq<T>(p, at, head, threadIdx.x / 128, seq.q_begin, rows, valid, dq);
}

}  // namespace flashcore::sm90::bwd
