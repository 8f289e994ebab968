// dQ is summed over key tiles in float32, in global memory: set, added to, read (dq_layout.h).
#pragma once
#include "sm90/bwd/repair.cuh"
#include "sm90/bwd/store.cuh"
#include "sm90/bwd/traits.cuh"
#include "sm90/ptx/registers.cuh"

namespace flashcore::sm90::bwd {

template <class T>
FC_DEVICE float* dq_block(const BwdParams& p, int block) {
  return p.dq_sum + int64_t{block} * (T::kBlockM * T::kHeadDim);
}

// Sets or adds quads from `to` on; of all there may be, those before `quads`.
template <class T, int N>
FC_DEVICE void set_dq(float* to, const float (&dq)[N], int quads) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    if (i < quads)
      *reinterpret_cast<float4*>(to + 128 * i) = {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2],
                                                  dq[4 * i + 3]};
}
template <class T, int N>
FC_DEVICE void add_dq(float* to, const float (&dq)[N], int quads) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i)
    if (i < quads)
      reduce_add_x4(to + 128 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}

// dq becomes the quads from `from` on, plus what it was. Not from the first-level cache, which
// does not see what add_dq does.
template <int N>
FC_DEVICE void add_sums(float (&dq)[N], const float* from, int quads) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    if (i >= quads) continue;
    float4 const x = __ldcg(reinterpret_cast<const float4*>(from + 128 * i));
    dq[4 * i] += x.x;
    dq[4 * i + 1] += x.y;
    dq[4 * i + 2] += x.z;
    dq[4 * i + 3] += x.w;
  }
}

// This thread's sums of step m of one head, from quad kFirst of part `part` on.
template <class T, int kFirst>
FC_DEVICE float* dq_sums(const BwdParams& p, const Work& work, int part, int head, int m) {
  if constexpr (T::kLaps) m = p.laps.block(m);
  return dq_block<T>(p, work.sums + head * p.slot_blocks + m) +
         T::Dq::offset(thread_index() - 128 + T::kConsumerThreads * T::rank_of(part)) +
         128 * kFirst;
}

// What the consumer keeps of a product.
template <class T>
FC_DEVICE void take_dq(typename T::DqTile& dq, const typename T::DqProduct& product, int part) {
  constexpr int kCount = 4 * T::Dq::quads(0);
  constexpr bool kHalf = T::Dq::kProductCols > 2 * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    dq[i] = kHalf && T::Dq::kept(part) > 0 ? product[i + kCount] : product[i];
}

// Where dQ goes from here: to those sums, or to its rows.
template <class T, int kFirst, int N>
FC_DEVICE void put_dq(const BwdParams& p, const Work& work, int part, int head, int m, float* sums,
                      float (&dq)[N], bool (&redo)[4 * T::kConsumers]) {
  if (!p.dq.data) return;
  int const quads = T::Dq::quads(part) - kFirst;
  if constexpr (T::kAddsOnly) {
    add_dq<T>(sums, dq, quads);
  } else {
    if (!p.whole_heads || (m >= work.complete && m < work.fresh)) {
      add_dq<T>(sums, dq, quads);
    } else if (m >= work.complete) {
      set_dq<T>(sums, dq, quads);
    } else {
      if (m < work.fresh) add_sums(dq, sums, quads);
      if (p.redo_queries && broken(dq)) {
        int const thread = thread_index() - 128;
        if (thread % 32 == 0) {
          *redo_queries(p, work, head, m,
                        thread / 32 * 2 + (T::kByCluster ? T::rank_of(part) : kFirst > 0)) = 1;
          redo[thread / 32] = true;
        }
        return;
      }
      int const row = m * T::kBlockM + T::Dq::row(part);
      int const col = T::Dq::col(part) + 8 * kFirst;
      store_rows<typename T::Element>(p.dq, p.accumulate, dq, p.scale, work.batch, head,
                                      int64_t{work.q_begin} + row, work.seqlen_q - row,
                                      work.written_q - row, col, p.head_dim - col);
    }
  }
}

}  // namespace flashcore::sm90::bwd
