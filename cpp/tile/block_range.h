// Which key blocks a query tile visits, and which of them need no mask. Host and device, constexpr.
//
//     first <= first_full <= last_full <= last
//     [first, first_full)      cut by the left side of the window
//     [first_full, last_full)  every (row, key) pair visible: no mask instructions
//     [last_full, last)        cut by the diagonal, the right side or the end of the keys
#pragma once
#include "tile/mask.h"

namespace flashcore::tile {

struct BlockRange {
  int64_t first = 0;
  int64_t first_full = 0;
  int64_t last_full = 0;
  int64_t last = 0;

  FC_HD constexpr bool empty() const { return last <= first; }
};

// Splits [lo, hi), of which [full_lo, full_hi) is visible to every row, into blocks of size n.
FC_HD constexpr BlockRange split_blocks(int64_t lo, int64_t hi, int64_t full_lo, int64_t full_hi,
                                        int64_t n) {
  if (hi <= lo) return {};
  BlockRange r;
  r.first = lo / n;
  r.last = ceil_div(hi, n);
  int64_t const a = ceil_div(full_lo, n);
  int64_t const b = full_hi / n;
  if (b <= a) {  // no block is full: everything takes the masked path
    r.first_full = r.last_full = r.first;
    return r;
  }
  r.first_full = max_of(a, r.first);
  r.last_full = min_of(b, r.last);
  return r;
}

// Query rows [row_begin, row_end) against blocks of block_n keys.
FC_HD constexpr BlockRange key_blocks(Window w, int64_t row_begin, int64_t row_end,
                                      int64_t q_offset, int64_t seqlen_k, int64_t block_n) {
  if (row_end <= row_begin) return {};
  KeyRange const top = visible_keys(w, row_begin, q_offset, seqlen_k);
  KeyRange const bottom = visible_keys(w, row_end - 1, q_offset, seqlen_k);
  return split_blocks(top.first, bottom.last, bottom.first, top.last, block_n);
}

// Keys [key_begin, key_end) against blocks of block_m query rows (backward, dK and dV).
FC_HD constexpr BlockRange row_blocks(Window w, int64_t key_begin, int64_t key_end,
                                      int64_t q_offset, int64_t seqlen_q, int64_t block_m) {
  if (key_end <= key_begin) return {};
  KeyRange const top = visible_rows(w, key_begin, q_offset, seqlen_q);
  KeyRange const bottom = visible_rows(w, key_end - 1, q_offset, seqlen_q);
  return split_blocks(top.first, bottom.last, bottom.first, top.last, block_m);
}

}  // namespace flashcore::tile
