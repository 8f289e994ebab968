// Forward: O = softmax(S) V and lse, one block of query rows at a time.
//
//   task   = (row block, batch, kv head), heavy row blocks first
//   row    r of a task: position r / group, query head kv_head * group + r % group. The rows of all
//          query heads that share a kv head are packed together, so few queries still fill a tile.
//   for each block of keys some row can see:
//     pack K transposed and V                     once per block
//     for each strip of kTileM rows:  S = Q K^T,  S -> P (softmax)    S stays in the cache
//     for each strip:                 O = O * correction + P V
//   O / row_sum, lse
//
// Each strip computes only the columns its rows can see: beyond the diagonal nothing is multiplied.
// Every row's chain of operations depends on its own sequence only; so the result is the same for
// any number of threads and any other sequences in the batch, and num_splits and split_size need
// no attention here.
#pragma once
#include "cpu/decode.h"
#include "cpu/entry.h"
#include "cpu/output.h"
#include "cpu/pack.h"

namespace flashcore::cpu {
namespace {

// Tiles of the forward pass and where they lie in a thread's scratch. All a function of the shape.
template <class E>
struct ForwardTiles {
  using U = Operand<E>;
  using T = Real<E>;
  static constexpr int kColumns = kTileN * kLanes<T>;  // of a register tile

  // Rows per task. Each task packs every key its rows see, so more rows cost less (192 rows are
  // a tenth slower); but Q, S and O should stay in a second-level cache of 1 MB, and a small
  // problem should still give every core something to do.
  static constexpr int kMaxBlockM = 384;
  static constexpr int64_t kRowsBytes = 640 << 10;
  static constexpr int64_t kMinTasks = 16;

  // Keys per block, by the size of K transposed. Half of it is what a first-level cache holds and
  // 2 % slower: O is read and written, and the strips set up, once per block.
  static constexpr int64_t kKeyBytes = 64 << 10;
  static constexpr int64_t block_n_for(int64_t head_dim) {
    int64_t const per_key = ceil_div<int64_t>(head_dim, kPerUnit<U>) * int64_t{sizeof(U)};
    int64_t const fits = kKeyBytes / per_key / kColumns * kColumns;
    return max_of<int64_t>(kColumns, min_of<int64_t>(256, fits));
  }

  int64_t depth;  // head_dim in units
  int64_t ldq, ldo, block_m, block_n;
  U *q, *k, *v, *spare;
  T *s, *o, *row_max, *row_sum, *correction;
  tile::KeyRange* limits;  // the keys each row may see, by rule
  int64_t *index, *head;   // position and query head of each row

  // Equal blocks, in whole strips. A row's result does not depend on the block it is in.
  static int64_t block_m_for(const Problem& p, int64_t row_bytes) {
    int64_t const rows = p.seqlen_q * (p.num_heads_q / p.num_heads_kv);
    int64_t most = min_of<int64_t>(kMaxBlockM, kRowsBytes / row_bytes);
    while (most > kMaxBlockM / 4 && p.batch * p.num_heads_kv * ceil_div(rows, most) < kMinTasks)
      most /= 2;
    int64_t const blocks =
        ceil_div<int64_t>(max_of<int64_t>(1, rows), max_of<int64_t>(kTileM, most));
    return max_of<int64_t>(kTileM, round_up<int64_t>(ceil_div(rows, blocks), kTileM));
  }

  ForwardTiles(const Problem& p, Arena& arena) {
    constexpr int lanes = kLanes<T>;
    depth = ceil_div<int64_t>(p.head_dim, kPerUnit<U>);
    ldq = round_up<int64_t>(depth, lanes);
    ldo = round_up<int64_t>(p.head_dim_v, lanes);
    block_n = block_n_for(p.head_dim);
    block_m = block_m_for(p, ldq * int64_t{sizeof(U)} + (block_n + ldo) * int64_t{sizeof(T)});
    q = arena.take<U>(block_m * ldq);
    k = arena.take<U>(depth * block_n);
    v = arena.take<U>(block_n / kPerUnit<U> * ldo);
    spare = arena.take<U>(block_n / kPerUnit<U> * ldo);
    s = arena.take<T>(block_m * block_n);
    o = arena.take<T>(block_m * ldo);
    row_max = arena.take<T>(block_m);
    row_sum = arena.take<T>(block_m * lanes);
    correction = arena.take<T>(block_m);
    limits = arena.take<tile::KeyRange>(block_m);
    index = arena.take<int64_t>(block_m);
    head = arena.take<int64_t>(block_m);
  }
};

template <class E>
class ForwardTask {
  using Tiles = ForwardTiles<E>;
  using U = Operand<E>;
  using T = Real<E>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int u = kPerUnit<U>;
  static constexpr bool kPairs = u == 2;

