// The barrier protocol of two blocks of the Hopper backward kernel that divide the queries of a
// tile, as in cpp/sm90/bwd: kernel.cuh, producer.cuh, halves.cuh. How a block goes through its
// steps is that of one that works alone (test_backward_protocol.cpp); here all steps of a tile are
// one look at its Q and dO.
#include <algorithm>
#include <utility>

#include "protocol.h"

using namespace protocol;

namespace {

constexpr int kWarps = 8;

struct Halves : Machine {
  // Of one block; those of the other one follow.
  enum BarrierId { k_ready, q_ready, k_free, v_free, peer_has_room, sums_ready, kBarriers };
  // K; Q and dO, in as many parts as there are warps: in its part a warp gets what another one has
  // summed; the warps' rows of V; Work.
  enum BufferId { k, queries, v = queries + kWarps, work = v + kWarps, kBuffers };
  enum What { input, sum, result, kinds };
  static int value(int tile, What what) { return tile * kinds + what; }

  // steps[t]: of tile t, whether the first and the second block have any.
  using Steps = std::vector<std::pair<bool, bool>>;

  explicit Halves(const Steps& real_steps) {
    Steps steps{{false, false}};  // the rehearsal
    steps.insert(steps.end(), real_steps.begin(), real_steps.end());
    buffers.resize(2 * kBuffers);
    for (int block : {0, 1}) {
      for (int b = 0; b < kBarriers; ++b) barriers.emplace_back(b == k_ready ? 1 : kWarps);
      programs.push_back(producer(steps, block));
      for (int w = 0; w < kWarps; ++w) programs.push_back(consumer(steps, block, w));
    }
    for (int block : {0, 1}) {
      buffers[block * kBuffers + work].holds = 0;
      barriers[block * kBarriers + k_ready].arrive();
    }
  }

  static bool has_steps(const Steps& steps, int t, int block) {
    return block == 0 ? steps[t].first : steps[t].second;
  }
  static uint32_t parity(int t) { return t % 2 ? 1u : 0u; }

  static Program producer(const Steps& steps, int block) {
    Program p;
    auto const barrier = [&](int b) { return block * kBarriers + b; };
    auto const buffer = [&](int b) { return block * kBuffers + b; };
    int const last = static_cast<int>(steps.size());
    for (int t = 1; t <= last; ++t) {
      p.push_back({Op::wait, barrier(k_free), -1, parity(t - 1)});
      p.push_back({Op::write, -1, buffer(work), 0, t});
      if (t == last || !has_steps(steps, t, block)) {
        if (t < last) p.push_back({Op::wait, barrier(v_free), -1, parity(t - 1)});
        p.push_back({Op::arrive, barrier(k_ready)});
        for (int w = 0; w < kWarps; ++w) p.push_back({Op::arrive, barrier(q_ready)});
        continue;
      }
      p.push_back({Op::load, barrier(k_ready), buffer(k), 0, value(t, input)});
      for (int w = 0; w < kWarps; ++w) {  // Q and dO; V comes with them
        if (w == 1) p.push_back({Op::wait, barrier(v_free), -1, parity(t - 1)});
        p.push_back({Op::load, barrier(q_ready), buffer(queries + w), 0, value(t, input)});
      }
    }
    return p;
  }

  static Program consumer(const Steps& steps, int block, int warp) {
    Program p;
    auto const mine = [&](int b) { return block * kBarriers + b; };
    auto const peers = [&](int b) { return (1 - block) * kBarriers + b; };
    auto const read = [&](int buffer, int x) {
      p.push_back({Op::begin_read, -1, block * kBuffers + buffer, 0, x});
      p.push_back({Op::end_read, -1, block * kBuffers + buffer});
    };
    uint32_t sums = 0;
    for (int t = 0;; ++t) {
      p.push_back({Op::wait, mine(k_ready), -1, parity(t)});
      read(work, t);
      if (t == static_cast<int>(steps.size())) return p;
      bool const has = has_steps(steps, t, block), shared = steps[t].first || steps[t].second;
      if (has) {
        p.push_back({Op::wait, mine(q_ready), -1, parity(t - 1)});
        for (int w = 0; w < kWarps; ++w) read(queries + w, value(t, input));
      }
      if (shared) {
        p.push_back({Op::expect, mine(sums_ready)});
        p.push_back({Op::arrive, peers(peer_has_room)});
      }
      if (has) read(k, value(t, input));  // dQ of the last step
      read(work, t);
      if (!shared) p.push_back({Op::arrive, mine(k_free)});
      if (shared) {
        p.push_back({Op::wait, mine(peer_has_room), -1, sums});
        p.push_back({Op::copy, peers(sums_ready), (1 - block) * kBuffers + queries + warp, 0,
                     value(t, sum)});
        p.push_back({Op::wait, mine(sums_ready), -1, sums});
        read(queries + warp, value(t, sum));
        sums ^= 1;
      }
      p.push_back({Op::write, -1, block * kBuffers + v + warp, 0, value(t, result)});
      if (shared) p.push_back({Op::arrive, mine(k_free)});
      read(v + warp, value(t, result));
      p.push_back({Op::arrive, mine(v_free)});
    }
  }
};

}  // namespace

TEST("no order of events of two blocks deadlocks, overwrites or reads stale data") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    Halves::Steps steps(std::uniform_int_distribution<int>(1, 4)(random));
    for (auto& [first, second] : steps) {
      first = random() % 4 > 0;
      second = first && random() % 4 > 0;
    }
    CHECK(Halves(steps).run(random));
  }
}

TEST("the model notices sums that are sent before the other block is done with Q and dO") {
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Halves machine({{true, true}, {true, false}});
        for (Program& program : machine.programs)
          std::erase_if(program, [](const Op& op) {
            return op.kind == Op::wait && op.barrier % Halves::kBarriers == Halves::peer_has_room;
          });
        return machine;
      },
      random));
}

TEST("the model notices Q that is fetched where sums still are") {
  std::mt19937 random(3);
  CHECK(caught(
      [] {
        Halves machine({{true, true}, {true, true}});
        for (Program& program : machine.programs)  // K is released before they are waited for
          for (size_t i = 1; i < program.size(); ++i)
            if (program[i].kind == Op::arrive &&
                program[i].barrier % Halves::kBarriers == Halves::k_free && i > 8)
              for (size_t j = i; j > i - 5; --j) std::swap(program[j], program[j - 1]);
        return machine;
      },
      random));
}

TEST_MAIN()
