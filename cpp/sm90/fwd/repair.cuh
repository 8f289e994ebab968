// Keeps the promise that an excluded key cannot reach the output.
//
// In the blocks a mask cuts, the tensor cores multiply excluded values by P = 0, and 0 * NaN (or
// 0 * Inf) is NaN. So a row of O that is not finite is computed again, over its visible keys only,
// by ordinary arithmetic. A row that sees a NaN gives NaN again; all others come out right. The
// check costs one instruction per element of O, the recomputation nothing unless it happens.
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/registers.cuh"
#include "tile/mask.h"

namespace flashcore::sm90::fwd {

// Bit r of the result: row r of this warp's 16 holds a value that is not finite.
template <int N>
FC_DEVICE uint32_t broken_rows(const float (&o)[N]) {
  float probe[2] = {0.0f, 0.0f};  // stays 0 while every element is finite
#pragma unroll
  for (int i = 0; i < N; ++i) probe[(i / 2) % 2] = __fmaf_rn(o[i], 0.0f, probe[(i / 2) % 2]);
  uint32_t rows = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t const lanes = __ballot_sync(0xffffffffu, !(probe[r] == 0.0f));
    for (int quad = 0; quad < 8; ++quad)
      if (lanes >> (4 * quad) & 0xFu) rows |= 1u << (quad + 8 * r);
  }
  return rows;
}

// One element of a (batch, head, row) matrix in global memory.
template <class Element>
FC_DEVICE float load_element(const MatrixRef& m, int batch, int head, int row, int col) {
  auto const* const base = static_cast<const Element*>(m.data);
  return static_cast<float>(
      base[batch * m.batch_stride + head * m.head_stride + row * m.row_stride + col]);
}

// Recomputes the rows in `rows` and writes them over this warp's staging rows. The lanes share the
// columns.
template <class T>
__device__ __forceinline__ void repair_rows(const FwdParams& p, typename T::Shared& sh,
                                            uint32_t rows, int tile_row, int row, int head,
                                            int batch, int64_t q_offset) {
  using Element = typename T::Element;
  constexpr int kCols = T::kHeadDim / 32;  // columns of a lane
  int const lane = threadIdx.x % 32;
  int const kv_head = head / p.group;
  for (; rows; rows &= rows - 1) {
    int const r = __ffs(static_cast<int>(rows)) - 1;
    if (row + r >= p.seqlen_q) continue;
    tile::KeyRange const keys = tile::visible_keys(p.window, row + r, q_offset, p.seqlen_k);
    float q[kCols], o[kCols];
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      int const col = lane + 32 * c;
      q[c] = col < p.head_dim ? load_element<Element>(p.q_ref, batch, head, row + r, col) : 0.0f;
      o[c] = 0.0f;
    }
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int j = static_cast<int>(keys.first); j < keys.last; ++j) {
      float s = 0.0f;
#pragma unroll
      for (int c = 0; c < kCols; ++c)
        if (lane + 32 * c < p.head_dim)
          s += q[c] * load_element<Element>(p.k_ref, batch, kv_head, j, lane + 32 * c);
#pragma unroll
      for (int offset = 16; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
      float const row_max_new = fmaxf(row_max, s);
      float const reference = row_max_new == -INFINITY ? 0.0f : row_max_new * p.scale_log2;
      float const alpha = exp2_approx(row_max * p.scale_log2 - reference);
      float const prob = exp2_approx(s * p.scale_log2 - reference);
      row_max = row_max_new;
      row_sum = row_sum * alpha + prob;
#pragma unroll
      for (int c = 0; c < kCols; ++c)
        if (lane + 32 * c < p.head_dim_v)
          o[c] = o[c] * alpha +
                 prob * load_element<Element>(p.v_ref, batch, kv_head, j, lane + 32 * c);
    }
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      int const col = lane + 32 * c;
      char* const panel = sh.q + col / kPanelCols * T::kBlockM * kPanelBytes;
      uint32_t const offset = swizzled_offset(tile_row + r, col % kPanelCols / 8) + col % 8 * 2;
      *reinterpret_cast<Element*>(panel + offset) =
          static_cast<Element>(row_sum == 0.0f ? 0.0f : o[c] / row_sum);
    }
  }
}

}  // namespace flashcore::sm90::fwd
