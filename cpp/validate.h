// From the C arguments to a Problem. Every check of the library and every message about arguments
// is in the validate*.cpp files and what they read with (argument.h, operand.h, overlap.h); what
// passes is safe to launch on any kernel that accepts it.
#pragma once
#include <vector>

#include "common/problem.h"
#include "flashcore/flashcore.h"
#include "registry.h"

namespace flashcore {

// Which outputs must be present: a plan can be made before anything is allocated.
enum class Stage { plan, run };

// Throw Failure. The arguments' tensors must outlive the Problem.
Problem validate(const flashcore_attention_args* args, Stage stage);
Problem validate(const flashcore_attention_backward_args* args, Stage stage);

// The partial results live in storage as long as the MergeProblem is used.
struct MergeStorage {
  std::vector<Rows> outs, lses;
};
MergeProblem validate(const flashcore_merge_args* args, MergeStorage& storage);
DropoutMaskProblem validate_dropout_mask(const DLTensor* keep, double dropout_p,
                                         const int64_t* rng);

}  // namespace flashcore
