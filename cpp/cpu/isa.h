// Which builds of the kernels this machine can run.
#pragma once
#include <span>
#include <string>

#include "cpu/entry.h"

namespace flashcore::cpu {

struct Isa {
  const char* name;
  const IsaEntry* entry;
  bool (*supported)();  // by the processor and the operating system
};

// Best first. Only the instruction sets of the architecture compiled for.
std::span<const Isa> isas();

// Why the kernels of isas()[index] may not run here: "" if they may. The environment variable
// FLASHCORE_CPU_ISA names the best instruction set to use.
std::string isa_refusal(size_t index);

}  // namespace flashcore::cpu
