// Everything a kernel derives from its BwdConfig: types, sizes, the shared-memory plan.
#pragma once
#include <type_traits>

#include "sm90/bwd/dq_layout.h"
#include "sm90/bwd/list_steps.h"
#include "sm90/bwd/work.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "tile/rng.h"

namespace flashcore::sm90::bwd {

template <BwdConfig kConfig>
struct Traits {
  static_assert(kConfig.valid());
  using Element = std::conditional_t<kConfig.dtype == DType::bf16, __nv_bfloat16, __half>;

  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kHeadDimV = kConfig.head_dim_v;
  static constexpr int kPanels = ceil_div(kHeadDim, kPanelCols);
  static constexpr int kPanelsV = ceil_div(kHeadDimV, kPanelCols);
  static constexpr bool kTerms = kConfig.terms;
  static constexpr bool kLists = kConfig.lists;
  static constexpr bool kLaps = kConfig.laps;
  using ListSteps = bwd::ListSteps<kConfig.block_n / kListKeys>;
  static constexpr int kBlockM = kConfig.block_m;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kCluster = kConfig.cluster();
  static constexpr bool kAddsOnly = kConfig.adds_only();
  static constexpr bool kByQueries = kConfig.divides == Cluster::queries;
  static constexpr int kKeys = kConfig.keys();  // of a block of threads
  static constexpr int kConsumers = BwdConfig::kConsumers;
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kThreads = BwdConfig::kThreads;

  static constexpr int kProducerRegs = 24;
  static constexpr int kConsumerRegs = 240;

  enum NamedBarrier : int { kMeet = 1, kHeadStart, kBegin, kProducersBegin };  // 0: __syncthreads

  // Of dK and dV a consumer keeps 64 keys; or it keeps the one or the other.
  static constexpr bool kByKeys = kConfig.by_keys();
  static constexpr bool kByCluster = kConfig.by_cluster();
  // Consumers pass over blocks of queries that see none of their keys.
  static constexpr bool kPassesOver =
      kByKeys && kBlockM < 128 && !kTerms && !kLists && !kLaps && !kByQueries;
  // Of the tile, a consumer's.
  static FC_HD constexpr int first_key(int consumer, int rank) {
    return 64 * (kByKeys ? consumer : rank);
  }
  // Queries whose scores a consumer computes, against its 64 keys.
  static constexpr int kScoreQueries = kConfig.by_gradient() ? kBlockM / kConsumers : kBlockM;

  // How -lse and -delta get into S and dP: as products; or these start from them; or, with terms,
  // after those.
  static constexpr bool kStatProducts = kConfig.stat_products();
  static constexpr bool kFromStats = !kTerms && !kStatProducts;
  using Stat = std::conditional_t<kStatProducts, StatParts, float>;

  // Those who divide dQ of a step: the consumers of a block, or of a cluster that divides keys.
  using Dq = DqLayout<kBlockM, kHeadDim, kConsumers*(kByCluster ? kCluster : 1)>;
  static FC_HD constexpr int dq_part(int consumer, int rank) {
    return consumer + (kByCluster ? kConsumers * rank : 0);
  }
  static FC_HD constexpr int rank_of(int part) { return part / kConsumers; }
  static constexpr int kDqPutCols = kConfig.by_gradient() ? kPanelCols : Dq::kCols;  // at a time

  static constexpr int kQBytes = kBlockM * kPanels * kPanelBytes;
  static constexpr int kDoutBytes = kBlockM * kPanelsV * kPanelBytes;
  static constexpr int kKBytes = kKeys * kPanels * kPanelBytes;
  static constexpr int kVBytes = kKeys * kPanelsV * kPanelBytes;
  static constexpr int kPeerPanels = kPanels / 2;  // of the other block's K that dQ takes here
  static constexpr int kDsBytes = kBlockM * kKeys * 2;
  static constexpr int kDsBuffers = kByCluster ? 1 : 2;
  // Where queries are divided: one consumer's dK or dV in float32, for the other block, in the
  // place of Q and dO.
  static constexpr int kSumBytes = 64 * kHeadDim * 4;
  static_assert(!kByQueries || kConsumers * kSumBytes <= kStages * (kQBytes + kDoutBytes));

