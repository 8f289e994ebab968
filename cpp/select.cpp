#include "select.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "common/text.h"

namespace flashcore {
namespace {

const char* call_name(Direction d) {
  return d == Direction::forward ? "[attention] " : "[attention_backward] ";
}

// FLASHCORE_FORCE=<kernel or backend name> leaves only those kernels: for tests and benchmarks.
// Read once, so that a call costs nothing and threads cannot race with setenv.
bool forced_out(const Kernel& k) {
  static const char* const forced = std::getenv("FLASHCORE_FORCE");
  return forced && *forced && std::strcmp(forced, k.info.name) != 0 &&
         std::strcmp(forced, k.info.backend) != 0;
}

Plan plan_of(const Kernel& k, const Problem& p) {
  Plan plan;
  plan.kernel = &k;
  k.plan(k, p, plan);
  return plan;
}

// Most kernels are for another dtype or for smaller heads, and to make a text that says so takes
// longer than the rest of a choice.
bool is_sized_for(const Kernel& k, const Problem& p) {
  auto const takes = [](int32_t largest, int64_t size) { return largest == 0 || size <= largest; };
  return std::strcmp(k.info.dtype, dtype_name(p.dtype)) == 0 &&
         takes(k.info.head_dim, p.head_dim) && takes(k.info.head_dim_v, p.head_dim_v);
}

std::string refusal_of(const Kernel& k, const Problem& p) {
  if (forced_out(k)) return "FLASHCORE_FORCE names another kernel";
  std::string reason = k.refusal(k, p);
  if (reason.empty() && p.deterministic && !plan_of(k, p).deterministic)
    reason = "deterministic=True: it is not bitwise repeatable here";
  return reason;
}

// Kernels that could be meant at all: the right device type and direction.
template <class F>
void for_each_candidate(const Problem& p, F f) {
  auto const direction = p.direction == Direction::forward ? FLASHCORE_FORWARD : FLASHCORE_BACKWARD;
  for (const Backend* backend : backends())
    if (backend->device_type == p.device_type)
      for (const Kernel& k : backend->kernels())
        if (k.info.direction == direction && f(k)) return;
}

// Why nothing runs: each distinct reason once, with the first kernel that gave it.
[[noreturn]] void fail_unsupported(const Problem& p) {
  std::vector<std::string> reasons;
  std::string list;
  for_each_candidate(p, [&](const Kernel& k) {
    std::string const reason = refusal_of(k, p);
    for (const std::string& seen : reasons)
      if (seen == reason) return false;
    reasons.push_back(reason);
    list += text("\n  ", k.info.name, ": ", reason);
    return false;
  });
  for (const Backend* backend : backends())
    if (backend->device_type == p.device_type && *backend->note)
      list += text("\n  ", backend->name, ": ", backend->note);
  if (list.empty())
    list = p.direction == Direction::forward
               ? " none is compiled for this device"
               : " there is no backward kernel for this device yet; CPU tensors have one";
  throw Failure(FLASHCORE_UNSUPPORTED,
                text(call_name(p.direction), "no kernel can run this call:", list));
}

}  // namespace

Plan select(const Problem& p) {
  Plan plan;
  for_each_candidate(p, [&](const Kernel& k) {
    if (!is_sized_for(k, p)) return false;
    if (!refusal_of(k, p).empty()) return false;
    plan = plan_of(k, p);
    return true;
  });
  if (!plan.kernel) fail_unsupported(p);
  return plan;
}

void visit_kernels(const Problem& p,
                   const std::function<void(const Kernel&, const std::string&)>& visit) {
  for_each_candidate(p, [&](const Kernel& k) {
    visit(k, refusal_of(k, p));
    return false;
  });
}

const Backend& backend_for(int device_type, const char* call,
                           const std::function<bool(const Backend&)>& has) {
  for (const Backend* backend : backends())
    if (backend->device_type == device_type && has(*backend)) return *backend;
  throw Failure(FLASHCORE_UNSUPPORTED,
                text("[", call, "] is not built for this device yet; CPU tensors work"));
}

}  // namespace flashcore
