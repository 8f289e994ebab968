// flashcore.hpp: every function once, in float64 on the CPU, against the definition or another one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <flashcore/flashcore.hpp>
#include <random>
#include <vector>

#include "check.h"

namespace fc = flashcore;

namespace {

constexpr int kQueries = 70, kKeys = 90, kHeads = 3, kDim = 16;
using Values = std::vector<double>;

Values random_values(size_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal;
  Values x(n);
  for (double& a : x) a = normal(bits);
  return x;
}

struct Problem {
  Values q = random_values(kQueries * kHeads * kDim, 1);
  Values k = random_values(kKeys * kHeads * kDim, 2);
  Values v = random_values(kKeys * kHeads * kDim, 3);
  Values dout = random_values(q.size(), 4);
  Values out = Values(q.size()), lse = Values(kHeads * kQueries);
  Values dq = Values(q.size()), dk = Values(k.size()), dv = Values(v.size());

  static fc::ConstTensorView rows(const Values& x, int first, int last) {
    return {x.data() + first * kHeads * kDim, {1, last - first, kHeads, kDim}};
  }
  fc::TensorView statistics() { return {lse.data(), {1, kHeads, kQueries}}; }
  fc::AttentionArgs args() {
    return {.q = rows(q, 0, kQueries),
            .k = rows(k, 0, kKeys),
            .v = rows(v, 0, kKeys),
            .out = {out.data(), {1, kQueries, kHeads, kDim}},
            .lse = statistics()};
  }
  fc::BackwardArgs backward(fc::AttentionArgs const& forward) {
    return {.forward = forward,
            .dout = rows(dout, 0, kQueries),
            .dq = {dq.data(), {1, kQueries, kHeads, kDim}},
            .dk = {dk.data(), {1, kKeys, kHeads, kDim}},
            .dv = {dv.data(), {1, kKeys, kHeads, kDim}}};
  }

  // The definition: out, and dv, of which sum over j of keep(h, i, j) p_ij are made.
  template <class Keep>
  void define(Values& o, Values& g, Keep keep) const {
    o.assign(q.size(), 0);
    g.assign(v.size(), 0);
    auto const at = [](int row, int h, int d) {
      return static_cast<size_t>((row * kHeads + h) * kDim + d);
    };
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kQueries; ++i) {
        Values p(kKeys);
        double sum = 0;
        for (int j = 0; j < kKeys; ++j) {
          double s = 0;
          for (int d = 0; d < kDim; ++d) s += q[at(i, h, d)] * k[at(j, h, d)];
          sum += p[static_cast<size_t>(j)] = keep(i, j) ? std::exp(s / 4) : 0;
        }
        for (int j = 0; j < kKeys; ++j)
          for (int d = 0; d < kDim; ++d) {
            double const share = p[static_cast<size_t>(j)] / sum;
            o[at(i, h, d)] += share * v[at(j, h, d)];
            g[at(j, h, d)] += share * dout[at(i, h, d)];
          }
      }
  }
};

double difference(const Values& a, const Values& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
  return most;
}

// What a refused call says; empty if it is not refused.
template <class Call>
std::string refused(flashcore_status status, Call call) {
  try {
    call();
  } catch (const fc::Error& error) {
    CHECK_EQ(error.status(), status);
    return error.what();
  }
  return {};
}

}  // namespace

TEST("forward and backward are the definition, with a workspace of the caller's or without") {
  Problem x;
  auto const args = x.args();
  Values out, dv;
  x.define(out, dv, [](int, int) { return true; });
  fc::attention(args);
  CHECK(difference(x.out, out) < 1e-13);
  auto const backward = x.backward(args);
  fc::attention_backward(backward);
  CHECK(difference(x.dv, dv) < 1e-12);

  auto const plan = fc::plan_backward(backward);
  CHECK(plan.workspace_bytes > 0);
  Values const dq = x.dq;
  constexpr std::align_val_t kAlignment{FLASHCORE_WORKSPACE_ALIGNMENT};
  void* const memory = ::operator new(plan.workspace_bytes, kAlignment);
  std::fill(x.dq.begin(), x.dq.end(), 7.0);
  fc::attention_backward(backward, nullptr, {memory, plan.workspace_bytes});
  CHECK_EQ(std::memcmp(dq.data(), x.dq.data(), dq.size() * sizeof(double)), 0);
  CHECK(refused(FLASHCORE_INVALID_ARGUMENT, [&] {
          fc::attention_backward(backward, nullptr, {memory, plan.workspace_bytes - 1});
        }).find("workspace") != std::string::npos);
  ::operator delete(memory, kAlignment);
}

