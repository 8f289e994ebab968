// The fixed order of dQ: key tiles that are taken in turn and wait for one another neither hang nor
// add in another order, whoever takes them and however long it takes. No GPU.
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "backward_params.h"
#include "check.h"
#include "sm90/bwd/dq_order.h"
#include "sm90/bwd/list_steps.h"
#include "sm90/bwd/own_steps.h"
#include "sm90/bwd/query_blocks.h"

using namespace flashcore;
using namespace flashcore::sm90::bwd;

namespace {

struct Problem {
  Params p;
  int group, block_m, block_n;
  bool packed = false;
  // Or where sequences begin. None: all are of one length.
  std::vector<int32_t> lengths_q = {}, lengths_k = {};

  Params params() const {
    Params to = p;
    if (lengths_q.empty()) return to;
    (packed ? to.cu_seqlens_q : to.seqlens_q) = lengths_q.data();
    (packed ? to.cu_seqlens_k : to.seqlens_k) = lengths_k.data();
    return to;
  }
};

using Place = std::tuple<int, int, int>;  // batch, head, query block of the sequence
using Order = std::map<Place, std::vector<int>>;

Problem random_problem(std::mt19937& random) {
  auto const any = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  Problem x{{}, any(1, 3), any(0, 1) ? 64 : 128, any(0, 1) ? 64 : 128};
  Params& p = x.p;
  p.batch = any(1, 3);
  p.seqlen_q = any(1, 900);
  p.seqlen_k = any(1, 900);
  if (any(0, 3)) p.window.right = any(0, 2) ? 0 : any(0, 200);
  if (any(0, 2) == 0) p.window.left = any(0, 300);
  p.top_left = any(0, 1);
  if (any(0, 3) == 0) {
    p.has_q_offset = true;
    p.q_offset = any(-300, 600);
  }
  int const kind = any(0, 2);
  x.packed = kind == 2;
  for (int b = 0; kind > 0 && b < p.batch; ++b) {
    x.lengths_q.push_back(any(0, p.seqlen_q));
    x.lengths_k.push_back(any(0, p.seqlen_k));
  }
  if (x.packed)
    for (std::vector<int32_t>* lengths : {&x.lengths_q, &x.lengths_k}) {
      lengths->insert(lengths->begin(), 0);
      for (size_t i = 1; i < lengths->size(); ++i) (*lengths)[i] += (*lengths)[i - 1];
    }
  int const heads = any(1, 4);
  p.pairs = p.batch * heads;
  int const pairs = x.packed ? heads : p.pairs;
  p.scheduler = {ceil_div(p.seqlen_k, x.block_n), heads, pairs, any(1, pairs)};
  p.all_rise = any(0, 3) == 0;
  return x;
}

// The query blocks of a tile's steps.
std::vector<int> visited(StepOrder const& order) {
  std::vector<int> blocks;
  for (int m = order.begin; m != order.end && blocks.size() < 10000; m += order.stride)
    blocks.push_back(m);
  return blocks;
}

struct Step {
  Place at;
  bool waits;
  int next;
};
struct Tile {
  int n;
  std::vector<Step> steps;
};

// The steps of all tiles, in the order in which they are taken. backwards: each waits for the wrong
// neighbour.
std::vector<Tile> tiles_of(Problem const& x, bool backwards) {
  Params const p = x.params();
  std::vector<Tile> tiles;
  KeyTiles taken(0, 1);
  for (tile::Tile t; taken.next(p, x.block_n, t);) {
    auto const seq = tile::sequence_of<int>(p, t.batch);
    auto const rows = [&](int n) { return rows_of(seq, n, x.block_m, x.block_n); };
    int const n = t.m_block;
    bool const rising = taken.falling() == backwards;
    StepOrder order;
    order.set_steps(rows(n), rising);
    if (rising)
      order.set_fresh(rows(n), rows(n - 1));
    else
      order.set_complete(rows(n), rows(n + 1));
    Tile tile{n, {}};
    if (!rows(n).empty())
      for (int m : visited(order))
        for (int head = t.head * x.group; head < (t.head + 1) * x.group; ++head)
          tile.steps.push_back({{t.batch, head, m}, order.waits(m), order.next(n)});
    tiles.push_back(tile);
  }
  return tiles;
}

// What the functions of block lists read of a tile.
struct ListWork : StepOrder {
  int kv_head, batch, key, first, last;
  bool masked(int) const { return false; }
};

// Which blocks a mask keeps, as the lists of both directions.
struct RandomMask {
  int block_q, block_k, heads, rows, cols;
  std::vector<int32_t> q_count, q_indices, k_count, k_indices;
  std::vector<bool> kept;  // [batch][head][row][column]

