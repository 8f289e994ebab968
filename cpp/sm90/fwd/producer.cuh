// The producer of the forward kernel: tells the copy engine to fetch Q, K and V, tile after tile.
#pragma once
#include "sm90/fwd/load.cuh"
#include "sm90/fwd/tiles.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/fwd/work.cuh"
#include "sm90/ptx/launch.cuh"
#include "tile/pipeline.h"

namespace flashcore::sm90::fwd {

template <class T>
class Producer {
  using Shared = typename T::Shared;
  using Ring = tile::Ring<T::kStages>;
  using QRing = tile::Ring<T::kQStages>;

 public:
  FC_DEVICE static void run(const FwdParams& p, Shared* teams) {
    if constexpr (T::kRegistersMove) release_registers<T::kProducerRegs>();
    int const warp = threadIdx.x / 32, team = warp % T::kTeams;
    if (warp >= T::kTeams * (T::kFinders ? 2 : 1) || !elect_one()) return;
    Shared& sh = teams[team];
    if constexpr (T::kLists) wait_for_kernel_before();
    if constexpr (T::kFinders)
      if (warp >= T::kTeams) return find(p, sh, team);
    prefetch_tensor_map(p.q);
    prefetch_tensor_map(p.k);
    prefetch_tensor_map(p.v);
    prefetch_tensor_map(p.out);
    // Two copies: until the first tile is known all wait, and code that is passed over makes the
    // way there longer (docs/kernels/sm90_bwd.md, "Where tiles are few"). With block lists it is
    // long anyhow.
    if (!T::kLists && p.alike)
      produce_tiles(p, sh, team, true);
    else
      produce_tiles(p, sh, team, false);
  }

 private:
  FC_DEVICE static void produce_tiles(const FwdParams& p, Shared& sh, int team, bool alike) {
    uint64_t const once = policy_evict_first(), shared_by_tiles = policy_evict_last();

    Ring k = Ring::producer(), v = Ring::producer();
    QRing q = QRing::producer();
    q.advance();  // past the rehearsal
    auto tiles = [&] {
      if constexpr (T::kFinders)
        return FoundTiles<T>{sh};
      else if constexpr (T::kLists)
        return TakenTiles<T>(team);
      else
        return DealtTiles<T>(p, team, alike);
    }();
    Work own;
    Work& next = T::kFinders ? sh.found : own;
    bool more = tiles.next(p, next);
    while (more) {
      int const kv_head = next.head / p.group;
      int const batch = !alike && p.cu_seqlens_q ? 0 : next.batch;
      int const kv_batch = !alike && p.cu_seqlens_k ? 0 : next.batch;
      int const k_begin = next.k_begin, first = next.first;
      auto const kept = kept_blocks<T>(p, next);
      auto load_k = [&](int visit) {
        int const j = kept.at(visit);
        sh.k_free[k.stage].wait(k.parity);
        if constexpr (T::kLists) sh.block[k.stage] = j;
        load_panels<T::kBlockN, T::kPanels>(sh.k[k.stage], p.k, sh.k_ready[k.stage],
                                            k_begin + j * T::kBlockN, kv_head, kv_batch,
                                            shared_by_tiles);
        k.advance();
      };
      auto load_v = [&](int visit) {
        int const j = kept.at(visit);
        sh.v_free[v.stage].wait(v.parity);
        load_panels<T::kBlockN, T::kPanelsV>(sh.v[v.stage], p.v, sh.v_ready[v.stage],
                                             k_begin + j * T::kBlockN, kv_head, kv_batch,
                                             shared_by_tiles);
        v.advance();
      };
      int j = next.last - 1;
      bool const empty = next.empty();
      if (!empty) load_k(j);
      sh.q_free[q.stage].wait(q.parity);
      sh.work[q.stage] = next;
      load_panels<T::kBlockM, T::kPanels>(sh.q[q.stage], p.q, sh.q_ready[q.stage],
                                          next.q_begin + next.row, next.head, batch, once);
      if constexpr (T::kFinders) sh.found_free.arrive();
      q.advance();
      // K runs one block ahead of V, as it is consumed. Once the consumers have something to do,
      // there is time to find out what comes next.
      if (j > first) {
        load_k(j - 1);
        load_v(j);
        --j;
      }
      if constexpr (!T::kFinders) more = tiles.next(p, next);
      for (; j > first; --j) {
        load_k(j - 1);
        load_v(j);
      }
      if (!empty) load_v(j);
      if constexpr (T::kFinders) more = tiles.next(p, next);
    }
    sh.q_free[q.stage].wait(q.parity);
    sh.work[q.stage] = Work::none();
    sh.q_ready[q.stage].arrive();
  }

  // With block lists: which tile comes next takes a chain of loads from memory, and is found out by
  // a thread that has nothing else to do, while the blocks of the tile before are fetched. Not
  // earlier, or tiles would wait here that others could have taken.
  FC_DEVICE static void find(const FwdParams& p, Shared& sh, int team) {
    TakenTiles<T> tiles(team);
    bool more = true;
    for (uint32_t parity = 1; more; parity ^= 1) {
      sh.found_free.wait(parity);
      more = tiles.next(p, sh.found);
      if (!more) sh.found = Work::none();
      sh.found_ready.arrive();
    }
  }
};

}  // namespace flashcore::sm90::fwd
