#include "cuda/device.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "common/device_info.h"
#include "common/error.h"
#include "common/text.h"

namespace flashcore {
namespace cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw Failure(FLASHCORE_DEVICE_ERROR,
                text(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
}

std::span<const Device> devices() {
  static const std::vector<Device> list = [] {
    std::vector<Device> found;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) return found;  // no driver, or no GPU
    for (int id = 0; id < count; ++id) {
      cudaDeviceProp p;
      if (cudaGetDeviceProperties(&p, id) != cudaSuccess) continue;
      Device d{p.major, p.minor, p.multiProcessorCount, p.totalGlobalMem, {}};
      std::snprintf(d.name, sizeof d.name, "%.127s", p.name);
      found.push_back(d);
    }
    return found;
  }();
  return list;
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

CUtensorMap encode_tensor_map(const TmaTensor& t) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw Failure(FLASHCORE_DEVICE_ERROR, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  static constexpr cuuint32_t kUnitSteps[5] = {1, 1, 1, 1, 1};
  cuuint64_t extent[5], stride[4];
  cuuint32_t box[5];
  for (int d = 0; d < t.rank; ++d) {
    extent[d] = t.extent[d];
    box[d] = t.box[d];
    if (d > 0) stride[d - 1] = t.stride[d - 1];
  }
  CUtensorMap map;
  auto const attempt = [&] {
    return encode(&map, t.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  static_cast<cuuint32_t>(t.rank), t.data, extent, stride, box, kUnitSteps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = attempt();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread that has not used the GPU yet, as those of an autograd engine: setting the device
    // makes its context current.
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    result = attempt();
  }
  if (result != CUDA_SUCCESS)
    throw Failure(FLASHCORE_DEVICE_ERROR,
                  text("cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(result)));
  return map;
}

}  // namespace cuda

void append_cuda_devices(std::vector<flashcore_device_info>& list) {
  int id = 0;
  for (const cuda::Device& d : cuda::devices()) {
    flashcore_device_info info{};
    info.struct_size = sizeof info;
    info.device = {kDLCUDA, id++};
    std::memcpy(info.name, d.name, sizeof info.name);
    std::snprintf(info.isa, sizeof info.isa, "sm_%d%d", d.major, d.minor);
    info.multiprocessors = d.multiprocessors;
    info.memory_bytes = d.memory_bytes;
    list.push_back(info);
  }
}

}  // namespace flashcore
