// The tiles of a block mask by the lengths of their lists, for launches that begin with the
// longest: whoever takes the last tile keeps the others waiting for it.
#pragma once
#include <cuda_runtime_api.h>

#include "common/types.h"
#include "tile/block_list.h"

namespace flashcore::sm90 {

struct TileOrder {
  tile::BlockLists lists;
  int pairs;     // of batch and head
  int heads;     // of the tiles
  int group;     // heads of the lists for one of them
  int tiles;     // of a pair
  int halves;    // lists of a tile
  bool falling;  // the longest first; else last. Equals stay as they are
  int* order;    // [pair][place]: which tile
  int* taken;    // a counter and a number for each tile, which become -1

  // What a tile is placed by: blocks of its lists, or their negative.
  FC_HD constexpr int rank(int pair, int tile) const {
    int const batch = pair / heads, head = pair % heads * group;
    int sum = 0;
    for (int h = head; h < head + group; ++h)
      for (int half = 0; half < halves; ++half)
        sum += lists.of(batch, h, tile * halves + half).count;
    return falling ? -sum : sum;
  }
};

void order_tiles(const TileOrder& order, cudaStream_t stream);

}  // namespace flashcore::sm90
