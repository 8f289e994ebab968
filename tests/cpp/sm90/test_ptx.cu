// The PTX layer on a real Hopper GPU: copy engine, descriptors, every generated wgmma shape, the
// store path. Exact integers throughout, so an error says which element was read. Exits with 77
// (skipped) where there is no such GPU.
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "sm90/bwd/load.cuh"
#include "sm90/bwd/stat_parts.h"
#include "sm90/layout.h"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/tensor_map.h"

using namespace flashcore;
using namespace flashcore::sm90;

namespace {

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size;
  explicit DeviceArray(size_t n) : size(n) {
    cuda::check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
    cuda::check(cudaMemset(data, 0xFF, n * sizeof(T)), "cudaMemset");  // NaN in every dtype
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    cuda::check(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyDefault), "copy in");
  }
  ~DeviceArray() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> h(size);
    cuda::check(cudaMemcpy(h.data(), data, size * sizeof(T), cudaMemcpyDefault), "copy out");
    return h;
  }
};

// rows x cols, row-major, as the (col, row, 1, 1) tensor the kernels see.
template <class T>
CUtensorMap matrix_map(T* data, int rows, int cols, int box_rows) {
  auto const bytes = static_cast<uint64_t>(cols) * 2;
  return cuda::encode_tensor_map({data,
                                  std::is_same_v<T, __nv_bfloat16>,
                                  4,
                                  {static_cast<uint64_t>(cols), static_cast<uint64_t>(rows), 1, 1},
                                  {bytes, 16, 16},
                                  {64, static_cast<uint32_t>(box_rows), 1, 1}});
}

template <class T>
T integer(int row, int col) {  // small enough that every product and sum here is exact
  return static_cast<T>(static_cast<float>((row * 7 + col * 3) % 9 - 4));
}
template <class T>
std::vector<T> matrix(int rows, int cols) {
  std::vector<T> m(static_cast<size_t>(rows) * cols);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) m[static_cast<size_t>(r) * cols + c] = integer<T>(r, c);
  return m;
}

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "shared memory");
}
void finish() {
  cuda::check(cudaGetLastError(), "launch");
  cuda::check(cudaDeviceSynchronize(), "kernel");
}

// ---- the copy engine
// ------------------------------------------------------------------------------

__global__ void dump_box(const __grid_constant__ CUtensorMap map, int col, int row, int bytes,
                         char* raw) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect(bytes);
    tma_load(smem, map, ready, col, row, 0, 0, policy_evict_first());
  }
  __syncthreads();
  ready.wait(0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = smem[i];
}

void box_lands_swizzled(int rows, int cols, int box_rows, int row, int col) {
  auto const m = matrix<__nv_bfloat16>(rows, cols);
  DeviceArray<__nv_bfloat16> const in(m);
  int const bytes = box_rows * kPanelBytes;
  DeviceArray<char> out(bytes);
  dump_box<<<1, 128, bytes>>>(matrix_map(in.data, rows, cols, box_rows), col, row, bytes, out.data);
  finish();
  auto const raw = out.host();
  for (int r = 0; r < box_rows; ++r)
    for (int c = 0; c < kPanelCols; ++c) {
      auto const* const got = reinterpret_cast<const __nv_bfloat16*>(
          raw.data() + swizzled_offset(r, c / 8) + c % 8 * 2);
      bool const inside = row + r < rows && col + c < cols;
      float const want =
          inside ? static_cast<float>(m[static_cast<size_t>(row + r) * cols + col + c]) : 0.0f;
      CHECK_EQ(static_cast<float>(*got), want);
    }
}

__global__ void dump_rows(const __grid_constant__ bwd::TensorMaps maps, int box, int row, int valid,
                          int head, int batch, char* raw) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect(box * kPanelBytes);
    bwd::load_rows(smem, maps, ready, box, 0, row, valid, head, batch, policy_evict_first(),
                   maps.cut);
  }
  __syncthreads();
  ready.wait(0);
  for (int i = threadIdx.x; i < box * kPanelBytes; i += blockDim.x) raw[i] = smem[i];
}

