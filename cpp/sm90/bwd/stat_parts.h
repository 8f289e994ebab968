// A float32 statistic of a query row, as the tensor cores add it to a product in bfloat16: in parts
// whose sum it is, exactly (but below 2^-110), eight bits each. Host and device, constexpr.
//
// A product of ones and parts adds them to all keys (gemm_ones in ptx/wgmma.cuh). That is a
// twentieth more for the tensor cores at head dim 128, a tenth at 64. Otherwise every thread would
// load the values of its columns, two at a time, and shared memory is what limits a step.
#pragma once
#include <bit>

#include "common/types.h"

namespace flashcore::sm90::bwd {

// One row of an operand, of which the product reads the first three columns.
struct alignas(16) StatParts {
  static constexpr int kCount = 3;
  // In place of -infinity, which would make NaN of the operand's zeros. exp of it is zero, too.
  static constexpr float kNever = -3e38f;

  uint16_t part[8];

  static FC_HD constexpr StatParts of(float x) {
    constexpr uint32_t kSpecial = 0x7f800000u;  // exponent of infinities and NaN
    StatParts parts{};
    if (x != x) {
      parts.part[0] = 0x7fc0;
      return parts;
    }
    for (int i = 0; i < kCount; ++i) {
      uint32_t const upper = std::bit_cast<uint32_t>(x) & 0xffff0000u;
      parts.part[i] = static_cast<uint16_t>(upper >> 16);
      if ((upper & kSpecial) == kSpecial) break;
      x -= std::bit_cast<float>(upper);
    }
    return parts;
  }
};

}  // namespace flashcore::sm90::bwd
