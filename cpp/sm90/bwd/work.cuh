// What there is to do for one key tile. The producer finds it out and hands it to the consumers
// through shared memory, beside K: the arithmetic costs one thread's time, off the critical path.
#pragma once
#include "sm90/bwd/config.h"
#include "sm90/ptx/barrier.cuh"
#include "tile/block_range.h"

namespace flashcore::sm90::bwd {

struct alignas(16) Work {
  int key;  // first key; negative: there is no more work
  int kv_head, batch;
  int first;      // query blocks are [first, last), in every head of the group
  int full;       // [first, full) and
  int last_full;  // [last_full, last) need the mask
  int last;
  int window_first, window_last;  // of endless rows, those that see `key`; moves on with the key
  int fresh;                      // from this query block on, nothing has been added to dQ yet
  int complete;  // below this query block, nothing will be added to dQ after this tile

  FC_DEVICE bool empty() const { return last <= first; }
  FC_DEVICE bool masked(int m) const { return m < full || m >= last_full; }

  static FC_DEVICE Work none() { return {-1}; }

  // The block's tile number `index`; none() after its last.
  static FC_DEVICE Work of(const BwdParams& p, int index, int block_m, int block_n) {
    int const tiles = p.scheduler.m_blocks;  // of a key head
    tile::Tile tile;
    if (p.whole_heads) {
      int const round = index / tiles;
      int64_t const pair = blockIdx.x + int64_t{round} * gridDim.x;
      if (pair >= p.scheduler.pairs) return none();
      tile = {tiles - 1 - (index - round * tiles), static_cast<int>(pair) % p.scheduler.heads,
              static_cast<int>(pair) / p.scheduler.heads};
    } else {
      int64_t const next = blockIdx.x + int64_t{index} * gridDim.x;
      if (next >= p.scheduler.num_tiles()) return none();
      tile = p.scheduler.tile(static_cast<int>(next));
    }
    int const n = tiles - 1 - tile.m_block, key = n * block_n;
    int64_t const q_offset = p.q_offset_tensor ? p.q_offset_tensor[tile.batch] : p.q_offset;
    tile::BlockRange const rows = rows_of(p, n, q_offset, block_m, block_n);
    tile::BlockRange const before = rows_of(p, n - 1, q_offset, block_m, block_n);
    tile::BlockRange const after = rows_of(p, n + 1, q_offset, block_m, block_n);
    bool const whole = key + block_n <= p.seqlen_k;
    auto narrow = [](int64_t x) { return static_cast<int>(x); };
    return {key,
            tile.head,
            tile.batch,
            narrow(rows.first),
            narrow(whole ? rows.first_full : rows.last),
            narrow(rows.last_full),
            narrow(rows.last),
            far(key - q_offset - p.window.right),
            far(key - q_offset + p.window.left + 1),
            narrow(!p.whole_heads   ? rows.last
                   : before.empty() ? rows.first
                                    : before.last),
            narrow(!p.whole_heads  ? rows.first
                   : after.empty() ? rows.last
                                   : after.first)};
  }

  // The query blocks of key tile n; none if there is no such tile. Rows past the end count: their
  // -lse is -inf, so they need no mask.
  static FC_HD constexpr tile::BlockRange rows_of(const BwdParams& p, int64_t n, int64_t q_offset,
                                                  int block_m, int block_n) {
    if (n < 0) return {};
    return tile::row_blocks(p.window, n * block_n, min_of<int64_t>((n + 1) * block_n, p.seqlen_k),
                            q_offset, int64_t{p.m_blocks} * block_m, block_m);
  }

  // Within what an int holds with room to spare; dispatch refuses sequences that long.
  static FC_HD constexpr int far(int64_t rows) {
    constexpr int64_t kFar = INT32_MAX / 2 - 1024;
    return static_cast<int>(min_of(kFar, max_of(-kFar, rows)));
  }
};

}  // namespace flashcore::sm90::bwd
