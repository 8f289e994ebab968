// dQ from its float32 sums, where no key tile could write it: scaled, converted, in rows.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/store.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

// One block of threads takes one query block of one head; thread t holds what consumer thread t of
// the main kernel, or of its cluster, held.
template <class T>
__global__ void __launch_bounds__(T::Dq::kThreads, 1)
    flash_bwd_sm90_postprocess(const __grid_constant__ BwdParams p) {
  int const block = blockIdx.x, head = block / p.head_blocks;
  QueryBlock const at = query_block(p, block % p.head_blocks, T::kBlockM);
  tile::ShortSequence const seq = tile::short_sequence_of(p, at.batch, p.alike);
  wait_for_kernel_before();
  if (at.written <= 0) return;
  int const consumer = threadIdx.x / 128;

  typename T::DqTile dq = {};
  add_sums(dq, dq_block<T>(p, block) + T::Dq::offset(threadIdx.x), T::Dq::quads(consumer));
  int const row = at.row + T::Dq::row(consumer), col = T::Dq::col(consumer);
  if (p.redo_keys && broken(dq))
    return Repair<T>::dq_rows(p, at.batch, head, row + threadIdx.x % 128 / 32 * 16, col,
                              min_of(col + 8 * T::Dq::quads(consumer), p.head_dim));
  store_rows<typename T::Element>(p.dq, p.accumulate, dq, p.scale, at.batch, head,
                                  seq.q_begin + row, seq.seqlen_q - row, at.row + at.written - row,
                                  col, p.head_dim - col);
}

}  // namespace flashcore::sm90::bwd
