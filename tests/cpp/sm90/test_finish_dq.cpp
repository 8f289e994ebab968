// Who stores dQ of a head where all its tiles are at work at once, as in
// cpp/sm90/bwd/finish_dq.cuh: the blocks that run at the same time may be few, and leave when they
// have waited long enough.
#include <algorithm>
#include <random>
#include <vector>

#include "check.h"

namespace {

// One consumer of every block of a head, and the thread that takes query blocks for it.
struct Head {
  int all, blocks, share, patience;
  bool asks = true;  // whether the others are there
  int arrived = 0, taken = 0;
  std::vector<int> stored;
  bool early = false;  // something was stored before all sums were there

  struct Block {
    enum { adding, asking, taking, handing, ahead, waiting, done } taker = adding;
    bool added = false, handed = false, left = false;  // left: the consumer is done for good
    int asked = 0, first = 0, next = 0;
  };
  std::vector<Block> running;

  Head(int all, int blocks, int patience)
      : all(all),
        blocks(blocks),
        share((blocks + all - 1) / all),
        patience(patience),
        stored(blocks, 0) {}

  int take() {
    int const first = taken;
    taken += share;
    return first;
  }

  void move_taker(Block& b) {
    switch (b.taker) {
      case Block::adding:
        if (!b.added) return;
        ++arrived;
        b.taker = Block::asking;
        break;
      case Block::asking:
        if (arrived == all || !asks) {
          b.taker = Block::taking;
        } else if (++b.asked == patience) {
          b.first = blocks;
          b.taker = Block::handing;
        }
        break;
      case Block::taking:
        b.first = take();
        b.taker = Block::handing;
        break;
      case Block::handing:
        b.handed = true;
        b.taker = b.first >= blocks ? Block::done : Block::ahead;
        break;
      case Block::ahead:
        b.next = take();
        b.taker = Block::waiting;
        break;
      case Block::waiting:
        if (b.handed) return;
        b.first = b.next;
        b.taker = Block::handing;
        break;
      case Block::done:
        break;
    }
  }

  void move_consumer(Block& b) {
    if (!b.added) {
      b.added = true;
    } else if (b.handed && !b.left) {
      if (b.first >= blocks) {
        b.left = true;
        return;
      }
      early |= arrived < all;
      for (int i = b.first; i < std::min(b.first + share, blocks); ++i) ++stored[i];
      b.handed = false;
    }
  }

  // With so many blocks at a time. False: it does not come to an end.
  bool run(int resident, std::mt19937& random) {
    int begun = 0;
    for (int moves = 0; moves < 100000; ++moves) {
      std::erase_if(running, [](const Block& b) { return b.left; });
      while (begun < all && static_cast<int>(running.size()) < resident) {
        running.emplace_back();
        ++begun;
      }
      if (running.empty()) return true;
      Block& b = running[random() % running.size()];
      if (random() % 2)
        move_taker(b);
      else
        move_consumer(b);
    }
    return false;
  }
};

}  // namespace

TEST("dQ of every query block is stored once, when all sums are there, whoever leaves") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    int const all = 1 + static_cast<int>(random() % 9), blocks = static_cast<int>(random() % 33);
    Head head(all, blocks, 1 + static_cast<int>(random() % 40));
    CHECK(head.run(1 + static_cast<int>(random() % all), random));
    CHECK(!head.early);
    for (int times : head.stored) CHECK_EQ(times, 1);
  }
}

TEST("the model notices dQ that is stored before all sums are there") {
  std::mt19937 random(2);
  bool early = false;
  for (int trial = 0; trial < 20; ++trial) {
    Head head(4, 16, 5);
    head.asks = false;
    head.run(4, random);
    early |= head.early;
  }
  CHECK(early);
}

TEST_MAIN()
