// The steps of a tile of 128 keys that two blocks of a cluster share, 64 each (head dim 256). In a
// block one consumer keeps dV and makes P, the other keeps dK and makes
// dS: S^T = K Q^T leaves P^T in the registers of the one as the A operand of dV, and dP^T = V dO^T
// dS^T in those of the other as that of dK. A thread of the second needs just the P that its twin
// in the first has.
//
// dQ sums over the keys of both blocks. They trade dS, and each makes dQ of half of the columns,
// for which it also holds those columns of the other's K: so each adds half as much to memory,
// which is what would limit this head dim.
//     first consumer    dV(m) | P(m) to its twin | S(m+1) | dQ(m-1) to memory | P(m+1) | dQ(m)
//     second consumer   dS(m) | dK(m) | dS(m) to both blocks | dQ(m) | dP(m+1) | dQ(m) to memory
//
// There is room for one dS only. So P(m+1), which lies in its place at first, is handed over when
// all four consumers are past dQ(m). Its barriers' parity alternates as the two stages of Q do.
#pragma once
#include "sm90/bwd/dq.cuh"
#include "sm90/bwd/terms.cuh"
#include "sm90/ptx/cluster.cuh"

namespace flashcore::sm90::bwd {

template <class T, bool kFirst>
struct StepsByCluster {
  using Element = typename T::Element;
  using Consumer = bwd::Consumer<T>;
  using Step = typename Consumer::Step;
  using ScoreTile = typename T::ScoreTile;
  using ProbTile = typename T::ProbTile;
  using DqProduct = typename T::DqProduct;
  static constexpr int kIndex = kFirst ? 0 : 1;
  static_assert(T::kStages == 2);  // or a stage would not tell the parity of dS

  FC_DEVICE static void run(const Consumer& c, uint32_t parity) {
    // Its registers stay its own: they are read for a while after it was added to memory, and who
    // wants to write them waits for that.
    DqProduct rdQ;
    if constexpr (T::kLists) c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    Step at = c.first_step();
    c.sh.peer_k_ready.wait(parity ^ 1);
    if constexpr (kFirst) {
      ScoreTile rS;
      ProbTile rP, rX;
      issue_s(c, rS);
      wgmma_wait<0>();
      pin(rS);
      probabilities(c, rS, rP, rX, at);
      Step before{0, -1, false, false, false};
      while (!at.last) {
        Step const next = first_step<true>(c, rP, rX, rdQ, at, before);
        before = at;
        at = next;
      }
      first_step<false>(c, rP, rX, rdQ, at, before);
      put(c, at, rdQ, c.ring.stage ^ 1);
      pin(c.rdV);
    } else {
      ScoreTile rdP;
      c.sh.v_ready.wait(parity ^ 1);
      issue_dp(c, rdP);
      while (!at.last) at = second_step<true>(c, rdP, rdQ, at);
      second_step<false>(c, rdP, rdQ, at);
      pin(c.rdK);
    }
    c.release(c.sh.v_free);
  }

 private:
  // S^T - lse / scale and dP^T - delta for the ring's stage; with terms, S^T and dP^T. Issued, not
  // waited for.
  FC_DEVICE static void issue_s(const Consumer& c, ScoreTile& rS) {
    c.sh.q_ready[c.ring.stage].wait(c.ring.parity);
    if constexpr (T::kFromStats) set_columns(rS, c.sh.minus_lse[c.ring.stage]);
    wgmma_fence();
    gemm_abt<Element, T::kBlockM, T::kHeadDim, T::kKeys, T::kBlockM, T::kFromStats>(
        rS, c.k(), c.sh.q[c.ring.stage]);
    wgmma_commit();
  }
  FC_DEVICE static void issue_dp(const Consumer& c, ScoreTile& rdP) {
    c.sh.dout_ready[c.ring.stage].wait(c.ring.parity);
    if constexpr (T::kFromStats) set_columns(rdP, c.sh.minus_delta[c.ring.stage]);
    wgmma_fence();
    gemm_abt<Element, T::kBlockM, T::kHeadDimV, T::kKeys, T::kBlockM, T::kFromStats>(
        rdP, c.sh.v, c.sh.dout[c.ring.stage]);
    wgmma_commit();
  }

  // rP: what dV multiplies; rX: what dS is a multiple of, for the other consumer.
  FC_DEVICE static void probabilities(const Consumer& c, ScoreTile& rS, ProbTile& rP, ProbTile& rX,
                                      Step at) {
    Scores<T>::probabilities(c, rS, rP, at, at.m * T::kBlockM, c.sh.minus_lse[c.ring.stage]);
    hand_over(rX, rS);
  }

