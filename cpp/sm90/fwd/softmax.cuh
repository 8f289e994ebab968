// Online softmax over the two accumulator rows a thread shares with its quad.
#pragma once
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::fwd {

// The maximum a row's exponentials are relative to may lag behind the true one: it is raised only
// when the row exceeds it by more than a factor of 2^8, so that O is hardly ever rescaled. Exponents
// stay within 8 of the usual ones, all terms of a row share one reference, and floats do not care.
struct OnlineSoftmax {
  static constexpr int kRows = 2;

  float scale_log2;
  float headroom;                                   // 8 / scale_log2, finite
  float row_max[kRows] = {-INFINITY, -INFINITY};    // the reference, a raw score q . k
  float row_sum[kRows] = {0.0f, 0.0f};              // this thread's share until finish()
  float reference[kRows];                           // row_max * scale_log2; 0 if no key was visible
  float alpha[kRows];                               // what row r of O is to be multiplied by

  // Takes the new scores of row r into its maximum. A row without a visible key yet has row_max =
  // -inf and takes 0 as its reference, so that exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
  template <int N>
  FC_DEVICE void raise_max(const float (&s)[N], int r) {
    float m[2] = {s[2 * r], s[2 * r + 1]};  // two chains: half the latency of one
#pragma unroll
    for (int i = 4; i < N; i += 4) {
      m[0] = fmaxf(m[0], s[i + 2 * r]);
      m[1] = fmaxf(m[1], s[i + 2 * r + 1]);
    }
    float const block_max = quad_max(fmaxf(m[0], m[1]));
    float const row_max_new = block_max > row_max[r] + headroom ? block_max : row_max[r];
    reference[r] = row_max_new == -INFINITY ? 0.0f : row_max_new * scale_log2;
    alpha[r] = exp2_approx(row_max[r] * scale_log2 - reference[r]);
    row_max[r] = row_max_new;
  }

  // Row r of s becomes exp(scale * (s - row_max)) and is added to the row sum.
  template <int N>
  FC_DEVICE void exponentiate(float (&s)[N], int r) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float& a = s[i + 2 * r];
      float& b = s[i + 2 * r + 1];
      a = exp2_approx(__fmaf_rn(a, scale_log2, -reference[r]));
      b = exp2_approx(__fmaf_rn(b, scale_log2, -reference[r]));
      sum += a + b;
    }
    row_sum[r] = __fmaf_rn(row_sum[r], alpha[r], sum);
  }

  // Whether any row of the warp has a new reference; the same in all lanes.
  FC_DEVICE bool raised() const {
    return __any_sync(0xffffffffu, alpha[0] < 1.0f || alpha[1] < 1.0f);
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
