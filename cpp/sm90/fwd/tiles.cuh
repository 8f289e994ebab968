// Which tiles a team works on, one after another.
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/fwd/work.cuh"

namespace flashcore::sm90::fwd {

// Dealt out in turn: who gets which follows from its number.
template <class T>
struct DealtTiles {
  TileCursor cursor;
  int index, split;
  bool alike;  // all sequences are

  FC_DEVICE DealtTiles(const FwdParams& p, int team, bool alike) : alike(alike) {
    int const first = team * gridDim.x + blockIdx.x;  // few tiles: one a multiprocessor
    index = first / p.num_splits;
    split = first % p.num_splits;
  }

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    if (!cursor.find(p, index, T::kBlockM, alike)) return false;
    work = Work::of(p, cursor.tile, split, T::kBlockM, T::kBlockN, T::kMask != Mask::none, alike);
    split += gridDim.x * T::kTeams;
    index += split / p.num_splits;
    split = split % p.num_splits;
    return true;
  }
};

// The work of a tile with block lists, whose ranges are of visits. The longest lists are the last.
template <class T>
FC_DEVICE void set_work(const FwdParams& p, tile::Tile tile, Work& work) {
  if (p.order) {
    int const pair = tile.batch * p.scheduler.heads + tile.head;
    tile.m_block = p.order[pair * p.scheduler.m_blocks + tile.m_block];
  }
  work = Work::of(p, tile, 0, T::kBlockM, T::kBlockN, T::kMask != Mask::none, false);
  asm volatile("" ::: "memory");  // a finder has few registers: its work lies in shared memory
  work.keep(kept_blocks<T>(p, work));
}
FC_DEVICE int number_of(int team, int teams) { return blockIdx.x * teams + team; }

// With block lists tiles are of any length, and nobody knows it beforehand. So whoever is done
// takes the next one, from a counter in memory. Who has to fetch blocks as well asks a tile ahead:
// the answer takes a while.
template <class T>
struct TakenTiles {
  TileCursor cursor;
  int index, team, after = -1;

  FC_DEVICE explicit TakenTiles(int t)
      : index(t * gridDim.x + blockIdx.x), team(number_of(t, T::kTeams)) {}

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    if (after >= 0) index = T::kFinders ? take(p) : after;
    if (!cursor.find(p, index, T::kBlockM, false)) return false;
    after = T::kFinders ? 0 : take(p);
    p.taker[index] = team;
    set_work<T>(p, cursor.tile, work);
    return true;
  }
  FC_DEVICE static int take(const FwdParams& p) {
    return atomicAdd(p.taken, 1) + 1 + static_cast<int>(gridDim.x) * T::kTeams;
  }
};

// Those that the team's finder leaves in shared memory: `work` is where it does.
template <class T>
struct FoundTiles {
  typename T::Shared& sh;
  uint32_t parity = 0;

  FC_DEVICE bool next(const FwdParams&, const Work& work) {
    sh.found_ready.wait(parity);
    parity ^= 1;
    return work.row >= 0;
  }
};

// Those that the team took, once there are no more.
template <class T>
struct TakenBefore {
  TileCursor cursor;
  int index = 0, team;

  FC_DEVICE explicit TakenBefore(int t) : team(number_of(t, T::kTeams)) {}

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    while (cursor.find(p, index, T::kBlockM, false))
      if (p.taker[index++] == team) {
        set_work<T>(p, cursor.tile, work);
        return true;
      }
    return false;
  }
};

}  // namespace flashcore::sm90::fwd
