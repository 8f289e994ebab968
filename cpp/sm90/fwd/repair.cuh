// Keeps the promise that an excluded key cannot reach the output.
//
// In the blocks a mask cuts, the tensor cores multiply excluded values by P = 0, and 0 * NaN (or
// 0 * Inf) is NaN. So when a warp has produced a value that is not finite, it comes back after its
// last tile, and computes those rows again over their visible keys only, by ordinary arithmetic. A
// row that sees a NaN gives NaN again; all others come out right. The check costs one instruction
// per element of O. The repair stands outside the tile loop because branches that differ between
// warps in there would move the loop's addresses out of the uniform registers (measured: -20 %).
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/registers.cuh"
#include "tile/mask.h"

namespace flashcore::sm90::fwd {

// NaN if any element of o is not finite, else 0.
template <int N>
FC_DEVICE float finite_probe(const float (&o)[N]) {
  float probe = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) probe = __fmaf_rn(o[i], 0.0f, probe);
  return probe;
}

template <class T>
struct Repair {
  using Element = typename T::Element;
  static constexpr int kCols = T::kHeadDim / 32;  // of a lane: lane, lane + 32, ...

  // A row of a (batch, head, row) matrix, shared by the lanes of a warp; zero past its end.
  struct Row {
    float x[kCols];
  };
  FC_DEVICE static Element* address(const MatrixRef& m, int batch, int head, int row) {
    return static_cast<Element*>(m.data) + batch * m.batch_stride + head * m.head_stride +
           row * m.row_stride + threadIdx.x % 32;
  }
  FC_DEVICE static Row load(const MatrixRef& m, int batch, int head, int row, int cols) {
    const Element* const p = address(m, batch, head, row);
    Row r;
#pragma unroll
    for (int c = 0; c < kCols; ++c)
      r.x[c] =
          static_cast<int>(threadIdx.x % 32) + 32 * c < cols ? static_cast<float>(p[32 * c]) : 0.0f;
    return r;
  }

  // One row of O from its definition, over keys [keys.first, keys.last).
  FC_DEVICE static Row attend(const FwdParams& p, const Row& q, int batch, int kv_head,
                              tile::KeyRange keys) {
    Row o = {};
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int j = static_cast<int>(keys.first); j < keys.last; ++j) {
      Row const k = load(p.k_ref, batch, kv_head, j, p.head_dim);
      Row const v = load(p.v_ref, batch, kv_head, j, p.head_dim_v);
      float s = 0.0f;
#pragma unroll
      for (int c = 0; c < kCols; ++c) s += q.x[c] * k.x[c];
#pragma unroll
      for (int offset = 16; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
      float const row_max_new = fmaxf(row_max, s);
      float const reference = row_max_new == -INFINITY ? 0.0f : row_max_new * p.scale_log2;
      float const alpha = exp2_approx(row_max * p.scale_log2 - reference);
      float const prob = exp2_approx(s * p.scale_log2 - reference);
      row_max = row_max_new;
      row_sum = row_sum * alpha + prob;
#pragma unroll
      for (int c = 0; c < kCols; ++c) o.x[c] = o.x[c] * alpha + prob * v.x[c];
    }
#pragma unroll
    for (float& x : o.x) x = row_sum == 0.0f ? 0.0f : x / row_sum;
    return o;
  }

  // Rows [row, row + 16) of one head whose output is not finite.
  FC_DEVICE static void rows(const FwdParams& p, int batch, int head, int row, int64_t q_offset) {
    for (int i = row; i < min_of(row + 16, p.seqlen_q); ++i) {
      Row const old = load(p.out_ref, batch, head, i, p.head_dim_v);
      if (!__any_sync(0xffffffffu, !(finite_probe(old.x) == 0.0f))) continue;
      tile::KeyRange const keys = tile::visible_keys(p.window, i, q_offset, p.seqlen_k);
      Row const o =
          attend(p, load(p.q_ref, batch, head, i, p.head_dim), batch, head / p.group, keys);
      Element* const out = address(p.out_ref, batch, head, i);
#pragma unroll
      for (int c = 0; c < kCols; ++c)
        if (static_cast<int>(threadIdx.x % 32) + 32 * c < p.head_dim_v)
          out[32 * c] = static_cast<Element>(o.x[c]);
    }
  }
};

}  // namespace flashcore::sm90::fwd
