// A validated attention problem: what validate() makes of the C arguments, and all a kernel sees.
// Every pointer is checked, every default resolved, every stride in elements. Plain data.
#pragma once
#include <climits>

#include "common/types.h"
#include "tile/block_list.h"
#include "tile/mask.h"

namespace flashcore {

// One matrix per (batch, head): rows with unit stride along head_dim. For packed sequences
// batch_stride is 0 and Problem::cu_seqlens_* says where a sequence begins.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  DType dtype = DType::f32;

  explicit operator bool() const { return data != nullptr; }
};

// A (batch, head, query, key) tensor; a broadcast dimension has stride 0.
struct Scores {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  DType dtype = DType::f32;  // bias and dbias only; a mask is one byte per entry

  explicit operator bool() const { return data != nullptr; }
};

using tile::BlockList;

struct Problem {
  Direction direction = Direction::forward;
  int device_type = 1;  // DLDeviceType
  int device_id = 0;
  DType dtype = DType::f32;  // of q, k, v

  int64_t batch = 0;
  int64_t seqlen_q = 0;  // longest sequence (the padded length, or the packed upper bound)
  int64_t seqlen_k = 0;
  int64_t total_q = 0;  // rows of the q tensor: batch * seqlen_q, or the packed total
  int64_t total_k = 0;
  int64_t num_heads_q = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;

  Rows q, k, v, out;
  Rows lse, max_logits;  // row_stride 1, dtype f32 (f64 for f64 problems); data may be null

  double scale = 1.0;
  double softcap = 0.0;   // 0 = off
  tile::Window window;    // causal is folded in
  bool top_left = false;  // false: q_offset = seqlen_k - seqlen_q of each sequence
  bool has_q_offset = false;
  int64_t q_offset = 0;                      // when has_q_offset
  const int32_t* q_offset_tensor = nullptr;  // [batch], wins over the above

  const float* alibi_slopes = nullptr;
  int64_t alibi_batch_stride = 0;  // 0: one slope per head
  Scores bias;
  Scores mask;
  const float* sinks = nullptr;  // [num_heads_q]

  int32_t block_q = 0, block_k = 0;  // of the block mask; 0 = none
  BlockList kv_blocks;               // of each query block
  BlockList q_blocks;                // of each key block
  int64_t q_capacity = 0;            // blocks that such a list has room for

  uint32_t dropout_threshold = 0;  // drop when bits < threshold, of 2^16; 0 = no dropout
  double dropout_scale = 1.0;      // 1 / (1 - threshold / 2^16)
  uint64_t rng_seed = 0, rng_offset = 0;
  const int64_t* rng_tensor = nullptr;  // device {seed, offset}; wins over the above

  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqlens_q = nullptr;  // [batch]
  const int32_t* seqlens_k = nullptr;

  int32_t num_splits = 0;
  int64_t split_size = 0;
  bool deterministic = false;
  int32_t num_threads = 0;  // CPU: 0 = the library's setting

  // Backward only.
  bool accumulate = false;
  Rows dout, dq, dk, dv;
  Rows dlse;
  Scores dbias;
  float* dsinks = nullptr;
};

}  // namespace flashcore
