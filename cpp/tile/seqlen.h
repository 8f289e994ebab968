// Where one sequence of the batch lives and how long it is. Host and device.
#pragma once
#include "common/types.h"

namespace flashcore::tile {

struct Sequence {
  int64_t q_begin = 0;  // first row in the packed tensor; 0 when padded
  int64_t k_begin = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t q_offset = 0;  // the key that row 0 faces
};

// P is Problem, or a kernel's parameter struct with the same field names.
template <class P>
FC_HD constexpr Sequence sequence_of(P const& p, int64_t b) {
  Sequence s;
  s.seqlen_q = p.seqlen_q;
  s.seqlen_k = p.seqlen_k;
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
  if (p.q_offset_tensor)
    s.q_offset = p.q_offset_tensor[b];
  else if (p.has_q_offset)
    s.q_offset = p.q_offset;
  else
    s.q_offset = p.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

}  // namespace flashcore::tile
