// dQ added to in a fixed order, for the same bits every time.
//
// Each part of a query block's dQ, which one consumer adds, has a turn in memory: the key tile that
// adds to it next. A warp beside the producer waits for it there and tells its consumer through
// shared memory; when the consumer has added, it passes the turn on. So consumers know nothing of
// memory, and what one step waits for the others do not.
//
// The order is that in which tiles are taken. So the earliest tile that is not done waits for
// nobody, and no launch can hang, however few of its blocks run at the same time.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/ptx/memory.cuh"

namespace flashcore::sm90::bwd {

// One thread, for one consumer of its block.
template <class T>
FC_DEVICE void keep_order(const BwdParams& p, typename T::Shared& sh, int consumer, int rank) {
  constexpr int kParts = T::kConsumers * T::kCluster;
  int const part = T::dq_part(consumer, rank);
  uint32_t parity_of_step = 0;
  for (auto tiles = tile::Ring<T::kTilesOfK>::consumer();; tiles.advance()) {
    sh.k_ready[tiles.stage].wait(tiles.parity);
    Work const& work = sh.work[tiles.stage];
    if (work.key < 0) return;
    StepOrder const order = work;
    int const tile = work.key / T::kBlockN;
    int const first_head = work.kv_head * p.group, stats = work.stats;
    bool const empty = work.empty();
    sh.k_free[tiles.stage].arrive();
    if (empty) continue;
    for (int m = order.begin; m != order.end; m += order.stride)
      for (int head = first_head; head < first_head + p.group; ++head) {
        int* const turn = p.turns + part + int64_t{head * p.head_blocks + stats + m} * kParts;
        if (order.waits(m))
          while (load_acquire(turn) != tile) {
          }
        sh.turn[consumer].arrive();
        sh.added[consumer].wait(parity_of_step);
        parity_of_step ^= 1;
        store_release(turn, order.next(tile));
      }
  }
}

}  // namespace flashcore::sm90::bwd
