// Attention backward by recomputation:
//
//     P = exp(S - lse)      delta = rowsum(dO ∘ O) - dlse      dP = dO V^T
//     dS = P ∘ (dP - delta)     dV = P^T dO     dK = scale dS^T Q     dQ = scale dS K
//     dbias = dS summed over what bias broadcasts over         dsinks = -sum exp(sink - lse) delta
//
// Phase 0  delta, and zero in what phase 1 adds to.
// Phase 1  One task owns block_n keys of one kv head: it packs K and V once, walks over the query
//          tiles of the head's group, and keeps dK and dV. Its part of dQ is added to memory in
//          ascending order of the key blocks: task c may add to a tile when task c - 1 is past it.
//          So the sums have one order whatever the number of threads, with no memory for partial
//          sums. Tasks start in that order too, so the one waited for is always running; all walk
//          from the last query tile to the first, since under a causal mask every task visits the
//          last one and early blocks simply go on longer.
// Phase 2  dQ converted to its dtype; dsinks.
//
// Excluded entries of P and dS are set to zero, never multiplied by one. The products run over
// whole tiles, where 0 * NaN would spread: a tile with an exclusion whose rows or keys are not all
// finite goes through add_nonzero instead.
#pragma once
#include <sched.h>

#include "cpu/entry.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/scores.h"

namespace flashcore::cpu {
namespace {

template <DType D>
class Backward {
  using E = Element<D>;
  using T = Real<E>;
  using U = Operand<E>;
  static constexpr int kLane = kLanes<T>;
  static constexpr int kUnit = kPerUnit<U>;
  // Columns of K^T and V^T that lie together: with head_dim 64 such a panel is half of a 32 KB L1.
  static constexpr int kPanel = 256 / static_cast<int>(sizeof(T));

 public:
  static constexpr int kBlockM = 96;  // whole strips of gemm; 48 to 120 and block_n 128, 384 lost
  static constexpr int kBlockN = 256;

  static void plan(const Problem& p, Work& work) {
    Shape const s(p);
    work.phases = 3;
    work.tasks[0] = max_of<int64_t>(1, p.batch * p.num_heads_q * s.row_blocks);
    work.tasks[1] = s.groups * s.walkers;
    work.tasks[2] = p.num_heads_q;
    Arena shared(nullptr), scratch(nullptr);
    Shared(p, s, shared);
    Scratch(p, s, scratch);
    work.shared_bytes = shared.size();
    work.scratch_bytes = scratch.size();
  }

  static void run(const Problem& p, const Work& work, int phase, int64_t task,
                  std::byte* shared_base, std::byte* scratch_base) {
    Shape const s(p);
    Arena shared_arena(shared_base), scratch_arena(scratch_base);
    Shared const shared(p, s, shared_arena);
    Scratch const scratch(p, s, scratch_arena);
    Backward const call{p, s, shared, scratch};
    if (phase == 0) call.prepare(task, work.tasks[0]);
    if (phase == 1) call.walk(task);
    if (phase == 2) call.finish(task);
  }

 private:
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

  const Problem& p;
  const Shape& shape;
  const Shared& shared;
  const Scratch& scratch;

  Backward(const Problem& p, const Shape& s, const Shared& shared, const Scratch& scratch)
      : p(p), shape(s), shared(shared), scratch(scratch) {}

  static constexpr T kInf = static_cast<T>(__builtin_inf());
  static constexpr T kLog2e = static_cast<T>(1.4426950408889634074);

  int64_t tensor_row(int64_t b, const tile::Sequence& seq, int64_t i) const {
    return p.cu_seqlens_q ? seq.q_begin + i : b * p.seqlen_q + i;
  }
  // Where a row of dQ is summed.
  T* dq_row(int64_t b, int64_t h, const tile::Sequence& seq, int64_t i) const {
    if (shared.dq) return shared.dq + (h * p.total_q + tensor_row(b, seq, i)) * p.head_dim;
    return row_of<T>(p.dq, b, h, seq.q_begin + i);
  }

  // ---- phase 0 ----------------------------------------------------------------------------------

