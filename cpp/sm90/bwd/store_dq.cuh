// dQ from its float32 sums: scaled, converted, in rows.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/query_blocks.h"

namespace flashcore::sm90::bwd {

// What one part of those that divide dQ holds of a query block, as it lies. Every thread of a warp
// must call it. rows: of the block, those that are written; valid: of these, the ones that are no
// padding.
template <class T>
FC_DEVICE void store_dq(const BwdParams& p, QueryBlock at, int head, int part, int q_begin,
                        int rows, int valid, const typename T::DqTile& dq) {
  int const row = T::Dq::row(part), col = T::Dq::col(part);
  if (p.redo_keys && broken(dq))
    Repair<T>::dq_rows(p, at.batch, head, at.row + row + threadIdx.x % 128 / 32 * 16, 16, col,
                       min_of(col + 8 * T::Dq::quads(part), p.head_dim));
  else
    store_rows<typename T::Element>(p.dq, p.accumulate, dq, p.scale, at.batch, head,
                                    q_begin + at.row + row, valid - row, rows - row, col,
                                    p.head_dim - col);
}

}  // namespace flashcore::sm90::bwd
