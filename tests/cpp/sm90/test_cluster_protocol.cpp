// The barrier protocol of the Hopper backward kernel whose blocks work in pairs, as in
// cpp/sm90/bwd: kernel.cuh, steps_by_cluster.cuh.
#include <initializer_list>

#include "protocol.h"
#include "tile/pipeline.h"

using namespace protocol;
using flashcore::tile::Ring;

namespace {

constexpr int kStages = 2, kWarps = 8, kNoWork = -2;

struct Pair : Machine {
  // Of one block; those of the other one follow.
  enum BarrierId {
    k_ready,
    v_ready,
    peer_k_ready,
    k_free,
    v_free,
    p_ready,
    ds_ready,
    ds_free,
    met,  // the four warps of the second consumer
    stages,
    kBarriers = stages + 3 * kStages
  };
  static constexpr int q_ready(int s) { return stages + s; }
  static constexpr int dout_ready(int s) { return stages + kStages + s; }
  static constexpr int free_(int s) { return stages + 2 * kStages + s; }
  enum BufferId { k, v, peer_k, work, tiles, kBuffers = tiles + 2 * kStages + 8 };
  static constexpr int q(int s) { return tiles + s; }
  static constexpr int dout(int s) { return tiles + kStages + s; }
  // A warp's part of dS, in whose place its part of P lies at first; and of the other block's. The
  // kernel copies the parts as one.
  static constexpr int ds(int warp) { return tiles + 2 * kStages + warp % 4; }
  static constexpr int peer_ds(int warp) { return ds(warp) + 4; }

  static int value(int tile, int step, int tensor) { return (tile * 64 + step) * 8 + tensor; }

  explicit Pair(const std::vector<int>& steps) {
    for (int block = 0; block < 2; ++block)
      for (int b = 0; b < kBarriers; ++b) {
        bool const free = b == k_free || b == v_free || b >= free_(0);
        barriers.emplace_back(free                                        ? kWarps
                              : b == ds_free                              ? 2 * kWarps
                              : b == p_ready || b == met || b == ds_ready ? 4
                                                                          : 1);
      }
    buffers.resize(2 * kBuffers);
    for (int block = 0; block < 2; ++block) {
      programs.push_back(Producer{block, {}}.program(steps));
      for (int w = 0; w < kWarps; ++w) programs.push_back(Warp{block, w, {}, {}}.program(steps));
    }
  }

  // Whoever works in a block names its barriers and buffers as if there were no other.
  struct Actor {
    int block;
    Program out;

    int barrier(int b) const { return block * kBarriers + b; }
    int buffer(int b) const { return block * kBuffers + b; }
    void wait(int b, uint32_t parity) { out.push_back({Op::wait, barrier(b), -1, parity}); }
    void arrive(int b) { out.push_back({Op::arrive, barrier(b)}); }
    void arrive_in_both(int b) {
      for (int there : {0, 1}) out.push_back({Op::arrive, there * kBarriers + b});
    }
    void load(int ready, int to, int value) {
      out.push_back({Op::load, barrier(ready), buffer(to), 0, value});
    }
    void write(int to, int value) { out.push_back({Op::write, -1, buffer(to), 0, value}); }
    void begin(int of, int value) { out.push_back({Op::begin_read, -1, buffer(of), 0, value}); }
    void end(int of) { out.push_back({Op::end_read, -1, buffer(of)}); }
    void read(int of, int value) {
      begin(of, value);
      end(of);
    }
  };

  struct Producer : Actor {
    Program program(const std::vector<int>& steps) {
      auto ring = Ring<kStages>::producer();
      uint32_t parity = 1;
      for (int t = 0; t < static_cast<int>(steps.size()); ++t, parity ^= 1) {
        wait(k_free, parity);
        write(work, t);
        if (steps[t] == 0) {
          wait(v_free, parity);
          for (int b : {k_ready, v_ready, peer_k_ready}) arrive(b);
          continue;
        }
        load(k_ready, k, value(t, 0, 0));
        for (int i = 0; i < steps[t]; ++i, ring.advance()) {
          wait(free_(ring.stage), ring.parity);
          load(q_ready(ring.stage), q(ring.stage), value(t, i, 2));
          if (i == 0) {
            wait(v_free, parity);
            load(v_ready, v, value(t, 0, 1));
            load(peer_k_ready, peer_k, value(t, 0, 6));
          }
          load(dout_ready(ring.stage), dout(ring.stage), value(t, i, 3));
        }
      }
      wait(k_free, parity);
      write(work, kNoWork);
      arrive(k_ready);
      return out;
    }
  };