// Of a (2, rows, 3, 40) tensor, head 1 of batch 1, rows from `row` on of which `valid` are wanted.
// The rows behind those are NaN, as those around the tensor are.
void window_ends_where_it_is_told(int rows, int box_rows, int row, int valid) {
  constexpr int kHeads = 3, kCols = 40, kHead = 1, kBatch = 1;
  DeviceArray<__nv_bfloat16> const room(static_cast<size_t>(2 + 2) * rows * kHeads * kCols);
  Rows const tensor{room.data + rows * kHeads * kCols, int64_t{rows} * kHeads * kCols,
                    kHeads * kCols, kCols, DType::bf16};
  auto const m = matrix<__nv_bfloat16>(valid, kCols);
  auto* const at = static_cast<__nv_bfloat16*>(tensor.data) + kBatch * tensor.batch_stride +
                   row * tensor.row_stride + kHead * tensor.head_stride;
  cuda::check(cudaMemcpy2D(at, tensor.row_stride * 2, m.data(), kCols * 2, kCols * 2,
                           static_cast<size_t>(valid), cudaMemcpyDefault),
              "copy in");
  int const bytes = box_rows * kPanelBytes;
  DeviceArray<char> out(bytes);
  dump_rows<<<1, 128, bytes>>>(
      {true, row_window_map(tensor, DType::bf16, kCols, rows, kHeads, 2, box_rows),
       tensor_map(tensor, DType::bf16, kCols, rows, kHeads, 2, 1)},
      box_rows, row, valid, kHead, kBatch, out.data);
  finish();
  auto const raw = out.host();
  for (int r = 0; r < box_rows; ++r)
    for (int c = 0; c < kPanelCols; ++c) {
      auto const* const got = reinterpret_cast<const __nv_bfloat16*>(
          raw.data() + swizzled_offset(r, c / 8) + c % 8 * 2);
      bool const inside = r < valid && c < kCols;
      CHECK_EQ(static_cast<float>(*got),
               inside ? static_cast<float>(m[static_cast<size_t>(r) * kCols + c]) : 0.0f);
    }
}

// ---- wgmma
// ----------------------------------------------------------------------------------------

// S (64 x N) = A B^T, or 1 + A B^T with kAdd; A: 64 x kDepth, B: N x kDepth, through the same
// Where an accumulator's elements belong in a row-major 64 x N matrix.
template <int N>
__device__ void write_tile(float* out, const float (&x)[N / 2]) {
  for (int i = 0; i < N / 2; ++i) {
    Coord const at = accumulator_coord(threadIdx.x, i);
    out[at.row * N + at.col] = x[i];
  }
}

// panels as the kernels.
template <class T, int N, int kDepth, bool kAdd>
__global__ void run_abt(const __grid_constant__ CUtensorMap a,
                        const __grid_constant__ CUtensorMap b, float* out) {
  extern __shared__ __align__(1024) char smem[];
  char* const sA = smem;
  char* const sB = smem + 64 * kDepth * 2;
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect((64 + N) * kDepth * 2);
    for (int panel = 0; panel < kDepth / 64; ++panel) {
      tma_load(sA + panel * 64 * kPanelBytes, a, ready, panel * 64, 0, 0, 0, policy_evict_first());
      tma_load(sB + panel * N * kPanelBytes, b, ready, panel * 64, 0, 0, 0, policy_evict_first());
    }
  }
  __syncthreads();
  ready.wait(0);
  float s[N / 2];
  for (float& x : s) x = 1.0f;
  pin(s);
  wgmma_fence();
  gemm_abt<T, N, kDepth, 64, N, kAdd>(s, sA, sB);
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
  write_tile<N>(out, s);
}

