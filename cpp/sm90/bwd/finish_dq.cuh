// dQ from its sums by those who added to them, where tiles are few: every cluster has one, and all
// are done at about the same time. So no kernel has to begin after this one.
//
// A consumer adds to what the same consumer of every other block adds to, and to nothing else. So
// of a head the consumers of one number are by themselves. A warp beside the producer, one for each
// consumer, counts it in when its last sum is added, while the consumer goes on to dK or dV. When
// all are in, that warp takes query blocks for it, until there are none left. Nobody depends on
// others: who has waited long enough leaves, and the last one that is counted in finds all there
// and takes what is left. So no launch can hang, however few of its blocks run at the same time.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/store_dq.cuh"
#include "sm90/ptx/launch.cuh"
#include "sm90/ptx/memory.cuh"

namespace flashcore::sm90::bwd {

template <class T>
class FinishDq {
 public:
  static_assert(T::kByQueries);

  FC_DEVICE explicit FinishDq(const BwdParams& p)
      : p_(p),
        tile_(p.scheduler.tile(blockIdx.x / T::kCluster)),
        all_(p.scheduler.m_blocks * T::kCluster),
        blocks_(p.sequence_blocks * p.group),
        share_(ceil_div(blocks_, all_)) {}

  // One thread, for one consumer of its block.
  FC_DEVICE void take(typename T::Shared& sh, int consumer) const {
    int const pair = tile_.batch * p_.scheduler.heads + tile_.head;
    DqHead& h = p_.dq_heads[pair * T::kConsumers + consumer];
    wait_for_kernel_before();  // it cleared the counts
    sh.added[consumer].wait(0);
    add_release(&h.arrived, 1);
    int first = all_arrive(h) ? atomicAdd(&h.taken, share_) : blocks_;
    for (uint32_t parity = 1;; parity ^= 1) {
      sh.taken_block[consumer] = first;
      sh.turn[consumer].arrive();
      if (first >= blocks_) return;
      first = atomicAdd(&h.taken, share_);  // known when the consumer is done with these
      sh.added[consumer].wait(parity);
    }
  }

  // The consumer, behind its tile.
  FC_DEVICE void store(typename T::Shared& sh) const {
    int const thread = thread_index() - 128, consumer = thread / 128;
    for (uint32_t parity = 0;; parity ^= 1) {
      sh.turn[consumer].wait(parity);
      int const first = sh.taken_block[consumer];
      if (first >= blocks_) return;
      for (int i = first; i < min_of(first + share_, blocks_); ++i)
        store_block(tile_.head * p_.group + i / p_.sequence_blocks, i % p_.sequence_blocks, thread);
      __syncwarp();
      if (threadIdx.x % 32 == 0) sh.added[consumer].arrive();
    }
  }

 private:
  static constexpr int kPatience = 64;  // times to ask, some 40 us: see Division::at_once

  const BwdParams& p_;
  tile::Tile tile_;  // the only one of this block
  int all_;          // who add to the head's sums
  int blocks_;       // query blocks of its query heads
  int share_;        // of them, how many are taken at once

  FC_DEVICE bool all_arrive(const DqHead& h) const {
    for (int i = 0; i < kPatience; ++i)
      if (load_acquire(&h.arrived) >= all_) return true;
    return false;
  }

  FC_DEVICE void store_block(int head, int m, int thread) const {
    int const part = thread / 128, rows = p_.seqlen_q - m * T::kBlockM;
    int const block = first_query_block(p_, tile_.batch, T::kBlockM, true) + m;
    typename T::DqTile dq = {};
    add_sums(dq, dq_block<T>(p_, head * p_.head_blocks + block) + T::Dq::offset(thread),
             T::Dq::quads(part));
    store_dq<T>(p_, {tile_.batch, m, m * T::kBlockM, rows}, head, part, p_.sequence.q_begin, rows,
                rows, dq);
  }
};

}  // namespace flashcore::sm90::bwd