  void prepare(int64_t task, int64_t tasks) const {
    if (task == 0)
      for (int64_t t = 0; t < shape.groups * shape.walkers; ++t) shared.progress[t] = 0;
    int64_t const dbias_rows = shape.dbias_rows(p);
    for (int64_t r = dbias_rows * task / tasks; r < dbias_rows * (task + 1) / tasks; ++r)
      clear_dbias(r);
    if (shape.row_blocks * p.batch == 0) return;
    int64_t const block = task % shape.row_blocks, h = task / shape.row_blocks % p.num_heads_q,
                  b = task / shape.row_blocks / p.num_heads_q;
    auto const seq = tile::sequence_of(p, b);
    int64_t const end = p.cu_seqlens_q ? seq.seqlen_q : p.seqlen_q;  // padding rows too
    for (int64_t i = block * shape.block_m; i < min_of(end, (block + 1) * shape.block_m); ++i) {
      bool const valid = i < seq.seqlen_q;
      int64_t const at = h * p.total_q + tensor_row(b, seq, i);
      T const lse = valid ? *row_of<T>(p.lse, b, h, seq.q_begin + i) : -kInf;
      bool const empty = lse == -kInf;
      shared.lse[at] = empty ? kInf : lse;
      shared.delta[at] = empty ? 0 : row_delta(b, h, seq.q_begin + i);
      if (p.dq && (shared.dq || !p.accumulate))
        __builtin_memset(dq_row(b, h, seq, i), 0, static_cast<size_t>(p.head_dim) * sizeof(T));
    }
  }

  // Where O is zero dO is not looked at: a row whose only weight is its sink's has O = 0, and its
  // dO may be anything.
  T row_delta(int64_t b, int64_t h, int64_t row) const {
    Vec<T> sum = {};
    with_element<T>(p.out.dtype, [&](auto* type) {
      using O = std::remove_pointer_t<decltype(type)>;
      const O* const out = row_of<O>(p.out, b, h, row);
      const O* const dout = row_of<O>(p.dout, b, h, row);
      auto const add = [&](Vec<T> o, Vec<T> g) { sum += o != 0 ? o * g : Vec<T>{}; };
      int64_t c = 0;
      for (; c + kLane <= p.head_dim_v; c += kLane) add(load_real(out + c), load_real(dout + c));
      if (int const rest = static_cast<int>(p.head_dim_v - c))
        add(load_real_n(out + c, rest), load_real_n(dout + c, rest));
    });
    return reduce_add<T>(sum) - (p.dlse ? *row_of<T>(p.dlse, b, h, row) : T{0});
  }

  void clear_dbias(int64_t row) const {
    int64_t const rows = p.dbias.row_stride == 0 ? 1 : p.seqlen_q;
    int64_t const heads = shape.join_heads ? 1 : p.num_heads_q;
    T* const x = static_cast<T*>(p.dbias.data) +
                 offset_of(p.dbias, row / rows / heads, row / rows % heads, row % rows, 0);
    for (int64_t j = 0; j < (shape.join_keys ? 1 : p.seqlen_k); ++j) x[j * p.dbias.col_stride] = 0;
  }

  // ---- phase 1 ----------------------------------------------------------------------------------

  // Neighbouring tasks work on the same heads: what they read and add to is then still in the
  // cache. They follow each other one query tile apart, which costs a wait at the start only.
  void walk(int64_t task) const {
    int64_t const group = task / shape.walkers, walker = task % shape.walkers;
    int64_t const kv_groups = shape.join_heads ? 1 : p.num_heads_kv;
    int64_t const b0 = shape.join_batch ? 0 : group / kv_groups;
    int64_t const b1 = shape.join_batch ? p.batch : b0 + 1;
    int64_t const h0 = shape.join_heads ? 0 : group % kv_groups;
    int64_t const h1 = shape.join_heads ? p.num_heads_kv : h0 + 1;
    int64_t const n0 = shape.join_keys ? 0 : walker;
    int64_t const n1 = shape.join_keys ? shape.key_blocks : walker + 1;
    int32_t* const progress = shared.progress + group * shape.walkers + walker;
    int32_t passed = 0;
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t n = n0; n < n1; ++n)
          key_block(b, h, n, walker > 0 ? progress - 1 : nullptr, progress, passed);
  }

