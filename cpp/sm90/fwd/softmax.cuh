// Online softmax over the two accumulator rows a thread shares with its quad.
#pragma once
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::fwd {

struct OnlineSoftmax {
  static constexpr int kRows = 2;

  float scale_log2;
  float row_max[kRows] = {-INFINITY, -INFINITY};  // of the raw scores q . k
  float row_sum[kRows] = {0.0f, 0.0f};            // this thread's share until finish()
  float alpha[kRows];                             // what the last update multiplies O by

  // s becomes exp(scale * (s - row_max)); a row without a visible key yet has row_max = -inf and
  // takes 0 as its reference, so that exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
  template <int N>
  FC_DEVICE void update(float (&s)[N]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float m[2] = {row_max[r], row_max[r]};  // two chains: half the latency of one
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        m[0] = fmaxf(m[0], s[i + 2 * r]);
        m[1] = fmaxf(m[1], s[i + 2 * r + 1]);
      }
      float const row_max_new = quad_max(fmaxf(m[0], m[1]));
      float const reference = row_max_new == -INFINITY ? 0.0f : row_max_new * scale_log2;
      alpha[r] = exp2_approx(row_max[r] * scale_log2 - reference);
      row_max[r] = row_max_new;

      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        float& a = s[i + 2 * r];
        float& b = s[i + 2 * r + 1];
        a = exp2_approx(__fmaf_rn(a, scale_log2, -reference));
        b = exp2_approx(__fmaf_rn(b, scale_log2, -reference));
        sum += a + b;
      }
      row_sum[r] = __fmaf_rn(row_sum[r], alpha[r], sum);
    }
  }

  template <int N>
  FC_DEVICE void rescale(float (&o)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] *= alpha[(i / 2) % 2];
  }

  // Completes the row sums over the quad and divides. A row that saw no key gives exactly zero.
  template <int N>
  FC_DEVICE void finish(float (&o)[N]) {
    float inverse[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_sum[r] = quad_sum(row_sum[r]);
      inverse[r] = __frcp_rn(row_sum[r]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      int const r = (i / 2) % 2;
      o[i] = row_sum[r] == 0.0f ? 0.0f : o[i] * inverse[r];
    }
  }

  FC_DEVICE float lse(int r, float scale) const {
    return row_sum[r] == 0.0f ? -INFINITY : row_max[r] * scale + __logf(row_sum[r]);
  }
};

}  // namespace flashcore::sm90::fwd
