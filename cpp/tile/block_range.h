// Which key blocks a query tile visits, and which of them need no mask. Host and device, constexpr.
//
//     [first, last)            visited
//     [first, first_full)      cut by the left side of the window
//     [last_full, last)        cut by the diagonal, the right side or the end of the keys
//
// In blocks that are neither, every (row, key) pair is visible: they need no mask instructions.
// Where there are none the two cuts may meet or overlap.
#pragma once
#include "tile/mask.h"

namespace flashcore::tile {

template <class Int>
struct BlockRange {
  Int first = 0;
  Int first_full = 0;
  Int last_full = 0;
  Int last = 0;

  FC_HD constexpr bool empty() const { return last <= first; }
};

// Splits [lo, hi), of which [full_lo, full_hi) is visible to every row, into blocks of size n.
template <class Int>
FC_HD constexpr BlockRange<Int> split_blocks(Int lo, Int hi, Int full_lo, Int full_hi, Int n) {
  if (hi <= lo) return {};
  Int const first = lo / n, last = ceil_div(hi, n);
  return {first, min_of(last, ceil_div(full_lo, n)), max_of(first, full_hi / n), last};
}

// Query rows [row_begin, row_end) against blocks of block_n keys.
template <class Int>
FC_HD constexpr BlockRange<Int> key_blocks(Band<Int> band, Int row_begin, Int row_end, Int seqlen_k,
                                           Int block_n) {
  if (row_end <= row_begin) return {};
  auto const top = visible_keys(band, row_begin, seqlen_k);
  auto const bottom = visible_keys(band, row_end - 1, seqlen_k);
  return split_blocks(top.first, bottom.last, bottom.first, top.last, block_n);
}

// Keys [key_begin, key_end) against blocks of block_m query rows (backward, dK and dV).
template <class Int>
FC_HD constexpr BlockRange<Int> row_blocks(Band<Int> band, Int key_begin, Int key_end, Int seqlen_q,
                                           Int block_m) {
  if (key_end <= key_begin) return {};
  auto const top = visible_rows(band, key_begin, seqlen_q);
  auto const bottom = visible_rows(band, key_end - 1, seqlen_q);
  return split_blocks(top.first, bottom.last, bottom.first, top.last, block_m);
}

}  // namespace flashcore::tile