  void key_block(int64_t b, int64_t h_kv, int64_t n_block, const int32_t* before, int32_t* progress,
                 int32_t& passed) const {
    ScoreContext const context = score_context(p, b);
    int64_t const key0 = n_block * shape.block_n;
    int const keys = static_cast<int>(
        max_of<int64_t>(0, min_of<int64_t>(shape.block_n, context.seq.seqlen_k - key0)));
    bool const k_finite = load_keys(context, h_kv, key0, keys);
    for (int64_t g = 0; g < shape.group; ++g)
      for (int64_t m = shape.row_blocks; m-- > 0;) {
        Tile t{b, h_kv * shape.group + g, m * shape.block_m, 0, key0, 0, 0, false, 0};
        bool const visited = keys > 0 && place(context, t, keys);
        if (visited) visit(context, t, h_kv, k_finite);
        if (!p.dq) continue;
        while (before && __atomic_load_n(before, __ATOMIC_ACQUIRE) <= passed) relax();
        if (visited)
          for (int r = 0; r < t.rows; ++r)
            write_row(dq_row(b, t.h, context.seq, t.row0 + r), scratch.dq + r * shape.d, p.head_dim,
                      true);
        __atomic_store_n(progress, ++passed, __ATOMIC_RELEASE);
      }
    int64_t const end = p.cu_seqlens_k ? context.seq.seqlen_k : p.seqlen_k;  // padding rows too
    int64_t const rows = max_of<int64_t>(0, min_of<int64_t>(shape.block_n, end - key0));
    if (p.dk) store_gradient(p.dk, context, b, h_kv, key0, rows, scratch.dk, shape.d, p.head_dim);
    if (p.dv)
      store_gradient(p.dv, context, b, h_kv, key0, rows, scratch.dv, shape.dv, p.head_dim_v);
  }

