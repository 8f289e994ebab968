// In which order query tiles run. Host and device, constexpr.
//
// Tiles are dealt in turn to the workers of a launch, its blocks or the teams in them: worker c
// runs tiles c, c + workers, c + 2 workers... (batch, head) pairs are cut into sections whose keys
// and values should stay in the L2 cache together. Inside a section all heads run one query block
// before any runs the next. With a causal mask a tile's cost grows with its query block; so
// sections alternate between falling and rising order, which makes the costs one continuous wave.
// Every worker then meets about as many long tiles as short ones, unless sections and workers are
// in resonance (balanced_section below), and the last section falls: the launch ends on short
// tiles.
#pragma once
#include <initializer_list>

#include "tile/divisor.h"

namespace flashcore::tile {

struct Tile {
  int m_block = 0;
  int head = 0;
  int batch = 0;
};

// Int: Divisor, or int where m_blocks is found out on the device.
template <class Int>
struct BasicTileScheduler {
  Int m_blocks = 0;
  Divisor heads = 0;  // query heads
  int pairs = 0;      // batch * heads
  // Heads of one section, and of the last one, which may be narrower; >= 1.
  Divisor section_pairs = 1, last_pairs = 1;
  int num_sections = 0;

  constexpr BasicTileScheduler() = default;
  constexpr BasicTileScheduler(int m_blocks, int heads, int pairs, int section_pairs)
      : m_blocks(m_blocks),
        heads(heads),
        pairs(pairs),
        section_pairs(section_pairs),
        last_pairs(pairs % section_pairs ? pairs % section_pairs : section_pairs),
        num_sections(ceil_div(pairs, section_pairs)) {}

  FC_HD constexpr int num_tiles() const { return m_blocks * pairs; }
  FC_HD constexpr int section(int index) const { return index / section_pairs / m_blocks; }

  // Whether tiles of the section rise, as an alternative to falling.
  FC_HD constexpr bool rises(int section) const { return (num_sections - 1 - section) % 2 != 0; }

  FC_HD constexpr Tile tile(int index) const {
    int const s = section(index), first = s * section_pairs, rest = index - first * m_blocks;
    Divisor const width = s == num_sections - 1 ? last_pairs : section_pairs;
    int const row = rest / width;
    int const pair = first + (rest - row * width), batch = pair / heads;
    return {rises(s) ? row : m_blocks - 1 - row, pair - batch * heads, batch};
  }

  // The same in other sections.
  constexpr BasicTileScheduler in_sections_of(int section_pairs) const {
    return {m_blocks, heads, pairs, section_pairs};
  }

  // The same with another m_blocks.
  FC_HD constexpr BasicTileScheduler<int> with(int m_blocks) const {
    BasicTileScheduler<int> s;
    s.m_blocks = m_blocks;
    s.heads = heads;
    s.pairs = pairs;
    s.section_pairs = section_pairs;
    s.last_pairs = last_pairs;
    s.num_sections = num_sections;
    return s;
  }
};
using TileScheduler = BasicTileScheduler<Divisor>;

// As many heads as keep K and V of a section within the budget, in whole groups of query heads that
// share a key head.
FC_HD constexpr int section_pairs(int64_t kv_bytes_per_kv_head, int group, int pairs,
                                  int64_t l2_budget) {
  int64_t const kv_heads = max_of<int64_t>(1, l2_budget / max_of<int64_t>(1, kv_bytes_per_kv_head));
  return static_cast<int>(min_of<int64_t>(kv_heads * group, max_of(pairs, 1)));
}

// Largest cost any of `blocks` blocks is dealt, over the mean. cost(m_block) is any measure of
// time.
template <class Cost>
constexpr double imbalance(const TileScheduler& s, int blocks, Cost cost) {
  constexpr int kMaxBlocks = 1024;
  blocks = min_of(blocks, kMaxBlocks);
  double step[kMaxBlocks + 1] = {};  // change of cost from one block to the next
  double total = 0.0, everyone = 0.0;
  int position = 0;
  for (int section = 0; section < s.num_sections; ++section) {
    int const width = min_of<int>(s.section_pairs, s.pairs - section * s.section_pairs);
    for (int row = 0; row < s.m_blocks; ++row) {
      double const c = cost(s.tile(section * s.section_pairs * s.m_blocks + row * width).m_block);
      total += c * width;
      everyone += c * (width / blocks);
      int const end = position + width % blocks;
      step[position] += c;
      step[min_of(end, blocks)] -= c;
      if (end > blocks) {
        step[0] += c;
        step[end - blocks] -= c;
      }
      position = end % blocks;
    }
  }
  double heaviest = 0.0, cost_here = everyone;
  for (int block = 0; block < blocks; ++block)
    heaviest = max_of(heaviest, cost_here += step[block]);
  return total > 0.0 ? heaviest * blocks / total : 1.0;
}

// The section size, between an eighth of `largest` and `largest`, that deals most evenly. When
// sections and blocks are in resonance a block can get twice its share, so an uneven size is not
// kept; nor is a large one given up for next to nothing.
template <class Cost>
constexpr int balanced_section(const TileScheduler& s, int largest, int group, int blocks,
                               Cost cost) {
  constexpr double kEven = 1.005, kGain = 0.004;
  int best = largest;
  double least = imbalance(s.in_sections_of(largest), blocks, cost);
  int const step = round_up(max_of(1, largest / 24), group);
  for (int n = largest - step; n >= max_of(1, largest / 8) && least > kEven; n -= step) {
    double const here = imbalance(s.in_sections_of(n), blocks, cost);
    if (here < least - kGain) {
      least = here;
      best = n;
    }
  }
  return best;
}

// The width nearest to `width` of which all sections are, since a last one with fewer heads takes
// longer for each; and, if they alternate, with which as many fall as rise, or the launch ends on
// tiles of one kind. `width` itself if there is none within a factor of two.
constexpr int even_width(int pairs, int width, bool alternate) {
  for (int off = 0; off <= width; ++off)
    for (int const sign : {1, -1}) {
      int const n = width + sign * off;
      if (n > 0 && 2 * n >= width && pairs % n == 0 && !(alternate && pairs / n % 2)) return n;
    }
  return width;
}

}  // namespace flashcore::tile
