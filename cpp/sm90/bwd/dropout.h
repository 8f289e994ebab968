// Which dropout bits a thread needs of S^T, and who works them out. Host and device, constexpr.
//
// Of 16 keys x 16 queries a thread holds keys j and j + 8, and queries i, i + 1, i + 8, i + 9. A
// Philox call (tile/rng.h) is about queries i, i + 8 and keys j, j + 1, j + 8, j + 9; so the thread
// needs half of the numbers of two calls, one for query i and one for i + 1. The thread with the
// neighbouring key, four lanes on, needs the other halves. Each makes one of the two calls and
// hands over what is the other's.
#pragma once
#include "tile/rng.h"

namespace flashcore::sm90::bwd {

// P: a kernel's parameters.
template <class P>
FC_HD constexpr tile::DropoutKey dropout_key(P const& p) {
  return p.rng_tensor ? tile::dropout_key(p.rng_tensor[0], p.rng_tensor[1])
                      : tile::dropout_key(p.rng_seed, p.rng_offset);
}

// The call that a lane makes for the 16 queries from `query` on and its warp's keys from `key` on,
// both multiples of 16: the one for query i if its key is even, else for i + 1.
FC_HD constexpr tile::Philox4 own_patch(tile::DropoutKey dropout, int lane, int batch, int head,
                                        int query, int key) {
  return tile::dropout_patch(
      dropout, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
      tile::patch_row(static_cast<uint32_t>(query + 2 * (lane % 4) + lane / 4 % 2)),
      tile::patch_col(static_cast<uint32_t>(key + lane / 4)));
}

// What one thread needs of one call: of query i [0] and i + 8 [1], the numbers of key j in the low
// half and of j + 8 in the high one.
struct KeyPairBits {
  uint32_t query[2];
};
// odd: whether j is.
FC_HD constexpr KeyPairBits key_pair_bits(tile::Philox4 const& patch, int odd) {
  int const shift = 16 * odd;
  auto join = [&](uint32_t a, uint32_t b) { return (a >> shift & 0xFFFFu) | (b >> shift << 16); };
  return {{join(patch.w[0], patch.w[1]), join(patch.w[2], patch.w[3])}};
}

// Of the eight scores x[8 c ... 8 c + 7] that a thread holds of 16 queries: those that are kept, a
// bit each. first: the bits for query i, second: for i + 1.
FC_HD constexpr uint32_t kept_bits(KeyPairBits const& first, KeyPairBits const& second,
                                   uint32_t threshold) {
  uint32_t kept = 0;
  for (int i = 0; i < 8; ++i) {
    uint32_t const pair = (i % 2 ? second : first).query[i / 4];
    uint32_t const number = i / 2 % 2 ? pair >> 16 : pair & 0xFFFFu;
    kept |= static_cast<uint32_t>(number >= threshold) << i;
  }
  return kept;
}

}  // namespace flashcore::sm90::bwd
