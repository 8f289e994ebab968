// Host side of a launch that begins early, or in clusters.
#pragma once
#include <cuda_runtime_api.h>

namespace flashcore::sm90 {

// In clusters of `cluster` blocks. early: may begin while the kernel before, which must be one of
// ours, is at work. together: does not begin before all blocks can run at the same time.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), const Params& params, int blocks, int threads,
                          int shared_bytes, int cluster, bool early, cudaStream_t stream,
                          bool together = false) {
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = early;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[2].id = cudaLaunchAttributeCooperative;
  attributes[2].val.cooperative = together;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(blocks), 1, 1};
  config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = together ? 3 : 2;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace flashcore::sm90
