// In which order the key tiles of a launch are dealt or taken. Host only.
#pragma once
#include "sm90/bwd/division.h"

namespace flashcore::sm90::bwd {

struct Schedule {
  tile::TileScheduler scheduler;
  bool all_rise = false;  // no section's key tiles fall
};

// With no mask, tiles of one head side by side: they read the same queries at the same time. With
// one, their costs differ, and what counts is that every block is dealt its share. With lists too;
// then the host does not know what tiles cost. Tiles that wait for one another are far apart, too:
// those that run at the same time are then few of each head; but for laps, of which as many as can
// run do, before any of their heads has the next one.
Schedule schedule_of(const BwdConfig& c, const Problem& p, const Division& d);

}  // namespace flashcore::sm90::bwd
