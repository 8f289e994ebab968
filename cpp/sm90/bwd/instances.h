// The names a row of instances.def stands for.
#pragma once
#include <cuda_runtime_api.h>

#include "sm90/bwd/config.h"

#define BWD_SYMBOL(dtype, head_dim, m, n, stages) \
  launch_##dtype##_d##head_dim##_m##m##_n##n##_s##stages
#define BWD_CONFIG(dtype, head_dim, m, n, stages) \
  BwdConfig { DType::dtype, head_dim, m, n, stages }

namespace flashcore::sm90::bwd {

#define BWD(dtype, head_dim, m, n, stages)                                                        \
  void BWD_SYMBOL(dtype, head_dim, m, n, stages)(const BwdParams& params, int blocks, int device, \
                                                 cudaStream_t stream);
#include "sm90/bwd/instances.def"
#undef BWD

}  // namespace flashcore::sm90::bwd
