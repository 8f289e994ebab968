// What a consumer knows in the middle of a tile.
#pragma once
#include "sm90/bwd/scores.cuh"
#include "sm90/bwd/traits.cuh"
#include "tile/pipeline.h"

namespace flashcore::sm90::bwd {

template <class T>
struct Consumer {
  const BwdParams& p;
  typename T::Shared& sh;
  int index;  // which consumer
  int rank;   // which block of the cluster
  tile::Ring<T::kStages>& ring;
  tile::Ring<T::kDsBuffers>& ds;  // the buffer of dS that is written next
  typename T::GradientTile &rdK, &rdV;

  // Read where it is, so that it takes no registers.
  FC_DEVICE const Work& work() const { return sh.work; }

  // This thread's keys. Worked out where they are needed, for the same reason.
  FC_DEVICE KeyPair keys() const { return KeyPair(work(), warp_key() + thread_index() % 32 / 4); }
  // The first of the warp's sixteen keys, of the tile.
  FC_DEVICE int warp_key() const {
    return T::first_key(index, rank) + thread_index() % 128 / 32 * 16;
  }

  // A step: a query block of a query head of the group. Worked out before the wait that ends the
  // step before it, so that nobody waits for shared memory.
  struct Step {
    int head, m;
    bool masked, last;
  };
  FC_DEVICE Step step_at(int head, int m) const {
    return {head, m, work().masked(m),
            m + 1 == work().last && head + 1 == (work().kv_head + 1) * p.group};
  }
  FC_DEVICE Step first_step() const { return step_at(work().kv_head * p.group, work().first); }
  FC_DEVICE Step step_after(Step s) const {
    return s.m + 1 < work().last ? step_at(s.head, s.m + 1) : step_at(s.head + 1, work().first);
  }

  // One arrival per warp: the warps of a warpgroup may be apart.
  FC_DEVICE void release(Barrier& free) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) free.arrive();
  }
};

}  // namespace flashcore::sm90::bwd
