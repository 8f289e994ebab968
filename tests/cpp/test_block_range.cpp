// key_blocks and row_blocks against the definition, for every small problem and tile.
#include "tile/block_range.h"

#include "check.h"

using namespace flashcore;
using namespace flashcore::tile;

namespace {

constexpr int64_t kSides[] = {0, 1, 3, 7, 20, Window::kOpen};

// What a range of blocks must be: every block with a visible pair is visited, and those that need
// no mask are the ones that are visible in full.
template <class Visible>
void check_range(BlockRange<int64_t> r, int64_t row_begin, int64_t row_end, int64_t cols, int64_t n,
                 Visible visible) {
  CHECK(r.first <= r.first_full && r.first_full <= r.last);
  CHECK(r.first <= r.last_full && r.last_full <= r.last);
  CHECK(r.empty() || (r.first >= 0 && r.last <= ceil_div(cols, n)));
  int64_t first = INT64_MAX, last = -1;
  for (int64_t block = 0; block * n < cols; ++block) {
    bool any = false;
    bool all = (block + 1) * n <= cols;
    for (int64_t i = row_begin; i < row_end; ++i)
      for (int64_t j = block * n; j < min_of((block + 1) * n, cols); ++j) {
        bool const v = visible(i, j);
        any = any || v;
        all = all && v;
      }
    if (any) {
      first = min_of(first, block);
      last = block;
      CHECK(r.first <= block && block < r.last);
    }
    bool const unmasked = r.first_full <= block && block < r.last_full;
    CHECK(!unmasked || all);
    CHECK_EQ(unmasked, all);  // a full block that takes the masked path is only slow: none does
  }
  if (last >= 0) {  // no block is visited for nothing
    CHECK_EQ(r.first, first);
    CHECK_EQ(r.last, last + 1);
  }
}

}  // namespace

TEST("key_blocks visits exactly the blocks with a visible pair") {
  for (int64_t n : {1, 3, 4, 8})
    for (int64_t m : {1, 3, 4, 8})
      for (int64_t left : kSides)
        for (int64_t right : kSides)
          for (int64_t seqlen_q : {1, 4, 7, 13})
            for (int64_t seqlen_k : {0, 1, 4, 7, 13, 16})
              for (int64_t q_offset : {seqlen_k - seqlen_q, int64_t{0}, int64_t{-5}, int64_t{9}})
                for (int64_t row = 0; row < seqlen_q; row += m) {
                  Window const w{left, right};
                  int64_t const row_end = min_of(row + m, seqlen_q);
                  Band<int64_t> const band = band_of(w, q_offset);
                  BlockRange const r = key_blocks(band, row, row_end, seqlen_k, n);
                  check_range(r, row, row_end, seqlen_k, n, [&](int64_t i, int64_t j) {
                    return visible_keys(band, i, seqlen_k).contains(j);
                  });
                }
}

TEST("row_blocks visits exactly the blocks with a visible pair") {
  for (int64_t n : {1, 3, 4, 8})
    for (int64_t m : {1, 3, 4, 8})
      for (int64_t left : kSides)
        for (int64_t right : kSides)
          for (int64_t seqlen_q : {0, 1, 4, 7, 13, 16})
            for (int64_t seqlen_k : {1, 4, 7, 13})
              for (int64_t q_offset : {seqlen_k - seqlen_q, int64_t{0}, int64_t{-5}, int64_t{9}})
                for (int64_t key = 0; key < seqlen_k; key += n) {
                  Window const w{left, right};
                  int64_t const key_end = min_of(key + n, seqlen_k);
                  Band<int64_t> const band = band_of(w, q_offset);
                  BlockRange const r = row_blocks(band, key, key_end, seqlen_q, m);
                  check_range(r, key, key_end, seqlen_q, m, [&](int64_t j, int64_t i) {
                    return visible_keys(band, i, seqlen_k).contains(j);
                  });
                }
}

TEST("no rows or no keys visit nothing") {
  Band<int64_t> const open, causal = band_of({Window::kOpen, 0}, -10);
  CHECK(key_blocks<int64_t>(open, 4, 4, 10, 4).empty());
  CHECK(key_blocks<int64_t>(open, 0, 4, 0, 4).empty());
  CHECK(key_blocks<int64_t>(causal, 0, 4, 10, 4).empty());
  CHECK(row_blocks<int64_t>(open, 4, 4, 10, 4).empty());
}

TEST_MAIN()
