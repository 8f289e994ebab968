// What makes a score besides the scaled product: softcap and ALiBi. And which P dropout keeps.
//
// S stays in raw units, of which p.scale makes a score: with a softcap, raw is the tanh and p.scale
// the softcap, so the softmax does not know.
#pragma once
#include "sm90/fwd/work.cuh"
#include "sm90/ptx/registers.cuh"
#include "tile/rng.h"

namespace flashcore::sm90::fwd {

struct ScoreTerms {
  float slope;  // ALiBi's, in raw units
  tile::DropoutKey key;
  int head, batch;
  int row;       // this thread's first, of the sequence; the second is eight below
  int diagonal;  // the key that it faces

  FC_DEVICE ScoreTerms(const FwdParams& p, const Work& work, int thread_row)
      : head(work.head),
        batch(work.batch),
        row(work.row + thread_row),
        diagonal(work.diagonal + thread_row) {
    slope = p.alibi_slopes
                ? p.alibi_slopes[batch * p.alibi_batch_stride + head] * rcp_approx(p.scale)
                : 0.0f;
    if (p.dropout_threshold) key = key_of(p);
  }

  static FC_DEVICE tile::DropoutKey key_of(const FwdParams& p) {
    return p.rng_tensor ? tile::dropout_key(p.rng_tensor[0], p.rng_tensor[1])
                        : tile::dropout_key(p.rng_seed, p.rng_offset);
  }

  // s: this thread's share of the scores of keys from `col` on.
  template <int N>
  FC_DEVICE void apply(const FwdParams& p, float (&s)[N], int col) const {
    if (p.softcap_inner != 0.0f) {
#pragma unroll
      for (float& x : s) x = tanh_approx(x * p.softcap_inner);
    }
    if (p.alibi_slopes) {
      int const distance = diagonal - col - 2 * (threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        int const d = distance + 8 * ((i / 2) % 2) - 8 * (i / 4) - i % 2;
        s[i] = __fmaf_rn(-slope, fabsf(static_cast<float>(d)), s[i]);
      }
    }
  }

  // One Philox call decides about the eight scores a thread holds of 16 columns.
  template <int N>
  FC_DEVICE void drop(const FwdParams& p, float (&s)[N], int col) const {
    if (p.dropout_threshold == 0) return;
    uint32_t const patch_row = tile::patch_row(row);
    uint32_t const patch_col = tile::patch_col(col + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int c = 0; c < N / 8; ++c) {
      tile::Philox4 const patch =
          tile::dropout_patch(key, batch, head, patch_row, patch_col + 4 * c);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int const slot = (e / 2) % 2 * 4 + e / 4 * 2 + e % 2;
        if (tile::patch_bits(patch, slot) < p.dropout_threshold) s[8 * c + e] = 0.0f;
      }
    }
  }
};

// In kernels that have none.
struct NoTerms {
  FC_DEVICE NoTerms(const FwdParams&, const Work&, int) {}
  template <int N>
  FC_DEVICE void apply(const FwdParams&, float (&)[N], int) const {}
  template <int N>
  FC_DEVICE void drop(const FwdParams&, float (&)[N], int) const {}
};

}  // namespace flashcore::sm90::fwd
