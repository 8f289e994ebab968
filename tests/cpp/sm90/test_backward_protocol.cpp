// The barrier protocol of the Hopper backward kernels that work alone, as in cpp/sm90/bwd:
// kernel.cuh, producer.cuh, steps_by_keys.cuh, steps_by_gradient.cuh; and dq_order.cuh, whose turns
// always come at last (test_dq_order.cpp).
#include <initializer_list>

#include "protocol.h"
#include "tile/pipeline.h"

using namespace protocol;
using flashcore::tile::Ring;

namespace {

constexpr int kWarps = 8;
enum class Steps { by_keys, by_gradient };
// What there is besides: an order in which dQ is added; block lists, and a thread that finds the
// next tile.
struct With {
  bool turns = false, lists = false;
};
constexpr int kNoWork = -2;

template <int kStages>
struct Backward : Machine {
  enum BarrierId {
    k_ready,  // two each, of which kernels that do not divide keys have one
    k_free = 2,
    v_ready = 4,
    v_free,
    met,
    head_start,
    ds_ready,
    ds_free = 10,
    next_ready = 12,
    next_free,
    stages
  };
  static constexpr int q_ready(int s) { return stages + s; }
  static constexpr int dout_ready(int s) { return stages + kStages + s; }
  static constexpr int free_(int s) { return stages + 2 * kStages + s; }
  static constexpr int turn(int consumer) { return stages + 3 * kStages + consumer; }
  static constexpr int added(int consumer) { return turn(2) + consumer; }
  static constexpr int noted(int slot) { return added(2) + slot; }
  enum BufferId { k, work = 2, v = 4, tiles = v + kWarps };
  // A warp's rows of V, by way of which it stores its gradients where keys are divided.
  static constexpr int v_rows(int warp) { return v + warp; }
  static constexpr int q(int s) { return tiles + s; }
  static constexpr int dout(int s) { return tiles + kStages + s; }
  // A warp's part of one of the two buffers of dS, or of P.
  static constexpr int ds(int buffer, int warp) {
    return tiles + 2 * kStages + buffer * kWarps + warp;
  }
  static constexpr int p(int buffer, int warp) { return ds(2 + buffer, warp); }
  // Whose turn it is, as the consumers are told; and what a warp has added to dQ.
  static constexpr int told(int consumer) { return ds(4, 0) + 2 * kStages + consumer; }
  static constexpr int dq(int warp) { return told(2) + warp; }

  // With block lists, of the step whose Q is in the ring's stage, or of one before it.
  static int slot_of(const Ring<kStages>& ring, uint32_t first_lap, int before = 0) {
    int const slot = ring.stage + static_cast<int>(ring.parity ^ first_lap) * kStages - before;
    return slot + (slot < 0 ? 2 * kStages : 0);
  }
  static int note(int slot) { return ds(4, 0) + slot; }
  static int note(const Ring<kStages>& ring, uint32_t first_lap, int before = 0) {
    return note(slot_of(ring, first_lap, before));
  }

  // And the tile that is found for the producer.
  static constexpr int next() { return dq(kWarps); }

  static int value(int tile, int step, int tensor) { return (tile * 64 + step) * 8 + tensor; }

  // Of all tiles: which consumer sees nothing of the first step, and of the last; -1: both see
  // some.
  struct Passed {
    int first = -1, last = -1;
  };

