// Everything a kernel derives from its BwdConfig: types, sizes, the shared-memory plan.
#pragma once
#include <type_traits>

#include "sm90/bwd/work.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashcore::sm90::bwd {

template <BwdConfig kConfig>
struct Traits {
  static_assert(kConfig.valid());
  using Element = std::conditional_t<kConfig.dtype == DType::bf16, __nv_bfloat16, __half>;

  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kPanels = kHeadDim / kPanelCols;
  static constexpr int kBlockM = kConfig.block_m;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kConsumers = BwdConfig::kConsumers;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = BwdConfig::kThreads;

  static constexpr int kProducerRegs = 24;
  static constexpr int kConsumerRegs = 240;

  enum NamedBarrier : int { kMeet = 1, kHeadStart = 2 };  // 0 is __syncthreads

  // Of dK and dV: a consumer keeps 64 keys, or all of the tile's with a part of the columns.
  static constexpr bool kByKeys = kConfig.by_keys();
  static constexpr int kGradientCols = kByKeys ? kHeadDim : kHeadDim / kConsumers;
  // Queries whose scores a consumer computes, against its 64 keys.
  static constexpr int kScoreQueries = kByKeys ? kBlockM : kBlockM / kConsumers;

  // dQ of a step is one block_m x head_dim tile: a consumer takes 64 rows of it, or 64 rows of its
  // own half of the columns.
  static constexpr bool kDqByRows = kBlockM == 64 * kConsumers;
  static constexpr int kDqCols = kDqByRows ? kHeadDim : kHeadDim / kConsumers;
  static_assert(kDqByRows || kBlockM == 64);
  static_assert(kDqCols % kPanelCols == 0);

  static constexpr int kQBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKvBytes = kBlockN * kHeadDim * 2;
  static constexpr int kStatBytes = kBlockM * 4;

  struct Shared {
    alignas(1024) char k[kKvBytes];
    alignas(1024) char v[kKvBytes];
    alignas(1024) char q[kStages][kQBytes];
    alignas(1024) char dout[kStages][kQBytes];
    // dS, and P where registers do not hold it: rows of queries, panels of 64 keys.
    alignas(1024) char ds[2][kBlockM * kBlockN * 2];
    alignas(1024) char p[kByKeys ? 1 : 2][kByKeys ? 1024 : kBlockM * kBlockN * 2];
    alignas(128) float minus_lse[kStages][kBlockM];
    alignas(128) float minus_delta[kStages][kBlockM];
    Work work;
    Barrier k_ready, v_ready, k_free, v_free;
    Barrier ds_ready[2], ds_free[2];
    Barrier q_ready[kStages], dout_ready[kStages], free[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  using ScoreTile = float[kScoreQueries / 2];     // S^T, dP^T: 64 x kScoreQueries
  using ProbTile = uint32_t[kScoreQueries / 4];   // P^T, dS^T: the same, packed to 16 bits
  using GradientTile = float[kGradientCols / 2];  // dK, dV: 64 x kGradientCols
  using DqTile = float[kDqCols / 2];              // dQ: 64 x kDqCols
};

}  // namespace flashcore::sm90::bwd
