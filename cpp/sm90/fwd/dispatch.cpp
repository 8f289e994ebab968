// The forward kernels' table: what each takes, how it is planned and launched.
#include <array>
#include <string>
#include <vector>

#include "common/error.h"
#include "common/text.h"
#include "sm90/backend.h"
#include "sm90/fwd/config.h"
#include "sm90/tensor_map.h"
#include "tile/block_range.h"
#include "tile/seqlen.h"

namespace flashcore::sm90::fwd {
namespace {

// Keys and values of the heads that run at the same time should stay in L2 (60 MB on an H200, in
// two halves that may both hold a line).
constexpr int64_t kL2Budget = int64_t{32} << 20;

// Longer ones would overflow what a tile knows about itself (work.cuh).
constexpr int64_t kLongest = int64_t{1} << 29;

constexpr double kLog2E = 1.4426950408889634;

// What a tile costs besides its key blocks, in key blocks: the first product, the last, the store.
constexpr double kTileOverhead = 1.5;

struct Instance {
  FwdConfig config;
  void (*launch)(const FwdParams&, int blocks, int device, cudaStream_t);
};

using enum DType;
using enum Mask;
constexpr Instance kInstances[] = {
#define FWD(...) {FwdConfig{__VA_ARGS__}, launch<FwdConfig{__VA_ARGS__}>},
#include "sm90/fwd/instances.def"
#undef FWD
};

const Instance& instance_of(const Kernel& kernel) {
  return *static_cast<const Instance*>(kernel.instance);
}

// What no instance does yet, in the caller's words; empty if the problem asks for none of it.
std::string unbuilt(const Problem& p) {
  auto refuse = [](const char* what) {
    return text(what, " not built for sm90 yet; on the CPU it is");
  };
  if (p.bias) return refuse("bias is");
  if (p.mask) return refuse("mask is");
  if (p.kv_blocks) return refuse("block_mask is");
  if (p.max_logits) return refuse("max_logits is");
  if (p.num_splits > 1) return refuse("num_splits > 1 is");
  return {};
}

// What the copy engine reads and writes. A packed tensor is one long sequence to it.
struct Operand {
  const char* name;
  Rows rows;
  int64_t batch, seqlen, heads;
};
std::array<Operand, 4> operands(const Problem& p) {
  bool const packed_q = p.cu_seqlens_q, packed_k = p.cu_seqlens_k;
  int64_t const batch_q = packed_q ? 1 : p.batch, rows_q = packed_q ? p.total_q : p.seqlen_q;
  int64_t const batch_k = packed_k ? 1 : p.batch, rows_k = packed_k ? p.total_k : p.seqlen_k;
  return {{{"q", p.q, batch_q, rows_q, p.num_heads_q},
           {"k", p.k, batch_k, rows_k, p.num_heads_kv},
           {"v", p.v, batch_k, rows_k, p.num_heads_kv},
           {"out", p.out, batch_q, rows_q, p.num_heads_q}}};
}

// What only kernels with terms compute.
bool has_terms(const Problem& p) {
  return p.softcap > 0 || p.alibi_slopes || p.dropout_threshold;
}

std::string refusal(const Kernel& kernel, const Problem& p) {
  FwdConfig const& c = instance_of(kernel).config;
  if (std::string why = misfit(p, c.dtype, c.head_dim, c.head_dim_v); !why.empty()) return why;
  if (std::string why = unbuilt(p); !why.empty()) return why;
  if (has_terms(p) && !c.terms) return "has no softcap, ALiBi or dropout";
  if (c.mask == none && !p.window.open()) return "has no causal mask and no window";
  if (max_of(p.seqlen_q, p.seqlen_k) > kLongest)
    return text("takes sequences of up to ", kLongest, " rows");
  if (p.seqlen_k < c.from)
    return text("is for seqlen_k of at least ", c.from, ", got ", p.seqlen_k,
                ": another kernel is faster there");
  if (!(p.scale > 0)) return text("scale must be positive, got ", p.scale);
  if (p.out && p.out.dtype != p.dtype)
    return "out in float32 is not built for sm90 yet; on the CPU it is";
  for (Operand const& t : operands(p))
    if (t.rows)  // a plan may be asked for before there is an out
      if (std::string why = not_copyable(t.name, t.rows, t.batch, t.seqlen, t.heads); !why.empty())
        return why;
  return {};
}

void plan(const Kernel&, const Problem&, Plan& plan) {
  plan.workspace_bytes = 0;
  plan.num_splits = 1;
  plan.deterministic = true;
}

void launch_problem(const Kernel& kernel, const Problem& p, const Plan&, void*, void* stream) {
  Instance const& instance = instance_of(kernel);
  FwdConfig const& c = instance.config;
  if (p.batch == 0 || p.seqlen_q == 0) return;
  cuda::DeviceGuard const guard(p.device_id);

  FwdParams params{};
  auto const [q, k, v, out] = operands(p);
  auto map = [&](const Operand& t, int64_t cols, int box_rows) {
    return tensor_map(t.rows, p.dtype, cols, t.seqlen, t.heads, t.batch, box_rows);
  };
  params.q = map(q, p.head_dim, c.block_m);
  params.out = map(out, p.head_dim_v, 16);
  if (k.seqlen > 0) {  // else no key block is ever fetched
    params.k = map(k, p.head_dim, c.block_n);
    params.v = map(v, p.head_dim_v, c.block_n);
  } else {
    params.k = params.v = params.q;
  }
  auto ref = [](const Rows& r) {
    return MatrixRef{r.data, r.batch_stride, r.row_stride, r.head_stride};
  };
  params.q_ref = ref(p.q);
  params.k_ref = ref(p.k);
  params.v_ref = ref(p.v);
  params.out_ref = ref(p.out);
  params.lse = static_cast<float*>(p.lse.data);
  params.lse_batch_stride = p.lse.batch_stride;
  params.lse_head_stride = p.lse.head_stride;
  double const scale = p.softcap > 0 ? p.softcap : p.scale;  // see terms.cuh
  params.scale = static_cast<float>(scale);
  params.scale_log2 = static_cast<float>(scale * kLog2E);
  params.headroom = static_cast<float>(min_of(8.0 / (scale * kLog2E), 1e30));
  params.head_dim = static_cast<int>(p.head_dim);
  params.head_dim_v = static_cast<int>(p.head_dim_v);
  params.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  params.sinks = p.sinks;

  params.seqlen_q = static_cast<int>(p.seqlen_q);
  params.seqlen_k = static_cast<int>(p.seqlen_k);
  params.cu_seqlens_q = p.cu_seqlens_q;
  params.cu_seqlens_k = p.cu_seqlens_k;
  params.seqlens_q = p.seqlens_q;
  params.seqlens_k = p.seqlens_k;
  params.top_left = p.top_left;
  params.has_q_offset = p.has_q_offset;
  params.q_offset = p.q_offset;
  params.q_offset_tensor = p.q_offset_tensor;
  params.window = p.window;

  params.softcap_inner = p.softcap > 0 ? static_cast<float>(p.scale / p.softcap) : 0.0f;
  params.alibi_slopes = p.alibi_slopes;
  params.alibi_batch_stride = p.alibi_batch_stride;
  params.dropout_threshold = p.dropout_threshold;
  params.dropout_scale = static_cast<float>(p.dropout_scale);
  params.rng_seed = p.rng_seed;
  params.rng_offset = p.rng_offset;
  params.rng_tensor = p.rng_tensor;

  int64_t const pairs = p.batch * p.num_heads_q;
  int64_t const m_blocks = ceil_div<int64_t>(p.seqlen_q, c.block_m);
  if (pairs * m_blocks > INT32_MAX)
    throw Failure(FLASHCORE_UNSUPPORTED,
                  text("[attention] ", pairs * m_blocks, " query tiles exceed 2^31 - 1"));
  int64_t const kv_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2;
  int const largest =
      tile::section_pairs(kv_bytes, params.group, static_cast<int>(pairs), kL2Budget);
  params.scheduler = {static_cast<int>(m_blocks), static_cast<int>(p.num_heads_q),
                      static_cast<int>(pairs), largest};
  int const blocks =
      min_of(params.scheduler.num_tiles(), cuda::devices()[p.device_id].multiprocessors);
  tile::Sequence longest{0, 0, p.seqlen_q, p.seqlen_k, p.seqlen_k - p.seqlen_q};
  if (p.has_q_offset || p.top_left) longest.q_offset = p.has_q_offset ? p.q_offset : 0;
  if (c.mask == none)  // all tiles cost the same: neighbours share K and V, and nothing else counts
    params.scheduler.section_pairs = params.group;
  else if (params.scheduler.num_tiles() > blocks)
    params.scheduler.section_pairs =
        tile::balanced_section(params.scheduler, largest, params.group, blocks, [&](int m_block) {
          int64_t const row = int64_t{m_block} * c.block_m;
          auto const keys = tile::key_blocks(p.window, row, min_of(row + c.block_m, p.seqlen_q),
                                             longest.q_offset, p.seqlen_k, c.block_n);
          return static_cast<double>(keys.last - keys.first) + kTileOverhead;
        });
  instance.launch(params, blocks, p.device_id, static_cast<cudaStream_t>(stream));
}

}  // namespace

std::vector<Kernel> table() {
  static std::vector<std::string> names;  // rows point into it
  names.reserve(std::size(kInstances));
  bool const usable = any_hopper();
  std::vector<Kernel> rows;
  for (Instance const& i : kInstances) {
    FwdConfig const& c = i.config;
    const char* const mask = c.mask == none ? "none" : "causal";
    names.push_back(text("sm90-fwd-", c.dtype == bf16 ? "bf16" : "f16", "-d", c.head_dim, c.head_dim_v == c.head_dim ? "" : text("v", c.head_dim_v), "-", mask,
                         c.terms ? "-terms" : "", "-", c.block_m, "x", c.block_n));
    flashcore_kernel_info info{};
    info.struct_size = sizeof info;
    info.direction = FLASHCORE_FORWARD;
    info.name = names.back().c_str();
    info.backend = "sm90";
    info.isa = "sm_90a";
    info.dtype = dtype_name(c.dtype);
    info.mask = mask;
    info.head_dim = c.head_dim;
    info.head_dim_v = c.head_dim_v;
    info.block_m = c.block_m;
    info.block_n = c.block_n;
    info.usable = usable;
    rows.push_back({info, refusal, plan, launch_problem, &i});
  }
  return rows;
}

}  // namespace flashcore::sm90::fwd