  // real_steps[t]: steps of tile t; may be 0. tiles_of_k: whose K is there; by gradient one.
  Backward(Steps kind, std::vector<int> const& real_steps, With with, int tiles_of_k = 1,
           Passed passed = {}, bool short_head_start = false) {
    std::vector<int> steps{0};  // the rehearsal
    steps.insert(steps.end(), real_steps.begin(), real_steps.end());
    bool const ordered = with.turns, lists = with.lists;
    for (int b = 0; b < noted(2 * kStages); ++b) {
      bool const of_k_free = b == k_free || b == k_free + 1;
      bool const ready = b == k_ready || b == k_ready + 1 || b == next_ready || b == next_free ||
                         (b >= stages && b < free_(0)) || (b >= turn(0) && b < turn(2)) ||
                         b >= noted(0);
      bool const of_one = b == head_start || b >= added(0);
      barriers.emplace_back(ready                  ? 1
                            : of_one               ? kWarps / 2
                            : of_k_free && ordered ? kWarps + 2
                                                   : kWarps);  // V comes in as many pieces
    }
    buffers.resize(next() + 1);
    rehearse();
    programs.push_back(producer(steps, with, tiles_of_k));
    for (int w = 0; w < kWarps; ++w)
      programs.push_back(
          Warp{kind, w, ordered, tiles_of_k, passed, short_head_start}.program(steps));
    if (ordered)
      for (int consumer : {0, 1}) programs.push_back(keeper(steps, consumer, tiles_of_k, lists));
    if (lists) programs.push_back(finder(static_cast<int>(steps.size())));
  }

  // The place of tile t's K and Work, and the parity with which consumers wait for it.
  struct Slot {
    int index;
    uint32_t parity;
    Slot(int t, int slots) : index(t % slots), parity(t / slots % 2) {}
  };

  // Of the order, for one consumer. A step's turn is looked for while the one before is under way.
  static Program keeper(const std::vector<int>& steps, int consumer, int slots, bool lists) {
    Program program;
    uint32_t parity_of_step = 0;
    auto notes = Ring<2 * kStages>::consumer();
    auto read = [&](int buffer, int value) {
      program.push_back({Op::begin_read, -1, buffer, 0, value});
      program.push_back({Op::end_read, -1, buffer});
    };
    auto see_added = [&](int t, int i) {
      program.push_back({Op::wait, added(consumer), -1, parity_of_step});
      parity_of_step ^= 1;
      for (int w = 0; w < kWarps / 2; ++w) read(dq(consumer * kWarps / 2 + w), value(t, i, 7));
    };
    for (int t = 0;; ++t) {
      bool const last = t == static_cast<int>(steps.size());
      Slot const slot(t, slots);
      program.push_back({Op::wait, k_ready + slot.index, -1, slot.parity});
      program.push_back({Op::begin_read, -1, work + slot.index, 0, last ? kNoWork : t});
      if (last) return program;
      for (int i = 0; i < steps[t]; ++i) {
        if (lists) {
          program.push_back({Op::wait, noted(notes.stage), -1, notes.parity});
          read(note(notes.stage), value(t, i, 6));
          notes.advance();
        }
        if (i > 0) see_added(t, i - 1);
        program.push_back({Op::write, -1, told(consumer), 0, value(t, i, 7)});
        program.push_back({Op::arrive, turn(consumer)});
      }
      program.push_back({Op::end_read, -1, work + slot.index});
      program.push_back({Op::arrive, k_free + slot.index});
      if (steps[t] > 0) see_added(t, steps[t] - 1);
    }
  }

  void rehearse() {
    buffers[work].holds = 0;
    barriers[k_ready].arrive();
  }

  // The last one is that there are no more.
  static Program finder(int tiles) {
    Program program;
    for (int t = 1; t <= tiles; ++t) {
      program.push_back({Op::wait, next_free, -1, t % 2 ? 1u : 0u});
      program.push_back({Op::write, -1, next(), 0, t});
      program.push_back({Op::arrive, next_ready});
    }
    return program;
  }

