// Keeps two promises: an excluded key cannot reach the output, and no row loses its terms to the
// range of float.
//
// In the blocks a mask cuts, the tensor cores multiply excluded values by P = 0, and 0 * NaN (or
// 0 * Inf) is NaN. And a row whose reference nobody raised in time overflows (softmax.cuh). So when
// a warp has produced a value that is not finite, it comes back after its last tile, and computes
// those rows again over their visible keys only, by ordinary arithmetic. A row that sees a NaN
// gives NaN again; all others come out right. The check costs one instruction
// per element of O. The repair stands outside the tile loop because branches that differ between
// warps in there would move the loop's addresses out of the uniform registers (measured: -20 %).
#pragma once
#include "sm90/fwd/epilogue.cuh"
#include "sm90/fwd/terms.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/registers.cuh"
#include "tile/mask.h"
#include "tile/seqlen.h"

namespace flashcore::sm90::fwd {

template <class T>
struct Repair {
  using Element = typename T::Element;

  // A row of a (batch, head, row) matrix, shared by the lanes of a warp: lane, lane + 32, ...
  template <int kCols>
  struct Row {
    float x[kCols / 32] = {};
  };
  using KRow = Row<T::kHeadDim>;
  using VRow = Row<T::kHeadDimV>;

  FC_DEVICE static Element* address(const MatrixRef& m, int batch, int head, int64_t row) {
    return static_cast<Element*>(m.data) + batch * m.batch_stride + head * m.head_stride +
           row * m.row_stride + threadIdx.x % 32;
  }
  FC_DEVICE static bool inside(int c, int cols) {
    return static_cast<int>(threadIdx.x % 32) + 32 * c < cols;
  }
  // p: this lane's first element.
  template <class Row, class E>
  FC_DEVICE static Row load_row(const E* p, int cols) {
    Row r;
#pragma unroll
    for (int c = 0; c < static_cast<int>(sizeof(Row) / 4); ++c)
      if (inside(c, cols)) r.x[c] = static_cast<float>(p[32 * c]);
    return r;
  }
  template <class Row>
  FC_DEVICE static Row load(const MatrixRef& m, int batch, int head, int64_t row, int cols) {
    return load_row<Row>(address(m, batch, head, row), cols);
  }

  // The score and the weight of one pair, as the kernel would have them.
  FC_DEVICE static float score(const FwdParams& p, const Work& work, float s, int64_t distance) {
    if constexpr (T::kTerms) {
      if (p.softcap_inner != 0.0f) s = tanh_approx(s * p.softcap_inner);
      if (p.alibi_slopes)
        s -= p.alibi_slopes[work.batch * p.alibi_batch_stride + work.head] / p.scale *
             fabsf(static_cast<float>(distance));
    }
    return s;
  }
  FC_DEVICE static bool dropped(const FwdParams& p, const Work& work, int i, int j) {
    if (!T::kTerms || !p.dropout_threshold) return false;
    return tile::dropout_bits(ScoreTerms::key_of(p), work.batch, work.head, i, j) <
           p.dropout_threshold;
  }

  // Which keys row i sees, as visits.
  FC_DEVICE static tile::KeyRange keys_of(const FwdParams& p, const Work& work,
                                          const tile::Sequence& seq, int i) {
    if (i >= seq.seqlen_q) return {};  // padding
    tile::KeyRange keys = tile::visible_keys<int64_t>(seq.band, i, seq.seqlen_k);
    int64_t const part = int64_t{p.split_blocks} * T::kBlockN;
    keys = {max_of(keys.first, work.split * part), min_of(keys.last, (work.split + 1) * part)};
    auto const kept = kept_keys(p, work);
    return {kept.below(keys.first), kept.below(keys.last)};
  }
  FC_DEVICE static auto kept_keys(const FwdParams& p, const Work& work) {
    auto kept = kept_blocks<T>(p, work);
    if constexpr (T::kLists) kept.parts = p.mask_block_k;  // of single keys
    return kept;
  }
  FC_DEVICE static float dot(const KRow& q, const KRow& k) {
    float s = 0.0f;
#pragma unroll
    for (int c = 0; c < T::kHeadDim / 32; ++c) s += q.x[c] * k.x[c];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
    return s;
  }

