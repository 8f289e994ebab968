#include "validate.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "argument.h"
#include "overlap.h"

namespace flashcore {
namespace {

// ---- the pieces of a call -----------------------------------------------------------------------

// Where batch, row and head are in a 4-D (layout) or 3-D (packed) tensor.
struct Dims {
  int batch, row, head, last;
  const char* text;
};
Dims dims_of(const flashcore_attention_args& args) {
  if (args.cu_seqlens_q) return {-1, 0, 1, 2, "(total, heads, head_dim)"};
  if (args.layout == FLASHCORE_BSHD) return {0, 1, 2, 3, "(batch, seqlen, heads, head_dim)"};
  return {0, 2, 1, 3, "(batch, heads, seqlen, head_dim)"};
}

Rows as_rows(const Arg& a, const Dims& d, DType dtype) {
  return {a.data(), d.batch < 0 ? 0 : a.stride[d.batch], a.stride[d.row], a.stride[d.head], dtype};
}

DType read_dtype(const Arg& q) {
  for (DType t : {DType::f16, DType::bf16, DType::f32, DType::f64})
    if (is_float(q.tensor->dtype, t)) return t;
  unsupported(q.name, " has dtype ", type_name(q.tensor->dtype),
              "; float16, bfloat16, float32 and float64 are supported");
}

DType one_of(const Arg& a, std::initializer_list<DType> allowed) {
  for (DType t : allowed)
    if (is_float(a.tensor->dtype, t)) return t;
  std::string names, last;
  for (DType t : allowed) {
    if (dtype_name(t) != last) names += text(names.empty() ? "" : " or ", dtype_name(t));
    last = dtype_name(t);
  }
  fail(a.name, " must be ", names, ", got ", show(*a.tensor));
}

// Statistics and accumulated results: float32, or float64 throughout a float64 problem.
DType wide(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// A tensor shaped like q (rows x heads x last), e.g. out or dq.
Rows read_rows(const char* name, const DLTensor* tensor, const Dims& d, const Problem& p,
               int64_t rows, int64_t heads, int64_t last, bool output,
               std::initializer_list<DType> dtypes) {
  Arg const a = read(name, tensor, d.batch < 0 ? 3 : 4, d.text);
  require_device(p, a);
  DType const dtype = one_of(a, dtypes);
  bool const shape_ok = (d.batch < 0 || a.size(d.batch) == p.batch) && a.size(d.row) == rows &&
                        a.size(d.head) == heads && a.size(d.last) == last;
  if (!shape_ok) {
    std::string want;
    for (int i = 0; i <= d.last; ++i)
      want += text(i ? "," : "", i == d.batch  ? p.batch
                                 : i == d.row  ? rows
                                 : i == d.head ? heads
                                               : last);
    fail(name, " must have shape [", want, "], got ", show(*tensor));
  }
  require_unit_stride(a);
  if (output) require_writable_layout(a);
  return as_rows(a, d, dtype);
}

// lse, max_logits, dlse: (B, Hq, Sq) or packed (Hq, total_q).
Rows read_stats(const char* name, const DLTensor* tensor, bool packed, const Problem& p,
                bool output) {
  DType const dtype = wide(p.dtype);
  Arg const a =
      read(name, tensor, packed ? 2 : 3, packed ? "(heads, total_q)" : "(batch, heads, seqlen_q)");
  require_device(p, a);
  one_of(a, {dtype});
  bool const shape_ok =
      packed ? a.size(0) == p.num_heads_q && a.size(1) == p.total_q
             : a.size(0) == p.batch && a.size(1) == p.num_heads_q && a.size(2) == p.seqlen_q;
  if (!shape_ok)
    fail(name, " must have shape [",
         packed ? text(p.num_heads_q, ",", p.total_q)
                : text(p.batch, ",", p.num_heads_q, ",", p.seqlen_q),
         "], got ", show(*tensor));
  require_unit_stride(a);
  if (output) require_writable_layout(a);
  return {a.data(), packed ? 0 : a.stride[0], 1, packed ? a.stride[0] : a.stride[1], dtype};
}

// bias, mask, dbias: (B|1, Hq|1, Sq|1, Sk|1).
Scores read_scores(const char* name, const DLTensor* tensor, const Problem& p) {
  Arg const a = read(name, tensor, 4, "(batch|1, heads|1, seqlen_q|1, seqlen_k|1)");
  require_device(p, a);
  int64_t const want[4] = {p.batch, p.num_heads_q, p.seqlen_q, p.seqlen_k};
  for (int d = 0; d < 4; ++d)
    if (a.size(d) != want[d] && a.size(d) != 1)
      fail(name, " must broadcast to [", want[0], ",", want[1], ",", want[2], ",", want[3],
           "], got ", show(*tensor));
  return {a.data(), a.stride[0], a.stride[1], a.stride[2], a.stride[3], p.dtype};
}

// A small int32 or float32 vector on q's device.
const void* read_vector(const char* name, const DLTensor* tensor, int64_t size, int code, int bits,
                        const Problem& p) {
  Arg const a = read(name, tensor, 1, "(one entry each)");
  require_device(p, a);
  if (!is_type(a.tensor->dtype, code, bits))
    fail(name, " must be ", type_name({static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}),
         ", got ", show(*tensor));
  if (a.size(0) != size) fail(name, " must have shape [", size, "], got ", show(*tensor));
  require_unit_stride(a);
  return a.data();
}
const int32_t* read_int32(const char* name, const DLTensor* t, int64_t size, const Problem& p) {
  return static_cast<const int32_t*>(read_vector(name, t, size, kDLInt, 32, p));
}

// Packed offsets. Values are checked where they can be read without waiting for a device.
int64_t read_cu_seqlens(const char* name, const int32_t* cu, const Problem& p, int64_t total,
                        int64_t bound, const char* bound_name) {
  if (bound < 0 || bound > kMaxExtent)
    fail(bound_name, " must be in 0..", kMaxExtent, ", got ", bound);
  if (p.device_type != kDLCPU) return bound ? min_of(bound, total) : total;
  int64_t longest = 0;
  if (cu[0] != 0) fail(name, "[0] must be 0, got ", cu[0]);
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t const n = int64_t{cu[b + 1]} - cu[b];
    if (n < 0) fail(name, " must not decrease: entry ", b + 1, " is ", cu[b + 1], " after ", cu[b]);
    longest = max_of(longest, n);
  }
  if (cu[p.batch] != total)
    fail(name, " must end at the packed total ", total, ", got ", cu[p.batch]);
  if (bound && longest > bound)
    fail(bound_name, " is ", bound, " but a sequence has length ", longest);
  return bound ? min_of(bound, total) : longest;
}

const int32_t* read_seqlens(const char* name, const DLTensor* tensor, const Problem& p,
                            int64_t padded) {
  const int32_t* const lengths = read_int32(name, tensor, p.batch, p);
  if (p.device_type == kDLCPU)
    for (int64_t b = 0; b < p.batch; ++b)
      if (lengths[b] < 0 || lengths[b] > padded)
        fail(name, "[", b, "] must be in 0..", padded, ", got ", lengths[b]);
  return lengths;
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
           ": the block mask was made for other lengths, heads or batch");
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

void read_block_mask(const flashcore_block_mask& m, Problem& p, bool backward) {
  if (m.struct_size != sizeof m)
    fail("block_mask.struct_size is ", m.struct_size, ", expected ", sizeof m);
  if (m.block_q <= 0 || m.block_k <= 0)
    fail("block_mask: block sizes must be positive, got ", m.block_q, " x ", m.block_k);
  int64_t const q_blocks = ceil_div<int64_t>(p.seqlen_q, m.block_q);
  int64_t const kv_blocks = ceil_div<int64_t>(p.seqlen_k, m.block_k);
  p.block_q = m.block_q;
  p.block_k = m.block_k;
  p.kv_blocks = read_block_list("block_mask.kv_num_blocks", m.kv_num_blocks,
                                "block_mask.kv_indices", m.kv_indices, p, q_blocks, kv_blocks);
  if (backward)
    p.q_blocks = read_block_list("block_mask.q_num_blocks", m.q_num_blocks, "block_mask.q_indices",
                                 m.q_indices, p, kv_blocks, q_blocks);
}

int64_t read_window(const char* name, const int64_t* side) {
  if (!side || *side == -1) return tile::Window::kOpen;
  if (*side < 0) fail(name, " must be >= 0 (or -1, or not given, for open), got ", *side);
  return min_of(*side, tile::Window::kOpen);
}

uint32_t read_dropout(double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) fail("dropout_p must be in [0, 1), got ", dropout_p);
  auto const threshold = static_cast<uint32_t>(std::lround(dropout_p * 65536.0));
  if (threshold >= 65536) fail("dropout_p must be at most 1 - 2^-16, got ", dropout_p);
  return threshold;
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

void refuse_unbuilt(const flashcore_attention_args& args) {
  if (args.page_table)
    unsupported("page_table is not built yet: pass contiguous k and v with seqlens_k");
  if (args.q_descale || args.k_descale || args.v_descale)
    unsupported("q_descale, k_descale and v_descale belong to fp8, which is not built yet: ",
                "pass float16, bfloat16 or float32 tensors");
}

// The caller's structure. There is one version of each so far; an older one will be zero-extended.
template <class Args>
Args read_struct(const Args* args, const char* what) {
  if (!args) fail(what, " is NULL");
  uint32_t const size = args->struct_size;
  if (size > sizeof(Args))
    fail(what, ".struct_size is ", size, " but this library (", FLASHCORE_VERSION_MAJOR, ".",
         FLASHCORE_VERSION_MINOR, ") knows ", sizeof(Args),
         " bytes: the program was compiled against a newer flashcore.h");
  if (size < sizeof(Args))
    fail(what, ".struct_size is ", size, ", expected ", sizeof(Args), ": set it to sizeof(*args)");
  return *args;
}

// Everything forward and backward have in common.
void read_common(const flashcore_attention_args& args, Problem& p) {
  refuse_unbuilt(args);
  if (args.layout != FLASHCORE_BSHD && args.layout != FLASHCORE_BHSD)
    fail("layout must be bshd (0) or bhsd (1), got ", static_cast<int>(args.layout));
  if (args.align != FLASHCORE_BOTTOM_RIGHT && args.align != FLASHCORE_TOP_LEFT)
    fail("align must be bottom_right (0) or top_left (1), got ", static_cast<int>(args.align));
  bool const packed = args.cu_seqlens_q || args.cu_seqlens_k;
  if (packed && !(args.cu_seqlens_q && args.cu_seqlens_k))
    fail("cu_seqlens_q and cu_seqlens_k go together: ",
         args.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q", " is missing");
  if (packed && args.layout != FLASHCORE_BSHD)
    fail("layout does not apply to packed tensors, which are (total, heads, head_dim)");
  if (packed && (args.seqlens_q || args.seqlens_k))
    fail("seqlens_q and seqlens_k are for padded batches; cu_seqlens_* already say the lengths");
  if (!packed && (args.max_seqlen_q || args.max_seqlen_k))
    fail("max_seqlen_q and max_seqlen_k go with cu_seqlens_q and cu_seqlens_k");

  // q, k, v
  Dims const d = dims_of(args);
  int const ndim = packed ? 3 : 4;
  Arg const q = read("q", args.q, ndim, d.text);
  Arg const k = read("k", args.k, ndim, d.text);
  Arg const v = read("v", args.v, ndim, d.text);
  p.device_type = device_type_of(*q.tensor);
  p.device_id = q.tensor->device.device_id;
  if (p.device_type != kDLCPU && p.device_type != kDLCUDA)
    unsupported("q is on ", device_name(p.device_type, p.device_id),
                "; cpu and cuda are supported");
  p.dtype = read_dtype(q);
  for (const Arg* a : {&q, &k, &v}) {
    require_device(p, *a);
    if (!is_float(a->tensor->dtype, p.dtype))
      fail(a->name, " must have q's dtype ", dtype_name(p.dtype), ", got ", show(*a->tensor));
    require_unit_stride(*a);
  }
  p.num_heads_q = q.size(d.head);
  p.num_heads_kv = k.size(d.head);
  p.head_dim = q.size(d.last);
  p.head_dim_v = v.size(d.last);
  if (p.num_heads_q == 0 || p.num_heads_kv == 0)
    fail("q and k need at least one head, got q: ", show(*q.tensor), ", k: ", show(*k.tensor));
  if (p.head_dim == 0 || p.head_dim_v == 0)
    fail("head_dim must be positive, got q: ", show(*q.tensor), ", v: ", show(*v.tensor));
  if (k.size(d.last) != p.head_dim)
    fail("k must have q's head_dim ", p.head_dim, ", got ", show(*k.tensor));
  if (p.num_heads_q % p.num_heads_kv != 0)
    fail("q's heads must be a multiple of k's, got ", p.num_heads_q, " and ", p.num_heads_kv,
         " (q: ", show(*q.tensor), ", k: ", show(*k.tensor), ")");
  if (v.size(d.head) != p.num_heads_kv || v.size(d.row) != k.size(d.row))
    fail("v must have k's ", packed ? "total" : "seqlen", " and heads, got v: ", show(*v.tensor),
         ", k: ", show(*k.tensor));
  p.q = as_rows(q, d, p.dtype);
  p.k = as_rows(k, d, p.dtype);
  p.v = as_rows(v, d, p.dtype);

  // lengths
  if (packed) {
    Arg const cu = read("cu_seqlens_q", args.cu_seqlens_q, 1, "(batch + 1)");
    if (cu.size(0) < 1) fail("cu_seqlens_q must have batch + 1 entries, got none");
    p.batch = cu.size(0) - 1;
    p.total_q = q.size(d.row);
    p.total_k = k.size(d.row);
    p.cu_seqlens_q = read_int32("cu_seqlens_q", args.cu_seqlens_q, p.batch + 1, p);
    p.cu_seqlens_k = read_int32("cu_seqlens_k", args.cu_seqlens_k, p.batch + 1, p);
    p.seqlen_q = read_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p, p.total_q, args.max_seqlen_q,
                                 "max_seqlen_q");
    p.seqlen_k = read_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p, p.total_k, args.max_seqlen_k,
                                 "max_seqlen_k");
  } else {
    p.batch = q.size(d.batch);
    p.seqlen_q = q.size(d.row);
    p.seqlen_k = k.size(d.row);
    p.total_q = p.batch * p.seqlen_q;
    p.total_k = p.batch * p.seqlen_k;
    if (k.size(d.batch) != p.batch || v.size(d.batch) != p.batch)
      fail("q, k and v must have one batch size, got q: ", show(*q.tensor),
           ", k: ", show(*k.tensor), ", v: ", show(*v.tensor));
    if (args.seqlens_q) p.seqlens_q = read_seqlens("seqlens_q", args.seqlens_q, p, p.seqlen_q);
    if (args.seqlens_k) p.seqlens_k = read_seqlens("seqlens_k", args.seqlens_k, p, p.seqlen_k);
  }

