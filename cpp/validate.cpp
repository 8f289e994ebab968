#include "validate.h"

#include "operand.h"
#include "overlap.h"
#include "validate_options.h"

namespace flashcore {
namespace {

void refuse_unbuilt(const flashcore_attention_args& args) {
  if (args.page_table)
    unsupported("page_table is not built yet: pass contiguous k and v with seqlens_k");
  if (args.q_descale || args.k_descale || args.v_descale)
    unsupported("q_descale, k_descale and v_descale belong to fp8, which is not built yet: ",
                "pass float16, bfloat16 or float32 tensors");
}

// Arguments that only make sense together, or not together.
void check_combination(const flashcore_attention_args& args) {
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

struct Inputs {
  Arg q, k, v;
};

Inputs read_inputs(const flashcore_attention_args& args, const Dims& d, Problem& p) {
  Inputs const inputs{read("q", args.q, d.rank(), d.text), read("k", args.k, d.rank(), d.text),
                      read("v", args.v, d.rank(), d.text)};
  const auto& [q, k, v] = inputs;
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
    fail("v must have k's ", d.packed() ? "total" : "seqlen",
         " and heads, got v: ", show(*v.tensor), ", k: ", show(*k.tensor));
  p.q = as_rows(q, d, p.dtype);
  p.k = as_rows(k, d, p.dtype);
  p.v = as_rows(v, d, p.dtype);
  return inputs;
}

void read_packed_lengths(const flashcore_attention_args& args, const Inputs& inputs, const Dims& d,
                         Problem& p) {
  Arg const cu = read("cu_seqlens_q", args.cu_seqlens_q, 1, "(batch + 1)");
  if (cu.size(0) < 1) fail("cu_seqlens_q must have batch + 1 entries, got none");
  p.batch = cu.size(0) - 1;
  p.total_q = inputs.q.size(d.row);
  p.total_k = inputs.k.size(d.row);
  p.cu_seqlens_q = read_int32("cu_seqlens_q", args.cu_seqlens_q, p.batch + 1, p);
  p.cu_seqlens_k = read_int32("cu_seqlens_k", args.cu_seqlens_k, p.batch + 1, p);
  p.seqlen_q = read_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p, p.total_q, args.max_seqlen_q,
                               "max_seqlen_q");
  p.seqlen_k = read_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p, p.total_k, args.max_seqlen_k,
                               "max_seqlen_k");
}

void read_padded_lengths(const flashcore_attention_args& args, const Inputs& inputs, const Dims& d,
                         Problem& p) {
  const auto& [q, k, v] = inputs;
  p.batch = q.size(d.batch);
  p.seqlen_q = q.size(d.row);
  p.seqlen_k = k.size(d.row);
  p.total_q = p.batch * p.seqlen_q;
  p.total_k = p.batch * p.seqlen_k;
  if (k.size(d.batch) != p.batch || v.size(d.batch) != p.batch)
    fail("q, k and v must have one batch size, got q: ", show(*q.tensor), ", k: ", show(*k.tensor),
         ", v: ", show(*v.tensor));
  if (args.seqlens_q) p.seqlens_q = read_seqlens("seqlens_q", args.seqlens_q, p, p.seqlen_q);
  if (args.seqlens_k) p.seqlens_k = read_seqlens("seqlens_k", args.seqlens_k, p, p.seqlen_k);
}

// Everything forward and backward have in common.
Dims read_common(const flashcore_attention_args& args, Problem& p) {
  refuse_unbuilt(args);
  check_combination(args);
  Dims const d = dims_of(args.cu_seqlens_q != nullptr, args.layout);
  Inputs const inputs = read_inputs(args, d, p);
  if (d.packed())
    read_packed_lengths(args, inputs, d, p);
  else
    read_padded_lengths(args, inputs, d, p);
  read_score_options(args, p);
  read_run_options(args, p);
  if (args.block_mask) read_block_mask(*args.block_mask, p);
  return d;
}

// No output may share memory with an input or another output. Tensors that were not given are null.
struct Named {
  const char* name;
  const DLTensor* tensor;
};
template <size_t kOutputs, size_t kInputs>
void refuse_sharing(const Named (&outputs)[kOutputs], const Named (&inputs)[kInputs]) {
  struct Region {
    Arg arg;
    Span span;
  };
  // Outputs, then inputs: each tensor is read once, not once per pair.
  Region regions[kOutputs + kInputs];
  int count = 0;
  auto const add = [&](const auto& list) {
    for (const Named& n : list) {
      if (!n.tensor) continue;
      Arg const arg = read(n.name, n.tensor, n.tensor->ndim, "");
      regions[count++] = {arg, span_of(arg)};
    }
    return count;
  };
  int const num_outputs = add(outputs);
  add(inputs);
  auto const share = [](const Region& a, const Region& b) {
    bool const meet = a.span.first < b.span.last && b.span.first < a.span.last;
    return meet && overlap(a.arg, b.arg);
  };
  for (int i = 0; i < num_outputs; ++i) {
    const Arg& a = regions[i].arg;
    if (overlaps_itself(a))
      fail(a.name, " is an output whose rows overlap (", show(*a.tensor), ")");
    for (int j = num_outputs; j < count; ++j)
      if (share(regions[i], regions[j]))
        fail(a.name, " shares memory with ", regions[j].arg.name,
             ": flashcore cannot run in place");
    for (int j = i + 1; j < num_outputs; ++j)
      if (share(regions[i], regions[j]))
        fail(a.name, " shares memory with ", regions[j].arg.name, ": every output needs its own");
  }
}

}  // namespace

Problem validate(const flashcore_attention_args* raw, Stage stage) {
  current_call = "attention";
  const flashcore_attention_args& args = read_struct(raw, "args");
  Problem p;
  Dims const d = read_common(args, p);
  int64_t const rows = d.packed() ? p.total_q : p.seqlen_q;
  if (args.out || stage == Stage::run)
    p.out = read_rows("out", args.out, d, p, rows, p.num_heads_q, p.head_dim_v, /*output=*/true,
                      {p.dtype, wide(p.dtype)});
  if (args.lse) p.lse = read_stats("lse", args.lse, d.packed(), p, /*output=*/true);
  if (args.max_logits)
    p.max_logits = read_stats("max_logits", args.max_logits, d.packed(), p, /*output=*/true);
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
  const flashcore_attention_backward_args& b = read_struct(raw, "args");
  const flashcore_attention_args& args = read_struct(b.forward, "args.forward");
  Problem p;
  p.direction = Direction::backward;
  Dims const d = read_common(args, p);
  bool const run = stage == Stage::run;
  int64_t const rows_q = d.packed() ? p.total_q : p.seqlen_q;
  int64_t const rows_k = d.packed() ? p.total_k : p.seqlen_k;
  auto rows = [&](const char* name, const DLTensor* t, int64_t n, int64_t heads, int64_t last,
                  bool output) {
    return read_rows(name, t, d, p, n, heads, last, output, {p.dtype, wide(p.dtype)});
  };

  if (args.out || run)
    p.out = rows("out", args.out, rows_q, p.num_heads_q, p.head_dim_v, /*output=*/false);
  if (args.lse || run) p.lse = read_stats("lse", args.lse, d.packed(), p, /*output=*/false);
  if (b.dout || run)
    p.dout = rows("dout", b.dout, rows_q, p.num_heads_q, p.head_dim_v, /*output=*/false);
  if (b.dlse) p.dlse = read_stats("dlse", b.dlse, d.packed(), p, /*output=*/false);
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
    if (a.empty) p.dbias = {};  // nothing to write
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

}  // namespace flashcore
