// dsinks = -sum over a head's rows of exp(sink - lse) * delta
//
// from the statistics that preprocess leaves behind. One block of threads per head, and a fixed
// order: the same bits every time. Rows that are none have -lse = -inf and delta = 0.
#include "cuda/device.h"
#include "sm90/bwd/config.h"

namespace flashcore::sm90::bwd {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads)
    flash_bwd_sm90_dsinks(const __grid_constant__ BwdParams p, int64_t rows) {
  int const head = blockIdx.x;
  const float* const minus_lse = p.minus_lse + head * rows;
  const float* const minus_delta = p.minus_delta + head * rows;
  float const sink = p.sinks[head];
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads)
    sum += double{expf(__fmaf_rn(minus_lse[i], p.score_scale, sink))} * double{minus_delta[i]};
  sums[threadIdx.x] = sum;
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) sums[threadIdx.x] += sums[threadIdx.x + n];
  }
  if (threadIdx.x == 0)
    p.dsinks[head] = static_cast<float>(sums[0] + (p.accumulate ? double{p.dsinks[head]} : 0.0));
}

}  // namespace

void launch_dsinks(const BwdParams& params, int block_m, cudaStream_t stream) {
  int64_t const rows = int64_t{params.head_blocks} * block_m;
  flash_bwd_sm90_dsinks<<<params.heads, kThreads, 0, stream>>>(params, rows);
  cuda::check(cudaGetLastError(), "flash_bwd_sm90_dsinks");
}

}  // namespace flashcore::sm90::bwd
