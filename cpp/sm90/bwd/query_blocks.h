// Where the query rows of a sequence are in the workspace. Host and device.
//
// There, every sequence begins with a query block of its own, so that a block is what one tile of
// rows fills, and its statistics can be fetched in one aligned piece. In a packed batch the lengths
// are known on the device alone, and nobody adds them up: sequence b begins at block
//
//     cu_seqlens_q[b] / block_m + b
//
// which leaves room for its own blocks, and at times for one that nobody uses.
#pragma once
#include "common/types.h"
#include "tile/seqlen.h"

namespace flashcore::sm90::bwd {

// P: a kernel's parameters. alike: all sequences are, where the compiler is to know.
template <class P>
FC_HD constexpr int first_query_block(P const& p, int batch, int block_m, bool alike = false) {
  return !alike && p.cu_seqlens_q ? p.cu_seqlens_q[batch] / block_m + batch
                                  : batch * p.sequence_blocks;
}

// Of a head: what all sequences need, with rows the rows of a packed tensor.
template <class P>
FC_HD constexpr int64_t query_blocks(P const& p, int64_t rows, int block_m) {
  if (p.batch == 0) return 0;
  return p.cu_seqlens_q ? rows / block_m + p.batch
                        : p.batch * ceil_div<int64_t>(p.seqlen_q, block_m);
}

// One of a head's blocks.
struct QueryBlock {
  int batch;
  int m;        // which of the sequence
  int row;      // its first row of the sequence
  int written;  // rows of gradients that exist: those of the sequence, and its padding; may be <= 0
};

template <class P>
FC_HD constexpr QueryBlock query_block(P const& p, int block, int block_m, bool alike = false) {
  int low = 0;  // the last sequence that begins at or before the block
  if (!alike && p.cu_seqlens_q) {
    for (int high = p.batch; high - low > 1;) {
      int const middle = (low + high) / 2;
      (first_query_block(p, middle, block_m) <= block ? low : high) = middle;
    }
  } else {
    low = block / p.sequence_blocks;
  }
  int const m = block - first_query_block(p, low, block_m, alike);
  int const rows = !alike && p.cu_seqlens_q ? tile::sequence_of<int>(p, low).seqlen_q : p.seqlen_q;
  return {low, m, m * block_m, rows - m * block_m};
}

}  // namespace flashcore::sm90::bwd
