#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "common/error.h"
#include "common/text.h"
#include "cuda/device.h"
#include "cuda/merge.h"

namespace flashcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// One output row: as a number, and where it is in a tensor.
struct Place {
  int64_t row, batch, head, i;
};

// T: no wider than the row asks for, because a 64-bit division takes many instructions.
template <class T>
__device__ Place place_of(T row, T num_rows, T num_heads) {
  T const pair = row / num_rows, batch = pair / num_heads;
  return {row, batch, pair - batch * num_heads, row - pair * num_rows};
}

__device__ int64_t offset_of(const Rows& x, const Place& at) {
  return at.batch * x.batch_stride + at.head * x.head_stride + at.i * x.row_stride;
}

// Partial results that lie anywhere. They travel to the kernel as its argument, which is why there
// is a largest number of them.
template <int kMost>
struct ListedParts {
  struct Part {
    Rows out, lse;
  } part[kMost];

  template <class E>
  __device__ const E* out(int s, const Place& at) const {
    return static_cast<const E*>(part[s].out.data) + offset_of(part[s].out, at);
  }
  __device__ float lse(int s, const Place& at) const {
    return static_cast<const float*>(part[s].lse.data)[offset_of(part[s].lse, at)];
  }
};
constexpr int kFewParts = 32;    // of an argument that every GPU takes quickly
constexpr int kMostParts = 384;  // of the largest argument there is, 32 KB

// Those of one workspace, see SplitProblem.
struct SplitParts {
  const float *outs, *lses;
  int64_t rows, head_dim;

  template <class E>
  __device__ const E* out(int s, const Place& at) const {
    return outs + (s * rows + at.row) * head_dim;
  }
  __device__ float lse(int s, const Place& at) const { return lses[s * rows + at.row]; }
};

template <class Parts>
struct Merge {
  int count;
  int64_t rows, num_heads, num_rows, head_dim;
  Rows out, lse;  // lse.data may be null
  // A row belongs to lanes = part_lanes * column_lanes neighbouring threads, a power of two within
  // a warp: column_lanes of them cover the columns, and each such group takes every part_lanes'th
  // part.
  int lanes, column_lanes;
  Parts parts;
};

template <class E, int N>
struct alignas(N == 1 ? sizeof(E) : 16) Pack {
  E x[N];
};

template <class E, int N>
__device__ void store(const Rows& out, const Place& at, int64_t column, const float (&x)[N]) {
  Pack<E, N> pack;
#pragma unroll
  for (int n = 0; n < N; ++n) pack.x[n] = static_cast<E>(x[n]);
  *reinterpret_cast<Pack<E, N>*>(static_cast<E*>(out.data) + offset_of(out, at) + column) = pack;
}

// E: the element of the parts. N: columns a thread takes at once.
template <class E, int N, class Parts>
__global__ void __launch_bounds__(kThreads) merge_rows(const __grid_constant__ Merge<Parts> p) {
  constexpr unsigned kAll = 0xffffffffu;
  int const rows_per_block = kThreads / p.lanes;
  int const lane = threadIdx.x % p.lanes;
  int const column_lane = lane % p.column_lanes, part_lane = lane / p.column_lanes;
  int const part_lanes = p.lanes / p.column_lanes;

  // All threads of a block make the same turns: they exchange values.
  for (int64_t first = int64_t{blockIdx.x} * rows_per_block; first < p.rows;
       first += int64_t{gridDim.x} * rows_per_block) {
    int64_t const row = first + threadIdx.x / p.lanes;
    bool const valid = row < p.rows;
    int64_t const known = min_of(row, p.rows - 1);
    Place const at = p.rows <= INT32_MAX
                         ? place_of(static_cast<int32_t>(known), static_cast<int32_t>(p.num_rows),
                                    static_cast<int32_t>(p.num_heads))
                         : place_of(known, p.num_rows, p.num_heads);

    float largest = -INFINITY;
    for (int s = lane; s < p.count; s += p.lanes) largest = fmaxf(largest, p.parts.lse(s, at));
    for (int other = p.lanes / 2; other; other /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, other));
    // Where no part saw a key every weight shall be exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
    float const reference = largest == -INFINITY ? 0.0f : largest;

    for (int64_t begin = 0; begin == 0 || begin < p.head_dim; begin += p.column_lanes * N) {
      int64_t const column = begin + column_lane * N;
      bool const inside = column < p.head_dim;
      float sum = 0.0f, acc[N] = {};
#pragma unroll 2
      for (int s = part_lane; s < p.count; s += part_lanes) {
        float const lse = p.parts.lse(s, at);
        Pack<E, N> part{};
        // An empty partial's rows are not read: whatever they hold stays out.
        if (inside && lse != -INFINITY)
          part = *reinterpret_cast<const Pack<E, N>*>(p.parts.template out<E>(s, at) + column);
        float const weight = expf(lse - reference);
        sum += weight;
#pragma unroll
        for (int n = 0; n < N; ++n) acc[n] = fmaf(weight, static_cast<float>(part.x[n]), acc[n]);
      }
      for (int other = p.column_lanes; other < p.lanes; other *= 2) {
        sum += __shfl_xor_sync(kAll, sum, other);
#pragma unroll
        for (int n = 0; n < N; ++n) acc[n] += __shfl_xor_sync(kAll, acc[n], other);
      }
      if (!valid || part_lane != 0) continue;
      if (inside) {
#pragma unroll
        for (int n = 0; n < N; ++n) acc[n] = sum == 0.0f ? 0.0f : acc[n] / sum;
        if (p.out.dtype == DType::f32)
          store<float>(p.out, at, column, acc);
        else if (p.out.dtype == DType::f16)
          store<__half>(p.out, at, column, acc);
        else
          store<__nv_bfloat16>(p.out, at, column, acc);
      }
      if (column == 0 && p.lse.data)
        static_cast<float*>(p.lse.data)[offset_of(p.lse, at)] =
            sum == 0.0f ? -INFINITY : reference + logf(sum);
    }
  }
}

