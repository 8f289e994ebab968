// From the products to P and dS: with nothing but the scale between q.k and the score, or with
// softcap, ALiBi and dropout.
//
//     t = softcap ? tanh(scale / softcap q.k) : q.k       score = score_scale (t - slope |i - j|)
//     P = exp(score - lse)                                dV = (kept P)^T dO / (1 - p)
//     dS = P (1 - t^2 if softcap) (kept dP / (1 - p) - delta)
//
// The two have the same verbs. s becomes what dS is a multiple of, negative where dropout dropped
// the score, and `packed` what dV multiplies.
#pragma once
#include "sm90/bwd/consumer.cuh"
#include "sm90/bwd/dropout.h"

namespace flashcore::sm90::bwd {

template <class T>
struct PlainScores {
  using Element = typename T::Element;
  using Step = typename Consumer<T>::Step;

  // query: the first of s, of the sequence.
  template <int N>
  FC_DEVICE static void probabilities(const Consumer<T>& c, float (&s)[N],
                                      uint32_t (&packed)[N / 2], Step at, int query,
                                      const typename T::Stat*) {
    if (at.masked) exclude(s, c.keys(at), query, -INFINITY);
    exponentiate(s, c.p.scale_log2);
    pack_tile<Element>(packed, s);
  }
  template <int N>
  FC_DEVICE static void gradients(const Consumer<T>& c, float (&dp)[N], const float (&s)[N], Step,
                                  int, const typename T::Stat*) {
    // Of what is excluded P is zero, and so is this, but for a NaN in V or dO. Without a mask only
    // rows and keys past the end are excluded, which arrive as zeros. With one a NaN spreads from
    // here as it does from Q, K and dO, and is repaired as they are.
    differentiate(dp, s);
  }
};

// Here the products start from zero, since lse and delta come after the terms.
template <class T>
struct TermScores {
  using Element = typename T::Element;
  using Step = typename Consumer<T>::Step;
  template <int N>
  FC_DEVICE static void probabilities(const Consumer<T>& c, float (&s)[N],
                                      uint32_t (&packed)[N / 2], Step at, int query,
                                      const float* minus_lse) {
    const BwdParams& p = c.p;
    uint32_t kept[ceil_div(N, 32)];  // with dropout, a bit per score of this thread
    keep<N>(c, at.head, query, kept);
    bool const softcap = p.softcap_inner != 0.0f;
    if (softcap) {
#pragma unroll
      for (float& x : s) x = tanh_approx(x * p.softcap_inner);
    }
    if (at.masked) exclude(s, c.keys(at), query, -INFINITY);
    float const minus_slope =
        p.alibi_slopes ? -p.alibi_slopes[c.work().batch * p.alibi_batch_stride + at.head] *
                             rcp_approx(p.score_scale)
                       : 0.0f;
    int const lane = thread_index() % 32;
    int const distance = query + 2 * (lane % 4) + c.work().diagonal - c.warp_key() - lane / 4;
    float const bend = softcap ? -1.0f : 0.0f;
    const float2* const pairs = reinterpret_cast<const float2*>(minus_lse) + lane % 4;
    // In parts, each under a condition that always holds: or the compiler would work on all scores
    // at once, and run out of registers.
    constexpr int kPart = 16;
#pragma unroll
    for (int part = 0; part < N; part += kPart) {
      if (p.group <= 0) continue;
#pragma unroll
      for (int i = part; i < part + kPart; i += 4) {
        float2 const of_queries = pairs[i];
        float prob[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& t = s[i + e];
          float const d = fabsf(static_cast<float>(distance + 2 * i + e % 2 - 8 * (e / 2)));
          float const score = __fmaf_rn(minus_slope, d, t) + (e % 2 ? of_queries.y : of_queries.x);
          float const x = exp2_approx(score * p.scale_log2);
          bool const keeps = kept[(i + e) / 32] >> ((i + e) % 32) & 1;
          t = x * __fmaf_rn(bend * t, t, 1.0f);  // of an excluded score NaN, as its dS is
          t = keeps ? t : -t;
          prob[e] = keeps ? x : 0.0f;
        }
        packed[i / 2] = pack<Element>(prob[0], prob[1]);
        packed[i / 2 + 1] = pack<Element>(prob[2], prob[3]);
      }
    }
  }

  template <int N>
  FC_DEVICE static void gradients(const Consumer<T>& c, float (&dp)[N], const float (&s)[N],
                                  Step at, int query, const float* minus_delta) {
    const float2* const pairs = reinterpret_cast<const float2*>(minus_delta) + thread_index() % 4;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float2 const of_queries = pairs[i / 4 * 4];
      float const x = s[i] < 0.0f ? 0.0f : dp[i];
      dp[i] = fabsf(s[i]) * __fmaf_rn(x, c.p.dropout_scale, i % 2 ? of_queries.y : of_queries.x);
    }
    if (at.masked) exclude(dp, c.keys(at), query, 0.0f);
  }

 private:
  template <int N>
  FC_DEVICE static void keep(const Consumer<T>& c, int head, int query,
                             uint32_t (&kept)[ceil_div(N, 32)]) {
#pragma unroll
    for (uint32_t& bits : kept) bits = ~0u;
    if (c.p.dropout_threshold == 0) return;
    int const lane = thread_index() % 32, odd = lane / 4 % 2, key = c.work().key + c.warp_key();
#pragma unroll
    for (uint32_t& bits : kept) bits = 0;
#pragma unroll
    for (int group = 0; group < N / 8; ++group) {  // of 16 queries
      tile::Philox4 const patch =
          own_patch(c.sh.dropout, lane, c.work().batch, head, query + 16 * group, key);
      KeyPairBits first = key_pair_bits(patch, odd), second = key_pair_bits(patch, 1 - odd);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // by value: a choice between two arrays would be one in memory
        uint32_t const mine = first.query[i];
        uint32_t const other = __shfl_xor_sync(0xffffffffu, second.query[i], 4);
        first.query[i] = odd ? other : mine;
        second.query[i] = odd ? mine : other;
      }
      kept[group / 4] |= kept_bits(first, second, c.p.dropout_threshold) << (group % 4 * 8);
    }
    pin(kept);  // or the compiler would keep what it made the bits of, in registers of its own
  }
};

template <class T>
using Scores = std::conditional_t<T::kTerms, TermScores<T>, PlainScores<T>>;

}  // namespace flashcore::sm90::bwd
