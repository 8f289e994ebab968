// Index maths of the Hopper kernels against its definitions. No GPU.
#include "sm90/layout.h"

#include <set>
#include <utility>

#include "check.h"

using namespace flashcore;
using namespace flashcore::sm90;

TEST("the swizzle permutes the chunks of every row") {
  for (uint32_t row = 0; row < 64; ++row) {
    std::set<uint32_t> offsets;
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      uint32_t const offset = swizzled_offset(row, chunk);
      CHECK_EQ(offset / kPanelBytes, row);
      CHECK_EQ(offset % 16, 0u);
      offsets.insert(offset);
    }
    CHECK_EQ(offsets.size(), 8u);
  }
}

TEST("the swizzle is an exclusive or of address bits 4-6 with bits 7-9") {
  for (uint32_t row = 0; row < 256; ++row)
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      uint32_t const plain = row * kPanelBytes + chunk * 16;
      CHECK_EQ(swizzled_offset(row, chunk), plain ^ ((plain >> 3) & 0x70));
    }
}

TEST("eight rows of one chunk column fall into eight different 16-byte bank groups") {
  for (uint32_t chunk = 0; chunk < 8; ++chunk) {
    std::set<uint32_t> groups;
    for (uint32_t row = 8; row < 16; ++row) groups.insert(swizzled_offset(row, chunk) % 128 / 16);
    CHECK_EQ(groups.size(), 8u);
  }
}

TEST("the accumulator layout covers a 64 x N tile exactly once") {
  for (int n : {8, 64, 80, 176, 256}) {
    std::set<std::pair<int, int>> seen;
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < n / 2; ++i) {
        Coord const c = accumulator_coord(thread, i);
        CHECK(c.row >= 0 && c.row < 64 && c.col >= 0 && c.col < n);
        seen.insert({c.row, c.col});
      }
    CHECK_EQ(static_cast<int>(seen.size()), 64 * n);
  }
}

TEST("packing neighbours of the accumulator gives the A operand of the next product") {
  for (int thread = 0; thread < 128; ++thread)
    for (int k = 0; k < 8; ++k)  // steps of 16 columns
      for (int reg = 0; reg < 4; ++reg)
        for (int half = 0; half < 2; ++half) {
          Coord const s = accumulator_coord(thread, 8 * k + 2 * reg + half);
          Coord const a = a_operand_coord(thread, reg, half);
          CHECK_EQ(s.row, a.row);
          CHECK_EQ(s.col - 16 * k, a.col);
        }
}

TEST("a thread's accumulator rows are two, eight apart, and a quad shares them") {
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < 128; ++i) {
      Coord const c = accumulator_coord(thread, i);
      CHECK_EQ(c.row, 16 * (thread / 32) + thread % 32 / 4 + 8 * ((i / 2) % 2));
      CHECK_EQ(c.row, accumulator_coord(thread ^ 1, i).row);
    }
}

TEST("patches of an accumulator, stored transposed, fill a panel of its columns") {
  for (int columns : {32, 64, 128}) {
    std::set<uint32_t> written;
    for (int warp = 0; warp < 4; ++warp)
      for (int patch = 0; patch < columns / 16; ++patch)
        for (int reg = 0; reg < 4; ++reg)  // one 8x8 matrix each
          for (int lane = 0; lane < 32; ++lane)
            for (int half = 0; half < 2; ++half) {
              Coord const c = accumulator_coord(32 * warp + lane, 8 * patch + 2 * reg + half);
              // Transposed, the element of lane l and half h is number l / 4 of row
              // 2 * (l % 4) + h, whose address lane 8 * reg + that row gives.
              int const row = 2 * (lane % 4) + half;
              uint32_t const at =
                  transposed_patch_offset(warp, 8 * reg + row, patch) + 2 * (lane / 4);
              CHECK_EQ(at, swizzled_offset(static_cast<uint32_t>(c.col),
                                           static_cast<uint32_t>(c.row / 8)) +
                               2 * (c.row % 8));
              written.insert(at);
            }
    CHECK_EQ(static_cast<int>(written.size()), 64 * columns);
  }
}

TEST_MAIN()
