// One tile of the backward pass between its products: from S to P and from dP to dS.
#pragma once
#include "cpu/backward_layout.h"

namespace flashcore::cpu {
namespace {

template <DType D>
struct Differentiate {
  using Layout = BackwardLayout<D>;
  using T = typename Layout::T;
  using U = typename Layout::U;
  using Tile = typename Layout::Tile;
  static constexpr int kLane = Layout::kLane, kUnit = Layout::kUnit;
  static constexpr T kLog2e = static_cast<T>(1.4426950408889634074);

  const Problem& p;
  const typename Layout::Shared& shared;
  const typename Layout::Scratch& scratch;

  // s: q·k -> P as dV sees it.  dp: dO·v -> scale dS.  Also as operands; and dS into dbias.
  void run(const ScoreContext& c, const Tile& t) const {
    if (!t.excludes && !has_score_terms(p) && !p.dropout_threshold) return plain(c, t);
    any(c, t);
    if constexpr (kUnit > 1) {
      int64_t const first = t.first, ld = scratch.ld_s;
      int const cols = t.last - t.first;
      pack_stacked<U>(scratch.s + first, ld, t.rows, cols, scratch.p_stacked + first, ld);
      pack_stacked<U>(scratch.dp + first, ld, t.rows, cols, scratch.ds_stacked + first, ld);
      pack_rows<U>(scratch.dp + first, ld, t.rows, cols, scratch.ds_rows + first / kUnit,
                   ld / kUnit);
    }
  }

 private:
  // The same where nothing but scale stands between q·k and the score: in one pass.
  void plain(const ScoreContext& c, const Tile& t) const {
    T const scale = static_cast<T>(p.scale);
    int64_t const at = t.h * p.total_q + tensor_row(p, t.b, c.seq, t.row0), ld = scratch.ld_s;
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

  void any(const ScoreContext& c, const Tile& t) const {
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
    const T* const lse = shared.lse + t.h * p.total_q + tensor_row(p, t.b, c.seq, t.row0);
    const T* const delta = shared.delta + t.h * p.total_q + tensor_row(p, t.b, c.seq, t.row0);
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
};

}  // namespace
}  // namespace flashcore::cpu
