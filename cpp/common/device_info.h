// What this machine can run on. Each list has one definition per device type: cpp/cpu/isa.cpp for
// the CPU, cpp/cuda/device.cpp or missing/no_cuda.cpp for CUDA.
#pragma once
#include <vector>

#include "flashcore/flashcore.h"

namespace flashcore {

void append_cpu_devices(std::vector<flashcore_device_info>& devices);
void append_cuda_devices(std::vector<flashcore_device_info>& devices);

}  // namespace flashcore
