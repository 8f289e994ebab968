// The CPU backend's table of kernels and how a kernel runs on the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "common/text.h"
#include "cpu/entry.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "registry.h"

namespace flashcore {
namespace cpu {
namespace {

// The registry's rows and, beside each, the build it comes from.
struct Table {
  std::vector<Kernel> kernels;
  std::vector<const Entry*> entries;
  std::vector<size_t> isa;
  std::vector<std::string> names;
};
const Table& table();

size_t index_of(const Kernel& kernel) {
  return static_cast<size_t>(&kernel - table().kernels.data());
}
const Entry& entry_of(const Kernel& kernel) { return *table().entries[index_of(kernel)]; }

std::string refusal(const Kernel& kernel, const Problem& p) {
  if (std::strcmp(kernel.info.dtype, dtype_name(p.dtype)) != 0)
    return text("takes ", kernel.info.dtype, ", got ", dtype_name(p.dtype));
  return isa_refusal(table().isa[index_of(kernel)]);
}

constexpr size_t aligned(size_t bytes) { return round_up(bytes, Entry::kAlignment); }

Work work_of(const Kernel& kernel, const Problem& p) {
  Work work;
  entry_of(kernel).plan(p, work);
  return work;
}

// Waking a thread costs some 10 us, so each gets at least ten times that to do. Never more threads
// than tasks: scratch is per thread.
int64_t threads_for(const Problem& p, const Work& work) {
  double const flops = 2.0 * p.batch * p.num_heads_q * p.seqlen_q * p.seqlen_k *
                       (p.head_dim + p.head_dim_v) * (p.direction == Direction::forward ? 1 : 2.5);
  int64_t const most = *std::max_element(work.tasks, work.tasks + work.phases);
  int64_t const worthwhile = 1 + static_cast<int64_t>(std::min(flops / 4e6, 1e6));
  return std::clamp<int64_t>(std::min(most, worthwhile), 1, num_threads(p.num_threads));
}

void plan(const Kernel& kernel, const Problem& p, Plan& plan) {
  Work const work = work_of(kernel, p);
  plan.workspace_bytes = aligned(work.shared_bytes) +
                         static_cast<size_t>(threads_for(p, work)) * aligned(work.scratch_bytes);
  plan.num_splits = work.num_splits;
  plan.deterministic = true;
}

struct Call {
  const Problem& problem;
  const Work& work;
  const Entry& entry;
  std::byte* shared;
  std::byte* scratch;
  int phase;
};

void launch(const Kernel& kernel, const Problem& p, const Plan& plan, void* workspace, void*) {
  Work const work = work_of(kernel, p);
  size_t const shared = aligned(work.shared_bytes);
  size_t const scratch = aligned(work.scratch_bytes);
  auto* const base = static_cast<std::byte*>(workspace);
  // As many threads as the plan made room for, whatever the setting has become since.
  int const threads = scratch == 0 ? num_threads(p.num_threads)
                                   : static_cast<int>((plan.workspace_bytes - shared) / scratch);
  Call call{p, work, entry_of(kernel), base, base + shared, 0};
  for (; call.phase < work.phases; ++call.phase)
    parallel_for(
        work.tasks[call.phase], threads,
        [](void* context, int64_t t, int worker) noexcept {
          Call const& c = *static_cast<const Call*>(context);
          c.entry.run(c.problem, c.work, c.phase, t, c.shared,
                      c.scratch + static_cast<size_t>(worker) * aligned(c.work.scratch_bytes));
        },
        &call);
}

Table make_table() {
  Table t;
  auto const add = [&t](size_t isa, Direction direction, const Entry& entry, DType dtype) {
    if (!entry.plan) return;
    bool const forward = direction == Direction::forward;
    flashcore_kernel_info info{};
    info.direction = forward ? FLASHCORE_FORWARD : FLASHCORE_BACKWARD;
    info.backend = "cpu";
    info.isa = isas()[isa].name;
    info.dtype = dtype_name(dtype);
    info.mask = "any";
    info.block_m = entry.block_m;
    info.block_n = entry.block_n;
    info.usable = isa_refusal(isa).empty();
    t.names.push_back(text("cpu-", info.isa, forward ? "-fwd-" : "-bwd-", info.dtype));
    t.kernels.push_back({info, refusal, plan, launch});
    t.entries.push_back(&entry);
    t.isa.push_back(isa);
  };
  for (size_t i = 0; i < isas().size(); ++i)
    for (Direction direction : {Direction::forward, Direction::backward})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
        const IsaEntry& isa = *isas()[i].entry;
        auto const& entries = direction == Direction::forward ? isa.forward : isa.backward;
        add(i, direction, entries[static_cast<size_t>(dtype)], dtype);
      }
  for (size_t i = 0; i < t.kernels.size(); ++i) t.kernels[i].info.name = t.names[i].c_str();
  return t;
}

const Table& table() {
  static const Table instance = make_table();
  return instance;
}

// Runs a row-wise function of the best build that has it, 64 rows a task.
template <class P>
void run_rows(void (*IsaEntry::*member)(const P&, int64_t, int64_t), const P& problem,
              int64_t rows) {
  struct Rowwise {
    void (*function)(const P&, int64_t, int64_t);
    const P& problem;
    int64_t rows;
  };
  static constexpr int64_t kRows = 64;
  for (size_t i = 0; i < isas().size(); ++i) {
    auto const function = isas()[i].entry->*member;
    if (!function || !isa_refusal(i).empty()) continue;
    Rowwise call{function, problem, rows};
    parallel_for(
        ceil_div(rows, kRows), num_threads(0),
        [](void* context, int64_t t, int) noexcept {
          auto const& c = *static_cast<const Rowwise*>(context);
          c.function(c.problem, t * kRows, std::min(c.rows, (t + 1) * kRows));
        },
        &call);
    return;
  }
  throw Failure(FLASHCORE_UNSUPPORTED, isa_refusal(0));
}

void merge(const MergeProblem& p, void*) {
  run_rows(&IsaEntry::merge, p, p.batch * p.num_heads * p.num_rows);
}
void dropout_mask(const DropoutMaskProblem& p, void*) {
  run_rows(&IsaEntry::dropout_mask, p, p.batch * p.num_heads * p.seqlen_q);
}

}  // namespace
}  // namespace cpu

const Backend& cpu_backend() {
  static const Backend backend{
      "cpu", kDLCPU,     [] { return std::span<const Kernel>(cpu::table().kernels); },
      "",    cpu::merge, cpu::dropout_mask};
  return backend;
}

}  // namespace flashcore
