// With block lists: which steps a tile of keys has. Host and device, constexpr.
//
// In every head of the group, they are to the query blocks that the lists of the tile's keys keep,
// in rising order, or in falling order where the tile's stride is negative. The producer finds them
// out, and leaves a note of each for the consumers.
//
// The mask may have blocks of 64 keys where a tile has 128. Then the tile takes the steps of both
// lists, and a consumer whose own 64 keys are not meant excludes all of them.
#pragma once
#include "sm90/bwd/neighbours.h"

namespace flashcore::sm90::bwd {

struct alignas(16) StepNote {
  int head, m;
  int place;      // in the table of neighbours, among the head's
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
    bool const alike = p.kept_queries.tiles % kHalves == 0;  // the halves have one list
    while (left_[0] == 0 && (alike || left_[kHalves - 1] == 0)) {
      if (++head_ == (work.kv_head + 1) * p.group) return false;
      for (int half = 0; half < kHalves; ++half) {
        if (half > 0 && alike) continue;
        int const keys = work.key / kListKeys + half;
        kept_[half] = p.kept_queries.of(work.batch, head_, keys);
        int const begin = kept_[half].below(work.first), end = kept_[half].below(work.last);
        left_[half] = max_of(0, end - begin);
        at_[half] = work.stride > 0 ? begin : end - 1;
        if (p.neighbours.entries)
          first_[half] = p.neighbours.place(keys / p.kept_queries.tiles, 0, keys / kHalves,
                                            p.kept_queries.tiles * kListKeys, kHalves * kListKeys);
      }
    }
    // Blocks times the stride, which rise in any case.
    int next[2] = {INT32_MAX, INT32_MAX};
    for (int half = 0; half < kHalves; ++half)
      next[half] = half > 0 && alike ? next[0]
                   : left_[half] > 0 ? kept_[half].at(at_[half]) * work.stride
                                     : INT32_MAX;
    int const first = min_of(next[0], next[kHalves - 1]);
    note.head = head_;
    note.m = first * work.stride;
    note.masked = work.masked(note.m);
    for (int half = 0; half < kHalves; ++half) {
      note.skips[half] = next[half] != first;
      note.masked |= note.skips[half];
      if (note.skips[half] || (half > 0 && alike)) continue;
      note.place = first_[half] + at_[half] * p.neighbours.tiles;
      at_[half] += work.stride;
      --left_[half];
    }
    return true;
  }

 private:
  int head_;
  tile::KeptBlocks kept_[kHalves];
  int at_[kHalves] = {}, left_[kHalves] = {};  // visits: the next one, and how many there are
  int first_[kHalves] = {};                    // the place of the list's first one
};

}  // namespace flashcore::sm90::bwd
