// What a Hopper backward kernel is (BwdConfig, a value) and what it is given (BwdParams).
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/types.h"
#include "tile/mask.h"
#include "tile/tile_scheduler.h"

namespace flashcore::sm90::bwd {

struct BwdConfig {
  DType dtype;
  int head_dim;  // of q, k and v, rounded up; the copy engine pads with zeros
  int block_m;   // query rows of a step
  int block_n;   // keys of a tile
  int stages;    // query blocks (Q and dO) in flight

  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // The consumers divide the keys, or else the columns of dK and dV.
  constexpr bool by_keys() const { return block_n == 64 * kConsumers; }
  constexpr bool valid() const {
    return (dtype == DType::f16 || dtype == DType::bf16) && stages >= 2 &&
           ((head_dim == 64 && block_m == 128 && block_n == 128) ||
            (head_dim == 128 && block_m == 64 && block_n == 128) ||
            (head_dim == 256 && block_m == 64 && block_n == 64));
  }
};

// A (batch, head, row) matrix for ordinary loads and stores. Strides in elements.
struct Matrix {
  void* data;  // null: not asked for
  int64_t batch_stride, row_stride, head_stride;
  bool f32;  // float32 elements instead of the kernel's dtype
};

struct BwdParams {
  CUtensorMap q, k, v, dout;  // (head_dim, seqlen, heads, batch)
  Matrix out_ref, dout_ref;   // for preprocess
  Matrix dq, dk, dv;
  const float *lse, *dlse;  // dlse may be null
  int64_t lse_batch_stride, lse_head_stride, dlse_batch_stride, dlse_head_stride;

  // The workspace. Rows are padded to whole query blocks.
  float* minus_lse;    // [batch][head][padded row]: -lse / scale; -inf where P is to be zero
  float* minus_delta;  // [batch][head][padded row]: dlse - rowsum(dO * O)
  float* dq_sum;       // [slot][query block][block_m * head_dim], see dq.cuh

  float scale;
  float scale_log2;  // scale * log2(e)
  int batch, heads;  // heads of q
  int seqlen_q, seqlen_k;
  int m_blocks;
  int head_dim, head_dim_v;
  int group;  // query heads per key head
  int64_t q_offset;
  const int32_t* q_offset_tensor;  // [batch]; wins over q_offset when not null
  tile::Window window;
  bool accumulate;

  // Key tiles in their order. Either they are dealt out one by one and add to dQ in any order; or a
  // block takes all tiles of a key head, in rising order: then it can set the sums of dQ instead of
  // adding to zeros, and the last tile that adds can write dQ itself.
  bool whole_heads;
  tile::TileScheduler scheduler;  // m_block counts key tiles, from the last one

  // Where the sums of a query head's dQ are.
  FC_HD constexpr int64_t dq_slot(int block, int batch_index, int head) const {
    return whole_heads ? int64_t{block} * group + head % group
                       : int64_t{batch_index} * heads + head;
  }
};

// One row of instances.def; its translation unit defines it.
template <BwdConfig kConfig>
void launch(const BwdParams& params, int blocks, int device, cudaStream_t stream);

}  // namespace flashcore::sm90::bwd
