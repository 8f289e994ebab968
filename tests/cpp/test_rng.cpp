// The dropout bits: Philox against published vectors, the patch as a bijection, the statistics.
#include "tile/rng.h"

#include <cmath>
#include <set>
#include <tuple>

#include "check.h"

using namespace flashcore::tile;

namespace {

void check_words(Philox4 const& x, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  CHECK_EQ(x.w[0], a);
  CHECK_EQ(x.w[1], b);
  CHECK_EQ(x.w[2], c);
  CHECK_EQ(x.w[3], d);
}

}  // namespace

TEST("Philox4x32-10 gives the known answers of its authors") {
  check_words(philox4x32_10(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
  uint32_t const f = 0xffffffff;
  check_words(philox4x32_10(f, f, f, f, f, f), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd);
  check_words(philox4x32_10(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0),
              0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1);
}

TEST("it is constexpr") {
  static_assert(philox4x32_10(0, 0, 0, 0, 0, 0).w[0] == 0x6627e8d5);
  static_assert(dropout_bits(DropoutKey{1, 2}, 0, 0, 3, 4) < 65536);
}

TEST("every score has its own sixteen bits of its own patch") {
  std::set<std::tuple<uint32_t, uint32_t, int>> seen;
  for (uint32_t i = 0; i < 64; ++i)
    for (uint32_t j = 0; j < 64; ++j) {
      int const slot = patch_slot(i, j);
      CHECK(0 <= slot && slot < 8);
      CHECK(seen.emplace(patch_row(i), patch_col(j), slot).second);
    }
  CHECK_EQ(seen.size(), size_t{64 * 64});
}

TEST("a patch is rows i, i + 8 and columns j, j + 1, j + 8, j + 9") {
  for (uint32_t i = 0; i < 64; ++i)
    for (uint32_t j = 0; j < 64; ++j) {
      uint32_t const i0 = i & ~8u, j0 = j & ~9u;
      CHECK_EQ(patch_row(i), patch_row(i0));
      CHECK_EQ(patch_col(j), patch_col(j0));
      CHECK_EQ(patch_slot(i, j),
               static_cast<int>((i != i0) * 4 + ((j & 8) != 0) * 2 + ((j & 1) != 0)));
    }
}

TEST("dropout_bits reads the patch that holds the score") {
  DropoutKey const key = dropout_key(0x123456789abcdef0u, 77);
  for (uint32_t b : {0u, 1u, 9u})
    for (uint32_t h : {0u, 3u})
      for (uint32_t i = 0; i < 40; ++i)
        for (uint32_t j = 0; j < 40; ++j) {
          Philox4 const x =
              philox4x32_10(j / 16 * 4 + j / 2 % 4, i / 16 * 8 + i % 8, h, b, key.k0, key.k1);
          uint32_t const n = i / 8 % 2 * 4 + j / 8 % 2 * 2 + j % 2;
          CHECK_EQ(dropout_bits(key, b, h, i, j), (x.w[n / 2] >> (n % 2 * 16)) & 0xffff);
        }
}

TEST("the bits depend on every one of seed, offset, batch, head, i and j") {
  auto differing = [](auto at) {
    int n = 0;
    for (uint32_t i = 0; i < 64; ++i)
      for (uint32_t j = 0; j < 64; ++j) n += at(i, j, 0) != at(i, j, 1);
    return n;
  };
  int const enough = 4096 - 8;  // 16-bit numbers collide once in 65536
  CHECK(differing([](auto i, auto j, auto x) {
          return dropout_bits(dropout_key(5u + x, 9), 0, 0, i, j);
        }) > enough);
  CHECK(differing([](auto i, auto j, auto x) {
          return dropout_bits(dropout_key(5, 9u + x), 0, 0, i, j);
        }) > enough);
  CHECK(differing([](auto i, auto j, uint64_t x) {
          return dropout_bits(dropout_key(x << 32, x << 40), 0, 0, i, j);
        }) > enough);
  DropoutKey const key = dropout_key(5, 9);
  CHECK(differing([&](auto i, auto j, uint32_t x) { return dropout_bits(key, x, 0, i, j); }) >
        enough);
  CHECK(differing([&](auto i, auto j, uint32_t x) { return dropout_bits(key, 0, x, i, j); }) >
        enough);
  CHECK(differing([&](auto i, auto j, uint32_t x) { return dropout_bits(key, 0, 0, i + x, j); }) >
        enough);
  CHECK(differing([&](auto i, auto j, uint32_t x) { return dropout_bits(key, 0, 0, i, j + x); }) >
        enough);
}

TEST("the bits are uniform: mean, each bit, and neighbours uncorrelated") {
  DropoutKey const key = dropout_key(2024, 0);
  constexpr int n = 1024;
  double sum = 0, across = 0, down = 0;
  int ones[16] = {};
  for (uint32_t i = 0; i < n; ++i)
    for (uint32_t j = 0; j < n; ++j) {
      uint32_t const bits = dropout_bits(key, 0, 0, i, j);
      double const x = bits / 65535.0 - 0.5;
      sum += x;
      across += x * (dropout_bits(key, 0, 0, i, j + 1) / 65535.0 - 0.5);
      down += x * (dropout_bits(key, 0, 0, i + 8, j) / 65535.0 - 0.5);
      for (int bit = 0; bit < 16; ++bit) ones[bit] += (bits >> bit) & 1;
    }
  double const samples = double{n} * n;
  double const sigma = std::sqrt(1.0 / 12.0 / samples);
  CHECK(std::abs(sum / samples) < 5 * sigma);
  CHECK(std::abs(across / samples) < 5 * sigma / std::sqrt(12.0));
  CHECK(std::abs(down / samples) < 5 * sigma / std::sqrt(12.0));
  for (int bit = 0; bit < 16; ++bit)
    CHECK(std::abs(ones[bit] / samples - 0.5) < 5 * 0.5 / std::sqrt(samples));
}

TEST_MAIN()
