#include "cuda/device.h"
#include "cuda/dropout_mask.h"
#include "tile/rng.h"

namespace flashcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 16;  // of a thread: four patches side by side, rows i and i + 8

struct Mask {
  DropoutMaskProblem problem;
  tile::DropoutKey key;
  int64_t column_groups, row_pairs, items;  // of 16 columns; of rows i and i + 8; of both together
  bool wide;                                // 16 bytes can be written at once
};

__global__ void __launch_bounds__(kThreads) mask_rows(const __grid_constant__ Mask m) {
  const DropoutMaskProblem& p = m.problem;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < m.items;
       item += int64_t{gridDim.x} * kThreads) {
    int64_t const group = item % m.column_groups, pair = item / m.column_groups % m.row_pairs;
    int64_t const at = item / m.column_groups / m.row_pairs;
    int64_t const head = at % p.num_heads, batch = at / p.num_heads;

    alignas(16) uint8_t keep[2][kColumns];  // of rows i and i + 8
#pragma unroll
    for (int n = 0; n < kColumns / 4; ++n) {
      tile::Philox4 const patch = tile::dropout_patch(
          m.key, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
          static_cast<uint32_t>(pair), static_cast<uint32_t>(group * (kColumns / 4) + n));
#pragma unroll
      for (int slot = 0; slot < 8; ++slot)
        keep[slot / 4][2 * n + slot / 2 % 2 * 8 + slot % 2] =
            tile::patch_bits(patch, slot) >= p.threshold;
    }
    int64_t const column = group * kColumns;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int64_t const i = pair / 8 * 16 + pair % 8 + 8 * r;
      if (i >= p.seqlen_q) continue;
      uint8_t* const to = static_cast<uint8_t*>(p.keep.data) + batch * p.keep.batch_stride +
                          head * p.keep.head_stride + i * p.keep.row_stride +
                          column * p.keep.col_stride;
      if (m.wide && column + kColumns <= p.seqlen_k) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(keep[r]);
      } else {
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (column + c < p.seqlen_k) to[c * p.keep.col_stride] = keep[r][c];
      }
    }
  }
}

}  // namespace

void dropout_mask(const DropoutMaskProblem& p, cudaStream_t stream) {
  Mask m{p, tile::dropout_key(p.seed, p.offset), 0, 0, 0, false};
  m.column_groups = ceil_div<int64_t>(p.seqlen_k, kColumns);
  m.row_pairs = ceil_div<int64_t>(p.seqlen_q, 16) * 8;
  m.items = p.batch * p.num_heads * m.row_pairs * m.column_groups;
  if (m.items == 0) return;
  m.wide = p.keep.col_stride == 1 && reinterpret_cast<uintptr_t>(p.keep.data) % 16 == 0 &&
           p.keep.batch_stride % 16 == 0 && p.keep.head_stride % 16 == 0 &&
           p.keep.row_stride % 16 == 0;
  DeviceGuard const guard(p.device_id);
  auto const blocks =
      static_cast<unsigned>(min_of<int64_t>(ceil_div<int64_t>(m.items, kThreads), INT32_MAX));
  mask_rows<<<blocks, kThreads, 0, stream>>>(m);
  check(cudaGetLastError(), "dropout_mask");
}

}  // namespace flashcore::cuda
