// What a Hopper backward kernel is (BwdConfig, a value) and what it is given (BwdParams).
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/types.h"
#include "sm90/bwd/laps.h"
#include "sm90/bwd/neighbours.h"
#include "sm90/bwd/stat_parts.h"
#include "tile/block_list.h"
#include "tile/mask.h"
#include "tile/seqlen.h"
#include "tile/tile_scheduler.h"

namespace flashcore::sm90::bwd {

// What two blocks of threads, a cluster, divide of a tile: its keys, or its queries. In the latter
// case each has every other query block, and in the end one has the sum of dV and the other that of
// dK.
enum class Cluster : uint8_t { none, keys, queries };

struct BwdConfig {
  DType dtype;
  int head_dim;    // of q and k, rounded up; the copy engine pads with zeros
  int head_dim_v;  // of v
  bool terms;      // softcap, ALiBi and dropout
  int block_m;     // query rows of a step
  int block_n;     // keys of a tile
  int stages;      // query blocks (Q and dO) in flight
  Cluster divides;
  bool lists = false;  // of blocks, and a window; else only the latter
  bool laps = false;   // for a fixed order of dQ without a mask: laps.h

  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  constexpr int cluster() const { return divides == Cluster::none ? 1 : 2; }
  // Of a block of threads.
  constexpr int keys() const { return divides == Cluster::keys ? block_n / 2 : block_n; }
  // What the consumers divide: the keys; or one has dV and the other dK. The latter alone, or with
  // another block that has as many keys.
  constexpr bool by_keys() const { return keys() == 128; }
  constexpr bool by_gradient() const { return keys() == 64 && divides == Cluster::none; }
  constexpr bool by_cluster() const { return divides == Cluster::keys; }
  // lse and delta are added to S and dP as products.
  constexpr bool stat_products() const { return by_keys() && !terms; }
  // For calls whose tiles leave half of the multiprocessors idle, or with a mask which the longest
  // tiles make last twice as long as their share.
  constexpr bool few() const { return divides == Cluster::queries; }
  // A step of 80 queries, whose dQ is made transposed since a product is 64 rows high: per query, S
  // and dP read less of K and V from shared memory than with 64.
  constexpr bool transposed_dq() const { return block_m % 64 != 0; }
  // Whole heads have other kernels: dQ of a step is added to sums, and nothing else. With block
  // lists nobody knows which tile is the first to add to a query block, or the last.
  constexpr bool adds_only() const { return few() || transposed_dq() || lists || laps; }
  constexpr bool valid() const {
    return (dtype == DType::f16 || dtype == DType::bf16) && stages >= 2 && head_dim % 32 == 0 &&
           ((by_keys() && head_dim == head_dim_v &&
             ((head_dim <= 64 && block_m == 128) || (head_dim <= 128 && block_m == 64) ||
              (head_dim == 128 && block_m == 80))) ||
            (by_cluster() && keys() == 64 && block_m == 64 && head_dim == 256 &&
             head_dim == head_dim_v) ||
            (by_gradient() && block_m == 64 && head_dim == 192 &&
             (head_dim_v == 128 || head_dim_v == 192))) &&
           !((few() || transposed_dq()) && (lists || terms)) &&
           !(laps && (few() || lists || terms));
  }
};

// A (batch, head, row) matrix for ordinary loads and stores. Strides in elements.
struct Matrix {
  void* data;  // null: not asked for
  int64_t batch_stride, row_stride, head_stride;
  bool f32;  // float32 elements instead of the kernel's dtype
};

// Rows of dK and dV that a warp stores.
constexpr int kStoredRows = 16;

// What the copy engine is told of a tensor.
struct TensorMaps {
  bool cut;           // sequences end inside the tensor
  CUtensorMap boxes;  // tensor_map(), or row_window_map() if cut
  CUtensorMap rows;   // if cut: tensor_map() of single rows
};

// Of a key head of one sequence and one of the consumers, see finish_dq.cuh: how many blocks of
// threads have added all they will to its dQ, and which query block is the next to be stored.
struct DqHead {
  int arrived, taken;
};

struct BwdParams {
  TensorMaps q, k, v, dout;
  CUtensorMap dk_boxes, dv_boxes;  // tensor_map() of kStoredRows rows
  bool boxes;  // whether dK and dV can leave so: both in this dtype, not added to
  Matrix q_ref, k_ref, v_ref, out_ref, dout_ref;  // the same, for ordinary loads
  Matrix dq, dk, dv;
  const float *lse, *dlse;  // dlse may be null
  const float* sinks;       // [heads]; null without dsinks
  float* dsinks;            // [heads]; null: not asked for
  int64_t lse_batch_stride, lse_head_stride, dlse_batch_stride, dlse_head_stride;

