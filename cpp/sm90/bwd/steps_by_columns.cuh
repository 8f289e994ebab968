// The steps of a tile whose 64 keys all consumers share (head dim 256): each keeps its own half of
// the columns of dK and dV, which would not fit otherwise.
//
// The consumers divide the queries of S^T and dP^T, and meet over P and dS in shared memory. Those
// of the next step are made while the tensor cores work on this one:
//     tensor cores   S(m+1) | dP(m+1) | dV(m) | dK(m) | dQ(m), left | dQ(m), right |
//     other units                 P(m+1) | dS(m+1) stored           | dQ to memory | meet
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/shared_scores.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct StepsByColumns {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;
  using Made = SharedScores<T>;
  static constexpr int kDqHalf = T::Dq::kCols / 2;  // dQ at a time, in columns
  using DqHalf = float[kDqHalf / 2];

  FC_DEVICE static void run(const Consumer& c, uint32_t parity) {
    Made::make_first(c, parity);
    int buffer = 0;
    Step at = c.first_step();
    for (; !at.last; buffer ^= 1) at = step<true>(c, buffer, at);
    step<false>(c, buffer, at);
    c.release(c.sh.v_free);
    pin(c.rdK);
    pin(c.rdV);
  }

 private:
  // dQ of columns [half * kDqHalf, ...) of this consumer's. Issued, not waited for.
  FC_DEVICE static void issue_dq(const Consumer& c, DqHalf& rdQ, int buffer, int half) {
    wgmma_fence();
    gemm_ab<Element, kDqHalf, T::kBlockN, T::kBlockM>(
        rdQ, c.sh.ds[buffer],
        c.sh.k + (T::Dq::col(c.index) + half * kDqHalf) / kPanelCols * T::kBlockN * kPanelBytes);
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
    Scores<T> scores;
    c.ring.advance();

    if constexpr (kNext) {
      Made::issue_s(c, rS);
      Made::issue_dp(c, rdP);
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
      Made::make_p(c, scores, rS, buffer ^ 1, next);
      wgmma_wait<3>();
      pin(rdP);
      Made::make_ds(c, scores, rS, rdP, buffer ^ 1, next);
    }
    issue_dq(c, rdQ1, buffer, 1);

    float* const left_sums = dq_sums<T, 0>(c.p, c.work(), at.head, at.m);
    wgmma_wait<1>();
    pin(rdQ0);
    c.release(sh.free[stage]);
    put_dq<T, 0>(c.p, c.work(), c.index, at.head, at.m, left_sums, rdQ0, sh.redo);
    float* const right_sums = dq_sums<T, kDqHalf / 8>(c.p, c.work(), at.head, at.m);
    wgmma_wait<0>();
    pin(rdQ1);
    Made::meet();  // the next P and dS are there, and these ones may be overwritten
    put_dq<T, kDqHalf / 8>(c.p, c.work(), c.index, at.head, at.m, right_sums, rdQ1, sh.redo);
    return next;
  }
};

}  // namespace flashcore::sm90::bwd
