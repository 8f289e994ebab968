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
