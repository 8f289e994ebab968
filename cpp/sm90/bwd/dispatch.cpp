// The backward kernels' table: what each takes, how it is planned and launched.
#include <string>

#include "common/error.h"
#include "common/text.h"
#include "flashcore/flashcore.h"
#include "sm90/backend.h"
#include "sm90/bwd/config.h"
#include "sm90/tensor_map.h"
#include "tile/block_range.h"

namespace flashcore::sm90::bwd {
namespace {

// Queries, dO and the sums of dQ of the heads that run at the same time should stay in L2 (60 MB on
// an H200, in two halves that may both hold a line).
constexpr int64_t kL2Budget = int64_t{32} << 20;

// What a tile costs besides its query blocks, in query blocks: K and V, the first scores, dK and
// dV.
constexpr double kTileOverhead = 2.0;

struct Instance {
  BwdConfig config;
  void (*launch)(const BwdParams&, int blocks, int device, cudaStream_t);
};

using enum DType;
constexpr Instance kInstances[] = {
#define BWD(...) {BwdConfig{__VA_ARGS__}, launch<BwdConfig{__VA_ARGS__}>},
#include "sm90/bwd/instances.def"
#undef BWD
};

const Instance& instance_of(const Kernel& kernel) {
  return *static_cast<const Instance*>(kernel.instance);
}

// What no instance does yet, in the caller's words; empty if the problem asks for none of it.
std::string unbuilt(const Problem& p) {
  auto refuse = [](const char* what) {
    return text("the backward pass of ", what, " is not built for sm90 yet; on the CPU it is");
  };
  if (p.cu_seqlens_q) return refuse("packed sequences (cu_seqlens_q)");
  if (p.seqlens_q || p.seqlens_k) return refuse("padded lengths (seqlens_q, seqlens_k)");
  if (p.softcap > 0) return refuse("softcap");
  if (p.alibi_slopes) return refuse("alibi_slopes");
  if (p.bias) return refuse("bias");
  if (p.mask) return refuse("mask");
  if (p.sinks) return refuse("sinks");
  if (p.q_blocks || p.kv_blocks) return refuse("block_mask");
  if (p.dropout_threshold) return refuse("dropout");
  return {};
}

std::string refusal(const Kernel& kernel, const Problem& p) {
  BwdConfig const& c = instance_of(kernel).config;
  if (std::string why = misfit(p, c.dtype, c.head_dim, c.head_dim); !why.empty()) return why;
  if (std::string why = unbuilt(p); !why.empty()) return why;
  if (!(p.scale > 0)) return text("scale must be positive, got ", p.scale);
  const struct {
    const char* name;
    const Rows& rows;
    int64_t seqlen, heads;
    bool input;
  } tensors[] = {{"q", p.q, p.seqlen_q, p.num_heads_q, true},
                 {"k", p.k, p.seqlen_k, p.num_heads_kv, true},
                 {"v", p.v, p.seqlen_k, p.num_heads_kv, true},
                 {"out", p.out, p.seqlen_q, p.num_heads_q, true},
                 {"dout", p.dout, p.seqlen_q, p.num_heads_q, true},
                 {"dq", p.dq, p.seqlen_q, p.num_heads_q, false},
                 {"dk", p.dk, p.seqlen_k, p.num_heads_kv, false},
                 {"dv", p.dv, p.seqlen_k, p.num_heads_kv, false}};
  for (auto const& t : tensors) {
    if (!t.rows) continue;
    if (t.input && t.rows.dtype != p.dtype)
      return text(t.name, " must be ", dtype_name(p.dtype), " on sm90, got ",
                  dtype_name(t.rows.dtype), ": convert it first");
    if (std::string why = not_copyable(t.name, t.rows, p.batch, t.seqlen, t.heads); !why.empty())
      return why;
  }
  return {};
}

// How a problem is divided among the blocks of a launch, and where things are in the workspace.
struct Division {
  int64_t m_blocks, n_blocks, pairs;  // pairs: of batch and key head
  int blocks;
  bool whole_heads;
  int64_t minus_lse, minus_delta, bytes;  // offsets in bytes; the sums of dQ come first

