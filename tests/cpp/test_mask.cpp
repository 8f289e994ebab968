// visible_keys and visible_rows against the definition, for every small problem.
#include "tile/mask.h"

#include "check.h"

using namespace flashcore;
using namespace flashcore::tile;

namespace {

constexpr int64_t kSides[] = {0, 1, 2, 5, 40, Window::kOpen};

// The definition, as the documentation states it.
bool visible(Window w, int64_t i, int64_t j, int64_t q_offset) {
  int64_t const diagonal = i + q_offset;
  if (w.left < Window::kOpen && j < diagonal - w.left) return false;
  if (w.right < Window::kOpen && j > diagonal + w.right) return false;
  return true;
}

}  // namespace

TEST("visible_keys is the set of visible keys") {
  for (int64_t left : kSides)
    for (int64_t right : kSides)
      for (int64_t q_offset = -12; q_offset <= 12; ++q_offset)
        for (int64_t seqlen_k = 0; seqlen_k <= 9; ++seqlen_k)
          for (int64_t i = 0; i <= 9; ++i) {
            Window const w{left, right};
            KeyRange const r = visible_keys(band_of(w, q_offset), i, seqlen_k);
            CHECK(r.first <= r.last);
            CHECK(r.first >= 0 && r.last <= seqlen_k);
            for (int64_t j = 0; j < seqlen_k; ++j)
              CHECK_EQ(r.contains(j), visible(w, i, j, q_offset));
          }
}

TEST("visible_rows is the transpose of visible_keys") {
  for (int64_t left : kSides)
    for (int64_t right : kSides)
      for (int64_t q_offset = -12; q_offset <= 12; ++q_offset)
        for (int64_t seqlen_q = 0; seqlen_q <= 9; ++seqlen_q)
          for (int64_t j = 0; j <= 9; ++j) {
            Window const w{left, right};
            KeyRange const r = visible_rows(band_of(w, q_offset), j, seqlen_q);
            CHECK(r.first <= r.last);
            CHECK(r.first >= 0 && r.last <= seqlen_q);
            for (int64_t i = 0; i < seqlen_q; ++i)
              CHECK_EQ(r.contains(i), visible(w, i, j, q_offset));
          }
}

TEST("both ends of the range grow with the row") {
  for (int64_t left : kSides)
    for (int64_t right : kSides)
      for (int64_t q_offset = -12; q_offset <= 12; ++q_offset)
        for (int64_t i = 0; i < 12; ++i) {
          Band<int64_t> const band = band_of({left, right}, q_offset);
          KeyRange const a = visible_keys(band, i, int64_t{9});
          KeyRange const b = visible_keys(band, i + 1, int64_t{9});
          CHECK(a.first <= b.first);
          CHECK(a.last <= b.last);
        }
}

TEST("an open window is open") {
  CHECK(Window{}.open());
  CHECK(!(Window{Window::kOpen, 0}.open()));
  CHECK(!(Window{0, Window::kOpen}.open()));
  CHECK_EQ(visible_keys<int64_t>(band_of(Window{}, -1000), 0, 7).last, 7);
}

TEST("offsets near 2^31 do not overflow") {
  int64_t const far = INT32_MAX;
  KeyRange const r = visible_keys<int64_t>(band_of({0, 0}, -far), far, 10);
  CHECK_EQ(r.first, 0);
  CHECK_EQ(r.last, 1);
  CHECK(visible_keys(band_of({5, 0}, far), far, far).empty());
}

TEST_MAIN()
