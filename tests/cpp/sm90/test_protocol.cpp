// The barrier protocol of one team of the Hopper forward kernel, as in cpp/sm90/fwd: kernel.cuh,
// producer.cuh.
//
// Left out: the staging area of O, whose rows are one warp's own and guarded by the copy engine's
// bulk groups, and the repair, which begins when its warp has waited for all of them.
#include "protocol.h"
#include "tile/pipeline.h"

using namespace protocol;
using flashcore::tile::Ring;

namespace {

template <int kStages, int kQStages>
struct Forward : Machine {
  int consumers;
  bool turns, finder;
  int skips;  // blocks of a tile, at most, that only the last consumer looks at

  static constexpr int q_ready(int s) { return s; }
  static constexpr int q_free(int s) { return kQStages + s; }
  static constexpr int kv(int what, int s) { return 2 * kQStages + what * kStages + s; }
  static constexpr int k_ready(int s) { return kv(0, s); }
  static constexpr int k_free(int s) { return kv(1, s); }
  static constexpr int v_ready(int s) { return kv(2, s); }
  static constexpr int v_free(int s) { return kv(3, s); }
  // A named barrier, its arrivals counted by warps: four that wait and four that pass the turn.
  static constexpr int turn(int consumer) { return kv(4, 0) + consumer; }
  // With block lists, of a thread that finds the next tile.
  int found_ready() const { return turn(consumers); }
  int found_free() const { return turn(consumers) + 1; }
  static constexpr int q_buffer(int s) { return s; }
  static constexpr int k_buffer(int s) { return kQStages + s; }
  static constexpr int v_buffer(int s) { return kQStages + kStages + s; }
  // Being read while a warp of this consumer issues products in its turn.
  static constexpr int issuing(int consumer) { return kQStages + 2 * kStages + consumer; }

  int found() const { return issuing(consumers); }

  // blocks[t]: key blocks of tile t; may be 0.
  Forward(int consumers, bool turns, int skips, const std::vector<int>& blocks, bool finder = false)
      : consumers(consumers), turns(turns), finder(finder), skips(skips) {
    int const warps = 4 * consumers;
    for (int s = 0; s < kQStages; ++s) barriers.emplace_back(1);
    for (int s = 0; s < kQStages; ++s) barriers.emplace_back(warps);
    for (int what = 0; what < 4; ++what)
      for (int s = 0; s < kStages; ++s) barriers.emplace_back(what % 2 ? warps : 1);
    for (int c = 0; c < consumers; ++c) barriers.emplace_back(8);
    for (int what = 0; what < 2; ++what) barriers.emplace_back(1);
    buffers.resize(found() + 1);
    barriers[q_ready(0)].arrive();  // the rehearsal
    programs.push_back(producer(blocks));
    if (finder) programs.push_back(finder_of(static_cast<int>(blocks.size())));
    for (int w = 0; w < warps; ++w) programs.push_back(consumer(w / 4, blocks));
  }

  // A value per (tile, block, tensor), so that a stale buffer is told from the right one.
  static int value(int tile, int block, int tensor) { return (tile * 64 + block) * 3 + tensor; }

  // The last one is that there are no more.
  Program finder_of(int tiles) const {
    Program p;
    for (int t = 0; t <= tiles; ++t) {
      p.push_back({Op::wait, found_free(), -1, t % 2 ? 0u : 1u});
      p.push_back({Op::write, -1, found(), 0, t});
      p.push_back({Op::arrive, found_ready()});
    }
    return p;
  }

  Program producer(const std::vector<int>& blocks) const {
    Program p;
    auto find = [&](int tile) {
      if (!finder) return;
      p.push_back({Op::wait, found_ready(), -1, tile % 2 ? 1u : 0u});
      p.push_back({Op::begin_read, -1, found(), 0, tile});
      p.push_back({Op::end_read, -1, found()});
      p.push_back({Op::arrive, found_free()});
    };
    auto k = Ring<kStages>::producer(), v = Ring<kStages>::producer();
    auto q = Ring<kQStages>::producer();
    q.advance();  // past the rehearsal
    auto load = [&](int free, uint32_t parity, int ready, int buffer, int value) {
      p.push_back({Op::wait, free, -1, parity});
      p.push_back({Op::load, ready, buffer, 0, value});
    };
    for (int t = 0; t < static_cast<int>(blocks.size()); ++t) {
      find(t);
      auto load_k = [&](int j) {
        load(k_free(k.stage), k.parity, k_ready(k.stage), k_buffer(k.stage), value(t, j, 1));
        k.advance();
      };
      auto load_v = [&](int j) {
        load(v_free(v.stage), v.parity, v_ready(v.stage), v_buffer(v.stage), value(t, j, 2));
        v.advance();
      };
      int j = blocks[t] - 1;
      if (blocks[t]) load_k(j);
      load(q_free(q.stage), q.parity, q_ready(q.stage), q_buffer(q.stage), value(t, 0, 0));
      q.advance();
      for (; j > 0; --j) {
        load_k(j - 1);
        load_v(j);
      }
      if (blocks[t]) load_v(j);
    }
    // The Work that ends it.
    find(static_cast<int>(blocks.size()));
    load(q_free(q.stage), q.parity, q_ready(q.stage), q_buffer(q.stage),
         value(static_cast<int>(blocks.size()), 0, 0));
    return p;
  }

