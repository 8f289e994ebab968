// What a call would do, as Python sees it.
#pragma once
#include "bindings/error.h"

namespace flashcore::python {

nb::tuple kernel_tuple(const flashcore_kernel_info& kernel);

// (kernel or None, num_splits, workspace_bytes, deterministic, [(kernel name, refusal)])
nb::tuple explain_tuple(const flashcore_attention_args& args);
nb::tuple explain_tuple(const flashcore_attention_backward_args& args);

}  // namespace flashcore::python
