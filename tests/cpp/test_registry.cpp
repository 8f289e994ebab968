// The table of backends and kernels: what every other part assumes about it.
#include "registry.h"

#include <set>
#include <string>

#include "check.h"

using namespace flashcore;

TEST("backends are named once and serve a device") {
  std::set<std::string> names;
  for (const Backend* b : backends()) {
    CHECK(names.insert(b->name).second);
    CHECK(b->device_type == kDLCPU || b->device_type == kDLCUDA);
    CHECK(b->note != nullptr);
    CHECK(!b->kernels().empty() || *b->note);  // an empty list says why
  }
  CHECK(names.count("cpu") == 1);
  CHECK(names.count("sm90") == 1);
}

TEST("kernels have unique names and complete rows") {
  std::set<std::string> names;
  for (const Backend* b : backends())
    for (const Kernel& k : b->kernels()) {
      CHECK(names.insert(k.info.name).second);
      CHECK_EQ(std::string(k.info.backend), b->name);
      CHECK(*k.info.isa && *k.info.dtype && *k.info.mask);
      CHECK(k.refusal && k.plan && k.launch);
      CHECK(k.info.block_m > 0 && k.info.block_n > 0);
      CHECK(std::string(k.info.name).find(b->name) == 0);
    }
}

TEST("the CPU has a usable kernel for every dtype in both directions") {
  std::set<std::string> found;
  for (const Kernel& k : cpu_backend().kernels())
    if (k.info.usable) found.insert(k.info.dtype + std::to_string(k.info.direction));
  CHECK_EQ(found.size(), size_t{8});
  CHECK(cpu_backend().merge != nullptr);
  CHECK(cpu_backend().dropout_mask != nullptr);
}

TEST_MAIN()
