// FlashAttention backward, Hopper (sm_90a): dK, dV of one tile of keys, and its share of dQ.
//
//     P = exp(scale Q K^T - lse)    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)
//     dK = scale dS^T Q             dQ = scale dS K
//
// Roles (128 * (1 + kConsumers) threads, one block per SM)
//     warpgroup 0     producer   one thread tells the copy engine to fetch K, V; then Q, dO blocks
//     warpgroup 1, 2  consumers  their part of dK and dV stays in registers for the whole tile
//
// One step is one block of query rows of one query head: steps_by_keys.cuh, steps_by_columns.cuh.
// Query heads that share a key head follow one another in the tile, so dK and dV need no sums in
// memory. dQ does (dq.cuh). The tile loop is persistent: rings keep stage and parity across tiles,
// so the producer fetches the next tile's Q and dO while consumers store this one's dK and dV.
#pragma once
#include "sm90/bwd/steps_by_columns.cuh"
#include "sm90/bwd/steps_by_keys.cuh"
#include "sm90/bwd/store.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::bwd {

template <class T>
struct Kernel {
  using Element = typename T::Element;
  using Shared = typename T::Shared;
  using Ring = tile::Ring<T::kStages>;

  // This block's tiles, in its order.
  template <class Body>
  FC_DEVICE static void for_each_tile(const BwdParams& p, Body body) {
    for (int index = blockIdx.x; index < p.scheduler.num_tiles(); index += gridDim.x)
      body(Work<T>(p, index));
  }

  // ---- producer ---------------------------------------------------------------------------------
  FC_DEVICE static void produce(const BwdParams& p, Shared& sh) {
    release_registers<T::kProducerRegs>();
    if (threadIdx.x / 32 != 0 || !elect_one()) return;
    prefetch_tensor_map(p.q);
    prefetch_tensor_map(p.k);
    prefetch_tensor_map(p.v);
    prefetch_tensor_map(p.dout);
    uint64_t const once = policy_evict_first(), shared_by_tiles = policy_evict_last();

    Ring ring = Ring::producer();
    uint32_t kv_parity = 1;
    for_each_tile(p, [&](const Work<T>& work) {
      if (work.empty()) return;
      bool fresh = true;
      for (int head = work.kv_head * p.group; head < (work.kv_head + 1) * p.group; ++head) {
        int64_t const stats = (int64_t{work.batch} * p.heads + head) * p.m_blocks * T::kBlockM;
        for (int m = work.first; m < work.last; ++m) {
          if (fresh) {
            sh.kv_free.wait(kv_parity);
            load<T::kBlockN>(sh.k, p.k, sh.k_ready, work.key, work.kv_head, work.batch, once);
          }
          sh.free[ring.stage].wait(ring.parity);
          int64_t const row = stats + int64_t{m} * T::kBlockM;
          load<T::kBlockM>(sh.q[ring.stage], p.q, sh.q_ready[ring.stage], m * T::kBlockM, head,
                           work.batch, shared_by_tiles, sh.lse_log2[ring.stage], p.lse_log2 + row);
          if (fresh)
            load<T::kBlockN>(sh.v, p.v, sh.v_ready, work.key, work.kv_head, work.batch, once);
          load<T::kBlockM>(sh.dout[ring.stage], p.dout, sh.dout_ready[ring.stage], m * T::kBlockM,
                           head, work.batch, shared_by_tiles, sh.delta[ring.stage], p.delta + row);
          fresh = false;
          ring.advance();
        }
      }
      kv_parity ^= 1;
    });
  }

  // kRows x kHeadDim, one box per panel, and the rows' statistics if there are any. Rows and
  // columns past the end become zeros.
  template <int kRows>
  FC_DEVICE static void load(char* smem, const CUtensorMap& map, Barrier& ready, int row, int head,
                             int batch, uint64_t policy, float* stats = nullptr,
                             const float* global_stats = nullptr) {
    ready.arrive_expect(kRows * T::kHeadDim * 2 + (stats ? kRows * 4 : 0));
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel)
      tma_load(smem + panel * kRows * kPanelBytes, map, ready, panel * kPanelCols, row, head, batch,
               policy);
    if (stats) bulk_load(stats, global_stats, kRows * 4, ready);
  }

  // ---- consumers --------------------------------------------------------------------------------
  FC_DEVICE static void consume(const BwdParams& p, Shared& sh) {
    claim_registers<T::kConsumerRegs>();
    int const consumer = warpgroup_index() - 1;
    Ring ring = Ring::consumer();
    uint32_t kv_parity = 0;
    for_each_tile(p, [&](const Work<T>& work) {
      typename T::GradientTile rdK, rdV;
#pragma unroll
      for (int i = 0; i < T::kGradientCols / 2; ++i) rdK[i] = rdV[i] = 0.0f;
      if (!work.empty()) {
        Consumer<T> const c{p,    sh,  work, consumer, static_cast<int>(threadIdx.x) - 128,
                            ring, rdK, rdV};
        std::conditional_t<T::kByKeys, StepsByKeys<T>, StepsByColumns<T>>::run(c, kv_parity);
        c.release(sh.kv_free);
        kv_parity ^= 1;
      }
      int const key = work.key + (T::kByKeys ? 64 * consumer : 0), keys = p.seqlen_k - key;
      int const col = T::kByKeys ? 0 : T::kGradientCols * consumer;
      if (p.dv.data)
        store_rows<Element>(p.dv, p.accumulate, rdV, 1.0f, work.batch, work.kv_head, key, keys, col,
                            p.head_dim_v - col);
      if (p.dk.data)
        store_rows<Element>(p.dk, p.accumulate, rdK, p.scale, work.batch, work.kv_head, key, keys,
                            col, p.head_dim - col);
    });
  }

  FC_DEVICE static void init_barriers(Shared& sh) {
    constexpr int kConsumerWarps = 4 * T::kConsumers;
    sh.k_ready.init(1);
    sh.v_ready.init(1);
    sh.kv_free.init(kConsumerWarps);
    for (int s = 0; s < T::kStages; ++s) {
      sh.q_ready[s].init(1);
      sh.dout_ready[s].init(1);
      sh.free[s].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    flash_bwd_sm90(const __grid_constant__ BwdParams p) {
  extern __shared__ __align__(1024) char smem[];
  auto& sh = *reinterpret_cast<typename T::Shared*>(smem);
  if (threadIdx.x == 0) Kernel<T>::init_barriers(sh);
  __syncthreads();
  if (warpgroup_index() == 0)
    Kernel<T>::produce(p, sh);
  else
    Kernel<T>::consume(p, sh);
}

}  // namespace flashcore::sm90::bwd
