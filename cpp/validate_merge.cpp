#include "operand.h"
#include "validate.h"
#include "validate_options.h"

namespace flashcore {

MergeProblem validate(const flashcore_merge_args* raw, MergeStorage& storage) {
  current_call = "merge";
  const flashcore_merge_args& args = read_struct(raw, "args");
  if (args.count < 1) fail("needs at least one partial result, got ", args.count);
  if (!args.outs || !args.lses) fail("outs and lses are required");
  if (!args.outs[0]) fail("outs[0] is NULL");
  if (args.layout != FLASHCORE_BSHD && args.layout != FLASHCORE_BHSD)
    fail("layout must be bshd (0) or bhsd (1), got ", static_cast<int>(args.layout));
  bool const packed = args.outs[0]->ndim == 3;
  Dims const d = dims_of(packed, args.layout);
  Arg const first = read("outs[0]", args.outs[0], d.rank(), d.text);

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
