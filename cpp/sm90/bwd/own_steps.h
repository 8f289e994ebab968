// Which of a tile's steps a consumer takes, where keys are divided. Host and device, constexpr.
#pragma once
#include "sm90/bwd/dq_order.h"

namespace flashcore::sm90::bwd {

// Blocks [begin, end) in strides: all, but the mask may leave nothing of the first one, or of the
// last, for the consumer's keys to see. It passes over that, but takes one block at least.
struct OwnSteps {
  int begin, end;

  // Of endless rows, [window_first, window_last) see the tile's first key, and each key after it is
  // seen by rows one further. The consumer has the 64 keys from the key-th on.
  static FC_HD constexpr OwnSteps of(StepOrder const& steps, int block_m, int window_first,
                                     int window_last, int key) {
    OwnSteps own{steps.begin, steps.end};
    int const first_row = window_first + key, last_row = window_last + key + 63;
    auto const in_vain = [&](int m) {
      return own.begin + steps.stride != own.end &&
             ((m + 1) * block_m <= first_row || m * block_m >= last_row);
    };
    if (in_vain(own.begin)) own.begin += steps.stride;
    if (in_vain(own.end - steps.stride)) own.end -= steps.stride;
    return own;
  }
};

}  // namespace flashcore::sm90::bwd
