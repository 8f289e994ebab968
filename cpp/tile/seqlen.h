// Where one sequence of the batch lives and how long it is. Host and device.
#pragma once
#include "tile/mask.h"

namespace flashcore::tile {

// Int: int64_t, or int in kernels, whose sequences are at most 2^29 long.
template <class Int>
struct BasicSequence {
  Int q_begin = 0;  // first row in the packed tensor; 0 when padded
  Int k_begin = 0;
  Int seqlen_q = 0;
  Int seqlen_k = 0;
  Int q_offset = 0;  // the key that row 0 faces
  Band<Int> band;    // the keys that rows see
};
using Sequence = BasicSequence<int64_t>;
using ShortSequence = BasicSequence<int>;

// P is Problem, or a kernel's parameter struct with the same field names.
template <class Int = int64_t, class P>
FC_HD constexpr BasicSequence<Int> sequence_of(P const& p, int64_t b) {
  BasicSequence<Int> s;
  s.seqlen_q = static_cast<Int>(p.seqlen_q);
  s.seqlen_k = static_cast<Int>(p.seqlen_k);
  if (p.cu_seqlens_q) {
    s.q_begin = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.q_begin;
  }
  if (p.cu_seqlens_k) {
    s.k_begin = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_begin;
  }
  if (p.seqlens_q) s.seqlen_q = p.seqlens_q[b];
  if (p.seqlens_k) s.seqlen_k = p.seqlens_k[b];
  int64_t const q_offset = p.q_offset_tensor ? p.q_offset_tensor[b]
                           : p.has_q_offset  ? p.q_offset
                           : p.top_left      ? 0
                                             : s.seqlen_k - s.seqlen_q;
  s.q_offset = within_reach<Int>(q_offset);
  s.band = band_of<Int>(p.window, q_offset);
  return s;
}

// Whether all sequences are the same, but for where a batch has them: no memory has to be read to
// know one.
template <class P>
FC_HD constexpr bool alike(P const& p) {
  return !p.cu_seqlens_q && !p.cu_seqlens_k && !p.seqlens_q && !p.seqlens_k && !p.q_offset_tensor;
}

// P: a kernel's parameters, which bring the sequence along where all are alike.
template <class P>
FC_HD constexpr ShortSequence short_sequence_of(P const& p, int b, bool alike) {
  return alike ? p.sequence : sequence_of<int>(p, b);
}

}  // namespace flashcore::tile