  Division(const BwdConfig& c, const Problem& p) {
    m_blocks = ceil_div<int64_t>(p.seqlen_q, c.block_m);
    n_blocks = ceil_div<int64_t>(p.seqlen_k, c.block_n);
    pairs = p.batch * p.num_heads_kv;
    int const processors = cuda::devices()[p.device_id].multiprocessors;
    whole_heads = p.deterministic || n_blocks <= 1;
    blocks = static_cast<int>(
        min_of<int64_t>(whole_heads && n_blocks > 0 ? pairs : pairs * n_blocks, processors));
    int64_t const rows = p.batch * p.num_heads_q * m_blocks * c.block_m;
    int64_t const slots =
        whole_heads ? blocks * (p.num_heads_q / p.num_heads_kv) : p.batch * p.num_heads_q;
    minus_lse = slots * m_blocks * c.block_m * c.head_dim * 4;
    minus_delta = minus_lse + rows * 4;
    bytes = minus_delta + rows * 4;
  }
};

void plan(const Kernel& kernel, const Problem& p, Plan& plan) {
  Division const d(instance_of(kernel).config, p);
  plan.workspace_bytes = static_cast<size_t>(d.bytes);
  plan.num_splits = 1;
  plan.deterministic = d.whole_heads;  // else key tiles add to dQ in any order
}

void launch_problem(const Kernel& kernel, const Problem& p, const Plan&, void* memory,
                    void* stream) {
  Instance const& instance = instance_of(kernel);
  BwdConfig const& c = instance.config;
  if (p.batch == 0) return;
  cuda::DeviceGuard const guard(p.device_id);
  Division const d(c, p);

  BwdParams params{};
  bool const any_keys = p.seqlen_k > 0, any_rows = p.seqlen_q > 0;
  if (any_keys) {  // else nothing is ever fetched
    params.k = tensor_map(p.k, p.dtype, p.head_dim, p.seqlen_k, p.num_heads_kv, p.batch, c.block_n);
    params.v =
        tensor_map(p.v, p.dtype, p.head_dim_v, p.seqlen_k, p.num_heads_kv, p.batch, c.block_n);
  }
  if (any_rows) {
    params.q = tensor_map(p.q, p.dtype, p.head_dim, p.seqlen_q, p.num_heads_q, p.batch, c.block_m);
    params.dout =
        tensor_map(p.dout, p.dtype, p.head_dim_v, p.seqlen_q, p.num_heads_q, p.batch, c.block_m);
  }
  auto matrix = [](const Rows& r) {
    return Matrix{r.data, r.batch_stride, r.row_stride, r.head_stride, r.dtype == DType::f32};
  };
  params.out_ref = matrix(p.out);
  params.dout_ref = matrix(p.dout);
  params.dq = matrix(p.dq);
  params.dk = matrix(p.dk);
  params.dv = matrix(p.dv);
  params.lse = static_cast<const float*>(p.lse.data);
  params.lse_batch_stride = p.lse.batch_stride;
  params.lse_head_stride = p.lse.head_stride;
  params.dlse = static_cast<const float*>(p.dlse.data);
  params.dlse_batch_stride = p.dlse.batch_stride;
  params.dlse_head_stride = p.dlse.head_stride;
  auto part = [&](int64_t offset) {
    return reinterpret_cast<float*>(static_cast<char*>(memory) + offset);
  };
  params.dq_sum = part(0);
  params.minus_lse = part(d.minus_lse);
  params.minus_delta = part(d.minus_delta);
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  params.batch = static_cast<int>(p.batch);
  params.heads = static_cast<int>(p.num_heads_q);
  params.seqlen_q = static_cast<int>(p.seqlen_q);
  params.seqlen_k = static_cast<int>(p.seqlen_k);
  params.m_blocks = static_cast<int>(d.m_blocks);
  params.head_dim = static_cast<int>(p.head_dim);
  params.head_dim_v = static_cast<int>(p.head_dim_v);
  params.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  params.q_offset = p.has_q_offset ? p.q_offset : p.top_left ? 0 : p.seqlen_k - p.seqlen_q;
  params.q_offset_tensor = p.q_offset_tensor;
  params.window = p.window;
  params.accumulate = p.accumulate;

  params.whole_heads = d.whole_heads;

  int64_t const most = max_of(d.pairs * d.n_blocks, p.batch * p.num_heads_q * d.m_blocks);
  if (most > INT32_MAX)
    throw Failure(FLASHCORE_UNSUPPORTED,
                  text("[attention_backward] ", most, " tiles exceed 2^31 - 1"));
  // With no mask, tiles of one head side by side: they read the same queries at the same time. With
  // one, their costs differ, and what counts is that every block is dealt its share.
  params.scheduler = {static_cast<int>(d.n_blocks), static_cast<int>(p.num_heads_kv),
                      static_cast<int>(d.pairs), 1};
  if (!p.window.open() && !d.whole_heads) {
    int64_t const head_bytes =
        p.seqlen_q * params.group * ((p.head_dim + p.head_dim_v) * 2 + c.head_dim * 4);
    int const largest = tile::section_pairs(head_bytes, 1, static_cast<int>(d.pairs), kL2Budget);
    params.scheduler.section_pairs =
        tile::balanced_section(params.scheduler, largest, 1, d.blocks, [&](int block) {
          int64_t const key = (d.n_blocks - 1 - block) * c.block_n;
          auto const rows = tile::row_blocks(p.window, key, min_of(key + c.block_n, p.seqlen_k),
                                             params.q_offset, p.seqlen_q, c.block_m);
          return static_cast<double>((rows.last - rows.first) * params.group) + kTileOverhead;
        });
  }
  instance.launch(params, d.blocks, p.device_id, static_cast<cudaStream_t>(stream));
}

}  // namespace

std::vector<Kernel> table() {
  static std::vector<std::string> names;  // rows point into it
  names.reserve(std::size(kInstances));
  bool const usable = any_hopper();
  std::vector<Kernel> rows;
  for (Instance const& i : kInstances) {
    BwdConfig const& c = i.config;
    names.push_back(text("sm90-bwd-", c.dtype == bf16 ? "bf16" : "f16", "-d", c.head_dim, "-",
                         c.block_m, "x", c.block_n));
    flashcore_kernel_info info{};
    info.struct_size = sizeof info;
    info.direction = FLASHCORE_BACKWARD;
    info.name = names.back().c_str();
    info.backend = "sm90";
    info.isa = "sm_90a";
    info.dtype = dtype_name(c.dtype);
    info.mask = "window";
    info.head_dim = info.head_dim_v = c.head_dim;
    info.block_m = c.block_m;
    info.block_n = c.block_n;
    info.usable = usable;
    rows.push_back({info, refusal, plan, launch_problem, &i});
  }
  return rows;
}

}  // namespace flashcore::sm90::bwd
