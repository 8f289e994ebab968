// Index maths of Hopper's shared-memory and register layouts. Host and device, proven by CPU tests.
//
// A tile in shared memory is cut into panels of 64 columns (128 bytes). Inside a panel, rows of 128
// bytes follow one another and the eight 16-byte chunks of a row are permuted by the row's low
// three bits: the 128-byte swizzle of the copy engine (TMA) and of wgmma descriptors.
#pragma once
#include "common/types.h"

namespace flashcore::sm90 {

inline constexpr int kPanelCols = 64;    // 16-bit elements
inline constexpr int kPanelBytes = 128;  // one row of one panel

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` inside a panel aligned to 1024 bytes.
FC_HD constexpr uint32_t swizzled_offset(uint32_t row, uint32_t chunk) {
  return row * kPanelBytes + ((chunk ^ (row & 7)) << 4);
}

// Which element of a 64 x N accumulator a thread of the warpgroup holds at index i.
struct Coord {
  int row;
  int col;
};
FC_HD constexpr Coord accumulator_coord(int thread, int i) {
  int const warp = thread / 32, lane = thread % 32;
  return {16 * warp + lane / 4 + 8 * ((i / 2) % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}

// Which element of a 64 x 16 A operand a thread holds in half `half` of register `reg` (0..3).
// Equal to the accumulator's layout with two neighbours packed into a register, so probabilities
// become the A operand of P V without moving between threads.
FC_HD constexpr Coord a_operand_coord(int thread, int reg, int half) {
  int const warp = thread / 32, lane = thread % 32;
  return {16 * warp + lane / 4 + 8 * (reg % 2), 8 * (reg / 2) + 2 * (lane % 4) + half};
}

// To store a packed 64 x N accumulator transposed (N rows of 64 columns, one panel), a warp stores
// patches of 16 accumulator rows x 16 columns: registers 4 * patch .. 4 * patch + 3 are its four
// 8x8 matrices, and lane l points at row l % 8 of transposed matrix l / 8. Byte offset in the
// panel.
FC_HD constexpr uint32_t transposed_patch_offset(int warp, int lane, int patch) {
  int const column = 16 * patch + 8 * (lane / 16) + lane % 8;
  return swizzled_offset(static_cast<uint32_t>(column),
                         static_cast<uint32_t>(2 * warp + lane / 8 % 2));
}

// A box of rows that stops where a sequence does: what lies behind it may be another sequence's, or
// padding, and hold NaN. The copy engine fills with zeros what is outside the tensor, so it is told
// of a tensor with its rows twice, (columns, box, rows, ...), both with the stride of a row:
// element (c, r, s) is row r + s. A box at (0, skipped, begin) then holds `valid` rows, the first
// of which is row skipped + begin, and runs out of the second dimension where they end.
//
// begin is negative where a sequence that is shorter than a box lies among the first rows of the
// tensor, or of its batch entry. A map that begins before the tensor would do, if that memory were
// there: the engine faults on the address of a map, even where no box reaches it. So such rows are
// fetched one by one.
struct RowWindow {
  int skipped, begin;
};
FC_HD constexpr RowWindow row_window(int box, int row, int valid) {
  int const rows = max_of(0, min_of(box, valid));
  return {box - rows, row - (box - rows)};
}

// wgmma matrix descriptors, without the address (bits 0..13: address / 16).
//   bits 16..29 leading byte offset / 16, 32..45 stride byte offset / 16, 62..63 = 1: 128-B swizzle
//
// K-major (the reduction runs along a row: Q and K): groups of 8 rows are 1024 bytes apart. The
// leading offset is unused. 16 reduction columns further = +32 bytes; the next panel = + rows *
// 128.
FC_HD constexpr uint64_t k_major_descriptor() {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16);
}
// K-major, rows of 16 bytes that follow one another, not swizzled. They are 8 of a product's 16
// reduction columns; the other 8 are the same ones again, for an A operand that is zero there.
FC_HD constexpr uint64_t narrow_descriptor() { return uint64_t{(8 * 16) >> 4} << 32; }
// MN-major (the reduction runs down the rows: V): groups of 8 reduction rows are 1024 bytes apart,
// panels of 64 columns are rows * 128 bytes apart. 16 reduction rows further = + 2048 bytes.
FC_HD constexpr uint64_t mn_major_descriptor(int rows) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) |
         (static_cast<uint64_t>((rows * kPanelBytes) >> 4) << 16);
}

}  // namespace flashcore::sm90
