// The backward pass in memory: tile sizes, the division into tasks, and the arrays that a call and
// a thread work in.
#pragma once
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/scores.h"

namespace flashcore::cpu {
namespace {

template <DType D>
struct BackwardLayout {
  using E = Element<D>;
  using T = Real<E>;
  using U = Operand<E>;
  static constexpr int kLane = kLanes<T>;
  static constexpr int kUnit = kPerUnit<U>;
  // Columns of K^T and V^T that lie together: with head_dim 64 such a panel is half of a 32 KB L1.
  static constexpr int kPanel = 256 / static_cast<int>(sizeof(T));

  static constexpr int kBlockM = 96;  // whole strips of gemm; 48 to 120 and block_n 128, 384 lost
  static constexpr int kBlockN = 256;

  // Tile sizes and the division into tasks: functions of the problem's shapes.
  struct Shape {
    int block_m = kBlockM, block_n = kBlockN;
    int64_t d, dv;    // head dims in whole vectors
    int64_t du, dvu;  // head dims in units
    int64_t group;    // query heads per kv head
    int64_t row_blocks, key_blocks;
    // One group of tasks shares dQ or dbias and so has an order. dbias that is broadcast over
    // batch or heads joins those into one group, in the order of the loops of walk(); broadcast
    // over keys, it leaves one task for all key blocks.
    bool join_batch = false, join_heads = false, join_keys = false;
    int64_t groups, walkers;

    explicit Shape(const Problem& p) {
      d = round_up<int64_t>(p.head_dim, kLane);
      dv = round_up<int64_t>(p.head_dim_v, kLane);
      du = ceil_div<int64_t>(p.head_dim, kUnit);
      dvu = ceil_div<int64_t>(p.head_dim_v, kUnit);
      group = p.num_heads_q / p.num_heads_kv;
      block_n = static_cast<int>(
          min_of<int64_t>(kBlockN, max_of<int64_t>(kPanel, round_up<int64_t>(p.seqlen_k, kPanel))));
      // A thread's scratch stays within 1.25 MB, and so within a usual second-level cache.
      auto const bytes = [&] {
        return (d + dv) * static_cast<int64_t>(sizeof(T)) * (block_n * 5 / 2 + 2 * block_m) +
               block_m * (block_n + kLane) * static_cast<int64_t>(sizeof(T)) * 2;
      };
      while (bytes() > 1250000 && block_n > kPanel) block_n -= kPanel;
      while (bytes() > 1250000 && block_m > 24) block_m -= 12;
      row_blocks = ceil_div<int64_t>(p.seqlen_q, block_m);
      key_blocks = ceil_div<int64_t>(p.seqlen_k, block_n);
      if (p.dbias) {
        join_batch = p.dbias.batch_stride == 0;
        join_heads = p.dbias.head_stride == 0;
        join_keys = p.dbias.col_stride == 0;
      }
      groups =
          (join_batch ? min_of<int64_t>(p.batch, 1) : p.batch) * (join_heads ? 1 : p.num_heads_kv);
      walkers = join_keys ? min_of<int64_t>(key_blocks, 1) : key_blocks;
    }

    // Rows of dbias to clear: each stored row once.
    int64_t dbias_rows(const Problem& p) const {
      if (!p.dbias || p.accumulate) return 0;
      return (join_batch ? 1 : p.batch) * (join_heads ? 1 : p.num_heads_q) *
             (p.dbias.row_stride == 0 ? 1 : p.seqlen_q);
    }
  };

  // One per call.
  struct Shared {
    T* lse;             // [head][row of the tensor]; +inf where the row has no valid key
    T* delta;           // the same
    T* dq;              // [head][row of the tensor][head_dim], when dq's dtype cannot take sums
    int32_t* progress;  // [group][walker]: query tiles passed

    Shared(const Problem& p, const Shape& s, Arena& arena) {
      lse = arena.take<T>(p.num_heads_q * p.total_q);
      delta = arena.take<T>(p.num_heads_q * p.total_q);
      progress = arena.take<int32_t>(s.groups * s.walkers);
      // A plan may be made before dq is known; then it must be enough for any dq.
      bool const needed = sizeof(E) == 2 && !(p.dq && p.dq.dtype == DType::f32);
      dq = needed ? arena.take<T>(p.total_q * p.num_heads_q * p.head_dim) : nullptr;
    }
  };

  // One per thread.
  struct Scratch {
    U *k_panels, *v_panels;  // K^T and V^T of the key block, by panels of kPanel columns
    U* k_stacked;
    T *dk, *dv;
    U *q_rows, *q_stacked, *dout_rows, *dout_stacked;  // of the query tile
    T *s, *dp;                                         // S becomes P, dP becomes dS
    T* slope;                                          // softcap's derivative
    U *p_stacked, *ds_rows, *ds_stacked;               // in place of s and dp where units are not T
    T* dq;
    T* dbias;  // sums over the rows of a tile
    int64_t *row_index, *row_head;
    int64_t ld_q, ld_dout, ld_s;

    Scratch(const Problem& p, const Shape& s, Arena& arena) {
      int64_t const m = s.block_m, n = s.block_n;
      auto const skewed = [](int64_t cols) { return cols > 64 ? cols + kLane : cols; };
      ld_q = skewed(s.d);
      ld_dout = skewed(s.dv);
      ld_s = n + kLane;  // a power of two would put a column's entries into few cache sets
      k_panels = arena.take<U>(n * s.du);
      v_panels = arena.take<U>(n * s.dvu);
      k_stacked = arena.take<U>(n / kUnit * ld_q);
      dk = arena.take<T>(n * s.d);
      dv = arena.take<T>(n * s.dv);
      q_rows = arena.take<U>(m * ld_q);
      dout_rows = arena.take<U>(m * ld_dout);
      this->s = arena.take<T>(m * ld_s);
      dp = arena.take<T>(m * ld_s);
      slope = p.softcap > 0 ? arena.take<T>(m * ld_s) : nullptr;
      dq = arena.take<T>(m * s.d);
      dbias = p.bias ? arena.take<T>(n + kLane) : nullptr;  // dbias may be unknown yet
      row_index = arena.take<int64_t>(m);
      row_head = arena.take<int64_t>(m);
      if constexpr (kUnit == 1) {
        q_stacked = q_rows;
        dout_stacked = dout_rows;
        p_stacked = ds_rows = ds_stacked = nullptr;
      } else {
        q_stacked = arena.take<U>(m / kUnit * ld_q);
        dout_stacked = arena.take<U>(m / kUnit * ld_dout);
        p_stacked = arena.take<U>(m / kUnit * ld_s);
        ds_rows = arena.take<U>(m * ld_s / kUnit);
        ds_stacked = arena.take<U>(m / kUnit * ld_s);
      }
    }
  };

  // One query tile against one key block.
  struct Tile {
    int64_t b, h, row0;  // row0: position in the sequence
    int rows;
    int64_t key0;     // of the key block
    int first, last;  // its columns that some row sees; first is a multiple of kPanel
    bool excludes;    // some row does not see some of them
    int padded;       // last in whole vectors
  };
};

// Where a row of a sequence is among all rows of a head.
inline int64_t tensor_row(const Problem& p, int64_t b, const tile::Sequence& seq, int64_t i) {
  return p.cu_seqlens_q ? seq.q_begin + i : b * p.seqlen_q + i;
}

template <class X>
void clear(X* x, int64_t n) {
  __builtin_memset(x, 0, static_cast<size_t>(n) * sizeof(X));
}

}  // namespace
}  // namespace flashcore::cpu
