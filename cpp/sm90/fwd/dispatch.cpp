// The forward kernels' table: what each takes, how it is planned and launched.
#include <array>
#include <string>
#include <vector>

#include "common/memo.h"
#include "common/text.h"
#include "cuda/merge.h"
#include "sm90/backend.h"
#include "sm90/fwd/config.h"
#include "sm90/order.h"
#include "sm90/tensor_map.h"
#include "tile/block_range.h"
#include "tile/seqlen.h"

namespace flashcore::sm90::fwd {
namespace {

// Keys and values of the heads that run at the same time, a section, should stay in L2 (60 MB on an
// H200, in two halves that may both hold a line) while Q and O stream through it: 16 MB of them,
// up to 32 where that is less than four heads.
constexpr int64_t kLeastSection = int64_t{16} << 20, kLargestSection = int64_t{32} << 20;

constexpr double kLog2E = 1.4426950408889634;

// What a tile costs besides its key blocks, in key blocks: the first product, the last, the store.
constexpr double kTileOverhead = 1.5;

struct Instance {
  FwdConfig config;
  void (*launch)(const FwdParams&, int blocks, int device, cudaStream_t);
};

using enum Calls;
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
  if (p.max_logits) return refuse("max_logits is");
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
bool has_terms(const Problem& p) { return p.softcap > 0 || p.alibi_slopes || p.dropout_threshold; }

// Why the kernel's tiles do not fit the blocks of the call's block mask; empty if they do.
std::string misfit_blocks(const FwdConfig& c, const Problem& p) {
  if (!p.kv_blocks) return c.mask == lists ? "is for calls with a block_mask" : "";
  if (std::string why = unfit_blocks(p); !why.empty()) return why;
  if (c.mask != lists) return "has no block_mask";
  if (p.block_q % c.block_m || p.block_k % c.block_n)
    return text("takes block masks with blocks of a multiple of ", c.block_m, " rows and ",
                c.block_n, " keys, got ", p.block_q, " x ", p.block_k);
  return {};
}

// The keys of a call in parts, so that few query tiles still fill the GPU.
struct Split {
  int count, blocks;  // parts; key blocks of each
};

Split split_keys(const FwdConfig& c, const Problem& p) {
  int const key_blocks = max_of(1, static_cast<int>(ceil_div<int64_t>(p.seqlen_k, c.block_n)));
  auto parts_of = [&](int blocks) { return Split{ceil_div(key_blocks, blocks), blocks}; };
  if (c.mask == lists) return {1, key_blocks};  // the lists say how many there are
  if (p.split_size > 0)
    return parts_of(
        static_cast<int>(min_of<int64_t>(ceil_div<int64_t>(p.split_size, c.block_n), key_blocks)));
  if (p.num_splits > 0) return parts_of(ceil_div(key_blocks, min_of(p.num_splits, key_blocks)));

  // Time in key blocks: the launch takes `rounds` of tiles on the multiprocessors, each of some
  // blocks and an overhead; a merge costs a launch, and reads what the parts wrote.
  constexpr int kMerge = 8, kFewest = 4;
  int64_t const tiles = ceil_div<int64_t>(p.seqlen_q, c.block_m) * p.batch * p.num_heads_q;
  int const sms = cuda::devices()[p.device_id].multiprocessors;
  Split best{1, key_blocks};
  if (tiles >= sms || tiles == 0 || p.window.left < tile::Window::kOpen) return best;
  double least = key_blocks + kTileOverhead;
  for (int n = 2; n <= key_blocks / kFewest && n <= 2 * sms; ++n) {
    Split const split = parts_of(ceil_div(key_blocks, n));
    int64_t const rounds = ceil_div<int64_t>(tiles * split.count, sms);
    double const time =
        static_cast<double>(rounds) * (split.blocks + kTileOverhead) + kMerge + 0.1 * split.count;
    if (time < least) {
      least = time;
      best = split;
    }
  }
  return best;
}

// The tiles there are; for a packed batch a bound.
int64_t most_tiles(const FwdConfig& c, const Problem& p) {
  return p.num_heads_q * (p.cu_seqlens_q ? p.total_q / c.block_m + p.batch
                                         : p.batch * ceil_div<int64_t>(p.seqlen_q, c.block_m));
}

// About how many keys a row sees, in the mean; of packed sequences of the mean length. It is a
// bound where rows do not face the last keys, lengths are padded or blocks are left out.
int64_t mean_keys(const Problem& p) {
  int64_t const sequences = max_of<int64_t>(1, p.batch);
  int64_t const rows = p.cu_seqlens_q ? p.total_q / sequences : p.seqlen_q;
  int64_t const keys = p.cu_seqlens_k ? p.total_k / sequences : p.seqlen_k;
  bool const causal = p.window.right < tile::Window::kOpen;
  return min_of(causal ? keys - min_of(rows, keys) / 2 : keys, p.window.left + p.window.right);
}

// Why another kernel that takes the call is faster; empty if none is. What each was compared with
// is in docs/kernels/sm90_fwd.md.
std::string unsuited(const FwdConfig& c, const Problem& p) {
  int64_t const processors = cuda::devices()[p.device_id].multiprocessors;
  int64_t const tiles = most_tiles(c, p);
  auto const divides_keys = [&] { return p.split_size > 0 || split_keys(c, p).count > 1; };
  auto const rounds = [&](int block_m) {
    return ceil_div(p.batch * p.num_heads_q * ceil_div<int64_t>(p.seqlen_q, block_m), processors);
  };
  switch (c.calls) {
    case all:
      return {};
    case few_tiles: {
      // With a mask tiles differ, and small ones fill the gaps.
      int64_t const most = (p.window.open() ? 1 : 2) * processors;
      if (tiles > most || divides_keys())
        return text("is for calls with at most ", most, " tiles, which divide no keys");
      return {};
    }
    case even_rounds:
      // Two tiles of half the rows take a multiprocessor as long, and one of them less.
      if (2 * rounds(c.block_m) > rounds(c.block_m / 2) || !tile::alike(p) || divides_keys())
        return text("is for lengths and numbers of heads that tiles of ", c.block_m, " rows fill");
      return {};
    case many_keys: {
      // Small tiles lose less where the mask cuts them, and spread over more teams.
      int64_t const least = c.head_dim <= 32 ? 512 : 2048;
      bool const one_tile = p.seqlen_q > c.block_m / 2 && p.seqlen_q <= c.block_m;
      bool const many = mean_keys(p) >= least && tiles > c.teams * processors;
      if (!many && !(one_tile && divides_keys()))
        return text("is for more than ", c.teams * processors, " tiles, whose rows see ", least,
                    " keys in the mean");
      return {};
    }
  }
  return {};
}

std::string refusal(const Kernel& kernel, const Problem& p) {
  FwdConfig const& c = instance_of(kernel).config;
  if (std::string why = misfit(p, c.dtype, c.head_dim, c.head_dim_v); !why.empty()) return why;
  if (std::string why = unbuilt(p); !why.empty()) return why;
  if (std::string why = misfit_blocks(c, p); !why.empty()) return why;
  if (has_terms(p) && !c.terms) return "has no softcap, ALiBi or dropout";
  if (c.mask == none && !p.window.open()) return "has no causal mask and no window";
  if (std::string why = unsuited(c, p); !why.empty()) return why;
  if (p.alibi_slopes && p.has_q_offset && (p.q_offset > kLongest || p.q_offset < -kLongest))
    return text("takes a q_offset of up to ", kLongest, " beside alibi_slopes");
  if (!(p.scale > 0)) return text("scale must be positive, got ", p.scale);
  // Unasked, only calls with few tiles are split: the parts need no counting.
  int64_t const parts = p.num_splits > 1 || p.split_size > 0 ? split_keys(c, p).count : 1;
  if (int64_t const tiles = most_tiles(c, p) * parts; tiles > kMostTiles)
    return text("takes up to ", kMostTiles, " query tiles, got ", tiles);
  if (p.out && p.out.dtype != p.dtype)
    return "out in float32 is not built for sm90 yet; on the CPU it is";
  for (Operand const& t : operands(p))
    if (t.rows)  // a plan may be asked for before there is an out
      if (std::string why = not_copyable(t.name, t.rows, t.batch, t.seqlen, t.heads); !why.empty())
        return why;
  return {};
}

// Rows of the workspace that one split fills.
int64_t partial_rows(const Problem& p) {
  return (p.cu_seqlens_q ? p.total_q : p.batch * p.seqlen_q) * p.num_heads_q;
}

// With block lists the workspace is a counter, who took which tile, and their order.
size_t taken_bytes(const FwdConfig& c, const Problem& p) {
  return static_cast<size_t>(1 + most_tiles(c, p)) * 4;
}
size_t order_bytes(const FwdConfig& c, const Problem& p) {
  return p.cu_seqlens_q ? 0 : static_cast<size_t>(most_tiles(c, p)) * 4;
}

void plan(const Kernel& kernel, const Problem& p, Plan& plan) {
  Split const split = split_keys(instance_of(kernel).config, p);
  plan.num_splits = split.count;
  plan.split_blocks = split.blocks;
  if (split.count > 1)
    plan.workspace_bytes =
        static_cast<size_t>(split.count * partial_rows(p) * (p.head_dim_v + 1)) * 4;
  if (p.kv_blocks) {
    FwdConfig const& c = instance_of(kernel).config;
    plan.workspace_bytes = taken_bytes(c, p) + order_bytes(c, p);
  }
  plan.deterministic = true;
}

// In which order they run.
void schedule(const FwdConfig& c, const Problem& p, FwdParams& params) {
  int const pairs = static_cast<int>(p.cu_seqlens_q ? p.num_heads_q : p.batch * p.num_heads_q);
  int64_t const head_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2;
  int const largest =
      tile::section_pairs(head_bytes, params.group, pairs,
                          min_of(kLargestSection, max_of(kLeastSection, 4 * head_bytes)));
  tile::TileScheduler& s = params.scheduler;
  s = {static_cast<int>(ceil_div<int64_t>(p.seqlen_q, c.block_m)), static_cast<int>(p.num_heads_q),
       pairs, largest};
  if (c.mask == none) {  // all tiles cost the same: neighbours share K and V, nothing else counts
    s = s.in_sections_of(params.group);
  } else if (!p.cu_seqlens_q && c.mask == window) {
    int const workers = c.teams * cuda::devices()[p.device_id].multiprocessors;
    int64_t const q_offset = p.has_q_offset ? p.q_offset : p.top_left ? 0 : p.seqlen_k - p.seqlen_q;
    auto const cost = [&](int m_block) {
      int64_t const row = int64_t{m_block} * c.block_m;
      auto const keys =
          tile::key_blocks<int64_t>(tile::band_of(p.window, q_offset), row,
                                    min_of(row + c.block_m, p.seqlen_q), p.seqlen_k, c.block_n);
      return static_cast<double>(keys.last - keys.first) + kTileOverhead;
    };
    // The search takes tens of microseconds, the rest of a call two.
    thread_local Memo<int, 11> known;
    if (s.num_tiles() > workers)
      s = s.in_sections_of(known.get(
          {c.block_m, c.block_n, p.seqlen_q, p.seqlen_k, p.window.left, p.window.right, q_offset,
           pairs, largest, params.group, workers},
          [&] { return tile::balanced_section(s, largest, params.group, workers, cost); }));
  }
}

void launch_problem(const Kernel& kernel, const Problem& p, const Plan& plan, void* workspace,
                    void* stream) {
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

  params.batch = static_cast<int>(p.batch);
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
  params.alike = tile::alike(p);
  if (params.alike) params.sequence = tile::sequence_of<int>(p, 0);

  params.softcap_inner = p.softcap > 0 ? static_cast<float>(p.scale / p.softcap) : 0.0f;
  params.alibi_slopes = p.alibi_slopes;
  params.alibi_batch_stride = p.alibi_batch_stride;
  params.dropout_threshold = p.dropout_threshold;
  params.dropout_scale = static_cast<float>(p.dropout_scale);
  params.rng_seed = p.rng_seed;
  params.rng_offset = p.rng_offset;
  params.rng_tensor = p.rng_tensor;

  params.num_splits = plan.num_splits;
  params.split_blocks = plan.split_blocks;
  params.partial_out = static_cast<float*>(workspace);
  params.partial_lse = params.partial_out + plan.num_splits * partial_rows(p) * p.head_dim_v;
  params.partial_rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q;
  params.partial_heads = static_cast<int>((p.cu_seqlens_q ? 1 : p.batch) * p.num_heads_q);

  if (p.kv_blocks) {
    params.kept = {p.kv_blocks, static_cast<int>(ceil_div<int64_t>(p.seqlen_q, p.block_q)),
                   p.block_q / c.block_m, p.block_k / c.block_n};
    params.mask_block_k = p.block_k;
    params.taken = static_cast<int*>(workspace);
    params.taker = params.taken + 1;
  }

  schedule(c, p, params);
  if (p.kv_blocks && order_bytes(c, p) > 0) {
    int const pairs = params.scheduler.pairs, tiles = params.scheduler.m_blocks;
    int* const order = params.taker + most_tiles(c, p);
    params.order = order;
    order_tiles({.lists = params.kept,
                 .pairs = pairs,
                 .heads = params.scheduler.heads,
                 .group = 1,
                 .tiles = tiles,
                 .halves = 1,
                 .falling = false,
                 .order = order,
                 .taken = params.taken},
                static_cast<cudaStream_t>(stream));
  } else if (p.kv_blocks) {  // how many tiles a sequence has is known on the device alone
    cuda::check(
        cudaMemsetAsync(workspace, 0xff, taken_bytes(c, p), static_cast<cudaStream_t>(stream)),
        "flash_fwd_sm90: clearing the counter of tiles");
  }
  int const blocks = static_cast<int>(min_of<int64_t>(
      most_tiles(c, p) * plan.num_splits, cuda::devices()[p.device_id].multiprocessors));
  instance.launch(params, blocks, p.device_id, static_cast<cudaStream_t>(stream));
  if (plan.num_splits > 1)
    cuda::merge_splits(
        {p.device_id, plan.num_splits, p.cu_seqlens_q ? 1 : p.batch, p.num_heads_q,
         params.partial_rows, p.head_dim_v, params.partial_out, params.partial_lse, p.out, p.lse},
        static_cast<cudaStream_t>(stream));
}

}  // namespace

std::vector<Kernel> table() {
  static std::vector<std::string> names;  // rows point into it
  names.reserve(std::size(kInstances));
  bool const usable = any_hopper();
  std::vector<Kernel> rows;
  for (Instance const& i : kInstances) {
    FwdConfig const& c = i.config;
    const char* const mask = c.mask == none ? "none" : c.mask == window ? "window" : "blocks";
    names.push_back(text("sm90-fwd-", c.dtype == bf16 ? "bf16" : "f16", "-d", c.head_dim,
                         c.head_dim_v == c.head_dim ? "" : text("v", c.head_dim_v), "-", mask,
                         c.terms ? "-terms" : "", c.calls == few_tiles ? "-few-" : "-",
                         c.teams > 1 ? text(c.teams, "x") : "", c.block_m, "x", c.block_n));
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