  static Program producer(const std::vector<int>& steps, With with, int slots) {
    Program program;
    bool const lists = with.lists;
    auto wait = [&](int barrier, uint32_t parity) {
      program.push_back({Op::wait, barrier, -1, parity});
    };
    auto load = [&](int ready, int buffer, int value) {
      program.push_back({Op::load, ready, buffer, 0, value});
    };
    auto ring = Ring<kStages>::producer();
    uint32_t parity = 1;
    auto begin_next = [&](int tile) {
      Slot const slot(tile, slots);
      if (lists) wait(next_ready, parity ^ 1);
      wait(k_free + slot.index, slot.parity ^ 1);
      if (lists) program.push_back({Op::begin_read, -1, next(), 0, tile});
    };
    auto end_next = [&] {
      if (!lists) return;
      program.push_back({Op::end_read, -1, next()});
      program.push_back({Op::arrive, next_free});
    };
    for (int t = 1; t < static_cast<int>(steps.size()); ++t, parity ^= 1) {
      begin_next(t);
      int const slot = t % slots;
      program.push_back({Op::write, -1, work + slot, 0, t});
      if (steps[t] == 0) {
        end_next();
        wait(v_free, parity ^ 1);
        program.push_back({Op::arrive, k_ready + slot});
        for (int w = 0; w < kWarps; ++w) program.push_back({Op::arrive, v_ready});
        continue;
      }
      load(k_ready + slot, k + slot, value(t, 0, 0));
      end_next();
      for (int i = 0; i < steps[t]; ++i) {
        wait(free_(ring.stage), ring.parity);
        program.push_back({Op::write, -1, note(ring, 1), 0, value(t, i, 6)});
        if (lists && with.turns) program.push_back({Op::arrive, noted(slot_of(ring, 1))});
        load(q_ready(ring.stage), q(ring.stage), value(t, i, 2));
        if (i == 0) {
          wait(v_free, parity ^ 1);
          for (int w = 0; w < kWarps; ++w) load(v_ready, v_rows(w), value(t, 0, 1));
        }
        load(dout_ready(ring.stage), dout(ring.stage), value(t, i, 3));
        ring.advance();
      }
    }
    int const end = static_cast<int>(steps.size()), slot = end % slots;
    begin_next(end);
    program.push_back({Op::write, -1, work + slot, 0, kNoWork});
    program.push_back({Op::arrive, k_ready + slot});
    return program;
  }

  struct Read {
    int buffer, value;
  };

  // A consumer warp. Products read from when they are issued until they are waited for.
  struct Warp {
    Steps kind;
    int index;
    bool ordered;
    int slots;  // tiles whose K is there
    Passed passed;
    bool short_head_start;
    Program out{};
    Ring<kStages> ring = Ring<kStages>::consumer();
    Ring<2> parts = Ring<2>::consumer();  // the buffer of dS that is written next
    uint32_t meetings = 0, tiles_begun = 0;

    void wait(int barrier, uint32_t parity) { out.push_back({Op::wait, barrier, -1, parity}); }
    void arrive(int barrier) { out.push_back({Op::arrive, barrier}); }
    void begin(const std::vector<Read>& reads) {
      for (Read const& r : reads) out.push_back({Op::begin_read, -1, r.buffer, 0, r.value});
    }
    void end(const std::vector<Read>& reads) {
      for (Read const& r : reads) out.push_back({Op::end_read, -1, r.buffer});
    }
    void read(int buffer, int value) {
      begin({{buffer, value}});
      end({{buffer, value}});
    }
    void write(int buffer, int value) { out.push_back({Op::write, -1, buffer, 0, value}); }
    // Adds dQ of step i of tile t.
    void add(int t, int i, uint32_t parity) {
      int const consumer = index / (kWarps / 2);
      if (!ordered) return;
      wait(turn(consumer), parity);
      read(told(consumer), value(t, i, 7));
      write(dq(index), value(t, i, 7));
      arrive(added(consumer));
    }
    void meet() {
      arrive(met);
      wait(met, meetings++ % 2);
    }
    static std::vector<Read> all(int (*part)(int, int), int buffer, int value) {
      std::vector<Read> reads;
      for (int w = 0; w < kWarps; ++w) reads.push_back({part(buffer, w), value});
      return reads;
    }
    static std::vector<Read> join(std::initializer_list<std::vector<Read>> lists) {
      std::vector<Read> all;
      for (auto const& list : lists) all.insert(all.end(), list.begin(), list.end());
      return all;
    }

