// The barrier protocol of two blocks of the Hopper backward kernel that divide the queries of a
// tile, as in cpp/sm90/bwd: kernel.cuh and halves.cuh. How a block goes through its steps is that
// of one that works alone (test_backward_protocol.cpp); here a step is a look at K and V.
#include <algorithm>
#include <utility>

#include "protocol.h"

using namespace protocol;

namespace {

constexpr int kWarps = 8;

struct Halves : Machine {
  // Of one block; those of the other one follow.
  enum BarrierId { ready, free_, peer_has_room, sums_ready, met, kBarriers };
  // The room of K and V, in as many parts as there are warps, and Work. A part is where a warp gets
  // what another one has summed, and the next part holds the rows by way of which it stores.
  enum BufferId { part, work = part + kWarps, kBuffers };
  enum What { keys, sum, result, kinds };
  static int value(int tile, What what) { return tile * kinds + what; }

  // steps[t][rank]: of tile t; both may be 0.
  using Steps = std::vector<std::pair<int, int>>;

  explicit Halves(const Steps& real_steps) {
    Steps steps{{0, 0}};  // the rehearsal
    steps.insert(steps.end(), real_steps.begin(), real_steps.end());
    buffers.resize(2 * kBuffers);
    for (int block : {0, 1}) {
      for (int b = 0; b < kBarriers; ++b)
        barriers.emplace_back(kWarps);  // K and V come in as many pieces
      programs.push_back(producer(steps, block));
      for (int w = 0; w < kWarps; ++w) programs.push_back(consumer(steps, block, w));
    }
    for (int block : {0, 1}) {
      buffers[block * kBuffers + work].holds = 0;
      for (int w = 0; w < kWarps; ++w) barriers[block * kBarriers + ready].arrive();
    }
  }

  static int steps_of(const Steps& steps, int t, int block) {
    return block == 0 ? steps[t].first : steps[t].second;
  }

  static Program producer(const Steps& steps, int block) {
    Program p;
    int const last = static_cast<int>(steps.size());
    for (int t = 1; t <= last; ++t) {
      p.push_back({Op::wait, block * kBarriers + free_, -1, (t - 1) % 2 ? 1u : 0u});
      p.push_back({Op::write, -1, block * kBuffers + work, 0, t});
      bool const loads = t < last && steps_of(steps, t, block) > 0;
      for (int w = 0; w < kWarps; ++w)
        if (loads)
          p.push_back({Op::load, block * kBarriers + ready, block * kBuffers + part + w, 0,
                       value(t, keys)});
        else
          p.push_back({Op::arrive, block * kBarriers + ready});
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
      p.push_back({Op::wait, mine(ready), -1, t % 2 ? 1u : 0u});
      read(work, t);
      if (t == static_cast<int>(steps.size())) return p;
      for (int i = 0; i < steps_of(steps, t, block); ++i)
        for (int w = 0; w < kWarps; ++w) read(part + w, value(t, keys));
      if (steps[t].first + steps[t].second > 0) {
        p.push_back({Op::expect, mine(sums_ready)});
        p.push_back({Op::arrive, peers(peer_has_room)});
        p.push_back({Op::wait, mine(peer_has_room), -1, sums});
        p.push_back(
            {Op::copy, peers(sums_ready), (1 - block) * kBuffers + part + warp, 0, value(t, sum)});
        p.push_back({Op::wait, mine(sums_ready), -1, sums});
        read(part + warp, value(t, sum));
        p.push_back({Op::arrive, mine(met)});
        p.push_back({Op::wait, mine(met), -1, sums});
        sums ^= 1;
      }
      int const rows = part + (warp + 1) % kWarps;
      p.push_back({Op::write, -1, block * kBuffers + rows, 0, value(t, result)});
      read(rows, value(t, result));
      p.push_back({Op::arrive, mine(free_)});
    }
  }
};

}  // namespace

TEST("no order of events of two blocks deadlocks, overwrites or reads stale data") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 200; ++trial) {
    Halves::Steps steps(std::uniform_int_distribution<int>(1, 4)(random));
    for (auto& [first, second] : steps) {
      first = std::uniform_int_distribution<int>(0, 3)(random);
      second = std::max(0, first - static_cast<int>(random() % 2));
    }
    CHECK(Halves(steps).run(random));
  }
}

TEST("the model notices sums that are sent before the other block is done with K and V") {
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Halves machine({{3, 3}, {3, 2}});
        for (Program& program : machine.programs)
          std::erase_if(program, [](const Op& op) {
            return op.kind == Op::wait && op.barrier % Halves::kBarriers == Halves::peer_has_room;
          });
        return machine;
      },
      random));
}

TEST("the model notices a gradient that is stored where another warp's sums still are") {
  std::mt19937 random(3);
  CHECK(caught(
      [] {
        Halves machine({{3, 3}});
        for (Program& program : machine.programs)
          std::erase_if(program, [](const Op& op) {
            return op.kind == Op::wait && op.barrier % Halves::kBarriers == Halves::met;
          });
        return machine;
      },
      random));
}

TEST_MAIN()
