// Stands in for cpp/sm90 in a build without CUDA.
#include "registry.h"

namespace flashcore {

const Backend& sm90_backend() {
  static const Backend backend{
      "sm90",  kDLCUDA, [] { return std::span<const Kernel>{}; }, "built without sm90",
      nullptr, nullptr};
  return backend;
}

}  // namespace flashcore
