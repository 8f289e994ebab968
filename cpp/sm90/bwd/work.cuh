// What one block does next, and what a consumer knows while it does it.
#pragma once
#include "sm90/bwd/scores.cuh"
#include "sm90/bwd/traits.cuh"
#include "tile/block_range.h"
#include "tile/pipeline.h"

namespace flashcore::sm90::bwd {

// One key tile and the query blocks it visits, in every head of its group; producer and consumers
// compute it alike.
template <class T>
struct Work {
  int batch, kv_head;
  int key;                           // first key
  int64_t q_offset;                  // the key that query row 0 faces
  int first, full, last_full, last;  // query blocks; those outside [full, last_full) need the mask

  FC_DEVICE Work(const BwdParams& p, int index) {
    tile::Tile const tile = p.scheduler.tile(index);
    batch = tile.batch;
    kv_head = tile.head;
    key = (p.scheduler.m_blocks - 1 - tile.m_block) * T::kBlockN;
    q_offset = p.q_offset_tensor ? p.q_offset_tensor[batch] : p.q_offset;
    // Rows past the end have lse = +inf and need no mask; keys past the end do.
    int const end = min_of(key + T::kBlockN, p.seqlen_k);
    tile::BlockRange const rows = tile::row_blocks(p.window, key, end, q_offset,
                                                   int64_t{p.m_blocks} * T::kBlockM, T::kBlockM);
    first = static_cast<int>(rows.first);
    last = static_cast<int>(rows.last);
    bool const whole = end == key + T::kBlockN;
    full = whole ? static_cast<int>(rows.first_full) : last;
    last_full = static_cast<int>(rows.last_full);
  }
  FC_DEVICE bool empty() const { return last <= first; }
  FC_DEVICE bool masked(int m) const { return m < full || m >= last_full; }
};

// A consumer in the middle of a tile.
template <class T>
struct Consumer {
  const BwdParams& p;
  typename T::Shared& sh;
  const Work<T>& work;
  int index;   // which consumer
  int thread;  // among those of all consumers
  tile::Ring<T::kStages>& ring;
  typename T::GradientTile &rdK, &rdV;

  FC_DEVICE int warp() const { return thread % 128 / 32; }
  FC_DEVICE int lane() const { return thread % 32; }

  // body<kNext>(head, m) for every query block of the group's heads; kNext: another one follows.
  template <class Body>
  FC_DEVICE void for_each_step(Body body) const {
    int head = work.kv_head * p.group, m = work.first;
    for (int steps = p.group * (work.last - work.first); steps > 1; --steps) {
      body(std::true_type(), head, m);
      if (++m == work.last) {
        m = work.first;
        ++head;
      }
    }
    body(std::false_type(), head, m);
  }

  // One arrival per warp: the warps of a warpgroup may be apart.
  FC_DEVICE void release(Barrier& free) const {
    if (threadIdx.x % 32 == 0) free.arrive();
  }
};

}  // namespace flashcore::sm90::bwd
