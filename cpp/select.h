// Which kernel runs a problem, and with what. The one place that decides.
#pragma once
#include <functional>

#include "registry.h"

namespace flashcore {

// The first kernel, in order of preference, that does not refuse. Throws Failure(UNSUPPORTED) with
// the reasons when all do.
Plan select(const Problem& problem);

// Every kernel of the problem's device type and direction, with its refusal ("" = accepts).
void visit_kernels(const Problem& problem,
                   const std::function<void(const Kernel&, const std::string&)>& visit);

// The backend that serves a device type with merge and dropout_mask. Throws when there is none.
const Backend& backend_for(int device_type, const char* call,
                           const std::function<bool(const Backend&)>& has);

}  // namespace flashcore
