// FlashAttention forward, Hopper (sm_90a).
//
//     O = softmax(scale * Q K^T, visible keys) V,   LSE = log sum exp
//
// One tile is 64 query rows per consumer warpgroup of a team.
// Roles (128 * (1 + kTeams * kConsumers) threads, one block per SM)
//     warpgroup 0     producers  one thread of warp t tells the copy engine what team t needs
//     warpgroup 1..n  consumers  S = Q K^T -> online softmax -> O += P V, 64 rows each
//
// Key blocks run from last to first, so that the blocks a mask cuts come first and the row maximum
// is known early. One step of a consumer (docs/kernels/sm90_fwd.md has the drawing):
//     tensor cores   S(j) = Q K(j)^T | O += P(j+1) V(j+1)
//     other units                    | mask, exponentials of S(j)
//
// A block may hold several teams, each a producer warp and its consumers, which share nothing but
// the multiprocessor: tiles of their own, rings of their own.
//
// Shared memory of a team: Q[kQStages] | K[kStages] | V[kStages] | O staging | Work[kQStages] |
// barriers.
// The tile loop is persistent: the rings keep their stage and parity across tiles, so the producer
// fetches the next tile's Q, K and V while consumers finish this one.
#pragma once
#include "sm90/fwd/epilogue.cuh"
#include "sm90/fwd/producer.cuh"
#include "sm90/fwd/repair.cuh"
#include "sm90/fwd/scores.cuh"
#include "sm90/fwd/softmax.cuh"
#include "sm90/fwd/tiles.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/fwd/work.cuh"
#include "tile/pipeline.h"

namespace flashcore::sm90::fwd {

template <class T>
struct Kernel {
  using Element = typename T::Element;
  using Shared = typename T::Shared;
  using Ring = tile::Ring<T::kStages, T::kStages == 2>;
  using QRing = tile::Ring<T::kQStages>;
  using Scores = fwd::Scores<T>;
  using OnlineSoftmax = fwd::OnlineSoftmax<T::kSumTells>;

  FC_DEVICE static void consume(const FwdParams& p, Shared* teams) {
    if constexpr (T::kRegistersMove) claim_registers<T::kConsumerRegs>();
    int const warpgroup = warpgroup_index() - 1;
    int const team = T::kTeams == 1 ? 0 : warpgroup / T::kConsumers;
    int const consumer = warpgroup - team * T::kConsumers;
    Shared& sh = teams[team];
    int const warp = warp_index() % 4, lane = threadIdx.x % 32;
    int const warp_row = 64 * consumer + 16 * warp;  // of the tile
    if (consumer == T::kConsumers - 1) pass_turn();  // the first turn is consumer 0's

    Ring k = Ring::consumer(), v = Ring::consumer();
    QRing q = QRing::consumer();
    float probe = 0.0f;  // NaN once an output was not finite
    for (;; q.advance()) {
      sh.q_ready[q.stage].wait(q.parity);
      Work const work = sh.work[q.stage];
      if (work.row < 0) break;

      typename T::OutputTile rO;
#pragma unroll
      for (float& x : rO) x = 0.0f;
      OnlineSoftmax softmax{p.scale_log2, p.headroom};
      if (work.empty()) {
        __syncwarp();  // all lanes have read `work`
        release(sh.q_free[q.stage]);
      } else
        attend(p, sh, work, sh.q[q.stage] + 64 * consumer * kPanelBytes, sh.q_free[q.stage],
               warp_row + lane / 4, work.seen(64 * (consumer + 1)), k, v, softmax, rO);

      int const row = work.row + warp_row + lane / 4;
      bool const valid[2] = {row < work.seqlen_q, row + 8 < work.seqlen_q};
      softmax.finish(rO, p.scale, T::kTerms ? p.dropout_scale : 1.0f, valid,
                     p.sinks && work.split == 0 ? p.sinks + work.head : nullptr);
      if (T::kSumTells || T::kMask != Mask::none || p.ragged()) probe += finite_probe(rO);
      store_o<T>(p, sh, work, rO, warp_row);
      if (lane % 4 == 0) store_lse(p, work, softmax, row);
    }

    // The copy engine reads this block's shared memory until the last store has left.
    if (T::kStaged && elect_one()) tma_store_wait_read();
    if (__any_sync(0xffffffffu, !(probe == 0.0f))) {
      if (elect_one()) tma_store_wait();
      __syncwarp();
      Work work;
      auto tiles = [&] {
        if constexpr (T::kLists)
          return TakenBefore<T>(team);
        else
          return DealtTiles<T>(p, team, p.alike);
      }();
      while (tiles.next(p, work)) Repair<T>::rows(p, work, work.row + warp_row);
    }
  }

  // row: of the sequence, the first of this thread's two.
  FC_DEVICE static void store_lse(const FwdParams& p, const Work& work,
                                  const OnlineSoftmax& softmax, int row) {
    int const rows = p.cu_seqlens_q ? work.seqlen_q : p.seqlen_q;
    float* const lse = lse_rows(p, work);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (lse && row + 8 * r < rows) lse[row + 8 * r] = softmax.lse[r];
  }

