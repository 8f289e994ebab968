// Whether an output shares memory with another tensor, or with itself: the result would depend on
// the order in which tiles run.
#pragma once
#include <cstdlib>
#include <utility>

#include "argument.h"

namespace flashcore {

// Bytes [first, last) between the lowest and the highest element.
struct Span {
  const char* first;
  const char* last;
};
inline Span span_of(const Arg& a) {
  int64_t low = 0, high = 0;
  for (int d = 0; d < a.tensor->ndim; ++d) {
    int64_t const reach = (a.size(d) - 1) * a.stride[d];
    (reach < 0 ? low : high) += reach;
  }
  auto const* const data = static_cast<const char*>(a.data());
  int64_t const bytes = a.tensor->dtype.bits / 8;
  return {data + low * bytes, data + (high + 1) * bytes};
}

// At most four dimensions, by rising stride.
template <class Dim>
void sort_by_stride(Dim* dims, int rank) {
  for (int i = 1; i < rank; ++i)
    for (int j = i; j > 0 && dims[j].stride < dims[j - 1].stride; --j)
      std::swap(dims[j], dims[j - 1]);
}

// Two indices of one tensor may name the same element.
inline bool overlaps_itself(const Arg& a) {
  struct Dim {
    int64_t stride, size;
  } dims[4];
  int rank = 0;
  for (int d = 0; d < a.tensor->ndim; ++d)
    if (a.size(d) > 1) dims[rank++] = {std::llabs(a.stride[d]), a.size(d)};
  sort_by_stride(dims, rank);
  int64_t reach = 0;  // of all smaller strides together
  for (int i = 0; i < rank; ++i) {
    if (dims[i].stride <= reach) return true;
    reach += (dims[i].size - 1) * dims[i].stride;
  }
  return false;
}

namespace overlap_detail {
struct Dim {
  int64_t stride, size_a, size_b;
};
// Is there a k with -size_b < k[d] < size_a and offset + sum k[d] * stride[d] = 0? Strides are
// positive, rising, and each larger than what the earlier ones reach together.
inline bool meet(const Dim* dims, int rank, int64_t offset) {
  if (rank == 0) return offset == 0;
  const Dim& largest = dims[rank - 1];
  int64_t const s = largest.stride;
  int64_t const below = -offset / s - (-offset % s < 0 ? 1 : 0);  // floor(-offset / s)
  for (int64_t k : {below, below + 1})
    if (-largest.size_b < k && k < largest.size_a && meet(dims, rank - 1, offset + k * s))
      return true;
  return false;
}
}  // namespace overlap_detail

// Exact for tensors with equal strides (dq, dk and dv as slices of one buffer share no element
// though their spans do); for others, whether their spans meet.
inline bool overlap(const Arg& a, const Arg& b) {
  if (a.empty || b.empty) return false;
  Span const x = span_of(a), y = span_of(b);
  if (x.last <= y.first || y.last <= x.first) return false;
  if (a.tensor->ndim != b.tensor->ndim || a.tensor->dtype.bits != b.tensor->dtype.bits) return true;
  overlap_detail::Dim dims[4];
  int rank = 0;
  for (int d = 0; d < a.tensor->ndim; ++d) {
    if (a.size(d) == 1 && b.size(d) == 1) continue;
    int64_t const stride = a.size(d) > 1 ? a.stride[d] : b.stride[d];
    if (stride <= 0 || (a.size(d) > 1 && b.size(d) > 1 && a.stride[d] != b.stride[d])) return true;
    dims[rank++] = {stride, a.size(d), b.size(d)};
  }
  sort_by_stride(dims, rank);
  int64_t const bytes = a.tensor->dtype.bits / 8;
  int64_t const offset = static_cast<char*>(a.data()) - static_cast<char*>(b.data());
  if (offset % bytes != 0) return true;
  return overlap_detail::meet(dims, rank, offset / bytes);
}

}  // namespace flashcore
