// The lists of a block mask: which blocks each block keeps. Host and device, constexpr.
//
// A kernel's own blocks may be smaller than the mask's. It visits those that are kept in order, and
// counts its visits: visit i is to block at(i). The order is that of the blocks, so a range of
// blocks becomes a range of visits, [below(first), below(last)), and what is true of a block before
// or after another is true of the visits.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

// Kept blocks, see flashcore_block_mask. Strides in elements; 0 where broadcast.
struct BlockList {
  const int32_t* count = nullptr;    // [b][h][block]
  const int32_t* indices = nullptr;  // [b][h][block][0 .. count)
  int64_t count_batch_stride = 0, count_head_stride = 0;
  int64_t indices_batch_stride = 0, indices_head_stride = 0, indices_row_stride = 0;

  explicit operator bool() const { return count != nullptr; }
};

// One list.
struct KeptBlocks {
  const int32_t* indices = nullptr;  // ascending
  int count = 0;
  int parts = 1;  // blocks of the kernel in one of the mask

  // How many blocks there are to visit, and which one visit i is to.
  FC_HD constexpr int visits() const { return count * parts; }
  FC_HD constexpr int at(int i) const { return indices[i / parts] * parts + i % parts; }

  // Visits to blocks before this one.
  FC_HD constexpr int below(int block) const {
    int const whole = block / parts;  // of the mask
    if (block <= 0 || count == 0) return 0;
    if (indices[count - 1] < whole) return visits();  // the usual case: no search
    int low = 0;
    for (int high = count - 1; low < high;) {
      int const middle = (low + high) / 2;
      if (indices[middle] < whole)
        low = middle + 1;
      else
        high = middle;
    }
    return low * parts + (indices[low] == whole ? block % parts : 0);
  }
  FC_HD constexpr bool contains(int block) const {
    int const visit = below(block);
    return visit < visits() && at(visit) == block;
  }
};

// Where there are no lists: visit i is to block i.
struct AllBlocks {
  template <class Int>
  FC_HD constexpr Int at(Int i) const {
    return i;
  }
  template <class Int>
  FC_HD constexpr Int below(Int block) const {
    return block;
  }
};

// All lists of one direction, for a kernel that takes a tile of blocks at a time.
struct BlockLists {
  BlockList list;
  int lists = 0;  // of a head; what lies past them keeps nothing
  int tiles = 1;  // of the kernel in a block of the mask, along the blocks that have lists
  int parts = 1;  // blocks of the kernel in one, along those that are listed

  FC_HD constexpr KeptBlocks of(int64_t batch, int64_t head, int tile) const {
    int const row = tile / tiles;
    if (row >= lists) return {nullptr, 0, parts};
    return {list.indices + batch * list.indices_batch_stride + head * list.indices_head_stride +
                row * list.indices_row_stride,
            list.count[batch * list.count_batch_stride + head * list.count_head_stride + row],
            parts};
  }
};

}  // namespace flashcore::tile
