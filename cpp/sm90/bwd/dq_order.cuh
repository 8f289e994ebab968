// dQ added to in a fixed order, for the same bits every time.
//
// Each part of a query block's dQ, which one consumer adds, has a turn in memory: the key tile that
// adds to it next. A warp beside the producer waits for it there and tells its consumer through
// shared memory; when the consumer has added, it passes the turn on. So consumers know nothing of
// memory, and what one step waits for the others do not.
//
// The order is that in which tiles are taken. So the earliest tile that is not done waits for
// nobody, and no launch can hang, however few of its blocks run at the same time. Laps are dealt
// out instead, and all blocks run at once: the earliest one that is not done waits for none else.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/ptx/memory.cuh"

namespace flashcore::sm90::bwd {

// Of one consumer: which step it may add, and which it has. The warp has few registers: what is in
// shared memory is read there.
template <class T>
class Turns {
  static constexpr int kParts = T::kConsumers * (T::kByCluster ? T::kCluster : 1);

 public:
  FC_DEVICE Turns(const BwdParams& p, typename T::Shared& sh, int consumer, int rank)
      : p_(p), sh_(sh), consumer_(consumer), part_(T::dq_part(consumer, rank)) {}

  // The next step of a tile, to query block m of a head. waits: the tile is not the first one to
  // add to it. next: the one that does after it. While the step before is under way its turn is
  // looked for: if it is there, the consumer goes on at once, and the others are told afterwards.
  // Looked for once, or passing on would wait for the answers.
  FC_DEVICE void step(const Work& work, int head, int m, bool waits, int next) {
    int const block = head * p_.head_blocks + work.stats + m;
    int const tile = work.key / T::kBlockN;
    bool known = !waits || load_acquire(turn(block)) == tile;
    bool const under_way = last_ >= 0, early = under_way && known;
    if (under_way) added().wait(parity_);
    if (early) sh_.turn[consumer_].arrive();
    if (under_way) pass_on();
    while (!known) known = load_acquire(turn(block)) == tile;
    if (!early) sh_.turn[consumer_].arrive();
    last_ = block;
    next_ = next;
  }
  // After the last step of a tile.
  FC_DEVICE void end() {
    added().wait(parity_);
    pass_on();
    last_ = -1;
  }

 private:
  const BwdParams& p_;
  typename T::Shared& sh_;
  int consumer_, part_;
  int last_ = -1, next_ = 0;  // of the step that is under way
  uint32_t parity_ = 0;       // of its number

  FC_DEVICE Barrier& added() const { return sh_.added[consumer_]; }
  FC_DEVICE int* turn(int block) const { return p_.turns + int64_t{block} * kParts + part_; }
  FC_DEVICE void pass_on() {
    parity_ ^= 1;
    if (next_ >= 0) store_release(turn(last_), next_);
  }
};

// One thread, for one consumer of its block.
template <class T>
FC_DEVICE void keep_order(const BwdParams& p, typename T::Shared& sh, int consumer, int rank) {
  Turns<T> turns(p, sh, consumer, rank);
  for (auto tiles = tile::Ring<T::kTilesOfK>::consumer();; tiles.advance()) {
    sh.k_ready[tiles.stage].wait(tiles.parity);
    Work const& work = sh.work[tiles.stage];
    if (work.key < 0) return;
    bool const empty = work.empty();
    if (!empty)
      for (int m = work.begin; m != work.end; m += work.stride)
        for (int i = 0; i < p.group; ++i)
          if constexpr (int const n = work.key / T::kBlockN; T::kLaps)
            turns.step(work, work.kv_head * p.group + i, p.laps.block(m), p.laps.waits(n, m),
                       p.laps.next(n, m));
          else
            turns.step(work, work.kv_head * p.group + i, m, work.waits(m), work.next(n));
    sh.k_free[tiles.stage].arrive();
    if (!empty) turns.end();
  }
}

// The same with block lists, step by step as the producer notes them.
template <class T>
FC_DEVICE void keep_order_of_lists(const BwdParams& p, typename T::Shared& sh, int consumer,
                                   int rank) {
  Turns<T> turns(p, sh, consumer, rank);
  auto notes = tile::Ring<2 * T::kStages>::consumer();
  for (auto tiles = tile::Ring<T::kTilesOfK>::consumer();; tiles.advance()) {
    sh.k_ready[tiles.stage].wait(tiles.parity);
    Work const& work = sh.work[tiles.stage];
    if (work.key < 0) return;
    bool const empty = work.empty();
    for (bool more = !empty; more; notes.advance()) {
      sh.noted[notes.stage].wait(notes.parity);
      StepNote const& note = sh.note[notes.stage];
      Neighbours const beside = p.neighbours.of(work.batch, note.head)[note.place];
      more = !note.last;
      turns.step(work, note.head, note.m, beside.waits(work.stride), beside.next(work.stride));
    }
    sh.k_free[tiles.stage].arrive();
    if (!empty) turns.end();
  }
}

}  // namespace flashcore::sm90::bwd
