// The steps of a tile of 64 keys at head dim 192: one consumer keeps dV, the other dK, neither of
// which is cut in the middle of a panel. dQ makes up for their unlike sizes: the first consumer
// takes two of its three panels, the second one the third.
//
// They divide the queries of S^T and dP^T, meet over P and dS in shared
// memory, and make those of the next step while the tensor cores work on this one:
//     tensor cores   S(m+1) | dP(m+1) | dV(m) or dK(m) | dQ(m) |
//     other units                 P(m+1) | dS(m+1) stored      | meet | dQ to memory
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/shared_scores.cuh"

namespace flashcore::sm90::bwd {

// kFirst: of the first consumer. What it does more of cannot be a branch in the steps: a product
// issued under a condition makes ptxas wait after all of them.
template <class T, bool kFirst>
struct StepsByGradient {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;
  using Made = SharedScores<T>;
  static constexpr int kIndex = kFirst ? 0 : 1;
  static constexpr int kCols = kFirst ? T::kHeadDimV : T::kHeadDim;  // of dV, dK
  using DqPanel = float[kPanelCols / 2];

  FC_DEVICE static void run(const Consumer& c, uint32_t parity) {
    Made::make_first(c, parity);
    int buffer = 0;
    Step at = c.first_step();
    for (; !at.last; buffer ^= 1) at = step<true>(c, buffer, at);
    step<false>(c, buffer, at);
    c.release(c.sh.v_free);
    pin(gradient(c));
  }

 private:
  FC_DEVICE static float (&gradient(const Consumer& c))
      [kCols / 2] { return reinterpret_cast<float (&)[kCols / 2]>(kFirst ? c.rdV : c.rdK); }

  // Issues dQ of this consumer's panel `panel`; does not wait.
  FC_DEVICE static void issue_dq(const Consumer& c, DqPanel& rdQ, int buffer, int panel) {
    wgmma_fence();
    gemm_ab<Element, kPanelCols, T::kBlockN, T::kBlockM>(
        rdQ, c.sh.ds[buffer], c.k() + (T::Dq::panel(kIndex) + panel) * T::kBlockN * kPanelBytes);
    wgmma_commit();
  }
  template <int kPanel>
  FC_DEVICE static void put(const Consumer& c, Step at, DqPanel& rdQ) {
    constexpr int kQuads = kPanelCols / 8;
    put_dq<T, kPanel * kQuads>(c.p, c.work(), kIndex, at.head, at.m,
                               dq_sums<T, kPanel * kQuads>(c.p, c.work(), kIndex, at.head, at.m),
                               rdQ, c.sh.redo);
  }

  // Query block m of one head, whose P and dS are in `buffer`; with kNext also makes the next ones.
  template <bool kNext>
  FC_DEVICE static Step step(const Consumer& c, int buffer, Step at) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    uint32_t const parity = c.ring.parity ^ (stage & 1);  // of the step's number: 3 stages
    static_assert(T::kStages == 3);
    Step next = kNext && !T::kLists ? c.step_after(at) : at;
    typename T::ScoreTile rS, rdP;
    DqPanel rdQ0, rdQ1;
    c.ring.advance();

    if constexpr (kNext) {
      Made::issue_s(c, rS);
      if constexpr (T::kLists) next = c.step_after(at);
      Made::issue_dp(c, rdP);
    }
    wgmma_fence();
    gemm_atb<Element, kCols, T::kBlockM>(gradient(c), kFirst ? sh.p[buffer] : sh.ds[buffer],
                                         kFirst ? sh.dout[stage] : sh.q[stage]);
    wgmma_commit();
    issue_dq(c, rdQ0, buffer, 0);
    if constexpr (kNext) {
      wgmma_wait<3>();
      pin(rS);
      Made::make_p(c, rS, buffer ^ 1, next);
      wgmma_wait<2>();
      pin(rdP);
      Made::make_ds(c, rS, rdP, buffer ^ 1, next);
    }
    if constexpr (kFirst) {
      issue_dq(c, rdQ1, buffer, 1);
      wgmma_wait<1>();
      pin(rdQ0);
      c.release(sh.free[stage]);
      c.wait_turn(parity);
      put<0>(c, at, rdQ0);
      wgmma_wait<0>();
      pin(rdQ1);
      Made::meet();  // the next P and dS are there, and these ones may be overwritten
      put<1>(c, at, rdQ1);
    } else {
      wgmma_wait<0>();
      pin(rdQ0);
      c.release(sh.free[stage]);
      Made::meet();
      c.wait_turn(parity);
      put<0>(c, at, rdQ0);
    }
    c.pass_turn();
    return next;
  }
};

}  // namespace flashcore::sm90::bwd
