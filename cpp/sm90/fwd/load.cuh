// The producer's verbs: which box of Q, K, V goes where in shared memory.
#pragma once
#include "sm90/fwd/traits.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashcore::sm90::fwd {

// kRows rows, one box per panel of 64 columns. Rows and columns past the end become zeros.
template <int kRows, int kPanels>
FC_DEVICE void load_panels(char* smem, const CUtensorMap& map, Barrier& ready, int row, int head,
                           int batch, uint64_t policy) {
  ready.arrive_expect(kRows * kPanels * kPanelBytes);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    tma_load(smem + panel * kRows * kPanelBytes, map, ready, panel * kPanelCols, row, head, batch,
             policy);
}

}  // namespace flashcore::sm90::fwd
