// The steps of a tile whose 64 keys all consumers share (head dim 256): each keeps its own half of
// the columns of dK and dV, which would not fit otherwise.
//
// The consumers divide the queries of S^T and dP^T, and meet over P and dS in shared memory. Those
// of the next step are made while the tensor cores work on this one:
//     tensor cores   S(m+1) | dP(m+1) | dV(m) | dK(m) | dQ(m), left | dQ(m), right |
//     other units                 P(m+1) | dS(m+1) stored           | dQ to memory | meet
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/dq.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct StepsByColumns {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;
  static constexpr int kQueries = T::kScoreQueries;
  static constexpr int kDqHalf = T::kDqCols / 2;  // dQ at a time, in columns
  using DqHalf = float[kDqHalf / 2];

  FC_DEVICE static void run(const Consumer& c, uint32_t parity) {
    typename T::ScoreTile rS, rdP;
    issue_s(c, rS);
    wgmma_wait<0>();
    pin(rS);
    c.sh.v_ready.wait(parity);
    issue_dp(c, rdP);
    make_p(c, rS, 0, c.first_step());
    wgmma_wait<0>();
    pin(rdP);
    make_ds(c, rS, rdP, 0, c.first_step());
    meet();

    int buffer = 0;
    Step at = c.first_step();
    for (; !at.last; buffer ^= 1) at = step<true>(c, buffer, at);
    step<false>(c, buffer, at);
    c.release(c.sh.v_free);
    pin(c.rdK);
    pin(c.rdV);
  }

 private:
  // S^T - lse / scale and dP^T - delta of this consumer's queries, for the ring's stage. Issued,
  // not waited for.
  FC_DEVICE static void issue_s(const Consumer& c, typename T::ScoreTile& rS) {
    c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    set_columns(rS, c.sh.minus_lse[c.ring.stage] + c.index * kQueries);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDim, T::kBlockN, T::kBlockM, true>(
        rS, c.sh.k, c.sh.q[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }
  FC_DEVICE static void issue_dp(const Consumer& c, typename T::ScoreTile& rdP) {
    c.sh.dout_ready[c.ring.stage].wait(c.ring.parity);
    set_columns(rdP, c.sh.minus_delta[c.ring.stage] + c.index * kQueries);
    wgmma_fence();
    gemm_abt<Element, kQueries, T::kHeadDim, T::kBlockN, T::kBlockM, true>(
        rdP, c.sh.v, c.sh.dout[c.ring.stage] + c.index * kQueries * kPanelBytes);
    wgmma_commit();
  }

  // S^T -> P^T, and P to shared memory.
  FC_DEVICE static void make_p(const Consumer& c, typename T::ScoreTile& rS, int buffer, Step at) {
    if (at.masked) exclude(rS, c.keys(), at.m * T::kBlockM + c.index * kQueries, -INFINITY);
    exponentiate(rS, c.p.scale_log2);
    typename T::ProbTile rP;
    pack_tile<Element>(rP, rS);
    store_transposed(c.sh.p[buffer], rP, c.index * kQueries / 16);
  }
  // dP^T and P^T -> dS^T, and dS to shared memory.
  FC_DEVICE static void make_ds(const Consumer& c, const typename T::ScoreTile& rP,
                                typename T::ScoreTile& rdP, int buffer, Step at) {
    differentiate(rdP, rP);
    if (at.masked) exclude(rdP, c.keys(), at.m * T::kBlockM + c.index * kQueries, 0.0f);
    typename T::ProbTile rdS;
    pack_tile<Element>(rdS, rdP);
    store_transposed(c.sh.ds[buffer], rdS, c.index * kQueries / 16);
    fence_async_shared();
  }
  FC_DEVICE static void meet() { named_barrier_sync(T::kMeet, T::kConsumerThreads); }

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
  FC_DEVICE static Step step(const Consumer& c, int buffer, Step at) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    int const own_panels = c.index * T::kGradientCols / kPanelCols * T::kBlockM * kPanelBytes;
    Step const next = kNext ? c.step_after(at) : at;
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
      wgmma_wait<4>();
      pin(rS);
      make_p(c, rS, buffer ^ 1, next);
      wgmma_wait<3>();
      pin(rdP);
      make_ds(c, rS, rdP, buffer ^ 1, next);
    }
    issue_dq(c, rdQ1, buffer, 1);

    float* const left_sums = dq_sums<T, 0>(c.p, c.work(), at.head, at.m);
    wgmma_wait<1>();
    pin(rdQ0);
    c.release(sh.free[stage]);
    put_dq<T, 0>(c.p, c.work(), c.index, at.head, at.m, left_sums, rdQ0);
    wgmma_wait<0>();
    pin(rdQ1);
    meet();  // the next P and dS are there, and these ones may be overwritten
    put_dq<T, kDqHalf / 8>(c.p, c.work(), c.index, at.head, at.m, left_sums + kDqHalf / 8 * 128,
                           rdQ1);
    return next;
  }
};

}  // namespace flashcore::sm90::bwd
