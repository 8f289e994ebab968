#include "sm90/tensor_map.h"

#include "common/text.h"

namespace flashcore::sm90 {
namespace {

uint64_t u(int64_t n) { return static_cast<uint64_t>(n); }

// Of a dimension: any legal stride where there is only one index.
uint64_t stride_bytes(int64_t extent, int64_t stride) { return u(extent > 1 ? stride * 2 : 16); }

bool is_hopper(int device) {
  auto const devices = cuda::devices();
  return device >= 0 && device < static_cast<int>(devices.size()) && devices[device].major == 9;
}

}  // namespace

std::string misfit(const Problem& p, DType dtype, int head_dim, int head_dim_v) {
  if (!is_hopper(p.device_id))
    return text("needs a GPU of compute capability 9.0; cuda:", p.device_id, " is another");
  if (p.dtype != DType::f16 && p.dtype != DType::bf16)
    return text("takes float16 and bfloat16, got ", dtype_name(p.dtype));
  if (p.dtype != dtype) return text("takes ", dtype_name(dtype));
  const struct {
    const char* name;
    int64_t size;
    int largest;
  } head_dims[] = {{"head_dim", p.head_dim, head_dim}, {"v's head_dim", p.head_dim_v, head_dim_v}};
  for (auto const& d : head_dims) {
    if (d.size % 8 != 0)
      return text(d.name, " must be a multiple of 8, got ", d.size, ": pad to ",
                  round_up<int64_t>(d.size, 8));
    if (d.size > d.largest) return text("takes a ", d.name, " up to ", d.largest, ", got ", d.size);
  }
  if (max_of(p.seqlen_q, p.seqlen_k) > kLongest)
    return text("takes sequences of up to ", kLongest, " rows");
  return {};
}

std::string unfit_blocks(const Problem& p) {
  if (p.block_q % kBlockUnit == 0 && p.block_k % kBlockUnit == 0) return {};
  return text("block_mask must have blocks of a multiple of ", kBlockUnit, " rows and keys, got ",
              p.block_q, " x ", p.block_k, ": make it with such blocks; the CPU takes any");
}

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
  constexpr int64_t kStrides = int64_t{1} << 39;  // 2^40 bytes
  for (auto const& d : dims) {
    if (d.extent <= 1) continue;
    if (d.stride < 0 || d.stride % 8 != 0)
      return text(name, "'s ", d.dim,
                  " stride must be a multiple of 8 elements and not negative, got ", d.stride,
                  ": pass a contiguous copy");
    if (d.stride >= kStrides)
      return text(name, "'s ", d.dim, " stride must be below ", kStrides, " elements, got ",
                  d.stride, ": pass a contiguous copy");
  }
  return {};
}

CUtensorMap tensor_map(const Rows& r, DType dtype, int64_t cols, int64_t rows, int64_t heads,
                       int64_t batch, int box_rows) {
  return cuda::encode_tensor_map(
      {r.data,
       dtype == DType::bf16,
       4,
       {u(cols), u(rows), u(heads), u(batch)},
       {stride_bytes(rows, r.row_stride), stride_bytes(heads, r.head_stride),
        stride_bytes(batch, r.batch_stride)},
       {64, static_cast<uint32_t>(box_rows), 1, 1}});
}

CUtensorMap row_window_map(const Rows& r, DType dtype, int64_t cols, int64_t rows, int64_t heads,
                           int64_t batch, int box_rows) {
  uint64_t const row = stride_bytes(rows, r.row_stride);
  return cuda::encode_tensor_map(
      {r.data,
       dtype == DType::bf16,
       5,
       {u(cols), u(box_rows), u(rows), u(heads), u(batch)},
       {row, row, stride_bytes(heads, r.head_stride), stride_bytes(batch, r.batch_stride)},
       {64, static_cast<uint32_t>(box_rows), 1, 1, 1}});
}

}  // namespace flashcore::sm90
