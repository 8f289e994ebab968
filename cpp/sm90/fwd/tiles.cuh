// Which tiles a team works on, one after another.
#pragma once
#include <type_traits>

#include "sm90/fwd/traits.cuh"
#include "sm90/fwd/work.cuh"

namespace flashcore::sm90::fwd {

// Dealt out in turn: who gets which follows from its number.
template <class T>
struct DealtTiles {
  TileCursor cursor;
  int index, split;

  FC_DEVICE DealtTiles(const FwdParams& p, int team) {
    int const first = team * gridDim.x + blockIdx.x;  // few tiles: one a multiprocessor
    index = first / p.num_splits;
    split = first % p.num_splits;
  }

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    if (!cursor.find(p, index, T::kBlockM)) return false;
    work = Work::of(p, cursor.tile, split, T::kBlockM, T::kBlockN);
    split += gridDim.x * T::kTeams;
    index += split / p.num_splits;
    split %= p.num_splits;
    return true;
  }
};

// The work of a tile with block lists, whose ranges are of visits.
template <class T>
FC_DEVICE Work work_of_list(const FwdParams& p, tile::Tile tile) {
  Work work = Work::of(p, tile, 0, T::kBlockM, T::kBlockN);
  work.keep(kept_blocks<T>(p, work));
  return work;
}
FC_DEVICE int number_of(int team, int teams) { return blockIdx.x * teams + team; }

// With block lists tiles are of any length, and nobody knows it beforehand. So whoever is done
// takes the next one, from a counter in memory. It is asked a tile ahead: the answer takes a while.
template <class T>
struct TakenTiles {
  TileCursor cursor;
  int index, team, after = -1;

  FC_DEVICE TakenTiles(const FwdParams&, int t)
      : index(t * gridDim.x + blockIdx.x), team(number_of(t, T::kTeams)) {}

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    if (after >= 0) index = after;
    if (!cursor.find(p, index, T::kBlockM)) return false;
    after = atomicAdd(p.taken, 1) + 1 + static_cast<int>(gridDim.x) * T::kTeams;
    p.taker[index] = team;
    work = work_of_list<T>(p, cursor.tile);
    return true;
  }
};

// Those that the team took, once there are no more.
template <class T>
struct TakenBefore {
  TileCursor cursor;
  int index = 0, team;

  FC_DEVICE TakenBefore(const FwdParams&, int t) : team(number_of(t, T::kTeams)) {}

  FC_DEVICE bool next(const FwdParams& p, Work& work) {
    while (cursor.find(p, index, T::kBlockM))
      if (p.taker[index++] == team) {
        work = work_of_list<T>(p, cursor.tile);
        return true;
      }
    return false;
  }
};

template <class T>
using Tiles = std::conditional_t<T::kLists, TakenTiles<T>, DealtTiles<T>>;
template <class T>
using TilesAgain = std::conditional_t<T::kLists, TakenBefore<T>, DealtTiles<T>>;

}  // namespace flashcore::sm90::fwd
