// What one instruction set's build of kernels.cpp offers to backend.cpp. Plain data: this header is
// shared between translation units that are compiled for different instruction sets.
#pragma once
#include "common/problem.h"

namespace flashcore {
struct MergeProblem;
struct DropoutMaskProblem;
}  // namespace flashcore

namespace flashcore::cpu {

// The shape of one call: phases run one after the other, the tasks of a phase in any order and on
// any thread. It follows from the problem's shapes alone, never from the number of threads, so
// that the result does not either.
struct Work {
  static constexpr int kMaxPhases = 4;
  int phases = 1;
  int64_t tasks[kMaxPhases] = {};
  size_t shared_bytes = 0;   // one block per call, not initialised
  size_t scratch_bytes = 0;  // one block per thread; its contents do not outlive a task
  int num_splits = 1;
};

// Kernels of one direction and dtype. Both blocks are aligned to kAlignment.
struct Entry {
  static constexpr size_t kAlignment = 256;
  int block_m = 0;
  int block_n = 0;
  void (*plan)(const Problem&, Work&) = nullptr;  // null: this build adds nothing for the dtype
  // Phase p task t. Tasks of one phase are started in ascending order.
  void (*run)(const Problem&, const Work&, int phase, int64_t task, std::byte* shared,
              std::byte* scratch) = nullptr;
};

struct IsaEntry {
  Entry forward[4];  // by DType
  Entry backward[4];
  // Rows [begin, end) of the batch * heads * rows of the problem; null: use a lesser build's.
  void (*merge)(const MergeProblem&, int64_t begin, int64_t end) = nullptr;
  void (*dropout_mask)(const DropoutMaskProblem&, int64_t begin, int64_t end) = nullptr;
};

// One per build of kernels.cpp; the CMake file says which exist.
extern const IsaEntry kEntry_baseline;
extern const IsaEntry kEntry_avx2;
extern const IsaEntry kEntry_avx512;
extern const IsaEntry kEntry_avx512_bf16;
extern const IsaEntry kEntry_neon;

}  // namespace flashcore::cpu
