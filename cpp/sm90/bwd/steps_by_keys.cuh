// The steps of a tile whose keys are divided among the consumers, 64 each (head dim up to 128).
//
// S^T = K Q^T and dP^T = V dO^T leave P^T and dS^T in registers as the A operands of dV and dK.
// Only dS goes through shared memory: dQ sums over the keys of all consumers.
//     tensor cores   dP(m) | dV(m)     | dK(m)           | dQ(m)   | S(m+1)       |
//     other units    P(m)  | dS(m)       store dS, meet  |           dQ to memory |
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/dq.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct StepsByKeys {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;

  FC_DEVICE static void run(const Consumer& c, uint32_t parity) {
    typename T::ScoreTile rS;
    score(c, rS);
    wgmma_wait<0>();
    pin(rS);
    c.sh.v_ready.wait(parity);
    int buffer = 0;
    c.for_each_step([&](auto next, int head, int m) {
      step<decltype(next)::value>(c, rS, buffer, head, m);
      buffer ^= 1;
    });
    pin(c.rdK);
    pin(c.rdV);
  }

 private:
  // Issues S^T for the ring's stage.
  FC_DEVICE static void score(const Consumer& c, typename T::ScoreTile& rS) {
    c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_abt<Element, T::kBlockM, T::kHeadDim, T::kBlockN>(rS, c.sh.k + 64 * c.index * kPanelBytes,
                                                           c.sh.q[c.ring.stage]);
    wgmma_commit();
  }

  // Query block m of one head, whose S^T is complete; with kNext also the next step's S^T.
  template <bool kNext>
  FC_DEVICE static void step(const Consumer& c, typename T::ScoreTile& rS, int buffer, int head,
                             int m) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    typename T::ScoreTile rdP;
    typename T::ProbTile rP, rdS;

    sh.dout_ready[stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_abt<Element, T::kBlockM, T::kHeadDim, T::kBlockN>(rdP, sh.v + 64 * c.index * kPanelBytes,
                                                           sh.dout[stage]);
    wgmma_commit();

    bool const masked = c.work().masked(m);
    if (masked) exclude(rS, c.keys(), m * T::kBlockM, -INFINITY);
    exponentiate(rS, sh.lse_log2[stage], c.p.scale_log2);
    pack_tile<Element>(rP, rS);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDim, T::kBlockM>(c.rdV, rP, sh.dout[stage]);
    wgmma_commit();

    wgmma_wait<1>();  // dP is complete, dV may still be running
    pin(rdP);
    differentiate(rdP, rS, sh.delta[stage]);
    if (masked) exclude(rdP, c.keys(), m * T::kBlockM, 0.0f);
    pack_tile<Element>(rdS, rdP);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDim, T::kBlockM>(c.rdK, rdS, sh.q[stage]);
    wgmma_commit();

    // Nobody reads this buffer any more: everybody waited for the dQ of two steps ago before the
    // barrier of the last step.
    store_transposed(sh.ds[buffer] + c.index * T::kBlockM * kPanelBytes, rdS, c.warp(), 0);
    fence_async_shared();
    named_barrier_sync(T::kScoresStored, T::kConsumerThreads);
    // dQ goes where dP was: given registers of its own, it would not fit.
    auto& rdQ = reinterpret_cast<typename T::DqTile&>(rdP);
    wgmma_fence();
    gemm_ab<Element, T::kDqCols, T::kBlockN, T::kBlockM>(
        rdQ, sh.ds[buffer] + dq_row<T>(c.index) * kPanelBytes,
        sh.k + dq_col<T>(c.index) / kPanelCols * T::kBlockN * kPanelBytes);
    wgmma_commit();
    c.ring.advance();

    wgmma_wait<1>();  // all but dQ
    c.release(sh.free[stage]);
    if constexpr (!kNext) c.release(sh.v_free);
    if constexpr (kNext) {
      score(c, rS);
      wgmma_wait<1>();  // dQ is complete, S may still be running
    } else {
      wgmma_wait<0>();
    }
    pin(rdQ);
    put_dq<T, 0>(c.p, c.work(), c.index, head, m, rdQ);
    if constexpr (kNext) {
      wgmma_wait<0>();
      pin(rS);
    }
  }
};

}  // namespace flashcore::sm90::bwd
