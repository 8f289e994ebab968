// Selection over kernels made for the test: which of several that accept a problem runs.
#include <string>

#include "check.h"
#include "common/error.h"
#include "select.h"

using namespace flashcore;

namespace {

std::string accept(const Kernel&, const Problem&) { return ""; }
std::string refuse(const Kernel&, const Problem&) { return "is for another day"; }
void atomic(const Kernel&, const Problem&, Plan& plan) { plan.deterministic = false; }
void ordered(const Kernel&, const Problem&, Plan& plan) { plan.workspace_bytes = 512; }
void launch(const Kernel&, const Problem&, const Plan&, void*, void*) {}

int asked = 0;  // how often a kernel was asked for a text
std::string count_and_refuse(const Kernel&, const Problem&) {
  ++asked;
  return "is for smaller heads";
}

flashcore_kernel_info info(const char* name, const char* dtype = "float32", int head_dim = 0,
                           int head_dim_v = 0) {
  flashcore_kernel_info k{};
  k.name = name;
  k.dtype = dtype;
  k.head_dim = head_dim;
  k.head_dim_v = head_dim_v;
  k.backend = "test";
  k.direction = FLASHCORE_FORWARD;
  return k;
}

const Kernel kernels[] = {
    {info("half", "float16"), accept, ordered, launch},
    {info("small", "float32", 64, 64), count_and_refuse, ordered, launch},
    {info("narrow", "float32", 128, 64), count_and_refuse, ordered, launch},
    {info("busy"), refuse, ordered, launch},
    {info("fast"), accept, atomic, launch},
    {info("steady"), accept, ordered, launch},
};
const Kernel* end_of_kernels = std::end(kernels);

Backend const backend{
    "test", kDLCPU,  [] { return std::span(std::begin(kernels), end_of_kernels); },
    "",     nullptr, nullptr};

}  // namespace

namespace flashcore {
std::span<const Backend* const> backends() {
  static const Backend* const list[] = {&backend};
  return list;
}
}  // namespace flashcore

TEST("the first kernel of the dtype that accepts runs") {
  Problem p;
  CHECK_EQ(std::string(select(p).kernel->info.name), "fast");
}

TEST("a kernel for smaller heads is passed over without a text") {
  Problem p;
  p.head_dim = p.head_dim_v = 128;
  asked = 0;
  CHECK_EQ(std::string(select(p).kernel->info.name), "fast");
  CHECK_EQ(asked, 0);
  p.head_dim = p.head_dim_v = 64;
  CHECK_EQ(std::string(select(p).kernel->info.name), "fast");
  CHECK_EQ(asked, 2);
}

TEST("deterministic=True goes on to the first kernel that is") {
  Problem p;
  p.deterministic = true;
  Plan const plan = select(p);
  CHECK_EQ(std::string(plan.kernel->info.name), "steady");
  CHECK_EQ(plan.workspace_bytes, size_t{512});
  CHECK(plan.deterministic);
}

TEST("explain says which kernels are not deterministic") {
  Problem p;
  p.deterministic = true;
  std::string reasons;
  visit_kernels(p, [&](const Kernel& k, const std::string& refusal) {
    reasons += std::string(k.info.name) + ": " + refusal + "\n";
  });
  CHECK_CONTAINS(reasons, "busy: is for another day\n");
  CHECK_CONTAINS(reasons, "fast: deterministic=True: it is not bitwise repeatable here\n");
  CHECK_CONTAINS(reasons, "steady: \n");
}

TEST("when none is deterministic, the reason is given") {
  Problem p;
  p.deterministic = true;
  end_of_kernels = kernels + 5;  // without "steady"
  try {
    select(p);
    CHECK(false);
  } catch (const Failure& f) {
    CHECK_EQ(static_cast<int>(f.status), static_cast<int>(FLASHCORE_UNSUPPORTED));
    CHECK_CONTAINS(f.what(), "fast: deterministic=True");
  }
  end_of_kernels = std::end(kernels);
}

TEST_MAIN()
