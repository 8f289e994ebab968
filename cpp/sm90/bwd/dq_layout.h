// How the consumers divide dQ of a step, and in which order its sums lie in memory. Host and
// device, constexpr.
//
// dQ of a step is one block_m x head_dim tile. A consumer takes 64 rows of it; or, of 64 rows, some
// columns, and the second consumer what there is left; of 80 rows the transpose, 64 columns each
// that are the product's rows. A product begins with a panel of K, so
// consumers whose columns are in one panel all compute that, and each keeps its own. The blocks of
// a cluster share dQ as if their consumers were those of one.
//
// In memory there are block_m * head_dim floats per query block, in the order in which threads hold
// them: first by warp of the consumers, then by quad of registers, then by lane. So a warp adds 512
// contiguous bytes with one instruction.
#pragma once
#include "sm90/layout.h"

namespace flashcore::sm90::bwd {

template <int kBlockM, int kHeadDim, int kConsumers>
struct DqLayout {
  static constexpr int kThreads = 128 * kConsumers;
  static constexpr bool kByRows = kBlockM == 128;
  static constexpr bool kTransposed = kBlockM % 64 != 0;
  static_assert(kByRows || kBlockM == 64 || (kTransposed && kHeadDim == 64 * kConsumers));
  // Of the first consumer.
  static constexpr int kShare = kHeadDim / kConsumers;
  static constexpr int kCols = kByRows                    ? kHeadDim
                               : kPanelCols % kShare == 0 ? kShare
                                                          : round_up(kShare, kPanelCols);
  static constexpr int kProductCols = kTransposed ? kBlockM
                                      : kByRows   ? kCols
                                                  : max_of(kCols, kPanelCols);
  static_assert(kProductCols <= 2 * kCols);
  static constexpr bool kEven = kByRows || kHeadDim == kConsumers * kCols;

  // Where the consumer's part begins in the tile.
  static FC_HD constexpr int row(int consumer) { return kByRows ? 64 * consumer : 0; }
  static FC_HD constexpr int col(int consumer) { return kByRows ? 0 : kCols * consumer; }
  // Where its product begins, and the first column of that which it keeps.
  static FC_HD constexpr int panel(int consumer) { return col(consumer) / kPanelCols; }
  static FC_HD constexpr int kept(int consumer) { return col(consumer) % kPanelCols; }

  // Which element of the query block is at `c` of what the consumer keeps.
  static FC_HD constexpr Coord at(int consumer, Coord c) {
    if (kTransposed) return {c.col, col(consumer) + c.row};
    return {row(consumer) + c.row, col(consumer) + c.col};
  }

  // A thread holds a quad of floats per 8 columns of what is kept: two each of its two rows.
  static FC_HD constexpr int quads(int consumer) {
    if (kTransposed) return kBlockM / 8;
    return kEven || consumer == 0 ? kCols / 8 : (kHeadDim - kCols) / 8;
  }
  // Where the quads of a consumer thread begin in memory, in floats; quad i is 128 * i further.
  static FC_HD constexpr int offset(int thread) {
    if (kEven) return thread / 32 * (128 * quads(0)) + thread % 32 * 4;
    int const consumer = thread / 128;
    return consumer * 64 * kCols + thread % 128 / 32 * 128 * quads(consumer) + thread % 32 * 4;
  }
};

}  // namespace flashcore::sm90::bwd
