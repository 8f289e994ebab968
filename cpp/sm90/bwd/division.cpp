#include "sm90/bwd/division.h"

#include "cuda/device.h"
#include "sm90/bwd/query_blocks.h"

namespace flashcore::sm90::bwd {
namespace {

// Heads of equal length that come out even, and of which those in the making stay in L2: dQ needs
// no clearing and no third launch then: 7 to 12 % of head dim 64 at length 512. With a mask half
// is in use at a time. Clusters took longer.
bool short_heads(const BwdConfig& c, const Problem& p, int64_t processors) {
  constexpr int64_t kBytes = int64_t{36} << 20;
  constexpr int kTiles = 4;
  if (p.cu_seqlens_q || p.cu_seqlens_k || p.seqlens_q || p.seqlens_k || p.q_blocks ||
      c.cluster() > 1 || p.seqlen_k > kTiles * c.block_n)
    return false;
  int64_t const pairs = p.batch * p.num_heads_kv;
  int64_t const bytes = processors * head_bytes(c, p, p.seqlen_q);
  return pairs >= processors && round_up<int64_t>(pairs, processors) * 9 <= pairs * 10 &&
         bytes <= (p.window.open() ? kBytes : 2 * kBytes);
}

}  // namespace

int64_t head_bytes(const BwdConfig& c, const Problem& p, int64_t rows) {
  return rows * (p.num_heads_q / p.num_heads_kv) *
         ((p.head_dim + p.head_dim_v) * 2 + c.head_dim * 4);
}

int64_t most_tiles(const BwdConfig& c, const Problem& p) {
  if (rows_k(p) == 0) return 0;
  return p.num_heads_kv * (p.cu_seqlens_k ? p.total_k / c.block_n + p.batch
                                          : p.batch * ceil_div<int64_t>(p.seqlen_k, c.block_n));
}

TableSize table_of(const BwdConfig& c, const Problem& p) {
  int64_t visits = p.q_capacity * (p.block_q / c.block_m);
  int64_t tiles = NeighbourTable::tiles_in(p.block_k, c.block_n);
  if (!p.cu_seqlens_q) visits = min_of(visits, ceil_div<int64_t>(p.seqlen_q, c.block_m));
  if (!p.cu_seqlens_k) tiles = min_of(tiles, ceil_div<int64_t>(p.seqlen_k, c.block_n));
  return {ceil_div<int64_t>(p.seqlen_k, p.block_k), visits, tiles};
}

bool takes_whole_heads(const BwdConfig& c, const Problem& p) {
  int const processors = cuda::devices()[p.device_id].multiprocessors;
  bool const one_tile = p.seqlen_k <= c.block_n && !(p.cu_seqlens_k && p.deterministic);
  return !c.lists && (one_tile || short_heads(c, p, processors));
}

int64_t lap_of(const BwdConfig& c, const Problem& p) {
  if (!p.window.open() || !tile::alike(p)) return 0;
  int64_t const workers = cuda::devices()[p.device_id].multiprocessors / c.cluster();
  int64_t const tiles = most_tiles(c, p), n_blocks = ceil_div<int64_t>(p.seqlen_k, c.block_n);
  int64_t const blocks = ceil_div<int64_t>(p.seqlen_q, c.block_m);
  // Of many tiles with few steps, or short ones, enough heads take turns as it is.
  constexpr int64_t kFewRounds = 4, kManyBlocks = 32;
  if (tiles > kFewRounds * workers && (blocks < kManyBlocks || c.head_dim <= 64)) return 0;
  return lap_size(n_blocks, blocks, p.num_heads_q / p.num_heads_kv, p.batch * p.num_heads_kv,
                  head_bytes(c, p, p.seqlen_q), workers);
}

Division::Division(const BwdConfig& c, const Problem& p) {
  head_blocks = query_blocks(p, p.total_q, c.block_m);
  n_blocks = ceil_div<int64_t>(p.seqlen_k, c.block_n);
  steps = p.num_heads_q / p.num_heads_kv * ceil_div<int64_t>(p.seqlen_q, c.block_m);
  pairs = p.batch * p.num_heads_kv;
  tiles = most_tiles(c, p);
  int const processors = cuda::devices()[p.device_id].multiprocessors;
  whole_heads = takes_whole_heads(c, p);
  alone = n_blocks <= 1 && !p.cu_seqlens_k;
  ordered = p.deterministic && !whole_heads && !alone;
  bool const unlike = p.cu_seqlens_q || p.cu_seqlens_k || p.seqlens_q || p.seqlens_k || c.lists;
  lap = c.laps ? static_cast<int>(lap_of(c, p)) : 0;
  // In a fixed order, so that nobody waits for who waits; and where the host does not know what
  // tiles cost: 12 % of a packed batch of unlike lengths.
  counted = ((ordered && lap == 0) || unlike) && !whole_heads;
  int const most = processors / c.cluster();
  clusters = static_cast<int>(min_of<int64_t>(whole_heads ? min_of(pairs, tiles) : tiles,
                                              lap > 0 ? most - most % lap : most));
  // How long a packed sequence is at most is the caller's word, to which no memory is trusted.
  block_slots = whole_heads && !p.cu_seqlens_q;
  slot_blocks = block_slots ? ceil_div<int64_t>(p.seqlen_q, c.block_m) : head_blocks;
  int64_t const slots = alone && whole_heads ? 0  // the first tile is the last one: no sums
                        : block_slots        ? clusters * (p.num_heads_q / p.num_heads_kv)
                                             : p.num_heads_q;
  int64_t const rows = p.num_heads_q * head_blocks * c.block_m;
  minus_lse = slots * slot_blocks * c.block_m * c.head_dim * 4;
  minus_delta = minus_lse + rows * 4;
  head_key_blocks = p.cu_seqlens_k ? p.total_k / c.block_n + p.batch : p.batch * n_blocks;
  cut = !p.window.open() || (c.lists && p.block_k % c.block_n);
  lse_parts = minus_delta + rows * 4;
  int64_t const parts = c.stat_products() ? rows * int64_t{sizeof(StatParts)} : 0;
  delta_parts = lse_parts + parts;
  redo_keys = delta_parts + parts;
  redo_queries = redo_keys + (cut ? p.num_heads_kv * head_key_blocks * 8 * c.cluster() : 0);
  taken = redo_queries + (cut && whole_heads ? p.num_heads_q * head_blocks * 16 : 0);
  turns = taken + (counted ? (1 + tiles) * 4 : 0);
  order = turns + (ordered ? p.num_heads_q * head_blocks * c.kConsumers * c.cluster() * 4 : 0);
  // A fixed order is that of the tiles; how many a packed sequence has, the device alone knows.
  sorted = c.lists && !ordered && !p.cu_seqlens_k;
  // Longer tiles may differ by more than FinishDq waits: most blocks would be gone.
  constexpr int64_t kSteps = 32;
  at_once = c.few() && tile::alike(p) && tiles <= clusters && steps > 0 && steps <= kSteps;
  dq_heads = order + (sorted ? tiles * 4 : 0);
  neighbours =
      round_up<int64_t>(dq_heads + (at_once ? pairs * c.kConsumers * int64_t{sizeof(DqHead)} : 0),
                        sizeof(Neighbours));
  bytes = neighbours;
  if (ordered && c.lists) table = table_of(c, p);
  bytes += p.batch * p.num_heads_q * table.bytes();
}

}  // namespace flashcore::sm90::bwd
