// The names a row of instances.def stands for.
#pragma once
#include <cuda_runtime_api.h>

#include "sm90/fwd/config.h"

#define FWD_SYMBOL(dtype, head_dim, mask, m, n, stages, q_stages) \
  launch_##dtype##_d##head_dim##_##mask##_m##m##_n##n##_s##stages##_q##q_stages
#define FWD_CONFIG(dtype, head_dim, mask, m, n, stages, q_stages) \
  FwdConfig { DType::dtype, head_dim, Mask::mask, m, n, stages, q_stages }

namespace flashcore::sm90::fwd {

#define FWD(dtype, head_dim, mask, m, n, stages, q_stages)        \
  void FWD_SYMBOL(dtype, head_dim, mask, m, n, stages, q_stages)( \
      const FwdParams& params, int blocks, int device, cudaStream_t stream);
#include "sm90/fwd/instances.def"
#undef FWD

}  // namespace flashcore::sm90::fwd
