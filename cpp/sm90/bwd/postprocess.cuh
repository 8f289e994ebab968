// dQ from its float32 sums, where no key tile could write it: scaled, converted, in rows.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/store.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

// Of one query block of one head; thread t has what consumer thread t of the main kernel, or of its
// cluster, had. rows: those that are written; valid: of these, the ones that are no padding.
template <class T>
struct StoreDq {
  using Element = typename T::Element;

  const BwdParams& p;
  QueryBlock at;
  int head, q_begin, rows, valid;

  FC_DEVICE void as_it_lies(const typename T::DqTile& dq) const {
    int const consumer = threadIdx.x / 128;
    int const row = T::Dq::row(consumer), col = T::Dq::col(consumer);
    if (p.redo_keys && broken(dq))
      Repair<T>::dq_rows(p, at.batch, head, at.row + row + threadIdx.x % 128 / 32 * 16, 16, col,
                         min_of(col + 8 * T::Dq::quads(consumer), p.head_dim));
    else
      store_rows<Element>(p.dq, p.accumulate, dq, p.scale, at.batch, head, q_begin + at.row + row,
                          valid - row, rows - row, col, p.head_dim - col);
  }

  // By way of shared memory: a thread then has eight neighbours of a row, and a warp some rows.
  FC_DEVICE void transposed(const typename T::DqTile& dq) const {
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
        store_chunk<Element>(p.dq, p.accumulate, x, row < valid ? p.scale : 0.0f, at.batch, head,
                             q_begin + at.row + row, col);
    }
  }
};

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
  StoreDq<T> const store{p, at, head, seq.q_begin, at.written, seq.seqlen_q - at.row};
  if constexpr (T::Dq::kTransposed)
    store.transposed(dq);
  else
    store.as_it_lies(dq);
}

}  // namespace flashcore::sm90::bwd
