// What every Hopper kernel asks of a problem, and how it tells the copy engine (TMA) where a tensor
// is. Host only.
#pragma once
#include <string>

#include "common/problem.h"
#include "cuda/device.h"

namespace flashcore::sm90 {

// Longer sequences would overflow the 32-bit positions that a kernel's Work holds.
inline constexpr int64_t kLongest = int64_t{1} << 29;
// Tiles are counted in ints, and the count of a block runs past the last by a round of all of them.
inline constexpr int64_t kMostTiles = INT32_MAX - 4096;

// Empty if the device, the dtype, the lengths and the head dims fit a kernel for `dtype` and head
// dims up to `head_dim` (q, k) and `head_dim_v`; else why not.
std::string misfit(const Problem& p, DType dtype, int head_dim, int head_dim_v);

// Blocks of a block mask are multiples of this many rows and keys.
inline constexpr int kBlockUnit = 64;

// Empty if a kernel can do with the blocks of the problem's block mask; else why none can.
std::string unfit_blocks(const Problem& p);

// The copy engine wants 16-byte aligned bases and strides. Empty if it can take the tensor; else
// why not.
std::string not_copyable(const char* name, const Rows& r, int64_t batch, int64_t rows,
                         int64_t heads);

// A 16-bit tensor as (head_dim, rows, heads, batch) with a box of box_rows rows and one panel of
// columns.
CUtensorMap tensor_map(const Rows& r, DType dtype, int64_t cols, int64_t rows, int64_t heads,
                       int64_t batch, int box_rows);

// The same for boxes that stop where a sequence does: see row_window() in layout.h.
CUtensorMap row_window_map(const Rows& r, DType dtype, int64_t cols, int64_t rows, int64_t heads,
                           int64_t batch, int box_rows);

}  // namespace flashcore::sm90
