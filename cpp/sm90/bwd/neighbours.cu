// Fills the table of neighbours, a block of threads for each list of a head.
#include "cuda/device.h"
#include "sm90/bwd/config.h"

namespace flashcore::sm90::bwd {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads, 1)
    flash_bwd_sm90_neighbours(const __grid_constant__ BwdParams p, int block_m, int block_n) {
  NeighbourTable const& table = p.neighbours;
  int const list = static_cast<int>(blockIdx.x) % table.lists;
  int const pair = static_cast<int>(blockIdx.x) / table.lists;
  table.fill(p, pair / table.heads, pair % table.heads, list, static_cast<int>(threadIdx.x),
             kThreads, block_m, block_n);
}

}  // namespace

void find_neighbours(const BwdParams& params, int block_m, int block_n, cudaStream_t stream) {
  int const lists = params.batch * params.neighbours.heads * params.neighbours.lists;
  if (lists == 0) return;
  flash_bwd_sm90_neighbours<<<lists, kThreads, 0, stream>>>(params, block_m, block_n);
  cuda::check(cudaGetLastError(), "flash_bwd_sm90_neighbours");
}

}  // namespace flashcore::sm90::bwd