template <class T, int N, int kDepth, bool kAdd = false>
void abt_is_exact() {
  auto const a = matrix<T>(64, kDepth);
  auto const b = matrix<T>(N, kDepth);
  DeviceArray<T> const da(a), db(b);
  DeviceArray<float> out(64 * N);
  int const bytes = (64 + N) * kDepth * 2;
  allow_shared(run_abt<T, N, kDepth, kAdd>, bytes);
  run_abt<T, N, kDepth, kAdd><<<1, 128, bytes>>>(matrix_map(da.data, 64, kDepth, 64),
                                                 matrix_map(db.data, N, kDepth, N), out.data);
  finish();
  auto const got = out.host();
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < N; ++c) {
      float want = kAdd;
      for (int k = 0; k < kDepth; ++k)
        want += static_cast<float>(a[r * kDepth + k]) * static_cast<float>(b[c * kDepth + k]);
      CHECK_EQ(got[r * N + c], want);
    }
}

// O (64 x N) = 1 + P B, P: 64 x kDepth in registers, B: kDepth x N, MN-major.
template <class T, int N, int kDepth>
__global__ void run_pb(const T* p, const __grid_constant__ CUtensorMap b, float* out) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect(kDepth * N * 2);
    for (int panel = 0; panel < N / 64; ++panel)
      tma_load(smem + panel * kDepth * kPanelBytes, b, ready, panel * 64, 0, 0, 0,
               policy_evict_first());
  }
  __syncthreads();
  ready.wait(0);
  uint32_t rP[kDepth / 4];
  for (int k = 0; k < kDepth / 16; ++k)
    for (int reg = 0; reg < 4; ++reg) {
      Coord const lo = a_operand_coord(threadIdx.x, reg, 0);
      const T* const at = p + lo.row * kDepth + 16 * k + lo.col;
      rP[4 * k + reg] = pack<T>(static_cast<float>(at[0]), static_cast<float>(at[1]));
    }
  float o[N / 2];
  for (float& x : o) x = 1.0f;
  pin(o);
  wgmma_fence();
  gemm_pb<T, N, kDepth>(o, rP, smem);
  wgmma_commit();
  wgmma_wait<0>();
  pin(o);
  write_tile<N>(out, o);
}

template <class T, int N, int kDepth>
void pb_is_exact() {
  auto const p = matrix<T>(64, kDepth);
  auto const b = matrix<T>(kDepth, N);
  DeviceArray<T> const dp(p), db(b);
  DeviceArray<float> out(64 * N);
  int const bytes = kDepth * N * 2;
  allow_shared(run_pb<T, N, kDepth>, bytes);
  run_pb<T, N, kDepth>
      <<<1, 128, bytes>>>(dp.data, matrix_map(db.data, kDepth, N, kDepth), out.data);
  finish();
  auto const got = out.host();
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < N; ++c) {
      float want = 1;
      for (int k = 0; k < kDepth; ++k)
        want += static_cast<float>(p[r * kDepth + k]) * static_cast<float>(b[k * N + c]);
      CHECK_EQ(got[r * N + c], want);
    }
}

// C (64 x N) = 1, and gemm_ones of N rows of parts, with NaN before and behind them.
template <int N>
__global__ void run_ones(const bwd::StatParts* parts, float* out) {
  __shared__ alignas(128) bwd::StatParts rows[3 * N];
  for (int i = threadIdx.x; i < 3 * N; i += 128) {
    rows[i] = parts[i % N];
    if (i / N != 1)
      for (uint16_t& x : rows[i].part) x = 0x7fc0;
  }
  fence_async_shared();
  __syncthreads();
  float c[N / 2];
  for (float& x : c) x = 1.0f;
  uint32_t ones[2];
  three_ones(ones);
  pin(c);
  wgmma_fence();
  gemm_ones<N>(c, ones, rows + N);
  wgmma_commit();
  wgmma_wait<0>();
  pin(c);
  write_tile<N>(out, c);
}

