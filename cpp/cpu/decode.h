// Forward for a few rows against many keys: at most kDecodeRows rows of one kv head, typically one
// token of every query head of a group. Each key is used a few times only, so the pace is that of
// memory: K and V are read once, where they lie, with nothing packed.
//
//   range   kRangeKeys keys or a sixteenth of the sequence; one task each, so that several threads
//           can work on one head
//     for each chunk of kChunk keys:  S = Q K^T by dot products,  softmax,  O += P V
//   combine the ranges of a head in ascending order
//
// The division into ranges follows from the length of the sequence alone.
#pragma once
#include "cpu/output.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/softmax.h"

namespace flashcore::cpu {
namespace {

constexpr int kDecodeRows = 8;
static_assert(kDecodeRows <= kStripState);

inline bool is_decode(const tile::Sequence& seq, int64_t group) {
  return seq.seqlen_q > 0 && seq.seqlen_q * group <= kDecodeRows;
}

// The division of one sequence's keys.
constexpr int64_t kRangeKeys = 512;
constexpr int64_t kMaxRanges = 16;
inline int64_t range_keys(int64_t seqlen_k) {
  return max_of(kRangeKeys, round_up<int64_t>(ceil_div(seqlen_k, kMaxRanges), 256));
}

// Partial results of every range: what the ranges of a head leave for combine().
template <class E>
struct DecodeShape {
  using T = Real<E>;
  int rows;    // of a group, at most
  int splits;  // ranges of the longest sequence
  int64_t ldo;

  explicit DecodeShape(const Problem& p)
      : rows(static_cast<int>(
            min_of<int64_t>(kDecodeRows, p.seqlen_q * (p.num_heads_q / p.num_heads_kv)))),
        splits(static_cast<int>(
            max_of<int64_t>(1, min_of(kMaxRanges, ceil_div(p.seqlen_k, kRangeKeys))))),
        ldo(round_up<int64_t>(p.head_dim_v, kLanes<T>)) {}

  // Per row: O, then the maximum, then the sum; one vector of room for the last two.
  int64_t row_stride() const { return ldo + kLanes<T>; }
  size_t bytes(int64_t heads) const {
    return static_cast<size_t>(heads * splits * rows * row_stride()) * sizeof(T);
  }
  T* partial(std::byte* shared, int64_t head, int64_t split) const {
    return reinterpret_cast<T*>(shared) + (head * splits + split) * rows * row_stride();
  }
};

// A thread's scratch.
template <class E>
struct DecodeTiles {
  using T = Real<E>;
  using U = Operand<E>;
  // Keys at a time: enough that softmax and the correction of O cost little.
  static constexpr int kChunk = 256;
  int64_t ldq, ldo;
  U* q;
  T *s, *o, *row_max, *row_sum, *correction;

