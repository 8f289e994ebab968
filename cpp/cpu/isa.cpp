#include "cpu/isa.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "common/device_info.h"
#include "cpu/thread_pool.h"

namespace flashcore::cpu {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system (XGETBV) for the wider registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool always() { return true; }

constexpr Isa kIsas[] = {
    {"avx512_bf16", &kEntry_avx512_bf16, has_avx512_bf16},
    {"avx512", &kEntry_avx512, has_avx512},
    {"avx2", &kEntry_avx2, has_avx2},
    {"baseline", &kEntry_baseline, always},
};
#elif defined(__aarch64__)
constexpr Isa kIsas[] = {{"neon", &kEntry_neon, [] { return true; }}};
#else
constexpr Isa kIsas[] = {{"baseline", &kEntry_baseline, [] { return true; }}};
#endif

}  // namespace

std::span<const Isa> isas() { return kIsas; }

std::string isa_refusal(size_t index) {
  static const std::string cap = [] {
    const char* text = std::getenv("FLASHCORE_CPU_ISA");
    return std::string(text ? text : "");
  }();
  if (!kIsas[index].supported())
    return std::string("needs the instruction set ") + kIsas[index].name +
           ", which this processor or operating system does not offer";
  if (cap.empty()) return "";
  std::string names;
  for (size_t i = 0; i < std::size(kIsas); ++i) {
    if (cap == kIsas[i].name)
      return index >= i ? "" : "the environment variable FLASHCORE_CPU_ISA=" + cap + " excludes it";
    names += std::string(i ? ", " : "") + kIsas[i].name;
  }
  return "the environment variable FLASHCORE_CPU_ISA=" + cap + " is not one of " + names;
}

}  // namespace flashcore::cpu

namespace flashcore {
namespace {

// "AMD EPYC 9B14", as the kernel reports it.
std::string processor_name() {
  std::string line;
  for (std::ifstream f("/proc/cpuinfo"); std::getline(f, line);)
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
      return line.substr(line.find(": ") + 2);
  return "CPU";
}

}  // namespace

void append_cpu_devices(std::vector<flashcore_device_info>& devices) {
  flashcore_device_info info{};
  info.struct_size = sizeof info;
  info.device = {kDLCPU, 0};
  std::snprintf(info.name, sizeof info.name, "%s", processor_name().c_str());
  const char* isa = "none";
  for (size_t i = cpu::isas().size(); i-- > 0;)
    if (cpu::isa_refusal(i).empty()) isa = cpu::isas()[i].name;
  std::snprintf(info.isa, sizeof info.isa, "%s", isa);
  info.multiprocessors = flashcore_get_num_threads();
  long const pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) info.memory_bytes = static_cast<uint64_t>(pages) * page;
  devices.push_back(info);
}

}  // namespace flashcore
