// The backward kernels' table: what each takes, how it is planned and launched.
#include <string>
#include <vector>

#include "common/text.h"
#include "flashcore/flashcore.h"
#include "sm90/backend.h"
#include "sm90/bwd/config.h"
#include "sm90/bwd/division.h"
#include "sm90/bwd/list_steps.h"
#include "sm90/bwd/query_blocks.h"
#include "sm90/bwd/schedule.h"
#include "sm90/order.h"
#include "sm90/tensor_map.h"

namespace flashcore::sm90::bwd {
namespace {

// Most bytes of Q, K and V that preprocess asks L2 for: half of what that holds.
constexpr int64_t kPrefetched = int64_t{32} << 20;

struct Instance {
  BwdConfig config;
  void (*launch)(const BwdParams&, int blocks, int device, cudaStream_t);
};

using enum DType;
using enum Cluster;
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
  if (p.bias) return refuse("bias");
  if (p.mask) return refuse("mask");
  return {};
}

// Why the kernel's tiles do not fit the blocks of the call's block mask; empty if they do. A tile
// of keys may be in two of them.
std::string misfit_blocks(const BwdConfig& c, const Problem& p) {
  if (!p.q_blocks) return c.lists ? "is for calls with a block_mask" : "";
  if (std::string why = unfit_blocks(p); !why.empty()) return why;
  if (!c.lists) return "has no block_mask";
  if (p.block_q % c.block_m)
    return text("takes block masks with blocks of a multiple of ", c.block_m, " rows, got ",
                p.block_q);
  return {};
}

// What only kernels with terms compute.
bool has_terms(const Problem& p) { return p.softcap > 0 || p.alibi_slopes || p.dropout_threshold; }

std::string refusal(const Kernel& kernel, const Problem& p) {
  BwdConfig const& c = instance_of(kernel).config;
  if (std::string why = misfit(p, c.dtype, c.head_dim, c.head_dim_v); !why.empty()) return why;
  if (std::string why = unbuilt(p); !why.empty()) return why;
  if (std::string why = misfit_blocks(c, p); !why.empty()) return why;
  if (has_terms(p) && !c.terms) return "has no softcap, ALiBi or dropout";
  if (c.adds_only() && takes_whole_heads(c, p))
    return "is for heads whose key tiles several blocks of threads share";
  if (c.laps) {
    if (!p.deterministic) return "adds to dQ in a fixed order, which takes longer";
    if (lap_of(c, p) == 0)
      return "is for a fixed order of dQ without a mask, and tiles that run at once";
  }
  if (c.few()) {
    if (p.deterministic) return "adds to dQ in any order";
    // The longest of tiles that a mask makes unlike takes up to twice as long as the mean. Divided
    // in two, that is worth an end more for each block, if the tile is long.
    constexpr int kLong = 16;
    bool const unlike = !p.window.open() && ceil_div<int64_t>(p.seqlen_q, c.block_m) >= kLong;
    int64_t const most = cuda::devices()[p.device_id].multiprocessors / (unlike ? 1 : 2);
    if (most_tiles(c, p) > most) return text("is for calls of up to ", most, " tiles");
  }
  if (c.transposed_dq()) {
    if (most_tiles(c, p) <= cuda::devices()[p.device_id].multiprocessors)
      return "is for more tiles than there are multiprocessors";
    // A step saves some 4 % of the same rows in blocks of 64. That is lost where a length does not
    // fill the last block, and where a mask cuts tiles, unless many rows see them. Of packed
    // sequences the mean: the order of a sum must not change with the caller's bound.
    constexpr int64_t kLong = 6144;
    int64_t const rows =
        p.cu_seqlens_q ? ceil_div<int64_t>(p.total_q, max_of<int64_t>(1, p.batch)) : p.seqlen_q;
    if (!p.window.open() && min_of(rows, p.window.left + p.window.right) < kLong)
      return text("is for keys that ", kLong, " rows see, where causal or a window cuts tiles");
    if (!p.cu_seqlens_q &&
        round_up<int64_t>(rows, c.block_m) * 25 > round_up<int64_t>(rows, 64) * 26)
      return text("is for lengths that blocks of ", c.block_m, " rows fill");
  }
  if (p.alibi_slopes && p.has_q_offset && (p.q_offset > kLongest || p.q_offset < -kLongest))
    return text("takes a q_offset of up to ", kLongest, " beside alibi_slopes");
  if (!(p.scale > 0)) return text("scale must be positive, got ", p.scale);
  int64_t const lists = p.q_blocks ? ceil_div<int64_t>(p.seqlen_k, p.block_k) : 1;
  int64_t const tiles = max_of(max_of(most_tiles(c, p), p.batch * p.num_heads_q * lists),
                               p.num_heads_q * query_blocks(p, p.total_q, c.block_m));
  if (tiles > kMostTiles) return text("takes up to ", kMostTiles, " tiles, got ", tiles);
  int64_t const entries = c.lists && p.deterministic ? table_of(c, p).entries() : 0;
  if (entries > INT32_MAX)
    return text("takes block masks with room for up to ", INT32_MAX, " steps of a head, got ",
                entries);
  const struct {
    const char* name;
    const Rows& rows;
    bool of_queries, input;
  } tensors[] = {{"q", p.q, true, true},       {"k", p.k, false, true},
                 {"v", p.v, false, true},      {"out", p.out, true, true},
                 {"dout", p.dout, true, true}, {"dq", p.dq, true, false},
                 {"dk", p.dk, false, false},   {"dv", p.dv, false, false}};
  for (auto const& t : tensors) {
    if (!t.rows) continue;
    if (t.input && t.rows.dtype != p.dtype)
      return text(t.name, " must be ", dtype_name(p.dtype), " on sm90, got ",
                  dtype_name(t.rows.dtype), ": convert it first");
    std::string why = t.of_queries
                          ? not_copyable(t.name, t.rows, batch_q(p), rows_q(p), p.num_heads_q)
                          : not_copyable(t.name, t.rows, batch_k(p), rows_k(p), p.num_heads_kv);
    if (!why.empty()) return why;
  }
  return {};
}

void plan(const Kernel& kernel, const Problem& p, Plan& plan) {
  Division const d(instance_of(kernel).config, p);
  plan.workspace_bytes = static_cast<size_t>(d.bytes);
  plan.num_splits = 1;
  plan.deterministic =
      d.whole_heads || d.alone || d.ordered;  // else key tiles add to dQ in any order
}

void launch_problem(const Kernel& kernel, const Problem& p, const Plan&, void* memory,
                    void* stream) {
  Instance const& instance = instance_of(kernel);
  BwdConfig const& c = instance.config;
  if (p.batch == 0 && !p.dsinks) return;
  cuda::DeviceGuard const guard(p.device_id);
  Division const d(c, p);

  BwdParams params{};
  auto map = [&](const Rows& r, int64_t cols, bool of_queries) {
    int64_t const rows = of_queries ? rows_q(p) : rows_k(p);
    int64_t const heads = of_queries ? p.num_heads_q : p.num_heads_kv;
    int64_t const batch = of_queries ? batch_q(p) : batch_k(p);
    int const box = of_queries ? c.block_m : c.keys();
    TensorMaps maps{};
    maps.cut = of_queries ? p.cu_seqlens_q || p.seqlens_q : p.cu_seqlens_k || p.seqlens_k;
    if (maps.cut) {
      maps.boxes = row_window_map(r, p.dtype, cols, rows, heads, batch, box);
      maps.rows = tensor_map(r, p.dtype, cols, rows, heads, batch, 1);
    } else {
      maps.boxes = tensor_map(r, p.dtype, cols, rows, heads, batch, box);
    }
    return maps;
  };
  if (p.batch * rows_k(p) > 0) {  // else nothing is ever fetched
    params.k = map(p.k, p.head_dim, false);
    params.v = map(p.v, p.head_dim_v, false);
  }
  if (p.batch * rows_q(p) > 0) {
    params.q = map(p.q, p.head_dim, true);
    params.dout = map(p.dout, p.head_dim_v, true);
  }
  params.boxes = !p.accumulate && p.batch * rows_k(p) > 0 && (!p.dk || p.dk.dtype == p.dtype) &&
                 (!p.dv || p.dv.dtype == p.dtype);
  if (params.boxes) {
    auto boxes = [&](const Rows& r, int64_t cols) {
      return tensor_map(r, p.dtype, cols, rows_k(p), p.num_heads_kv, batch_k(p), kStoredRows);
    };
    if (p.dk) params.dk_boxes = boxes(p.dk, p.head_dim);
    if (p.dv) params.dv_boxes = boxes(p.dv, p.head_dim_v);
  }
  auto matrix = [](const Rows& r) {
    return Matrix{r.data, r.batch_stride, r.row_stride, r.head_stride, r.dtype == DType::f32};
  };
  params.q_ref = matrix(p.q);
  params.k_ref = matrix(p.k);
  params.v_ref = matrix(p.v);
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
  params.sinks = p.sinks;
  params.dsinks = p.dsinks;
  auto part = [&](int64_t offset) {
    return reinterpret_cast<float*>(static_cast<char*>(memory) + offset);
  };
  params.dq_sum = part(0);
  params.minus_lse = part(d.minus_lse);
  params.minus_delta = part(d.minus_delta);
  params.lse_parts = reinterpret_cast<StatParts*>(part(d.lse_parts));
  params.delta_parts = reinterpret_cast<StatParts*>(part(d.delta_parts));
  if (d.cut) {
    params.redo_keys = reinterpret_cast<uint8_t*>(part(d.redo_keys));
    if (d.whole_heads) params.redo_queries = reinterpret_cast<uint8_t*>(part(d.redo_queries));
  }
  if (c.lists) {
    auto const lists = [](int64_t rows, int block) {
      return static_cast<int>(ceil_div<int64_t>(rows, block));
    };
    params.kept_queries = {p.q_blocks, lists(p.seqlen_k, p.block_k), p.block_k / kListKeys,
                           p.block_q / c.block_m};
    params.kept_keys = {p.kv_blocks, lists(p.seqlen_q, p.block_q), p.block_q / c.block_m,
                        p.block_k};
    params.mask_block_q = p.block_q;
    if (d.ordered)
      params.neighbours = {reinterpret_cast<Neighbours*>(part(d.neighbours)),
                           static_cast<int>(p.num_heads_q), params.kept_queries.lists,
                           static_cast<int>(d.table.visits), static_cast<int>(d.table.tiles)};
  }
  if (d.at_once && p.dq) params.dq_heads = reinterpret_cast<DqHead*>(part(d.dq_heads));
  if (d.ordered) params.turns = reinterpret_cast<int*>(part(d.turns));
  if (d.counted) {
    params.taken = reinterpret_cast<int*>(part(d.taken));
    params.taker = params.taken + 1;
  }
  if (d.counted || d.ordered) {
    if (d.sorted)
      params.order = reinterpret_cast<int*>(part(d.order));  // whoever sorts clears
    else
      cuda::check(cudaMemsetAsync(part(d.taken), 0xff, static_cast<size_t>(d.order - d.taken),
                                  static_cast<cudaStream_t>(stream)),
                  "flash_bwd_sm90: clearing the counter of tiles and the turns");
  }
  params.head_key_blocks = static_cast<int>(d.head_key_blocks);
  params.head_blocks = static_cast<int>(d.head_blocks);
  params.sequence_blocks = static_cast<int>(ceil_div<int64_t>(p.seqlen_q, c.block_m));
  params.slot_blocks = static_cast<int>(d.slot_blocks);
  params.block_slots = d.block_slots;
  params.scale = static_cast<float>(p.scale);
  double const score_scale = p.softcap > 0 ? p.softcap : p.scale;  // see terms.cuh
  params.score_scale = static_cast<float>(score_scale);
  params.scale_log2 = static_cast<float>(score_scale * 1.4426950408889634);
  params.heads = static_cast<int>(p.num_heads_q);
  params.head_dim = static_cast<int>(p.head_dim);
  params.head_dim_v = static_cast<int>(p.head_dim_v);
  params.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  params.accumulate = p.accumulate;
  int64_t const heads_bytes = p.batch * 2 *
                              (p.seqlen_q * p.num_heads_q * p.head_dim +
                               p.seqlen_k * p.num_heads_kv * (p.head_dim + p.head_dim_v));
  // The long one sets them half a step apart, so that each computes exponentials while the tensor
  // cores work for the other, and is lost in every tile: with a mask many have few steps.
  constexpr int64_t kLongTile = 16;  // steps of 128 queries
  params.short_head_start =
      !p.window.open() && !c.terms && !c.lists && (c.block_m < 128 || d.steps <= kLongTile);
  params.prefetch = tile::alike(p) && heads_bytes <= kPrefetched;

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

  params.whole_heads = d.whole_heads;
  params.plain = params.alike && !d.whole_heads && !params.taken && !params.turns;
  params.pairs = static_cast<int>(d.pairs);
  Schedule const schedule = schedule_of(c, p, d);
  params.scheduler = schedule.scheduler;
  params.all_rise = schedule.all_rise;
  if (d.lap > 0) params.laps = {d.lap, params.sequence_blocks};
  if (params.neighbours.entries)
    find_neighbours(params, c.block_m, c.block_n, static_cast<cudaStream_t>(stream));
  if (d.sorted)
    order_tiles({.lists = params.kept_queries,
                 .pairs = params.scheduler.pairs,
                 .heads = params.scheduler.heads,
                 .group = params.group,
                 .tiles = params.scheduler.m_blocks,
                 .halves = c.block_n / kListKeys,
                 .falling = true,
                 .order = reinterpret_cast<int*>(part(d.order)),
                 .taken = params.taken},
                static_cast<cudaStream_t>(stream));
  instance.launch(params, d.clusters * c.cluster(), p.device_id, static_cast<cudaStream_t>(stream));
  if (p.dsinks) launch_dsinks(params, c.block_m, static_cast<cudaStream_t>(stream));
}

}  // namespace

