// The Hopper backend: its forward and its backward kernels in one table.
#include "sm90/backend.h"

#include "common/error.h"
#include "common/text.h"
#include "cuda/device.h"
#include "cuda/dropout_mask.h"
#include "cuda/merge.h"

namespace flashcore {
namespace sm90 {

bool any_hopper() {
  for (auto const& device : cuda::devices())
    if (device.major == 9) return true;
  return false;
}

namespace {

// The device code of this backend is for Hopper alone, that of cuda/ included.
void require_hopper(const char* call, int device) {
  auto const devices = cuda::devices();
  auto const id = static_cast<size_t>(device);
  if (id >= devices.size() || devices[id].major != 9)
    throw Failure(FLASHCORE_UNSUPPORTED,
                  text("[", call, "] needs a GPU of compute capability 9.0; cuda:", device,
                       " is another. CPU tensors work"));
}

void merge(const MergeProblem& p, void* stream) {
  require_hopper("merge", p.device_id);
  cuda::merge(p, static_cast<cudaStream_t>(stream));
}
void dropout_mask(const DropoutMaskProblem& p, void* stream) {
  require_hopper("dropout_mask", p.device_id);
  cuda::dropout_mask(p, static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace sm90

const Backend& sm90_backend() {
  static const std::vector<Kernel> table = [] {
    std::vector<Kernel> rows = sm90::fwd::table();
    for (const Kernel& row : sm90::bwd::table()) rows.push_back(row);
    return rows;
  }();
  static const Backend backend{"sm90", kDLCUDA,     [] { return std::span<const Kernel>(table); },
                               "",     sm90::merge, sm90::dropout_mask};
  return backend;
}

}  // namespace flashcore