  // Tiles whose K is there. With two, a consumer that is done with one begins the next, while
  // another still makes dQ of the last step.
  static constexpr int kTwoTiles =
      2 * kKBytes + kVBytes + kStages * (kQBytes + kDoutBytes) + kDsBuffers * kDsBytes;
  static constexpr int kTilesOfK = kByKeys && !kByQueries && kTwoTiles <= 216 * 1024 ? 2 : 1;
  // Whether dK, too, leaves through shared memory: not if V is all that the next tile waits for.
  static constexpr bool kDkByWayOfV = kByKeys && kTilesOfK == 1;

  struct Shared {
    alignas(1024) char k[kTilesOfK][kKBytes];
    alignas(1024) char v[kVBytes];
    alignas(1024) char q[kStages][kQBytes];
    alignas(1024) char dout[kStages][kDoutBytes];
    // dS, and P where registers do not hold it: rows of queries, panels of 64 keys. In a cluster P
    // lies where dS is to be.
    alignas(1024) char ds[kDsBuffers][kDsBytes];
    alignas(1024) char p[kConfig.by_gradient() ? 2 : 1][kConfig.by_gradient() ? kDsBytes : 1];
    // The other block's dS, and the columns of its K that dQ takes here.
    alignas(kByCluster ? 1024 : 1) char peer_ds[kByCluster ? kDsBytes : 1];
    alignas(kByCluster ? 1024 : 1) char peer_k[kByCluster ? kPeerPanels * kKeys * kPanelBytes : 1];
    alignas(128) Stat minus_lse[kStages][kBlockM];
    alignas(128) Stat minus_delta[kStages][kBlockM];
    Work work[kTilesOfK], next;
    KeyTiles tiles;
    bool redo[4 * kConsumers];  // whether a warp has something to repair
    tile::DropoutKey dropout;   // of the call
    Barrier k_ready[kTilesOfK], k_free[kTilesOfK], v_ready, v_free;
    Barrier peer_has_room, sums_ready;  // where queries are divided
    Barrier ds_ready[kDsBuffers], ds_free[kDsBuffers], p_ready, peer_k_ready;
    Barrier q_ready[kStages], dout_ready[kStages], free[kStages];
    Barrier turn[kConsumers], added[kConsumers];  // of steps, see dq_order.cuh; or finish_dq.cuh
    int taken_block[kConsumers];                  // the first of those whose dQ is to be stored
    // Of tiles that are taken, in a cluster: from its first block to the other.
    Barrier taken_ready, taken_free;
    int taken;
    // With block lists. Of twice as many steps as there are stages: dQ comes a step late.
    StepNote note[kLists ? 2 * kStages : 1];
    Barrier noted[kLists ? 2 * kStages : 1];  // with a fixed order: the note is there
    std::conditional_t<kLists, ListSteps, char> steps, next_steps;
    StepNote next_note;  // the first of `next`, whose others are next_steps
    Barrier next_ready, next_free;
    // Nobody reads it, but compute-sanitizer looks there for the other half of a narrow operand.
    char behind[kStatProducts ? kBlockM * int{sizeof(Stat)} : 1];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);

  using ScoreTile = float[kScoreQueries / 2];     // S^T, dP^T: 64 x kScoreQueries
  using ProbTile = uint32_t[kScoreQueries / 4];   // P^T, dS^T: the same, packed to 16 bits
  using GradientTile = float[kHeadDim / 2];       // dK, dV: 64 x kHeadDim (dV at most)
  using DqProduct = float[Dq::kProductCols / 2];  // dQ, as the product leaves it
  using DqTile = float[4 * Dq::quads(0)];         // and what the consumer keeps of it
};

}  // namespace flashcore::sm90::bwd
