// Index maths of the Hopper backward kernels: where rows are in the workspace, which tiles a block
// takes, boxes that stop where a sequence does. No GPU.
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "backward_params.h"
#include "check.h"
#include "sm90/bwd/dq_layout.h"
#include "sm90/bwd/dropout.h"
#include "sm90/bwd/key_tiles.h"
#include "sm90/bwd/list_steps.h"
#include "sm90/bwd/query_blocks.h"
#include "sm90/bwd/stat_parts.h"
#include "sm90/layout.h"

using namespace flashcore;
using namespace flashcore::sm90;
using namespace flashcore::sm90::bwd;

namespace {

std::vector<int32_t> sums(const std::vector<int>& lengths) {
  std::vector<int32_t> cu{0};
  for (int n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

std::vector<int> random_lengths(std::mt19937& random, int longest) {
  std::vector<int> lengths(std::uniform_int_distribution<int>(1, 9)(random));
  for (int& n : lengths) {
    n = std::uniform_int_distribution<int>(0, longest)(random);
    if (random() % 4 == 0) n = 64 * (n / 64);
    if (random() % 5 == 0) n = 0;
  }
  return lengths;
}

}  // namespace

TEST("a window of rows holds the sequence's rows, from its first on, and zeros behind them") {
  for (int box : {64, 128})
    for (int row : {0, 1, 63, 1000})
      for (int valid : {1, 2, 63, 64, 65, 128, 500}) {
        RowWindow const w = row_window(box, row, valid);
        CHECK(w.skipped >= 0);
        CHECK_EQ(w.begin < 0, row + valid < box && row < box - valid);  // fetched row by row
        for (int r = 0; r < box; ++r) {
          bool const inside = w.skipped + r < box;  // the second dimension's extent
          CHECK_EQ(inside, r < valid);
          if (inside) CHECK_EQ(w.skipped + r + w.begin, row + r);  // both have a row's stride
        }
        CHECK(w.begin <= row);  // so there are enough rows in the third dimension
      }
}

TEST("packed sequences do not share a query block, and every block finds its own") {
  std::mt19937 random(1);
  for (int block_m : {64, 80, 128})
    for (int trial = 0; trial < 300; ++trial) {
      std::vector<int> const lengths = random_lengths(random, 400);
      std::vector<int32_t> const cu = sums(lengths);
      Params p;
      p.batch = static_cast<int>(lengths.size());
      p.seqlen_q = p.seqlen_k = 1 << 20;  // the caller's bound, as loose as it may be
      p.cu_seqlens_q = p.cu_seqlens_k = cu.data();
      int64_t const blocks = query_blocks(p, cu.back(), block_m);
      int64_t end = 0;
      for (int b = 0; b < p.batch; ++b) {
        CHECK(first_query_block(p, b, block_m) >= end);
        end = first_query_block(p, b, block_m) + ceil_div(lengths[b], block_m);
      }
      CHECK(end <= blocks);
      std::set<std::pair<int, int>> found;
      for (int block = 0; block < blocks; ++block) {
        QueryBlock const at = query_block(p, block, block_m);
        CHECK_EQ(first_query_block(p, at.batch, block_m) + at.m, block);
        CHECK_EQ(at.row, at.m * block_m);
        CHECK_EQ(at.written, lengths[at.batch] - at.row);
        if (at.written > 0) CHECK(found.insert({at.batch, at.m}).second);
      }
      size_t expected = 0;
      for (int n : lengths) expected += static_cast<size_t>(ceil_div(n, block_m));
      CHECK_EQ(found.size(), expected);
    }
}

TEST("the blocks of a padded batch cover its padding, too") {
  int32_t const lengths[] = {0, 130, 300};
  Params p;
  p.batch = 3;
  p.seqlen_q = p.seqlen_k = 300;
  p.seqlens_q = lengths;
  p.sequence_blocks = 3;
  CHECK_EQ(query_blocks(p, 0, 128), 9);
  for (int block = 0; block < 9; ++block) {
    QueryBlock const at = query_block(p, block, 128);
    CHECK_EQ(at.batch, block / 3);
    CHECK_EQ(at.m, block % 3);
    CHECK_EQ(at.written, 300 - 128 * (block % 3));
  }
}

TEST("the blocks of a launch take every key tile once") {
  std::mt19937 random(2);
  for (int trial = 0; trial < 400; ++trial) {
    std::vector<int> const lengths = random_lengths(random, 700);
    std::vector<int32_t> const cu = sums(lengths);
    bool const packed = trial % 2;
    int const block_n = trial % 4 < 2 ? 128 : 64;
    Params p;
    p.batch = static_cast<int>(lengths.size());
    p.seqlen_q = p.seqlen_k = 500;
    if (packed) p.cu_seqlens_q = p.cu_seqlens_k = cu.data();
    p.whole_heads = trial % 3 == 0;
    int const heads = 1 + static_cast<int>(random() % 4);
    p.pairs = p.batch * heads;
    int const pairs = packed ? heads : p.pairs;
    p.scheduler = {ceil_div(p.seqlen_k, block_n), heads, pairs,
                   max_of(1, min_of(1 + static_cast<int>(random() % 3), pairs))};
    int const blocks = 1 + static_cast<int>(random() % 9);

    std::set<std::tuple<int, int, int>> seen;
    std::map<std::pair<int, int>, std::pair<int, int>> of_pair;  // block, next tile
    for (int block = 0; block < blocks; ++block) {
      KeyTiles tiles(block, blocks);
      for (tile::Tile t; tiles.next(p, block_n, t);) {
        CHECK(seen.insert({t.batch, t.head, t.m_block}).second);
        if (!p.whole_heads) continue;
        auto const [at, fresh] = of_pair.insert({{t.batch, t.head}, {block, 0}});
        CHECK_EQ(at->second.first, block);  // a pair stays with one block, its tiles in order
        CHECK_EQ(at->second.second++, t.m_block);
      }
      tile::Tile t;
      CHECK(!tiles.next(p, block_n, t));
    }
    size_t expected = 0;
    for (int b = 0; b < p.batch; ++b) {
      int const n = key_tiles(p, b, block_n);
      CHECK_EQ(n, ceil_div(packed ? lengths[b] : 500, block_n));
      expected += static_cast<size_t>(n * heads);
    }
    CHECK_EQ(seen.size(), expected);
  }
}

TEST("long and short tiles alternate from sequence to sequence, and the last ones are short") {
  std::vector<int> const lengths{512, 512, 512};
  std::vector<int32_t> const cu = sums(lengths);
  Params p;
  p.batch = 3;
  p.cu_seqlens_q = p.cu_seqlens_k = cu.data();
  p.scheduler = {0, 1, 1, 1};
  std::vector<int> order;
  std::vector<bool> falling;
  KeyTiles tiles(0, 1);
  for (tile::Tile t; tiles.next(p, 128, t);) {
    order.push_back(t.m_block);
    if (t.m_block == 0) falling.push_back(tiles.falling());
  }
  // Under a causal mask the first key tile is the longest.
  CHECK(order == (std::vector<int>{0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3}));
  CHECK(falling == (std::vector<bool>{false, true, false}));
}

namespace {

// Every element of a query block of dQ: computed where it belongs, and once in memory.
template <int kBlockM, int kHeadDim, int kConsumers = 2>
void check_dq_layout() {
  using Dq = DqLayout<kBlockM, kHeadDim, kConsumers>;
  std::set<std::pair<int, int>> elements;
  std::set<int> places;
  for (int thread = 0; thread < Dq::kThreads; ++thread) {
    int const consumer = thread / 128;
    CHECK_EQ(Dq::panel(consumer) * kPanelCols + Dq::kept(consumer), Dq::col(consumer));
    CHECK(Dq::quads(consumer) <= Dq::quads(0));
    CHECK(Dq::kept(consumer) + 8 * Dq::quads(consumer) <= Dq::kProductCols);
    CHECK_EQ(Dq::offset(thread) % 4, 0);
    for (int quad = 0; quad < Dq::quads(consumer); ++quad) {
      // A warp's quads lie side by side.
      CHECK_EQ(Dq::offset(thread) - Dq::offset(thread / 32 * 32), thread % 32 * 4);
      for (int i = 0; i < 4; ++i) {
        Coord const c = Dq::at(consumer, accumulator_coord(thread % 128, 4 * quad + i));
        CHECK(c.row < kBlockM && c.col < kHeadDim);
        CHECK(elements.insert({c.row, c.col}).second);
        CHECK(places.insert(Dq::offset(thread) + 128 * quad + i).second);
      }
    }
  }
  CHECK_EQ(static_cast<int>(elements.size()), kBlockM * kHeadDim);
  CHECK_EQ(static_cast<int>(places.size()), kBlockM * kHeadDim);
  CHECK_EQ(*places.rbegin(), kBlockM * kHeadDim - 1);
}

}  // namespace

TEST("a statistic is the sum of its parts, exactly, and none of them is infinite where it is not") {
  std::mt19937 random(5);
  std::vector<float> values{0.0f, -0.0f, 1.0f, -88.5f, 3.4e38f, 1.2e-30f, StatParts::kNever};
  for (int i = 0; i < 10000; ++i)
    values.push_back(std::ldexp(static_cast<float>(random()) / 4294967296.0f - 0.5f,
                                static_cast<int>(random() % 60) - 30));
  auto value = [](uint16_t part) { return std::bit_cast<float>(uint32_t{part} << 16); };
  for (float x : values) {
    StatParts const parts = StatParts::of(x);
    float sum = 0.0f;
    for (int i = StatParts::kCount; i-- > 0;) sum += value(parts.part[i]);
    CHECK_EQ(sum, x);
    for (int i = 0; i < 8; ++i) CHECK(std::isfinite(value(parts.part[i])));
    for (int i = StatParts::kCount; i < 8; ++i) CHECK_EQ(parts.part[i], 0);
  }
  float const infinity = std::numeric_limits<float>::infinity();
  CHECK_EQ(value(StatParts::of(-infinity).part[0]), -infinity);
  CHECK_EQ(StatParts::of(-infinity).part[1], 0);
  CHECK(std::isnan(value(StatParts::of(std::nanf("1")).part[0])));
}

TEST("the consumers' parts of dQ are the tile, and its sums fill their memory") {
  check_dq_layout<128, 32>();
  check_dq_layout<128, 64>();
  check_dq_layout<64, 64>();
  check_dq_layout<64, 96>();
  check_dq_layout<64, 128>();
  check_dq_layout<64, 192>();
  check_dq_layout<64, 256>();
  check_dq_layout<80, 128>();     // transposed
  check_dq_layout<64, 128, 4>();  // of two blocks
  check_dq_layout<64, 256, 4>();
}

TEST("threads that trade halves of two Philox calls get the bits of the scores they hold") {
  tile::DropoutKey const dropout = tile::dropout_key(0x1234567890abcdefu, 77);
  int const batch = 3, head = 5;
  for (int first_query : {0, 64, 32, 4096})
    for (int first_key : {0, 64, 128, 1920})
      for (int warp = 0; warp < 4; ++warp) {
        int const key = first_key + 16 * warp;
        for (int group = 0; group < 4; ++group) {
          int const query = first_query + 16 * group;
          tile::Philox4 patches[32];
          for (int lane = 0; lane < 32; ++lane)
            patches[lane] = own_patch(dropout, lane, batch, head, query, key);
          for (int lane = 0; lane < 32; ++lane) {
            int const odd = lane / 4 % 2;
            KeyPairBits const mine = key_pair_bits(patches[lane], odd);
            // What the other thread gives away: the halves for keys of this parity.
            KeyPairBits const other = key_pair_bits(patches[lane ^ 4], odd);
            for (uint32_t threshold : {1u, 20000u, 65535u}) {
              uint32_t const kept = kept_bits(odd ? other : mine, odd ? mine : other, threshold);
              for (int i = 0; i < 8; ++i) {
                Coord const c = accumulator_coord(32 * warp + lane, 8 * group + i);
                uint32_t const bits = tile::dropout_bits(dropout, batch, head,
                                                         static_cast<uint32_t>(first_query + c.col),
                                                         static_cast<uint32_t>(first_key + c.row));
                CHECK_EQ(kept >> i & 1, static_cast<uint32_t>(bits >= threshold));
              }
            }
          }
        }
      }
}

namespace {

// What ListSteps reads.
struct ListParams {
  int group;
  tile::BlockLists kept_queries;
  NeighbourTable neighbours = {};
};
struct ListWork {
  int kv_head, batch, key, first, last, full, last_full, stride;
  bool masked(int m) const { return m < full || m >= last_full; }
};

// kept[head][key block][query block], in blocks of 64 * key_units keys and query_parts of the
// kernel's query blocks; a tile of kHalves * 64 keys in the middle of it.
template <int kHalves>
void check_list_steps(std::mt19937& random, int key_units, int query_parts) {
  constexpr int kHeads = 3, kKeyBlocks = 4, kQueryBlocks = 5;
  bool kept[kHeads][kKeyBlocks][kQueryBlocks];
  int32_t count[kHeads][kKeyBlocks] = {}, indices[kHeads][kKeyBlocks][kQueryBlocks];
  unsigned const sparsity = random() % 5;
  for (int h = 0; h < kHeads; ++h)
    for (int k = 0; k < kKeyBlocks; ++k)
      for (int q = 0; q < kQueryBlocks; ++q)
        if ((kept[h][k][q] = random() % 4 >= sparsity)) indices[h][k][count[h][k]++] = q;
  ListParams const p{
      kHeads,
      {{count[0], indices[0][0], 0, kKeyBlocks, 0, kKeyBlocks * kQueryBlocks, kQueryBlocks},
       kKeyBlocks,
       key_units,
       query_parts}};
  int const blocks = kQueryBlocks * query_parts;
  int const tile = static_cast<int>(random() % (kKeyBlocks * key_units / kHalves + 1));
  int const first = static_cast<int>(random() % blocks), last = first + random() % (blocks - first);
  int const stride = random() % 2 ? 1 : -1;
  ListWork const work{0, 0, tile * kHalves * 64, first, last, first + 1, last - 1, stride};

  std::vector<StepNote> steps;
  ListSteps<kHalves> walk(p, work);
  for (StepNote note{}; walk.next(p, work, note);) steps.push_back(note);
  size_t at = 0;
  for (int h = 0; h < kHeads; ++h)
    for (int i = first; i < last; ++i) {
      int const m = stride > 0 ? i : first + last - 1 - i;
      bool skips[2] = {true, true};
      for (int half = 0; half < kHalves; ++half) {
        int const block = (tile * kHalves + half) / key_units;
        skips[half] = block >= kKeyBlocks || !kept[h][block][m / query_parts];
      }
      if (skips[0] && (kHalves == 1 || skips[1])) continue;
      CHECK(at < steps.size());
      if (at == steps.size()) return;
      StepNote const& note = steps[at++];
      CHECK_EQ(note.head, h);
      CHECK_EQ(note.m, m);
      for (int half = 0; half < kHalves; ++half) CHECK_EQ(note.skips[half], skips[half]);
      CHECK_EQ(note.masked, work.masked(m) || skips[0] || (kHalves == 2 && skips[1]));
    }
  CHECK_EQ(at, steps.size());
}

}  // namespace

TEST("a tile's steps are to the query blocks that the lists of its keys keep, rising or falling") {
  std::mt19937 random(5);
  for (int trial = 0; trial < 3000; ++trial)
    for (int key_units : {1, 2, 3, 4})
      for (int query_parts : {1, 2, 3}) {
        check_list_steps<1>(random, key_units, query_parts);
        check_list_steps<2>(random, key_units, query_parts);
      }
}

TEST_MAIN()