  // transposed: else the two directions have nothing to do with each other.
  RandomMask(std::mt19937& random, Problem const& x, int heads, bool transposed)
      : block_q(x.block_m * static_cast<int>(1 + random() % 3)),
        block_k(kListKeys * static_cast<int>(1 + random() % 5)),
        heads(heads),
        rows(ceil_div(x.p.seqlen_q, block_q)),
        cols(ceil_div(x.p.seqlen_k, block_k)) {
    unsigned const density = random() % 5;
    int const all = x.p.batch * heads;
    auto const draw = [&] {
      kept.clear();
      for (int i = 0; i < all * rows * cols; ++i) kept.push_back(random() % 4 < density);
    };
    draw();
    for (int pair = 0; pair < all; ++pair)
      list(pair, rows, cols, k_count, k_indices, [&](int r, int c) { return keeps(pair, r, c); });
    if (!transposed) draw();
    for (int pair = 0; pair < all; ++pair)
      list(pair, cols, rows, q_count, q_indices, [&](int c, int r) { return keeps(pair, r, c); });
  }
  bool keeps(int pair, int row, int col) const {
    return kept[static_cast<size_t>((pair * rows + row) * cols + col)];
  }
  template <class Keeps>
  static void list(int pair, int lists, int blocks, std::vector<int32_t>& count,
                   std::vector<int32_t>& indices, Keeps keeps) {
    for (int i = 0; i < lists; ++i) {
      size_t const row = static_cast<size_t>(pair * lists + i);
      count.push_back(0);
      indices.resize((row + 1) * static_cast<size_t>(blocks));
      for (int j = 0; j < blocks; ++j)
        if (keeps(i, j))
          indices[row * static_cast<size_t>(blocks) + static_cast<size_t>(count[row]++)] = j;
    }
  }
  tile::BlockList of(std::vector<int32_t> const& count, std::vector<int32_t> const& indices,
                     int lists, int blocks) const {
    return {count.data(),           indices.data(), heads * lists, lists,
            heads * lists * blocks, lists * blocks, blocks};
  }
  void give(Params& p, Problem const& x) const {
    p.kept_queries = {of(q_count, q_indices, cols, rows), cols, block_k / kListKeys,
                      block_q / x.block_m};
    p.kept_keys = {of(k_count, k_indices, rows, cols), rows, block_q / x.block_m, block_k};
  }
};

// As tiles_of, with block lists: each step is asked for its turn.
template <int kHalves>
std::vector<Tile> tiles_of_lists(Problem const& x, RandomMask const& mask) {
  Params p = x.params();
  p.group = x.group;
  mask.give(p, x);
  std::vector<Neighbours> entries;
  p.neighbours = {nullptr, mask.heads, mask.cols, mask.rows * mask.block_q / x.block_m,
                  NeighbourTable::tiles_in(mask.block_k, x.block_n)};
  entries.resize(static_cast<size_t>(p.batch * mask.heads * mask.cols * p.neighbours.visits *
                                     p.neighbours.tiles));
  p.neighbours.entries = entries.data();
  for (int b = 0; b < p.batch; ++b)
    for (int head = 0; head < mask.heads; ++head)
      for (int list = 0; list < mask.cols; ++list)
        for (int thread : {1, 0, 2})
          p.neighbours.fill(p, b, head, list, thread, 3, x.block_m, x.block_n);
  std::vector<Tile> tiles;
  KeyTiles taken(0, 1);
  for (tile::Tile t; taken.next(p, x.block_n, t);) {
    auto const rows = rows_of(tile::sequence_of<int>(p, t.batch), t.m_block, x.block_m, x.block_n);
    ListWork work{};
    work.set_steps(rows, !taken.falling());
    work.kv_head = t.head;
    work.batch = t.batch;
    work.key = t.m_block * x.block_n;
    work.first = rows.first;
    work.last = rows.last;
    Tile tile{t.m_block, {}};
    ListSteps<kHalves> steps(p, work);
    for (StepNote note{}; steps.next(p, work, note);) {
      Place const at{t.batch, note.head, note.m};
      Neighbours const beside = p.neighbours.of(t.batch, note.head)[note.place];
      tile.steps.push_back({at, beside.waits(work.stride), beside.next(work.stride)});
    }
    tiles.push_back(tile);
  }
  return tiles;
}

// Blocks take tiles and add, in a random order of events. False if they hang. dealt: tiles are
// dealt out in turn.
bool run(std::vector<Tile> const& tiles, int blocks, std::mt19937& random, Order& order,
         bool dealt = false) {
  struct Block {
    int tile = -1;
    size_t step = 0;
  };
  std::vector<Block> at(static_cast<size_t>(blocks));
  std::map<Place, int> turns;
  std::vector<int> given(static_cast<size_t>(blocks));  // the next tile of each, if dealt
  for (int i = 0; i < blocks; ++i) given[static_cast<size_t>(i)] = i;
  int taken = 0;
  int const all = static_cast<int>(tiles.size());
  auto const next = [&](Block const& b) -> int& {
    return dealt ? given[static_cast<size_t>(&b - at.data())] : taken;
  };
  for (;;) {
    std::vector<Block*> movable;
    bool done = true;
    for (Block& b : at) {
      if (b.tile < 0 && next(b) >= all) continue;
      done = false;
      if (b.tile >= 0 && b.step < tiles[b.tile].steps.size()) {
        Step const& s = tiles[b.tile].steps[b.step];
        auto const turn = turns.find(s.at);
        if (s.waits && (turn == turns.end() || turn->second != tiles[b.tile].n)) continue;
      }
      movable.push_back(&b);
    }
    if (done) return true;
    if (movable.empty()) return false;
    Block& b = *movable[random() % movable.size()];
    if (b.tile >= 0 && b.step < tiles[b.tile].steps.size()) {
      Step const& s = tiles[b.tile].steps[b.step++];
      order[s.at].push_back(tiles[b.tile].n);
      if (s.next >= 0) turns[s.at] = s.next;
    } else {
      int& n = next(b);
      b = {n < all ? n : -1, 0};
      if (b.tile >= 0) n += dealt ? blocks : 1;
    }
  }
}

// Whoever takes them, each waits for all that were taken before, and none else.
void check_order(std::vector<Tile> const& tiles, std::mt19937& random) {
  Order expected;
  for (Tile const& t : tiles)
    for (Step const& s : t.steps) {
      CHECK_EQ(s.waits, !expected[s.at].empty());
      expected[s.at].push_back(t.n);
    }
  for (int blocks : {1, 2, 3, 7, 40}) {
    Order order;
    CHECK(run(tiles, blocks, random, order));
    for (auto const& [at, visitors] : expected) CHECK(order[at] == visitors);
  }
}

}  // namespace

