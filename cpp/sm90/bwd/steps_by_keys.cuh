// The steps of a tile whose keys are divided among the consumers, 64 each (head dim up to 128).
//
// S^T = K Q^T and dP^T = V dO^T leave P^T and dS^T in registers as the A operands of dV and dK.
// Only dS goes through shared memory: dQ sums over the keys of all consumers. dQ comes a step late,
// so that the consumers need not be at the same point; they stay half a step apart, where one
// computes exponentials while the tensor cores work for the other.
//     tensor cores   dP(m) | dV(m) | dK(m)        | dQ(m-1) | S(m+1)          |
//     other units    P(m)  | dS(m) | dS(m) stored |         | dQ(m-1) to memory
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/terms.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct StepsByKeys {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;

  static_assert(T::kDsBuffers == 2);  // or a buffer would not tell the parity of a step's number

  // All but dQ of the last step, which is returned: dV is complete before it.
  FC_DEVICE static Step run(const Consumer& c, uint32_t parity) {
    typename T::ScoreTile rS, rdP;
    if (c.index == 1) named_barrier_sync(T::kHeadStart, T::kConsumerThreads);
    bool first = !c.passes_over_first();
    if (!first) pass_over(c);
    issue_s(c, rS);
    if (!first || c.p.short_head_start) end_head_start(c);
    wait_dout(c);
    wgmma_wait<0>();
    pin(rS);
    c.sh.v_ready.wait(parity ^ 1);

    Step at = c.first_step();
    while (!at.last) {
      at = step<true>(c, rS, rdP, at, first);
      first = false;
    }
    step<false>(c, rS, rdP, at, first);
    pin(c.rdK);
    pin(c.rdV);
    return at;
  }
  FC_DEVICE static void finish(const Consumer& c, Step at) {
    for (bool more = c.passes_over_last();; more = false) {
      typename T::DqProduct rdQ;
      wait_ds(c);
      issue_dq(c, rdQ);
      wgmma_wait<0>();
      pin(rdQ);
      c.release(c.sh.ds_free[c.ds.stage ^ 1]);
      put(c, at.head, at.m, dq_sums<T, 0>(c.p, c.work(), c.index, at.head, at.m), rdQ,
          c.ds.stage ^ 1);
      if (!T::kPassesOver || !more) break;
      pass_over(c);
      at.m += c.work().stride;
    }
  }

 private:
  // The second consumer begins the tile when the first one does this.
  FC_DEVICE static void end_head_start(const Consumer& c) {
    if (c.index == 0) named_barrier_arrive(T::kHeadStart, T::kConsumerThreads);
  }
  // A step of which this consumer's dS is zero.
  FC_DEVICE static void pass_over(const Consumer& c) {
    int const stage = c.ring.stage;
    c.sh.q_ready[stage].wait(c.ring.parity);  // or their phases would be taken for the next ones
    c.sh.dout_ready[stage].wait(c.ring.parity);
    c.sh.ds_free[c.ds.stage].wait(c.ds.parity ^ 1);
    typename T::ProbTile const zeros = {};
    store_transposed(c.sh.ds[c.ds.stage] + c.index * T::kBlockM * kPanelBytes, zeros, 0);
    fence_async_shared();
    c.release(c.sh.ds_ready[c.ds.stage]);
    c.ds.advance();
    c.ring.advance();
    c.release(c.sh.free[stage]);
  }

  // Issues S^T - lse / scale and dP^T - delta for the ring's stage; with terms, S^T and dP^T.
  FC_DEVICE static void issue_s(const Consumer& c, typename T::ScoreTile& rS) {
    int const stage = c.ring.stage;
    c.sh.q_ready[stage].wait(c.ring.parity);
    issue_scores(c, rS, c.k(), c.sh.q[stage], c.sh.minus_lse[stage]);
  }
  FC_DEVICE static void wait_dout(const Consumer& c) {  // while S is on its way
    c.sh.dout_ready[c.ring.stage].wait(c.ring.parity);
  }
  FC_DEVICE static void issue_dp(const Consumer& c, typename T::ScoreTile& rdP) {
    int const stage = c.ring.stage;
    issue_scores(c, rdP, c.sh.v, c.sh.dout[stage], c.sh.minus_delta[stage]);
  }
  FC_DEVICE static void issue_scores(const Consumer& c, typename T::ScoreTile& scores,
                                     const char* keys, const char* queries,
                                     const typename T::Stat* stats) {
    uint32_t ones[2];
    if constexpr (T::kStatProducts) three_ones(ones);
    wgmma_fence();
    gemm_abt<Element, T::kBlockM, T::kHeadDim, T::kBlockN, T::kBlockM>(
        scores, keys + 64 * c.index * kPanelBytes, queries);
    if constexpr (T::kStatProducts) gemm_ones<T::kBlockM>(scores, ones, stats);
    wgmma_commit();
  }
  // Waits for the dS that was stored last, of all consumers.
  FC_DEVICE static void wait_ds(const Consumer& c) {
    c.sh.ds_ready[c.ds.stage ^ 1].wait(c.ds.stage == 0 ? c.ds.parity ^ 1 : c.ds.parity);
  }
  // Issues its dQ.
  FC_DEVICE static void issue_dq(const Consumer& c, typename T::DqProduct& rdQ) {
    int const buffer = c.ds.stage ^ 1;
    const char* const columns = c.k() + T::Dq::panel(c.index) * T::kBlockN * kPanelBytes;
    wgmma_fence();
    if constexpr (T::Dq::kTransposed)
      gemm_atbt<Element, T::kBlockM, T::kBlockN>(rdQ, columns, c.sh.ds[buffer]);
    else
      gemm_ab<Element, T::Dq::kProductCols, T::kBlockN, T::kBlockM>(
          rdQ, c.sh.ds[buffer] + T::Dq::row(c.index) * kPanelBytes, columns);
    wgmma_commit();
  }
  FC_DEVICE static void put(const Consumer& c, int head, int m, float* sums,
                            const typename T::DqProduct& product, uint32_t parity) {
    typename T::DqTile dq;
    take_dq<T>(dq, product, c.index);
    c.wait_turn(parity);
    put_dq<T, 0>(c.p, c.work(), c.index, head, m, sums, dq, c.sh.redo);
    c.pass_turn();
  }

  // The step whose S^T is complete in rS, and whose dO is there. With kNext there is a step after
  // it, which is returned, and whose S^T is left behind. first: of the tile. It has no dQ of a step
  // before to compute, but a product that is issued under a condition makes ptxas wait after all of
  // them; so it computes one of whatever is in the buffer, and drops it.
  template <bool kNext>
  FC_DEVICE static Step step(const Consumer& c, typename T::ScoreTile& rS,
                             typename T::ScoreTile& rdP, Step at, bool first) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    typename T::ProbTile rP, rdS;

    if constexpr (!T::kTerms) issue_dp(c, rdP);
    Scores<T>::probabilities(c, rS, rP, at, at.m * T::kBlockM, sh.minus_lse[stage]);
    if constexpr (T::kTerms) issue_dp(c, rdP);  // until here its registers were needed
    wgmma_fence();
    gemm_pb<Element, T::kHeadDim, T::kBlockM>(c.rdV, rP, sh.dout[stage]);
    wgmma_commit();
    if (first && !c.p.short_head_start) end_head_start(c);

    wgmma_wait<1>();  // dP is complete, dV may still be running
    pin(rdP);
    Scores<T>::gradients(c, rdP, rS, at, at.m * T::kBlockM, sh.minus_delta[stage]);
    pack_tile<Element>(rdS, rdP);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDim, T::kBlockM>(c.rdK, rdS, sh.q[stage]);
    wgmma_commit();

    sh.ds_free[c.ds.stage].wait(c.ds.parity ^ 1);
    store_transposed(sh.ds[c.ds.stage] + c.index * T::kBlockM * kPanelBytes, rdS, 0);
    fence_async_shared();
    c.release(sh.ds_ready[c.ds.stage]);
    // dQ goes where dP was: given registers of its own, it would not fit.
    auto& rdQ = reinterpret_cast<typename T::DqProduct&>(rdP);
    if (!first) wait_ds(c);
    issue_dq(c, rdQ);
    wgmma_wait<1>();  // all but dQ
    c.ds.advance();
    c.ring.advance();
    c.release(sh.free[stage]);
    if constexpr (kNext) issue_s(c, rS);
    auto const [head, m] = c.before(at);
    float* const sums = dq_sums<T, 0>(c.p, c.work(), c.index, head, m);
    Step const next = kNext ? c.step_after(at) : at;
    wgmma_wait<kNext ? 1 : 0>();  // dQ is complete, S may still be running
    pin(rdQ);
    if (!first) {
      c.release(sh.ds_free[c.ds.stage]);
      put(c, head, m, sums, rdQ, c.ds.stage);
    }
    if constexpr (kNext) {
      wait_dout(c);
      wgmma_wait<0>();
      pin(rS);
    }
    return next;
  }
};

}  // namespace flashcore::sm90::bwd
