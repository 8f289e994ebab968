// The Hopper backend: its forward and its backward kernels in one table.
#include "sm90/backend.h"

#include "cuda/device.h"

namespace flashcore {
namespace sm90 {

bool any_hopper() {
  for (auto const& device : cuda::devices())
    if (device.major == 9) return true;
  return false;
}

}  // namespace sm90

const Backend& sm90_backend() {
  static const std::vector<Kernel> table = [] {
    std::vector<Kernel> rows = sm90::fwd::table();
    for (const Kernel& row : sm90::bwd::table()) rows.push_back(row);
    return rows;
  }();
  static const Backend backend{"sm90", kDLCUDA, [] { return std::span<const Kernel>(table); },
                               "",     nullptr, nullptr};
  return backend;
}

}  // namespace flashcore
