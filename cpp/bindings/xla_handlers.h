// The functions that XLA calls: one for each direction and platform.
#pragma once
#include "bindings/xla_abi.h"
#include "flashcore/flashcore.h"

namespace flashcore::xla {

// device: kDLCPU or kDLCUDA.
Handler* handler(flashcore_direction direction, DLDeviceType device);

}  // namespace flashcore::xla