  // Row i of O from its definition, and its lse. Columns that are finite in `old` are right there.
  // If lse is, too, or not wanted, it is enough that all others have met a NaN, which they stay.
  FC_DEVICE static VRow attend(const FwdParams& p, const Work& work, const tile::Sequence& seq,
                               int i, VRow const& old, bool lse_too, float& lse) {
    int const kv_head = work.head / p.group;
    KRow const q = load<KRow>(p.q_ref, work.batch, work.head, seq.q_begin + i, p.head_dim);
    tile::KeyRange const keys = keys_of(p, work, seq, i);
    auto const kept = kept_keys(p, work);
    VRow o;
    float row_max = -INFINITY, row_sum = 0.0f, reference = 0.0f;
    for (int64_t visit = keys.first; visit < keys.last; ++visit) {
      int64_t const j = kept.at(visit);
      KRow const k = load<KRow>(p.k_ref, work.batch, kv_head, seq.k_begin + j, p.head_dim);
      VRow const v = load<VRow>(p.v_ref, work.batch, kv_head, seq.k_begin + j, p.head_dim_v);
      float const s = score(p, work, dot(q, k), i + seq.q_offset - j);
      float const row_max_new = fmaxf(row_max, s);
      float const raised = row_max_new == -INFINITY ? 0.0f : row_max_new * p.scale_log2;
      // Both as they were rounded; exactly 1 where the maximum stays.
      float const alpha = exp2_approx(row_max == -INFINITY ? -INFINITY : reference - raised);
      reference = raised;
      float const prob = exp2_approx(s * p.scale_log2 - reference);
      row_max = row_max_new;
      row_sum = row_sum * alpha + prob;
      if (row_sum != row_sum) break;  // a NaN that the row sees: it stays NaN, whatever follows
      float const kept = dropped(p, work, i, static_cast<int>(j)) ? 0.0f : 1.0f;
#pragma unroll
      for (int c = 0; c < T::kHeadDimV / 32; ++c)
        o.x[c] = o.x[c] * alpha + (kept == 0.0f ? 0.0f : prob * v.x[c]);
      if (!lse_too && j % 32 == 31) {
        bool settled = row_sum > 0.0f;  // or what is 0 * NaN so far could yet be written as 0
#pragma unroll
        for (int c = 0; c < T::kHeadDimV / 32; ++c) settled &= isfinite(old.x[c]) || isnan(o.x[c]);
        if (__all_sync(0xffffffffu, settled)) break;
      }
    }
    float factor = T::kTerms ? p.dropout_scale : 1.0f;
    lse = row_max * p.scale + __logf(row_sum);
    if (p.sinks && work.split == 0) {
      float const sink = p.sinks[work.head];
      factor /= 1.0f + __expf(sink - lse);
      lse = fmaxf(lse, sink) + __logf(1.0f + __expf(-fabsf(lse - sink)));
    }
#pragma unroll
    for (float& x : o.x) x = row_sum == 0.0f ? 0.0f : x / row_sum * factor;
    return o;
  }