TEST("a block mask that is the causal pattern is causal, in both directions") {
  Problem x;
  constexpr int kBlock = 10, kRows = kQueries / kBlock, kCols = kKeys / kBlock;
  std::vector<int32_t> kv_count(kRows), kv(kRows * kCols), q_count(kCols), q(kCols * kRows);
  auto const kept = [](int row, int col) { return col <= row; };
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c)
      if (kept(r, c)) {
        kv[static_cast<size_t>(r * kCols + kv_count[static_cast<size_t>(r)]++)] = c;
        q[static_cast<size_t>(c * kRows + q_count[static_cast<size_t>(c)]++)] = r;
      }
  auto args = x.args();
  args.block_mask = fc::BlockMask{.block_q = kBlock,
                                  .block_k = kBlock,
                                  .kv_num_blocks = {kv_count.data(), {1, 1, kRows}},
                                  .kv_indices = {kv.data(), {1, 1, kRows, kCols}},
                                  .q_num_blocks = {q_count.data(), {1, 1, kCols}},
                                  .q_indices = {q.data(), {1, 1, kCols, kRows}}};
  Values out, dv;
  x.define(out, dv, [&](int i, int j) { return kept(i / kBlock, j / kBlock); });
  fc::attention(args);
  fc::attention_backward(x.backward(args));
  CHECK(difference(x.out, out) < 1e-13);
  CHECK(difference(x.dv, dv) < 1e-12);
}

TEST("parts over disjoint keys merge into the whole") {
  Problem x;
  fc::attention(x.args());
  Values const whole = x.out, whole_lse = x.lse;
  Problem parts[2];
  for (int n : {0, 1}) {
    auto args = parts[n].args();
    args.k = Problem::rows(x.k, n ? 40 : 0, n ? kKeys : 40);
    args.v = Problem::rows(x.v, n ? 40 : 0, n ? kKeys : 40);
    fc::attention(args);
  }
  fc::merge({.outs = {parts[0].args().out, parts[1].args().out},
             .lses = {parts[0].statistics(), parts[1].statistics()},
             .out = x.args().out,
             .lse = x.statistics()});
  CHECK(difference(x.out, whole) < 1e-13);
  CHECK(difference(x.lse, whole_lse) < 1e-13);
  CHECK(refused(FLASHCORE_INVALID_ARGUMENT, [&] {
          fc::merge({.outs = {x.args().out}, .lses = {}});
        }).find("in pairs") != std::string::npos);
}

TEST("the dropout mask is what the kernels keep") {
  Problem x;
  x.v.assign(x.v.size(), 1.0);  // so that out is the sum of what is kept
  auto args = x.args();
  args.dropout_p = 0.5;
  args.rng = fc::Rng{5, 3};
  fc::attention(args);
  std::vector<uint8_t> keep(kHeads * kQueries * kKeys);
  fc::dropout_mask({keep.data(), {1, kHeads, kQueries, kKeys}}, 0.5, *args.rng);
  long const kept = std::count(keep.begin(), keep.end(), 1);
  CHECK(std::abs(static_cast<double>(kept) / static_cast<double>(keep.size()) - 0.5) < 0.02);
  for (int h = 0; h < kHeads; ++h) {
    double sum = 0, some = 0;
    for (int j = 0; j < kKeys; ++j) {
      double s = 0;
      for (int d = 0; d < kDim; ++d)
        s += x.q[static_cast<size_t>(h * kDim + d)] *
             x.k[static_cast<size_t>((j * kHeads + h) * kDim + d)];
      double const p = std::exp(s / 4);
      sum += p;
      some += keep[static_cast<size_t>(h * kQueries * kKeys + j)] ? 2 * p : 0;
    }
    CHECK(std::abs(x.out[static_cast<size_t>(h * kDim)] - some / sum) < 1e-13);
  }
}

TEST("plans, reasons, kernels and devices agree") {
  Problem x;
  auto const args = x.args();
  auto const runs = [](std::vector<fc::Considered> const& list) {
    auto const first =
        std::find_if(list.begin(), list.end(), [](auto const& c) { return c.refusal.empty(); });
    return first == list.end() ? std::string() : std::string(first->kernel.name);
  };
  CHECK_EQ(runs(fc::explain(args)), std::string(fc::plan(args).kernel.name));
  auto const backward = x.backward(args);
  CHECK_EQ(runs(fc::explain_backward(backward)),
           std::string(fc::plan_backward(backward).kernel.name));
  bool named = false;
  for (auto const& kernel : fc::kernels())
    named |= std::string(kernel.name) == fc::plan(args).kernel.name;
  CHECK(named);
  CHECK(!fc::devices().empty());
  CHECK(!fc::version().empty());
  int const before = fc::get_num_threads();
  fc::set_num_threads(1);
  CHECK_EQ(fc::get_num_threads(), 1);
  fc::set_num_threads(0);
  CHECK_EQ(fc::get_num_threads(), before);
}

TEST("a call that cannot be says so, with its status") {
  Problem x;
  auto args = x.args();
  args.k = Problem::rows(x.k, 0, kKeys - 1);
  CHECK(!refused(FLASHCORE_INVALID_ARGUMENT, [&] { fc::attention(args); }).empty());
  int64_t const nine[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  CHECK(!refused(FLASHCORE_INVALID_ARGUMENT, [&] {
           fc::TensorView(x.q.data(), fc::float64, std::span<const int64_t>(nine));
         }).empty());
}

TEST_MAIN()
