// Keeps the promise that an excluded position cannot reach a gradient.
//
// In the blocks a mask cuts, the tensor cores multiply excluded rows by P = 0 and dS = 0, and 0 *
// NaN (or 0 * Inf) is NaN; dS may be NaN itself, where dP is. So a warp that is about to write a
// part of a gradient that is not finite does not write it, but notes that in the workspace; after
// its last tile it works those rows out again from their definition, over the visible pairs only,
// by ordinary arithmetic. A row that sees a NaN gives NaN again; all others come out right.
// What stores dQ from its sums does the same at once. The check costs one instruction per element
// that is written, and the steps themselves nothing.
#pragma once
#include "sm90/bwd/dropout.h"
#include "sm90/bwd/store.cuh"
#include "sm90/bwd/traits.cuh"
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::bwd {

// Whether any lane of the warp holds a number that is not finite.
template <int N>
FC_DEVICE bool broken(const float (&x)[N]) {
  return __any_sync(0xffffffffu, !(finite_probe(x) == 0.0f));
}

// Where a warp of the consumers notes it. Of dK and dV: per key tile of a key head, by block of the
// cluster and warp. Of dQ: per query block of a head, by warp and half of its columns, or block of
// the cluster.
template <class T>
FC_DEVICE uint8_t* redo_keys(const BwdParams& p, const Work& work, int rank, int warp) {
  int64_t const tile = int64_t{work.kv_head} * p.head_key_blocks + work.key_block;
  return p.redo_keys + (tile * T::kCluster + rank) * (4 * T::kConsumers) + warp;
}
FC_DEVICE uint8_t* redo_queries(const BwdParams& p, const Work& work, int head, int m, int part) {
  return p.redo_queries + (int64_t{head} * p.head_blocks + work.stats + m) * 16 + part;
}

template <class T>
struct Repair {
  using Element = typename T::Element;

  // A row of a matrix, shared by the lanes of a warp: lane, lane + 32, ...
  template <int kCols>
  struct Row {
    float x[ceil_div(kCols, 32)] = {};

    FC_DEVICE void add(float factor, const Row& other) {
#pragma unroll
      for (int c = 0; c < ceil_div(kCols, 32); ++c) x[c] += factor * other.x[c];
    }
    FC_DEVICE float dot(const Row& other) const {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < ceil_div(kCols, 32); ++c) sum += x[c] * other.x[c];
#pragma unroll
      for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      return sum;
    }
  };
  using KRow = Row<T::kHeadDim>;   // of Q, K, dQ, dK
  using VRow = Row<T::kHeadDimV>;  // of V, dO, dV

  template <class Row>
  FC_DEVICE static Row load(const Matrix& m, int batch, int head, int64_t row, int cols) {
    int const lane = threadIdx.x % 32;
    const Element* const from = row_address<Element>(m, batch, head, row, lane);
    Row r;
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(Row) / 4); ++c)
      if (lane + 32 * c < cols) r.x[c] = static_cast<float>(from[32 * c]);
    return r;
  }
  // Columns [first, last).
  template <class Row>
  FC_DEVICE static void store(const BwdParams& p, const Matrix& m, const Row& r, float scale,
                              int batch, int head, int64_t row, int first, int last) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(Row) / 4); ++c) {
      int const col = lane + 32 * c;
      if (col < first || col >= last) continue;
      if (m.f32) {
        float* const to = row_address<float>(m, batch, head, row, col);
        *to = r.x[c] * scale + (p.accumulate ? *to : 0.0f);
      } else {
        Element* const to = row_address<Element>(m, batch, head, row, col);
        *to =
            static_cast<Element>(r.x[c] * scale + (p.accumulate ? static_cast<float>(*to) : 0.0f));
      }
    }
  }

  // Of query i and key j: what dV multiplies and what dK and dQ do. See terms.cuh.
  struct Pair {
    float p, ds;
  };
  FC_DEVICE static Pair pair(const BwdParams& p, const tile::Sequence& seq, int batch, int head,
                             int64_t i, int64_t j, int64_t stats, float s, float dp) {
    float bend = 1.0f, keep = 1.0f;
    if constexpr (T::kTerms) {
      if (p.softcap_inner != 0.0f) {
        s = tanh_approx(s * p.softcap_inner);
        bend = 1.0f - s * s;
      }
      if (p.alibi_slopes)
        s -= p.alibi_slopes[batch * p.alibi_batch_stride + head] * rcp_approx(p.score_scale) *
             fabsf(static_cast<float>(i + seq.q_offset - j));
      if (p.dropout_threshold &&
          tile::dropout_bits(dropout_key(p), static_cast<uint32_t>(batch),
                             static_cast<uint32_t>(head), static_cast<uint32_t>(i),
                             static_cast<uint32_t>(j)) < p.dropout_threshold)
        keep = 0.0f;
    }
    float const prob = exp2_approx((s + p.minus_lse[stats]) * p.scale_log2);
    float const kept_dp = keep == 0.0f ? 0.0f : T::kTerms ? dp * p.dropout_scale : dp;
    return {keep == 0.0f ? 0.0f : prob, prob * bend * (kept_dp + p.minus_delta[stats])};
  }

  FC_DEVICE static int64_t stats_of(const BwdParams& p, int batch, int head) {
    return (int64_t{head} * p.head_blocks + first_query_block(p, batch, T::kBlockM)) * T::kBlockM;
  }

  // Visits to the keys that row i may see, and to the rows that may see key j.
  FC_DEVICE static auto kept_keys(const BwdParams& p, int batch, int head, int64_t i) {
    if constexpr (T::kLists)
      return p.kept_keys.of(batch, head, static_cast<int>(i / T::kBlockM));
    else
      return tile::AllBlocks{};
  }
  FC_DEVICE static auto kept_rows(const BwdParams& p, int batch, int head, int64_t j) {
    if constexpr (T::kLists) {
      auto kept = p.kept_queries.of(batch, head, static_cast<int>(j / kListKeys));
      kept.parts = p.mask_block_q;
      return kept;
    } else {
      return tile::AllBlocks{};
    }
  }

  // Columns [first, last) of row i of dQ.
  FC_DEVICE static void dq_row(const BwdParams& p, const tile::Sequence& seq, int batch, int head,
                               int64_t i, int first, int last) {
    int const kv_head = head / p.group;
    KRow const q = load<KRow>(p.q_ref, batch, head, seq.q_begin + i, p.head_dim);
    VRow const dout = load<VRow>(p.dout_ref, batch, head, seq.q_begin + i, p.head_dim_v);
    int64_t const stats = stats_of(p, batch, head) + i;
    tile::KeyRange keys = tile::visible_keys(seq.band, i, seq.seqlen_k);
    if (p.minus_lse[stats] == -INFINITY) keys.last = keys.first;
    auto const kept = kept_keys(p, batch, head, i);
    auto const end = kept.below(keys.last);
    KRow dq;
    for (auto visit = kept.below(keys.first); visit < end; ++visit) {
      int64_t const j = kept.at(visit);
      KRow const k = load<KRow>(p.k_ref, batch, kv_head, seq.k_begin + j, p.head_dim);
      VRow const v = load<VRow>(p.v_ref, batch, kv_head, seq.k_begin + j, p.head_dim_v);
      dq.add(pair(p, seq, batch, head, i, j, stats, q.dot(k), dout.dot(v)).ds, k);
    }
    store(p, p.dq, dq, p.scale, batch, head, seq.q_begin + i, first, last);
  }
  // Those of `rows` rows from `row` on that are to be written; those of padding are zero.
  FC_DEVICE static void dq_rows(const BwdParams& p, int batch, int head, int row, int rows,
                                int first, int last) {
    tile::Sequence const seq = tile::sequence_of(p, batch);
    for (int64_t i = row; i < row + rows; ++i) {
      if (i < seq.seqlen_q)
        dq_row(p, seq, batch, head, i, first, last);
      else if (!p.cu_seqlens_q && i < p.seqlen_q)
        store(p, p.dq, KRow(), 1.0f, batch, head, seq.q_begin + i, first, last);
    }
  }

  // Row j of dK and of dV, the one or the other if it is asked for.
  FC_DEVICE static void key_row(const BwdParams& p, const Work& work, int64_t j, bool want_dk,
                                bool want_dv) {
    tile::Sequence const seq = tile::sequence_of(p, work.batch);
    bool const padding = j >= seq.seqlen_k;
    KRow const k = load<KRow>(p.k_ref, work.batch, work.kv_head, seq.k_begin + j, p.head_dim);
    VRow const v = load<VRow>(p.v_ref, work.batch, work.kv_head, seq.k_begin + j, p.head_dim_v);
    tile::KeyRange rows = tile::visible_rows(seq.band, j, seq.seqlen_q);
    if (padding) rows.last = rows.first;
    KRow dk;
    VRow dv;
    for (int head = work.kv_head * p.group; head < (work.kv_head + 1) * p.group; ++head) {
      auto const kept = kept_rows(p, work.batch, head, j);
      auto const end = kept.below(rows.last);
      for (auto visit = kept.below(rows.first); visit < end; ++visit) {
        int64_t const i = kept.at(visit);
        int64_t const stats = stats_of(p, work.batch, head) + i;
        if (p.minus_lse[stats] == -INFINITY) continue;
        KRow const q = load<KRow>(p.q_ref, work.batch, head, seq.q_begin + i, p.head_dim);
        VRow const dout = load<VRow>(p.dout_ref, work.batch, head, seq.q_begin + i, p.head_dim_v);
        Pair const x = pair(p, seq, work.batch, head, i, j, stats, k.dot(q), v.dot(dout));
        dk.add(x.ds, q);
        dv.add(x.p, dout);
      }
    }
    int64_t const to = seq.k_begin + j;
    if (want_dk && p.dk.data)
      store(p, p.dk, dk, p.scale, work.batch, work.kv_head, to, 0, p.head_dim);
    if (want_dv && p.dv.data)
      store(p, p.dv, dv, T::kTerms ? p.dropout_scale : 1.0f, work.batch, work.kv_head, to, 0,
            p.head_dim_v);
  }
};

}  // namespace flashcore::sm90::bwd
