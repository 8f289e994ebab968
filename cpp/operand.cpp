#include "operand.h"

namespace flashcore {

Dims dims_of(bool packed, flashcore_layout layout) {
  if (packed) return {-1, 0, 1, 2, "(total, heads, head_dim)"};
  if (layout == FLASHCORE_BSHD) return {0, 1, 2, 3, "(batch, seqlen, heads, head_dim)"};
  return {0, 2, 1, 3, "(batch, heads, seqlen, head_dim)"};
}

Rows as_rows(const Arg& a, const Dims& d, DType dtype) {
  return {a.data(), d.packed() ? 0 : a.stride[d.batch], a.stride[d.row], a.stride[d.head], dtype};
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

Rows read_rows(const char* name, const DLTensor* tensor, const Dims& d, const Problem& p,
               int64_t rows, int64_t heads, int64_t last, bool output,
               std::initializer_list<DType> dtypes) {
  Arg const a = read(name, tensor, d.rank(), d.text);
  require_device(p, a);
  DType const dtype = one_of(a, dtypes);
  bool const shape_ok = (d.packed() || a.size(d.batch) == p.batch) && a.size(d.row) == rows &&
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

}  // namespace flashcore