  // Issues dQ of this consumer's columns over the keys of both blocks, when their dS are there.
  FC_DEVICE static void issue_dq(const Consumer& c, DqProduct& rdQ, uint32_t parity) {
    constexpr int kPanelSize = T::kKeys * kPanelBytes, kCols = T::Dq::kProductCols;
    int const panel = T::Dq::panel(kIndex);  // of those whose dQ is made in this block
    c.sh.ds_ready[0].wait(parity);
    wgmma_fence();
    gemm_ab<Element, kCols, T::kKeys, T::kBlockM>(
        rdQ, c.sh.ds[0], c.k() + (c.rank * T::kPeerPanels + panel) * kPanelSize);
    gemm_ab<Element, kCols, T::kKeys, T::kBlockM, true>(rdQ, c.sh.peer_ds,
                                                        c.sh.peer_k + panel * kPanelSize);
    wgmma_commit();
  }
  // Both blocks may write dS again.
  FC_DEVICE static void release_ds(const Consumer& c) {
    __syncwarp();
    if (threadIdx.x % 32 < T::kCluster) arrive_in(c.sh.ds_free[0], threadIdx.x % 32);
  }
  FC_DEVICE static void put(const Consumer& c, Step at, DqProduct& rdQ, uint32_t parity) {
    int const part = T::dq_part(kIndex, c.rank);
    static_assert(T::Dq::kProductCols == T::Dq::kCols);  // it keeps all
    c.wait_turn(parity);
    put_dq<T, 0>(c.p, c.work(), part, at.head, at.m,
                 dq_sums<T, 0>(c.p, c.work(), part, at.head, at.m), rdQ, c.sh.redo);
    c.pass_turn();
  }

  // Query block m of one head, whose P is in rP; with kNext leaves the next one's there. Adds the
  // dQ of the step before, and leaves its own: handing P over comes first.
  template <bool kNext>
  FC_DEVICE static Step first_step(const Consumer& c, ProbTile& rP, ProbTile& rX, DqProduct& rdQ,
                                   Step at, Step before) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    ScoreTile rS;

    sh.dout_ready[stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDimV, T::kBlockM>(c.rdV, rP, sh.dout[stage]);
    wgmma_commit();
    sh.ds_free[0].wait(stage ^ 1);
    store_transposed(sh.ds[0], rX, 0);
    c.release(sh.p_ready);
    c.ring.advance();
    if constexpr (kNext) issue_s(c, rS);
    if (before.m >= 0) put(c, before, rdQ, c.ring.stage);
    Step const next = kNext ? c.step_after(at) : at;
    wgmma_wait<kNext ? 1 : 0>();
    pin(rP);
    c.release(sh.free[stage]);
    if constexpr (kNext) {
      wgmma_wait<0>();
      pin(rS);
      probabilities(c, rS, rP, rX, next);
      pin(rP);
    }
    pin(rdQ);
    issue_dq(c, rdQ, stage);
    wgmma_wait<0>();
    pin(rdQ);
    release_ds(c);
    return next;
  }

  // The same, with its dP in rdP or on the way there.
  template <bool kNext>
  FC_DEVICE static Step second_step(const Consumer& c, ScoreTile& rdP, DqProduct& rdQ, Step at) {
    typename T::Shared& sh = c.sh;
    int const stage = c.ring.stage;
    ProbTile rX, rdS;

    sh.p_ready.wait(stage);
    load_transposed(rX, sh.ds[0], 0);
    wgmma_wait<0>();
    pin(rdP);
    {
      ScoreTile multiple;
      take_over(multiple, rX);
      Scores<T>::gradients(c, rdP, multiple, at, at.m * T::kBlockM, sh.minus_delta[stage]);
    }
    pack_tile<Element>(rdS, rdP);
    sh.q_ready[stage].wait(c.ring.parity);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDim, T::kBlockM>(c.rdK, rdS, sh.q[stage]);
    wgmma_commit();
    store_transposed(sh.ds[0], rdS, 0);  // where this warp read P
    fence_async_shared();
    send_ds(c);
    Step next = kNext && !T::kLists ? c.step_after(at) : at;

    pin(rdQ);
    issue_dq(c, rdQ, stage);
    c.ring.advance();
    if constexpr (kNext) issue_dp(c, rdP);
    if constexpr (kNext && T::kLists) next = c.step_after(at);
    wgmma_wait<kNext ? 2 : 1>();
    c.release(sh.free[stage]);
    wgmma_wait<kNext ? 1 : 0>();
    pin(rdQ);
    release_ds(c);
    put(c, at, rdQ, stage);
    return next;
  }

  // When all warps of this consumer have stored dS: here it is, and a copy goes to the other block.
  FC_DEVICE static void send_ds(const Consumer& c) {
    named_barrier_sync_apart(T::kMeet, 128);
    if (threadIdx.x % 128 == 0) {
      c.sh.ds_ready[0].arrive_expect(T::kDsBytes);
      copy_to(c.rank ^ 1, c.sh.peer_ds, c.sh.ds[0], T::kDsBytes, c.sh.ds_ready[0]);
    }
    __syncwarp();
  }
};

}  // namespace flashcore::sm90::bwd
