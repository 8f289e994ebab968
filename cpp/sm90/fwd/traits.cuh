// Everything a kernel derives from its FwdConfig: types, sizes, the shared-memory plan.
#pragma once
#include <type_traits>

#include "sm90/fwd/config.h"
#include "sm90/fwd/work.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashcore::sm90::fwd {

template <FwdConfig kConfig>
struct Traits {
  static_assert(kConfig.valid());
  using Element = std::conditional_t<kConfig.dtype == DType::bf16, __nv_bfloat16, __half>;

  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kHeadDimV = kConfig.head_dim_v;
  static constexpr int kPanels = ceil_div(kHeadDim, kPanelCols);
  static constexpr int kPanelsV = ceil_div(kHeadDimV, kPanelCols);
  static constexpr int kBlockM = kConfig.block_m;
  static constexpr int kBlockN = kConfig.block_n;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kQStages = kConfig.q_stages;
  static constexpr int kStaged = kConfig.staged;
  static constexpr int kPanelsO = ceil_div(kStaged, kPanelCols);
  static constexpr int kTeams = kConfig.teams;
  static constexpr int kConsumers = kConfig.consumers();  // of a team
  static constexpr int kThreads = kConfig.threads();
  static constexpr Mask kMask = kConfig.mask;
  static constexpr bool kLists = kMask == Mask::lists;
  static constexpr bool kTerms = kConfig.terms;
  static constexpr bool kTurns = kConfig.turns;
  // With block lists, and where there are as many spare warps as teams: one finds the next tile.
  static constexpr bool kFinders = kLists && kTeams <= 2;
  // Where the diagonal crosses a tile, a consumer leaves out keys that none of its rows sees: whole
  // blocks if they are short, of a long one its second half.
  static constexpr bool kSkips =
      kMask == Mask::window && kConfig.consumers() > 1 && kConfig.block_n <= 64;
  static constexpr bool kHalves = kMask == Mask::window && kConfig.block_n == 128;
  // With short blocks the search for maxima costs no more than asking the sums, except where little
  // else is done.
  static constexpr bool kSumTells =
      kConfig.dtype == DType::bf16 && (kConfig.block_n >= 128 || kConfig.head_dim <= 64);

  // By warpgroups of consumers in the block. What the producer releases must come up with what the
  // consumers claim above the launch value: 65536 registers over all threads, in steps of 8 (168
  // with two, 96 with four). One consumer has 255 as it is.
  static constexpr int kWarpgroups = kTeams * kConsumers;
  static constexpr bool kRegistersMove = kWarpgroups > 1;
  static constexpr int kProducerRegs = 24;
  static constexpr int kConsumerRegs = kWarpgroups == 4 ? 112 : 240;
  static constexpr int kLaunchRegs = 65536 / kThreads / 8 * 8;
  static_assert(!kRegistersMove || kProducerRegs + kWarpgroups * kConsumerRegs <=
                                       (1 + kWarpgroups) * kLaunchRegs);  // or the claim never ends

  // Named barriers; 0 is __syncthreads. One per consumer.
  enum NamedBarrier : int { kTurn = 1 };

  static constexpr int kQBytes = kBlockM * kPanels * kPanelBytes;
  static constexpr int kKBytes = kBlockN * kPanels * kPanelBytes;
  static constexpr int kVBytes = kBlockN * kPanelsV * kPanelBytes;
  static constexpr int kOBytes = kBlockM * kPanelsO * kPanelBytes;

  // Of a team.
  struct Shared {
    alignas(1024) char q[kQStages][kQBytes];
    alignas(1024) char k[kStages][kKBytes];
    alignas(1024) char v[kStages][kVBytes];
    alignas(kStaged ? 1024 : 16) char o[kStaged ? kOBytes : 16];
    Work work[kQStages];
    Barrier q_ready[kQStages], q_free[kQStages];
    Barrier k_ready[kStages], k_free[kStages];
    Barrier v_ready[kStages], v_free[kStages];
    // Only with block lists.
    int block[kStages];  // which key block K is
    Work found;          // the tile after the one whose blocks are being fetched
    Barrier found_ready, found_free;
  };
  static constexpr int kSharedBytes = kTeams * sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);

  using ScoreTile = float[kBlockN / 2];     // S: 64 x kBlockN per warpgroup
  using ProbTile = uint32_t[kBlockN / 4];   // P: the same, packed to 16 bits
  using OutputTile = float[kHeadDimV / 2];  // O: 64 x kHeadDimV
};

}  // namespace flashcore::sm90::fwd
