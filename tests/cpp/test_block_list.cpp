// Visits to the blocks of a list, against the definition, for every small list.
#include "tile/block_list.h"

#include <vector>

#include "check.h"

using namespace flashcore;
using namespace flashcore::tile;

TEST("visits are the kept blocks in order, and below() counts them") {
  constexpr int kBlocks = 6;
  for (int parts : {1, 2, 3})
    for (int set = 0; set < 1 << kBlocks; ++set) {
      std::vector<int32_t> indices;
      for (int b = 0; b < kBlocks; ++b)
        if (set >> b & 1) indices.push_back(b);
      int const count = static_cast<int>(indices.size());
      indices.push_back(-7);  // past the count: not to be read
      KeptBlocks const kept{indices.data(), count, parts};
      int visits = 0;
      for (int block = -1; block < (kBlocks + 1) * parts; ++block) {
        CHECK_EQ(kept.below(block), visits);
        bool const member = block >= 0 && block < kBlocks * parts && set >> (block / parts) & 1;
        if (block >= 0) CHECK_EQ(kept.contains(block), member);
        if (member) {
          CHECK_EQ(kept.at(visits), block);
          ++visits;
        }
      }
      CHECK_EQ(kept.visits(), visits);
    }
}

TEST("the list of a tile is that of the block it lies in, and none past the last") {
  int32_t const count[] = {1, 2, 0, 3, 1, 1};  // 1 batch, 2 heads, 3 blocks
  int32_t indices[2][3][4] = {};
  BlockLists const lists{{count, indices[0][0], 0, 3, 0, 12, 4}, 3, 2, 5};
  for (int head = 0; head < 2; ++head)
    for (int tile = 0; tile < 8; ++tile) {
      KeptBlocks const kept = lists.of(7, head, tile);
      int const row = tile / 2;
      CHECK_EQ(kept.count, row < 3 ? count[3 * head + row] : 0);
      CHECK_EQ(kept.parts, 5);
      if (row < 3) CHECK(kept.indices == indices[head][row]);
    }
}

TEST_MAIN()