// Whether every row of the tensor begins where 16 bytes can be read or written at once.
bool aligned(const Rows& x) {
  int64_t const size = dtype_bytes(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride * size % 16 == 0 &&
         x.head_stride * size % 16 == 0 && x.row_stride * size % 16 == 0;
}

int largest_power_of_two(int64_t most) {
  int n = 1;
  while (2 * n <= most) n *= 2;
  return n;
}

template <class E, class Parts>
void launch(Merge<Parts>& p, bool wide, int device, cudaStream_t stream) {
  constexpr int kWide = 8;
  if (p.rows == 0) return;
  DeviceGuard const guard(device);
  int64_t const pieces = ceil_div<int64_t>(max_of<int64_t>(p.head_dim, 1), wide ? kWide : 1);
  p.column_lanes = largest_power_of_two(min_of<int64_t>(2 * pieces - 1, kWarp));
  p.lanes = p.column_lanes * (kWarp / p.column_lanes);
  auto const blocks = static_cast<unsigned>(
      min_of<int64_t>(ceil_div<int64_t>(p.rows, kThreads / p.lanes), INT32_MAX));
  if (wide)
    merge_rows<E, kWide><<<blocks, kThreads, 0, stream>>>(p);
  else
    merge_rows<E, 1><<<blocks, kThreads, 0, stream>>>(p);
  check(cudaGetLastError(), "merge");
}

template <int kMost>
void merge_listed(const MergeProblem& p, cudaStream_t stream) {
  Merge<ListedParts<kMost>> m{};
  m.count = p.count;
  m.rows = p.batch * p.num_heads * p.num_rows;
  m.num_heads = p.num_heads;
  m.num_rows = p.num_rows;
  m.head_dim = p.head_dim;
  m.out = p.out;
  m.lse = p.lse;
  bool wide = p.head_dim % 8 == 0 && aligned(p.out);
  for (int s = 0; s < p.count; ++s) {
    m.parts.part[s] = {p.outs[s], p.lses[s]};
    wide &= aligned(p.outs[s]);
  }
  switch (p.outs[0].dtype) {
    case DType::f16:
      return launch<__half>(m, wide, p.device_id, stream);
    case DType::bf16:
      return launch<__nv_bfloat16>(m, wide, p.device_id, stream);
    default:
      return launch<float>(m, wide, p.device_id, stream);
  }
}

}  // namespace

void merge(const MergeProblem& p, cudaStream_t stream) {
  if (p.outs[0].dtype == DType::f64)
    throw Failure(FLASHCORE_UNSUPPORTED,
                  "[merge] outs in float64 are merged on the CPU only; on a GPU pass float32, "
                  "float16 or bfloat16");
  if (p.count > kMostParts)
    throw Failure(FLASHCORE_UNSUPPORTED,
                  text("[merge] a GPU merges up to ", kMostParts, " partial results at once, got ",
                       p.count, ": merge groups of them, then the groups"));
  if (p.count <= kFewParts)
    merge_listed<kFewParts>(p, stream);
  else
    merge_listed<kMostParts>(p, stream);
}

void merge_splits(const SplitProblem& p, cudaStream_t stream) {
  int64_t const rows = p.batch * p.num_heads * p.num_rows;
  Merge<SplitParts> m{p.count, rows,  p.num_heads, p.num_rows, p.head_dim,
                      p.out,   p.lse, 0,           0,          {p.outs, p.lses, rows, p.head_dim}};
  bool const wide = p.head_dim % 8 == 0 && aligned(p.out) &&
                    aligned({const_cast<float*>(p.outs), 0, 0, 0, DType::f32});
  launch<float>(m, wide, p.device_id, stream);
}

}  // namespace flashcore::cuda
