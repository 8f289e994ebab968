// From q·k to the score: scale, softcap, ALiBi, bias, then exclusion; and which scores dropout
// keeps. One definition for forward and backward, float and double.
#pragma once
#include "common/problem.h"
#include "cpu/dropout.h"
#include "cpu/vec.h"
#include "tile/mask.h"
#include "tile/seqlen.h"

namespace flashcore::cpu {
namespace {

// One sequence of the batch.
struct ScoreContext {
  const Problem& p;
  int64_t batch;
  tile::Sequence seq;
  tile::DropoutKey dropout_key;
};

inline ScoreContext score_context(const Problem& p, int64_t batch) {
  ScoreContext c{p, batch, tile::sequence_of(p, batch), {}};
  if (p.dropout_threshold) c.dropout_key = tile::dropout_key(p.rng_seed, p.rng_offset);
  return c;
}

// A tile of S, or of another matrix of the same rows and columns. Its rows need not be
// neighbours: rows of several query heads that share keys may stand in one tile.
template <class T>
struct ScoreTile {
  T* s;
  int64_t ld;
  int rows, cols;
  const int64_t* row_index;  // position of each row in its sequence
  const int64_t* row_head;   // query head of each row
  int64_t col0;              // key of column 0
};

// Whether a score is more than scale * q·k. If not, scale may be folded in elsewhere.
inline bool has_score_terms(const Problem& p) { return p.softcap > 0 || p.alibi_slopes || p.bias; }

// ---- softcap, ALiBi, bias -----------------------------------------------------------------------

FC_INLINE Vec<float> tanh(Vec<float> x) {
  Vec<float> const a = x < 0 ? -x : x;
  // 1 - 2 / (e^2a + 1) loses its leading digits where tanh is small: there, an odd polynomial.
  Vec<float> const large =
      1.0f - 2.0f / (exp2(a < 10.0f ? a * 2.8853900817779268f : splat(28.853900817779268f)) + 1.0f);
  Vec<float> const z = x * x;
  Vec<float> q = splat(-5.70498872745e-3f);
  q = q * z + 2.06390887954e-2f;
  q = q * z - 5.37397155531e-2f;
  q = q * z + 1.33314422036e-1f;
  q = q * z - 3.33332819422e-1f;
  Vec<float> const small = x + x * z * q;
  Vec<float> const signed_large = x < 0 ? -large : large;
  Vec<float> const y = a < 0.625f ? small : signed_large;
  return x == x ? y : x;
}
FC_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// s = softcap * tanh(scale * s / softcap); the derivative by scale * s goes to slope if given.
template <class T>
void softcap_row(T* s, T* slope, int n, double scale, double softcap) {
  T const inner = static_cast<T>(scale / softcap), outer = static_cast<T>(softcap);
  for (int j = 0; j < n; j += kLanes<T>) {
    Vec<T> const t = tanh(load(s + j) * inner);
    store(s + j, t * outer);
    if (slope) store(slope + j, T{1} - t * t);
  }
}

// n values of a row of bias, added to s.
template <class E, class T>
void add_bias_row(T* s, int n, const E* bias, int64_t stride) {
  if (stride == 1) {
    int j = 0;
    for (; j + kLanes<T> <= n; j += kLanes<T>) store(s + j, load(s + j) + load_real(bias + j));
    if (j < n) store(s + j, load(s + j) + load_real_n(bias + j, n - j));
  } else {
    for (int j = 0; j < n; ++j) {
      Vec<T> const b = load_real_n(bias + j * stride, 1);
      s[j] += b[0];
    }
  }
}
template <class T>
void add_bias_row(T* s, int n, const Scores& bias, int64_t offset) {
  if constexpr (sizeof(T) == 8) {
    add_bias_row(s, n, static_cast<const double*>(bias.data) + offset, bias.col_stride);
  } else {
    switch (bias.dtype) {
      case DType::f16:
        return add_bias_row(s, n, static_cast<const F16*>(bias.data) + offset, bias.col_stride);
      case DType::bf16:
        return add_bias_row(s, n, static_cast<const BF16*>(bias.data) + offset, bias.col_stride);
      default:
        return add_bias_row(s, n, static_cast<const float*>(bias.data) + offset, bias.col_stride);
    }
  }
}

FC_INLINE int64_t offset_of(const Scores& x, int64_t b, int64_t h, int64_t i, int64_t j) {
  return b * x.batch_stride + h * x.head_stride + i * x.row_stride + j * x.col_stride;
}

// Turns q·k into the score, in natural units. Rows are worked on in whole vectors: ld must leave
// room. slope (same layout, or null) gets the derivative of softcap when there is one.
template <class T>
void add_score_terms(const ScoreContext& c, const ScoreTile<T>& t, T* slope) {
  const Problem& p = c.p;
  for (int r = 0; r < t.rows; ++r) {
    T* const s = t.s + r * t.ld;
    int64_t const i = t.row_index[r], h = t.row_head[r];
    if (i >= c.seq.seqlen_q) continue;
    if (p.softcap > 0) {
      softcap_row(s, slope ? slope + r * t.ld : nullptr, t.cols, p.scale, p.softcap);
    } else {
      T const scale = static_cast<T>(p.scale);
      for (int j = 0; j < t.cols; j += kLanes<T>) store(s + j, load(s + j) * scale);
    }
    if (p.alibi_slopes) {
      T const a = static_cast<T>(p.alibi_slopes[c.batch * p.alibi_batch_stride + h]);
      int64_t const distance = i + c.seq.q_offset - t.col0;  // of column 0 from the diagonal
      for (int j = 0; j < t.cols; ++j) {
        int64_t const d = distance - j;
        s[j] -= a * static_cast<T>(d < 0 ? -d : d);
      }
    }
    if (p.bias) add_bias_row(s, t.cols, p.bias, offset_of(p.bias, c.batch, h, i, t.col0));
  }
}

// ---- exclusion ----------------------------------------------------------------------------------

inline const int32_t* kept_blocks(const ScoreContext& c, int64_t h, int64_t q_block, int* count) {
  const BlockList& l = c.p.kv_blocks;
  *count = l.count[c.batch * l.count_batch_stride + h * l.count_head_stride + q_block];
  return l.indices + c.batch * l.indices_batch_stride + h * l.indices_head_stride +
         q_block * l.indices_row_stride;
}

// The first of n ascending indices that is >= block.
inline int first_at_least(const int32_t* indices, int n, int64_t block) {
  int lo = 0;
  while (lo < n) {
    int const mid = (lo + n) / 2;
    if (indices[mid] < block)
      lo = mid + 1;
    else
      n = mid;
  }
  return lo;
}

// The smallest interval that holds every key of [keys.first, keys.last) some row of
// [row_begin, row_end) of head h can see, by rule and block mask.
inline tile::KeyRange visible_hull(const ScoreContext& c, int64_t h, int64_t row_begin,
                                   int64_t row_end, tile::KeyRange keys) {
  const Problem& p = c.p;
  row_end = min_of(row_end, c.seq.seqlen_q);
  if (row_end <= row_begin) return {keys.first, keys.first};
  auto const top = tile::visible_keys(c.seq.band, row_begin, c.seq.seqlen_k);
  auto const bottom = tile::visible_keys(c.seq.band, row_end - 1, c.seq.seqlen_k);
  keys.first = max_of(keys.first, top.first);
  keys.last = min_of(keys.last, bottom.last);
  if (keys.empty() || !p.kv_blocks) return {keys.first, max_of(keys.first, keys.last)};
  tile::KeyRange hull{keys.last, keys.first};
  for (int64_t b = row_begin / p.block_q; b * p.block_q < row_end; ++b) {
    int count;
    const int32_t* const kept = kept_blocks(c, h, b, &count);
    int const lo = first_at_least(kept, count, keys.first / p.block_k);
    int const hi = first_at_least(kept, count, (keys.last - 1) / p.block_k + 1);
    if (hi <= lo) continue;
    hull.first = min_of<int64_t>(hull.first, int64_t{kept[lo]} * p.block_k);
    hull.last = max_of<int64_t>(hull.last, (int64_t{kept[hi - 1]} + 1) * p.block_k);
  }
  keys.first = max_of(keys.first, hull.first);
  keys.last = min_of(keys.last, hull.last);
  return {keys.first, max_of(keys.first, keys.last)};
}

// Whether rows [row_begin, row_end) see every key of `keys`: then exclude() has nothing to do.
inline bool all_visible(const ScoreContext& c, int64_t row_begin, int64_t row_end,
                        tile::KeyRange keys) {
  if (c.p.mask || c.p.kv_blocks || row_end > c.seq.seqlen_q) return false;
  auto const top = tile::visible_keys(c.seq.band, row_begin, c.seq.seqlen_k);
  auto const bottom = tile::visible_keys(c.seq.band, row_end - 1, c.seq.seqlen_k);
  return bottom.first <= keys.first && keys.last <= top.last;
}

// Writes value to every excluded entry. Whatever was there, NaN included, is gone.
template <class T>
void exclude(const ScoreContext& c, const ScoreTile<T>& t, T value) {
  const Problem& p = c.p;
  int64_t const end = t.col0 + t.cols;
  for (int r = 0; r < t.rows; ++r) {
    T* const s = t.s + r * t.ld - t.col0;  // indexed by key
    auto const fill = [&](int64_t from, int64_t to) {
      for (int64_t j = max_of(from, t.col0); j < min_of(to, end); ++j) s[j] = value;
    };
    int64_t const i = t.row_index[r], h = t.row_head[r];
    if (i >= c.seq.seqlen_q) {
      fill(t.col0, end);
      continue;
    }
    auto const keys = tile::visible_keys(c.seq.band, i, c.seq.seqlen_k);
    fill(t.col0, keys.first);
    fill(keys.last, end);
    if (p.kv_blocks) {
      int count;
      const int32_t* const kept = kept_blocks(c, h, i / p.block_q, &count);
      int64_t open = t.col0;  // everything before it is decided
      for (int n = first_at_least(kept, count, t.col0 / p.block_k); n < count && open < end; ++n) {
        fill(open, int64_t{kept[n]} * p.block_k);
        open = (int64_t{kept[n]} + 1) * p.block_k;
      }
      fill(open, end);
    }
    if (p.mask) {
      const uint8_t* const m =
          static_cast<const uint8_t*>(p.mask.data) + offset_of(p.mask, c.batch, h, i, t.col0);
      int64_t const stride = p.mask.col_stride;
      int const cols = static_cast<int>(min_of(end, c.seq.seqlen_k) - t.col0);
      T* const row = t.s + r * t.ld;
      if (stride == 1)
        for (int j = 0; j < cols; ++j) row[j] = m[j] ? row[j] : value;
      else
        for (int j = 0; j < cols; ++j) row[j] = m[j * stride] ? row[j] : value;
    }
  }
}

// ---- dropout ------------------------------------------------------------------------------------

// Sets the dropped entries of the tile to zero.
template <class T>
void drop(const ScoreContext& c, const ScoreTile<T>& t) {
  constexpr int kChunk = 256;
  uint16_t buffer[kChunk + kDropoutColumns];
  uint32_t const threshold = c.p.dropout_threshold;
  int const lead = static_cast<int>(t.col0 % kDropoutColumns);
  for (int r = 0; r < t.rows; ++r)
    for (int j = 0; j < t.cols; j += kChunk) {
      int const n = min_of(kChunk, t.cols - j);
      dropout_bits_row(c.dropout_key, c.batch, t.row_head[r], t.row_index[r], t.col0 + j - lead,
                       n + lead, buffer);
      T* const s = t.s + r * t.ld + j;
      const uint16_t* const bits = buffer + lead;
      for (int l = 0; l < n; ++l) s[l] = bits[l] < threshold ? T{0} : s[l];
    }
}

}  // namespace
}  // namespace flashcore::cpu