  // All key blocks of one tile. thread_row: the first of this thread's two rows, of the tile. seen:
  // where the keys end that a row of this consumer sees.
  FC_DEVICE static void attend(const FwdParams& p, Shared& sh, const Work& work, MatrixAt sQ,
                               Barrier& q_free, int thread_row, int seen, Ring& k, Ring& v,
                               OnlineSoftmax& softmax, typename T::OutputTile& rO) {
    typename T::ScoreTile rS;
    typename T::ProbTile rP;
    Scores const scores(p, work, thread_row);
    MatrixAt const sK = kept(MatrixAt(sh.k[0])), sV = kept(MatrixAt(sh.v[0]));

    int visit = work.last - 1, skipped = 0;
    if constexpr (T::kSkips)
      for (; visit > work.first && visit * T::kBlockN >= seen; --visit, ++skipped) {
        sh.k_ready[k.stage].wait(k.parity);
        take_turn();
        pass_turn();
        release(sh.k_free[k.stage]);
        k.advance();
      }
    if (T::kHalves && visit * T::kBlockN + T::kBlockN / 2 >= seen)
      last_block<T::kBlockN / 2>(p, sh, work, scores, sQ, sK, k, softmax, rS, rP, visit);
    else
      last_block<T::kBlockN>(p, sh, work, scores, sQ, sK, k, softmax, rS, rP, visit);
    for (; skipped > 0; --skipped) {
      sh.v_ready[v.stage].wait(v.parity);
      release(sh.v_free[v.stage]);
      v.advance();
    }

    // Blocks that a mask cuts come first and last; in between nobody asks.
    int const full =
        kept(T::kMask == Mask::none ? work.first : max_of(work.first, work.first_full));
    for (--visit; visit >= work.first;)
      if (T::kMask != Mask::none && work.cut(visit))
        step<true>(p, sh, work, scores, sQ, sK, sV, k, v, softmax, rS, rP, rO, visit--);
      else
        do step<false>(p, sh, work, scores, sQ, sK, sV, k, v, softmax, rS, rP, rO, visit--);
        while (visit >= full);

    release(q_free);  // the producer may fetch the next tile's Q over this one

    // The first block's P V: there is no Q K^T left to overlap with.
    sh.v_ready[v.stage].wait(v.parity);
    pin(rO);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDimV, T::kBlockN>(rO, rP, sV + v.stage * T::kVBytes);
    wgmma_commit();
    wgmma_wait<0>();
    pin(rO);
    release(sh.v_free[v.stage]);
    v.advance();
  }

  // The last key block, or the first kKeys of it: there is no P V yet to overlap with.
  template <int kKeys>
  FC_DEVICE static void last_block(const FwdParams& p, Shared& sh, const Work& work,
                                   const Scores& scores, MatrixAt sQ, MatrixAt sK, Ring& k,
                                   OnlineSoftmax& softmax, typename T::ScoreTile& rS,
                                   typename T::ProbTile& rP, int visit) {
    auto& s = reinterpret_cast<float (&)[kKeys / 2]>(rS);
    sh.k_ready[k.stage].wait(k.parity);
    int const j = key_block(sh, k, visit);
    take_turn();
    wgmma_fence();
    gemm_abt<Element, kKeys, T::kHeadDim, T::kBlockM, T::kBlockN>(s, sQ, sK + k.stage * T::kKBytes);
    wgmma_commit();
    pass_turn();
    wgmma_wait<0>();
    pin(s);
    release(sh.k_free[k.stage]);
    k.advance();
    scores.terms.apply(p, s, j * T::kBlockN);
    if (work.cut(visit)) scores.exclude(work, s, visit, j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.template raise<true>(s, r);
      softmax.exponentiate(s, r);
    }
    softmax.trust(!(work.cut(visit) && cuts(work, j)));
    scores.to_probabilities(p, rP, s, j);
#pragma unroll
    for (int i = kKeys / 4; i < T::kBlockN / 4; ++i) rP[i] = 0;
  }

