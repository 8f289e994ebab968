#include "bindings/plan.h"

namespace flashcore::python {
namespace {

template <class Args>
nb::tuple explain_with(const Args& args,
                       flashcore_status (*explain)(const Args*, flashcore_visit_kernel, void*),
                       flashcore_status (*make_plan)(const Args*, flashcore_plan*)) {
  nb::list refusals;
  auto const visit = [](void* user, const flashcore_kernel_info* kernel, const char* refusal) {
    if (refusal) static_cast<nb::list*>(user)->append(nb::make_tuple(kernel->name, refusal));
  };
  check(explain(&args, visit, &refusals));
  flashcore_plan plan{};
  plan.struct_size = sizeof plan;
  flashcore_status const status = make_plan(&args, &plan);
  if (status == FLASHCORE_UNSUPPORTED) return nb::make_tuple(nb::none(), 0, 0, false, refusals);
  check(status);
  return nb::make_tuple(kernel_tuple(plan.kernel), plan.num_splits, plan.workspace_bytes,
                        plan.deterministic != 0, refusals);
}

}  // namespace

nb::tuple kernel_tuple(const flashcore_kernel_info& k) {
  return nb::make_tuple(k.name, k.direction == FLASHCORE_FORWARD ? "forward" : "backward",
                        k.backend, k.isa, k.dtype, k.mask, k.head_dim, k.head_dim_v, k.block_m,
                        k.block_n, k.usable != 0);
}

nb::tuple explain_tuple(const flashcore_attention_args& args) {
  return explain_with(args, flashcore_attention_explain, flashcore_attention_plan);
}
nb::tuple explain_tuple(const flashcore_attention_backward_args& args) {
  return explain_with(args, flashcore_attention_backward_explain,
                      flashcore_attention_backward_plan);
}

}  // namespace flashcore::python
