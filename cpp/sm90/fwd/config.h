// What a Hopper forward kernel is (FwdConfig, a value) and what it is given (FwdParams).
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/types.h"
#include "tile/block_list.h"
#include "tile/mask.h"
#include "tile/seqlen.h"
#include "tile/tile_scheduler.h"

namespace flashcore::sm90::fwd {

enum class Mask : uint8_t {
  none,
  window,
  lists
};  // causal is a window; lists: of blocks, and a window

// Which calls a row is for, of those that it takes. See unsuited() in dispatch.cpp.
enum class Calls : uint8_t {
  all,
  few_tiles,    // all run at once: what counts is the time of one
  even_rounds,  // large tiles come out even
  many_keys     // tiles have many, and are many
};

struct FwdConfig {
  DType dtype;
  int head_dim;    // of q and k, rounded up; the copy engine pads with zeros
  int head_dim_v;  // of v
  Mask mask;
  bool terms;    // softcap, ALiBi and dropout
  int block_m;   // query rows of a tile: 64 per consumer warpgroup
  int teams;     // of a producer warp and its consumers, in a block; each has tiles of its own
  int block_n;   // keys of a block
  int stages;    // K and V blocks in flight
  int q_stages;  // 2: the next tile's Q is fetched while consumers work on this one
  int staged;    // columns of O that leave through shared memory; the others from registers
  bool turns;    // consumers issue their products in turn instead of as they come
  Calls calls;

  constexpr int consumers() const { return block_m / 64; }  // of a team
  constexpr int threads() const { return 128 * (1 + teams * consumers()); }
  constexpr bool valid() const {
    return (dtype == DType::f16 || dtype == DType::bf16) && head_dim % 32 == 0 && head_dim <= 256 &&
           head_dim_v % 32 == 0 && head_dim_v <= 256 && block_m % 64 == 0 &&
           (teams * consumers() == 1 || teams * consumers() == 2 || teams * consumers() == 4) &&
           block_n % 16 == 0 && block_n <= 256 && stages >= 2 && (q_stages == 1 || q_stages == 2) &&
           (staged == head_dim_v || (staged % 64 == 0 && staged < head_dim_v)) &&
           !(turns && (teams > 1 || consumers() != 2));
  }
};

// Where ordinary loads find a tensor. Strides in elements.
struct MatrixRef {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct FwdParams {
  CUtensorMap q, k, v, out;                // (head_dim, seqlen, heads, batch)
  MatrixRef q_ref, k_ref, v_ref, out_ref;  // the same, for ordinary loads and stores
  float* lse;                              // may be null
  int64_t lse_batch_stride, lse_head_stride;
  float scale;       // of the scores: the softcap if there is one
  float scale_log2;  // scale * log2(e)
  float headroom;    // by how much a raw score may exceed its row's reference, see softmax.cuh
  int head_dim, head_dim_v;
  tile::Divisor group;  // query heads per key head
  const float* sinks;   // [heads], may be null

  // Where sequences begin and end; what tile::sequence_of reads.
  int batch;
  int seqlen_q, seqlen_k;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqlens_q, *seqlens_k;
  bool top_left, has_q_offset;
  int64_t q_offset;
  const int32_t* q_offset_tensor;
  tile::Window window;
  bool alike;                     // all sequences are this one:
  tile::ShortSequence sequence;   // else sequence_of reads the above
  tile::TileScheduler scheduler;  // of a packed batch: of one sequence, whose m_blocks it sets

  // The keys in num_splits parts of split_blocks blocks; then results go, in float32 and without
  // gaps, to [split][batch][head][row] of the workspace, to be merged.
  tile::Divisor num_splits;
  int split_blocks;
  float *partial_out, *partial_lse;
  int64_t partial_rows;  // of one head: the rows of the tensor
  int partial_heads;     // of one split: all batches' (a packed tensor is one batch)

  // Only kernels with terms look at these.
  float softcap_inner;        // the true scale / softcap; 0: no softcap
  const float* alibi_slopes;  // may be null
  int64_t alibi_batch_stride;
  uint32_t dropout_threshold;  // 0: no dropout
  float dropout_scale;
  uint64_t rng_seed, rng_offset;
  const int64_t* rng_tensor;  // {seed, offset}; wins over the above when not null

  // Only kernels with block lists look at these.
  tile::BlockLists kept;  // key blocks of each query block
  int mask_block_k;       // keys in a block of the mask
  // Their tiles differ in length as they please, so whoever is done takes the next one. Cleared to
  // -1 before the launch.
  int* taken;        // the last one of those that were not dealt out at the beginning
  int* taker;        // [tile]: which team took it, for repair.cuh
  const int* order;  // [batch][head][place]: see order.h. Null: as they come

  // Whether a block may hold rows of another sequence, or of none.
  FC_HD bool ragged() const { return cu_seqlens_k || seqlens_k || seqlens_q; }
};

// One row of instances.def; its translation unit defines it.
template <FwdConfig kConfig>
void launch(const FwdParams& params, int blocks, int device, cudaStream_t stream);

}  // namespace flashcore::sm90::fwd
