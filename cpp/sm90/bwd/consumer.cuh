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
  tile::Ring<T::kStages>& ring;
  typename T::GradientTile &rdK, &rdV;

  FC_DEVICE int warp() const { return threadIdx.x % 128 / 32; }
  FC_DEVICE int lane() const { return threadIdx.x % 32; }

  // Read where it is, so that it takes no registers.
  FC_DEVICE const Work& work() const { return sh.work; }

  // This thread's keys. Worked out where they are needed, for the same reason.
  FC_DEVICE KeyPair keys() const {
    return KeyPair(work(), (T::kByKeys ? 64 * index : 0) + 16 * warp() + lane() / 4, p.seqlen_k);
  }

  // body<kNext>(head, m) for every query block of the group's heads; kNext: another one follows.
  template <class Body>
  FC_DEVICE void for_each_step(Body body) const {
    int head = work().kv_head * p.group, m = work().first;
    while (m + 1 < work().last || head + 1 < (work().kv_head + 1) * p.group) {
      body(std::true_type(), head, m);
      if (++m == work().last) {
        m = work().first;
        ++head;
      }
    }
    body(std::false_type(), (work().kv_head + 1) * p.group - 1, work().last - 1);
  }

  // One arrival per warp: the warps of a warpgroup may be apart.
  FC_DEVICE void release(Barrier& free) const {
    if (threadIdx.x % 32 == 0) free.arrive();
  }
};

}  // namespace flashcore::sm90::bwd
