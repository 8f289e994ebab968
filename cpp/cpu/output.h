// A finished row of the forward pass: out, lse and max_logits, in the tensors' own dtypes.
#pragma once
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/softmax.h"

namespace flashcore::cpu {
namespace {

// How the running maximum of a row relates to scores. Where s is q·k alone, the scale of the scores
// is folded into the exponent, and S is never multiplied by it.
template <class T>
struct ScoreUnits {
  bool terms;      // s is a finished score, not q·k
  T scale_log2;    // s to powers of two
  double natural;  // s to natural units

  explicit ScoreUnits(const Problem& p)
      : terms(has_score_terms(p) || !(p.scale > 0)),
        scale_log2(static_cast<T>(terms ? kLog2E : p.scale * kLog2E)),
        natural(terms ? 1.0 : p.scale) {}
};

// out = o * out_scale / sum; 0 where out_scale is.
template <class E, class T>
FC_INLINE void store_output(E* out, const T* o, int64_t cols, T sum, T out_scale) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < cols; c += lanes) {
    Vec<T> y = {};
    if (out_scale != 0) y = load(o + c) / sum;
    if (out_scale != 0 && out_scale != 1) y *= out_scale;
    if (cols - c >= lanes)
      store_real(out + c, y);
    else
      store_real_n(out + c, y, static_cast<int>(cols - c));
  }
}

// Row `index` of a sequence. o: the sum of P V (whole vectors); row_max is -inf, and o not read, if
// the row sees no key. Rows past the end of a padded sequence have no sink either.
template <class E, class T>
void write_output(const ScoreContext& c, const ScoreUnits<T>& units, int64_t head, int64_t index,
                  T row_max, T sum, const T* o) {
  const Problem& p = c.p;
  bool const valid = index < c.seq.seqlen_q;
  RowResult const x =
      finish_row(row_max, sum, units.natural, valid && p.sinks ? p.sinks + head : nullptr);
  int64_t const row = c.seq.q_begin + index;
  T const out_scale = static_cast<T>(x.out_scale * p.dropout_scale);
  if (sizeof(E) == 2 && p.out.dtype == DType::f32)
    store_output(row_of<Real<E>>(p.out, c.batch, head, row), o, p.head_dim_v, sum, out_scale);
  else
    store_output(row_of<E>(p.out, c.batch, head, row), o, p.head_dim_v, sum, out_scale);
  if (p.lse) *row_of<T>(p.lse, c.batch, head, row) = static_cast<T>(x.lse);
  if (p.max_logits) *row_of<T>(p.max_logits, c.batch, head, row) = static_cast<T>(x.max_logit);
}

}  // namespace
}  // namespace flashcore::cpu
