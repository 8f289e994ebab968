// How a backward problem is divided among the blocks of a launch, and where things are in its
// workspace. Host only.
#pragma once
#include "common/problem.h"
#include "sm90/bwd/config.h"

namespace flashcore::sm90::bwd {

// A packed tensor is one long sequence to whoever copies it.
inline int64_t batch_q(const Problem& p) { return p.cu_seqlens_q ? 1 : p.batch; }
inline int64_t batch_k(const Problem& p) { return p.cu_seqlens_k ? 1 : p.batch; }
inline int64_t rows_q(const Problem& p) { return p.cu_seqlens_q ? p.total_q : p.seqlen_q; }
inline int64_t rows_k(const Problem& p) { return p.cu_seqlens_k ? p.total_k : p.seqlen_k; }

// The key tiles there are; for a packed batch a bound.
int64_t most_tiles(const BwdConfig& c, const Problem& p);

// How large a head's table of neighbours is. A list names no more blocks than the rows have, except
// of a packed sequence, which may be longer than the caller says.
struct TableSize {
  int64_t lists = 0, visits = 0, tiles = 0;
  int64_t entries() const { return lists * visits * tiles; }
  int64_t bytes() const { return entries() * int64_t{sizeof(Neighbours)}; }
};
TableSize table_of(const BwdConfig& c, const Problem& p);

// Whether a block takes all key tiles of a head. In a fixed order, how long packed sequences are at
// most, which is the caller's word, must not change the order of a sum.
bool takes_whole_heads(const BwdConfig& c, const Problem& p);

// What a key head and the query heads that share it have in L2 while they run: of `rows` rows Q, dO
// and the sums of dQ.
int64_t head_bytes(const BwdConfig& c, const Problem& p, int64_t rows);

// How many tiles of a head a lap has; 0: there are none. See laps.h.
int64_t lap_of(const BwdConfig& c, const Problem& p);

// How a problem is divided among the blocks of a launch, and where things are in the workspace.
struct Division {
  int64_t head_blocks;  // query blocks of a head
  int64_t n_blocks;     // key tiles of the longest sequence
  int64_t steps;        // of a tile at most
  int64_t tiles;        // of all heads; for a packed batch a bound
  int64_t pairs;        // of batch and key head
  int clusters;         // or blocks, if they work alone
  bool whole_heads;
  bool alone;               // no two tiles add to the same dQ
  bool ordered;             // tiles add to dQ in a fixed order
  int lap;                  // and go round the query blocks, so many at once; 0: they do not
  bool counted;             // tiles are taken from a counter, not dealt out
  bool cut;                 // a mask cuts blocks
  bool sorted;              // tiles, by the lengths of lists
  bool at_once;             // every tile has a cluster of its own, and few steps: finish_dq.cuh
  bool block_slots;         // sums of dQ for the heads in the making alone, not for all
  int64_t slot_blocks;      // query blocks of such sums
  int64_t head_key_blocks;  // key tiles of a key head
  // Offsets in bytes; the sums of dQ come first.
  int64_t minus_lse, minus_delta, lse_parts, delta_parts, redo_keys, redo_queries, taken, turns,
      order, dq_heads, neighbours, bytes;
  TableSize table;  // of a head, with lists and a fixed order

  Division(const BwdConfig& c, const Problem& p);
};

}  // namespace flashcore::sm90::bwd
