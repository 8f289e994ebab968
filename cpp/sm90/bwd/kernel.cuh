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
#include "sm90/bwd/dq_order.cuh"
#include "sm90/bwd/finish_dq.cuh"
#include "sm90/bwd/halves.cuh"
#include "sm90/bwd/load.cuh"
#include "sm90/bwd/steps_by_cluster.cuh"
#include "sm90/bwd/steps_by_gradient.cuh"
#include "sm90/bwd/steps_by_keys.cuh"
#include "sm90/bwd/store.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct Kernel {
  using Element = typename T::Element;
  using Shared = typename T::Shared;
  using Stat = typename T::Stat;
  using Ring = tile::Ring<T::kStages>;
  template <bool kFirst>
  using Steps =
      std::conditional_t<T::kByCluster, StepsByCluster<T, kFirst>, StepsByGradient<T, kFirst>>;

  // ---- producer ---------------------------------------------------------------------------------
  FC_DEVICE static void produce(const BwdParams& p, Shared& sh) {
    release_registers<T::kProducerRegs>();
    if (!elect_one()) return;
    int const warp = threadIdx.x / 32;
    bool const plain = !T::kLists && p.plain;
    // A first tile that is dealt out is found before.
    if (warp > 0 || T::kLists || (T::kCluster > 1 && !plain)) wait_for_barriers();
    if (warp > 0 && !T::kLists) {
      if (warp > T::kConsumers) return;
      if constexpr (T::kByQueries) {
        if (p.dq_heads) FinishDq<T>(p).take(sh, warp - 1);
      } else {
        if (p.turns) keep_order<T>(p, sh, warp - 1, T::kCluster > 1 ? cluster_rank() : 0);
      }
      return;
    }
    if (warp > 1) return;
    prefetch_tensor_map(p.q.boxes);
    prefetch_tensor_map(p.k.boxes);
    prefetch_tensor_map(p.v.boxes);
    prefetch_tensor_map(p.dout.boxes);
    if constexpr (T::kLists)
      if (warp == 1) return find(p, sh);
    if (T::kTerms && p.dropout_threshold) sh.dropout = dropout_key(p);
    // Two copies: until the first tile is known all wait, and code that is passed over makes the
    // way there longer (docs/kernels/sm90_bwd.md, "Where tiles are few").
    if (plain)
      produce_tiles(p, sh, true);
    else
      produce_tiles(p, sh, false);
    wait_for_kernel_before();  // or there might be a next one before that has ended
    let_next_kernel_begin();
  }

  // Initialised by a consumer, so that the producer finds its first tile meanwhile. One lane of a
  // warp waits, the others have ended: a barrier counts warps.
  FC_DEVICE static void wait_for_barriers() {
    if constexpr (T::kCluster > 1)
      cluster_wait();
    else
      named_barrier_sync_apart(T::kProducersBegin, 128 + 32);
  }

  FC_DEVICE static void produce_tiles(const BwdParams& p, Shared& sh, bool plain) {
    Ring ring = Ring::producer();
    auto tiles = tile::Ring<T::kTilesOfK>::producer();
    tiles.advance();      // past the rehearsal
    uint32_t parity = 1;  // of what begins with the first tile; v_free begins with the rehearsal
    // The next tile is worked out before the wait for its place, and kept where it takes no
    // registers.
    if constexpr (!T::kLists) {
      sh.tiles = KeyTiles(blockIdx.x / T::kCluster, gridDim.x / T::kCluster);
      find_next(p, sh, parity, plain);
      if (T::kCluster == 1 || plain) wait_for_barriers();
    }
    for (;;) {
      if constexpr (T::kLists) sh.next_ready.wait(parity ^ 1);
      sh.k_free[tiles.stage].wait(tiles.parity);
      Work& work = sh.work[tiles.stage];
      copy(work, sh.next);
      if (work.key < 0) break;
      if (work.empty()) {
        if constexpr (T::kLists) sh.next_free.arrive();
        sh.v_free.wait(parity ^ 1);
        sh.k_ready[tiles.stage].arrive();
        end_phase(sh.v_ready, parity ^ 1);
        if (T::kByCluster) end_phase(sh.peer_k_ready, parity ^ 1);
      } else {
        load_tile(p, sh, tiles.stage, ring, parity ^ 1, plain);
      }
      tiles.advance();
      parity ^= 1;
      if constexpr (!T::kLists) find_next(p, sh, parity, plain);
    }
    sh.k_ready[tiles.stage].arrive();
  }

  // Of a tile without steps: nothing comes, and no consumer waits. The producer does, for which its
  // phase is over: compute-sanitizer takes one that nobody waited for for a mistake.
  FC_DEVICE static void end_phase(Barrier& ready, uint32_t parity) {
    ready.arrive();
    ready.wait(parity);
  }

  // With block lists: what comes next takes a chain of loads from memory, and is found out by a
  // thread that has nothing else to do, while the producer is at the tile before.
  FC_DEVICE static void find(const BwdParams& p, Shared& sh) {
    sh.tiles = KeyTiles(blockIdx.x / T::kCluster, gridDim.x / T::kCluster);
    uint32_t parity = 1;
    do {
      sh.next_free.wait(parity);
      find_next(p, sh, parity, false);
      parity ^= 1;
      asm volatile("" ::: "memory");  // all of it lies in shared memory: there are few registers
      if (sh.next.key >= 0) {
        sh.next_steps = typename T::ListSteps(p, sh.next);
        if (!sh.next_steps.next(p, sh.next, sh.next_note))
          sh.next.end = sh.next.begin;  // nothing is kept
      }
      sh.next_ready.arrive();
    } while (sh.next.key >= 0);
  }

  FC_DEVICE static void find_next(const BwdParams& p, Shared& sh, uint32_t parity, bool plain) {
    tile::Tile tile;
    if (next_tile(p, sh, tile, parity, plain))
      sh.next.set<T::kByQueries>(p, tile, sh.tiles.falling(), T::kBlockM, T::kBlockN,
                                 blockIdx.x / T::kCluster, plain);
    else
      sh.next.key = -1;
  }

  // Where tiles are of any length, and nobody knows it beforehand, or where they wait for one
  // another, whoever is done takes the next one, from a counter in memory.
  FC_DEVICE static bool next_tile(const BwdParams& p, Shared& sh, tile::Tile& tile, uint32_t parity,
                                  bool plain) {
    bool const takes = !plain && p.taken;
    if (takes) sh.tiles.at() = take(p, sh, parity);
    int const index = sh.tiles.at();
    if (!sh.tiles.next(p, T::kBlockN, tile, plain)) return false;
    if (takes) {
      p.taker[index] = static_cast<int>(blockIdx.x / T::kCluster);
      in_order(p, tile);
    }
    return true;
  }
  // In a cluster the first block does, and tells the other one.
  FC_DEVICE static int take(const BwdParams& p, Shared& sh, uint32_t parity) {
    if (T::kCluster > 1 && cluster_rank() > 0) {
      sh.taken_ready.arrive_expect(sizeof sh.taken);
      sh.taken_ready.wait(parity ^ 1);
      int const index = sh.taken;
      arrive_in(sh.taken_free, 0);
      return index;
    }
    int const index = atomicAdd(p.taken, 1) + 1;
    if constexpr (T::kCluster > 1) {
      sh.taken_free.wait(parity);
      store_to(1, sh.taken, index, sh.taken_ready);
    }
    return index;
  }
  // The longest lists come first.
  FC_DEVICE static void in_order(const BwdParams& p, tile::Tile& tile) {
    if (!T::kLists || !p.order) return;
    int const pair = tile.batch * p.scheduler.heads + tile.head;
    tile.m_block = p.order[pair * p.scheduler.m_blocks + tile.m_block];
  }

  // K, V and the query blocks in the order in which they are used.
  FC_DEVICE static void load_tile(const BwdParams& p, Shared& sh, int slot, Ring& ring,
                                  uint32_t v_parity, bool plain) {
    const Work& work = sh.work[slot];
    uint64_t const once = policy_evict_first(), shared_by_tiles = policy_evict_last();
    int const batch_q = !plain && p.cu_seqlens_q ? 0 : work.batch;
    int const batch_k = !plain && p.cu_seqlens_k ? 0 : work.batch;
    bool const cut_q = !plain && p.q.cut, cut_k = !plain && p.k.cut;  // dO and V alike
    int const rank = T::kByCluster ? cluster_rank() : 0, first_key = work.key + T::kKeys * rank;
    int const key = work.k_begin + first_key, keys = work.seqlen_k - first_key;
    load<T::kKeys, T::kPanels>(sh.k[slot], p.k, sh.k_ready[slot], key, keys, work.kv_head, batch_k,
                               once, cut_k);
    bool fresh = true;
    auto load_step = [&](int head, int m) {
      int64_t const stats = int64_t{head * p.head_blocks + work.stats + m} * T::kBlockM;
      int const s = ring.stage, row = work.q_begin + m * T::kBlockM;
      int const rows = work.seqlen_q - m * T::kBlockM;
      load<T::kBlockM, T::kPanels>(sh.q[s], p.q, sh.q_ready[s], row, rows, head, batch_q,
                                   shared_by_tiles, cut_q, sizeof sh.minus_lse[s]);
      // Only statistics come from the kernel before, which may still be at work; and cleared sums
      // of dQ and marks of what is to be repaired, which consumers write when these are here.
      if (fresh) wait_for_kernel_before();
      bulk_load(sh.minus_lse[s], stat_rows(p.minus_lse, p.lse_parts) + stats,
                sizeof sh.minus_lse[s], sh.q_ready[s]);
      if (fresh) {
        sh.v_free.wait(v_parity);
        load<T::kKeys, T::kPanelsV>(sh.v, p.v, sh.v_ready, key, keys, work.kv_head, batch_k, once,
                                    cut_k);
        if constexpr (T::kByCluster) {
          int const to_peer = T::kKeys * (1 - 2 * rank);
          load<T::kKeys, T::kPeerPanels>(sh.peer_k, p.k, sh.peer_k_ready, key + to_peer,
                                         keys - to_peer, work.kv_head, batch_k, once, cut_k, 0,
                                         rank * T::kPeerPanels * kPanelCols);
        }
        fresh = false;
      }
      load<T::kBlockM, T::kPanelsV>(sh.dout[s], p.dout, sh.dout_ready[s], row, rows, head, batch_q,
                                    shared_by_tiles, cut_q, sizeof sh.minus_delta[s]);
      bulk_load(sh.minus_delta[s], stat_rows(p.minus_delta, p.delta_parts) + stats,
                sizeof sh.minus_delta[s], sh.dout_ready[s]);
      ring.advance();
    };
    if constexpr (T::kLists) {
      copy(sh.steps, sh.next_steps);
      StepNote note, next = sh.next_note;
      sh.next_free.arrive();
      for (bool more = true; more;) {
        note = next;
        more = sh.steps.next(p, work, next);  // found out while the stage is still in use
        note.last = !more;
        sh.free[ring.stage].wait(ring.parity);
        sh.note[ring.stage + static_cast<int>(ring.parity ^ 1) * T::kStages] = note;
        load_step(note.head, note.m);
      }
    } else {
      for (int m = work.begin; m != work.end; m += work.stride)
        for (int head = work.kv_head * p.group; head < (work.kv_head + 1) * p.group; ++head) {
          sh.free[ring.stage].wait(ring.parity);
          load_step(head, m);
        }
    }
  }

  FC_DEVICE static const Stat* stat_rows(const float* plain, const StatParts* parts) {
    if constexpr (T::kStatProducts)
      return parts;
    else
      return plain;
  }

  // kRows rows from column `col` on, one box per panel; `more` bytes will come with them.
  // Rows past the end of the sequence become zeros, whatever is there: what they are multiplied
  // with is zero, and 0 * NaN is not. Columns past the end do, too.
  template <int kRows, int kPanels>
  FC_DEVICE static void load(char* smem, const TensorMaps& maps, Barrier& ready, int row, int valid,
                             int head, int batch, uint64_t policy, bool cut, int more = 0,
                             int col = 0) {
    ready.arrive_expect(kRows * kPanels * kPanelBytes + more);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      load_rows(smem + panel * kRows * kPanelBytes, maps, ready, kRows, col + panel * kPanelCols,
                row, valid, head, batch, policy, cut);
  }

  // ---- consumers --------------------------------------------------------------------------------
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
      in_order(p, tile);
      work.set<T::kByQueries>(p, tile, tiles.falling(), T::kBlockM, T::kBlockN, slot);
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
  if (warpgroup_index() == 0) return Kernel<T>::produce(p, sh);
  if constexpr (T::kCluster > 1) {
    cluster_wait();
  } else {
    if (warp_index() == 4) named_barrier_arrive(T::kProducersBegin, 128 + 32);
    named_barrier_sync(T::kBegin, T::kConsumerThreads);
  }
  Kernel<T>::consume(p, sh);
}

}  // namespace flashcore::sm90::bwd
