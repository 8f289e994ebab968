// Dropout bits in rows, many Philox calls at a time. The definition is tile/rng.h.
#pragma once
#include "cpu/vec.h"
#include "registry.h"
#include "tile/rng.h"

namespace flashcore::cpu {
namespace {

using V64 = Vec<uint64_t>;

// The low halves of the lanes times m; the high halves are ignored.
FC_INLINE V64 mul_low32(V64 a, V64 m) {
#if defined(__AVX512F__)
  return reinterpret_cast<V64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(m)));
#elif defined(__AVX2__)
  return reinterpret_cast<V64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(m)));
#elif defined(__SSE2__)
  return reinterpret_cast<V64>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(m)));
#else
  return (a & 0xFFFFFFFFu) * m;
#endif
}

constexpr int kDropoutColumns = 16;  // columns of a patch: what dropout_bits rounds to

// The 16-bit numbers of row i, columns [col, col + n), n rounded up to kDropoutColumns; col is a
// multiple of it. A patch holds rows i and i + 8, so this computes each patch twice: simpler than
// pairing rows that may be of different heads, and about two instructions per score.
inline void dropout_bits_row(tile::DropoutKey key, int64_t batch, int64_t head, int64_t i,
                             int64_t col, int64_t n, uint16_t* out) {
  constexpr int kCalls = kLanes<uint64_t>;  // patches at once, 4 columns of this row each
  int const first_word = (i >> 3 & 1) * 2;
  auto const splat64 = [](uint64_t x) { return V64{} + x; };
  V64 const m0 = splat64(0xD2511F53u), m1 = splat64(0xCD9E8D57u);
  V64 lane{};
  for (int l = 0; l < kCalls; ++l) lane[l] = static_cast<uint64_t>(l);
  int64_t const patches = ceil_div<int64_t>(n, kDropoutColumns) * 4;
  for (int64_t patch = 0; patch < patches; patch += kCalls) {
    V64 c0 = lane + static_cast<uint64_t>(col / 4 + patch);
    V64 c1 = splat64(tile::patch_row(static_cast<uint32_t>(i)));
    V64 c2 = splat64(static_cast<uint64_t>(head)), c3 = splat64(static_cast<uint64_t>(batch));
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int round = 0; round < 10; ++round) {
      V64 const a = mul_low32(c0, m0), b = mul_low32(c2, m1);
      c0 = (b >> 32) ^ c1 ^ splat64(k0);
      c2 = (a >> 32) ^ c3 ^ splat64(k1);
      c1 = b;
      c3 = a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // Four patches side by side cover columns 0-7 in their first word and 8-15 in their second.
    alignas(64) uint64_t w[2][kCalls];
    __builtin_memcpy(w[0], first_word ? &c2 : &c0, sizeof w[0]);
    __builtin_memcpy(w[1], first_word ? &c3 : &c1, sizeof w[1]);
    for (int64_t l = 0; l < kCalls && patch + l < patches; ++l) {
      uint16_t* const to = out + (patch + l) / 4 * 16 + (patch + l) % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        auto const word = static_cast<uint32_t>(w[half][l]);
        __builtin_memcpy(to + 8 * half, &word, sizeof word);
      }
    }
  }
}

// Rows [begin, end) of keep, counted over batch, head and query.
inline void dropout_mask_rows(const DropoutMaskProblem& p, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 256;
  tile::DropoutKey const key = tile::dropout_key(p.seed, p.offset);
  uint16_t bits[kChunk];
  for (int64_t row = begin; row < end; ++row) {
    int64_t const i = row % p.seqlen_q, h = row / p.seqlen_q % p.num_heads,
                  b = row / p.seqlen_q / p.num_heads;
    auto* const keep = static_cast<uint8_t*>(p.keep.data) + b * p.keep.batch_stride +
                       h * p.keep.head_stride + i * p.keep.row_stride;
    for (int64_t j = 0; j < p.seqlen_k; j += kChunk) {
      int64_t const n = min_of(kChunk, p.seqlen_k - j);
      dropout_bits_row(key, b, h, i, j, n, bits);
      for (int64_t c = 0; c < n; ++c) keep[(j + c) * p.keep.col_stride] = bits[c] >= p.threshold;
    }
  }
}

}  // namespace
}  // namespace flashcore::cpu
