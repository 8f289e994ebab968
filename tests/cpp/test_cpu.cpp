// Values of the CPU kernels through the C ABI, forward and backward, against the definition in
// double. Small shapes, many of them: this is what runs under the sanitizers.
#include <cmath>
#include <limits>

#include "array.h"
#include "check.h"

using check::Array;

namespace {

struct Shape {
  int64_t batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, head_dim_v;
};

struct Options {
  bool causal = false;
  int64_t window_left = -1;
  double softcap = 0;
  bool alibi = false, bias = false, mask = false, sinks = false, lengths = false;
  double dropout_p = 0;
};

// One problem with everything the C ABI can be given, and the definition evaluated on it.
template <class T>
struct Problem {
  Shape s;
  Options o;
  Array<T> q, k, v, out, dout, dq, dk, dv;
  Array<T> lse, max_logits, dlse, bias, dbias;
  Array<float> slopes, sinks, dsinks;
  Array<uint8_t> mask, keep;
  Array<int32_t> lengths_q, lengths_k;
  int64_t rng[2] = {123456789, 7};
  flashcore_attention_args args{};
  flashcore_attention_backward_args backward{};

  Problem(Shape shape, Options options, unsigned seed)
      : s(shape),
        o(options),
        q({s.batch, s.seqlen_q, s.heads, s.head_dim}),
        k({s.batch, s.seqlen_k, s.heads_kv, s.head_dim}),
        v({s.batch, s.seqlen_k, s.heads_kv, s.head_dim_v}),
        out({s.batch, s.seqlen_q, s.heads, s.head_dim_v}, T(-7)),
        dout({s.batch, s.seqlen_q, s.heads, s.head_dim_v}),
        dq(q.shape, T(-7)),
        dk(k.shape, T(-7)),
        dv(v.shape, T(-7)),
        lse({s.batch, s.heads, s.seqlen_q}, T(-7)),
        max_logits(lse.shape, T(-7)),
        dlse(lse.shape),
        bias({s.batch, s.heads, s.seqlen_q, s.seqlen_k}),
        dbias(bias.shape, T(-7)),
        slopes({s.heads}),
        sinks({s.heads}),
        dsinks({s.heads}, -7),
        mask(bias.shape, 1),
        keep(bias.shape, 1),
        lengths_q({s.batch}),
        lengths_k({s.batch}) {
    std::mt19937 engine(seed);
    for (auto* x : {&q, &k, &v, &dout, &dlse, &bias}) x->randomise(engine);
    sinks.randomise(engine);
    for (auto& x : slopes.data) x = std::uniform_real_distribution<float>(0.01f, 0.5f)(engine);
    for (auto& x : mask.data) x = engine() % 4 != 0;
    for (auto& x : lengths_q.data) x = static_cast<int32_t>(engine() % (s.seqlen_q + 1));
    for (auto& x : lengths_k.data) x = static_cast<int32_t>(engine() % (s.seqlen_k + 1));

    args.struct_size = sizeof args;
    args.q = q, args.k = k, args.v = v, args.out = out, args.lse = lse;
    args.max_logits = max_logits;
    args.causal = o.causal;
    if (o.window_left >= 0) args.window_left = &o.window_left;
    args.softcap = o.softcap;
    if (o.alibi) args.alibi_slopes = slopes;
    if (o.bias) args.bias = bias;
    if (o.mask) args.mask = mask;
    if (o.sinks) args.sinks = sinks;
    if (o.lengths) args.seqlens_q = lengths_q, args.seqlens_k = lengths_k;
    args.dropout_p = o.dropout_p;
    args.rng = rng;
    backward.struct_size = sizeof backward;
    backward.forward = &args;
    backward.dout = dout, backward.dlse = dlse;
    backward.dq = dq, backward.dk = dk, backward.dv = dv;
    if (o.bias) backward.dbias = dbias;
    if (o.sinks) backward.dsinks = dsinks;
    if (o.dropout_p > 0)
      CHECK(flashcore_dropout_mask(keep, o.dropout_p, rng, nullptr) == FLASHCORE_OK);
  }

  void run() {
    flashcore_plan plan{};
    plan.struct_size = sizeof plan;
    expect_ok(flashcore_attention_plan(&args, &plan));
    check::Workspace forward(plan.workspace_bytes);
    expect_ok(flashcore_attention_forward(&args, forward.data(), forward.bytes, nullptr));
    expect_ok(flashcore_attention_backward_plan(&backward, &plan));
    check::Workspace back(plan.workspace_bytes);
    expect_ok(flashcore_attention_backward(&backward, back.data(), back.bytes, nullptr));
  }
  static void expect_ok(flashcore_status status) {
    if (status != FLASHCORE_OK) check::failed(__FILE__, __LINE__, flashcore_last_error());
  }