    Program program(const std::vector<int>& steps) {
      uint32_t parity = 1;  // of V, which the rehearsal does not have
      for (int t = 0;; ++t, parity ^= 1) {
        bool const last = t == static_cast<int>(steps.size());
        Slot const slot(t, slots);
        wait(k_ready + slot.index, slot.parity);
        read(work + slot.index, last ? kNoWork : t);
        if (last) return out;
        if (kind == Steps::by_keys) {
          if (steps[t] > 0) steps_by_keys(t, steps[t], parity);
          bool const dk_by_way_of_v = slots == 1;
          auto dv_has_left = [&] { end({{v_rows(index), value(t, 0, 5)}}); };
          store(t, 5);
          if (!dk_by_way_of_v) {
            dv_has_left();
            arrive(v_free);
          }
          if (steps[t] > 0) last_dq(t, steps[t]);
          read(work + slot.index, t);
          arrive(k_free + slot.index);
          if (dk_by_way_of_v) {
            dv_has_left();
            store(t, 7);  // dK
            end({{v_rows(index), value(t, 0, 7)}});
            arrive(v_free);
          }
          continue;
        }
        if (steps[t] == 0)
          arrive(v_free);
        else
          steps_with_shared_scores(t, steps[t], parity);
        arrive(k_free);
      }
    }
    // The copy engine reads the warp's rows from now on.
    void store(int t, int tensor) {
      write(v_rows(index), value(t, 0, tensor));
      begin({{v_rows(index), value(t, 0, tensor)}});
    }
    std::vector<Read> own_v(int t) const { return {{v_rows(index), value(t, 0, 1)}}; }
    void wait_ds() {
      wait(ds_ready + (parts.stage ^ 1), parts.stage == 0 ? parts.parity ^ 1 : parts.parity);
    }
    std::vector<Read> dq_of(int t, int i) const {
      return join({{{k + t % slots, value(t, 0, 0)}}, all(ds, parts.stage ^ 1, value(t, i, 4))});
    }
    // The steps of a tile that this consumer takes: all but those it passes over; one at least.
    int first_step(int steps) const { return steps > 1 && passed.first == index / (kWarps / 2); }
    int steps_end(int steps) const {
      bool const all = passed.last != index / (kWarps / 2) || first_step(steps) + 1 == steps;
      return all ? steps : steps - 1;
    }
    void pass_over(int t, int i) {
      int const stage = ring.stage;
      wait(q_ready(stage), ring.parity);
      wait(dout_ready(stage), ring.parity);
      wait(ds_free + parts.stage, parts.parity ^ 1);
      write(ds(parts.stage, index), value(t, i, 4));
      arrive(ds_ready + parts.stage);
      parts.advance();
      ring.advance();
      arrive(free_(stage));
    }
    void last_dq(int t, int steps) {
      for (int i = steps_end(steps) - 1; i < steps; ++i) {
        wait_ds();
        auto const dq = dq_of(t, i);
        begin(dq);
        end(dq);
        arrive(ds_free + (parts.stage ^ 1));
        add(t, i, static_cast<uint32_t>(parts.stage ^ 1));
        if (i + 1 < steps) pass_over(t, i + 1);
      }
    }

