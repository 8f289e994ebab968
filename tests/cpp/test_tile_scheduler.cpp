// Every tile runs exactly once, in the order the scheduler promises.
#include "tile/tile_scheduler.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"

using namespace flashcore;
using tile::Tile;
using tile::TileScheduler;

namespace {

template <class Visit>
void for_each_scheduler(Visit visit) {
  for (int m_blocks : {0, 1, 2, 5})
    for (int heads : {1, 2, 6, 7})
      for (int batch : {0, 1, 3})
        for (int section : {1, 2, 4, 6, 100})
          visit(TileScheduler{m_blocks, heads, batch * heads, section}, batch);
}

}  // namespace

TEST("every (batch, head, m_block) comes exactly once") {
  for_each_scheduler([](TileScheduler s, int batch) {
    std::set<std::tuple<int, int, int>> seen;
    for (int i = 0; i < s.num_tiles(); ++i) {
      Tile const t = s.tile(i);
      CHECK(0 <= t.m_block && t.m_block < s.m_blocks);
      CHECK(0 <= t.head && t.head < s.heads);
      CHECK(0 <= t.batch && t.batch < batch);
      CHECK(seen.emplace(t.batch, t.head, t.m_block).second);
    }
    CHECK_EQ(seen.size(), static_cast<size_t>(batch * s.heads * s.m_blocks));
  });
}

TEST("sections follow one another, alternately falling and rising, and the last one falls") {
  for_each_scheduler([](TileScheduler s, int) {
    for (int i = 1; i < s.num_tiles(); ++i) {
      Tile const a = s.tile(i - 1), b = s.tile(i);
      int const section_a = (a.batch * s.heads + a.head) / s.section_pairs;
      int const section_b = (b.batch * s.heads + b.head) / s.section_pairs;
      CHECK(section_a <= section_b);
      bool const falls = (s.num_sections - 1 - section_a) % 2 == 0;
      if (section_a == section_b)
        CHECK(falls ? a.m_block >= b.m_block : a.m_block <= b.m_block);
      else
        CHECK_EQ(a.m_block, b.m_block);  // no jump in cost where sections meet
    }
  });
}

TEST("imbalance is what dealing the tiles one by one gives") {
  for_each_scheduler([](TileScheduler s, int) {
    for (int blocks : {1, 3, 132}) {
      auto const cost = [](int m) { return m + 1.5; };
      std::vector<double> work(static_cast<size_t>(blocks), 0.0);
      double total = 0.0;
      for (int i = 0; i < s.num_tiles(); ++i) {
        work[static_cast<size_t>(i % blocks)] += cost(s.tile(i).m_block);
        total += cost(s.tile(i).m_block);
      }
      double const most = *std::max_element(work.begin(), work.end());
      double const want = total > 0 ? most * blocks / total : 1.0;
      CHECK(std::abs(tile::imbalance(s, blocks, cost) - want) < 1e-9 * want);
    }
  });
}

TEST("a resonance between sections and blocks is avoided") {
  // 64 heads of 22 tiles on 132 blocks in sections of 3: every block meets the same place of the
  // wave each time.
  auto const cost = [](int m) { return m + 1.0; };
  TileScheduler s{22, 16, 128, 3};
  CHECK(tile::imbalance(s, 132, cost) > 1.5);
  s = s.in_sections_of(tile::balanced_section(s, 3, 1, 132, cost));
  CHECK(tile::imbalance(s, 132, cost) < 1.1);
}

TEST("a section is whole groups, fits the budget when one group does, and never is empty") {
  for (int64_t bytes : {0, 1, 100, 1000})
    for (int group : {1, 4, 7})
      for (int pairs : {0, 7, 28, 1000})
        for (int64_t budget : {0, 99, 100, 1050}) {
          int const n = tile::section_pairs(bytes, group, pairs, budget);
          CHECK(n >= 1);
          CHECK(n <= max_of(pairs, 1));
          if (n < pairs) CHECK_EQ(n % group, 0);
          if (n < pairs && n > group) CHECK(n / group * bytes <= budget);
        }
}

TEST(
    "sections of an even width are alike, as many fall as rise, and it is the nearest such width") {
  for (bool alternate : {false, true})
    for (int pairs = 1; pairs <= 70; ++pairs)
      for (int width = 1; width <= pairs; ++width) {
        auto const even = [&](int n) {
          TileScheduler const s{4, 1, pairs, n};
          int falling = 0;
          for (int i = 0; i < s.num_sections; ++i) falling += !s.rises(i);
          return static_cast<int>(s.last_pairs) == n &&
                 (!alternate || 2 * falling == s.num_sections);
        };
        int const got = tile::even_width(pairs, width, alternate);
        bool any = false;
        for (int n = (width + 1) / 2; n <= min_of(2 * width, pairs); ++n) {
          if (!even(n)) continue;
          any = true;
          CHECK(std::abs(got - width) <= std::abs(n - width));
        }
        if (any)
          CHECK(even(got));
        else
          CHECK_EQ(got, width);
      }
}

TEST_MAIN()
