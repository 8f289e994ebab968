// Whether tensors share memory, against listing every element they touch.
#include "overlap.h"

#include <set>
#include <vector>

#include "check.h"

using namespace flashcore;

namespace {

char memory[4096];

struct View {
  std::vector<int64_t> shape, strides;
  int64_t offset;  // elements
  DLTensor tensor{};

  View(std::vector<int64_t> n, std::vector<int64_t> s, int64_t o)
      : shape(std::move(n)), strides(std::move(s)), offset(o) {}
  Arg arg() {
    tensor.data = memory + 1024;
    tensor.byte_offset = static_cast<uint64_t>(offset * 4);
    tensor.device = {kDLCPU, 0};
    tensor.dtype = {kDLFloat, 32, 1};
    tensor.ndim = static_cast<int32_t>(shape.size());
    tensor.shape = shape.data();
    tensor.strides = strides.data();
    return read("x", &tensor, tensor.ndim, "");
  }
  // Every element, as often as an index names it.
  std::multiset<int64_t> elements() const {
    std::multiset<int64_t> all{offset};
    for (size_t d = 0; d < shape.size(); ++d) {
      std::multiset<int64_t> grown;
      for (int64_t i = 0; i < shape[d]; ++i)
        for (int64_t e : all) grown.insert(e + i * strides[d]);
      all = grown;
    }
    return all;
  }
};

bool touch(const View& a, const View& b) {
  auto const x = a.elements(), y = b.elements();
  for (int64_t e : x)
    if (y.count(e)) return true;
  return false;
}

}  // namespace

TEST("views with equal strides: exactly whether an element is shared") {
  // Rows of 3 x 2 x 2 with gaps, as slices of one packed buffer have.
  for (int64_t outer : {4, 6, 7, 12})
    for (int64_t inner : {2, 3})
      for (int64_t heads_a : {1, 2, 3})
        for (int64_t heads_b : {1, 2})
          for (int64_t offset = 0; offset < 40; ++offset) {
            View a({3, heads_a, 2}, {outer, inner, 1}, 0),
                b({3, heads_b, 2}, {outer, inner, 1}, offset);
            if (overlaps_itself(a.arg()) || overlaps_itself(b.arg())) continue;
            CHECK_EQ(overlap(a.arg(), b.arg()), touch(a, b));
            CHECK_EQ(overlap(b.arg(), a.arg()), touch(a, b));
          }
}

TEST("views with other strides: never less than what is shared") {
  for (int64_t offset = 0; offset < 40; ++offset) {
    View a({3, 4}, {8, 1}, 0), b({4, 3}, {5, 1}, offset), c({3, 4}, {-8, 1}, 16 + offset);
    CHECK(overlap(a.arg(), b.arg()) || !touch(a, b));
    CHECK(overlap(a.arg(), c.arg()) || !touch(a, c));
    if (offset > 20) CHECK(!overlap(a.arg(), b.arg()));
  }
}

TEST("a tensor overlaps itself when two indices can name one element") {
  for (int64_t outer : {0, 1, 2, 3, 4, 5, 8})
    for (int64_t inner : {1, 2, 3}) {
      View a({3, 3}, {outer, inner}, 0);
      auto const all = a.elements();
      bool const twice = std::set<int64_t>(all.begin(), all.end()).size() != all.size();
      CHECK(overlaps_itself(a.arg()) || !twice);
    }
  View packed({2, 3, 4}, {12, 4, 1}, 0), transposed({2, 3, 4}, {4, 8, 1}, 0);
  CHECK(!overlaps_itself(packed.arg()));
  CHECK(!overlaps_itself(transposed.arg()));
}

TEST("a tensor without elements overlaps nothing") {
  View a({0, 4}, {4, 1}, 0), b({3, 4}, {4, 1}, 0);
  CHECK(!overlap(a.arg(), b.arg()));
  CHECK(!overlap(b.arg(), a.arg()));
}

TEST_MAIN()