    void steps_by_keys(int t, int steps, uint32_t parity) {
      std::vector<Read> const sK{{k + t % slots, value(t, 0, 0)}}, sV = own_v(t);
      auto sQ = [&](int i) { return std::vector<Read>{{q(ring.stage), value(t, i, 2)}}; };
      auto sdO = [&](int i) { return std::vector<Read>{{dout(ring.stage), value(t, i, 3)}}; };
      auto score = [&](int i) {
        wait(q_ready(ring.stage), ring.parity);
        auto const reads = join({sK, sQ(i)});
        begin(reads);
        return reads;
      };
      bool const ahead = index < kWarps / 2;
      if (!ahead) wait(head_start, tiles_begun % 2);
      ++tiles_begun;
      int const begun = first_step(steps), end_of_steps = steps_end(steps);
      if (begun > 0) pass_over(t, 0);
      auto const first_score = score(begun);
      if (ahead && (begun > 0 || short_head_start)) arrive(head_start);
      end(first_score);
      wait(dout_ready(ring.stage), ring.parity);
      wait(v_ready, parity);
      for (int i = begun; i < end_of_steps; ++i) {
        bool const first = i == 0, next = i + 1 < end_of_steps;
        int const stage = ring.stage;
        auto const dp = join({sV, sdO(i)}), dv = sdO(i), dk = sQ(i);
        begin(dp);
        begin(dv);
        if (first && ahead && !short_head_start) arrive(head_start);
        end(dp);
        begin(dk);
        wait(ds_free + parts.stage, parts.parity ^ 1);
        write(ds(parts.stage, index), value(t, i, 4));
        arrive(ds_ready + parts.stage);
        std::vector<Read> dq;
        if (!first) {
          wait_ds();
          begin(dq = dq_of(t, i - 1));
        }
        end(dv);
        end(dk);
        parts.advance();
        ring.advance();
        arrive(free_(stage));
        std::vector<Read> s;
        if (next) s = score(i + 1);
        if (!first) read(note(ring, 0, 2), value(t, i - 1, 6));
        if (next) read(note(ring, 0), value(t, i + 1, 6));
        if (!first) {
          end(dq);
          arrive(ds_free + parts.stage);
          add(t, i - 1, static_cast<uint32_t>(parts.stage));
        }
        if (next) {
          wait(dout_ready(ring.stage), ring.parity);
          end(s);
        }
      }
    }

    void steps_with_shared_scores(int t, int steps, uint32_t parity) {
      std::vector<Read> const sK{{k, value(t, 0, 0)}}, sV = own_v(t);
      std::vector<Read> s, dp;
      auto issue_s = [&](int i) {
        wait(q_ready(ring.stage), ring.parity);
        begin(s = join({sK, {{q(ring.stage), value(t, i, 2)}}}));
      };
      auto issue_dp = [&](int i) {
        wait(dout_ready(ring.stage), ring.parity);
        begin(dp = join({sV, {{dout(ring.stage), value(t, i, 3)}}}));
      };
      auto make = [&](int i) {
        end(s);
        write(p(i % 2, index), value(t, i, 5));
        end(dp);
        write(ds(i % 2, index), value(t, i, 4));
      };
      issue_s(0);
      wait(v_ready, parity);
      issue_dp(0);
      make(0);
      meet();
      for (int i = 0; i < steps; ++i) {
        int const stage = ring.stage, buffer = i % 2;
        uint32_t const parity_of_step = ring.parity ^ (stage & 1);
        bool const has_dv = index < kWarps / 2;
        std::vector<Read> products = join({all(ds, buffer, value(t, i, 4)), sK});  // dQ, left
        if (has_dv)
          products =
              join({products, {{dout(stage), value(t, i, 3)}}, all(p, buffer, value(t, i, 5))});
        if (!has_dv) products = join({products, {{q(stage), value(t, i, 2)}}});
        auto const right = join({all(ds, buffer, value(t, i, 4)), sK});
        ring.advance();
        if (i + 1 < steps) {
          issue_s(i + 1);
          read(note(ring, 0), value(t, i + 1, 6));
          issue_dp(i + 1);
        }
        begin(products);
        if (i + 1 < steps) make(i + 1);
        if (has_dv) begin(right);  // of dQ

        end(products);
        arrive(free_(stage));
        if (has_dv) end(right);
        meet();
        add(t, i, parity_of_step);
      }
      arrive(v_free);
    }
  };
};

template <int kStages>
void play(Steps kind, std::mt19937& random) {
  for (int trial = 0; trial < 160; ++trial) {
    std::vector<int> steps(std::uniform_int_distribution<int>(1, 5)(random));
    for (int& n : steps) n = std::uniform_int_distribution<int>(0, 5)(random);
    bool const can = kind == Steps::by_keys || kStages == 3;
    With const with{trial % 2 == 1 && can, trial / 2 % 2 == 1};
    int const tiles_of_k = kind == Steps::by_keys ? 1 + trial / 4 % 2 : 1;
    auto const consumer = [&] { return std::uniform_int_distribution<int>(-1, 1)(random); };
    bool const passes = kind == Steps::by_keys && !with.lists;
    typename Backward<kStages>::Passed passed;
    if (passes) passed = {consumer(), consumer()};
    Backward<kStages> machine(kind, steps, with, tiles_of_k, passed, random() % 2);
    CHECK(machine.run(random));
  }
}

}  // namespace