  static void relax() {
    for (int i = 0; i < 64; ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sched_yield();
  }

  bool load_keys(const ScoreContext& c, int64_t h_kv, int64_t key0, int keys) const {
    clear(scratch.dk, shape.block_n * shape.d);
    clear(scratch.dv, shape.block_n * shape.dv);
    if (keys <= 0) return true;
    const E* const k = row_of<E>(p.k, c.batch, h_kv, c.seq.k_begin + key0);
    const E* const v = row_of<E>(p.v, c.batch, h_kv, c.seq.k_begin + key0);
    for (int n = 0; n < keys; n += kPanel) {
      int const width = min_of(kPanel, keys - n);
      pack_transposed<U>(k + n * p.k.row_stride, p.k.row_stride, width, p.head_dim,
                         scratch.k_panels + n * shape.du, kPanel);
      pack_transposed<U>(v + n * p.v.row_stride, p.v.row_stride, width, p.head_dim_v,
                         scratch.v_panels + n * shape.dvu, kPanel);
    }
    return pack_stacked<U>(k, p.k.row_stride, keys, p.head_dim, scratch.k_stacked, scratch.ld_q);
  }

  template <class X>
  static void clear(X* x, int64_t n) {
    __builtin_memset(x, 0, static_cast<size_t>(n) * sizeof(X));
  }

  // Where the tile meets the key block; false if it does not.
  bool place(const ScoreContext& c, Tile& t, int keys) const {
    t.rows = static_cast<int>(
        max_of<int64_t>(0, min_of<int64_t>(shape.block_m, c.seq.seqlen_q - t.row0)));
    auto const hull = visible_hull(c, t.h, t.row0, t.row0 + t.rows, {t.key0, t.key0 + keys});
    if (hull.empty()) return false;
    t.first = static_cast<int>(hull.first - t.key0) / kPanel * kPanel;
    t.last = static_cast<int>(hull.last - t.key0);
    t.padded = round_up(t.last, kLane);
    t.excludes = !all_visible(c, t.row0, t.row0 + t.rows, {t.key0 + t.first, t.key0 + t.padded});
    return true;
  }

  void visit(const ScoreContext& c, const Tile& t, int64_t h_kv, bool k_finite) const {
    int64_t const row = c.seq.q_begin + t.row0;
    const E* const q = row_of<E>(p.q, t.b, t.h, row);
    bool q_finite = true, dout_finite = true;
    if constexpr (kUnit > 1)
      pack_rows<U>(q, p.q.row_stride, t.rows, p.head_dim, scratch.q_rows, scratch.ld_q);
    q_finite =
        pack_stacked<U>(q, p.q.row_stride, t.rows, p.head_dim, scratch.q_stacked, scratch.ld_q);
    with_element<T>(p.dout.dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      const G* const dout = row_of<G>(p.dout, t.b, t.h, row);
      if constexpr (kUnit > 1)
        pack_rows<U>(dout, p.dout.row_stride, t.rows, p.head_dim_v, scratch.dout_rows,
                     scratch.ld_dout);
      dout_finite = pack_stacked<U>(dout, p.dout.row_stride, t.rows, p.head_dim_v,
                                    scratch.dout_stacked, scratch.ld_dout);
    });

    for (int n = t.first; n < t.padded; n += kPanel) {
      int const width = min_of(kPanel, t.padded - n);
      gemm<Order::kRowMajor>(t.rows, width, shape.du, scratch.q_rows, scratch.ld_q,
                             scratch.k_panels + n * shape.du, kPanel, scratch.s + n, scratch.ld_s,
                             Init::kZero);
      gemm<Order::kRowMajor>(t.rows, width, shape.dvu, scratch.dout_rows, scratch.ld_dout,
                             scratch.v_panels + n * shape.dvu, kPanel, scratch.dp + n, scratch.ld_s,
                             Init::kZero);
    }
    differentiate(c, t);

    int const rows = t.rows, cols = t.last - t.first, first = t.first;
    int64_t const pairs = ceil_div(rows, kUnit), ld_s = scratch.ld_s, ld_ds = ld_s / kUnit;
    const U *p_stacked, *ds_stacked, *ds_rows;
    if constexpr (kUnit == 1) {
      p_stacked = scratch.s + first;
      ds_stacked = ds_rows = scratch.dp + first;
    } else {
      p_stacked = scratch.p_stacked + first;
      ds_stacked = scratch.ds_stacked + first;
      ds_rows = scratch.ds_rows + first / kUnit;
    }
    if (p.dv) {
      T* const dv = scratch.dv + first * shape.dv;
      if (dout_finite || !t.excludes)
        gemm<Order::kColMajor>(cols, shape.dv, pairs, p_stacked, ld_s, scratch.dout_stacked,
                               scratch.ld_dout, dv, shape.dv, Init::kAdd);
      else
        with_element<T>(p.dout.dtype, [&](auto* type) {
          using G = std::remove_pointer_t<decltype(type)>;
          add_nonzero(cols, rows, scratch.s + first, 1, ld_s, row_of<G>(p.dout, t.b, t.h, row),
                      p.dout.row_stride, dv, shape.dv, p.head_dim_v);
        });
    }
    if (p.dk) {
      T* const dk = scratch.dk + first * shape.d;
      if (q_finite || !t.excludes)
        gemm<Order::kColMajor>(cols, shape.d, pairs, ds_stacked, ld_s, scratch.q_stacked,
                               scratch.ld_q, dk, shape.d, Init::kAdd);
      else
        add_nonzero(cols, rows, scratch.dp + first, 1, ld_s, q, p.q.row_stride, dk, shape.d,
                    p.head_dim);
    }
    if (p.dq) {
      clear(scratch.dq, rows * shape.d);
      if (k_finite || !t.excludes)
        for (int n = 0; n < cols; n += kPanel)
          gemm<Order::kRowMajor>(rows, shape.d, ceil_div(min_of(kPanel, cols - n), kUnit),
                                 ds_rows + n / kUnit, ld_ds,
                                 scratch.k_stacked + (first + n) / kUnit * scratch.ld_q,
                                 scratch.ld_q, scratch.dq, shape.d, Init::kAdd);
      else
        add_nonzero(rows, cols, scratch.dp + first, ld_s, 1,
                    row_of<E>(p.k, t.b, h_kv, c.seq.k_begin + t.key0 + first), p.k.row_stride,
                    scratch.dq, shape.d, p.head_dim);
    }
  }

  // s: q·k -> P as dV sees it.  dp: dO·v -> scale dS.  Also as operands; and dS into dbias.
  void differentiate(const ScoreContext& c, const Tile& t) const {
    if (!t.excludes && !has_score_terms(p) && !p.dropout_threshold)
      return differentiate_plain(c, t);
    differentiate_any(c, t);
    if constexpr (kUnit > 1) {
      int64_t const first = t.first, ld = scratch.ld_s;
      int const cols = t.last - t.first;
      pack_stacked<U>(scratch.s + first, ld, t.rows, cols, scratch.p_stacked + first, ld);
      pack_stacked<U>(scratch.dp + first, ld, t.rows, cols, scratch.ds_stacked + first, ld);
      pack_rows<U>(scratch.dp + first, ld, t.rows, cols, scratch.ds_rows + first / kUnit,
                   ld / kUnit);
    }
  }

