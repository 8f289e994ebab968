// The C ABI: validate -> select -> launch. The only file that knows every step.
#include <cstring>
#include <new>
#include <vector>

#include "common/device_info.h"
#include "common/error.h"
#include "common/text.h"
#include "select.h"
#include "validate.h"

#define FLASHCORE_STRING_(x) #x
#define FLASHCORE_STRING(x) FLASHCORE_STRING_(x)

namespace flashcore {
namespace {

thread_local std::string last_error;

// Runs body; turns whatever it throws into a status and this thread's error text.
template <class Body>
flashcore_status guarded(Body body) noexcept {
  try {
    last_error.clear();
    body();
    return FLASHCORE_OK;
  } catch (const Failure& f) {
    last_error = f.what();
    return f.status;
  } catch (const std::bad_alloc&) {
    last_error = "out of host memory";
    return FLASHCORE_DEVICE_ERROR;
  } catch (const std::exception& e) {
    last_error = e.what();
    return FLASHCORE_INTERNAL_ERROR;
  }
}

// Fills a caller's structure, whose struct_size says which version of it they were compiled with.
template <class T>
void give(T* to, T value, const char* what) {
  if (!to) throw Failure(FLASHCORE_INVALID_ARGUMENT, text(what, " is NULL"));
  if (to->struct_size != sizeof(T))
    throw Failure(FLASHCORE_INVALID_ARGUMENT,
                  text(what, ".struct_size is ", to->struct_size, ", expected ", sizeof(T)));
  value.struct_size = sizeof(T);
  *to = value;
}

void give_plan(const Problem& problem, flashcore_plan* to) {
  Plan const plan = select(problem);
  flashcore_plan out{};
  out.num_splits = plan.num_splits;
  out.kernel = plan.kernel->info;
  out.kernel.struct_size = sizeof out.kernel;
  out.workspace_bytes = plan.workspace_bytes;
  out.deterministic = plan.deterministic;
  give(to, out, "plan");
}

void run(const Problem& problem, void* workspace, size_t bytes, void* stream) {
  Plan const plan = select(problem);
  if (bytes < plan.workspace_bytes || (plan.workspace_bytes && !workspace))
    throw Failure(FLASHCORE_INVALID_ARGUMENT,
                  text("workspace: this call needs ", plan.workspace_bytes, " bytes, got ",
                       workspace ? bytes : 0, ": allocate plan.workspace_bytes"));
  if (reinterpret_cast<uintptr_t>(workspace) % FLASHCORE_WORKSPACE_ALIGNMENT != 0)
    throw Failure(FLASHCORE_INVALID_ARGUMENT,
                  text("workspace must be aligned to ", FLASHCORE_WORKSPACE_ALIGNMENT, " bytes"));
  plan.kernel->launch(*plan.kernel, problem, plan, workspace, stream);
}

void explain(const Problem& problem, flashcore_visit_kernel visit, void* user) {
  if (!visit) throw Failure(FLASHCORE_INVALID_ARGUMENT, "visit is NULL");
  visit_kernels(problem, [&](const Kernel& k, const std::string& refusal) {
    flashcore_kernel_info info = k.info;
    info.struct_size = sizeof info;
    visit(user, &info, refusal.empty() ? nullptr : refusal.c_str());
  });
}

std::vector<flashcore_device_info> list_devices() {
  std::vector<flashcore_device_info> devices;
  append_cpu_devices(devices);
  append_cuda_devices(devices);
  return devices;
}

}  // namespace
}  // namespace flashcore

using namespace flashcore;

flashcore_status flashcore_attention_plan(const flashcore_attention_args* args,
                                          flashcore_plan* plan) {
  return guarded([&] { give_plan(validate(args, Stage::plan), plan); });
}

flashcore_status flashcore_attention_backward_plan(const flashcore_attention_backward_args* args,
                                                   flashcore_plan* plan) {
  return guarded([&] { give_plan(validate(args, Stage::plan), plan); });
}

flashcore_status flashcore_attention_forward(const flashcore_attention_args* args, void* workspace,
                                             size_t workspace_bytes, void* stream) {
  return guarded([&] { run(validate(args, Stage::run), workspace, workspace_bytes, stream); });
}

flashcore_status flashcore_attention_backward(const flashcore_attention_backward_args* args,
                                              void* workspace, size_t workspace_bytes,
                                              void* stream) {
  return guarded([&] { run(validate(args, Stage::run), workspace, workspace_bytes, stream); });
}

flashcore_status flashcore_attention_explain(const flashcore_attention_args* args,
                                             flashcore_visit_kernel visit, void* user) {
  return guarded([&] { explain(validate(args, Stage::plan), visit, user); });
}

flashcore_status flashcore_attention_backward_explain(const flashcore_attention_backward_args* args,
                                                      flashcore_visit_kernel visit, void* user) {
  return guarded([&] { explain(validate(args, Stage::plan), visit, user); });
}

flashcore_status flashcore_merge(const flashcore_merge_args* args, void* stream) {
  return guarded([&] {
    MergeStorage storage;
    MergeProblem const problem = validate(args, storage);
    backend_for(problem.device_type, "merge", [](const Backend& b) {
      return b.merge != nullptr;
    }).merge(problem, stream);
  });
}

flashcore_status flashcore_dropout_mask(DLTensor* keep, double dropout_p, const int64_t* rng,
                                        void* stream) {
  return guarded([&] {
    DropoutMaskProblem const problem = validate_dropout_mask(keep, dropout_p, rng);
    backend_for(problem.device_type, "dropout_mask", [](const Backend& b) {
      return b.dropout_mask != nullptr;
    }).dropout_mask(problem, stream);
  });
}

int32_t flashcore_kernel_count(void) {
  size_t n = 0;
  for (const Backend* backend : backends()) n += backend->kernels().size();
  return static_cast<int32_t>(n);
}

flashcore_status flashcore_kernel_at(int32_t index, flashcore_kernel_info* info) {
  return guarded([&] {
    auto i = static_cast<size_t>(index);
    for (const Backend* backend : backends()) {
      auto const kernels = backend->kernels();
      if (i < kernels.size()) return give(info, kernels[i].info, "info");
      i -= kernels.size();
    }
    throw Failure(FLASHCORE_INVALID_ARGUMENT, text("kernel index must be in 0..",
                                                   flashcore_kernel_count() - 1, ", got ", index));
  });
}

int32_t flashcore_device_count(void) {
  try {
    return static_cast<int32_t>(list_devices().size());
  } catch (const std::exception&) {
    return 0;
  }
}

flashcore_status flashcore_device_at(int32_t index, flashcore_device_info* info) {
  return guarded([&] {
    auto const devices = list_devices();
    if (index < 0 || static_cast<size_t>(index) >= devices.size())
      throw Failure(FLASHCORE_INVALID_ARGUMENT,
                    text("device index must be in 0..", devices.size() - 1, ", got ", index));
    give(info, devices[static_cast<size_t>(index)], "info");
  });
}

const char* flashcore_last_error(void) { return last_error.c_str(); }

const char* flashcore_version(void) {
  return FLASHCORE_STRING(FLASHCORE_VERSION_MAJOR) "." FLASHCORE_STRING(
      FLASHCORE_VERSION_MINOR) "." FLASHCORE_STRING(FLASHCORE_VERSION_PATCH);
}
