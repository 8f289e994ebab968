// Dropout bits as a tensor, on a GPU. Host interface.
#pragma once
#include <cuda_runtime_api.h>

#include "registry.h"

namespace flashcore::cuda {

// Enqueues one kernel. Throws Failure.
void dropout_mask(const DropoutMaskProblem& problem, cudaStream_t stream);

}  // namespace flashcore::cuda