TEST("every query block is added to by the tiles that visit it, in the order of the tiles") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 600; ++trial)
    check_order(tiles_of(random_problem(random), false), random);
}

TEST("with block lists, too; and if those are not each other's transpose it still ends") {
  std::mt19937 random(3);
  for (int trial = 0; trial < 900; ++trial) {
    Problem const x = random_problem(random);
    bool const transposed = trial % 3 > 0;
    RandomMask const mask(random, x, x.p.scheduler.heads * x.group, transposed);
    auto const tiles = x.block_n == 64 ? tiles_of_lists<1>(x, mask) : tiles_of_lists<2>(x, mask);
    if (transposed) check_order(tiles, random);
    for (int blocks : {1, 2, 7, 40}) {
      Order order;
      CHECK(run(tiles, blocks, random, order));
    }
  }
}

TEST("laps go round the query blocks, one tile after another, and end if all run at once") {
  std::mt19937 random(11);
  int hung = 0;
  for (int trial = 0; trial < 400; ++trial) {
    auto const any = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    int const lap = any(2, 12), rows = any(lap, 4 * lap), n_tiles = lap * any(1, 3);
    int const group = any(1, 3), heads = any(1, 3), width = any(1, 4);
    Params p;
    p.batch = any(1, 2);
    p.pairs = p.batch * heads;
    p.laps = {lap, rows};
    p.scheduler = {n_tiles / lap, heads, p.pairs, width};
    p.all_rise = true;
    std::vector<Tile> tiles;
    std::map<Place, std::map<int, int>> added;  // in which of its steps a tile adds
    KeyTiles dealt(0, 1);
    for (tile::Tile t; dealt.next_in_laps(p, t);) {
      int const n = t.m_block;
      CHECK(!dealt.falling());
      StepOrder order;
      order.go_round(p.laps, n);
      Tile tile{n, {}};
      for (int m : visited(order)) {
        for (int head = t.head * group; head < (t.head + 1) * group; ++head) {
          Place const at{t.batch, head, p.laps.block(m)};
          CHECK(added[at].emplace(n, tile.steps.size()).second);
          tile.steps.push_back({at, p.laps.waits(n, m), p.laps.next(n, m)});
        }
      }
      CHECK_EQ(tile.steps.size(), static_cast<size_t>(rows * group));
      tiles.push_back(tile);
    }
    CHECK_EQ(tiles.size(), static_cast<size_t>(p.pairs * n_tiles));
    CHECK_EQ(added.size(), static_cast<size_t>(p.pairs * group * rows));
    // In every lap who begins at the same time, or before, adds some steps earlier: a tile's share
    // of the query blocks.
    std::map<Place, std::map<int, int>> next;
    Order expected;
    for (Tile const& t : tiles)
      for (Step const& s : t.steps) {
        next[s.at][t.n] = s.next;
        if (!s.waits) expected[s.at].push_back(t.n);
      }
    for (auto& [at, order] : expected) {
      CHECK_EQ(order.size(), size_t{1});
      while (order.size() <= static_cast<size_t>(n_tiles) &&
             next[at].contains(next[at][order.back()])) {
        int const n = order.back(), after = next[at][n];
        order.push_back(after);
        if (after / lap == n / lap)
          CHECK(added[at][n] + rows / lap * group <= added[at][after]);
        else
          CHECK_EQ(after / lap, n / lap + 1);
      }
      CHECK_EQ(order.size(), static_cast<size_t>(n_tiles));
    }
    CHECK_EQ(expected.size(), added.size());
    for (int blocks : {lap, lap + 1, width * lap}) {
      Order order;
      CHECK(run(tiles, max_of(lap, blocks), random, order, true));
      for (auto const& [at, visitors] : expected) CHECK(order[at] == visitors);
    }
    Order order;
    hung += !run(tiles, lap - 1, random, order, true);
  }
  CHECK(hung > 300);  // why all must run at once
}