  // One key block: S(j) = Q K(j)^T overlaps O += P(j+1) V(j+1), which overlaps softmax(j).
  template <bool kCut>
  FC_DEVICE static void step(const FwdParams& p, Shared& sh, const Work& work, const Scores& scores,
                             MatrixAt sQ, MatrixAt sK, MatrixAt sV, Ring& k, Ring& v,
                             OnlineSoftmax& softmax, typename T::ScoreTile& rS,
                             typename T::ProbTile& rP, typename T::OutputTile& rO, int visit) {
    sh.k_ready[k.stage].wait(k.parity);
    int const j = key_block(sh, k, visit);
    take_turn();
    wgmma_fence();
    gemm_abt<Element, T::kBlockN, T::kHeadDim, T::kBlockM>(rS, sQ, sK + k.stage * T::kKBytes);
    wgmma_commit();
    sh.v_ready[v.stage].wait(v.parity);
    pin(rO);
    wgmma_fence();
    gemm_pb<Element, T::kHeadDimV, T::kBlockN>(rO, rP, sV + v.stage * T::kVBytes);
    wgmma_commit();
    pass_turn();

    wgmma_wait<1>();  // S(j) is complete, O may still be running
    pin(rS);
    release(sh.k_free[k.stage]);
    k.advance();
    scores.terms.apply(p, rS, j * T::kBlockN);
    if constexpr (kCut) scores.exclude(work, rS, visit, j);
    // Row 0 before, row 1 after the wait for O. The branch between matters even where nothing is
    // raised: without it the compiler would move the wait up to the first exponential, and nothing
    // would overlap; so it asks for the sum of row 0, which is never negative. Warps may take
    // branches apart, so they hold no wait for products.
    int raises1 = 0;
    if constexpr (T::kSumTells) {
      bool const cut = kCut && cuts(work, j);
      if (softmax.in_doubt(cut)) {
        if (softmax.exceeds(rS, 0)) softmax.template raise<false>(rS, 0);
        raises1 = softmax.exceeds(rS, 1);
        softmax.trust(!cut);
      }
      softmax.exponentiate(rS, 0);
      raises1 = __any_sync(0xffffffffu, raises1 || softmax.row_sum[0] < 0.0f);
    } else {
      if (softmax.exceeds(rS, 0)) softmax.template raise<false>(rS, 0);
      softmax.exponentiate(rS, 0);
      raises1 = softmax.exceeds(rS, 1, softmax.row_sum[0]);
    }
    if (raises1) softmax.template raise<false>(rS, 1);
    wgmma_wait<0>();
    pin(rO);
    release(sh.v_free[v.stage]);
    v.advance();
    if (softmax.raised) rescale(rO, softmax);
    softmax.exponentiate(rS, 1);
    scores.to_probabilities(p, rP, rS, j);  // only now: P(j+1) V(j+1) was reading rP
    pin(rP);
  }

  // Whether a key block that is cut for the tile is for this consumer's rows. What these do must
  // not depend on the others: the same bits come of tiles of any size, of a mask's blocks of any
  // size.
  FC_DEVICE static bool cuts(const Work& work, int j) {
    if constexpr (T::kConsumers == 1) return true;
    int const begin = 64 * ((threadIdx.x / 128 - 1) % T::kConsumers);
    return work.cut(j * T::kBlockN, T::kBlockN, begin, begin + 64);
  }

  // Which key block is in the stage. To be read before it is released.
  FC_DEVICE static int key_block(const Shared& sh, const Ring& k, int visit) {
    if constexpr (T::kLists)
      return *const_cast<const volatile int*>(&sh.block[k.stage]);
    else
      return visit;
  }

  FC_DEVICE static void rescale(typename T::OutputTile& rO, OnlineSoftmax& softmax) {
#pragma unroll
    for (int i = 0; i < T::kHeadDimV / 2; ++i) rO[i] *= softmax.factor[i / 2 % 2];
    softmax.factor[0] = softmax.factor[1] = 1.0f;
    softmax.raised = 0;
  }

  // Consumers issue their products in turn, so that one computes its softmax while the tensor cores
  // work for another, instead of all at once. Each consumer takes one turn per key block.
  FC_DEVICE static void take_turn() {
    if constexpr (T::kTurns) named_barrier_sync(T::kTurn + threadIdx.x / 128 - 1, 256);
  }
  FC_DEVICE static void pass_turn() {
    if constexpr (T::kTurns) named_barrier_arrive(T::kTurn + 2 - threadIdx.x / 128, 256);
  }

  // One arrival per warp: the warps of a warpgroup may be apart.
  FC_DEVICE static void release(Barrier& free) {
    if (threadIdx.x % 32 == 0) free.arrive();
  }

  // Before the first tile there is one that is not there. Consumers store none of it, but run what
  // they run at a tile's end, which takes longer the first time; and until the first Q and K are
  // here they have nothing else to do.
  FC_DEVICE static void rehearse(Shared& sh) {
    sh.work[0] = Work::past_the_end();
    sh.q_ready[0].arrive();
  }

  FC_DEVICE static void init_barriers(Shared& sh) {
    constexpr int kConsumerWarps = 4 * T::kConsumers;
    sh.found_ready.init(1);
    sh.found_free.init(1);
    for (int s = 0; s < T::kQStages; ++s) {
      sh.q_ready[s].init(1);
      sh.q_free[s].init(kConsumerWarps);
    }
    for (int s = 0; s < T::kStages; ++s) {
      sh.k_ready[s].init(1);
      sh.v_ready[s].init(1);
      sh.k_free[s].init(kConsumerWarps);
      sh.v_free[s].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    flash_fwd_sm90(const __grid_constant__ FwdParams p) {
  extern __shared__ __align__(1024) char smem[];
  auto* const teams = reinterpret_cast<typename T::Shared*>(smem);
  if (threadIdx.x < T::kTeams) {
    Kernel<T>::init_barriers(teams[threadIdx.x]);
    Kernel<T>::rehearse(teams[threadIdx.x]);
  }
  __syncthreads();
  if (warpgroup_index() == 0)
    Producer<T>::run(p, teams);
  else
    Kernel<T>::consume(p, teams);
}

}  // namespace flashcore::sm90::fwd
