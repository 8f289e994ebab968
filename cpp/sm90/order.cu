#include "sm90/order.h"

#include "cuda/device.h"
#include "sm90/ptx/launch.cuh"

namespace flashcore::sm90 {
namespace {

constexpr int kThreads = 256;

// A thread places one tile of a pair.
__global__ void __launch_bounds__(kThreads) place_tiles(const __grid_constant__ TileOrder o) {
  __shared__ alignas(16) int ranks[kThreads];
  let_next_kernel_begin();
  int const chunks = ceil_div(o.tiles, kThreads), own = static_cast<int>(blockIdx.x) % chunks;
  int const pair = static_cast<int>(blockIdx.x) / chunks;
  int const tile = own * kThreads + static_cast<int>(threadIdx.x);
  int rank = 0, place = 0;
  for (int i = 0; i < chunks; ++i) {
    int const first = (own + i) % chunks * kThreads, other = first + static_cast<int>(threadIdx.x);
    ranks[threadIdx.x] = other < o.tiles ? o.rank(pair, other) : INT32_MAX;
    __syncthreads();
    if (other == tile && tile < o.tiles) rank = ranks[threadIdx.x];
    for (int j = 0; j < min_of(kThreads, o.tiles - first); j += 4) {
      int4 const r = *reinterpret_cast<const int4*>(&ranks[j]);
      place += r.x < rank + (first + j < tile);
      place += r.y < rank + (first + j + 1 < tile);
      place += r.z < rank + (first + j + 2 < tile);
      place += r.w < rank + (first + j + 3 < tile);
    }
    __syncthreads();
  }
  if (tile >= o.tiles) return;
  o.order[pair * o.tiles + place] = tile;
  o.taken[1 + pair * o.tiles + tile] = -1;
  if (pair == 0 && tile == 0) o.taken[0] = -1;
}

}  // namespace

void order_tiles(const TileOrder& order, cudaStream_t stream) {
  if (order.pairs * order.tiles == 0) return;
  place_tiles<<<order.pairs * ceil_div(order.tiles, kThreads), kThreads, 0, stream>>>(order);
  cuda::check(cudaGetLastError(), "order_tiles");
}

}  // namespace flashcore::sm90
