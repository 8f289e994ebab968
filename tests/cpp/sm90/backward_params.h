// What the functions of the backward's indices read of a kernel's parameters.
#pragma once
#include <cstdint>

#include "sm90/bwd/dq_order.h"
#include "sm90/bwd/neighbours.h"
#include "tile/mask.h"
#include "tile/tile_scheduler.h"

struct Params {
  int batch = 1, seqlen_q = 0, seqlen_k = 0;
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  const int32_t *seqlens_q = nullptr, *seqlens_k = nullptr;
  bool top_left = false, has_q_offset = false;
  int64_t q_offset = 0;
  const int32_t* q_offset_tensor = nullptr;
  flashcore::tile::Window window;
  bool whole_heads = false;
  int pairs = 0, group = 1;
  bool alike = false;
  flashcore::tile::ShortSequence sequence;  // if alike
  flashcore::tile::BlockLists kept_queries, kept_keys;
  flashcore::sm90::bwd::NeighbourTable neighbours;
  flashcore::tile::Divisor sequence_blocks;
  flashcore::tile::TileScheduler scheduler;
  bool all_rise = false;
  flashcore::sm90::bwd::Laps laps;
};
