// From O in registers to global memory, warp by warp.
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::fwd {

// Where the work's sequence has its lse, or this split's part of it; null if nobody asks for it.
FC_DEVICE float* lse_rows(const FwdParams& p, const Work& work) {
  if (p.num_splits > 1) return p.partial_lse + partial_index(p, work, 0);
  return p.lse ? p.lse + work.batch * p.lse_batch_stride + work.head * p.lse_head_stride +
                     work.q_begin
               : nullptr;
}

// The first kStaged columns, through the staging area, whose rows are this warp's own: the copy
// engine leaves out the rows and columns past the end of the tensor.
template <class T>
FC_DEVICE void store_o_staged(const FwdParams& p, typename T::Shared& sh, const Work& work,
                              const typename T::OutputTile& o, int warp_row) {
  using Element = typename T::Element;
  int const lane = threadIdx.x % 32;
  // Lane l addresses row l % 8 of 8x8 matrix l / 8; the matrices are (row half) + 2 * (column
  // half).
  int const matrix = lane / 8;
  int const staging_row = warp_row + lane % 8 + 8 * (matrix % 2);
  if (elect_one()) tma_store_wait_read();  // the previous tile's stores have left the staging area
  __syncwarp();
  uint32_t const base = smem_address(sh.o);
#pragma unroll
  for (int g = 0; g < T::kStaged / 16; ++g) {
    uint32_t const address = base + (g / 4) * T::kBlockM * kPanelBytes +
                             swizzled_offset(staging_row, (g % 4) * 2 + matrix / 2);
    store_matrix_x4(
        address, pack<Element>(o[8 * g], o[8 * g + 1]), pack<Element>(o[8 * g + 2], o[8 * g + 3]),
        pack<Element>(o[8 * g + 4], o[8 * g + 5]), pack<Element>(o[8 * g + 6], o[8 * g + 7]));
  }
  fence_async_shared();
  __syncwarp();
  // The copy engine does not know where a packed sequence ends: there ordinary stores do.
  bool const cut = p.cu_seqlens_q && work.row + warp_row + 16 > work.seqlen_q;
  if (!cut && elect_one()) {  // the same lane whenever the warp is together
    int const batch = p.cu_seqlens_q ? 0 : work.batch;
#pragma unroll
    for (int panel = 0; panel < T::kPanelsO; ++panel)
      if (panel * kPanelCols < p.head_dim_v)
        tma_store(p.out, sh.o + (panel * T::kBlockM + warp_row) * kPanelBytes, panel * kPanelCols,
                  work.q_begin + work.row + warp_row, work.head, batch);
    tma_store_commit();
  }
  int const rows = cut ? max_of(0, work.seqlen_q - work.row - warp_row) : 0;  // of the warp's 16
  auto* const out = static_cast<Element*>(p.out_ref.data) + work.head * p.out_ref.head_stride +
                    (int64_t{work.q_begin} + work.row + warp_row) * p.out_ref.row_stride;
  for (int i = lane; i < rows * T::kStaged / 8; i += 32) {  // 16 bytes each
    int const row = i / (T::kStaged / 8), col = i % (T::kStaged / 8) * 8;
    if (col < p.head_dim_v)
      *reinterpret_cast<uint4*>(out + row * p.out_ref.row_stride + col) =
          *reinterpret_cast<const uint4*>(sh.o + col / kPanelCols * T::kBlockM * kPanelBytes +
                                          swizzled_offset(warp_row + row, col % kPanelCols / 8));
  }
  __syncwarp();
}

// The other columns, straight from the registers. The four lanes of a quad hold neighbouring pairs
// of columns of a row; they exchange them, so that each writes 16 bytes at once.
template <class T>
FC_DEVICE void store_o_direct(const FwdParams& p, const Work& work, const typename T::OutputTile& o,
                              int warp_row) {
  using Element = typename T::Element;
  int const quad_lane = threadIdx.x % 4;
  int const rows = p.cu_seqlens_q ? work.seqlen_q : p.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int const i = work.row + warp_row + threadIdx.x % 32 / 4 + 8 * r;
    auto* const out = static_cast<Element*>(p.out_ref.data) + work.batch * p.out_ref.batch_stride +
                      work.head * p.out_ref.head_stride +
                      (work.q_begin + i) * p.out_ref.row_stride + 8 * quad_lane;
#pragma unroll
    for (int c = T::kStaged / 32; c < T::kHeadDimV / 32; ++c) {  // 32 columns: eight of each lane
      uint32_t x[4];
#pragma unroll
      for (int g = 0; g < 4; ++g)
        x[g] = pack<Element>(o[16 * c + 4 * g + 2 * r], o[16 * c + 4 * g + 2 * r + 1]);
      quad_transpose(x);
      if (i < rows && 32 * c + 8 * quad_lane < p.head_dim_v)
        *reinterpret_cast<uint4*>(out + 32 * c) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

// The result over part of the keys, float32, to the workspace.
template <class T>
FC_DEVICE void store_o_partial(const FwdParams& p, const Work& work,
                               const typename T::OutputTile& o, int warp_row) {
  int const rows = p.cu_seqlens_q ? work.seqlen_q : p.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int const i = work.row + warp_row + threadIdx.x % 32 / 4 + 8 * r;
    int const col = 2 * (threadIdx.x % 4);
    float* const out = p.partial_out + partial_index(p, work, i) * p.head_dim_v + col;
#pragma unroll
    for (int c = 0; c < T::kHeadDimV / 8; ++c)
      if (i < rows && 8 * c + col < p.head_dim_v)
        *reinterpret_cast<float2*>(out + 8 * c) =
            make_float2(o[4 * c + 2 * r], o[4 * c + 2 * r + 1]);
  }
}

// Writes the 16 rows of O from warp_row of the tile, this warp's.
template <class T>
FC_DEVICE void store_o(const FwdParams& p, typename T::Shared& sh, const Work& work,
                       const typename T::OutputTile& o, int warp_row) {
  if (p.num_splits > 1) return store_o_partial<T>(p, work, o, warp_row);
  if constexpr (T::kStaged > 0) store_o_staged<T>(p, sh, work, o, warp_row);
  if constexpr (T::kStaged < T::kHeadDimV) store_o_direct<T>(p, work, o, warp_row);
}

}  // namespace flashcore::sm90::fwd
