// Between the two products: what happens to a thread's share of S besides the softmax.
#pragma once
#include "sm90/fwd/terms.cuh"
#include "sm90/fwd/traits.cuh"

namespace flashcore::sm90::fwd {

template <class T>
struct Scores {
  int first[2], last[2];  // keys [first, last) are visible to each of the thread's rows
  std::conditional_t<T::kTerms, ScoreTerms, NoTerms> terms;

  // thread_row: the first of this thread's two rows, of the tile.
  FC_DEVICE Scores(const FwdParams& p, const Work& work, int thread_row)
      : terms(p, work, thread_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const i = thread_row + 8 * r;
      first[r] = work.window_begin + i;
      last[r] = min_of(work.seqlen_k, work.window_end + i);
    }
  }

  // Scores of block j that are excluded become -inf. visit: to which the work's ranges refer.
  template <int N>
  FC_DEVICE void exclude(const Work& work, float (&s)[N], int visit, int j) const {
    int const col = j * T::kBlockN + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (8 * (i / 4) + i % 2 >= last[(i / 2) % 2] - col) s[i] = -INFINITY;
    if (T::kMask != Mask::none && visit < work.first_full) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (8 * (i / 4) + i % 2 < first[(i / 2) % 2] - col) s[i] = -INFINITY;
    }
  }

  // Exponentials of block j to the 16 bits of the second product.
  template <int N>
  FC_DEVICE void to_probabilities(const FwdParams& p, typename T::ProbTile& probs, float (&s)[N],
                                  int j) const {
    terms.drop(p, s, j * T::kBlockN);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) probs[i] = pack<typename T::Element>(s[2 * i], s[2 * i + 1]);
  }
};

}  // namespace flashcore::sm90::fwd
