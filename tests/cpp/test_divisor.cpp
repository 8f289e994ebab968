// Divisor gives what division gives.
#include "tile/divisor.h"

#include <climits>
#include <random>

#include "check.h"

using namespace flashcore;
using tile::Divisor;

namespace {

void compare(int a, int d) {
  CHECK_EQ(a / Divisor(d), a / d);
  CHECK_EQ(a % Divisor(d), a % d);
}

}  // namespace

TEST("small numbers, all of them") {
  for (int d = 1; d <= 300; ++d)
    for (int a = 0; a <= 1000; ++a) compare(a, d);
}

TEST("around every multiple that a rounding could miss, up to the largest dividend") {
  std::mt19937 random(1);
  auto try_divisor = [&](int d) {
    for (int i = 0; i < 200; ++i) {
      int const quotient = static_cast<int>(random() % (INT_MAX / d + 1u));
      int64_t const multiple = int64_t{quotient} * d;
      for (int64_t a = multiple - 1; a <= multiple + 1; ++a)
        if (a >= 0 && a <= INT_MAX) compare(static_cast<int>(a), d);
    }
    compare(INT_MAX, d);
    compare(INT_MAX - 1, d);
    compare(INT_MAX / d * d, d);
    compare(INT_MAX / d * d - 1, d);
  };
  for (int bit = 0; bit < 31; ++bit)
    for (int near = -2; near <= 2; ++near)
      if (int64_t const d = (int64_t{1} << bit) + near; d >= 1 && d <= INT_MAX)
        try_divisor(static_cast<int>(d));
  for (int i = 0; i < 2000; ++i) try_divisor(1 + static_cast<int>(random() % INT_MAX));
}

TEST("a divisor is the number itself elsewhere") {
  Divisor const d = 7;
  CHECK_EQ(d * 3, 21);
  CHECK_EQ(Divisor(), 1);
  CHECK_EQ(Divisor(0), 0);
}

TEST_MAIN()
