// Partial results over disjoint keys, combined on a GPU. Host interface.
#pragma once
#include <cuda_runtime_api.h>

#include "registry.h"

namespace flashcore::cuda {

// What a kernel that splits the keys of one call leaves in its workspace: for every split the
// float32 results and their lse, without gaps. Packed sequences are one batch of all rows.
struct SplitProblem {
  int device_id = 0;
  int count = 0;
  int64_t batch = 0, num_heads = 0, num_rows = 0, head_dim = 0;
  const float* outs = nullptr;  // [split][batch][head][row][head_dim]
  const float* lses = nullptr;  // [split][batch][head][row]; -inf: the split's row is not read
  Rows out, lse;                // lse.data may be null
};

// Both enqueue one kernel and nothing else: no allocation, no synchronisation, no table on the
// device, so they can be captured in a graph. Throw Failure.
void merge(const MergeProblem& problem, cudaStream_t stream);
void merge_splits(const SplitProblem& problem, cudaStream_t stream);

}  // namespace flashcore::cuda
