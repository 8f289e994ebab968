// FlashAttention backward, Hopper (sm_90a): dK, dV of one tile of keys, and its share of dQ.
//
//     P = exp(scale Q K^T - lse)    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)
//     dK = scale dS^T Q             dQ = scale dS K
//
// Roles (128 * (1 + kConsumers) threads, one block per SM)
//     warpgroup 0     producer   one thread tells the copy engine to fetch K, V; then Q, dO blocks
//     warpgroup 1, 2  consumers  their part of dK and dV stays in registers for the whole tile
//
// One step is one block of query rows of one query head: steps_by_keys.cuh, steps_by_gradient.cuh,
// steps_by_cluster.cuh.
// A tile takes all query heads that share its key head, so dK and dV need no sums in memory. dQ
// does (dq.cuh). The tile loop is persistent: rings keep stage and parity across tiles, so the
// producer fetches the next tile's Q and dO while consumers store this one's dK and dV (where
// queries are divided, when those are added up).
#pragma once
#include "sm90/bwd/finish_dq.cuh"
#include "sm90/bwd/halves.cuh"
#include "sm90/bwd/producer.cuh"
#include "sm90/bwd/steps_by_cluster.cuh"
#include "sm90/bwd/steps_by_gradient.cuh"
#include "sm90/bwd/steps_by_keys.cuh"
#include "sm90/bwd/store.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct Kernel {
  using Element = typename T::Element;
  using Shared = typename T::Shared;
  using Ring = tile::Ring<T::kStages>;
  template <bool kFirst>
  using Steps =
      std::conditional_t<T::kByCluster, StepsByCluster<T, kFirst>, StepsByGradient<T, kFirst>>;

  FC_DEVICE static void consume(const BwdParams& p, Shared& sh) {
    claim_registers<T::kConsumerRegs>();
    int const consumer = warpgroup_index() - 1;
    Ring ring = Ring::consumer();
    int const rank = T::kCluster > 1 ? cluster_rank() : 0;
    tile::Ring<T::kDsBuffers> ds = tile::Ring<T::kDsBuffers>::consumer();
    auto tiles = tile::Ring<T::kTilesOfK>::consumer();
    [[maybe_unused]] uint32_t sums_parity = 0;
    for (;; tiles.advance()) {
      sh.k_ready[tiles.stage].wait(tiles.parity);
      // Of barriers of which there is one: alternates from tile to tile. V's do not count the
      // rehearsal.
      static_assert(T::kTilesOfK <= 2);
      uint32_t const parity = T::kTilesOfK > 1 ? tiles.stage : tiles.parity;
      if (sh.work[tiles.stage].key < 0) break;
      typename T::GradientTile gradients[T::kByKeys ? 2 : 1];
      auto &rdK = gradients[0], &rdV = gradients[T::kByKeys ? 1 : 0];
#pragma unroll
      for (int i = 0; i < T::kHeadDim / 2; ++i) rdK[i] = rdV[i] = 0.0f;
      Consumer<T> c{p, sh, consumer, rank, tiles.stage, ring, ds, rdK, rdV, {}};
      if constexpr (T::kPassesOver) c.own = c.find_own();
      if constexpr (T::kByQueries)
        tile_by_queries(c, parity, sums_parity);
      else if constexpr (T::kByKeys)
        tile_by_keys(c, parity);
      else
        tile_of_one(c, parity);
    }
    if constexpr (T::kByQueries)
      if (p.dq_heads) FinishDq<T>(p).store(sh);
    if constexpr (!T::kLaps)  // without a mask there is nothing to repair
      if (sh.redo[threadIdx.x / 32 - 4]) repair(p, consumer, rank);
    if constexpr (T::kCluster > 1) cluster_sync();  // the other block may still arrive here
  }

  // A tile whose keys are divided among the consumers. Each stores dV by way of its own rows of V,
  // before dQ of the last step, for which it may have to wait; and dK in the same way, unless the
  // next tile waits for V alone.
  FC_DEVICE static void tile_by_keys(const Consumer<T>& c, uint32_t parity) {
    int redo = 0;
    bool const empty = c.work().empty(), by_way_of_v = c.p.boxes;
    typename Consumer<T>::Step last{};
    if (!empty) last = StepsByKeys<T>::run(c, parity);
    if (!by_way_of_v) c.release(c.sh.v_free);
    redo |= store_dv(c, c.work());
    if (by_way_of_v && !T::kDkByWayOfV) release_v(c);
    if (!empty) StepsByKeys<T>::finish(c, last);
    Work const work = c.work();
    __syncwarp();
    c.release(c.sh.k_free[c.tile]);
    redo |= store_dk(c, work);
    note_redo(c, work, redo);
    if (by_way_of_v && T::kDkByWayOfV) release_v(c);
  }
  // When the copy engine has read what lies there.
  FC_DEVICE static void release_v(const Consumer<T>& c) {
    if (elect_one()) tma_store_wait_read();
    c.release(c.sh.v_free);
  }
  // One whose queries are divided between two blocks.
  FC_DEVICE static void tile_by_queries(const Consumer<T>& c, uint32_t parity,
                                        uint32_t& sums_parity) {
    bool const empty = c.work().empty(), shared = c.work().visited();
    typename Consumer<T>::Step last{};
    if (!empty) last = StepsByKeys<T>::run(c, parity);
    if (shared) Halves<T>::make_room(c);
    if (!empty) StepsByKeys<T>::finish(c, last);
    // All it adds to dQ is added.
    if (c.p.dq_heads && !c.work().rehearsed()) c.release(c.sh.added[c.index]);
    Work const work = c.work();
    __syncwarp();
    // At once, so that the first K comes in spite of the rehearsal.
    if (!shared) c.release(c.sh.k_free[c.tile]);
    int redo = 0;
    if (c.rank == 0) {
      if (shared) Halves<T>::add_up(c, c.rdV, c.rdK, sums_parity);
      redo = store_dv(c, work);
    } else {
      if (shared) Halves<T>::add_up(c, c.rdK, c.rdV, sums_parity);
      redo = store_dk(c, work);
    }
    if (shared) {
      c.release(c.sh.k_free[c.tile]);
      sums_parity ^= 1;
    }
    note_redo(c, work, redo);
    release_v(c);
  }
  // One whose gradients are: the first consumer has dV, the second dK.
  FC_DEVICE static void tile_of_one(const Consumer<T>& c, uint32_t parity) {
    if (c.work().empty())
      c.release(c.sh.v_free);
    else if (c.index == 0)
      Steps<true>::run(c, parity);
    else
      Steps<false>::run(c, parity);
    Work const work = c.work();
    __syncwarp();
    c.release(c.sh.k_free[c.tile]);
    int redo = 0;
    if (c.index == 0) redo |= store_dv(c, work);
    if (c.index == 1) redo |= store_dk(c, work);
    note_redo(c, work, redo);
  }

  // Which of the two this warp leaves to repair: bit 1.
  FC_DEVICE static int store_dv(const Consumer<T>& c, const Work& work) {
    float const scale = T::kTerms ? c.p.dropout_scale : 1.0f;
    return store<T::kByKeys>(c, work, c.p.dv, c.p.dv_boxes, c.rdV, scale, c.p.head_dim_v) ? 2 : 0;
  }
  // Bit 0.
  FC_DEVICE static int store_dk(const Consumer<T>& c, const Work& work) {
    return store<T::kDkByWayOfV>(c, work, c.p.dk, c.p.dk_boxes, c.rdK, c.p.scale, c.p.head_dim) ? 1
                                                                                                : 0;
  }
  // True: it is not finite, and a mask may be to blame.
  template <bool kByWayOfV>
  FC_DEVICE static bool store(const Consumer<T>& c, const Work& work, const Matrix& to,
                              const CUtensorMap& boxes, const typename T::GradientTile& x,
                              float scale, int cols) {
    const BwdParams& p = c.p;
    if (!to.data) return false;
    if (p.redo_keys && broken(x)) return true;
    if constexpr (kByWayOfV)
      if (p.boxes) {
        int const row = T::first_key(c.index, c.rank) + warp_index() % 4 * 16;
        int const key = work.key + row;
        store_boxes<Element, T::kKeys>(boxes, to, p.cu_seqlens_k, c.sh.v, row, x, scale, work.batch,
                                       work.kv_head, work.k_begin + key, work.seqlen_k - key,
                                       work.written_k - key, cols);
        return false;
      }
    int const key = work.key + T::first_key(c.index, c.rank);
    store_rows<Element>(to, p.accumulate, x, scale, work.batch, work.kv_head,
                        int64_t{work.k_begin} + key, work.seqlen_k - key, work.written_k - key, 0,
                        cols);
    return false;
  }
  FC_DEVICE static void note_redo(const Consumer<T>& c, const Work& work, int redo) {
    if (c.p.redo_keys && work.key < work.written_k && threadIdx.x % 32 == 0) {
      int const warp = threadIdx.x / 32 - 4;
      *redo_keys<T>(c.p, work, c.rank, warp) = static_cast<uint8_t>(redo);
      if (redo) c.sh.redo[warp] = true;
    }
    __syncwarp();
  }

  // What this warp left out, tile by tile; of whole heads also dQ, with the first tile.
  FC_DEVICE static void repair(const BwdParams& p, int consumer, int rank) {
    using Repair = bwd::Repair<T>;
    int const warp = threadIdx.x / 32 - 4;
    int const part = T::dq_part(consumer, rank);
    int const slot = blockIdx.x / T::kCluster;
    KeyTiles tiles(p.taken ? 0 : slot, p.taken ? 1 : gridDim.x / T::kCluster);
    Work work;
    for (tile::Tile tile; tiles.next(p, T::kBlockN, tile);) {
      if (p.taken && p.taker[tiles.at() - 1] != slot) continue;
      in_order<T>(p, tile);
      work.set<T::kByQueries, T::kLaps>(p, tile, tiles.falling(), T::kBlockM, T::kBlockN, slot);
      int const key = work.key + T::first_key(consumer, rank) + warp % 4 * 16;
      if (int const redo = *redo_keys<T>(p, work, rank, warp))
        for (int j = key; j < min_of(key + 16, work.written_k); ++j)
          Repair::key_row(p, work, j, redo & 1, redo & 2);
      if (!p.redo_queries || tile.m_block > 0) continue;
      int const row = T::Dq::row(part) + warp % 4 * 16, col = T::Dq::col(part);
      for (int head = work.kv_head * p.group; head < (work.kv_head + 1) * p.group; ++head)
        for (int m = 0; m * T::kBlockM < work.written_q; ++m)
          for (int half = T::kByCluster ? rank : 0; half < (T::kByCluster ? rank + 1 : 2); ++half)
            if (*redo_queries(p, work, head, m, warp * 2 + half)) {
              int const from = col + (T::kByCluster ? 0 : half * T::kDqPutCols);
              Repair::dq_rows(p, work.batch, head, m * T::kBlockM + row, 16, from,
                              min_of(from + T::kDqPutCols, p.head_dim));
            }
    }
  }

  // Before the first tile there is one that is not there. Consumers store none of it, but run what
  // they run at a tile's end, which takes longer the first time; and until the first K and Q are
  // here they have nothing else to do.
  FC_DEVICE static void rehearse(Shared& sh) {
    sh.work[0] = Work::past_the_end();
    sh.k_ready[0].arrive();
  }

  FC_DEVICE static void init_barriers(const BwdParams& p, Shared& sh) {
    constexpr int kConsumerWarps = 4 * T::kConsumers;
    for (bool& redo : sh.redo) redo = false;
    for (int t = 0; t < T::kTilesOfK; ++t) {
      sh.k_ready[t].init(1);
      sh.k_free[t].init(kConsumerWarps + (p.turns ? T::kConsumers : 0));
    }
    sh.v_ready.init(1);
    sh.v_free.init(kConsumerWarps);
    sh.peer_k_ready.init(1);
    sh.peer_has_room.init(kConsumerWarps);
    sh.sums_ready.init(1);
    sh.next_ready.init(1);
    sh.next_free.init(1);
    sh.p_ready.init(4);
    for (int s = 0; s < T::kDsBuffers; ++s) {
      sh.ds_ready[s].init(T::kByCluster ? 1 : kConsumerWarps);
      sh.ds_free[s].init(kConsumerWarps * (T::kByCluster ? T::kCluster : 1));
    }
    for (int s = 0; s < T::kStages; ++s) {
      sh.q_ready[s].init(1);
      sh.dout_ready[s].init(1);
      sh.free[s].init(kConsumerWarps);
    }
    for (int c = 0; c < T::kConsumers; ++c) {
      sh.turn[c].init(1);
      sh.added[c].init(4);
    }
    for (Barrier& noted : sh.noted) noted.init(1);
    sh.taken_ready.init(1);
    sh.taken_free.init(1);
    fence_barrier_init();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    flash_bwd_sm90(const __grid_constant__ BwdParams p) {
  extern __shared__ __align__(1024) char smem[];
  auto& sh = *reinterpret_cast<typename T::Shared*>(smem);
  if (threadIdx.x == 128) {
    Kernel<T>::init_barriers(p, sh);
    Kernel<T>::rehearse(sh);
  }
  if constexpr (T::kCluster > 1) cluster_arrive();
  if (warpgroup_index() == 0) return Producer<T>::run(p, sh);
  if constexpr (T::kCluster > 1) {
    cluster_wait();
  } else {
    if (warp_index() == 4) named_barrier_arrive(T::kProducersBegin, 128 + 32);
    named_barrier_sync(T::kBegin, T::kConsumerThreads);
  }
  Kernel<T>::consume(p, sh);
}

}  // namespace flashcore::sm90::bwd