  // One warp of it.
  Program consumer(int c, const std::vector<int>& blocks) const {
    Program p;
    auto k = Ring<kStages>::consumer(), v = Ring<kStages>::consumer();
    auto q = Ring<kQStages>::consumer();
    auto begin = [&](int buffer, int value) {
      p.push_back({Op::begin_read, -1, buffer, 0, value});
    };
    auto end = [&](int buffer) { p.push_back({Op::end_read, -1, buffer}); };
    auto wait = [&](int barrier, uint32_t parity) { p.push_back({Op::wait, barrier, -1, parity}); };
    auto arrive = [&](int barrier) { p.push_back({Op::arrive, barrier}); };
    uint32_t turn_parity = 0;
    int const next = (c + 1) % consumers;
    auto take_turn = [&] {
      if (!turns) return;
      arrive(turn(c));
      wait(turn(c), turn_parity);
      turn_parity ^= 1;
      p.push_back({Op::write, -1, issuing(next)});  // fails if another issues
      begin(issuing(c), -1);
    };
    auto pass_turn = [&] {
      if (!turns) return;
      end(issuing(c));
      arrive(turn(next));
    };
    if (turns && c == consumers - 1) arrive(turn(0));  // the first turn
    wait(q_ready(q.stage), q.parity);                  // the rehearsal: without keys
    arrive(q_free(q.stage));
    q.advance();
    for (int t = 0; t < static_cast<int>(blocks.size()); ++t) {
      wait(q_ready(q.stage), q.parity);
      if (blocks[t]) {
        auto qk_begin = [&](int j) {
          wait(k_ready(k.stage), k.parity);
          take_turn();
          begin(q_buffer(q.stage), value(t, 0, 0));
          begin(k_buffer(k.stage), value(t, j, 1));
        };
        auto qk_end = [&] {
          end(q_buffer(q.stage));
          end(k_buffer(k.stage));
          arrive(k_free(k.stage));
          k.advance();
        };
        auto pv_begin = [&](int j) {
          wait(v_ready(v.stage), v.parity);
          begin(v_buffer(v.stage), value(t, j, 2));
        };
        auto pv_end = [&] {
          end(v_buffer(v.stage));
          arrive(v_free(v.stage));
          v.advance();
        };
        int j = blocks[t] - 1, skipped = 0;
        for (; c < consumers - 1 && skipped < skips && j > 0; --j, ++skipped) {
          wait(k_ready(k.stage), k.parity);
          take_turn();
          pass_turn();
          arrive(k_free(k.stage));
          k.advance();
        }
        qk_begin(j);
        pass_turn();
        qk_end();
        for (; skipped > 0; --skipped) {
          wait(v_ready(v.stage), v.parity);
          arrive(v_free(v.stage));
          v.advance();
        }
        for (--j; j >= 0; --j) {
          qk_begin(j);
          pv_begin(j + 1);
          pass_turn();
          qk_end();
          pv_end();
        }
        arrive(q_free(q.stage));  // before the last product, which does not need it
        pv_begin(0);
        pv_end();
      } else {
        arrive(q_free(q.stage));
      }
      q.advance();
    }
    wait(q_ready(q.stage), q.parity);
    return p;
  }
};

template <int kStages, int kQStages>
void play(int consumers, bool turns, std::mt19937& random) {
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<int> blocks(std::uniform_int_distribution<int>(1, 6)(random));
    for (int& n : blocks) n = std::uniform_int_distribution<int>(0, 5)(random);
    Forward<kStages, kQStages> machine(consumers, turns, trial % 3, blocks, trial % 2 == 1);
    CHECK(machine.run(random));
  }
}

}  // namespace

TEST("no order of events deadlocks, overwrites or reads stale data") {
  std::mt19937 random(1);
  for (auto [consumers, turns] : {std::pair{1, false}, {2, false}, {2, true}}) {
    play<2, 1>(consumers, turns, random);
    play<2, 2>(consumers, turns, random);
    play<3, 1>(consumers, turns, random);
    play<3, 2>(consumers, turns, random);
    play<4, 2>(consumers, turns, random);
  }
}

TEST("the model notices a consumer that releases K before it has read it") {
  // Guards the test itself: the same machine with one release moved up must fail.
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Forward<2, 1> machine(1, false, 0, {5, 5});
        for (size_t a = 1; a < machine.programs.size(); ++a)
          for (size_t i = 1; i < machine.programs[a].size(); ++i) {
            Op& op = machine.programs[a][i];
            Op& earlier = machine.programs[a][i - 1];
            if (op.kind == Op::arrive && earlier.kind == Op::end_read) std::swap(op, earlier);
          }
        return machine;
      },
      random));
}

TEST("the model notices a tile that is found before the one before it was read") {
  std::mt19937 random(4);
  CHECK(caught(
      [] {
        Forward<2, 1> machine(1, false, 0, {3, 2, 1}, true);
        std::erase_if(machine.programs[1], [](const Op& op) { return op.kind == Op::wait; });
        return machine;
      },
      random));
}

TEST("the model notices a turn that nobody begins, and products issued out of turn") {
  std::mt19937 random(3);
  using Turns = Forward<2, 2>;
  CHECK(caught(
      [] {
        Turns machine(2, true, 0, {3, 2});
        for (auto& program : machine.programs)
          if (program[0].barrier >= Turns::turn(0)) program.erase(program.begin());
        return machine;
      },
      random));
  CHECK(caught(
      [] {
        Turns machine(2, true, 0, {3, 2});
        for (auto& program : machine.programs)
          std::erase_if(program, [](const Op& op) {
            return op.kind == Op::wait && op.barrier >= Turns::turn(0);
          });
        return machine;
      },
      random));
}

TEST_MAIN()