template <int N>
void ones_add_columns() {
  constexpr int kNan = 9;
  std::vector<float> values;
  for (int i = 0; i < N; ++i) values.push_back(std::sin(7.0f * i) * std::ldexp(1.0f, i % 13 - 4));
  values[3] = bwd::StatParts::kNever;
  values[kNan] = NAN;
  std::vector<bwd::StatParts> parts;
  for (float x : values) parts.push_back(bwd::StatParts::of(x));
  DeviceArray<bwd::StatParts> const from(parts);
  DeviceArray<float> out(64 * N);
  run_ones<N><<<1, 128>>>(from.data, out.data);
  finish();
  auto const got = out.host();
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < N; ++c) {
      float const x = got[r * N + c];
      if (c == kNan)
        CHECK(std::isnan(x));
      else  // the tensor cores cut sums off where float32 would round
        CHECK(std::fabs(x - (1.0f + values[c])) <= std::ldexp(1.0f + std::fabs(values[c]), -22));
    }
}

// C (64 x N) = A B of gemm_ab, or 1 + A^T B of gemm_atb: A is 64 x kDepth, or kDepth x 64.
template <class T, int N, int kDepth, bool kTransposeA>
__global__ void run_from_shared(const __grid_constant__ CUtensorMap a,
                                const __grid_constant__ CUtensorMap b, float* out) {
  constexpr int kRowsA = kTransposeA ? kDepth : 64, kPanelsA = kTransposeA ? 1 : kDepth / 64;
  extern __shared__ __align__(1024) char smem[];
  char* const sA = smem;
  char* const sB = smem + 64 * kDepth * 2;
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect((64 + N) * kDepth * 2);
    for (int panel = 0; panel < kPanelsA; ++panel)
      tma_load(sA + panel * kRowsA * kPanelBytes, a, ready, panel * 64, 0, 0, 0,
               policy_evict_first());
    for (int panel = 0; panel < N / 64; ++panel)
      tma_load(sB + panel * kDepth * kPanelBytes, b, ready, panel * 64, 0, 0, 0,
               policy_evict_first());
  }
  __syncthreads();
  ready.wait(0);
  float c[N / 2];
  for (float& x : c) x = 1.0f;
  pin(c);
  wgmma_fence();
  if constexpr (kTransposeA)
    gemm_atb<T, N, kDepth>(c, sA, sB);
  else
    gemm_ab<T, N, kDepth, 64>(c, sA, sB);
  wgmma_commit();
  wgmma_wait<0>();
  pin(c);
  write_tile<N>(out, c);
}

template <class T, int N, int kDepth, bool kTransposeA>
void from_shared_is_exact() {
  constexpr int kRowsA = kTransposeA ? kDepth : 64, kColsA = kTransposeA ? 64 : kDepth;
  auto const a = matrix<T>(kRowsA, kColsA);
  auto const b = matrix<T>(kDepth, N);
  DeviceArray<T> const da(a), db(b);
  DeviceArray<float> out(64 * N);
  int const bytes = (64 + N) * kDepth * 2;
  allow_shared(run_from_shared<T, N, kDepth, kTransposeA>, bytes);
  run_from_shared<T, N, kDepth, kTransposeA>
      <<<1, 128, bytes>>>(matrix_map(da.data, kRowsA, kColsA, kRowsA),
                          matrix_map(db.data, kDepth, N, kDepth), out.data);
  finish();
  auto const got = out.host();
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < N; ++c) {
      float want = kTransposeA ? 1 : 0;
      for (int k = 0; k < kDepth; ++k)
        want += static_cast<float>(kTransposeA ? a[k * 64 + r] : a[r * kDepth + k]) *
                static_cast<float>(b[k * N + c]);
      CHECK_EQ(got[r * N + c], want);
    }
}

// ---- ways out of registers
// ------------------------------------------------------------------------

// A 64 x N accumulator of row * N + column, through store_matrix_x4_transposed.
template <int N>
__global__ void store_transposed_tile(uint32_t* raw) {
  __shared__ __align__(1024) char panel[N * kPanelBytes];
  int const thread = threadIdx.x;
  for (int patch = 0; patch < N / 16; ++patch) {
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
      Coord const c = accumulator_coord(thread, 8 * patch + 2 * i);
      r[i] = static_cast<uint32_t>(c.row * N + c.col) | static_cast<uint32_t>(c.row * N + c.col + 1)
                                                            << 16;
    }
    store_matrix_x4_transposed(
        smem_address(panel) + transposed_patch_offset(thread / 32, thread % 32, patch), r[0], r[1],
        r[2], r[3]);
  }
  __syncthreads();
  for (int i = thread; i < N * 32; i += 128) raw[i] = reinterpret_cast<uint32_t*>(panel)[i];
}

