// What there is to do for one query tile. The producer finds it out and hands it to the consumers
// through shared memory, beside Q: the arithmetic costs one thread's time, off the critical path.
#pragma once
#include "sm90/fwd/config.h"
#include "sm90/ptx/barrier.cuh"
#include "tile/block_range.h"
#include "tile/seqlen.h"

namespace flashcore::sm90::fwd {

struct alignas(16) Work {
  int row;  // first query row, of its sequence; negative: there is no more work
  int head, batch;
  int split;       // part of the keys
  int q_begin;     // row of the tensor where the sequence begins
  int seqlen_q;    // of the sequence
  int first;       // key blocks are [first, last); with block lists, visits to them are
  int first_full;  // [first, first_full) and
  int last_full;   // [last_full, last) need the mask
  int last;
  int seqlen_k;
  int k_begin;
  int diagonal;                  // the key that `row` faces; each row after it faces the next one
  int window_begin, window_end;  // what of an endless sequence `row` sees; moves on alike

  FC_DEVICE bool empty() const { return last <= first; }
  // Whether the mask leaves out some of key block j.
  FC_DEVICE bool cut(int j) const { return j >= last_full || j < first_full; }

  // The same of keys [key, key + keys), for rows [begin, end) of the tile alone.
  FC_DEVICE bool cut(int key, int keys, int begin, int end) const {
    return key + keys > min_of(seqlen_k, window_end + begin) ||
           key < window_begin + min_of(end, seqlen_q - row) - 1;
  }

  // No row among the tile's first `rows` sees a key from here on.
  FC_DEVICE int seen(int rows) const { return min_of(seqlen_k, window_end + rows - 1); }

  // From key blocks to visits: only those of the list are left.
  FC_DEVICE void keep(const tile::KeptBlocks& kept) {
    first = kept.below(first);
    first_full = kept.below(first_full);
    last_full = kept.below(last_full);
    last = kept.below(last);
  }

  static FC_DEVICE Work none() { return {-1}; }
  // A tile past the end of everything: no rows, no keys.
  static FC_DEVICE Work past_the_end() { return {1 << 29}; }

  // masked: else p.window is open. alike: all sequences are. The compiler is to know both.
  static FC_DEVICE Work of(const FwdParams& p, tile::Tile tile, int split, int block_m, int block_n,
                           bool masked, bool alike) {
    tile::ShortSequence const seq = tile::short_sequence_of(p, tile.batch, alike);
    tile::Band<int> const band = masked ? seq.band : tile::Band<int>{};
    int const row = tile.m_block * block_m;
    tile::BlockRange<int> const blocks =
        tile::key_blocks(band, row, min_of(row + block_m, seq.seqlen_q), seq.seqlen_k, block_n);
    return {row,
            tile.head,
            tile.batch,
            split,
            seq.q_begin,
            seq.seqlen_q,
            max_of(blocks.first, split * p.split_blocks),
            blocks.first_full,
            blocks.last_full,
            min_of(blocks.last, (split + 1) * p.split_blocks),
            seq.seqlen_k,
            seq.k_begin,
            row + seq.q_offset,
            row + band.begin,
            row + band.end};
  }
};

// The list of the work's query block.
template <class T>
FC_DEVICE auto kept_blocks(const FwdParams& p, const Work& work) {
  if constexpr (T::kLists)
    return p.kept.of(work.batch, work.head, work.row / T::kBlockM);
  else
    return tile::AllBlocks{};
}

// Finds the tile of an index that only grows. How many tiles a packed sequence has is known on the
// device alone, so there it walks from sequence to sequence.
struct TileCursor {
  tile::Tile tile;
  int before = 0;  // tiles of the sequences before tile.batch

  // False: there are not that many.
  FC_DEVICE bool find(const FwdParams& p, int index, int block_m, bool alike) {
    if (alike || !p.cu_seqlens_q) {
      if (index >= p.scheduler.num_tiles()) return false;
      tile = p.scheduler.tile(index);
      return true;
    }
    for (int b = tile.batch; b < p.batch; ++b) {
      auto const s = p.scheduler.with(ceil_div(p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b], block_m));
      if (index - before < s.num_tiles()) {
        tile = s.tile(index - before);
        tile.batch = b;
        // The wave goes on from sequence to sequence.
        if ((p.batch - 1 - b) * s.num_sections % 2) tile.m_block = s.m_blocks - 1 - tile.m_block;
        return true;
      }
      before += s.num_tiles();
    }
    return false;
  }
};

// Row i of the work's sequence among the rows of the workspace.
FC_DEVICE int64_t partial_index(const FwdParams& p, const Work& work, int i) {
  int64_t const head = int64_t{work.split} * p.partial_heads +
                       (p.cu_seqlens_q ? 0 : work.batch) * p.scheduler.heads + work.head;
  return head * p.partial_rows + work.q_begin + i;
}

}  // namespace flashcore::sm90::fwd
