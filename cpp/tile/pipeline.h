// A ring of shared-memory stages and the parity of its barriers. Host and device, constexpr.
//
// Each stage has two barriers, `ready` (filled) and `free` (drained). A barrier's phases alternate
// in parity; wait(parity) passes when the phase of that parity is over. The consumer waits for
// `ready` with parity 0 on the first lap; the producer waits for `free` with parity 1, which passes
// at once on a new barrier: every stage starts free.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  static FC_HD constexpr Ring producer() { return {0, 1}; }
  static FC_HD constexpr Ring consumer() { return {0, 0}; }

  FC_HD constexpr void advance() {
    if constexpr (kStages == 2) {
      parity ^= static_cast<uint32_t>(stage);
      stage = 1 - stage;
    } else if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flashcore::tile
