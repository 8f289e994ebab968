// The producer of the backward kernel: finds the tiles, and tells the copy engine to fetch K, V and
// the blocks of Q and dO. Beside it a warp for each consumer deals with other blocks for it:
// dq_order.cuh, finish_dq.cuh.
#pragma once
#include "sm90/bwd/dq_order.cuh"
#include "sm90/bwd/finish_dq.cuh"
#include "sm90/bwd/load.cuh"
#include "sm90/bwd/traits.cuh"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90::bwd {

template <class T>
class Producer {
  using Shared = typename T::Shared;
  using Stat = typename T::Stat;
  using Ring = tile::Ring<T::kStages>;

 public:
  FC_DEVICE static void run(const BwdParams& p, Shared& sh) {
    release_registers<T::kProducerRegs>();
    if (!elect_one()) return;
    int const warp = threadIdx.x / 32;
    bool const plain = !T::kLists && !T::kLaps && p.plain;
    // A first tile that is dealt out is found before.
    if (warp > 0 || T::kLists || (T::kCluster > 1 && !plain)) wait_for_barriers();
    constexpr int kFirst = T::kLists ? 2 : 1;  // with block lists the first one finds tiles
    if (int const consumer = warp - kFirst; consumer >= 0) {
      if (consumer >= T::kConsumers) return;
      if constexpr (T::kByQueries) {
        if (p.dq_heads) FinishDq<T>(p).take(sh, consumer);
      } else if (p.turns) {
        int const rank = T::kCluster > 1 ? cluster_rank() : 0;
        if constexpr (T::kLists)
          keep_order_of_lists<T>(p, sh, consumer, rank);
        else
          keep_order<T>(p, sh, consumer, rank);
      }
      return;
    }
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

 private:
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
      sh.next.set<T::kByQueries, T::kLaps>(p, tile, sh.tiles.falling(), T::kBlockM, T::kBlockN,
                                           blockIdx.x / T::kCluster, plain);
    else
      sh.next.key = -1;
  }

  // Where tiles are of any length, and nobody knows it beforehand, or where they wait for one
  // another and do not go round, whoever is done takes the next one, from a counter in memory.
  FC_DEVICE static bool next_tile(const BwdParams& p, Shared& sh, tile::Tile& tile, uint32_t parity,
                                  bool plain) {
    if constexpr (T::kLaps) return sh.tiles.next_in_laps(p, tile);
    bool const takes = !plain && p.taken;
    if (takes) sh.tiles.at() = take(p, sh, parity);
    int const index = sh.tiles.at();
    if (!sh.tiles.next(p, T::kBlockN, tile, plain)) return false;
    if (takes) {
      p.taker[index] = static_cast<int>(blockIdx.x / T::kCluster);
      in_order<T>(p, tile);
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
        int const slot = ring.stage + static_cast<int>(ring.parity ^ 1) * T::kStages;
        sh.note[slot] = note;
        if (p.turns) sh.noted[slot].arrive();
        load_step(note.head, note.m);
      }
    } else {
      for (int m = work.begin; m != work.end; m += work.stride)
        for (int head = work.kv_head * p.group; head < (work.kv_head + 1) * p.group; ++head) {
          sh.free[ring.stage].wait(ring.parity);
          if constexpr (T::kLaps)
            load_step(head, p.laps.block(m));
          else
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
};

}  // namespace flashcore::sm90::bwd
