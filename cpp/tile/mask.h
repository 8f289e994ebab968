// Which keys a query row may see by rule: causal, window, lengths. Host and device, constexpr.
//
// Every rule is one half-open interval of keys per row, [first, last), with both ends growing with
// the row. Causal is the window whose right side is 0; so there is one concept, not three.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

// Inclusive distances from the diagonal key i + q_offset. kOpen = unlimited.
struct Window {
  static constexpr int64_t kOpen = INT64_C(1) << 40;
  int64_t left = kOpen;
  int64_t right = kOpen;

  FC_HD constexpr bool open() const { return left >= kOpen && right >= kOpen; }
};

struct KeyRange {
  int64_t first = 0;
  int64_t last = 0;  // one past the end

  FC_HD constexpr bool empty() const { return last <= first; }
  FC_HD constexpr bool contains(int64_t j) const { return first <= j && j < last; }
};

// Keys that row i of a sequence with seqlen_k keys can see. q_offset: the key row 0 faces.
FC_HD constexpr KeyRange visible_keys(Window w, int64_t i, int64_t q_offset, int64_t seqlen_k) {
  int64_t const diagonal = i + q_offset;
  int64_t const first =
      w.left >= Window::kOpen ? 0 : min_of(seqlen_k, max_of<int64_t>(0, diagonal - w.left));
  int64_t const last =
      w.right >= Window::kOpen ? seqlen_k : min_of<int64_t>(seqlen_k, diagonal + w.right + 1);
  return {first, max_of(first, last)};
}

// Rows of a sequence with seqlen_q rows that can see key j: the transpose of visible_keys.
FC_HD constexpr KeyRange visible_rows(Window w, int64_t j, int64_t q_offset, int64_t seqlen_q) {
  int64_t const diagonal = j - q_offset;
  int64_t const first =
      w.right >= Window::kOpen ? 0 : min_of(seqlen_q, max_of<int64_t>(0, diagonal - w.right));
  int64_t const last =
      w.left >= Window::kOpen ? seqlen_q : min_of<int64_t>(seqlen_q, diagonal + w.left + 1);
  return {first, max_of(first, last)};
}

}  // namespace flashcore::tile
