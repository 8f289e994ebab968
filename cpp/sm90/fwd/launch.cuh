// Host side of one instance: attributes once per device, then the launch.
#pragma once
#include <atomic>

#include "cuda/device.h"
#include "sm90/fwd/kernel.cuh"
#include "sm90/launch.h"

namespace flashcore::sm90::fwd {

template <FwdConfig kConfig>
void launch(const FwdParams& params, int blocks, int device, cudaStream_t stream) {
  using T = Traits<kConfig>;
  constexpr int kBytes = T::kSharedBytes;
  static std::atomic<uint64_t> prepared{0};  // bit per device
  uint64_t const bit = uint64_t{1} << (device % 64);
  if (!(prepared.load(std::memory_order_acquire) & bit)) {
    cuda::check(cudaFuncSetAttribute(flash_fwd_sm90<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     kBytes),
                "flash_fwd_sm90: shared memory");
    prepared.fetch_or(bit, std::memory_order_release);
  }
  bool const early = T::kLists && params.order;  // else another's kernel is the one before
  cuda::check(
      launch_kernel(flash_fwd_sm90<T>, params, blocks, T::kThreads, kBytes, 1, early, stream),
      "flash_fwd_sm90");
}

}  // namespace flashcore::sm90::fwd
