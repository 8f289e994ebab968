// Stands in for cpp/cuda in a build without CUDA.
#include "common/device_info.h"

namespace flashcore {

void append_cuda_devices(std::vector<flashcore_device_info>&) {}

}  // namespace flashcore
