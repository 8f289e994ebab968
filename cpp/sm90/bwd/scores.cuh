// P and dS, transposed: a thread holds two keys (its accumulator rows) and pairs of queries.
//
//     P = exp(scale q.k - lse)        dS = P * (dP - delta)
//
// lse and delta belong to queries, so here they belong to columns. They are added as
// products (stat_parts.h); or the products start from them instead of from zero, so that nobody
// waits for shared memory between a product and its use; or they come after the terms.
#pragma once
#include "sm90/bwd/work.cuh"
#include "sm90/layout.h"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashcore::sm90::bwd {

// Every key's entries become the value of their query: what the product will add to.
template <int N>
FC_DEVICE void set_columns(float (&x)[N], const float* of_queries) {
  const float2* const pairs = reinterpret_cast<const float2*>(of_queries) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float2 const pair = pairs[i];
    x[i] = x[i + 2] = pair.x;
    x[i + 1] = x[i + 3] = pair.y;
  }
  pin(x);
}

// S^T - lse / scale becomes P^T.
template <int N>
FC_DEVICE void exponentiate(float (&s)[N], float scale_log2) {
#pragma unroll
  for (float& x : s) x = exp2_approx(x * scale_log2);
}

// dP^T - delta becomes dS^T.
template <int N>
FC_DEVICE void differentiate(float (&dp)[N], const float (&p)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) dp[i] *= p[i];
}

// Which query rows see a thread's two keys, j and j + 8, whose ranges are eight rows apart: rows
// [first, last) see key j, if it exists and they do.
struct KeyPair {
  int first, last;
  int existing;  // 0, 1 or 2 keys
  int rows;      // of the sequence

  FC_DEVICE KeyPair(const Work& work, int key)
      : first(work.window_first + key),
        last(work.window_last + key),
        existing((work.key + key < work.seqlen_k) + (work.key + key + 8 < work.seqlen_k)),
        rows(work.seqlen_q) {}
};

// Entries of the query block that begins at `row` become `value` where the query does not see the
// key.
template <int N>
FC_DEVICE void exclude(float (&x)[N], KeyPair const& keys, int row, float value) {
  int const query = row + 2 * (thread_index() % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int const first = r < keys.existing ? keys.first + 8 * r - query : N * 4;
    int const last = min_of(keys.last + 8 * r, keys.rows) - query;
#pragma unroll
    for (int i = 2 * r; i < N; i += i % 2 ? 3 : 1) {
      int const q = 8 * (i / 4) + i % 2;
      if (q < first || q >= last) x[i] = value;
    }
  }
}

template <class Element, int N>
FC_DEVICE void pack_tile(uint32_t (&packed)[N / 2], const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) packed[i] = pack<Element>(x[2 * i], x[2 * i + 1]);
}

// The same for another thread, which is to know it better than bfloat16 would tell: of P, half
// precision has three bits more, and 2^8 keeps what is small out of its subnormal numbers.
constexpr float kHandedOver = 256.0f;
template <int N>
FC_DEVICE void hand_over(uint32_t (&packed)[N / 2], const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    packed[i] = pack<__half>(x[2 * i] * kHandedOver, x[2 * i + 1] * kHandedOver);
}
template <int N>
FC_DEVICE void take_over(float (&x)[N], const uint32_t (&packed)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    float2 const pair = unpack<__half>(packed[i]);
    x[2 * i] = pair.x * (1.0f / kHandedOver);
    x[2 * i + 1] = pair.y * (1.0f / kHandedOver);
  }
}

// P^T or dS^T, 64 keys x N queries in registers -> rows of queries in one panel of shared memory,
// from row 16 * first_patch on.
template <int N>
FC_DEVICE void store_transposed(char* panel, const uint32_t (&x)[N], int first_patch) {
  int const thread = thread_index();
  uint32_t const base = smem_address(panel);
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    store_matrix_x4_transposed(
        base + transposed_patch_offset(thread % 128 / 32, thread % 32, first_patch + i), x[4 * i],
        x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// And back.
template <int N>
FC_DEVICE void load_transposed(uint32_t (&x)[N], const char* panel, int first_patch) {
  int const thread = thread_index();
  uint32_t const base = smem_address(panel);
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    load_matrix_x4_transposed(
        base + transposed_patch_offset(thread % 128 / 32, thread % 32, first_patch + i), x[4 * i],
        x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

}  // namespace flashcore::sm90::bwd
