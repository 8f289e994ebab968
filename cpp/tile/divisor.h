// Division by a number that is known before the launch: a multiplication and a shift, where a
// division is a chain of some thirty instructions. Until a block of threads knows its first tile,
// all of it waits.
#pragma once
#include <bit>

#include "common/types.h"

namespace flashcore::tile {

// Of dividends in [0, 2^31). A divisor of 0 may be kept, but nothing is divided by it.
class Divisor {
 public:
  // floor(a m / 2^(31 + s)) with 2^s >= d and m = ceil(2^(31 + s) / d): m d exceeds 2^(31 + s) by
  // less than d, so the product is too large by less than a / 2^31 < 1 part in d.
  FC_HD constexpr Divisor(int d = 1) : value_(d) {
    auto const by = static_cast<uint32_t>(max_of(d, 1));
    shift_ = 31 + std::bit_width(by - 1);
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + by - 1) / by);
  }
  FC_HD constexpr operator int() const { return value_; }

  FC_HD friend constexpr int operator/(int a, Divisor const& d) {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(a)) * d.multiplier_) >>
                            d.shift_);
  }
  FC_HD friend constexpr int operator%(int a, Divisor const& d) { return a - a / d * d.value_; }
  // Would convert it to int, and divide.
  friend int& operator/=(int&, Divisor const&) = delete;
  friend int& operator%=(int&, Divisor const&) = delete;

 private:
  int value_;
  uint32_t multiplier_;
  int shift_;
};

}  // namespace flashcore::tile