std::vector<Kernel> table() {
  static std::vector<std::string> names;  // rows point into it
  names.reserve(std::size(kInstances));
  bool const usable = any_hopper();
  std::vector<Kernel> rows;
  for (Instance const& i : kInstances) {
    BwdConfig const& c = i.config;
    names.push_back(text("sm90-bwd-", c.dtype == bf16 ? "bf16" : "f16", "-d", c.head_dim,
                         c.head_dim_v == c.head_dim ? "" : text("v", c.head_dim_v),
                         c.lists ? "-blocks" : "", c.laps ? "-laps" : "", c.terms ? "-terms" : "",
                         c.few() ? "-few-" : "-", c.block_m, "x", c.block_n));
    flashcore_kernel_info info{};
    info.struct_size = sizeof info;
    info.direction = FLASHCORE_BACKWARD;
    info.name = names.back().c_str();
    info.backend = "sm90";
    info.isa = "sm_90a";
    info.dtype = dtype_name(c.dtype);
    info.mask = c.lists ? "blocks" : "window";
    info.head_dim = c.head_dim;
    info.head_dim_v = c.head_dim_v;
    info.block_m = c.block_m;
    info.block_n = c.block_n;
    info.usable = usable;
    rows.push_back({info, refusal, plan, launch_problem, &i});
  }
  return rows;
}

}  // namespace flashcore::sm90::bwd
