// With block lists in a fixed order (dq_order.h): of a key tile and a query block that it visits,
// the nearest tiles at either side that do, too. Host and device, constexpr.
//
// The query block's own list tells, which is the transpose of those of the keys. Were it not, sums
// would have no order; but nobody waits for a tile that does not come. The answer takes searches in
// lists, one load after another, which in the kernel itself took longer than a step. So a kernel
// before it makes a table, in which a step's neighbours lie as its block does in its list.
#pragma once
#include "sm90/bwd/key_tiles.h"
#include "tile/block_list.h"

namespace flashcore::sm90::bwd {

constexpr int kListKeys = 64;  // keys that share a list, at least

struct alignas(8) Neighbours {
  int lower, higher;  // -1: there is none

  // Of tile n and query block m. P: a kernel's parameters.
  template <class P>
  static FC_HD constexpr Neighbours of(P const& p, tile::ShortSequence const& seq, int batch,
                                       int head, int n, int m, int block_m, int block_n) {
    tile::KeptBlocks const keys = p.kept_keys.of(batch, head, m);  // a visit is to a key
    int const begin = keys.below(n * block_n), end = keys.below((n + 1) * block_n);
    if (begin == end) return {-1, -1};  // the lists differ: others do not know of it
    Neighbours near{-1, -1};
    for (int side = 0; side < 2; ++side) {
      bool const lower = side == 0;
      for (int visit = lower ? begin - 1 : end; visit >= 0 && visit < keys.visits();) {
        int const other = keys.at(visit) / block_n;
        tile::BlockRange<int> const rows = rows_of(seq, other, block_m, block_n);
        if (m < rows.first || m >= rows.last) break;  // nor do those further away
        if (visits(p, batch, head, other, m, block_n)) {
          (lower ? near.lower : near.higher) = other;
          break;
        }
        visit = lower ? keys.below(other * block_n) - 1 : keys.below((other + 1) * block_n);
      }
    }
    return near;
  }

  // As StepOrder's. stride: of the tile's steps.
  FC_HD constexpr bool waits(int stride) const { return (stride > 0 ? higher : lower) >= 0; }
  FC_HD constexpr int next(int stride) const { return stride > 0 ? lower : higher; }

 private:
  // Whether the tile's own lists keep the query block.
  template <class P>
  static FC_HD constexpr bool visits(P const& p, int batch, int head, int tile, int m,
                                     int block_n) {
    int const halves = block_n / kListKeys;
    for (int half = 0; half < halves; ++half)
      if (p.kept_queries.of(batch, head, tile * halves + half).contains(m)) return true;
    return false;
  }
};

// [batch][head][list of a key block][visit][tile in the key block]
struct NeighbourTable {
  Neighbours* entries = nullptr;  // null: the order is not fixed
  int heads = 0, lists = 0;
  int visits = 0;  // of a list at most
  int tiles = 1;   // in a key block at most

  static constexpr int tiles_in(int block_k, int block_n) {
    return block_k / block_n + (block_k % block_n != 0);
  }
  static FC_HD constexpr int first_tile(int list, int block_k, int block_n) {
    return list * block_k / block_n;
  }

  // Those of a head.
  FC_HD constexpr Neighbours* of(int64_t batch, int head) const {
    return entries + (batch * heads + head) * (int64_t{lists} * visits * tiles);
  }
  // Where among them the visit of tile n is.
  FC_HD constexpr int place(int list, int visit, int n, int block_k, int block_n) const {
    return (list * visits + visit) * tiles + n - first_tile(list, block_k, block_n);
  }

  // Entries from, from + step, ... of one list. P: a kernel's parameters.
  template <class P>
  FC_HD constexpr void fill(P const& p, int batch, int head, int list, int from, int step,
                            int block_m, int block_n) const {
    int const block_k = p.kept_queries.tiles * kListKeys;
    tile::KeptBlocks const kept = p.kept_queries.of(batch, head, list * p.kept_queries.tiles);
    tile::ShortSequence const seq = tile::short_sequence_of(p, batch, p.alike);
    int const all = min_of(kept.visits(), visits) * tiles;
    for (int i = from; i < all; i += step) {
      int const visit = i / tiles, m = kept.at(visit);
      int const n = first_tile(list, block_k, block_n) + i % tiles;
      if (m * block_m >= seq.seqlen_q || n * block_n >= seq.seqlen_k) continue;  // no step
      of(batch, head)[place(list, visit, n, block_k, block_n)] =
          Neighbours::of(p, seq, batch, head, n, m, block_m, block_n);
    }
  }
};

}  // namespace flashcore::sm90::bwd