  // The workspace. A head's rows are padded to whole query blocks, sequence by sequence.
  float* minus_lse;    // [head][query block][row]: -lse / score_scale; -inf where P is to be zero
  float* minus_delta;  // [head][query block][row]: dlse - rowsum(dO * O)
  StatParts *lse_parts, *delta_parts;  // the same two, for stat_products()
  float* dq_sum;                       // [slot][query block][block_m * head_dim], see dq.cuh
  DqHead* dq_heads;                    // [batch][key head][consumer]; null: others store dQ
  // Null where no mask cuts blocks: see repair.cuh.
  uint8_t* redo_keys;         // [key head][key tile][block of the cluster][warp]
  uint8_t* redo_queries;      // [head][query block][warp][half of the columns]; only of whole heads
  int head_key_blocks;        // key tiles of a key head, of all sequences
  tile::Divisor head_blocks;  // query blocks of a head, of all sequences
  tile::Divisor sequence_blocks;  // of one that is not packed
  int slot_blocks;                // the same of a slot of dq_sum
  bool block_slots;               // a slot per head that a block of threads works on, not per head

  float scale;        // of dQ and dK
  float score_scale;  // of the scores: the softcap if there is one
  float scale_log2;   // score_scale * log2(e)
  int heads;          // of q
  int head_dim, head_dim_v;
  int group;  // query heads per key head
  bool accumulate;
  bool short_head_start;  // of the first consumer, where keys are divided: its first S, not dV
  bool prefetch;  // preprocess asks for Q, K and V: L2 holds them until the main kernel comes

  // Where sequences begin and end; what tile::sequence_of reads.
  int batch;
  int seqlen_q, seqlen_k;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqlens_q, *seqlens_k;
  bool top_left, has_q_offset;
  int64_t q_offset;
  const int32_t* q_offset_tensor;
  tile::Window window;
  bool alike;                    // all sequences are this one:
  tile::ShortSequence sequence;  // else sequence_of reads the above

  // Only kernels with terms look at these.
  float softcap_inner;        // scale / softcap; 0: no softcap
  const float* alibi_slopes;  // may be null
  int64_t alibi_batch_stride;
  uint32_t dropout_threshold;  // 0: no dropout
  float dropout_scale;
  uint64_t rng_seed, rng_offset;
  const int64_t* rng_tensor;  // {seed, offset}; wins over the above when not null

  // All sequences are alike, and tiles are dealt out one by one.
  bool plain;
  // Key tiles in their order. Either they are dealt out one by one and add to dQ, in any order or
  // in theirs; or a block takes all tiles of a key head, in rising order: then it can set the sums
  // of dQ instead of adding to zeros, and the last tile that adds can write dQ itself.
  bool whole_heads;
  int pairs;  // of batch and key head
  // m_block counts key tiles, from the last one. Of a packed batch: of one sequence, whose m_blocks
  // it sets.
  tile::TileScheduler scheduler;
  bool all_rise;  // no section's key tiles fall

  // Tiles that are not dealt out but taken, by whoever is done. Null: they are not. Cleared to -1
  // before the launch.
  int* taken;  // the last one that was
  int* taker;  // [tile]: which block or cluster took it, for repair.cuh
  // If dQ is added to in a fixed order: [head][query block][part of dQ], the key tile that comes
  // next; see dq_order.cuh. Cleared as well.
  int* turns;

  // Only kernels with block lists look at these.
  tile::BlockLists kept_queries;  // of each key block, in query blocks of the kernel
  tile::BlockLists kept_keys;     // of each query block, in keys: for repair and neighbours
  int mask_block_q;               // rows in a block of the mask
  NeighbourTable neighbours;      // in a fixed order
  const int* order;               // [batch][key head][place]: see order.h. Null: as they come

  Laps laps;  // only kernels with laps look at it; m_block then counts laps
};

// After preprocess: dsinks from its statistics.
void launch_dsinks(const BwdParams& params, int block_m, cudaStream_t stream);

// Before it, with block lists in a fixed order: fills the table of neighbours.
void find_neighbours(const BwdParams& params, int block_m, int block_n, cudaStream_t stream);

// One row of instances.def; its translation unit defines it.
template <BwdConfig kConfig>
void launch(const BwdParams& params, int blocks, int device, cudaStream_t stream);

}  // namespace flashcore::sm90::bwd
