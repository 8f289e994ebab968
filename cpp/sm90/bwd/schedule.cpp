#include "sm90/bwd/schedule.h"

#include "common/memo.h"
#include "tile/block_range.h"

namespace flashcore::sm90::bwd {
namespace {

// Queries, dO and the sums of dQ of the heads that run at the same time should stay in L2 (60 MB on
// an H200, in two halves that may both hold a line).
constexpr int64_t kL2Budget = int64_t{16} << 20;

// What a tile costs besides its query blocks, in query blocks: K and V, the first scores, dK and
// dV.
constexpr double kTileOverhead = 2.0;

// Where tiles add to dQ in a fixed order. Each is late by what the tile of its head before it is
// and by some more, a step where they begin with the same rows; with lists, which meet anywhere, by
// several. So the more heads take turns the better, if what they need stays in L2.
// least: as many as run at the same time anyhow. uneven: tiles have unlike steps.
Schedule fixed_order(const tile::TileScheduler& s, const BwdConfig& c, const Division& d,
                     int64_t head_bytes, int64_t least, bool uneven) {
  constexpr int kChain = 32, kChainOfLists = 4, kChainOfRising = 8;  // tiles of a head at a time
  auto const heads_within = [&](int64_t bytes) { return bytes / max_of<int64_t>(1, head_bytes); };
  // Falling tiles do not wait. But they are at different rows, and what one has read the next one
  // finds in L2 only if all of it fits.
  bool const alternate = uneven && !c.lists && least <= heads_within(2 * kL2Budget);
  int64_t heads = 0;
  if (alternate)
    heads = heads_within(2 * kL2Budget);
  else if (uneven)
    heads = ceil_div(d.clusters, c.lists ? kChainOfLists : kChainOfRising);
  else if (s.pairs <= heads_within(4 * kL2Budget))
    heads = s.pairs;
  else
    heads = max_of(max_of(least, heads_within(kL2Budget)), ceil_div<int64_t>(d.clusters, kChain));
  int const width = static_cast<int>(min_of<int64_t>(s.pairs, heads));
  return {s.in_sections_of(tile::even_width(s.pairs, width, alternate)), !alternate};
}

}  // namespace

Schedule schedule_of(const BwdConfig& c, const Problem& p, const Division& d) {
  bool const packed = p.cu_seqlens_k != nullptr, uneven = !p.window.open() || c.lists;
  int const pairs = static_cast<int>(packed ? p.num_heads_kv : d.pairs);
  int64_t const group = p.num_heads_q / p.num_heads_kv;
  tile::TileScheduler const s = {static_cast<int>(d.n_blocks), static_cast<int>(p.num_heads_kv),
                                 pairs, 1};
  if (d.lap > 0)
    return {{static_cast<int>(d.n_blocks) / d.lap, s.heads, pairs, d.clusters / d.lap}, true};
  if (!(uneven || d.ordered) || d.whole_heads || d.tiles == 0) return {s};
  // The caller's bounds of packed lengths must not change the order of a sum.
  bool const mean = packed && d.ordered && p.batch > 0;
  int64_t const rows = mean ? ceil_div(rows_q(p), p.batch) : p.seqlen_q;
  int64_t const n_blocks = mean ? ceil_div(rows_k(p), p.batch * c.block_n) : d.n_blocks;
  int64_t const bytes = head_bytes(c, p, rows);
  // What runs at the same time anyhow: with fewer heads there is nothing to choose from.
  int64_t const least = ceil_div<int64_t>(d.clusters, max_of<int64_t>(1, n_blocks));
  if (d.ordered) return fixed_order(s, c, d, bytes, least, uneven);
  int const largest = static_cast<int>(min_of<int64_t>(
      pairs, max_of<int64_t>(tile::section_pairs(bytes, 1, pairs, kL2Budget), least)));
  if (packed || c.lists) return {s.in_sections_of(largest)};
  int64_t const q_offset = p.has_q_offset ? p.q_offset : p.top_left ? 0 : p.seqlen_k - p.seqlen_q;
  auto const cost = [&](int block) {
    int64_t const key = (d.n_blocks - 1 - block) * c.block_n;
    auto const rows =
        tile::row_blocks<int64_t>(tile::band_of(p.window, q_offset), key,
                                  min_of(key + c.block_n, p.seqlen_k), p.seqlen_q, c.block_m);
    return static_cast<double>((rows.last - rows.first) * group) + kTileOverhead;
  };
  // The search takes tens of microseconds, the rest of a call two.
  thread_local Memo<int, 11> known;
  int const even =
      known.get({c.block_m, c.block_n, p.seqlen_q, p.seqlen_k, p.window.left, p.window.right,
                 q_offset, pairs, largest, group, d.clusters},
                [&] { return tile::balanced_section(s, largest, 1, d.clusters, cost); });
  return {s.in_sections_of(even)};
}

}  // namespace flashcore::sm90::bwd