 public:
  ForwardTask(const Problem& p, int64_t batch, int64_t kv_head, int64_t row_block, Arena scratch)
      : p_(p),
        ctx_(score_context(p, batch)),
        units_(p),
        t_(p, scratch),
        kv_head_(kv_head),
        group_(p.num_heads_q / p.num_heads_kv),
        row_begin_(row_block * t_.block_m) {}

  void run() {
    tile::Sequence const& seq = ctx_.seq;
    int64_t const allotted = p_.cu_seqlens_q
                                 ? p_.cu_seqlens_q[ctx_.batch + 1] - p_.cu_seqlens_q[ctx_.batch]
                                 : p_.seqlen_q;
    auto const in_block = [this](int64_t positions) {
      return static_cast<int>(
          max_of<int64_t>(0, min_of<int64_t>(t_.block_m, positions * group_ - row_begin_)));
    };
    rows_ = in_block(seq.seqlen_q);
    int const padded = in_block(allotted);
    bool const decoded = is_decode(ctx_.seq, group_);  // by DecodeTask: only the padding is left
    start_rows(padded);
    if (rows_ > 0 && !decoded) {
      int64_t const first = t_.limits[0].first, last = t_.limits[rows_ - 1].last;
      for (int64_t c = first / t_.block_n * t_.block_n; c < last; c += t_.block_n) key_block(c);
    }
    for (int r = decoded ? rows_ : 0; r < padded; ++r) {
      T const sum = r < rows_ ? reduce_add<T>(load(t_.row_sum + r * lanes)) : T{0};
      write_output<E>(ctx_, units_, t_.head[r], t_.index[r], t_.row_max[r], sum, t_.o + r * t_.ldo);
    }
  }

 private:
  void start_rows(int padded) {
    for (int r = 0; r < padded; ++r) {
      t_.index[r] = (row_begin_ + r) / group_;
      t_.head[r] = kv_head_ * group_ + (row_begin_ + r) % group_;
      t_.row_max[r] = kMinusInf<T>;
    }
    for (int r = 0; r < rows_; ++r) {
      t_.limits[r] = tile::visible_keys(ctx_.seq.band, t_.index[r], ctx_.seq.seqlen_k);
      const E* row = row_of<E>(p_.q, ctx_.batch, t_.head[r], ctx_.seq.q_begin + t_.index[r]);
      pack_rows(row, 0, 1, p_.head_dim, t_.q + r * t_.ldq, t_.ldq);
    }
    for (int64_t i = 0; i < rows_ * lanes; ++i) t_.row_sum[i] = 0;
    for (int64_t i = 0; i < rows_ * t_.ldo; ++i) t_.o[i] = 0;
  }

  // The keys of [begin, begin + block_n) that rows [r, r + m) may see: columns from begin on.
  tile::KeyRange columns(int r, int m, int64_t begin) const {
    tile::KeyRange x{max_of(begin, t_.limits[r].first),
                     min_of(begin + t_.block_n, t_.limits[r + m - 1].last)};
    if (p_.kv_blocks && !x.empty()) x = kept_columns(r, m, x);
    return {x.first - begin, x.last - begin};
  }

  tile::KeyRange kept_columns(int r, int m, tile::KeyRange keys) const {
    tile::KeyRange all{keys.last, keys.first};
    for (int i = r; i < r + m; ++i) {
      if (i > r && t_.head[i] == t_.head[i - 1] &&
          t_.index[i] / p_.block_q == t_.index[i - 1] / p_.block_q)
        continue;
      auto const x = visible_hull(ctx_, t_.head[i], t_.index[i] / p_.block_q * p_.block_q,
                                  (t_.index[i] / p_.block_q + 1) * p_.block_q, keys);
      if (x.empty()) continue;
      all = {min_of(all.first, x.first), max_of(all.last, x.last)};
    }
    return all;
  }

  static int strip_rows(int r, int rows) { return min_of(kTileM, rows - r); }

