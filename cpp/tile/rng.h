// Dropout bits: a pure function of (seed, offset, batch, head, query i, key j). Host and device.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11). One call
// gives eight 16-bit numbers. They are dealt to the patch of scores
//
//     rows i and i + 8,  columns j, j + 1, j + 8, j + 9         (i bit 3, j bits 0 and 3 clear)
//
// because that is exactly what one thread of a tensor-core tile holds of S, so a GPU thread wastes
// nothing; a CPU row tile uses whole patches too. Positions count from the start of each sequence.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

struct Philox4 {
  uint32_t w[4];
};

FC_HD constexpr Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                      uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    uint64_t const a = uint64_t{0xD2511F53u} * c0;
    uint64_t const b = uint64_t{0xCD9E8D57u} * c2;
    uint32_t const n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    uint32_t const n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 64-bit key of one call: a Philox block cipher of the offset under the seed, so that every
// (seed, offset) pair has its own, unrelated mask.
struct DropoutKey {
  uint32_t k0 = 0, k1 = 0;
};
FC_HD constexpr DropoutKey dropout_key(uint64_t seed, uint64_t offset) {
  Philox4 const x =
      philox4x32_10(static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0,
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {x.w[0], x.w[1]};
}

// The counter of the patch that holds (i, j), and where in it (i, j) is.
FC_HD constexpr uint32_t patch_row(uint32_t i) { return ((i >> 4) << 3) | (i & 7); }
FC_HD constexpr uint32_t patch_col(uint32_t j) { return ((j >> 4) << 2) | ((j >> 1) & 3); }
FC_HD constexpr int patch_slot(uint32_t i, uint32_t j) {
  return static_cast<int>(((i >> 3) & 1) * 4 + ((j >> 3) & 1) * 2 + (j & 1));
}
FC_HD constexpr Philox4 dropout_patch(DropoutKey key, uint32_t batch, uint32_t head,
                                      uint32_t patch_row, uint32_t patch_col) {
  return philox4x32_10(patch_col, patch_row, head, batch, key.k0, key.k1);
}
FC_HD constexpr uint32_t patch_bits(Philox4 const& patch, int slot) {
  return (patch.w[slot >> 1] >> (16 * (slot & 1))) & 0xFFFFu;
}

// The definition: 16 uniform bits of one score. It is dropped when they are below the threshold.
FC_HD constexpr uint32_t dropout_bits(DropoutKey key, uint32_t batch, uint32_t head, uint32_t i,
                                      uint32_t j) {
  return patch_bits(dropout_patch(key, batch, head, patch_row(i), patch_col(j)), patch_slot(i, j));
}

}  // namespace flashcore::tile
