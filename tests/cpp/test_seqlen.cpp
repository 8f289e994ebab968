// Where sequence b is and how long, for every combination of what can be given.
#include "tile/seqlen.h"

#include "check.h"
#include "common/problem.h"

using namespace flashcore;
using tile::sequence_of;

namespace {

Problem padded() {
  Problem p;
  p.batch = 3;
  p.seqlen_q = 10;
  p.seqlen_k = 14;
  return p;
}

}  // namespace

TEST("a padded batch") {
  Problem p = padded();
  for (int64_t b = 0; b < p.batch; ++b) {
    tile::Sequence const s = sequence_of(p, b);
    CHECK_EQ(s.q_begin, 0);
    CHECK_EQ(s.k_begin, 0);
    CHECK_EQ(s.seqlen_q, 10);
    CHECK_EQ(s.seqlen_k, 14);
    CHECK_EQ(s.q_offset, 4);
  }
}

TEST("valid lengths move the bottom-right diagonal of their own sequence") {
  int32_t const q[] = {10, 0, 3}, k[] = {5, 14, 0};
  for (bool with_q : {false, true})
    for (bool with_k : {false, true})
      for (bool top_left : {false, true})
        for (int64_t b = 0; b < 3; ++b) {
          Problem p = padded();
          p.seqlens_q = with_q ? q : nullptr;
          p.seqlens_k = with_k ? k : nullptr;
          p.top_left = top_left;
          tile::Sequence const s = sequence_of(p, b);
          CHECK_EQ(s.seqlen_q, with_q ? q[b] : 10);
          CHECK_EQ(s.seqlen_k, with_k ? k[b] : 14);
          CHECK_EQ(s.q_offset, top_left ? 0 : s.seqlen_k - s.seqlen_q);
        }
}

TEST("packed sequences") {
  int32_t const q[] = {0, 7, 7, 20}, k[] = {0, 0, 9, 10};
  Problem p;
  p.batch = 3;
  p.cu_seqlens_q = q;
  p.cu_seqlens_k = k;
  for (int64_t b = 0; b < 3; ++b) {
    tile::Sequence const s = sequence_of(p, b);
    CHECK_EQ(s.q_begin, q[b]);
    CHECK_EQ(s.k_begin, k[b]);
    CHECK_EQ(s.seqlen_q, q[b + 1] - q[b]);
    CHECK_EQ(s.seqlen_k, k[b + 1] - k[b]);
    CHECK_EQ(s.q_offset, s.seqlen_k - s.seqlen_q);
  }
}

TEST("in 32 bits a sequence shows the same keys, however far away its diagonal is") {
  int64_t const sides[] = {0, 1, 40, 1000, INT32_MAX, int64_t{3} << 30, tile::Window::kOpen};
  int64_t const offsets[] = {0, 7, -7, 900, 1 << 29, -(1 << 29), INT32_MAX - 3, 3 - INT32_MAX};
  int64_t const lengths[] = {0, 1, 50, 1000, 1 << 29};
  for (int64_t left : sides)
    for (int64_t right : sides)
      for (int64_t q_offset : offsets)
        for (int64_t seqlen_q : lengths)
          for (int64_t seqlen_k : lengths) {
            Problem p = padded();
            p.seqlen_q = seqlen_q;
            p.seqlen_k = seqlen_k;
            p.window = {left, right};
            p.has_q_offset = true;
            p.q_offset = q_offset;
            tile::Sequence const s = sequence_of(p, 0);
            tile::ShortSequence const narrow = sequence_of<int>(p, 0);
            for (int i : {0, 1, 45, 999, 1 << 29}) {
              tile::KeyRange const keys = tile::visible_keys<int64_t>(s.band, i, seqlen_k);
              auto const same_keys = tile::visible_keys(narrow.band, i, narrow.seqlen_k);
              CHECK_EQ(same_keys.first, keys.first);
              CHECK_EQ(same_keys.last, keys.last);
              tile::KeyRange const rows = tile::visible_rows<int64_t>(s.band, i, seqlen_q);
              auto const same_rows = tile::visible_rows(narrow.band, i, narrow.seqlen_q);
              CHECK_EQ(same_rows.first, rows.first);
              CHECK_EQ(same_rows.last, rows.last);
            }
          }
}

TEST("q_offset wins over the alignment, and per sequence over the one for all") {
  int32_t const offsets[] = {-3, 0, 8};
  for (bool top_left : {false, true})
    for (int64_t b = 0; b < 3; ++b) {
      Problem p = padded();
      p.top_left = top_left;
      p.has_q_offset = true;
      p.q_offset = 5;
      CHECK_EQ(sequence_of(p, b).q_offset, 5);
      p.q_offset_tensor = offsets;
      CHECK_EQ(sequence_of(p, b).q_offset, offsets[b]);
    }
}

TEST_MAIN()
