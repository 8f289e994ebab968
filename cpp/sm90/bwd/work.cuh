// What there is to do for one key tile. The producer finds it out and hands it to the consumers
// through shared memory, beside K: the arithmetic costs one thread's time, off the critical path.
#pragma once
#include "sm90/bwd/config.h"
#include "sm90/bwd/dq_order.h"
#include "sm90/bwd/query_blocks.h"
#include "sm90/ptx/cluster.cuh"
#include "tile/seqlen.h"

namespace flashcore::sm90::bwd {

// From shared memory to shared memory, 16 bytes at a time: the producer has few registers.
template <class X>
FC_DEVICE void copy(X& to, const X& from) {
  static_assert(alignof(X) % 16 == 0);
#pragma unroll 1
  for (unsigned i = 0; i < sizeof(X) / 16; ++i)
    reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
  asm volatile("" ::: "memory");
}

struct alignas(16) Work : StepOrder {
  int key;  // first key, of its sequence; negative: there is no more work
  int kv_head, batch;
  int first;      // query blocks are [first, last), in every head of the group
  int full;       // [first, full) and
  int last_full;  // [last_full, last) need the mask
  int last;
  int window_first, window_last;  // of endless rows, those that see `key`; moves on with the key
  int q_begin, k_begin;           // rows of the tensors where the sequence begins
  int seqlen_q, seqlen_k;         // of the sequence
  int written_q, written_k;       // rows of its gradients: padding too, which gets zeros
  int stats;                      // of head 0: its first query block among all, of the statistics
  int sums;                       // the same of the sums of dQ
  int key_block;                  // the tile's number among all of a key head
  int diagonal;                   // how far past `key` the key is that row 0 faces

  // A tile past the end of everything: no keys, no queries.
  static constexpr int kPastTheEnd = 1 << 29;
  static FC_DEVICE Work past_the_end() {
    Work work{};
    work.key = kPastTheEnd;
    return work;
  }

  FC_DEVICE bool rehearsed() const { return key == kPastTheEnd; }
  FC_DEVICE bool empty() const { return begin == end; }    // nothing to do for this block
  FC_DEVICE bool visited() const { return first < last; }  // something for one of the cluster
  FC_DEVICE bool masked(int m) const { return m < full || m >= last_full; }

  // tile.m_block: which key tile of the sequence. Field by field, since the producer has few
  // registers.
  // slot: of the sums of dQ, where a block or a cluster has its own.
  // falling: the tiles of the head do.
  // plain: p.plain, where the compiler is to know. kHalf: the queries are divided. kLaps: tiles go
  // round them.
  template <bool kHalf, bool kLaps>
  FC_DEVICE void set(const BwdParams& p, tile::Tile tile, bool falling, int block_m, int block_n,
                     int slot, bool plain = false) {
    tile::ShortSequence const seq = tile::short_sequence_of(p, tile.batch, plain || p.alike);
    int const n = tile.m_block;
    kv_head = tile.head;
    batch = tile.batch;
    key = n * block_n;
    q_begin = seq.q_begin;
    k_begin = seq.k_begin;
    seqlen_q = seq.seqlen_q;
    seqlen_k = seq.seqlen_k;
    written_q = !plain && p.cu_seqlens_q ? seqlen_q : p.seqlen_q;
    written_k = !plain && p.cu_seqlens_k ? seqlen_k : p.seqlen_k;
    stats = first_query_block(p, tile.batch, block_m, plain);
    sums = p.block_slots ? (slot - tile.head) * p.group * p.slot_blocks : stats;
    key_block = n + (!plain && p.cu_seqlens_k ? p.cu_seqlens_k[tile.batch] / block_n + tile.batch
                                              : tile.batch * p.scheduler.m_blocks);
    diagonal = seq.q_offset - key;
    window_first = key - seq.band.end + 1;
    window_last = key - seq.band.begin + 1;
    tile::BlockRange<int> const rows = rows_of(seq, n, block_m, block_n);
    first = rows.first;
    last = rows.last;
    full = key + block_n <= seqlen_k ? rows.first_full : last;
    last_full = rows.last_full;
    bool const rising = !plain && p.turns && !falling;
    set_steps(rows, rising);
    if constexpr (kLaps) go_round(p.laps, n);
    if constexpr (kHalf) take_half(cluster_rank());
    if (plain || kHalf || kLaps) return;
    if (p.whole_heads || rising) set_fresh(rows, rows_of(seq, n - 1, block_m, block_n));
    if (p.whole_heads || (p.turns && falling))
      set_complete(rows, rows_of(seq, n + 1, block_m, block_n));
  }
};

// The tile at that place of its head, where the longest lists come first.
template <class T>
FC_DEVICE void in_order(const BwdParams& p, tile::Tile& tile) {
  if (!T::kLists || !p.order) return;
  int const pair = tile.batch * p.scheduler.heads + tile.head;
  tile.m_block = p.order[pair * p.scheduler.m_blocks + tile.m_block];
}

}  // namespace flashcore::sm90::bwd