  // Products read from when they are issued until they are waited for.
  struct Warp : Actor {
    int index;
    Ring<kStages> ring = Ring<kStages>::consumer();
    uint32_t meetings = 0;

    Warp(int block, int index, Program, Ring<kStages>) : Actor{block, {}}, index(index) {}

    Program program(const std::vector<int>& steps) {
      uint32_t parity = 0;
      for (int t = 0;; ++t, parity ^= 1) {
        bool const last = t == static_cast<int>(steps.size());
        wait(k_ready, parity);
        read(work, last ? kNoWork : t);
        if (last) return out;
        if (steps[t] > 0) {
          wait(peer_k_ready, parity);
          index < kWarps / 2 ? first(t, steps[t]) : second(t, steps[t], parity);
        }
        arrive(v_free);
        arrive(k_free);
      }
    }

    void issue_s(int t, int i) {
      wait(q_ready(ring.stage), ring.parity);
      begin(q(ring.stage), value(t, i, 2));
      begin(k, value(t, 0, 0));
    }
    void end_s(int stage) {
      end(q(stage));
      end(k);
    }
    void issue_dp(int t, int i) {
      wait(dout_ready(ring.stage), ring.parity);
      begin(dout(ring.stage), value(t, i, 3));
      begin(v, value(t, 0, 1));
    }
    void end_dp(int stage) {
      end(dout(stage));
      end(v);
    }
    void issue_dq(int t, int i, int stage) {
      wait(ds_ready, static_cast<uint32_t>(stage));
      for (int w = 0; w < 4; ++w) {
        begin(ds(w), value(t, i, 4));
        begin(peer_ds(w), value(t, i, 4));
      }
      begin(k, value(t, 0, 0));
      begin(peer_k, value(t, 0, 6));
    }
    void end_dq() {
      for (int w = 0; w < 4; ++w) {
        end(ds(w));
        end(peer_ds(w));
      }
      end(k);
      end(peer_k);
      arrive_in_both(ds_free);
    }

    void first(int t, int steps) {
      issue_s(t, 0);
      end_s(ring.stage);
      for (int i = 0; i < steps; ++i) {
        int const stage = ring.stage;
        wait(dout_ready(stage), ring.parity);
        begin(dout(stage), value(t, i, 3));  // dV
        wait(ds_free, static_cast<uint32_t>(stage ^ 1));
        write(ds(index), value(t, i, 5));
        arrive(p_ready);
        ring.advance();
        if (i + 1 < steps) issue_s(t, i + 1);
        end(dout(stage));
        arrive(free_(stage));
        if (i + 1 < steps) end_s(ring.stage);
        issue_dq(t, i, stage);
        end_dq();
      }
    }

    void second(int t, int steps, uint32_t parity) {
      wait(v_ready, parity);
      issue_dp(t, 0);
      for (int i = 0; i < steps; ++i) {
        int const stage = ring.stage;
        wait(p_ready, static_cast<uint32_t>(stage));
        read(ds(index), value(t, i, 5));
        end_dp(stage);
        wait(q_ready(stage), ring.parity);
        begin(q(stage), value(t, i, 2));  // dK
        write(ds(index), value(t, i, 4));
        arrive(met);
        wait(met, meetings++ % 2);
        out.push_back({Op::expect, barrier(ds_ready)});
        out.push_back({Op::copy, (1 - block) * kBarriers + ds_ready,
                       (1 - block) * kBuffers + peer_ds(index), 0, value(t, i, 4),
                       buffer(ds(index))});
        issue_dq(t, i, stage);
        ring.advance();
        if (i + 1 < steps) issue_dp(t, i + 1);
        end(q(stage));
        arrive(free_(stage));
        end_dq();
      }
    }
  };
};

}  // namespace

TEST("no order of events of two blocks deadlocks, overwrites or reads stale data") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<int> steps(std::uniform_int_distribution<int>(1, 4)(random));
    for (int& n : steps) n = std::uniform_int_distribution<int>(0, 5)(random);
    Pair machine(steps);
    CHECK(machine.run(random));
  }
}

TEST("the model notices dS that is overwritten before the other block is past it") {
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Pair machine({30});
        for (Barrier& b : machine.barriers)
          if (b.count == 2 * kWarps) b = Barrier(kWarps);
        for (size_t a = 0; a < machine.programs.size(); ++a) {
          Program kept;
          int const block = static_cast<int>(a / (kWarps + 1));
          for (Op const& op : machine.programs[a])  // arrives at home alone
            if (op.kind != Op::arrive || op.barrier % Pair::kBarriers != Pair::ds_free ||
                op.barrier / Pair::kBarriers == block)
              kept.push_back(op);
          machine.programs[a] = kept;
        }
        return machine;
      },
      random));
}

TEST_MAIN()
