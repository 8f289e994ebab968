#include "validate_options.h"

#include <cfloat>
#include <cmath>

#include "operand.h"

namespace flashcore {
namespace {

void read_scale(const double* scale, Problem& p) {
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  double const size = std::fabs(p.scale);
  if (!(size == 0.0 || std::isnormal(size)) ||
      (p.dtype != DType::f64 && size != 0.0 && (size < FLT_MIN || size > FLT_MAX)))
    fail("scale must be finite and 0 or a normal ", dtype_name(wide(p.dtype)), ", got ", p.scale);
}

int64_t read_window(const char* name, const int64_t* side) {
  if (!side || *side == -1) return tile::Window::kOpen;
  if (*side < 0) fail(name, " must be >= 0 (or -1, or not given, for open), got ", *side);
  return min_of(*side, tile::Window::kOpen);
}

void read_q_offset(const flashcore_attention_args& args, Problem& p) {
  if (args.q_offset && args.q_offset_tensor) fail("q_offset was given twice");
  if (args.q_offset) {
    p.has_q_offset = true;
    p.q_offset = *args.q_offset;
    if (p.q_offset > kMaxExtent || p.q_offset < -kMaxExtent)
      fail("q_offset must be within +-", kMaxExtent, ", got ", p.q_offset);
  }
  if (args.q_offset_tensor)
    p.q_offset_tensor = read_int32("q_offset", args.q_offset_tensor, p.batch, p);
}

void read_alibi_slopes(const DLTensor* tensor, Problem& p) {
  int const rank = tensor->ndim == 2 ? 2 : 1;
  Arg const a = read("alibi_slopes", tensor, rank, "(heads) or (batch, heads)");
  require_device(p, a);
  if (!is_float(a.tensor->dtype, DType::f32))
    fail("alibi_slopes must be float32, got ", show(*a.tensor));
  if (a.size(rank - 1) != p.num_heads_q || (rank == 2 && a.size(0) != p.batch))
    fail("alibi_slopes must have shape [", p.num_heads_q, "] or [", p.batch, ",", p.num_heads_q,
         "], got ", show(*a.tensor));
  require_unit_stride(a);
  p.alibi_slopes = static_cast<const float*>(a.data());
  p.alibi_batch_stride = rank == 2 ? a.stride[0] : 0;
}

void read_rng(const flashcore_attention_args& args, Problem& p) {
  p.dropout_threshold = read_dropout(args.dropout_p);
  p.dropout_scale = 65536.0 / (65536.0 - p.dropout_threshold);
  if (args.dropout_p == 0.0) return;
  if (args.rng && args.rng_tensor) fail("rng was given twice: as host values and as a tensor");
  if (!args.rng && !args.rng_tensor)
    fail("rng is required when dropout_p > 0: pass (seed, offset)");
  const int64_t* values = args.rng;
  if (args.rng_tensor) {
    auto const* data =
        static_cast<const int64_t*>(read_vector("rng", args.rng_tensor, 2, kDLInt, 64, p));
    (p.device_type == kDLCPU ? values : p.rng_tensor) = data;
  }
  if (values) {
    p.rng_seed = static_cast<uint64_t>(values[0]);
    p.rng_offset = static_cast<uint64_t>(values[1]);
  }
}

// One direction of a block mask: rows = how many lists, cols = how many blocks a list can name.
BlockList read_block_list(const char* count_name, const DLTensor* count, const char* indices_name,
                          const DLTensor* indices, const Problem& p, int64_t rows, int64_t cols) {
  Arg const c = read(count_name, count, 3, "(batch|1, heads|1, blocks)");
  Arg const x = read(indices_name, indices, 4, "(batch|1, heads|1, blocks, capacity)");
  for (const Arg* a : {&c, &x}) {
    require_device(p, *a);
    if (!is_type(a->tensor->dtype, kDLInt, 32))
      fail(a->name, " must be int32, got ", show(*a->tensor));
    if ((a->size(0) != p.batch && a->size(0) != 1) ||
        (a->size(1) != p.num_heads_q && a->size(1) != 1) || a->size(2) != rows)
      fail(a->name, " must have shape [", p.batch, "|1,", p.num_heads_q, "|1,", rows,
           a == &x ? ",...]" : "]", ", got ", show(*a->tensor),
           ": the block mask was made for other lengths, heads or batch",
           p.cu_seqlens_q ? " (packed sequences are as long as max_seqlen_q and max_seqlen_k say)"
                          : "");
    if (a->size(2) > 1 && a == &c && a->stride[2] != 1)
      fail(a->name, " must be densely packed, got stride ", a->stride[2]);
  }
  require_unit_stride(x);
  BlockList list{static_cast<const int32_t*>(c.data()),
                 static_cast<const int32_t*>(x.data()),
                 c.stride[0],
                 c.stride[1],
                 x.stride[0],
                 x.stride[1],
                 x.stride[2]};
  if (p.device_type == kDLCPU) {
    int64_t const capacity = min_of(x.size(3), cols);
    for (int64_t b = 0; b < c.size(0); ++b)
      for (int64_t h = 0; h < c.size(1); ++h)
        for (int64_t r = 0; r < rows; ++r) {
          int32_t const n =
              list.count[b * list.count_batch_stride + h * list.count_head_stride + r];
          if (n < 0 || n > capacity)
            fail(count_name, "[", b, ",", h, ",", r, "] must be in 0..", capacity, ", got ", n);
          const int32_t* const row = list.indices + b * list.indices_batch_stride +
                                     h * list.indices_head_stride + r * list.indices_row_stride;
          for (int32_t i = 0; i < n; ++i)
            if (row[i] < 0 || row[i] >= cols || (i > 0 && row[i] <= row[i - 1]))
              fail(indices_name, "[", b, ",", h, ",", r, "] must ascend within 0..", cols - 1,
                   ", got ", row[i], i > 0 ? text(" after ", row[i - 1]) : std::string());
        }
  }
  return list;
}

}  // namespace

void read_score_options(const flashcore_attention_args& args, Problem& p) {
  read_scale(args.scale, p);
  p.softcap = args.softcap;
  if (!(p.softcap >= 0.0) || !std::isfinite(p.softcap))
    fail("softcap must be finite and >= 0 (0 = off), got ", p.softcap);
  // softcap * log2(e) and scale / softcap are used in the working precision.
  constexpr double kLargest = 1e38, kSmallest = 1e-37;
  if (p.dtype != DType::f64 && p.softcap > 0 &&
      (p.softcap > kLargest || p.softcap < kSmallest || std::abs(p.scale / p.softcap) > kLargest))
    fail("softcap must be between ", kSmallest, " and ", kLargest,
         " and scale / softcap no larger, got ", p.softcap);
  p.window.left = read_window("window_size[0]", args.window_left);
  p.window.right = read_window("window_size[1]", args.window_right);
  if (args.causal) p.window.right = 0;
  p.top_left = args.align == FLASHCORE_TOP_LEFT;
  read_q_offset(args, p);
  if (args.alibi_slopes) read_alibi_slopes(args.alibi_slopes, p);
  if (args.bias) {
    p.bias = read_scores("bias", args.bias, p);
    p.bias.dtype = one_of({"bias", args.bias}, {p.dtype, wide(p.dtype)});
  }
  if (args.mask) {
    p.mask = read_scores("mask", args.mask, p);
    if (!is_type(args.mask->dtype, kDLBool, 8) && !is_type(args.mask->dtype, kDLUInt, 8))
      fail("mask must be bool (nonzero = visible), got ", show(*args.mask),
           ": additive masks go to bias");
  }
  if (args.sinks)
    p.sinks =
        static_cast<const float*>(read_vector("sinks", args.sinks, p.num_heads_q, kDLFloat, 32, p));
  read_rng(args, p);
}

void read_run_options(const flashcore_attention_args& args, Problem& p) {
  if (args.num_splits < 0) fail("num_splits must be >= 0 (0 = automatic), got ", args.num_splits);
  if (args.split_size < 0) fail("split_size must be >= 0 (0 = off), got ", args.split_size);
  if (args.num_splits > 1 && args.split_size > 0)
    fail("num_splits and split_size exclude each other");
  if (args.num_threads < 0) fail("num_threads must be >= 0, got ", args.num_threads);
  p.num_splits = args.num_splits;
  p.split_size = args.split_size;
  p.deterministic = args.deterministic != 0;
  p.num_threads = args.num_threads;
}

void read_block_mask(const flashcore_block_mask& m, Problem& p) {
  if (m.struct_size != sizeof m)
    fail("block_mask.struct_size is ", m.struct_size, ", expected ", sizeof m);
  if (m.block_q <= 0 || m.block_k <= 0)
    fail("block_mask: block sizes must be positive, got ", m.block_q, " x ", m.block_k);
  if (m.seqlen_q < 0 || m.seqlen_k < 0)
    fail("block_mask: seqlen_q and seqlen_k must not be negative, got ", m.seqlen_q, ", ",
         m.seqlen_k);
  auto const other = [&](int64_t made_for, int64_t seqlen) {
    return made_for > 0 && made_for != seqlen && !p.cu_seqlens_q;
  };
  if (other(m.seqlen_q, p.seqlen_q) || other(m.seqlen_k, p.seqlen_k))
    fail("block_mask is for seqlen_q ", m.seqlen_q, " and seqlen_k ", m.seqlen_k, ", the call has ",
         p.seqlen_q, " and ", p.seqlen_k, ": make one for these lengths");
  int64_t const q_blocks = ceil_div<int64_t>(p.seqlen_q, m.block_q);
  int64_t const kv_blocks = ceil_div<int64_t>(p.seqlen_k, m.block_k);
  p.block_q = m.block_q;
  p.block_k = m.block_k;
  p.kv_blocks = read_block_list("block_mask.kv_num_blocks", m.kv_num_blocks,
                                "block_mask.kv_indices", m.kv_indices, p, q_blocks, kv_blocks);
  if (p.direction != Direction::backward) return;
  p.q_blocks = read_block_list("block_mask.q_num_blocks", m.q_num_blocks, "block_mask.q_indices",
                               m.q_indices, p, kv_blocks, q_blocks);
  p.q_capacity = min_of(m.q_indices->shape[3], q_blocks);
}

uint32_t read_dropout(double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) fail("dropout_p must be in [0, 1), got ", dropout_p);
  auto const threshold = static_cast<uint32_t>(std::lround(dropout_p * 65536.0));
  if (threshold >= 65536) fail("dropout_p must be at most 1 - 2^-16, got ", dropout_p);
  return threshold;
}

}  // namespace flashcore
