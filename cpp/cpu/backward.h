// Attention backward by recomputation:
//
//     P = exp(S - lse)      delta = rowsum(dO ∘ O) - dlse      dP = dO V^T
//     dS = P ∘ (dP - delta)     dV = P^T dO     dK = scale dS^T Q     dQ = scale dS K
//     dbias = dS summed over what bias broadcasts over         dsinks = -sum exp(sink - lse) delta
//
// Phase 0  delta, and zero in what phase 1 adds to.
// Phase 1  One task owns block_n keys of one kv head: it packs K and V once, walks over the query
//          tiles of the head's group, and keeps dK and dV. Its part of dQ is added to memory in
//          ascending order of the key blocks: a task may add to a tile when all tasks of earlier
//          blocks are past it. So the sums have one order whatever the number of threads, with no
//          memory for partial sums. Tasks start in that order too, so those waited for are always
//          running; all walk from the last query tile to the first, since under a causal mask every
//          task visits the last one and early blocks simply go on longer. Nobody waits for a tile
//          it does not visit: the short tasks of a causal mask would last as long as the first one.
// Phase 2  dQ converted to its dtype; dsinks.
//
// Excluded entries of P and dS are set to zero, never multiplied by one. The products run over
// whole tiles, where 0 * NaN would spread: a tile with an exclusion whose rows or keys are not all
// finite goes through add_nonzero instead.
#pragma once
#include <sched.h>

#include "cpu/backward_layout.h"
#include "cpu/differentiate.h"
#include "cpu/entry.h"

namespace flashcore::cpu {
namespace {

template <DType D>
class Backward {
  using Layout = BackwardLayout<D>;
  using E = typename Layout::E;
  using T = typename Layout::T;
  using U = typename Layout::U;
  using Shape = typename Layout::Shape;
  using Shared = typename Layout::Shared;
  using Scratch = typename Layout::Scratch;
  using Tile = typename Layout::Tile;
  static constexpr int kLane = Layout::kLane, kUnit = Layout::kUnit, kPanel = Layout::kPanel;

 public:
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
  const Problem& p;
  const Shape& shape;
  const Shared& shared;
  const Scratch& scratch;

  Backward(const Problem& p, const Shape& s, const Shared& shared, const Scratch& scratch)
      : p(p), shape(s), shared(shared), scratch(scratch) {}

  static constexpr T kInf = static_cast<T>(__builtin_inf());

  // Where a row of dQ is summed.
  T* dq_row(int64_t b, int64_t h, const tile::Sequence& seq, int64_t i) const {
    if (shared.dq) return shared.dq + (h * p.total_q + tensor_row(p, b, seq, i)) * p.head_dim;
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
      int64_t const at = h * p.total_q + tensor_row(p, b, seq, i);
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
    int32_t* const first = shared.progress + group * shape.walkers;
    int32_t passed = 0;
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t n = n0; n < n1; ++n) key_block(b, h, n, first, first + walker, passed);
  }

  // progress: how many tiles this task is past; from `first` on to it, those of earlier key blocks.
  void key_block(int64_t b, int64_t h_kv, int64_t n_block, const int32_t* first, int32_t* progress,
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
        if (visited) {
          for (const int32_t* before = first; before != progress; ++before)
            while (__atomic_load_n(before, __ATOMIC_ACQUIRE) <= passed) relax();
          for (int r = 0; r < t.rows; ++r)
            write_row(dq_row(b, t.h, context.seq, t.row0 + r), scratch.dq + r * shape.d, p.head_dim,
                      true);
        }
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
    Differentiate<D>{p, shared, scratch}.run(c, t);

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
        int64_t const at = h * p.total_q + tensor_row(p, b, seq, i);
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
  return {BackwardLayout<D>::kBlockM, BackwardLayout<D>::kBlockN, Backward<D>::plan,
          Backward<D>::run};
}

}  // namespace
}  // namespace flashcore::cpu