// Sums of four ways to add 1 .. 128 * 4 to zeros: twice by threads, twice by the copy engine.
__global__ void add_floats(float* sums, const float* from) {
  __shared__ __align__(128) float staging[512];
  __shared__ Barrier ready;
  if (threadIdx.x == 0) {
    ready.init(1);
    fence_barrier_init();
    ready.arrive_expect(sizeof staging);
    bulk_load(staging, from, sizeof staging, ready);
  }
  __syncthreads();
  ready.wait(0);
  int const i = 4 * threadIdx.x;
  for (int n = 0; n < 2; ++n)
    reduce_add_x4(sums + i, staging[i], staging[i + 1], staging[i + 2], staging[i + 3]);
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int n = 0; n < 2; ++n) bulk_reduce_add(sums, staging, sizeof staging);
    tma_store_commit();
    tma_store_wait();
  }
}

__global__ void transpose_quads(uint32_t* out) {
  uint32_t x[4];
  for (int i = 0; i < 4; ++i) x[i] = threadIdx.x * 4 + i;
  quad_transpose(x);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = x[i];
}

// ---- the store path
// -------------------------------------------------------------------------------

// One warp writes a 16 x 64 tile held like an accumulator through stmatrix and the copy engine.
__global__ void store_tile(const __grid_constant__ CUtensorMap map, int row) {
  __shared__ __align__(1024) char staging[16 * kPanelBytes];
  int const lane = threadIdx.x, matrix = lane / 8;
  for (int g = 0; g < 4; ++g) {
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
      Coord const c = accumulator_coord(lane, 8 * g + 2 * i);
      r[i] = pack<__nv_bfloat16>(static_cast<float>(c.row * 8 + c.col % 8),
                                 static_cast<float>(c.row * 8 + c.col % 8 + 1));
    }
    store_matrix_x4(
        smem_address(staging) + swizzled_offset(lane % 8 + 8 * (matrix % 2), g * 2 + matrix / 2),
        r[0], r[1], r[2], r[3]);
  }
  fence_async_shared();
  __syncwarp();
  if (lane == 0) {
    tma_store(map, staging, 0, row, 0, 0);
    tma_store_commit();
    tma_store_wait();
  }
}

}  // namespace

TEST("a box lands in shared memory as swizzled_offset says, zero outside the tensor") {
  for (int box_rows : {16, 64, 80, 128, 176, 192}) {
    box_lands_swizzled(300, 128, box_rows, 0, 0);
    box_lands_swizzled(300, 128, box_rows, 40, 64);
    box_lands_swizzled(300, 104, box_rows, 200, 64);  // past the last row and the last column
    box_lands_swizzled(300, 8, box_rows, 299, 0);
  }
}

TEST("a window of rows ends where it is told, whatever lies behind") {
  for (int box_rows : {64, 128})
    for (int row : {0, 1, 64, 150})
      for (int valid : {1, 63, 64, 65, 128, 140})
        if (row + valid <= 300) window_ends_where_it_is_told(300, box_rows, row, valid);
  window_ends_where_it_is_told(200, 128, 190, 10);  // the tensor's end
  window_ends_where_it_is_told(1, 64, 0, 1);
}

TEST("S = A B^T is exact for every shape that is generated") {
  abt_is_exact<__nv_bfloat16, 128, 64>();
  abt_is_exact<__nv_bfloat16, 128, 128>();
  abt_is_exact<__nv_bfloat16, 176, 128>();
  abt_is_exact<__nv_bfloat16, 80, 256>();
  abt_is_exact<__nv_bfloat16, 64, 64>();
  abt_is_exact<__nv_bfloat16, 64, 128, true>();
  abt_is_exact<__half, 128, 64>();
  abt_is_exact<__half, 128, 128>();
  abt_is_exact<__half, 176, 128>();
  abt_is_exact<__half, 80, 256>();
}

