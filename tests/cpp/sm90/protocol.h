// Plays barrier protocols of the Hopper kernels on the CPU.
//
// Every actor (the producer, each consumer warp) is the list of operations it performs. A scheduler
// runs them in random order; copies land at random times. No order may deadlock, deliver or write
// into a buffer that is being read, or read what is not there.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

namespace protocol {

// PTX semantics of an mbarrier: wait(p) passes once the phase of parity p is over.
struct Barrier {
  int count = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int n) : count(n), pending(n) {}
  void settle() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = count;
    }
  }
  void arrive() {
    --pending;
    settle();
  }
  void expect() {
    ++bytes;
    arrive();
  }
  void deliver() {
    --bytes;
    settle();
  }
  bool over(uint32_t parity) const { return phase != parity; }
};

struct Buffer {
  int holds = -1;
  int readers = 0;
};

struct Op {
  enum Kind { wait, load, write, begin_read, end_read, arrive, expect, copy } kind;
  int barrier = -1, buffer = -1;
  uint32_t parity = 0;
  int value = -1;  // what is loaded or written, or must be found
  int from = -1;   // what a copy reads until it lands, or a register; the barrier must expect it,
                   // now or later
};
using Program = std::vector<Op>;

// One kernel launch as seen by one block.
struct Machine {
  std::vector<Barrier> barriers;
  std::vector<Buffer> buffers;
  std::vector<Program> programs;

  // Runs to the end in a random order. False if nothing can move before everybody is done.
  bool run(std::mt19937& random) {
    std::vector<size_t> at(programs.size(), 0);
    struct Copy {
      int barrier, buffer, value, from;
    };
    std::vector<Copy> in_flight;
    for (;;) {
      std::vector<int> movable;
      bool done = in_flight.empty();
      for (int a = 0; a < static_cast<int>(programs.size()); ++a) {
        if (at[a] == programs[a].size()) continue;
        done = false;
        const Op& op = programs[a][at[a]];
        if (op.kind != Op::wait || barriers[op.barrier].over(op.parity)) movable.push_back(a);
      }
      if (done) return true;
      int const choices = static_cast<int>(movable.size() + in_flight.size());
      if (choices == 0) return false;
      int const pick = std::uniform_int_distribution<int>(0, choices - 1)(random);
      if (pick >= static_cast<int>(movable.size())) {
        size_t const i = pick - movable.size();
        Copy const copy = in_flight[i];
        in_flight.erase(in_flight.begin() + static_cast<long>(i));
        CHECK_EQ(buffers[copy.buffer].readers, 0);
        buffers[copy.buffer].holds = copy.value;
        if (copy.from >= 0) --buffers[copy.from].readers;
        barriers[copy.barrier].deliver();
        continue;
      }
      const Op& op = programs[movable[pick]][at[movable[pick]]++];
      switch (op.kind) {
        case Op::wait:
          break;
        case Op::load:
          CHECK_EQ(buffers[op.buffer].readers, 0);
          barriers[op.barrier].expect();
          in_flight.push_back({op.barrier, op.buffer, op.value, -1});
          break;
        case Op::write:
          CHECK_EQ(buffers[op.buffer].readers, 0);
          buffers[op.buffer].holds = op.value;
          break;
        case Op::begin_read:
          CHECK_EQ(buffers[op.buffer].holds, op.value);
          ++buffers[op.buffer].readers;
          break;
        case Op::end_read:
          --buffers[op.buffer].readers;
          break;
        case Op::arrive:
          barriers[op.barrier].arrive();
          break;
        case Op::expect:
          barriers[op.barrier].expect();
          break;
        case Op::copy:
          if (op.from >= 0) {
            CHECK_EQ(buffers[op.from].holds, op.value);
            ++buffers[op.from].readers;
          }
          in_flight.push_back({op.barrier, op.buffer, op.value, op.from});
          break;
      }
    }
  }
};

// True if the machine has a fault that some order of events reveals: the test of the test.
template <class MakeMachine>
bool caught(MakeMachine make, std::mt19937& random) {
  int const before = check::failures;
  bool found = false;
  for (int trial = 0; trial < 200 && !found; ++trial) {
    bool const finished = make().run(random);
    found = !finished || check::failures != before;
  }
  check::failures = before;
  return found;
}

}  // namespace protocol
