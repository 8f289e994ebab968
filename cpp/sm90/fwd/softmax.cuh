// Online softmax over the two accumulator rows a thread shares with its quad.
#pragma once
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::fwd {

// The maximum a row's exponentials are relative to may lag behind the true one: it is raised only
// when a score exceeds it by more than a factor of 2^8, so that O is hardly ever rescaled and the
// quad hardly ever meets. Exponents stay within 8 of the usual ones, all terms of a row share one
// reference, and floats do not care.
struct OnlineSoftmax {
  static constexpr int kRows = 2;

  float scale_log2;
  float headroom;                                 // 8 / scale_log2, finite
  float row_max[kRows] = {-INFINITY, -INFINITY};  // the reference, a raw score q . k
  float row_sum[kRows] = {0.0f, 0.0f};            // this thread's share until finish()
  float reference[kRows] = {0.0f, 0.0f};          // row_max * scale_log2; 0 if no key was visible
  float block_max[kRows];                         // this thread's share
  float lse[kRows];                               // set by finish()

  // Whether row r of any thread of the warp has a score too large for its reference.
  // after: a number >= 0 that the answer is to wait for. So the compiler issues what leads to it
  // beside the search for the maximum, not behind it.
  template <int N>
  FC_DEVICE bool exceeds(const float (&s)[N], int r, float after = 0.0f) {
    float m[2] = {s[2 * r], s[2 * r + 1]};  // two chains: half the latency of one
#pragma unroll
    for (int i = 4; i < N; i += 4) {
      m[0] = fmaxf(m[0], s[i + 2 * r]);
      m[1] = fmaxf(m[1], s[i + 2 * r + 1]);
    }
    block_max[r] = fmaxf(m[0], m[1]);
    return __any_sync(0xffffffffu, block_max[r] > row_max[r] + headroom || after < 0.0f);
  }

  // Makes the maximum so far the reference of row r; returns what O is to be multiplied by. A row
  // without a visible key yet keeps 0, so that exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
  FC_DEVICE float raise(int r) {
    float const row_max_new = fmaxf(row_max[r], quad_max(block_max[r]));
    reference[r] = row_max_new == -INFINITY ? 0.0f : row_max_new * scale_log2;
    float const alpha = exp2_approx(row_max[r] * scale_log2 - reference[r]);
    row_max[r] = row_max_new;
    row_sum[r] *= alpha;
    return alpha;
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
    row_sum[r] += sum;
  }

  // Completes the row sums over the quad, divides, and leaves log sum exp in lse. A row that saw no
  // key, or is not `valid`, gives exactly zero. A sink is one more score, with no value.
  template <int N>
  FC_DEVICE void finish(float (&o)[N], float scale, float out_scale, const bool (&valid)[kRows],
                        const float* sink) {
    float factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float const of_quad = quad_sum(row_sum[r]);  // all lanes, whatever their rows
      float const sum = valid[r] ? of_quad : 0.0f;
      factor[r] = rcp_approx(sum) * out_scale;
      lse[r] = sum == 0.0f ? -INFINITY : row_max[r] * scale + __logf(sum);
      if (sink) {  // no branch that differs between threads: see repair.cuh
        float const s = valid[r] ? *sink : -INFINITY, hi = fmaxf(lse[r], s), lo = fminf(lse[r], s);
        float const nan = lse[r] + s;  // only if one of them is
        float const total = nan != nan        ? nan
                            : hi == -INFINITY ? hi
                                              : hi + __logf(1.0f + __expf(lo - hi));
        factor[r] *= hi == -INFINITY ? 1.0f : __expf(lse[r] - total);
        lse[r] = total;
      }
      row_sum[r] = sum;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      int const r = (i / 2) % 2;
      o[i] = row_sum[r] == 0.0f ? 0.0f : o[i] * factor[r];
    }
  }
};

}  // namespace flashcore::sm90::fwd
