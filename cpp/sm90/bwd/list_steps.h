// With block lists: which steps a tile of keys has. Host and device, constexpr.
//
// In every head of the group, they are to the query blocks that the lists of the tile's keys keep,
// in rising order. The producer finds them out, and leaves a note of each for the consumers.
//
// The mask may have blocks of 64 keys where a tile has 128. Then the tile takes the steps of both
// lists, and a consumer whose own 64 keys are not meant excludes all of them.
#pragma once
#include "tile/block_list.h"

namespace flashcore::sm90::bwd {

constexpr int kListKeys = 64;  // keys that share a list, at least

struct alignas(16) StepNote {
  int head, m;
  bool last;      // of the tile
  bool masked;    // some pairs are excluded
  bool skips[2];  // whose 64 keys are not meant
};

// kHalves: of a tile, in 64 keys. P: a kernel's parameters. W: the Work of the tile.
template <int kHalves>
class alignas(16) ListSteps {
 public:
  template <class P, class W>
  FC_HD constexpr ListSteps(P const& p, W const& work) : head_(work.kv_head * p.group - 1) {}

  // The next one, without `last`; false: there are no more.
  template <class P, class W>
  FC_HD constexpr bool next(P const& p, W const& work, StepNote& note) {
    while (at_[0] == end_[0] && at_[kHalves - 1] == end_[kHalves - 1]) {
      if (++head_ == (work.kv_head + 1) * p.group) return false;
      for (int half = 0; half < kHalves; ++half) {
        kept_[half] = p.kept_queries.of(work.batch, head_, work.key / kListKeys + half);
        at_[half] = kept_[half].below(work.first);
        end_[half] = max_of(at_[half], kept_[half].below(work.last));
      }
    }
    int m[2] = {INT32_MAX, INT32_MAX};
    for (int half = 0; half < kHalves; ++half)
      if (at_[half] < end_[half]) m[half] = kept_[half].at(at_[half]);
    note.head = head_;
    note.m = min_of(m[0], m[1]);
    note.masked = work.masked(note.m);
    for (int half = 0; half < kHalves; ++half) {
      note.skips[half] = m[half] != note.m;
      at_[half] += m[half] == note.m;
      note.masked |= note.skips[half];
    }
    return true;
  }

 private:
  int head_;
  tile::KeptBlocks kept_[kHalves];
  int at_[kHalves] = {}, end_[kHalves] = {};  // visits
};

}  // namespace flashcore::sm90::bwd
