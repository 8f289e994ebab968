// Backends and their kernels, in order of preference. A backend that was not built is a translation
// unit in missing/ whose list is empty and whose note says so: no caller has an #ifdef.
#pragma once
#include <span>
#include <string>

#include "common/problem.h"
#include "flashcore/flashcore.h"

namespace flashcore {

// What select.cpp decides about a problem. The launch, the workspace size and explain() all read
// this one decision.
struct Plan {
  const struct Kernel* kernel = nullptr;
  size_t workspace_bytes = 0;
  int num_splits = 1;
  int split_blocks = 0;  // key blocks of each part, for the kernel's own launch
  bool deterministic = true;
};

// One row of a backend's table.
struct Kernel {
  flashcore_kernel_info info;

  // Why this kernel cannot run the problem, as one sentence; empty if it can. Names the argument,
  // what it got and what is allowed. May read the problem's shapes and pointers, never its data.
  std::string (*refusal)(const Kernel&, const Problem&);
  // Fills workspace_bytes, num_splits, split_blocks and deterministic, as far as it has them.
  void (*plan)(const Kernel&, const Problem&, Plan&);
  // Enqueues (CUDA) or does (CPU) the work. Throws Failure.
  void (*launch)(const Kernel&, const Problem&, const Plan&, void* workspace, void* stream);
  // The backend's own description of the kernel; nobody else looks at it.
  const void* instance = nullptr;
};

struct Backend {
  const char* name;
  int device_type;                       // DLDeviceType it serves
  std::span<const Kernel> (*kernels)();  // in order of preference
  const char* note;                      // "" or why the list is empty: "built without sm90"
  void (*merge)(const struct MergeProblem&, void* stream);  // null: not in this backend
  void (*dropout_mask)(const struct DropoutMaskProblem&, void* stream);
};

// Partial results over disjoint keys, combined (fc.merge).
struct MergeProblem {
  int device_type, device_id;
  int count;
  int64_t batch, num_rows, num_heads, head_dim;  // packed: batch 1
  const Rows* outs;
  const Rows* lses;
  Rows out, lse;  // lse.data may be null
};

struct DropoutMaskProblem {
  int device_type, device_id;
  Scores keep;  // one byte per entry
  int64_t batch, num_heads, seqlen_q, seqlen_k;
  uint32_t threshold;
  uint64_t seed, offset;
};

// Defined by each backend, or by its stand-in in missing/.
const Backend& cpu_backend();
const Backend& sm90_backend();

std::span<const Backend* const> backends();  // in order of preference

}  // namespace flashcore
