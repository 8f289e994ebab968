// From O in registers to global memory, warp by warp.
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::fwd {

// Writes this warp's 16 rows of O through its own rows of the staging area. When that area is the Q
// tile, every warp of the warpgroup must be past its last read of Q, and on return Q may be
// refilled.
template <class T>
FC_DEVICE void store_o(const FwdParams& p, typename T::Shared& sh, const typename T::OutputTile& o,
                       int tile_row, int row, int head, int batch) {
  int const lane = threadIdx.x % 32;
  // Lane l addresses row l % 8 of 8x8 matrix l / 8; the matrices are (row half) + 2 * (column
  // half).
  int const matrix = lane / 8;
  int const staging_row = tile_row + lane % 8 + 8 * (matrix % 2);
  if constexpr (T::kOwnStaging) {  // the previous tile's stores have left the staging area
    if (lane == 0) tma_store_wait_read();
    __syncwarp();
  }
  uint32_t const base = smem_address(sh.staging());
#pragma unroll
  for (int g = 0; g < T::kHeadDim / 16; ++g) {
    uint32_t const address = base + (g / 4) * T::kBlockM * kPanelBytes +
                             swizzled_offset(staging_row, (g % 4) * 2 + matrix / 2);
    using Element = typename T::Element;
    store_matrix_x4(
        address, pack<Element>(o[8 * g], o[8 * g + 1]), pack<Element>(o[8 * g + 2], o[8 * g + 3]),
        pack<Element>(o[8 * g + 4], o[8 * g + 5]), pack<Element>(o[8 * g + 6], o[8 * g + 7]));
  }
  fence_async_shared();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel)
      if (panel * kPanelCols < p.head_dim_v)
        tma_store(p.out, sh.staging() + (panel * T::kBlockM + tile_row) * kPanelBytes,
                  panel * kPanelCols, row, head, batch);
    tma_store_commit();
    if constexpr (!T::kOwnStaging) tma_store_wait_read();  // Q's rows are about to be refilled
  }
  __syncwarp();
}

}  // namespace flashcore::sm90::fwd