  // The definition, one row at a time.
  void check() {
    Array<double> want_dk(k.shape), want_dv(v.shape), want_dsinks({s.heads});
    double const scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
    double const p_drop = std::floor(o.dropout_p * 65536 + 0.5) / 65536;
    int64_t const group = s.heads / s.heads_kv;
    for (int64_t b = 0; b < s.batch; ++b) {
      int64_t const sq = o.lengths ? lengths_q.data[b] : s.seqlen_q;
      int64_t const sk = o.lengths ? lengths_k.data[b] : s.seqlen_k;
      for (int64_t h = 0; h < s.heads; ++h)
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          int64_t const g = h / group, diagonal = i + sk - sq;
          std::vector<int64_t> keys;
          std::vector<double> score, slope, p, dp;
          for (int64_t j = 0; j < (i < sq ? sk : 0); ++j) {
            if (o.causal && j > diagonal) continue;
            if (o.window_left >= 0 && j < diagonal - o.window_left) continue;
            if (o.mask && !mask.at({b, h, i, j})) continue;
            double x = 0, t = 0;
            for (int64_t d = 0; d < s.head_dim; ++d)
              x += static_cast<double>(q.at({b, i, h, d})) * k.at({b, j, g, d});
            x *= scale;
            if (o.softcap > 0) t = std::tanh(x / o.softcap), x = o.softcap * t;
            if (o.alibi) x -= slopes.data[h] * std::abs(static_cast<double>(diagonal - j));
            if (o.bias) x += bias.at({b, h, i, j});
            keys.push_back(j);
            score.push_back(x);
            slope.push_back(1 - t * t);
          }
          double const inf = std::numeric_limits<double>::infinity();
          double const sink = o.sinks && i < sq ? sinks.data[h] : -inf;
          double sum = std::exp(sink), top = -inf;
          for (double x : score) sum += std::exp(x), top = std::max(top, x);
          double const row_lse = std::log(sum);
          if (i < sq) {
            near("lse", lse.at({b, h, i}), row_lse);
            near("max_logits", max_logits.at({b, h, i}), top);
          }
          double delta = 0;
          for (size_t n = 0; n < keys.size(); ++n) {
            p.push_back(std::exp(score[n] - row_lse));
            double const kept = p_drop > 0 ? keep.at({b, h, i, keys[n]}) / (1 - p_drop) : 1.0;
            double x = 0;
            for (int64_t d = 0; d < s.head_dim_v; ++d) {
              x += static_cast<double>(dout.at({b, i, h, d})) * v.at({b, keys[n], g, d});
              want_dv.at({b, keys[n], g, d}) += kept * p[n] * dout.at({b, i, h, d});
            }
            dp.push_back(kept * x);
            delta += p[n] * dp[n];
          }
          for (int64_t d = 0; d < s.head_dim_v; ++d) {
            double want = 0;
            for (size_t n = 0; n < keys.size(); ++n)
              want += p[n] * (p_drop > 0 ? keep.at({b, h, i, keys[n]}) / (1 - p_drop) : 1.0) *
                      v.at({b, keys[n], g, d});
            near("out", out.at({b, i, h, d}), want);
          }
          double const dl = std::isfinite(row_lse) ? dlse.at({b, h, i}) : 0;
          if (sum > 0) want_dsinks.data[h] += std::exp(sink - row_lse) * (dl - delta);
          std::vector<double> row(s.seqlen_k, 0), want_dq(s.head_dim, 0);
          for (size_t n = 0; n < keys.size(); ++n) {
            double const ds = p[n] * (dp[n] - delta + dl);
            row[keys[n]] = ds;
            for (int64_t d = 0; d < s.head_dim; ++d) {
              want_dq[d] += scale * ds * slope[n] * k.at({b, keys[n], g, d});
              want_dk.at({b, keys[n], g, d}) += scale * ds * slope[n] * q.at({b, i, h, d});
            }
          }
          for (int64_t d = 0; d < s.head_dim; ++d) near("dq", dq.at({b, i, h, d}), want_dq[d]);
          if (o.bias)
            for (int64_t j = 0; j < s.seqlen_k; ++j) near("dbias", dbias.at({b, h, i, j}), row[j]);
        }
    }
    for (size_t n = 0; n < dk.data.size(); ++n) near("dk", dk.data[n], want_dk.data[n]);
    for (size_t n = 0; n < dv.data.size(); ++n) near("dv", dv.data[n], want_dv.data[n]);
    if (o.sinks)
      for (size_t h = 0; h < dsinks.data.size(); ++h)
        near("dsinks", dsinks.data[h], want_dsinks.data[h], 1e-4);
  }

  void near(const char* name, double got, double want,
            double tolerance = sizeof(T) == 8 ? 1e-11 : 2e-5) {
    if (got == want) return;  // infinities too
    if (!(std::abs(got - want) <= tolerance * (1 + std::abs(want))))
      check::failed(__FILE__, __LINE__,
                    check::differ(name, got, want) + " in q" + std::to_string(s.seqlen_q) + "k" +
                        std::to_string(s.seqlen_k) + " d" + std::to_string(s.head_dim));
  }
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1},     {2, 5, 7, 2, 1, 8, 8},      {1, 1, 130, 4, 2, 64, 64},
    {1, 70, 67, 2, 2, 33, 17}, {2, 130, 40, 3, 1, 16, 24}, {1, 3, 300, 1, 1, 5, 9},
    {1, 17, 0, 2, 1, 8, 8},    {0, 4, 4, 1, 1, 8, 8},      {1, 0, 5, 1, 1, 8, 8},
};