  // The same where nothing but scale stands between q·k and the score: in one pass.
  void differentiate_plain(const ScoreContext& c, const Tile& t) const {
    T const scale = static_cast<T>(p.scale);
    int64_t const at = t.h * p.total_q + tensor_row(t.b, c.seq, t.row0), ld = scratch.ld_s;
    const T *const lse = shared.lse + at, *const delta = shared.delta + at;
    auto const probability = [&](int r, int j) {
      return exp2((load(scratch.s + r * ld + j) * scale - lse[r]) * kLog2e);
    };
    auto const gradient = [&](int r, int j, Vec<T> x) {
      return x * scale * (load(scratch.dp + r * ld + j) - delta[r]);
    };
    if constexpr (kUnit == 1) {
      for (int r = 0; r < t.rows; ++r)
        for (int j = t.first; j < t.padded; j += kLane) {
          Vec<T> const x = probability(r, j);
          store(scratch.dp + r * ld + j, gradient(r, j, x));
          store(scratch.s + r * ld + j, x);
        }
    } else {
      for (int r = 0; r < t.rows; r += 2) {
        bool const pair = r + 1 < t.rows;
        auto* const rows = reinterpret_cast<BF16*>(scratch.ds_rows + r * (ld / 2));
        for (int j = t.first; j < t.padded; j += kLane) {
          Vec<T> const x0 = probability(r, j), x1 = pair ? probability(r + 1, j) : Vec<T>{};
          Vec<T> const g0 = gradient(r, j, x0), g1 = pair ? gradient(r + 1, j, x1) : Vec<T>{};
          Vec<uint32_t> const ds = to_bf16x2(g0, g1);
          store_units(scratch.p_stacked + r / 2 * ld + j, interleave(to_bf16x2(x0, x1)));
          store_units(scratch.ds_stacked + r / 2 * ld + j, interleave(ds));
          __builtin_memcpy(rows + j, &ds, kVecBytes / 2);
          if (pair) store_real(rows + ld + j, g1);
        }
      }
    }
  }

  // The two halves' bf16 in turns: a row above another as one row of units.
  static Vec<uint32_t> interleave(Vec<uint32_t> halves) {
    Vec<uint16_t> order;
    for (int i = 0; i < kLanes<uint16_t>; ++i)
      order[i] = static_cast<uint16_t>(i / 2 + i % 2 * kLanes<float>);
    return reinterpret_cast<Vec<uint32_t>>(
        __builtin_shuffle(reinterpret_cast<Vec<uint16_t>>(halves), order));
  }

  void differentiate_any(const ScoreContext& c, const Tile& t) const {
    for (int r = 0; r < t.rows; ++r) {
      scratch.row_index[r] = t.row0 + r;
      scratch.row_head[r] = t.h;
    }
    auto const view = [&](T* x, int last) {
      return ScoreTile<T>{x + t.first,       scratch.ld_s,     t.rows,          last - t.first,
                          scratch.row_index, scratch.row_head, t.key0 + t.first};
    };
    bool const terms = has_score_terms(p), dropout = p.dropout_threshold != 0;
    T* const slope = p.softcap > 0 ? scratch.slope + t.first : nullptr;
    if (terms) add_score_terms(c, view(scratch.s, t.last), slope);

    T const scale = static_cast<T>(p.scale), scale_in = terms ? T{1} : scale;
    T const keep_scale = static_cast<T>(p.dropout_scale);
    const T* const lse = shared.lse + t.h * p.total_q + tensor_row(t.b, c.seq, t.row0);
    const T* const delta = shared.delta + t.h * p.total_q + tensor_row(t.b, c.seq, t.row0);
    T const factor = p.dbias || slope ? T{1} : scale;  // else applied after dbias has its share
    if (dropout) drop(c, view(scratch.dp, t.padded));
    for (int r = 0; r < t.rows; ++r) {
      T *const s = scratch.s + r * scratch.ld_s, *const dp = scratch.dp + r * scratch.ld_s;
      for (int j = t.first; j < t.padded; j += kLane) {
        Vec<T> const probability = exp2((load(s + j) * scale_in - lse[r]) * kLog2e);
        store(s + j, probability);
        store(dp + j, probability * factor * (load(dp + j) * keep_scale - delta[r]));
      }
    }
    if (t.excludes) {
      exclude(c, view(scratch.s, t.padded), T{0});
      exclude(c, view(scratch.dp, t.padded), T{0});
    }
    if (dropout) {
      drop(c, view(scratch.s, t.padded));
      for (int r = 0; r < t.rows; ++r) {
        T* const s = scratch.s + r * scratch.ld_s;
        for (int j = t.first; j < t.padded; ++j) s[j] *= keep_scale;
      }
    }
    if (p.dbias) add_dbias(t);
    if (p.dbias || slope)
      for (int r = 0; r < t.rows; ++r) {
        T* const ds = scratch.dp + r * scratch.ld_s;
        const T* const f = slope ? scratch.slope + r * scratch.ld_s : nullptr;
        // An excluded score may have a NaN slope.
        for (int j = t.first; j < t.padded; j += kLane) {
          Vec<T> x = load(ds + j);
          if (f) x = x != 0 ? x * load(f + j) : x;
          store(ds + j, x * scale);
        }
      }
  }

