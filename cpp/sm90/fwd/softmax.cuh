// Online softmax over the two accumulator rows a thread shares with its quad.
#pragma once
#include <cfloat>

#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::fwd {

// The reference a row's exponentials are relative to may lag behind the true maximum: O is rescaled
// only when that goes too far. All terms of a row share one reference, so the result is exact.
//
// The largest scores of a block are searched for, and one that exceeds the reference by more than a
// factor of 2^8 raises it. With kSumTells (bfloat16, which holds whatever float holds) the search
// is left out after a searched block that was whole: the row's sum so far tells whether the
// reference has been left behind, by a factor of up to 2^40. What a single block may then add
// without warning is a factor of 2^56 (39 in the scores), or 2^80 (55) if the next one does not
// leave all that far behind in turn; past that the row becomes NaN, and repair.cuh computes it
// again.
template <bool kSumTells>
struct OnlineSoftmax {
  static constexpr int kRows = 2;
  static constexpr float kLargest = 0x1p40f;
  static constexpr float kTooLarge = 0x1p120f;  // its reciprocal is still a normal number
  static constexpr float kKept = 0x1p96f;       // times 2^-126, less than a rounding of 1

  float scale_log2;
  float headroom;                                 // 8 / scale_log2, finite
  float row_max[kRows] = {-INFINITY, -INFINITY};  // the reference, a raw score q . k
  float row_sum[kRows] = {0.0f, 0.0f};            // this thread's share until finish()
  float reference[kRows] = {0.0f, 0.0f};          // row_max * scale_log2; 0 if no key was visible
  float trusted = 0.0f;  // with kSumTells: sums below it tell that no row is left behind
  float factor[kRows] = {1.0f, 1.0f};  // what O is to be multiplied by,
  int raised = 0;                      // if it is
  float lse[kRows];                    // set by finish()

  // Whether a block is to be searched: if it is cut, or if rows may have seen little so far. Costs
  // a usual one a comparison a row.
  FC_DEVICE bool in_doubt(bool cut) const {
    return __any_sync(0xffffffffu, cut || !(row_sum[0] < trusted) || !(row_sum[1] < trusted));
  }
  // After a block that was searched: whole, if it was not cut.
  FC_DEVICE void trust(bool whole) {
    bool const none = row_max[0] == -INFINITY || row_max[1] == -INFINITY;
    trusted = whole && !none ? kLargest : 0.0f;
  }

  // Whether row r of any thread of the warp is to be raised before exponentiate().
  // after: a number >= 0 that the answer is to wait for. So the compiler issues what leads to it
  // beside the search for the maximum, not behind it.
  template <int N>
  FC_DEVICE bool exceeds(const float (&s)[N], int r, float after = 0.0f) const {
    bool const lost = kSumTells && !(row_sum[r] > 0.0f && row_sum[r] < kLargest);
    return __any_sync(0xffffffffu,
                      lost || thread_max(s, r) > row_max[r] + headroom || after < 0.0f);
  }

  template <int N>
  FC_DEVICE static float thread_max(const float (&s)[N], int r) {
    float m[2] = {s[2 * r], s[2 * r + 1]};  // two chains: half the latency of one
#pragma unroll
    for (int i = 4; i < N; i += 4) {
      m[0] = fmaxf(m[0], s[i + 2 * r]);
      m[1] = fmaxf(m[1], s[i + 2 * r + 1]);
    }
    return fmaxf(m[0], m[1]);
  }

  // Makes the maximum so far the reference of row r; O is to be multiplied by factor[r]. A row
  // without a visible key yet keeps 0, so that exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
  // kFirst: there has been no block before.
  template <bool kFirst, int N>
  FC_DEVICE void raise(const float (&s)[N], int r) {
    float row_max_new = fmaxf(row_max[r], quad_max(thread_max(s, r)));
    float sum = 0.0f;
    if constexpr (kSumTells && !kFirst) {  // stands for a maximum that nobody searched for
      sum = quad_max(row_sum[r]);
      if (sum >= kLargest)
        row_max_new = fmaxf(row_max_new, row_max[r] + __log2f(sum) * rcp_approx(scale_log2));
    }
    float const reference_new = row_max_new == -INFINITY ? 0.0f : row_max_new * scale_log2;
    // Both references as they were rounded, which of large scores is much; exactly 1 where the
    // maximum stays. No branch: it would cost copies where nothing is raised.
    float const down = row_max[r] == -INFINITY ? -INFINITY : reference[r] - reference_new;
    // A factor below float's range would drop what a sum of this size still owes to the result.
    bool const dropped = sum >= kKept && down < -125.0f;
    float const alpha = exp2_approx(sum >= kTooLarge || dropped ? NAN : down);
    reference[r] = reference_new;
    row_max[r] = row_max_new;
    row_sum[r] *= alpha;
    // A thread that holds only small terms is not lost: nothing to a sum that is at least 1.
    if (kSumTells && row_max_new != -INFINITY && row_sum[r] < FLT_MIN) row_sum[r] = FLT_MIN;
    if constexpr (!kFirst) {
      factor[r] = alpha;
      raised = 1;
    }
  }

  // Row r of s becomes exp(scale * (s - row_max)) and is added to the row sum.
  template <int N>
  FC_DEVICE void exponentiate(float (&s)[N], int r) {
    float sum;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float& a = s[i + 2 * r];
      float& b = s[i + 2 * r + 1];
      a = exp2_approx(__fmaf_rn(a, scale_log2, -reference[r]));
      b = exp2_approx(__fmaf_rn(b, scale_log2, -reference[r]));
      sum = i == 0 ? a + b : sum + (a + b);  // 0 + x is an instruction
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
      // A sum past float's range leaves a mark, see repair.cuh. So does a NaN in O, whatever the
      // factor.
      factor[r] = sum == 0.0f ? 0.0f : (sum < kTooLarge ? rcp_approx(sum) : NAN) * out_scale;
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
    for (int i = 0; i < N; ++i) o[i] *= factor[(i / 2) % 2];
  }
};

}  // namespace flashcore::sm90::fwd