  // The NaNs among keys that all of a warp's rows see: those rows need no repair, so that a NaN in
  // the inputs costs little. Computing a row goes from key to key, and waits for each; looking for
  // NaNs does not.
  struct Nans {
    bool looked = false;
    bool in_k = false;  // makes all of a row NaN
    VRow in_v;          // NaN: makes the column so
  };
  FC_DEVICE static Nans find_nans(const FwdParams& p, const Work& work, tile::KeyRange keys,
                                  int64_t k_begin) {
    constexpr int kAtOnce = 4;
    int const kv_head = work.head / p.group;
    auto const kept = kept_keys(p, work);
    Nans nans{true};
    for (int64_t visit = keys.first; visit < keys.last && !nans.in_k; visit += kAtOnce) {
      bool found = false;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        int64_t const j = k_begin + kept.at(min_of(visit + n, keys.last - 1));
        KRow const k = load<KRow>(p.k_ref, work.batch, kv_head, j, p.head_dim);
        VRow const v = load<VRow>(p.v_ref, work.batch, kv_head, j, p.head_dim_v);
#pragma unroll
        for (int c = 0; c < T::kHeadDim / 32; ++c) found |= isnan(k.x[c]);
#pragma unroll
        for (int c = 0; c < T::kHeadDimV / 32; ++c)
          if (isnan(v.x[c])) nans.in_v.x[c] = NAN;
      }
      nans.in_k = __any_sync(0xffffffffu, found);
    }
    return nans;
  }

  // Whether the NaNs in V are all that is wrong with row i, and stay: dropout may drop them, and a
  // row whose scores are all -inf is zero.
  FC_DEVICE static bool explains(const FwdParams& p, const Work& work, const tile::Sequence& seq,
                                 int i, const Nans& nans, const VRow& old) {
    bool all = !(T::kTerms && p.dropout_threshold);
#pragma unroll
    for (int c = 0; c < T::kHeadDimV / 32; ++c) all &= isfinite(old.x[c]) || isnan(nans.in_v.x[c]);
    if (!__all_sync(0xffffffffu, all)) return false;
    int64_t const j = kept_keys(p, work).at(keys_of(p, work, seq, i).first);
    KRow const q = load<KRow>(p.q_ref, work.batch, work.head, seq.q_begin + i, p.head_dim);
    KRow const k =
        load<KRow>(p.k_ref, work.batch, work.head / p.group, seq.k_begin + j, p.head_dim);
    return score(p, work, dot(q, k), i + seq.q_offset - j) != -INFINITY;
  }

  // Rows [row, row + 16) of the tile's head, those whose output is not finite.
  FC_DEVICE static void rows(const FwdParams& p, const Work& work, int row) {
    tile::Sequence const seq = tile::sequence_of(p, work.batch);
    int64_t const last = p.cu_seqlens_q ? seq.seqlen_q : p.seqlen_q;
    Nans nans;
    for (int i = row; i < min_of<int64_t>(row + 16, last); ++i) {
      float* const partial = p.partial_out + partial_index(p, work, i) * p.head_dim_v;
      bool const split = p.num_splits > 1;
      VRow const old =
          split ? load_row<VRow>(partial + threadIdx.x % 32, p.head_dim_v)
                : load<VRow>(p.out_ref, work.batch, work.head, seq.q_begin + i, p.head_dim_v);
      if (!__any_sync(0xffffffffu, !(finite_probe(old.x) == 0.0f))) continue;
      // An lse that is a number has not met what went wrong.
      float* const all = lse_rows(p, work);
      bool const lse_too = all && !(all[i] < INFINITY);
      if (i < seq.seqlen_q) {
        if (!nans.looked)
          nans =
              find_nans(p, work,
                        {keys_of(p, work, seq, min_of<int64_t>(row + 16, seq.seqlen_q) - 1).first,
                         keys_of(p, work, seq, row).last},
                        seq.k_begin);
        if (nans.in_k || (!lse_too && explains(p, work, seq, i, nans, old))) continue;
      }
      float lse;
      VRow const o = attend(p, work, seq, i, old, lse_too, lse);
      if (lse_too) all[i] = lse;
      Element* const out = address(p.out_ref, work.batch, work.head, seq.q_begin + i);
#pragma unroll
      for (int c = 0; c < T::kHeadDimV / 32; ++c) {
        if (!inside(c, p.head_dim_v) || isfinite(old.x[c])) continue;
        if (split)
          partial[threadIdx.x % 32 + 32 * c] = o.x[c];
        else
          out[32 * c] = static_cast<Element>(o.x[c]);
      }
    }
  }
};

}  // namespace flashcore::sm90::fwd
