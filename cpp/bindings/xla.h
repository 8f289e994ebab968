// What flashcore.jax takes from the extension: the handlers, and plans of calls that have shapes
// but no data yet.
#pragma once
#include <nanobind/nanobind.h>

namespace flashcore::python {

void bind_xla(nanobind::module_& m);

}  // namespace flashcore::python
