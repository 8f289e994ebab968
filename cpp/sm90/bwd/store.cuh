// From accumulators to rows in global memory, in either dtype, set or added.
#pragma once
#include "sm90/bwd/config.h"
#include "sm90/layout.h"
#include "sm90/ptx/registers.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::bwd {

// Where a thread's first element of accumulator row `row` of the tile belongs.
template <class Out>
FC_DEVICE Out* row_address(const Matrix& m, int batch, int head, int64_t row, int col) {
  return static_cast<Out*>(m.data) + batch * m.batch_stride + head * m.head_stride +
         row * m.row_stride + col;
}

template <class Element>
FC_DEVICE void put_pair(Element* to, float x, float y, bool add) {
  if (add) {
    x += static_cast<float>(to[0]);
    y += static_cast<float>(to[1]);
  }
  *reinterpret_cast<uint32_t*>(to) = pack<Element>(x, y);
}
template <>
FC_DEVICE void put_pair<float>(float* to, float x, float y, bool add) {
  float2* const at = reinterpret_cast<float2*>(to);
  float2 const old = add ? *at : float2{0.0f, 0.0f};
  *at = {x + old.x, y + old.y};
}

// Eight neighbours of a row times scale, in either dtype, set or added. scale 0: zeros, whatever
// they are.
template <class Element>
FC_DEVICE void store_chunk(const Matrix& m, bool add, float (&x)[8], float scale, int batch,
                           int head, int64_t row, int col) {
#pragma unroll
  for (float& element : x) element = scale == 0.0f ? 0.0f : element * scale;
  if (!m.f32 && !add) {
    *reinterpret_cast<uint4*>(row_address<Element>(m, batch, head, row, col)) = {
        pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]),
        pack<Element>(x[6], x[7])};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    if (m.f32)
      put_pair(row_address<float>(m, batch, head, row, col + i), x[i], x[i + 1], add);
    else
      put_pair(row_address<Element>(m, batch, head, row, col + i), x[i], x[i + 1], add);
}

// A 64 x N accumulator times scale, written as it lies: pairs of neighbours.
template <class Out, int N>
FC_DEVICE void store_pairs(const Matrix& m, bool add, const float (&x)[N], float scale, int batch,
                           int head, int64_t row, int valid, int rows, int col, int cols) {
  int const lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (first + 8 * r >= rows) continue;
    bool const padding = first + 8 * r >= valid;
    Out* const to = row_address<Out>(m, batch, head, row + first + 8 * r, col + lane % 4 * 2);
#pragma unroll
    for (int g = 0; g < N / 4; ++g)
      if (8 * g < cols)
        put_pair<Out>(to + 8 * g, padding ? 0.0f : x[4 * g + 2 * r] * scale,
                      padding ? 0.0f : x[4 * g + 2 * r + 1] * scale, add);
  }
}

// The same in chunks of 16 bytes, which the four lanes of a row exchange among themselves.
template <class Element, int N>
FC_DEVICE void store_chunks(const Matrix& m, const float (&x)[N], float scale, int batch, int head,
                            int64_t row, int valid, int rows, int col, int cols) {
  static_assert(N % 16 == 0);  // of 32 columns
  int const lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    bool const padding = first + 8 * r >= valid;
    Element* const to =
        row_address<Element>(m, batch, head, row + first + 8 * r, col + lane % 4 * 8);
#pragma unroll
    for (int g = 0; g < N / 4; g += 4) {
      uint32_t chunk[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &x[4 * (g + i) + 2 * r];
        chunk[i] = padding ? 0 : pack<Element>(pair[0] * scale, pair[1] * scale);
      }
      quad_transpose(chunk);
      if (first + 8 * r < rows && 8 * g + lane % 4 * 8 < cols)
        *reinterpret_cast<uint4*>(to + 8 * g) = {chunk[0], chunk[1], chunk[2], chunk[3]};
    }
  }
}

// The same by way of shared memory, a warp's 16 rows: in panels of kRows rows, from row `first` on,
// which are this warp's own. The copy engine writes them while the warp goes on, and leaves out
// what is past the end of the tensor. Where a packed sequence ends it does not know: there ordinary
// stores do.
template <class Element, int kRows, int N>
FC_DEVICE void store_boxes(const CUtensorMap& map, const Matrix& m, bool packed, char* panels,
                           int first, const float (&x)[N], float scale, int batch, int head,
                           int row, int valid, int rows, int cols) {
  rows = max_of(rows, 0);  // of a rehearsal it is far below
  int const lane = threadIdx.x % 32, matrix = lane / 8;
  bool const stores = elect_one();  // the same lane whenever the warp is together
  bool const kept[] = {lane / 4 < valid, lane / 4 + 8 < valid};
  if (stores) tma_store_wait_read();  // what was stored before has left
  __syncwarp();
  uint32_t const base = smem_address(panels);
#pragma unroll
  for (int g = 0; g < N / 8; ++g) {  // of 16 columns
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = &x[8 * g + 2 * i];
      pairs[i] = kept[i % 2] ? pack<Element>(pair[0] * scale, pair[1] * scale) : 0;
    }
    store_matrix_x4(base + g / 4 * kRows * kPanelBytes +
                        swizzled_offset(first + lane % 8 + matrix % 2 * 8, g % 4 * 2 + matrix / 2),
                    pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  fence_async_shared();
  __syncwarp();
  bool const cut = packed && rows < kStoredRows;
  if (!cut && stores) {
#pragma unroll
    for (int panel = 0; panel < ceil_div(2 * N, kPanelCols); ++panel)
      if (panel * kPanelCols < cols)
        tma_store(map, panels + (panel * kRows + first) * kPanelBytes, panel * kPanelCols, row,
                  head, packed ? 0 : batch);
    tma_store_commit();
  }
  Element* const to = row_address<Element>(m, packed ? 0 : batch, head, row, 0);
  for (int i = lane; cut && i < rows * (N / 4); i += 32) {  // 16 bytes each
    int const r = i / (N / 4), col = i % (N / 4) * 8;
    if (col < cols)
      *reinterpret_cast<uint4*>(to + r * m.row_stride + col) =
          *reinterpret_cast<const uint4*>(panels + col / kPanelCols * kRows * kPanelBytes +
                                          swizzled_offset(first + r, col % kPanelCols / 8));
  }
  __syncwarp();
}

// A 64 x N accumulator times scale, to (or added to) rows [row, row + rows) and columns
// [col, col + cols) of a head; what lies past those is left alone. Rows from the valid-th on are
// padding: zero, whatever the accumulator holds.
template <class Element, int N>
FC_DEVICE void store_rows(const Matrix& m, bool add, const float (&x)[N], float scale, int batch,
                          int head, int64_t row, int valid, int rows, int col, int cols) {
  if (m.f32)
    store_pairs<float>(m, add, x, scale, batch, head, row, valid, rows, col, cols);
  else if (add)
    store_pairs<Element>(m, add, x, scale, batch, head, row, valid, rows, col, cols);
  else
    store_chunks<Element>(m, x, scale, batch, head, row, valid, rows, col, cols);
}

}  // namespace flashcore::sm90::bwd
