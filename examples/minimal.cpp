// Attention from C++ on real text: a small byte model with one attention layer, forward and
// backward, checked against the definition in double.
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

// Largest |out - definition| and |dV - definition|, in double.
std::pair<double, double> errors(const Matrix& q, const Matrix& k, const Matrix& v,
                                 const Matrix& out, const Matrix& dout, const Matrix& dv) {
  std::vector<double> o(out.size()), g(dv.size());
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kTokens; ++i) {
      auto at = [h](int t, int d) { return (t * kHeads + h) * kHeadDim + d; };
      std::vector<double> p(i + 1);
      for (int j = 0; j <= i; ++j) {
        double s = 0;
        for (int d = 0; d < kHeadDim; ++d) s += double(q[at(i, d)]) * k[at(j, d)];
        p[j] = std::exp(s / std::sqrt(double(kHeadDim)));
      }
      double const sum = std::accumulate(p.begin(), p.end(), 0.0);
      for (int j = 0; j <= i; ++j)
        for (int d = 0; d < kHeadDim; ++d) {
          o[at(i, d)] += p[j] / sum * v[at(j, d)];
          g[at(j, d)] += p[j] / sum * dout[at(i, d)];
        }
    }
  double eo = 0, eg = 0;
  for (std::size_t i = 0; i < o.size(); ++i) eo = std::max(eo, std::abs(o[i] - out[i]));
  for (std::size_t i = 0; i < g.size(); ++i) eg = std::max(eg, std::abs(g[i] - dv[i]));
  return {eo, eg};
}

}  // namespace

int main(int argc, char** argv) try {
  Matrix const x = embed(read_text(argc > 1 ? argv[1] : TEXT_FILE));
  Matrix const q = project(x, 2), k = project(x, 3), v = project(x, 4), dout = project(x, 5);
  Matrix out(q.size()), lse(kHeads * kTokens), dv(v.size());

  auto view = [](auto& m) {
    return flashcore::BasicTensorView<std::is_const_v<std::remove_reference_t<decltype(m)>>>(
        m.data(), {1, kTokens, kHeads, kHeadDim});
  };
  flashcore::TensorView const rows(lse.data(), {1, kHeads, kTokens});
  flashcore::AttentionArgs const args{
      .q = view(q), .k = view(k), .v = view(v), .out = view(out), .lse = rows, .causal = true};

  flashcore::attention(args);
  flashcore::attention_backward({.forward = args, .dout = view(dout), .dv = view(dv)});

  auto const [forward, backward] = errors(q, k, v, out, dout, dv);
  std::printf("C++: %s, largest error %.1e forward, %.1e in dV\n",
              flashcore::plan(args).kernel.name, forward, backward);
  return forward < 2e-5 && backward < 2e-4 ? 0 : 1;
} catch (const flashcore::Error& error) {
  std::fprintf(stderr, "flashcore: %s\n", error.what());
  return 1;
}
