// CUDA devices and the driver entry points the kernels' launchers need. Host only.
//
// The CUDA runtime is linked statically and libcuda is found at run time through it, so the library
// loads on a machine with no driver and says "no CUDA device" there.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

namespace flashcore::cuda {

struct Device {
  int major = 0;  // compute capability
  int minor = 0;
  int multiprocessors = 0;
  size_t memory_bytes = 0;
  char name[128] = {};
};

// Every device, read once. Empty when there is no driver or no GPU.
std::span<const Device> devices();

// Throws Failure(DEVICE_ERROR) "what: cudaErrorName: text" unless the call succeeded.
void check(cudaError_t error, const char* what);

// Makes a device current and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// A tensor the copy engine (TMA) can read or write: dimension 0 is contiguous, strides in bytes for
// the others.
struct TmaTensor {
  void* data;
  bool bf16;  // else fp16
  int rank;
  uint64_t extent[5];
  uint64_t stride[4];
  uint32_t box[5];
};

// 128-byte swizzle; the box's first dimension is 64 elements of two bytes.
CUtensorMap encode_tensor_map(const TmaTensor& tensor);

}  // namespace flashcore::cuda
