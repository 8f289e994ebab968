// The tables that make up the Hopper backend. Each row's info.name is the very pointer of the
// instance it stands for, so a kernel finds its instance by it.
#pragma once
#include <vector>

#include "registry.h"

namespace flashcore::sm90 {

namespace fwd {
std::vector<Kernel> table();
}
namespace bwd {
std::vector<Kernel> table();
}

// True if any device of this machine can run a Hopper kernel.
bool any_hopper();

}  // namespace flashcore::sm90
