// Attention from C++ on real text: a small byte model with one attention layer, forward and
// backward, checked against the definition in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <flashcore/flashcore.hpp>
#include <fstream>
#include <numeric>
#include <random>
#include <vector>

namespace {

constexpr int kTokens = 384, kHeads = 2, kHeadDim = 64, kWidth = kHeads * kHeadDim;
using Matrix = std::vector<float>;  // kTokens x kWidth, or kWidth x kWidth

std::vector<unsigned char> read_text(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<unsigned char> text{std::istreambuf_iterator<char>(file), {}};
  text.resize(kTokens, ' ');
  return text;
}

Matrix random_matrix(int rows, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(float(kWidth)));
  Matrix m(std::size_t(rows) * kWidth);
  for (float& x : m) x = normal(bits);
  return m;
}

// The embedding of a byte and of its position.
Matrix embed(const std::vector<unsigned char>& text) {
  Matrix const table = random_matrix(256, 1);
  Matrix x(kTokens * kWidth);
  for (int t = 0; t < kTokens; ++t)
    for (int c = 0; c < kWidth; ++c)
      x[t * kWidth + c] = 8 * table[text[t] * kWidth + c] +
                          std::sin(t / std::pow(1e4f, float(c) / kWidth) + c % 2 * 1.57f);
  return x;
}

Matrix project(const Matrix& x, unsigned seed) {
  Matrix const w = random_matrix(kWidth, seed);
  Matrix y(kTokens * kWidth);
  for (int t = 0; t < kTokens; ++t)
    for (int i = 0; i < kWidth; ++i)
      for (int c = 0; c < kWidth; ++c) y[t * kWidth + c] += x[t * kWidth + i] * w[i * kWidth + c];
  return y;
}

// Attention and its gradients by the definition, with every number of type Real.
template <class Real>
struct Definition {
  std::vector<Real> out, dq, dk, dv;

  Definition(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& dout)
      : out(q.size()), dq(q.size()), dk(k.size()), dv(v.size()) {
    Real const scale = 1 / std::sqrt(Real(kHeadDim));
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kTokens; ++i) {
        auto at = [h](int t, int d) { return (t * kHeads + h) * kHeadDim + d; };
        auto dot = [&](const Matrix& a, int t, const Matrix& b, int u) {
          Real sum = 0;
          for (int d = 0; d < kHeadDim; ++d) sum += Real(a[at(t, d)]) * Real(b[at(u, d)]);
          return sum;
        };
        std::vector<Real> p(i + 1), dp(i + 1);
        for (int j = 0; j <= i; ++j) p[j] = std::exp(scale * dot(q, i, k, j));
        Real const sum = std::accumulate(p.begin(), p.end(), Real(0));
        for (int j = 0; j <= i; ++j) p[j] /= sum, dp[j] = dot(dout, i, v, j);
        Real const delta = std::inner_product(p.begin(), p.end(), dp.begin(), Real(0));
        for (int j = 0; j <= i; ++j)
          for (int d = 0; d < kHeadDim; ++d) {
            Real const ds = scale * p[j] * (dp[j] - delta);
            out[at(i, d)] += p[j] * v[at(j, d)];
            dv[at(j, d)] += p[j] * dout[at(i, d)];
            dq[at(i, d)] += ds * k[at(j, d)];
            dk[at(j, d)] += ds * q[at(i, d)];
          }
      }
  }
};

template <class Values>
double error(const Values& got, const std::vector<double>& exact) {
  double most = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) most = std::max(most, std::abs(got[i] - exact[i]));
  return most;
}

// The error rule (docs/numerics.md): at most twice what the definition in float32 is off.
bool within(const char* name, const Matrix& got, const std::vector<double>& exact,
            const std::vector<float>& same) {
  double const ours = error(got, exact), allowed = 2 * error(same, exact) + 1e-7;
  std::printf("C++: %-4s largest error %.1e, of %.1e allowed\n", name, ours, allowed);
  return ours <= allowed;
}

}  // namespace

int main(int argc, char** argv) try {
  Matrix const x = embed(read_text(argc > 1 ? argv[1] : TEXT_FILE));
  Matrix const q = project(x, 2), k = project(x, 3), v = project(x, 4), dout = project(x, 5);
  Matrix out(q.size()), lse(kHeads * kTokens), dq(q.size()), dk(k.size()), dv(v.size());

  auto view = [](auto& m) {
    return flashcore::BasicTensorView<std::is_const_v<std::remove_reference_t<decltype(m)>>>(
        m.data(), {1, kTokens, kHeads, kHeadDim});
  };
  flashcore::TensorView const rows(lse.data(), {1, kHeads, kTokens});
  flashcore::AttentionArgs const args{
      .q = view(q), .k = view(k), .v = view(v), .out = view(out), .lse = rows, .causal = true};

  flashcore::attention(args);
  flashcore::attention_backward(
      {.forward = args, .dout = view(dout), .dq = view(dq), .dk = view(dk), .dv = view(dv)});

  std::printf("C++: %s\n", flashcore::plan(args).kernel.name);
  Definition<double> const exact(q, k, v, dout);
  Definition<float> const same(q, k, v, dout);
  bool const right[] = {within("out", out, exact.out, same.out),
                        within("dq", dq, exact.dq, same.dq), within("dk", dk, exact.dk, same.dk),
                        within("dv", dv, exact.dv, same.dv)};
  return std::count(std::begin(right), std::end(right), false) == 0 ? 0 : 1;
} catch (const flashcore::Error& error) {
  std::fprintf(stderr, "flashcore: %s\n", error.what());
  return 1;
}
