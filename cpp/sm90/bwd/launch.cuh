// Host side of one instance: attributes once per device, then the two or three launches.
#pragma once
#include <atomic>

#include "cuda/device.h"
#include "sm90/bwd/kernel.cuh"
#include "sm90/bwd/postprocess.cuh"
#include "sm90/bwd/preprocess.cuh"
#include "sm90/launch.h"

namespace flashcore::sm90::bwd {

template <BwdConfig kConfig>
void launch(const BwdParams& params, int blocks, int device, cudaStream_t stream) {
  using T = Traits<kConfig>;
  constexpr int kBytes = sizeof(typename T::Shared);
  static std::atomic<uint64_t> prepared{0};  // bit per device
  uint64_t const bit = uint64_t{1} << (device % 64);
  if (!(prepared.load(std::memory_order_acquire) & bit)) {
    cuda::check(cudaFuncSetAttribute(flash_bwd_sm90<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     kBytes),
                "flash_bwd_sm90: shared memory");
    prepared.fetch_or(bit, std::memory_order_release);
  }
  int const query_blocks = params.heads * params.head_blocks;
  if (query_blocks > 0) {
    // Not early: the main kernel reads what came before this one without waiting for it.
    flash_bwd_sm90_preprocess<T><<<query_blocks, kPreprocessThreads, 0, stream>>>(params);
    cuda::check(cudaGetLastError(), "flash_bwd_sm90_preprocess");
  }
  if (blocks > 0) {
    // Else another's kernel is the one before; and clusters that fill the GPU took longer then.
    bool const early = query_blocks > 0 && (T::kCluster == 1 || kConfig.few());
    cuda::check(launch_kernel(flash_bwd_sm90<T>, params, blocks, T::kThreads, kBytes, T::kCluster,
                              early, stream, kConfig.laps),
                "flash_bwd_sm90");
  }
  if (params.dq.data && !params.dq_heads && !params.whole_heads && query_blocks > 0) {
    cuda::check(launch_kernel(flash_bwd_sm90_postprocess<T>, params, query_blocks, T::Dq::kThreads,
                              0, 1, true, stream),
                "flash_bwd_sm90_postprocess");
  }
}

}  // namespace flashcore::sm90::bwd
