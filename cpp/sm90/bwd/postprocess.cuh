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

  // A warp has 16 columns of all rows.
  FC_DEVICE void transposed(const typename T::DqTile& dq) const {
    constexpr int kPatches = T::kBlockM / 16;  // of 16 rows
    int const col = T::Dq::col(threadIdx.x / 128) + threadIdx.x % 128 / 32 * 16;
    uint32_t redo = 0;
#pragma unroll
    for (int i = 0; i < kPatches; ++i) {
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = dq[8 * i + e];
      if (p.redo_keys && broken(x))
        redo |= 1u << i;
      else
        store_transposed_patch<Element>(p.dq, p.accumulate, x, p.scale, at.batch, head,
                                        q_begin + at.row + 16 * i, valid - 16 * i, rows - 16 * i,
                                        col, p.head_dim - col);
    }
#pragma unroll 1
    for (int i = 0; redo >> i; ++i)
      if (redo >> i & 1)
        Repair<T>::dq_rows(p, at.batch, head, at.row + 16 * i, 16, col,
                           min_of(col + 16, p.head_dim));
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
