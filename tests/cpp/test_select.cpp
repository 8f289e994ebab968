// One decision, three readers: the launch, the workspace size and explain() agree.
#include "select.h"

#include <cstdlib>

#include "array.h"
#include "check.h"
#include "common/error.h"
#include "validate.h"

using namespace flashcore;
using check::Array;

namespace {

struct Call {
  Array<float> q{{1, 3, 2, 8}}, k{{1, 5, 2, 8}}, v{{1, 5, 2, 8}};
  flashcore_attention_args args{};
  Call() {
    args.struct_size = sizeof args;
    args.q = q;
    args.k = k;
    args.v = v;
  }
  Problem problem() const { return validate(&args, Stage::plan); }
};

}  // namespace

TEST("the first kernel that does not refuse is selected") {
  Call c;
  Problem const p = c.problem();
  const Kernel* first = nullptr;
  int visited = 0;
  visit_kernels(p, [&](const Kernel& k, const std::string& refusal) {
    ++visited;
    CHECK_EQ(static_cast<int>(k.info.direction), static_cast<int>(FLASHCORE_FORWARD));
    CHECK_EQ(std::string(k.info.backend), "cpu");
    if (refusal.empty() && !first) first = &k;
    if (std::string(k.info.dtype) != "float32") CHECK(!refusal.empty());
    if (!k.info.usable) CHECK(!refusal.empty());
  });
  CHECK(visited > 0);
  CHECK(select(p).kernel == first);
}

TEST("the plan of the C ABI is the same decision") {
  Call c;
  flashcore_plan plan{};
  plan.struct_size = sizeof plan;
  CHECK_EQ(static_cast<int>(flashcore_attention_plan(&c.args, &plan)), 0);
  Plan const decided = select(c.problem());
  CHECK_EQ(std::string(plan.kernel.name), decided.kernel->info.name);
  CHECK_EQ(plan.workspace_bytes, uint64_t{decided.workspace_bytes});
  CHECK_EQ(plan.num_splits, decided.num_splits);
  struct Seen {
    std::string accepted;
  } seen;
  flashcore_attention_explain(
      &c.args,
      [](void* user, const flashcore_kernel_info* k, const char* refusal) {
        auto& s = *static_cast<Seen*>(user);
        if (!refusal && s.accepted.empty()) s.accepted = k->name;
      },
      &seen);
  CHECK_EQ(seen.accepted, std::string(plan.kernel.name));
}

TEST("when every kernel refuses, the reasons are listed") {
  Call c;
  for (auto* a : {&c.q, &c.k, &c.v}) {
    a->dl.device = {kDLCUDA, 0};
    a->dl.dtype.bits = 64;  // no GPU kernel takes float64
  }
  try {
    select(c.problem());
    CHECK(false);
  } catch (const Failure& f) {
    CHECK_EQ(static_cast<int>(f.status), static_cast<int>(FLASHCORE_UNSUPPORTED));
    CHECK_CONTAINS(f.what(), "[attention] no kernel can run this call:");
    CHECK_CONTAINS(f.what(), "sm90");
  }
}

TEST("a device without merge is refused by name") {
  try {
    backend_for(kDLCUDA, "merge", [](const Backend&) { return false; });
    CHECK(false);
  } catch (const Failure& f) {
    CHECK_CONTAINS(f.what(), "[merge] is not built for this device");
  }
}

TEST_MAIN()