  // the score
  p.scale = args.scale ? *args.scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  double const size = std::fabs(p.scale);
  if (!(size == 0.0 || std::isnormal(size)) ||
      (p.dtype != DType::f64 && size != 0.0 && (size < FLT_MIN || size > FLT_MAX)))
    fail("scale must be finite and 0 or a normal ", dtype_name(wide(p.dtype)), ", got ", p.scale);
  p.softcap = args.softcap;
  if (!(p.softcap >= 0.0) || !std::isfinite(p.softcap))
    fail("softcap must be finite and >= 0 (0 = off), got ", p.softcap);
  p.window.left = read_window("window_size[0]", args.window_left);
  p.window.right = read_window("window_size[1]", args.window_right);
  if (args.causal) p.window.right = 0;
  p.top_left = args.align == FLASHCORE_TOP_LEFT;
  if (args.q_offset && args.q_offset_tensor) fail("q_offset was given twice");
  if (args.q_offset) {
    p.has_q_offset = true;
    p.q_offset = *args.q_offset;
    if (p.q_offset > kMaxExtent || p.q_offset < -kMaxExtent)
      fail("q_offset must be within +-", kMaxExtent, ", got ", p.q_offset);
  }
  if (args.q_offset_tensor)
    p.q_offset_tensor = read_int32("q_offset", args.q_offset_tensor, p.batch, p);
  if (args.alibi_slopes) {
    int const rank = args.alibi_slopes->ndim == 2 ? 2 : 1;
    Arg const a = read("alibi_slopes", args.alibi_slopes, rank, "(heads) or (batch, heads)");
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

  // how to run
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

// No output may share memory with an input or another output. Tensors that were not given are null.
struct Named {
  const char* name;
  const DLTensor* tensor;
};
void refuse_sharing(std::initializer_list<Named> outputs, std::initializer_list<Named> inputs) {
  auto arg = [](const Named& n) { return read(n.name, n.tensor, n.tensor->ndim, ""); };
  for (const Named& output : outputs) {
    if (!output.tensor) continue;
    Arg const a = arg(output);
    if (overlaps_itself(a))
      fail(a.name, " is an output whose rows overlap (", show(*a.tensor), ")");
    for (const Named& input : inputs)
      if (input.tensor && overlap(a, arg(input)))
        fail(a.name, " shares memory with ", input.name, ": flashcore cannot run in place");
    for (const Named& other : outputs)
      if (&other != &output && other.tensor && overlap(a, arg(other)))
        fail(a.name, " shares memory with ", other.name, ": every output needs its own");
  }
}

}  // namespace

Problem validate(const flashcore_attention_args* raw, Stage stage) {
  current_call = "attention";
  flashcore_attention_args const args = read_struct(raw, "args");
  Problem p;
  read_common(args, p);
  if (args.block_mask) read_block_mask(*args.block_mask, p, /*backward=*/false);
  Dims const d = dims_of(args);
  bool const packed = d.batch < 0;
  int64_t const rows = packed ? p.total_q : p.seqlen_q;
  if (args.out || stage == Stage::run)
    p.out = read_rows("out", args.out, d, p, rows, p.num_heads_q, p.head_dim_v, /*output=*/true,
                      {p.dtype, wide(p.dtype)});
  if (args.lse) p.lse = read_stats("lse", args.lse, packed, p, /*output=*/true);
  if (args.max_logits)
    p.max_logits = read_stats("max_logits", args.max_logits, packed, p, /*output=*/true);
  refuse_sharing({{"out", args.out}, {"lse", args.lse}, {"max_logits", args.max_logits}},
                 {{"q", args.q},
                  {"k", args.k},
                  {"v", args.v},
                  {"bias", args.bias},
                  {"mask", args.mask},
                  {"alibi_slopes", args.alibi_slopes},
                  {"sinks", args.sinks}});
  return p;
}

Problem validate(const flashcore_attention_backward_args* raw, Stage stage) {
  current_call = "attention_backward";
  flashcore_attention_backward_args const b = read_struct(raw, "args");
  flashcore_attention_args const args = read_struct(b.forward, "args.forward");
  Problem p;
  p.direction = Direction::backward;
  read_common(args, p);
  if (args.block_mask) read_block_mask(*args.block_mask, p, /*backward=*/true);
  Dims const d = dims_of(args);
  bool const packed = d.batch < 0;
  bool const run = stage == Stage::run;
  int64_t const rows_q = packed ? p.total_q : p.seqlen_q;
  int64_t const rows_k = packed ? p.total_k : p.seqlen_k;
  auto rows = [&](const char* name, const DLTensor* t, int64_t n, int64_t heads, int64_t last,
                  bool output) {
    return read_rows(name, t, d, p, n, heads, last, output, {p.dtype, wide(p.dtype)});
  };

  if (args.out || run)
    p.out = rows("out", args.out, rows_q, p.num_heads_q, p.head_dim_v, /*output=*/false);
  if (args.lse || run) p.lse = read_stats("lse", args.lse, packed, p, /*output=*/false);
  if (b.dout || run)
    p.dout = rows("dout", b.dout, rows_q, p.num_heads_q, p.head_dim_v, /*output=*/false);
  if (b.dlse) p.dlse = read_stats("dlse", b.dlse, packed, p, /*output=*/false);
  if (b.dq) p.dq = rows("dq", b.dq, rows_q, p.num_heads_q, p.head_dim, /*output=*/true);
  if (b.dk) p.dk = rows("dk", b.dk, rows_k, p.num_heads_kv, p.head_dim, /*output=*/true);
  if (b.dv) p.dv = rows("dv", b.dv, rows_k, p.num_heads_kv, p.head_dim_v, /*output=*/true);
  if (b.dbias) {
    if (!p.bias) fail("dbias was given but the call has no bias");
    Arg const a = read("dbias", b.dbias, 4, "shaped like bias");
    p.dbias = read_scores("dbias", b.dbias, p);
    p.dbias.dtype = one_of(a, {wide(p.dtype)});
    for (int i = 0; i < 4; ++i)
      if (a.size(i) != args.bias->shape[i])
        fail("dbias must have bias's shape, got ", show(*b.dbias), " for bias ", show(*args.bias));
    require_writable_layout(a);
    if (a.empty()) p.dbias = {};  // nothing to write
  }
  if (b.dsinks) {
    if (!p.sinks) fail("dsinks was given but the call has no sinks");
    p.dsinks = const_cast<float*>(
        static_cast<const float*>(read_vector("dsinks", b.dsinks, p.num_heads_q, kDLFloat, 32, p)));
  }
  if (run && !b.dq && !b.dk && !b.dv && !b.dbias && !b.dsinks)
    fail("no gradient was asked for: give at least one of dq, dk, dv, dbias, dsinks");
  refuse_sharing(
      {{"dq", b.dq}, {"dk", b.dk}, {"dv", b.dv}, {"dbias", b.dbias}, {"dsinks", b.dsinks}},
      {{"q", args.q},
       {"k", args.k},
       {"v", args.v},
       {"out", args.out},
       {"lse", args.lse},
       {"dout", b.dout},
       {"dlse", b.dlse},
       {"bias", args.bias},
       {"mask", args.mask},
       {"alibi_slopes", args.alibi_slopes},
       {"sinks", args.sinks}});
  p.accumulate = b.accumulate != 0;
  return p;
}

MergeProblem validate(const flashcore_merge_args* raw, MergeStorage& storage) {
  current_call = "merge";
  flashcore_merge_args const args = read_struct(raw, "args");
  if (args.count < 1) fail("needs at least one partial result, got ", args.count);
  if (!args.outs || !args.lses) fail("outs and lses are required");
  if (!args.outs[0]) fail("outs[0] is NULL");
  if (args.layout != FLASHCORE_BSHD && args.layout != FLASHCORE_BHSD)
    fail("layout must be bshd (0) or bhsd (1), got ", static_cast<int>(args.layout));
  bool const packed = args.outs[0]->ndim == 3;
  Dims const d = packed ? Dims{-1, 0, 1, 2, "(total, heads, head_dim)"}
                 : args.layout == FLASHCORE_BSHD
                     ? Dims{0, 1, 2, 3, "(batch, seqlen, heads, head_dim)"}
                     : Dims{0, 2, 1, 3, "(batch, heads, seqlen, head_dim)"};
  Arg const first = read("outs[0]", args.outs[0], packed ? 3 : 4, d.text);

  Problem p;  // carries the shape and device for the checks below
  p.device_type = device_type_of(*first.tensor);
  p.device_id = first.tensor->device.device_id;
  p.dtype = read_dtype(first);
  p.batch = packed ? 1 : first.size(d.batch);
  p.num_heads_q = first.size(d.head);
  p.seqlen_q = p.total_q = first.size(d.row);
  p.head_dim_v = first.size(d.last);
  auto rows = [&](const char* name, const DLTensor* t, bool output,
                  std::initializer_list<DType> dtypes) {
    return read_rows(name, t, d, p, p.seqlen_q, p.num_heads_q, p.head_dim_v, output, dtypes);
  };
  for (int i = 0; i < args.count; ++i) {
    storage.outs.push_back(rows(text("outs[", i, "]").c_str(), args.outs[i], false, {p.dtype}));
    storage.lses.push_back(
        read_stats(text("lses[", i, "]").c_str(), args.lses[i], packed, p, false));
  }
  MergeProblem m{
      p.device_type, p.device_id,         args.count,          p.batch, p.seqlen_q, p.num_heads_q,
      p.head_dim_v,  storage.outs.data(), storage.lses.data(), {},      {}};
  m.out = p.dtype == DType::f64
              ? rows("out", args.out, true, {DType::f64})
              : rows("out", args.out, true, {DType::f32, DType::f16, DType::bf16});
  if (args.lse) m.lse = read_stats("lse", args.lse, packed, p, true);
  return m;
}

DropoutMaskProblem validate_dropout_mask(const DLTensor* keep, double dropout_p,
                                         const int64_t* rng) {
  current_call = "dropout_mask";
  Arg const a = read("keep", keep, 4, "(batch, heads, seqlen_q, seqlen_k)");
  if (!is_type(keep->dtype, kDLBool, 8) && !is_type(keep->dtype, kDLUInt, 8))
    fail("keep must be bool or uint8, got ", show(*keep));
  require_writable_layout(a);
  if (!rng) fail("rng is required: pass (seed, offset)");
  DropoutMaskProblem m{};
  m.device_type = device_type_of(*keep);
  m.device_id = keep->device.device_id;
  m.keep = {a.data(), a.stride[0], a.stride[1], a.stride[2], a.stride[3], DType::f32};
  m.batch = a.size(0);
  m.num_heads = a.size(1);
  m.seqlen_q = a.size(2);
  m.seqlen_k = a.size(3);
  m.threshold = read_dropout(dropout_p);
  m.seed = static_cast<uint64_t>(rng[0]);
  m.offset = static_cast<uint64_t>(rng[1]);
  return m;
}

}  // namespace flashcore