  void add_dbias(const Tile& t) const {
    int const cols = t.last - t.first;
    auto const target = [&](int64_t row) {
      return static_cast<T*>(p.dbias.data) + offset_of(p.dbias, t.b, t.h, row, t.key0 + t.first);
    };
    auto const add = [&](const T* from, T* to) {
      if (p.dbias.col_stride == 0) {
        T sum = 0;
        for (int j = 0; j < cols; ++j) sum += from[j];
        *to += sum;
      } else if (p.dbias.col_stride == 1) {
        write_row(to, from, cols, true);
      } else {
        for (int j = 0; j < cols; ++j) to[j * p.dbias.col_stride] += from[j];
      }
    };
    if (p.dbias.row_stride != 0) {
      for (int r = 0; r < t.rows; ++r)
        add(scratch.dp + r * scratch.ld_s + t.first, target(t.row0 + r));
      return;
    }
    clear(scratch.dbias, cols);
    for (int r = 0; r < t.rows; ++r)
      write_row(scratch.dbias, scratch.dp + r * scratch.ld_s + t.first, cols, true);
    add(scratch.dbias, target(0));
  }

  // C += A X with the terms of A = 0 left out, whatever X holds there. a(i, k) is at
  // a[i * row_stride + k * col_stride].
  template <class X>
  static void add_nonzero(int m, int k, const T* a, int64_t row_stride, int64_t col_stride,
                          const X* x, int64_t x_stride, T* c, int64_t ldc, int64_t n) {
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < k; ++j) {
        T const factor = a[i * row_stride + j * col_stride];
        if (factor == 0) continue;
        for (int64_t col = 0; col < n; col += kLane) {
          int const rest = static_cast<int>(min_of<int64_t>(kLane, n - col));
          T* const to = c + i * ldc + col;
          store(to, load(to) + factor * load_real_n(x + j * x_stride + col, rest));
        }
      }
  }

  void store_gradient(const Rows& to, const ScoreContext& c, int64_t b, int64_t h, int64_t key0,
                      int64_t rows, const T* from, int64_t ld, int64_t cols) const {
    with_element<T>(to.dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      for (int64_t j = 0; j < rows; ++j)
        write_row(row_of<G>(to, b, h, c.seq.k_begin + key0 + j), from + j * ld, cols, p.accumulate);
    });
  }

  // ---- phase 2 ----------------------------------------------------------------------------------

  void finish(int64_t h) const {
    double dsink = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      auto const seq = tile::sequence_of(p, b);
      int64_t const end = p.cu_seqlens_q ? seq.seqlen_q : p.seqlen_q;
      for (int64_t i = 0; i < end; ++i) {
        int64_t const at = h * p.total_q + tensor_row(b, seq, i);
        if (p.dsinks)
          dsink -= __builtin_exp(double{p.sinks[h]} - shared.lse[at]) * shared.delta[at];
        if (p.dq && shared.dq)
          with_element<T>(p.dq.dtype, [&](auto* type) {
            using G = std::remove_pointer_t<decltype(type)>;
            write_row(row_of<G>(p.dq, b, h, seq.q_begin + i), dq_row(b, h, seq, i), p.head_dim,
                      p.accumulate);
          });
      }
    }
    if (p.dsinks)
      p.dsinks[h] = static_cast<float>(dsink + (p.accumulate ? double{p.dsinks[h]} : 0.0));
  }
};

template <DType D>
constexpr Entry backward_entry() {
  return {Backward<D>::kBlockM, Backward<D>::kBlockN, Backward<D>::plan, Backward<D>::run};
}

}  // namespace
}  // namespace flashcore::cpu
