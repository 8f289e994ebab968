// What a consumer knows in the middle of a tile.
#pragma once
#include "sm90/bwd/own_steps.h"
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
  int tile;   // which of the tiles whose K is there
  tile::Ring<T::kStages>& ring;
  tile::Ring<T::kDsBuffers>& ds;  // the buffer of dS that is written next
  typename T::GradientTile &rdK, &rdV;
  OwnSteps own;  // where kPassesOver

  // A step: a query block of a query head of the group. Worked out before the wait that ends the
  // step before it, so that nobody waits for shared memory.
  struct Step {
    int head, m;
    bool masked, last;
    bool skips;  // none of this consumer's keys is meant; only with block lists
  };

  // Read where it is, so that it takes no registers.
  FC_DEVICE const Work& work() const { return sh.work[tile]; }
  FC_DEVICE char* k() const { return sh.k[tile]; }

  // This thread's keys. Worked out where they are needed, for the same reason.
  FC_DEVICE KeyPair keys(Step at) const {
    KeyPair keys(work(), warp_key() + thread_index() % 32 / 4);
    if (T::kLists && at.skips) keys.existing = 0;
    if (T::kLaps && at.m >= p.laps.blocks) keys.rows += p.laps.blocks * T::kBlockM;
    return keys;
  }
  // The first of the warp's sixteen keys, of the tile.
  FC_DEVICE int warp_key() const {
    return T::first_key(index, rank) + thread_index() % 128 / 32 * 16;
  }

  FC_DEVICE Step step_at(int head, int m) const {
    int block = m;
    if constexpr (T::kLaps) block = p.laps.block(m);
    return {head, m, work().masked(block),
            m + work().stride == (T::kPassesOver ? own.end : work().end) &&
                head + 1 == first_head() + p.group,
            false};
  }
  // Where query heads share a key head all blocks are its own: there a block is a step for each
  // head, and the steps that are passed over would have a dQ to make in between.
  FC_DEVICE OwnSteps find_own() const {
    Work const& w = work();
    if (p.group > 1) return {w.begin, w.end};
    return OwnSteps::of(w, T::kBlockM, w.window_first, w.window_last, T::first_key(index, rank));
  }
  FC_DEVICE bool passes_over_first() const { return T::kPassesOver && own.begin != work().begin; }
  FC_DEVICE bool passes_over_last() const { return T::kPassesOver && own.end != work().end; }

  FC_DEVICE int first_head() const { return work().kv_head * p.group; }
  // The step whose Q is in the ring's stage, or the n-th before it.
  FC_DEVICE Step noted(int before = 0) const {
    int const slot = ring.stage + static_cast<int>(ring.parity) * T::kStages - before;
    StepNote const& note = sh.note[slot + (slot < 0 ? 2 * T::kStages : 0)];
    return {note.head, note.m, note.masked, note.last, note.skips[T::first_key(index, rank) / 64]};
  }

  // With block lists, the ring must be at that step, and have waited for it.
  FC_DEVICE Step first_step() const {
    if constexpr (T::kLists) return noted();
    return step_at(first_head(), T::kPassesOver ? own.begin : work().begin);
  }
  FC_DEVICE Step step_after(Step s) const {
    if constexpr (T::kLists) return noted();
    bool const more = s.head + 1 < first_head() + p.group;
    return more ? step_at(s.head + 1, s.m) : step_at(first_head(), s.m + work().stride);
  }
  // Where the one before s was, if there was one; the ring is already a step further.
  struct Place {
    int head, m;
  };
  FC_DEVICE Place before(Step s) const {
    if constexpr (T::kLists) {
      Step const step = noted(2);
      return {step.head, step.m};
    }
    if (s.head > first_head()) return {s.head - 1, s.m};
    return {s.head + p.group - 1, s.m - work().stride};
  }

  // Around what is added to dQ of a step, the parity of whose number it is. See dq_order.cuh.
  FC_DEVICE void wait_turn(uint32_t parity) const {
    if (p.turns) sh.turn[index].wait(parity);
  }
  FC_DEVICE void pass_turn() const {
    if (p.turns) release(sh.added[index]);
  }

  // One arrival per warp: the warps of a warpgroup may be apart.
  FC_DEVICE void release(Barrier& free) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) free.arrive();
  }
};

}  // namespace flashcore::sm90::bwd
