#include "common/memo.h"

#include "check.h"

using flashcore::Memo;

TEST("asks once, and again only for what it was not asked lately") {
  Memo<int, 2> memo;
  int asked = 0;
  auto twice = [&](int64_t a, int64_t b) {
    return memo.get({a, b}, [&] {
      ++asked;
      return static_cast<int>(2 * a + b);
    });
  };
  CHECK_EQ(twice(3, 4), 10);
  CHECK_EQ(twice(3, 4), 10);
  CHECK_EQ(asked, 1);
  CHECK_EQ(twice(4, 3), 11);
  CHECK_EQ(asked, 2);
}

TEST("more questions than entries: slower, never wrong") {
  Memo<int, 1> memo;
  for (int round = 0; round < 3; ++round)
    for (int64_t n = -500; n < 500; ++n)
      CHECK_EQ(memo.get({n}, [&] { return static_cast<int>(n * n); }), n * n);
}

TEST_MAIN()