  DecodeTiles(const Problem& p, Arena& arena) {
    constexpr int lanes = kLanes<T>;
    ldq = round_up<int64_t>(ceil_div<int64_t>(p.head_dim, kPerUnit<U>), lanes);
    ldo = round_up<int64_t>(p.head_dim_v, lanes);
    q = arena.take<U>(kDecodeRows * ldq);
    s = arena.take<T>(kDecodeRows * kChunk);
    o = arena.take<T>(kDecodeRows * ldo);
    row_max = arena.take<T>(kStripState);
    row_sum = arena.take<T>(kStripState * lanes);
    correction = arena.take<T>(kStripState);
  }
};

// Asks for the cache line at p[c] of a row that is used kAhead rows later, once a line. Reading in
// the order of memory, the processor's own prefetching gets 0.75 of the bandwidth for one row of Q.
// With more rows there is too much arithmetic between two misses, and it stops at every page. Into
// the second-level cache: a request for the first level is dropped much sooner when too many wait.
constexpr int kAhead = 32;
template <class E>
FC_INLINE void ask_for(const E* p, int64_t c) {
  constexpr int64_t line = 64 / sizeof(E);
  if (c % line == 0) __builtin_prefetch(p + c, 0, 2);
}

// Lane i of the result is the sum of x[i], by halving: kLanes reductions for the price of two. Each
// sum takes one vector as it lies (a blend) and one with its halves exchanged (a shuffle).
template <class T>
FC_INLINE Vec<T> reduce_each(Vec<T> (&x)[kLanes<T>]) {
#pragma GCC unroll 4
  for (int n = kLanes<T> / 2; n > 0; n /= 2) {
    VecInt<T> const lane = iota<T>(), second = (lane & n) * (kLanes<T> / n);  // lanes of x[i + n]
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      x[i] = __builtin_shuffle(x[i], x[i + n], lane + second) +
             __builtin_shuffle(x[i], x[i + n], (lane ^ n) + second);
  }
  return x[0];
}

// f(0) ... f(N - 1), each number a constant. An array indexed by such numbers alone is registers to
// the compiler from the start. With unrolled loops in its place GCC keeps the sums of dot_rows in
// memory around its inner loop, which then waits for stores.
template <int N>
struct IntConstant {
  static constexpr int value = N;
};
template <int N, class F>
FC_INLINE void unrolled(const F& f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(IntConstant<N - 1>{});
  }
}

// s[r * lds + j] = q[r] . k[j] for R rows and `count` keys. R divides kLanes, so that the products
// of R rows with kLanes / R keys fill one vector.
template <int R, class U, class E>
[[gnu::noinline]] void dot_rows(const U* q, int64_t ldq, const E* k, int64_t stride, int count,
                                int64_t head_dim, Real<E>* s, int64_t lds) {
  using T = Real<E>;
  constexpr int kStep = kLanes<T> * kPerUnit<U>;
  constexpr int kKeys = kLanes<T> / R;
  // One key after the other is the order of memory; several at a time share the loads of Q.
  constexpr int kTogether = R < 4 ? 1 : min_of(sizeof(E) == 2 ? 4 : 2, kKeys);
  constexpr int kRowsAhead = R == 1 && kVecBytes == 64 ? 4 : kAhead;
  for (int j = 0; j < count; j += kKeys) {
    Vec<T> acc[R][kKeys];
    unrolled<kKeys / kTogether>([&](auto group) {
      constexpr int first = group.value * kTogether;
      const E* row[kTogether];
      unrolled<kTogether>([&](auto i) {
        row[i.value] = k + min_of(j + first + i.value, count - 1) * stride;
        unrolled<R>([&](auto r) { acc[r.value][first + i.value] = Vec<T>{}; });
      });
      auto const step = [&]<bool kWhole>(int64_t c) {
        decltype(units_along<U>(k, 0)) x[kTogether];
        unrolled<kTogether>([&](auto i) {
          ask_for(row[i.value] + kRowsAhead * stride, c);
          x[i.value] = units_along<U>(row[i.value] + c, kWhole ? kStep : head_dim - c);
        });
        unrolled<R>([&](auto r) {
          auto const y = in_register(load_unit(q + r.value * ldq + c / kPerUnit<U>));
          unrolled<kTogether>([&](auto i) {
            auto& sum = acc[r.value][first + i.value];
            sum = dot_add(sum, y, x[i.value]);
          });
        });
      };
      int64_t c = 0;
      for (; c + kStep <= head_dim; c += kStep) step.template operator()<true>(c);
      if (c < head_dim) step.template operator()<false>(c);
    });
    Vec<T> each[kLanes<T>];
    unrolled<kLanes<T>>([&](auto i) { each[i.value] = acc[i.value / kKeys][i.value % kKeys]; });
    alignas(64) T sums[kLanes<T>];
    store(sums, reduce_each<T>(each));
    // Past the last key this writes its product again: s has room for whole vectors.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      __builtin_memcpy(s + r * lds + j, sums + r * kKeys, kKeys * sizeof(T));
  }
}

// o[r] = correction[r] * o[r] + sum over j of p[r][j] * v[j], for R rows and N vectors of columns,
// of which `cols` columns exist. ask: for rows kAhead further on. kSkip: where P = 0 the row may
// not see the key, whose V may then be NaN: it is left out.
template <int R, int N, bool kSkip, bool kWhole, class U, class E>
[[gnu::noinline]] void add_values(const U* p, int64_t ldp, const E* v, int64_t stride, int count,
                                  int64_t cols, Real<E>* o, int64_t ldo, const Real<E>* correction,
                                  bool ask) {
  using T = Real<E>;
  constexpr int u = kPerUnit<U>;
  Vec<T> acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) acc[r][c] = load(o + r * ldo + c * kLanes<T>) * correction[r];
  for (int j = 0; j < count; j += u) {
    if constexpr (kSkip)
      if (p[j] == 0) continue;
    const E* row = v + j * stride;
    const E* below = u == 2 && j + 1 < count ? row + stride : nullptr;
    decltype(units_across<U>(v, v, 0)) x[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      int64_t const col = c * kLanes<T>;
      if (ask)
        for (int i = 0; i < u; ++i) ask_for(row + (kAhead + i) * stride, col);
      x[c] = in_register(
          units_across<U>(row + col, below ? below + col : nullptr, kWhole ? kLanes<T> : cols));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c)
        acc[r][c] = dot_add(acc[r][c], splat_unit(p + r * ldp + j / u), x[c]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) store(o + r * ldo + c * kLanes<T>, acc[r][c]);
}

// As many columns as the registers hold, so that rows are read in the order of memory; kAhead keys
// at a time, so that the next rows of P find them in the first-level cache. What must be converted
// is shared by more rows of P, and half as many columns.
template <int R, bool kSkip, class U, class E>
void add_values(const U* p, int64_t ldp, const E* v, int64_t stride, int count, int64_t cols,
                Real<E>* o, int64_t ldo, const Real<E>* correction) {
  constexpr int lanes = kLanes<Real<E>>;
  constexpr bool kShare = sizeof(E) == 2 && R >= 4 && kTileN == 4;
  constexpr int kRows = kShare ? 4 : max_of(1, min_of(R, kTileM * kTileN / 8) / 2 * 2);
  static constexpr Real<E> kOnes[kDecodeRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  bool const ask = R >= 4 || cols > 8 * lanes;  // else they are read in the order of memory
  for (int j = 0; j < count; j += kAhead) {
    for (int r = 0; r < R; r += kRows) {
      int64_t c = 0;
      auto const add = [&]<int kVectors, bool kWhole>() {
        for (; kWhole ? c + kVectors * lanes <= cols : c < cols; c += kVectors * lanes)
          add_values<kRows, kVectors, kSkip, kWhole>(
              p + r * ldp + j / kPerUnit<U>, ldp, v + j * stride + c, stride,
              min_of(kAhead, count - j), cols - c, o + r * ldo + c, ldo,
              j == 0 ? correction + r : kOnes, ask);
      };
      if constexpr (!kShare) add.template operator()<8, true>();
      add.template operator()<4, true>();
      add.template operator()<1, true>();
      add.template operator()<1, false>();
    }
  }
}

template <class E>
class DecodeTask {
  using U = Operand<E>;
  using T = Real<E>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int kChunk = DecodeTiles<E>::kChunk;

 public:
  DecodeTask(const Problem& p, int64_t batch, int64_t kv_head, std::byte* shared, Arena scratch)
      : p_(p),
        ctx_(score_context(p, batch)),
        units_(p),
        shape_(p),
        t_(p, scratch),
        shared_(shared),
        kv_head_(kv_head),
        group_(p.num_heads_q / p.num_heads_kv) {
    if (!is_decode(ctx_.seq, group_)) return;
    rows_ = static_cast<int>(ctx_.seq.seqlen_q * group_);
    for (int r = 0; r < rows_; ++r) {
      index_[r] = r / group_;
      head_[r] = kv_head * group_ + r % group_;
      limits_[r] = tile::visible_keys(ctx_.seq.band, index_[r], ctx_.seq.seqlen_k);
    }
  }

  // The keys of one range.
  void run(int64_t split) {
    if (rows_ == 0) return;
    int64_t const keys = range_keys(ctx_.seq.seqlen_k);
    tile::KeyRange const range{max_of(split * keys, limits_[0].first),
                               min_of((split + 1) * keys, limits_[rows_ - 1].last)};
    start_rows();
    for (int64_t c = split * keys; c < range.last; c += kChunk) {
      tile::KeyRange const part{max_of(c, range.first), min_of(c + kChunk, range.last)};
      if (!part.empty()) chunk(part);
    }
    T* partial = shape_.partial(shared_, head_index(), split);
    for (int r = 0; r < rows_; ++r, partial += shape_.row_stride()) {
      for (int64_t i = 0; i < t_.ldo; i += lanes) store(partial + i, load(t_.o + r * t_.ldo + i));
      partial[t_.ldo] = t_.row_max[r];
      partial[t_.ldo + 1] = reduce_add<T>(load(t_.row_sum + r * lanes));
    }
  }

  // All ranges of the head, once they are done.
  void combine() {
    int64_t const ranges = ceil_div(ctx_.seq.seqlen_k, range_keys(ctx_.seq.seqlen_k));
    for (int r = 0; r < rows_; ++r) {
      auto const partial = [&](int64_t split) {
        return shape_.partial(shared_, head_index(), split) + r * shape_.row_stride();
      };
      T row_max = kMinusInf<T>;
      for (int64_t x = 0; x < ranges; ++x)
        if (!(partial(x)[t_.ldo] <= row_max)) row_max = partial(x)[t_.ldo];
      T sum = 0;
      for (int64_t i = 0; i < t_.ldo; ++i) t_.o[i] = 0;
      for (int64_t x = 0; x < ranges; ++x) {
        const T* part = partial(x);
        if (part[t_.ldo] == kMinusInf<T> && part[t_.ldo + 1] == 0) continue;  // saw no key, no NaN
        T const factor = static_cast<T>(
            __builtin_exp2(static_cast<double>((part[t_.ldo] - row_max) * units_.scale_log2)));
        sum += part[t_.ldo + 1] * factor;
        for (int64_t i = 0; i < t_.ldo; i += lanes)
          store(t_.o + i, load(t_.o + i) + load(part + i) * factor);
      }
      write_output<E>(ctx_, units_, head_[r], index_[r], row_max, sum, t_.o);
    }
  }

 private:
  int64_t head_index() const { return ctx_.batch * p_.num_heads_kv + kv_head_; }

  // Calls f with the number of rows a kernel takes at once, as a type, and the first of them.
  // Rows are rounded up to a power of two: what is computed for rows that do not exist is ignored.
  template <class F>
  void for_row_groups(F f) const {
    constexpr int most = min_of(lanes, kDecodeRows);
    for (int r = 0; r < rows_; r += most) {
      int const m = min_of(most, rows_ - r);
      if (m == 1)
        f(r, IntConstant<1>{});
      else if (m == 2)
        f(r, IntConstant<2>{});
      else if (m <= 4)
        f(r, IntConstant<min_of(4, most)>{});
      else
        f(r, IntConstant<most>{});
    }
  }

  void start_rows() {
    for (int64_t i = 0; i < kDecodeRows * t_.ldq; ++i) t_.q[i] = {};
    for (int r = 0; r < rows_; ++r) {
      const E* row = row_of<E>(p_.q, ctx_.batch, head_[r], ctx_.seq.q_begin + index_[r]);
      pack_rows(row, 0, 1, p_.head_dim, t_.q + r * t_.ldq, t_.ldq);
    }
    for (int64_t i = 0; i < kDecodeRows * t_.ldo; ++i) t_.o[i] = 0;
    for (int r = 0; r < kStripState; ++r) {
      t_.row_max[r] = kMinusInf<T>;
      t_.correction[r] = 1;
    }
    for (int i = 0; i < kStripState * lanes; ++i) t_.row_sum[i] = 0;
    for (int i = 0; i < kDecodeRows * kChunk; ++i) t_.s[i] = 0;
  }

  // At most kChunk keys.
  void chunk(tile::KeyRange keys) {
    if (p_.kv_blocks) {
      bool visible = false;
      for (int r = 0; r < rows_ && !visible; ++r)
        visible = !visible_hull(ctx_, head_[r], index_[r], index_[r] + 1, keys).empty();
      if (!visible) return;
    }
    int const count = static_cast<int>(keys.last - keys.first);
    int const n = round_up(count, lanes * kPerUnit<U>);
    const E* k = row_of<E>(p_.k, ctx_.batch, kv_head_, ctx_.seq.k_begin + keys.first);
    const E* v = row_of<E>(p_.v, ctx_.batch, kv_head_, ctx_.seq.k_begin + keys.first);
    for_row_groups([&](int r, auto m) {
      dot_rows<decltype(m)::value>(t_.q + r * t_.ldq, t_.ldq, k, p_.k.row_stride, count,
                                   p_.head_dim, t_.s + r * kChunk, kChunk);
    });

    ScoreTile<T> const tile{t_.s, kChunk, rows_, count, index_, head_, keys.first};
    bool const whole = !p_.mask && !p_.kv_blocks && limits_[rows_ - 1].first <= keys.first &&
                       keys.last <= limits_[0].last;  // every row sees every key
    if (units_.terms) add_score_terms<T>(ctx_, tile, nullptr);
    if (!whole) exclude(ctx_, tile, kMinusInf<T>);
    for (int r = 0; r < rows_; ++r)
      for (int j = count; j < n; ++j) t_.s[r * kChunk + j] = kMinusInf<T>;
    auto const probabilities = [&]<bool kNarrow>() {
      softmax_strip<kNarrow>(t_.s, kChunk, rows_, n, units_.scale_log2, t_.row_max, t_.row_sum,
                             t_.correction);
    };
    if (whole && !p_.dropout_threshold) {
      probabilities.template operator()<kPerUnit<U> == 2>();
      for_row_groups([&](int r, auto m) {
        add_values<decltype(m)::value, false>(reinterpret_cast<const U*>(t_.s + r * kChunk), kChunk,
                                              v, p_.v.row_stride, count, p_.head_dim_v,
                                              t_.o + r * t_.ldo, t_.ldo, t_.correction + r);
      });
    } else {
      probabilities.template operator()<false>();
      if (p_.dropout_threshold) drop(ctx_, tile);
      for (int r = 0; r < rows_; ++r)
        add_values<1, true>(t_.s + r * kChunk, kChunk, v, p_.v.row_stride, count, p_.head_dim_v,
                            t_.o + r * t_.ldo, t_.ldo, t_.correction + r);
    }
  }

  const Problem& p_;
  ScoreContext const ctx_;
  ScoreUnits<T> const units_;
  DecodeShape<E> const shape_;
  DecodeTiles<E> const t_;
  std::byte* const shared_;
  int64_t const kv_head_, group_;
  int rows_ = 0;
  int64_t index_[kDecodeRows], head_[kDecodeRows];  // position and query head of each row
  tile::KeyRange limits_[kDecodeRows];              // the keys each row may see, by rule
};

}  // namespace
}  // namespace flashcore::cpu
