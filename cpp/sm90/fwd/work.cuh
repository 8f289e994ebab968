// What there is to do for one query tile. The producer finds it out and hands it to the consumers
// through shared memory, beside Q: the arithmetic costs one thread's time, off the critical path.
#pragma once
#include "sm90/fwd/config.h"
#include "sm90/ptx/barrier.cuh"
#include "tile/block_range.h"

namespace flashcore::sm90::fwd {

struct alignas(16) Work {
  int row;          // first query row; negative: there is no more work
  int head, batch;
  int first;        // key blocks are [first, last)
  int last_full;    // [last_full, last) need the mask
  int last;
  int limit;        // one past the last key row `row` sees; one more for each row after it
  int reserved;

  FC_DEVICE bool empty() const { return last <= first; }

  static FC_DEVICE Work none() { return {-1}; }

  static FC_DEVICE Work of(const FwdParams& p, int index, int block_m, int block_n) {
    tile::Tile const tile = p.scheduler.tile(index);
    int const row = tile.m_block * block_m;
    int64_t const q_offset = q_offset_of(p, tile.batch);
    tile::BlockRange const blocks = tile::key_blocks(
        p.window, row, min_of(row + block_m, p.seqlen_q), q_offset, p.seqlen_k, block_n);
    int64_t const limit = row + q_offset + p.window.right + 1;
    return {row,
            tile.head,
            tile.batch,
            static_cast<int>(blocks.first),
            static_cast<int>(blocks.last_full),
            static_cast<int>(blocks.last),
            clamp(limit),
            0};
  }

  // The key that query row 0 faces.
  static FC_DEVICE int64_t q_offset_of(const FwdParams& p, int batch) {
    return p.q_offset_tensor ? p.q_offset_tensor[batch] : p.q_offset;
  }

 private:
  // Into what an int holds with room for the rows of a tile.
  static FC_DEVICE int clamp(int64_t key) {
    constexpr int64_t kFar = INT32_MAX - 1024;
    return static_cast<int>(min_of(kFar, max_of(-kFar, key)));
  }
};

}  // namespace flashcore::sm90::fwd
