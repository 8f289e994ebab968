// P and dS where both consumers need all of them, through shared memory: each makes those of its
// own queries, against all 64 keys of the tile, and they meet when theirs are there.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/terms.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct SharedScores {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;
  static constexpr int kQueries = T::kScoreQueries;

  // S^T - lse / scale and dP^T - delta of this consumer's queries, for the ring's stage; with
  // terms, S^T and dP^T. Issued, not waited for.
  FC_DEVICE static void issue_s(const Consumer& c, typename T::ScoreTile& rS) {
    c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    if constexpr (T::kFromStats) set_columns(rS, c.sh.minus_lse[c.ring.stage] + c.index * kQueries);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDim, T::kBlockN, T::kBlockM, T::kFromStats>(
        rS, c.k(), c.sh.q[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }
  FC_DEVICE static void issue_dp(const Consumer& c, typename T::ScoreTile& rdP) {
    c.sh.dout_ready[c.ring.stage].wait(c.ring.parity);
    if constexpr (T::kFromStats)
      set_columns(rdP, c.sh.minus_delta[c.ring.stage] + c.index * kQueries);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDimV, T::kBlockN, T::kBlockM, T::kFromStats>(
        rdP, c.sh.v, c.sh.dout[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }

  // S^T -> P^T, and P to shared memory.
  FC_DEVICE static void make_p(const Consumer& c, typename T::ScoreTile& rS, int buffer, Step at) {
    typename T::ProbTile rP;
    Scores<T>::probabilities(c, rS, rP, at, at.m * T::kBlockM + c.index * kQueries,
                             c.sh.minus_lse[c.ring.stage] + c.index * kQueries);
    store_transposed(c.sh.p[buffer], rP, c.index * kQueries / 16);
  }
  // dP^T and P^T -> dS^T, and dS to shared memory.
  FC_DEVICE static void make_ds(const Consumer& c, const typename T::ScoreTile& rP,
                                typename T::ScoreTile& rdP, int buffer, Step at) {
    Scores<T>::gradients(c, rdP, rP, at, at.m * T::kBlockM + c.index * kQueries,
                         c.sh.minus_delta[c.ring.stage] + c.index * kQueries);
    typename T::ProbTile rdS;
    pack_tile<Element>(rdS, rdP);
    store_transposed(c.sh.ds[buffer], rdS, c.index * kQueries / 16);
    fence_async_shared();
  }

  // The first ones of a tile.
  FC_DEVICE static void make_first(const Consumer& c, uint32_t parity) {
    typename T::ScoreTile rS, rdP;
    issue_s(c, rS);
    wgmma_wait<0>();
    pin(rS);
    c.sh.v_ready.wait(parity ^ 1);
    issue_dp(c, rdP);
    make_p(c, rS, 0, c.first_step());
    wgmma_wait<0>();
    pin(rdP);
    make_ds(c, rS, rdP, 0, c.first_step());
    meet();
  }
  FC_DEVICE static void meet() {
    named_barrier_sync_apart(T::kMeet, T::kConsumerThreads);  // each has steps of its own
  }
};

}  // namespace flashcore::sm90::bwd