TEST("O += P B is exact for every shape that is generated") {
  pb_is_exact<__nv_bfloat16, 64, 128>();
  pb_is_exact<__nv_bfloat16, 128, 128>();
  pb_is_exact<__nv_bfloat16, 128, 176>();
  pb_is_exact<__nv_bfloat16, 256, 80>();
  pb_is_exact<__half, 64, 128>();
  pb_is_exact<__half, 128, 128>();
  pb_is_exact<__half, 128, 176>();
  pb_is_exact<__half, 256, 80>();
}

TEST("ones times the parts of values are those values, in every row") {
  ones_add_columns<64>();
  ones_add_columns<128>();
}

TEST("C = A B and C += A^T B from shared memory are exact") {
  from_shared_is_exact<__nv_bfloat16, 64, 64, false>();
  from_shared_is_exact<__nv_bfloat16, 64, 128, false>();
  from_shared_is_exact<__nv_bfloat16, 128, 64, true>();
  from_shared_is_exact<__nv_bfloat16, 128, 128, true>();
  from_shared_is_exact<__half, 64, 128, false>();
  from_shared_is_exact<__half, 128, 64, true>();
}

TEST("an accumulator is stored transposed and swizzled") {
  constexpr int kCols = 64;
  DeviceArray<uint32_t> raw(kCols * 32);
  store_transposed_tile<kCols><<<1, 128>>>(raw.data);
  finish();
  auto const got = raw.host();
  for (uint32_t row = 0; row < 64; ++row)
    for (uint32_t col = 0; col < kCols; ++col) {
      uint32_t const byte = swizzled_offset(col, row / 8) + 2 * (row % 8);
      CHECK_EQ(got[byte / 4] >> (byte % 4 * 8) & 0xFFFF, row * kCols + col);
    }
}

TEST("threads and the copy engine add to floats in memory") {
  std::vector<float> numbers(512);
  for (int i = 0; i < 512; ++i) numbers[i] = static_cast<float>(i + 1);
  DeviceArray<float> const from(numbers);
  DeviceArray<float> sums(std::vector<float>(512, 0.0f));
  add_floats<<<1, 128>>>(sums.data, from.data);
  finish();
  auto const got = sums.host();
  for (int i = 0; i < 512; ++i) CHECK_EQ(got[i], 4.0f * static_cast<float>(i + 1));
}

TEST("the lanes of a quad transpose four registers") {
  DeviceArray<uint32_t> out(128);
  transpose_quads<<<1, 32>>>(out.data);
  finish();
  auto const got = out.host();
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      CHECK_EQ(got[lane * 4 + i], static_cast<uint32_t>((lane / 4 * 4 + i) * 4 + lane % 4));
}

TEST("the output path stores a tile and nothing past the tensor") {
  constexpr int kRows = 24, kCols = 64;
  DeviceArray<__nv_bfloat16> out(kRows * kCols + 64);
  store_tile<<<1, 32>>>(matrix_map(out.data, kRows, kCols, 16), 16);  // rows 16..31 of 24
  finish();
  auto const got = out.host();
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) {
      float const x = static_cast<float>(got[r * kCols + c]);
      if (r < 16)
        CHECK(x != x);  // untouched: still NaN
      else
        CHECK_EQ(x, static_cast<float>((r - 16) * 8 + c % 8));
    }
  for (int i = 0; i < 64; ++i) {
    float const x = static_cast<float>(got[kRows * kCols + i]);
    CHECK(x != x);
  }
}

int main() {
  constexpr int kSkipped = 77;
  bool hopper = false;
  for (auto const& device : cuda::devices()) hopper |= device.major == 9;
  if (!hopper) {
    std::printf("skipped: needs a GPU of compute capability 9.0\n");
    return kSkipped;
  }
  return check::run();
}
