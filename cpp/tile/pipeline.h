// A ring of shared-memory stages and the parity of its barriers. Host and device, constexpr.
//
// Each stage has two barriers, `ready` (filled) and `free` (drained). A barrier's phases alternate
// in parity; wait(parity) passes when the phase of that parity is over. The consumer waits for
// `ready` with parity 0 on the first lap; the producer waits for `free` with parity 1, which passes
// at once on a new barrier: every stage starts free.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

// kToggles: of two stages, without a comparison. The forward's steps are shorter for it; what else
// the compiler makes of it differs from kernel to kernel, and in the backward not all gain.
template <int kStages, bool kToggles = false>
struct Ring {
  static_assert(!kToggles || kStages == 2);
  int stage = 0;
  uint32_t parity = 0;

  static FC_HD constexpr Ring producer() { return {0, 1}; }
  static FC_HD constexpr Ring consumer() { return {0, 0}; }

  FC_HD constexpr void advance() {
    if constexpr (kToggles) {
      parity ^= static_cast<uint32_t>(stage);
      stage = 1 - stage;
    } else if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flashcore::tile
