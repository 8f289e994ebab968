// In which order query tiles run. Host and device, constexpr.
//
// (batch, head) pairs are cut into sections whose keys and values fit in the L2 cache together.
// Inside a section, tiles go from the last query block to the first, all heads of the section for
// each: with a causal mask the longest tiles start first, so the tail of the launch is short.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

struct Tile {
  int m_block = 0;
  int head = 0;
  int batch = 0;
};

struct TileScheduler {
  int m_blocks = 0;
  int heads = 0;          // query heads
  int pairs = 0;          // batch * heads
  int section_pairs = 1;  // heads of one section; >= 1

  FC_HD constexpr int num_tiles() const { return m_blocks * pairs; }

  // The index of the round-th tile of a block, when `blocks` blocks share the tiles statically.
  // Every other round runs backwards, so that a block that got a long tile gets a short one next.
  // May be past the last tile; the rounds of a block end when round * blocks >= num_tiles().
  FC_HD constexpr int nth(int block, int blocks, int round) const {
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
  }

  FC_HD constexpr Tile tile(int index) const {
    int const per_section = section_pairs * m_blocks;
    int const section = index / per_section;
    int const rest = index - section * per_section;
    int const first = section * section_pairs;
    int const width = min_of(section_pairs, pairs - first);  // the last section may be narrower
    int const row = rest / width;
    int const pair = first + (rest - row * width);
    return {m_blocks - 1 - row, pair % heads, pair / heads};
  }
};

// As many heads as keep K and V of a section within the budget, in whole groups of query heads that
// share a key head.
FC_HD constexpr int section_pairs(int64_t kv_bytes_per_kv_head, int group, int pairs,
                                  int64_t l2_budget) {
  int64_t const kv_heads = max_of<int64_t>(1, l2_budget / max_of<int64_t>(1, kv_bytes_per_kv_head));
  return static_cast<int>(min_of<int64_t>(kv_heads * group, max_of(pairs, 1)));
}

}  // namespace flashcore::tile
