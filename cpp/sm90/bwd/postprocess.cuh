// dQ from its float32 sums, where no key tile could write it: scaled, converted, in rows.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/store.cuh"

namespace flashcore::sm90::bwd {

// One block of threads takes one query block of one head; thread t holds what consumer thread t of
// the main kernel held.
template <class T>
__global__ void __launch_bounds__(T::kConsumerThreads)
    flash_bwd_sm90_postprocess(const __grid_constant__ BwdParams p) {
  int const m_block = blockIdx.x % p.m_blocks, pair = blockIdx.x / p.m_blocks;
  int const head = pair % p.heads, batch = pair / p.heads;
  int const consumer = threadIdx.x / 128;

  typename T::DqTile dq = {};
  add_sums(dq, dq_block<T>(p, p.dq_slot(0, batch, head), m_block) + dq_offset<T>(threadIdx.x));
  int const row = m_block * T::kBlockM + dq_row<T>(consumer), col = dq_col<T>(consumer);
  store_rows<typename T::Element>(p.dq, p.accumulate, dq, p.scale, batch, head, row,
                                  p.seqlen_q - row, col, p.head_dim - col);
}

}  // namespace flashcore::sm90::bwd
