// In which order key tiles add to dQ, where the order is fixed. Host and device, constexpr.
//
// The order is that in which tiles are dealt or taken: in one head they fall from the last one to
// the first, or rise. Those that visit a query block follow one another without a gap, so each
// passes its turn there on to its neighbour, and is the first one where the one before it does not
// come.
//
// (With block lists neighbours may be anywhere: neighbours.h.)
//
// If they fall, a tile's steps rise, and the other way round. Then, with a mask that cuts off
// later keys, falling tiles meet on their own: each begins with query blocks that are new, and
// comes to those of the one before it when that is past them. Tiles that rise all begin with the
// last query block, each a step behind the one before it.
//
// Without a mask tiles may go round the query blocks instead, each from another one on (laps.h).
#pragma once
#include "sm90/bwd/key_tiles.h"
#include "sm90/bwd/laps.h"

namespace flashcore::sm90::bwd {

// Of the steps of one key tile, in every head of the group.
struct StepOrder {
  // Query blocks begin, begin + stride, ..., without end. stride: 1 or -1, or 2 for every other
  // one.
  int begin, end, stride;
  // Of whole heads: from `fresh` on nothing has been added to dQ yet; below `complete` nothing will
  // be after this tile. With a fixed order: in [complete, fresh) the tile before this one adds.
  int fresh, complete;

  // rows: what the tile visits; reversed: with a fixed order, the tiles of the head rise.
  FC_HD constexpr void set_steps(tile::BlockRange<int> const& rows, bool reversed) {
    stride = reversed ? -1 : 1;
    begin = reversed ? rows.last - 1 : rows.first;
    end = reversed ? rows.first - 1 : rows.last;
    fresh = rows.last;
    complete = rows.first;
  }
  // Of tile n, which goes round.
  FC_HD constexpr void go_round(Laps const& laps, int n) {
    stride = -1;
    begin = laps.blocks + laps.begin(n);
    end = laps.begin(n);
  }
  // Every other one of them, without an order.
  FC_HD constexpr void take_half(int rank) {
    int const steps = (end - begin) / stride;
    begin += rank * stride;
    stride *= 2;
    end = begin + (steps + 1 - rank) / 2 * stride;
  }
  // before: what the tile one before in the sequence visits; after: one after.
  FC_HD constexpr void set_fresh(tile::BlockRange<int> const& rows,
                                 tile::BlockRange<int> const& before) {
    fresh = before.empty() ? rows.first : before.last;
  }
  FC_HD constexpr void set_complete(tile::BlockRange<int> const& rows,
                                    tile::BlockRange<int> const& after) {
    complete = after.empty() ? rows.last : after.first;
  }

  FC_HD constexpr bool waits(int m) const { return m >= complete && m < fresh; }
  // The tile that adds after tile n, where it visits.
  FC_HD constexpr int next(int n) const { return n - stride; }
};

}  // namespace flashcore::sm90::bwd