TEST("a lap has as many tiles as leave nobody idle, and come two steps after one another") {
  struct {
    int64_t n_blocks, blocks, group, pairs, head_bytes, workers, lap;
    const char* why;
  } const cases[] = {
      {32, 64, 1, 8, 4 << 20, 132, 32, "256 tiles, four heads at a time"},
      {32, 52, 1, 8, 4 << 20, 132, 16, "steps of 80 queries: all heads, half of their tiles"},
      {32, 32, 1, 8, 2 << 20, 132, 16, "steps of 128"},
      {16, 32, 1, 8, 2 << 20, 132, 16, "all tiles at once"},
      {32, 26, 1, 8, 2 << 20, 132, 16, "half the queries: 1.6 steps, for want of something better"},
      {128, 256, 1, 1, 32 << 20, 66, 64, "more tiles than clusters"},
      {24, 48, 1, 8, 3 << 20, 132, 24, "five heads at a time, in two turns as any other way"},
      {32, 52, 4, 32, 16 << 20, 132, 0, "four heads would not stay in L2"},
      {31, 31, 1, 8, 2 << 20, 132, 0, "a prime, and as many steps"},
      {24, 48, 1, 100, 3 << 20, 132, 24, "20 turns instead of 19"},
      {90, 180, 1, 4, 8 << 20, 132, 30, "all heads, a third of their tiles"},
      {100, 200, 1, 8, 4 << 20, 132, 0, "8 turns instead of 7"},
      {1, 2, 1, 500, 1 << 20, 132, 0, "a single tile"},
      {8, 0, 1, 8, 0, 132, 0, "no queries"},
      {8, 16, 1, 0, 1 << 20, 132, 0, "no heads"},
      {0, 16, 1, 8, 1 << 20, 132, 0, "no keys"},
  };
  for (auto const& x : cases)
    CHECK_EQ(lap_size(x.n_blocks, x.blocks, x.group, x.pairs, x.head_bytes, x.workers), x.lap);
}

