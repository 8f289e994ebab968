// The Hopper backend's table: what each forward kernel takes, how it is planned and launched.
#include <string>
#include <vector>

#include "common/error.h"
#include "common/text.h"
#include "cuda/device.h"
#include "registry.h"
#include "sm90/fwd/instances.h"
#include "tile/block_range.h"

namespace flashcore {
namespace sm90::fwd {
namespace {

// Keys and values of the heads that run at the same time should stay in L2 (60 MB on an H200, in
// two halves that may both hold a line).
constexpr int64_t kL2Budget = int64_t{32} << 20;

// What a tile costs besides its key blocks, in key blocks: the first product, the last, the store.
constexpr double kTileOverhead = 1.5;

using Launch = void (*)(const FwdParams&, int blocks, int device, cudaStream_t);

struct Instance {
  FwdConfig config;
  const char* name;
  Launch launch;
};

constexpr Instance kInstances[] = {
#define FWD(dtype, head_dim, mask, m, n, stages, q_stages)    \
  {FWD_CONFIG(dtype, head_dim, mask, m, n, stages, q_stages), \
   "sm90-fwd-" #dtype "-d" #head_dim "-" #mask,               \
   FWD_SYMBOL(dtype, head_dim, mask, m, n, stages, q_stages)},
#include "sm90/fwd/instances.def"
#undef FWD
};

const Instance& instance_of(const Kernel& kernel);

bool is_hopper(int device) {
  auto const devices = cuda::devices();
  return device >= 0 && device < static_cast<int>(devices.size()) && devices[device].major == 9;
}

// What no instance does yet, in the caller's words; empty if the problem asks for none of it.
std::string unbuilt(const Problem& p) {
  auto refuse = [](const char* what) {
    return text(what, " not built for sm90 yet; on the CPU it is");
  };
  if (p.cu_seqlens_q) return refuse("packed sequences (cu_seqlens_q) are");
  if (p.seqlens_q || p.seqlens_k) return refuse("padded lengths (seqlens_q, seqlens_k) are");
  if (p.softcap > 0) return refuse("softcap is");
  if (p.alibi_slopes) return refuse("alibi_slopes is");
  if (p.bias) return refuse("bias is");
  if (p.mask) return refuse("mask is");
  if (p.sinks) return refuse("sinks is");
  if (p.kv_blocks) return refuse("block_mask is");
  if (p.dropout_threshold) return refuse("dropout is");
  if (p.max_logits) return refuse("max_logits is");
  if (p.window.left < tile::Window::kOpen) return refuse("window_size with a left side is");
  if (p.num_splits > 1) return refuse("num_splits > 1 is");
  return {};
}

// The copy engine wants 16-byte aligned bases and strides; empty if it can take the tensor.
std::string not_copyable(const char* name, const Rows& r, int64_t batch, int64_t rows,
                         int64_t heads) {
  if (reinterpret_cast<uintptr_t>(r.data) % 16 != 0)
    return text(name, " must start at a multiple of 16 bytes for the copy engine");
  const struct {
    const char* dim;
    int64_t extent, stride;
  } dims[] = {{"batch", batch, r.batch_stride},
              {"seqlen", rows, r.row_stride},
              {"heads", heads, r.head_stride}};
  for (auto const& d : dims)
    if (d.extent > 1 && (d.stride <= 0 || d.stride % 8 != 0 || d.stride >= int64_t{1} << 39))
      return text(name, "'s ", d.dim, " stride must be a positive multiple of 8 elements, got ",
                  d.stride, ": pass a contiguous copy");
  return {};
}

std::string refusal(const Kernel& kernel, const Problem& p) {
  FwdConfig const& c = instance_of(kernel).config;
  if (!is_hopper(p.device_id))
    return text("needs a GPU of compute capability 9.0; cuda:", p.device_id, " is another");
  if (p.dtype != DType::f16 && p.dtype != DType::bf16)
    return text("takes float16 and bfloat16, got ", dtype_name(p.dtype));
  if (p.dtype != c.dtype) return text("takes ", dtype_name(c.dtype));
  const struct {
    const char* name;
    int64_t size;
  } head_dims[] = {{"head_dim", p.head_dim}, {"v's head_dim", p.head_dim_v}};
  for (auto const& d : head_dims) {
    if (d.size % 8 != 0)
      return text(d.name, " must be a multiple of 8, got ", d.size, ": pad to ",
                  round_up<int64_t>(d.size, 8));
    if (d.size > c.head_dim)
      return text("takes a ", d.name, " up to ", c.head_dim, ", got ", d.size);
  }
  if (std::string why = unbuilt(p); !why.empty()) return why;
  if (c.mask == Mask::none && p.window.right < tile::Window::kOpen) return "has no causal mask";
  if (!(p.scale > 0)) return text("scale must be positive, got ", p.scale);
  if (p.out && p.out.dtype != p.dtype)
    return "out in float32 is not built for sm90 yet; on the CPU it is";
  const struct {
    const char* name;
    const Rows& rows;
    int64_t seqlen, heads;
  } tensors[] = {{"q", p.q, p.seqlen_q, p.num_heads_q},
                 {"k", p.k, p.seqlen_k, p.num_heads_kv},
                 {"v", p.v, p.seqlen_k, p.num_heads_kv},
                 {"out", p.out, p.seqlen_q, p.num_heads_q}};
  for (auto const& t : tensors)
    if (t.rows)
      if (std::string why = not_copyable(t.name, t.rows, p.batch, t.seqlen, t.heads); !why.empty())
        return why;
  return {};
}

void plan(const Kernel&, const Problem&, Plan& plan) {
  plan.workspace_bytes = 0;
  plan.num_splits = 1;
  plan.deterministic = true;
}

// A tensor as (head_dim, rows, heads, batch) with a box of box_rows rows and one panel of columns.
CUtensorMap tensor_map(const Rows& r, DType dtype, int64_t cols, int64_t rows, int64_t heads,
                       int64_t batch, int box_rows) {
  auto bytes = [](int64_t extent, int64_t stride) {
    return static_cast<uint64_t>(extent > 1 ? stride * 2 : 16);  // any legal stride: never used
  };
  auto u = [](int64_t n) { return static_cast<uint64_t>(n); };
  return cuda::encode_tensor_map(
      {r.data,
       dtype == DType::bf16,
       4,
       {u(cols), u(rows), u(heads), u(batch)},
       {bytes(rows, r.row_stride), bytes(heads, r.head_stride), bytes(batch, r.batch_stride)},
       {64, static_cast<uint32_t>(box_rows), 1, 1}});
}

void launch(const Kernel& kernel, const Problem& p, const Plan&, void*, void* stream) {
  Instance const& instance = instance_of(kernel);
  FwdConfig const& c = instance.config;
  if (p.batch == 0 || p.seqlen_q == 0) return;
  cuda::DeviceGuard const guard(p.device_id);

  FwdParams params{};
  params.q = tensor_map(p.q, p.dtype, p.head_dim, p.seqlen_q, p.num_heads_q, p.batch, c.block_m);
  if (p.seqlen_k > 0) {  // else no key block is ever fetched
    params.k = tensor_map(p.k, p.dtype, p.head_dim, p.seqlen_k, p.num_heads_kv, p.batch, c.block_n);
    params.v =
        tensor_map(p.v, p.dtype, p.head_dim_v, p.seqlen_k, p.num_heads_kv, p.batch, c.block_n);
  } else {
    params.k = params.v = params.q;
  }
  params.out = tensor_map(p.out, p.dtype, p.head_dim_v, p.seqlen_q, p.num_heads_q, p.batch, 16);
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
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  params.seqlen_q = static_cast<int>(p.seqlen_q);
  params.seqlen_k = static_cast<int>(p.seqlen_k);
  params.head_dim = static_cast<int>(p.head_dim);
  params.head_dim_v = static_cast<int>(p.head_dim_v);
  params.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  params.q_offset = p.has_q_offset ? p.q_offset : p.top_left ? 0 : p.seqlen_k - p.seqlen_q;
  params.q_offset_tensor = p.q_offset_tensor;
  params.window = p.window;

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
  if (c.mask != Mask::none && params.scheduler.num_tiles() > blocks)
    params.scheduler.section_pairs =
        tile::balanced_section(params.scheduler, largest, params.group, blocks, [&](int m_block) {
          int64_t const row = int64_t{m_block} * c.block_m;
          auto const keys = tile::key_blocks(p.window, row, min_of(row + c.block_m, p.seqlen_q),
                                             params.q_offset, p.seqlen_k, c.block_n);
          return static_cast<double>(keys.last - keys.first) + kTileOverhead;
        });
  instance.launch(params, blocks, p.device_id, static_cast<cudaStream_t>(stream));
}

std::span<const Kernel> kernels() {
  static const std::vector<Kernel> table = [] {
    bool any_hopper = false;
    for (auto const& device : cuda::devices()) any_hopper |= device.major == 9;
    std::vector<Kernel> rows;
    for (Instance const& i : kInstances) {
      flashcore_kernel_info info{};
      info.struct_size = sizeof info;
      info.direction = FLASHCORE_FORWARD;
      info.name = i.name;
      info.backend = "sm90";
      info.isa = "sm_90a";
      info.dtype = dtype_name(i.config.dtype);
      info.mask = i.config.mask == Mask::none ? "none" : "causal";
      info.head_dim = info.head_dim_v = i.config.head_dim;
      info.block_m = i.config.block_m;
      info.block_n = i.config.block_n;
      info.usable = any_hopper;
      rows.push_back({info, refusal, plan, launch});
    }
    return rows;
  }();
  return table;
}

const Instance& instance_of(const Kernel& kernel) { return kInstances[&kernel - kernels().data()]; }

}  // namespace
}  // namespace sm90::fwd

const Backend& sm90_backend() {
  static const Backend backend{"sm90", kDLCUDA, sm90::fwd::kernels, "", nullptr, nullptr};
  return backend;
}

}  // namespace flashcore
