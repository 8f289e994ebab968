// The barrier protocol of the Hopper backward kernel whose blocks divide keys in pairs, as in
// cpp/sm90/bwd: kernel.cuh, producer.cuh, steps_by_cluster.cuh; and dq_order.cuh, whose turns
// always come at last (test_dq_order.cpp).
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
    taken_ready,
    taken_free,
    turn,               // of the first consumer; that of the second one follows
    added = turn + 2,   // the same
    noted = added + 2,  // with block lists: the note of a step is there
    stages = noted + 2 * kStages,
    kBarriers = stages + 3 * kStages
  };
  static constexpr int q_ready(int s) { return stages + s; }
  static constexpr int dout_ready(int s) { return stages + kStages + s; }
  static constexpr int free_(int s) { return stages + 2 * kStages + s; }
  enum BufferId { k, v, peer_k, work, taken, note, tiles = note + 2 * kStages };
  static constexpr int kBuffers = tiles + 2 * kStages + 18;
  static constexpr int q(int s) { return tiles + s; }
  static constexpr int dout(int s) { return tiles + kStages + s; }
  // A warp's part of dS, in whose place its part of P lies at first; and of the other block's. The
  // kernel copies the parts as one.
  static constexpr int ds(int warp) { return tiles + 2 * kStages + warp % 4; }
  static constexpr int peer_ds(int warp) { return ds(warp) + 4; }
  // Whose turn it is, as the consumers are told; and what a warp has added to dQ.
  static constexpr int told(int consumer) { return tiles + 2 * kStages + 8 + consumer; }
  static constexpr int dq(int warp) { return told(2) + warp; }

  static int value(int tile, int step, int tensor) { return (tile * 64 + step) * 8 + tensor; }

  // In what place of its ring the note of the ring's step is.
  static int slot(const Ring<kStages>& ring, uint32_t first_lap) {
    return ring.stage + static_cast<int>(ring.parity ^ first_lap) * kStages;
  }

  // ordered: tiles are taken, and dQ is added to in a fixed order, with block lists.
  Pair(const std::vector<int>& real_steps, bool ordered) {
    std::vector<int> steps{0};  // the rehearsal
    steps.insert(steps.end(), real_steps.begin(), real_steps.end());
    for (int block = 0; block < 2; ++block)
      for (int b = 0; b < kBarriers; ++b) {
        bool const free = b == k_free || b == v_free || b >= free_(0);
        barriers.emplace_back(b == k_free && ordered                      ? kWarps + 2
                              : free                                      ? kWarps
                              : b == ds_free                              ? 2 * kWarps
                              : b == p_ready || b == met || b == ds_ready ? 4
                              : b == added || b == added + 1              ? 4
                                                                          : 1);
      }
    buffers.resize(2 * kBuffers);
    for (int block : {0, 1}) {
      buffers[block * kBuffers + work].holds = 0;
      barriers[block * kBarriers + k_ready].arrive();
    }
    for (int block = 0; block < 2; ++block) {
      programs.push_back(Producer{{block, {}}, ordered}.program(steps));
      for (int w = 0; w < kWarps; ++w)
        programs.push_back(Warp{{block, {}}, w, ordered}.program(steps));
    }
    for (int keeper = 0; ordered && keeper < 4; ++keeper)
      programs.push_back(Keeper{{keeper / 2, {}}, keeper % 2}.program(steps));
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
    bool ordered;

    // The first block tells the other one.
    void take(int t, uint32_t parity) {
      if (block == 0) {
        wait(taken_free, parity);
        out.push_back({Op::copy, kBarriers + taken_ready, kBuffers + taken, 0, t});
      } else {
        out.push_back({Op::expect, barrier(taken_ready)});
        wait(taken_ready, parity ^ 1);
        read(taken, t);
        out.push_back({Op::arrive, taken_free});
      }
    }

    Program program(const std::vector<int>& steps) {
      auto ring = Ring<kStages>::producer();
      uint32_t parity = 1;
      for (int t = 1; t < static_cast<int>(steps.size()); ++t, parity ^= 1) {
        if (ordered) take(t, parity);
        wait(k_free, parity ^ 1);
        write(work, t);
        if (steps[t] == 0) {
          wait(v_free, parity ^ 1);
          for (int b : {k_ready, v_ready, peer_k_ready}) arrive(b);
          continue;
        }
        load(k_ready, k, value(t, 0, 0));
        for (int i = 0; i < steps[t]; ++i, ring.advance()) {
          wait(free_(ring.stage), ring.parity);
          if (ordered) {
            write(note + slot(ring, 1), value(t, i, 6));
            arrive(noted + slot(ring, 1));
          }
          load(q_ready(ring.stage), q(ring.stage), value(t, i, 2));
          if (i == 0) {
            wait(v_free, parity ^ 1);
            load(v_ready, v, value(t, 0, 1));
            load(peer_k_ready, peer_k, value(t, 0, 6));
          }
          load(dout_ready(ring.stage), dout(ring.stage), value(t, i, 3));
        }
      }
      if (ordered) take(kNoWork, parity);
      wait(k_free, parity ^ 1);
      write(work, kNoWork);
      arrive(k_ready);
      return out;
    }
  };

  // Of the order, for one consumer.
  struct Keeper : Actor {
    int consumer;

    Program program(const std::vector<int>& steps) {
      uint32_t parity = 0, parity_of_step = 0;
      auto notes = Ring<2 * kStages>::consumer();
      auto see_added = [&](int t, int i) {
        wait(added + consumer, parity_of_step);
        parity_of_step ^= 1;
        for (int w = 0; w < 4; ++w) read(dq(4 * consumer + w), value(t, i, 7));
      };
      for (int t = 0;; ++t, parity ^= 1) {
        bool const last = t == static_cast<int>(steps.size());
        wait(k_ready, parity);
        begin(work, last ? kNoWork : t);
        if (last) return out;
        for (int i = 0; i < steps[t]; ++i, notes.advance()) {
          wait(noted + notes.stage, notes.parity);
          read(note + notes.stage, value(t, i, 6));
          if (i > 0) see_added(t, i - 1);
          write(told(consumer), value(t, i, 7));
          arrive(turn + consumer);
        }
        end(work);
        arrive(k_free);
        if (steps[t] > 0) see_added(t, steps[t] - 1);
      }
    }
  };

  // Products read from when they are issued until they are waited for.
  struct Warp : Actor {
    int index;
    bool ordered;
    Ring<kStages> ring = Ring<kStages>::consumer();
    uint32_t meetings = 0;

    Program program(const std::vector<int>& steps) {
      uint32_t parity = 0;
      for (int t = 0;; ++t, parity ^= 1) {
        bool const last = t == static_cast<int>(steps.size());
        wait(k_ready, parity);
        read(work, last ? kNoWork : t);
        if (last) return out;
        if (steps[t] > 0) {
          wait(peer_k_ready, parity ^ 1);  // not of the rehearsal, nor is V
          index < kWarps / 2 ? first(t, steps[t]) : second(t, steps[t], parity ^ 1);
        }
        arrive(v_free);
        arrive(k_free);
      }
    }

    void issue_s(int t, int i) {
      wait(q_ready(ring.stage), ring.parity);
      begin(q(ring.stage), value(t, i, 2));
      begin(k, value(t, 0, 0));
      if (ordered) read(note + slot(ring, 0), value(t, i, 6));
    }
    void end_s(int stage) {
      end(q(stage));
      end(k);
    }
    void issue_dp(int t, int i) {
      wait(dout_ready(ring.stage), ring.parity);
      begin(dout(ring.stage), value(t, i, 3));
      begin(v, value(t, 0, 1));
      if (ordered) read(note + slot(ring, 0), value(t, i, 6));
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

    // Adds dQ of step i of tile t.
    void add(int t, int i, uint32_t parity) {
      if (!ordered) return;
      wait(turn + index / 4, parity);
      read(told(index / 4), value(t, i, 7));
      write(dq(index), value(t, i, 7));
      arrive(added + index / 4);
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
        if (i > 0) add(t, i - 1, static_cast<uint32_t>(ring.stage));
        end(dout(stage));
        arrive(free_(stage));
        if (i + 1 < steps) end_s(ring.stage);
        issue_dq(t, i, stage);
        end_dq();
      }
      add(t, steps - 1, static_cast<uint32_t>(ring.stage ^ 1));
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
        add(t, i, static_cast<uint32_t>(stage));
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
    Pair machine(steps, trial % 2);
    CHECK(machine.run(random));
  }
}

TEST("the model notices dS that is overwritten before the other block is past it") {
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Pair machine({30}, false);
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
