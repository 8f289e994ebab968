// Which key tiles a block of a launch works on, one after another. Host and device, constexpr.
#pragma once
#include "common/types.h"
#include "tile/block_range.h"
#include "tile/seqlen.h"
#include "tile/tile_scheduler.h"

namespace flashcore::sm90::bwd {

// The key tiles of a sequence, those that are padding alone included: their gradients are zero.
template <class P>
FC_HD constexpr int key_tiles(P const& p, int batch, int block_n) {
  return ceil_div(
      p.cu_seqlens_k ? p.cu_seqlens_k[batch + 1] - p.cu_seqlens_k[batch] : int{p.seqlen_k},
      block_n);
}

// The query blocks of key tile n of a sequence; none if there is no such tile.
FC_HD constexpr tile::BlockRange<int> rows_of(const tile::ShortSequence& seq, int n, int block_m,
                                              int block_n) {
  if (n < 0) return {};
  return tile::row_blocks(seq.band, n * block_n, min_of((n + 1) * block_n, seq.seqlen_k),
                          seq.seqlen_q, block_m);
}

// P: a kernel's parameters. Either the tiles of whole (batch, key head) pairs, in rising order; or
// tiles dealt out by the scheduler, whose m_block counts from the last.
class KeyTiles {
 public:
  FC_HD constexpr KeyTiles(int block, int blocks) : at_(block), blocks_(blocks) {}

  // The next one; its m_block is a key tile of the sequence. False: there are no more.
  // plain: p.plain, where the compiler is to know.
  template <class P>
  FC_HD constexpr bool next(P const& p, int block_n, tile::Tile& tile, bool plain = false) {
    if (!plain && p.whole_heads) return next_of_heads(p, block_n, tile);
    if (plain || !p.cu_seqlens_k) {
      if (at_ >= p.scheduler.num_tiles()) return false;
      take(p.scheduler, at_, !plain && p.all_rise && falls(p.scheduler, at_), tile);
    } else if (!find(p, block_n, tile)) {
      return false;
    }
    at_ += blocks_;
    return true;
  }

  // The same where they are dealt out in laps, whose number in a head the scheduler's m_block is.
  template <class P>
  FC_HD constexpr bool next_in_laps(P const& p, tile::Tile& tile) {
    if (at_ >= p.scheduler.num_tiles() * p.laps.tiles) return false;
    int const lap = at_ / p.laps.tiles;
    take(p.scheduler, lap, falls(p.scheduler, lap), tile);
    tile.m_block = tile.m_block * p.laps.tiles + at_ - lap * p.laps.tiles;
    at_ += blocks_;
    return true;
  }

  // Of those that are dealt out: which one next() looks at, among all. May only grow.
  FC_HD constexpr int& at() { return at_; }
  // Whether the tiles of its head fall from the last one to the first; else they rise.
  FC_HD constexpr bool falling() const { return falling_; }

 private:
  int at_;          // tile among all; of whole heads, pair of batch and key head
  int blocks_;      // of the launch
  int tile_ = 0;    // of whole heads: the next key tile
  int batch_ = 0;   // of a packed batch: the sequence that the last tile was of
  int before_ = 0;  // and the tiles of those before it
  bool falling_ = false;

  // Whether key tiles fall in the section of tile `index`: the scheduler's m_blocks count from the
  // last one.
  template <class Scheduler>
  static FC_HD constexpr bool falls(Scheduler const& s, int index) {
    return s.rises(s.section(index));
  }
  // Tile `index` of the scheduler's; `turned` around if that is not the order that is wanted.
  template <class Scheduler>
  FC_HD constexpr void take(Scheduler const& s, int index, bool turned, tile::Tile& tile) {
    tile = s.tile(index);
    falling_ = falls(s, index) != turned;
    if (!turned) tile.m_block = s.m_blocks - 1 - tile.m_block;
  }

  template <class P>
  FC_HD constexpr bool next_of_heads(P const& p, int block_n, tile::Tile& tile) {
    for (; at_ < p.pairs; at_ += blocks_, tile_ = 0) {
      tile = {tile_, at_ % p.scheduler.heads, at_ / p.scheduler.heads};
      if (tile_++ < key_tiles(p, tile.batch, block_n)) return true;
    }
    return false;
  }

  // How many tiles a packed sequence has is known on the device alone: walk from one to the next.
  template <class P>
  FC_HD constexpr bool find(P const& p, int block_n, tile::Tile& tile) {
    for (; batch_ < p.batch; ++batch_) {
      auto const s = p.scheduler.with(key_tiles(p, batch_, block_n));
      if (at_ - before_ < s.num_tiles()) {
        // The wave of long and short tiles goes on from sequence to sequence.
        int const index = at_ - before_;
        bool const turned =
            p.all_rise ? falls(s, index) : (p.batch - 1 - batch_) * s.num_sections % 2 != 0;
        take(s, index, turned, tile);
        tile.batch = batch_;
        return true;
      }
      before_ += s.num_tiles();
    }
    return false;
  }
};

}  // namespace flashcore::sm90::bwd
