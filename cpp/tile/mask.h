// Which keys a query row may see by rule: causal, window, lengths. Host and device, constexpr.
//
// Every rule is one half-open interval of keys per row, [first, last), with both ends growing with
// the row. Causal is the window whose right side is 0; so there is one concept, not three.
//
// Int: int64_t, or int in kernels, where positions are up to 2^29 and the ends of a band up to
// 2^30.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

// Inclusive distances from the diagonal key i + q_offset. kOpen, the most there is, is unlimited:
// further than a sequence is long.
struct Window {
  static constexpr int64_t kOpen = INT64_C(1) << 40;
  int64_t left = kOpen;
  int64_t right = kOpen;

  FC_HD constexpr bool open() const { return left >= kOpen && right >= kOpen; }
};

// A window around the diagonal of one sequence: of endless keys, row 0 sees [begin, end), and each
// row after it one further.
template <class Int>
struct Band {
  static constexpr Int kFar = sizeof(Int) == 4 ? Int{1} << 30 : Int{1} << 62;  // an open end
  Int begin = -kFar;
  Int end = kFar;
};

// What is further away than that is as far as anything can be.
template <class Int>
FC_HD constexpr Int within_reach(int64_t keys) {
  constexpr int64_t kFar = Band<Int>::kFar;
  return static_cast<Int>(min_of(kFar, max_of(-kFar, keys)));
}

template <class Int = int64_t>
FC_HD constexpr Band<Int> band_of(Window w, int64_t q_offset) {
  return {within_reach<Int>(q_offset - w.left), within_reach<Int>(q_offset + w.right + 1)};
}

template <class Int>
struct BasicKeyRange {
  Int first = 0;
  Int last = 0;  // one past the end

  FC_HD constexpr bool empty() const { return last <= first; }
  FC_HD constexpr bool contains(Int j) const { return first <= j && j < last; }
};
using KeyRange = BasicKeyRange<int64_t>;

// Keys that row i of a sequence with seqlen_k keys can see.
template <class Int>
FC_HD constexpr BasicKeyRange<Int> visible_keys(Band<Int> band, Int i, Int seqlen_k) {
  Int const first = min_of(seqlen_k, max_of(Int{0}, i + band.begin));
  return {first, max_of(first, min_of(seqlen_k, i + band.end))};
}

// Rows of a sequence with seqlen_q rows that can see key j: the transpose of visible_keys.
template <class Int>
FC_HD constexpr BasicKeyRange<Int> visible_rows(Band<Int> band, Int j, Int seqlen_q) {
  Int const first = min_of(seqlen_q, max_of(Int{0}, j - band.end + 1));
  return {first, max_of(first, min_of(seqlen_q, j - band.begin + 1))};
}

}  // namespace flashcore::tile
