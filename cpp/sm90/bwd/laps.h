// Key tiles that go round the query blocks, where the order in which they add to dQ is fixed. Host
// and device, constexpr.
//
// Without a mask every tile of a head visits every query block. In a lap each goes through them
// downwards from another one on, and from the first on to the last. So it comes to each when the
// tile before it is past that, and nobody waits; the tile before the first one of a lap is the last
// one. The next lap follows, when its blocks of threads are done with this one.
//
//     lap of 4 tiles, 8 query blocks     step   0  1  2  3  4  5  6  7
//                                    tile 0     1  0  7  6  5  4  3  2
//                                    tile 1     3  2  1  0  7  6  5  4
//                                    tile 2     5  4  3  2  1  0  7  6
//                                    tile 3     7  6  5  4  3  2  1  0
//
// Who waits for whom is a ring: a launch must not begin before all of it can run, and a block of
// threads must not have two tiles of a lap.
#pragma once
#include "tile/divisor.h"

namespace flashcore::sm90::bwd {

struct Laps {
  tile::Divisor tiles = 1;   // of a lap, a divisor of the head's
  tile::Divisor blocks = 1;  // of queries; at least as many as tiles

  // A tile's steps count down, for one round, and not below 0: the last of them come after as many
  // query blocks as there are. This is the query block of step m.
  FC_HD constexpr int block(int m) const { return m >= blocks ? m - blocks : m; }
  // The query block that tile n begins with.
  FC_HD constexpr int begin(int n) const {
    return ((place(n) + 1) * blocks + tiles - 1) / tiles - 1;
  }
  // Whether another tile adds before tile n does in its step m.
  FC_HD constexpr bool waits(int n, int m) const { return first(m) != n; }
  // The tile that adds after it; there may be none.
  FC_HD constexpr int next(int n, int m) const {
    int const lap = n - place(n), beside = place(n) + 1 == tiles ? 0 : place(n) + 1;
    return lap + beside + (beside == first(m) ? int{tiles} : 0);
  }

 private:
  FC_HD constexpr int place(int n) const { return n - n / tiles * tiles; }
  // Whose place it is to add first.
  FC_HD constexpr int first(int m) const { return block(m) * tiles / blocks; }
};

// How many tiles of a head a lap has; 0: there are none. n_blocks: tiles of a head; blocks: of
// queries, of which each is `group` steps; pairs: heads that tiles belong to, each of which needs
// so many bytes; workers: who works on a tile at a time.
constexpr int64_t lap_size(int64_t n_blocks, int64_t blocks, int64_t group, int64_t pairs,
                           int64_t head_bytes, int64_t workers) {
  // What runs at the same time should stay in L2, and leave a 16th of the workers idle at most.
  constexpr int64_t kBytes = int64_t{32} << 20;
  if (pairs == 0) return 0;
  int64_t const steps = blocks * group;
  int64_t lap = 0, least = ceil_div(pairs * n_blocks, workers) * 17 / 16;
  for (int64_t tiles = min_of(min_of(n_blocks, workers), blocks); tiles > 1; --tiles) {
    // Two steps after the tile before it a tile does not wait; with 1.5 it does a little.
    if (n_blocks % tiles || steps * 2 < tiles * 3) continue;
    int64_t const heads = min_of(pairs, workers / tiles);
    if (heads * head_bytes > kBytes) continue;
    int64_t const turns = ceil_div(pairs, heads) * (n_blocks / tiles);
    if (turns > least || (lap > 0 && turns == least && steps >= lap * 2)) continue;
    lap = tiles;
    least = turns;
  }
  return lap;
}

}  // namespace flashcore::sm90::bwd
