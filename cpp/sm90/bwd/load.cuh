// The producer's verb: boxes of rows that stop where a sequence does.
#pragma once
#include "sm90/bwd/config.h"
#include "sm90/layout.h"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::bwd {

// One panel of columns, from `col` on, of the `box` rows from `row` on; those past the first
// `valid` ones become zeros. cut: maps.cut, where the compiler is to know.
FC_DEVICE void load_rows(char* smem, const TensorMaps& maps, Barrier& ready, int box, int col,
                         int row, int valid, int head, int batch, uint64_t policy, bool cut) {
  if (!cut) {
    tma_load(smem, maps.boxes, ready, col, row, head, batch, policy);
    return;
  }
  RowWindow const window = row_window(box, row, valid);
  if (window.begin >= 0) {
    tma_load(smem, maps.boxes, ready, col, window.skipped, window.begin, head, batch, policy);
    return;
  }
  constexpr int kOutside = INT32_MAX;
#pragma unroll 1  // the producer has few registers
  for (int r = 0; r < box; ++r)
    tma_load(smem + r * kPanelBytes, maps.rows, ready, col, r < valid ? row + r : kOutside, head,
             batch, policy);
}

}  // namespace flashcore::sm90::bwd