TEST("no order of events deadlocks, overwrites or reads stale data") {
  std::mt19937 random(1);
  for (Steps kind : {Steps::by_keys, Steps::by_gradient}) {
    play<2>(kind, random);
    play<3>(kind, random);
  }
}

TEST("the model notices a buffer of dS that is overwritten too early") {
  std::mt19937 random(2);
  CHECK(caught(
      [] {
        Backward<2> machine(Steps::by_keys, {5}, With{});
        for (Program& program : machine.programs)
          for (Op& op : program)  // waits for a phase that is always over
            if (op.kind == Op::wait && op.barrier >= Backward<2>::ds_free &&
                op.barrier < Backward<2>::next_ready)
              op = {Op::wait, Backward<2>::met, -1, 1};
        return machine;
      },
      random));
  CHECK(caught(
      [] {
        Backward<2> machine(Steps::by_gradient, {5}, With{});
        for (Program& program : machine.programs)
          for (Op& op : program)
            if (op.buffer >= Backward<2>::ds(1, 0) && op.buffer < Backward<2>::ds(2, 0))
              op.buffer -= kWarps;
        return machine;
      },
      random));
}

TEST("the model notices V that is fetched while a gradient is still on its way through its rows") {
  std::mt19937 random(4);
  for (int tiles_of_k : {1, 2})
    CHECK(caught(
        [=] {
          Backward<2> machine(Steps::by_keys, {2, 2}, With{}, tiles_of_k);
          for (size_t a = 1; a < machine.programs.size(); ++a)
            for (size_t i = 1; i < machine.programs[a].size(); ++i) {
              Op& op = machine.programs[a][i];
              Op& earlier = machine.programs[a][i - 1];
              if (op.kind == Op::arrive && op.barrier == Backward<2>::v_free)
                std::swap(op, earlier);
            }
          return machine;
        },
        random));
}

TEST("the model notices a consumer that passes over the first step and lets nobody begin") {
  std::mt19937 random(5);
  CHECK(caught(
      [] {
        Backward<2> machine(Steps::by_keys, {3}, With{}, 1, {0, -1});
        for (Program& program : machine.programs)
          std::erase_if(program, [](Op const& op) {
            return op.kind == Op::arrive && op.barrier == Backward<2>::head_start;
          });
        return machine;
      },
      random));
}

TEST("the model notices notes that are read before they are there") {
  std::mt19937 random(7);
  CHECK(caught(
      [] {
        Backward<2> machine(Steps::by_keys, {5}, With{true, true});
        for (Program& program : machine.programs)
          std::erase_if(program, [](Op const& op) {
            return op.kind == Op::wait && op.barrier >= Backward<2>::noted(0);
          });
        return machine;
      },
      random));
}

TEST("the model notices a stage released before dK has read it") {
  std::mt19937 random(3);
  CHECK(caught(
      [] {
        Backward<2> machine(Steps::by_keys, {6}, With{});
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

TEST_MAIN()
