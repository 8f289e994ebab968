// The steps of a tile whose 64 keys all consumers share (head dim 256): each keeps its own half of
// the columns of dK and dV, which would not fit otherwise.
//
// The consumers divide the queries of S^T and dP^T, and meet over P and dS in shared memory. Those
// of the next step are made while the tensor cores work on this one:
//     tensor cores   S(m+1) | dP(m+1) | dV(m) | dK(m) | dQ(m), left | dQ(m), right |
//     other units                 P(m+1) | dS(m+1) stored           | dQ to memory | meet
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/work.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct StepsByColumns {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  static constexpr int kQueries = T::kScoreQueries;
  static constexpr int kDqHalf = T::kDqCols / 2;  // dQ at a time, in columns
  using DqHalf = float[kDqHalf / 2];

  FC_DEVICE static void run(const Consumer& c, uint32_t kv_parity) {
    KeyPair const keys(c.p.window, c.work.key + 16 * c.warp() + c.lane() / 4, c.work.q_offset,
                       c.p.seqlen_k);
    typename T::ScoreTile rS, rdP;
    c.sh.k_ready.wait(kv_parity);
    issue_s(c, rS);
    c.sh.v_ready.wait(kv_parity);
    issue_dp(c, rdP);
    wgmma_wait<1>();
    pin(rS);
    make_p(c, keys, rS, 0, c.work.first);
    wgmma_wait<0>();
    pin(rdP);
    make_ds(c, keys, rS, rdP, 0, c.work.first);
    meet();

    int buffer = 0;
    c.for_each_step([&](auto next, int head, int m) {
      step<decltype(next)::value>(c, keys, buffer, head, m);
      buffer ^= 1;
    });
    pin(c.rdK);
    pin(c.rdV);
  }

 private:
  // S^T and dP^T of this consumer's queries, for the ring's stage. Issued, not waited for.
  FC_DEVICE static void issue_s(const Consumer& c, typename T::ScoreTile& rS) {
    c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDim, T::kBlockN, T::kBlockM>(
        rS, c.sh.k, c.sh.q[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }
  FC_DEVICE static void issue_dp(const Consumer& c, typename T::ScoreTile& rdP) {
    c.sh.dout_ready[c.ring.stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDim, T::kBlockN, T::kBlockM>(
        rdP, c.sh.v, c.sh.dout[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }

  // S^T -> P^T, and P to shared memory.
  FC_DEVICE static void make_p(const Consumer& c, KeyPair const& keys, typename T::ScoreTile& rS,
                               int buffer, int m) {
    if (c.work.masked(m)) exclude(rS, keys, m * T::kBlockM + c.index * kQueries, -INFINITY);
    exponentiate(rS, c.sh.lse_log2[c.ring.stage] + c.index * kQueries, c.p.scale_log2);
    typename T::ProbTile rP;
    pack_tile<Element>(rP, rS);
    store_transposed(c.sh.p[buffer], rP, c.warp(), c.index * kQueries / 16);
  }
  // dP^T and P^T -> dS^T, and dS to shared memory.
  FC_DEVICE static void make_ds(const Consumer& c, KeyPair const& keys,
                                const typename T::ScoreTile& rP, typename T::ScoreTile& rdP,
                                int buffer, int m) {
    differentiate(rdP, rP, c.sh.delta[c.ring.stage] + c.index * kQueries);
    if (c.work.masked(m)) exclude(rdP, keys, m * T::kBlockM + c.index * kQueries, 0.0f);
    typename T::ProbTile rdS;
    pack_tile<Element>(rdS, rdP);
    store_transposed(c.sh.ds[buffer], rdS, c.warp(), c.index * kQueries / 16);
    fence_async_shared();
  }
  FC_DEVICE static void meet() { named_barrier_sync(T::kScoresStored, T::kConsumerThreads); }

  // dQ of columns [half * kDqHalf, ...) of this consumer's. Issued, not waited for.
  FC_DEVICE static void issue_dq(const Consumer& c, DqHalf& rdQ, int buffer, int half) {
    wgmma_fence();
    gemm_ab<Element, kDqHalf, T::kBlockN, T::kBlockM>(
        rdQ, c.sh.ds[buffer],
        c.sh.k + (dq_col<T>(c.index) + half * kDqHalf) / kPanelCols * T::kBlockN * kPanelBytes);
    wgmma_commit();
  }

  // Query block m of one head, whose P and dS are in `buffer`; with kNext also makes the next ones.
  template <bool kNext>
  FC_DEVICE static void step(const Consumer& c, KeyPair const& keys, int buffer, int head, int m) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    int const own_panels = c.index * T::kGradientCols / kPanelCols * T::kBlockM * kPanelBytes;
    typename T::ScoreTile rS, rdP;
    DqHalf rdQ0, rdQ1;
    c.ring.advance();

    if constexpr (kNext) {
      issue_s(c, rS);
      issue_dp(c, rdP);
    }
    wgmma_fence();
    gemm_atb<Element, T::kGradientCols, T::kBlockM>(c.rdV, sh.p[buffer],
                                                    sh.dout[stage] + own_panels);
    wgmma_commit();
    gemm_atb<Element, T::kGradientCols, T::kBlockM>(c.rdK, sh.ds[buffer], sh.q[stage] + own_panels);
    wgmma_commit();
    issue_dq(c, rdQ0, buffer, 0);
    if constexpr (kNext) {
      int const next = m + 1 == c.work.last ? c.work.first : m + 1;
      wgmma_wait<4>();
      pin(rS);
      make_p(c, keys, rS, buffer ^ 1, next);
      wgmma_wait<3>();
      pin(rdP);
      make_ds(c, keys, rS, rdP, buffer ^ 1, next);
    }
    issue_dq(c, rdQ1, buffer, 1);

    float* const dq = c.p.dq_sum ? dq_block<T>(c.p, c.work.batch, head, m) : nullptr;
    wgmma_wait<1>();
    pin(rdQ0);
    c.release(sh.free[stage]);
    if (dq) add_dq<T, 0>(dq, rdQ0, c.thread);
    wgmma_wait<0>();
    pin(rdQ1);
    meet();  // the next P and dS are there, and these ones may be overwritten
    if (dq) add_dq<T, kDqHalf / 8>(dq, rdQ1, c.thread);
  }
};

}  // namespace flashcore::sm90::bwd