TEST("two halves of a tile's steps are all of them") {
  for (bool reversed : {false, true})
    for (int first : {0, 3})
      for (int steps = 0; steps < 6; ++steps) {
        std::vector<int> seen(10, 0);
        for (int rank : {0, 1}) {
          StepOrder order;
          order.set_steps({first, first, first + steps, first + steps}, reversed);
          order.take_half(rank);
          auto const blocks = visited(order);
          for (int m : blocks) ++seen.at(static_cast<size_t>(m));
          CHECK_EQ(blocks.size(), static_cast<size_t>((steps + 1 - rank) / 2));
        }
        for (int m = 0; m < 10; ++m)
          CHECK_EQ(seen[static_cast<size_t>(m)], m >= first && m < first + steps);
      }
}

TEST("the model notices tiles that wait for those that are taken after them") {
  std::mt19937 random(2);
  int hung = 0;
  for (int trial = 0; trial < 100; ++trial) {
    auto const tiles = tiles_of(random_problem(random), true);
    Order order;
    hung += !run(tiles, 2, random, order);
  }
  CHECK(hung > 20);
}

TEST("a consumer passes over blocks of which no row sees its keys, and takes one at least") {
  std::mt19937 random(7);
  int passed = 0;
  for (int trial = 0; trial < 400; ++trial) {
    Problem x = random_problem(random);
    x.block_m = trial % 2 ? 64 : 80;
    x.block_n = 128;
    Params const p = x.params();
    auto const seq = tile::sequence_of<int>(p, p.batch - 1);
    for (int n = 0; n * x.block_n < seq.seqlen_k; ++n) {
      int const key = n * x.block_n;
      tile::BlockRange<int> const rows = rows_of(seq, n, x.block_m, x.block_n);
      if (rows.empty()) continue;
      StepOrder steps;
      steps.set_steps(rows, trial % 3 == 0);
      for (int first : {key, key + 64}) {  // of the consumer's keys
        auto const own = OwnSteps::of(steps, x.block_m, key - seq.band.end + 1,
                                      key - seq.band.begin + 1, first - key);
        CHECK(own.begin != own.end);
        bool taken = false;
        for (int m : visited(steps)) {
          if (m == own.begin) taken = true;
          if (m == own.end) taken = false;
          if (taken) continue;
          ++passed;
          for (int i = m * x.block_m; i < (m + 1) * x.block_m; ++i) {
            auto const seen = tile::visible_keys(seq.band, i, key + x.block_n);
            CHECK(seen.last <= first || seen.first >= first + 64);
          }
        }
      }
    }
  }
  CHECK(passed > 200);
}

TEST(
    "under a causal mask, all begun at once, falling tiles never wait and rising ones a step "
    "each") {
  for (int block_m : {64, 80, 128})
    for (int group : {1, 3}) {
      Problem x{{}, group, block_m, 128};
      x.p.seqlen_q = x.p.seqlen_k = 2048;
      x.p.window.right = 0;
      x.p.pairs = 2;
      x.p.scheduler = {16, 2, 2, 1};  // the first of two sections rises, so key tiles fall
      std::map<Place, size_t> added;  // in which of its steps the tile before did
      for (Tile const& t : tiles_of(x, false)) {
        bool const falling = std::get<1>(t.steps[0].at) < group;
        for (size_t i = 0; i < t.steps.size(); ++i) {
          if (t.steps[i].waits && falling) CHECK(added.at(t.steps[i].at) < i);
          if (t.steps[i].waits && !falling) CHECK_EQ(added.at(t.steps[i].at), i);
          added[t.steps[i].at] = i;
        }
      }
    }
}

TEST_MAIN()