  void key_block(int64_t begin) {
    bool visible = false;
    for (int r = 0; r < rows_ && !visible; r += kTileM)
      visible = !columns(r, strip_rows(r, rows_), begin).empty();
    if (!visible) return;

    tile::Sequence const& seq = ctx_.seq;
    int64_t const count = min_of(t_.block_n, seq.seqlen_k - begin);
    const E* k = row_of<E>(p_.k, ctx_.batch, kv_head_, seq.k_begin + begin);
    const E* v = row_of<E>(p_.v, ctx_.batch, kv_head_, seq.k_begin + begin);
    pack_transposed(k, p_.k.row_stride, count, p_.head_dim, t_.k, t_.block_n);
    bool const finite = pack_stacked(v, p_.v.row_stride, count, p_.head_dim_v, t_.v, t_.ldo);

    bool changed[Tiles::kMaxBlockM / kTileM + 1];
    for (int r = 0; r < rows_; r += kTileM) changed[r / kTileM] = scores(r, begin);
    for (int r = 0; r < rows_; r += kTileM) {
      int const m = strip_rows(r, rows_);
      tile::KeyRange const x = columns(r, m, begin);
      if (x.empty()) continue;
      if (finite)
        values(r, m, x, t_.v, changed[r / kTileM] ? Init::kScale : Init::kAdd);
      else
        for (int i = r; i < r + m; ++i) values_where_nonzero(i, x);
    }
  }

  // S and P of one strip. Returns whether O must be corrected.
  bool scores(int r, int64_t begin) {
    int const m = strip_rows(r, rows_);
    tile::KeyRange const x = columns(r, m, begin);
    if (x.empty()) return false;
    int64_t const from = x.first / Tiles::kColumns * Tiles::kColumns;
    int64_t const n = round_up<int64_t>(x.last - from, lanes * kPerUnit<U>);
    T* const s = t_.s + r * t_.block_n + from;
    gemm_strip<Order::kRowMajor>(m, n, t_.depth, t_.q + r * t_.ldq, t_.ldq, t_.k + from, t_.block_n,
                                 s, t_.block_n, Init::kZero);
    ScoreTile<T> const tile{s,           t_.block_n,  m, static_cast<int>(n), t_.index + r,
                            t_.head + r, begin + from};
    if (units_.terms) {
      ScoreTile<T> keys = tile;  // there is no bias past the last key
      keys.cols = static_cast<int>(min_of(n, ctx_.seq.seqlen_k - tile.col0));
      add_score_terms<T>(ctx_, keys, nullptr);
    }
    if (p_.mask || p_.kv_blocks)
      exclude(ctx_, tile, kMinusInf<T>);
    else
      exclude_outside(r, m, begin + from, s, n);
    T* const sum = t_.row_sum + r * lanes;
    if (!p_.dropout_threshold)
      return softmax_strip<kPairs>(s, t_.block_n, m, n, units_.scale_log2, t_.row_max + r, sum,
                                   t_.correction + r);
    bool const changed = softmax_strip<false>(s, t_.block_n, m, n, units_.scale_log2,
                                              t_.row_max + r, sum, t_.correction + r);
    drop(ctx_, tile);
    if constexpr (kPairs) {
      for (int i = 0; i < m; ++i)
        pack_rows(s + i * t_.block_n, 0, 1, n, reinterpret_cast<U*>(s + i * t_.block_n), 0);
    }
    return changed;
  }

  // -inf where a row's own limits exclude a key that its strip computed.
  void exclude_outside(int r, int m, int64_t key, T* s, int64_t n) const {
    for (int i = 0; i < m; ++i, s += t_.block_n) {
      int64_t const lo = min_of(n, t_.limits[r + i].first - key);
      int64_t const hi = max_of<int64_t>(0, t_.limits[r + i].last - key);
      for (int64_t j = 0; j < lo; ++j) s[j] = kMinusInf<T>;
      for (int64_t j = hi; j < n; ++j) s[j] = kMinusInf<T>;
    }
  }

  // P of row r from column `from` on, where its strip began.
  const U* probabilities(int r, int64_t from) const {
    return reinterpret_cast<const U*>(t_.s + r * t_.block_n + from);
  }

  void values(int r, int m, tile::KeyRange x, const U* v, Init init) {
    int64_t const from = x.first / Tiles::kColumns * Tiles::kColumns;
    int64_t const first = x.first / u, last = ceil_div<int64_t>(x.last, u);
    gemm_strip<Order::kRowMajor>(
        m, t_.ldo, last - first, probabilities(r, from) + (first - from / u), t_.block_n,
        v + first * t_.ldo, t_.ldo, t_.o + r * t_.ldo, t_.ldo, init, t_.correction + r);
  }