template <class T>
void all_shapes(Options o) {
  unsigned seed = 1;
  for (const Shape& s : kShapes) {
    Problem<T> problem(s, o, seed++);
    problem.run();
    problem.check();
  }
}
void all(Options o) {
  all_shapes<float>(o);
  all_shapes<double>(o);
}

}  // namespace

TEST("full attention") { all({}); }
TEST("causal") { all({.causal = true}); }
TEST("window") { all({.causal = true, .window_left = 3}); }
TEST("softcap") { all({.softcap = 1.5}); }
TEST("alibi and bias") { all({.alibi = true, .bias = true}); }
TEST("mask") { all({.mask = true}); }
TEST("sinks, where rows may see nothing") { all({.causal = true, .sinks = true}); }
TEST("padded lengths") { all({.causal = true, .lengths = true}); }
TEST("dropout") { all({.dropout_p = 0.3}); }
TEST("everything at once") {
  all({.causal = true,
       .window_left = 20,
       .softcap = 2,
       .alibi = true,
       .bias = true,
       .mask = true,
       .sinks = true,
       .lengths = true,
       .dropout_p = 0.2});
}

TEST("16-bit inputs: one key gives its value back, and a workspace too small is refused") {
  for (int code : {kDLFloat, kDLBfloat}) {
    uint16_t const two = 0x4000;  // 2.0 in float16 and in bfloat16
    Array<uint16_t> q({1, 3, 2, 8}, two), k({1, 1, 2, 8}, two), v({1, 1, 2, 8}, two),
        out({1, 3, 2, 8}, 0);
    for (auto* a : {&q, &k, &v, &out}) a->dl.dtype = {static_cast<uint8_t>(code), 16, 1};
    flashcore_attention_args args{};
    args.struct_size = sizeof args;
    args.q = q, args.k = k, args.v = v, args.out = out;
    flashcore_plan plan{};
    plan.struct_size = sizeof plan;
    CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_OK);
    check::Workspace w(plan.workspace_bytes);
    if (w.bytes > 0)
      CHECK(flashcore_attention_forward(&args, w.data(), w.bytes - 1, nullptr) ==
            FLASHCORE_INVALID_ARGUMENT);
    CHECK(flashcore_attention_forward(&args, w.data(), w.bytes, nullptr) == FLASHCORE_OK);
    for (uint16_t x : out.data) CHECK_EQ(x, two);
  }
}

TEST("merge of two halves is the whole") {
  Problem<float> whole({2, 9, 20, 2, 2, 8, 8}, {}, 5);
  whole.run();
  const DLTensor *out_list[2], *lse_list[2];
  Array<float> o0({2, 9, 2, 8}), o1({2, 9, 2, 8}), l0({2, 2, 9}), l1({2, 2, 9});
  int64_t const cut[3] = {0, 13, 20};
  for (int part = 0; part < 2; ++part) {
    Array<float>& out = part ? o1 : o0;
    Array<float>& lse = part ? l1 : l0;
    flashcore_attention_args args = whole.args;
    DLTensor k = *args.k, v = *args.v;
    int64_t shape[4] = {2, cut[part + 1] - cut[part], 2, 8};
    k.shape = v.shape = shape;
    k.byte_offset = v.byte_offset = static_cast<uint64_t>(cut[part]) * 16 * sizeof(float);
    args.k = &k, args.v = &v, args.out = out, args.lse = lse, args.max_logits = nullptr;
    flashcore_plan plan{};
    plan.struct_size = sizeof plan;
    CHECK(flashcore_attention_plan(&args, &plan) == FLASHCORE_OK);
    check::Workspace w(plan.workspace_bytes);
    CHECK(flashcore_attention_forward(&args, w.data(), w.bytes, nullptr) == FLASHCORE_OK);
    out_list[part] = out, lse_list[part] = lse;
  }
  Array<float> out({2, 9, 2, 8}), lse({2, 2, 9});
  flashcore_merge_args merge{};
  merge.struct_size = sizeof merge;
  merge.count = 2;
  merge.outs = out_list, merge.lses = lse_list, merge.out = out, merge.lse = lse;
  CHECK(flashcore_merge(&merge, nullptr) == FLASHCORE_OK);
  for (size_t n = 0; n < out.data.size(); ++n) whole.near("out", out.data[n], whole.out.data[n]);
  for (size_t n = 0; n < lse.data.size(); ++n) whole.near("lse", lse.data[n], whole.lse.data[n]);
}

TEST_MAIN()