  // The same for one row against V with NaN or Inf in it: keys with P = 0 are taken as zero, for 0
  // times NaN is NaN and this row may not see those keys.
  void values_where_nonzero(int r, tile::KeyRange x) {
    int64_t const from = x.first / Tiles::kColumns * Tiles::kColumns;
    const U* p = probabilities(r, from) - from / u;
    for (int64_t i = x.first / u; i < ceil_div<int64_t>(x.last, u); ++i) {
      const U* in = t_.v + i * t_.ldo;
      U* out = t_.spare + i * t_.ldo;
      if constexpr (kPairs) {
        uint32_t const keep = (p[i].bits << 1 & 0xffffu ? 0x0000ffffu : 0u) |
                              (p[i].bits >> 16 << 1 & 0xffffu ? 0xffff0000u : 0u);
        for (int64_t c = 0; c < t_.ldo; ++c) out[c].bits = in[c].bits & keep;
      } else {
        for (int64_t c = 0; c < t_.ldo; ++c) out[c] = p[i] != 0 ? in[c] : U{};
      }
    }
    values(r, 1, x, t_.spare, Init::kScale);
  }

  const Problem& p_;
  ScoreContext const ctx_;
  ScoreUnits<T> const units_;
  Tiles const t_;
  int64_t const kv_head_, group_, row_begin_;
  int rows_ = 0;  // of the block, within the sequence
};

// Phase 0: blocks of rows, then the key ranges of decode. Phase 1: those combined.
template <class E>
struct ForwardShape {
  Arena none{nullptr};
  ForwardTiles<E> tiles;
  DecodeShape<E> decode;
  int64_t heads;
  int64_t blocks, ranges;  // tasks of phase 0

  explicit ForwardShape(const Problem& p) : tiles(p, none), decode(p) {
    int64_t const group = p.num_heads_q / p.num_heads_kv;
    bool const ragged = p.cu_seqlens_q || p.seqlens_q;  // each sequence decides for itself
    heads = p.batch * p.num_heads_kv;
    bool const all_decode = p.seqlen_q * group <= kDecodeRows;
    blocks = ragged || !all_decode ? heads * ceil_div(p.seqlen_q * group, tiles.block_m) : 0;
    ranges = ragged || all_decode ? heads * decode.splits : 0;
  }
};

template <class E>
void forward_plan(const Problem& p, Work& work) {
  ForwardShape<E> const shape(p);
  Arena decode_scratch(nullptr);
  DecodeTiles<E>(p, decode_scratch);
  work.tasks[0] = shape.blocks + shape.ranges;
  work.tasks[1] = shape.ranges ? shape.heads : 0;
  work.phases = shape.ranges ? 2 : 1;
  work.num_splits = shape.ranges ? shape.decode.splits : 1;
  work.scratch_bytes = max_of(shape.none.size(), decode_scratch.size());
  work.shared_bytes = shape.ranges ? shape.decode.bytes(shape.heads) : 0;
}

template <class E>
void forward_run(const Problem& p, const Work&, int phase, int64_t task, std::byte* shared,
                 std::byte* scratch) {
  ForwardShape<E> const shape(p);
  if (phase == 1)
    return DecodeTask<E>(p, task / p.num_heads_kv, task % p.num_heads_kv, shared, Arena(scratch))
        .combine();
  if (task >= shape.blocks) {
    int64_t const head = (task - shape.blocks) / shape.decode.splits;
    return DecodeTask<E>(p, head / p.num_heads_kv, head % p.num_heads_kv, shared, Arena(scratch))
        .run((task - shape.blocks) % shape.decode.splits);
  }
  int64_t const row_block = (shape.blocks - 1 - task) / shape.heads;  // causal: the last see most
  int64_t const head = task % shape.heads;
  ForwardTask<E>(p, head / p.num_heads_kv, head % p.num_heads_kv, row_block, Arena(scratch)).run();
}

template <DType D>
constexpr Entry forward_entry() {
  using E = Element<D>;
  return {ForwardTiles<E>::kMaxBlockM, static_cast<int>(ForwardTiles<E>::block_n_for(128)),
          forward_plan<E>, forward_run<E>};
}

}  // namespace
}  // namespace flashcore::cpu
