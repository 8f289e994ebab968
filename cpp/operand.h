// What one tensor is to a call: rows of vectors, a statistic per row, scores, a small vector. Each
// reader checks device, dtype, shape and strides against the problem so far, and says what is
// wrong.
#pragma once
#include <initializer_list>

#include "argument.h"
#include "common/problem.h"
#include "flashcore/flashcore.h"

namespace flashcore {

// Where batch, row and head are in a 4-D (layout) or 3-D (packed) tensor.
struct Dims {
  int batch, row, head, last;  // batch: -1 where sequences are packed
  const char* text;

  bool packed() const { return batch < 0; }
  int rank() const { return packed() ? 3 : 4; }
};
Dims dims_of(bool packed, flashcore_layout layout);

// The dtype of q, or of the first partial result.
DType read_dtype(const Arg& q);
DType one_of(const Arg& a, std::initializer_list<DType> allowed);
// Statistics and accumulated results: float32, or float64 throughout a float64 problem.
inline DType wide(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

Rows as_rows(const Arg& a, const Dims& d, DType dtype);

// A tensor shaped like q (rows x heads x last), e.g. out or dq.
Rows read_rows(const char* name, const DLTensor* tensor, const Dims& d, const Problem& p,
               int64_t rows, int64_t heads, int64_t last, bool output,
               std::initializer_list<DType> dtypes);

// lse, max_logits, dlse: (B, Hq, Sq) or packed (Hq, total_q).
Rows read_stats(const char* name, const DLTensor* tensor, bool packed, const Problem& p,
                bool output);

// bias, mask, dbias: (B|1, Hq|1, Sq|1, Sk|1).
Scores read_scores(const char* name, const DLTensor* tensor, const Problem& p);

// A vector on q's device.
const void* read_vector(const char* name, const DLTensor* tensor, int64_t size, int code, int bits,
                        const Problem& p);
inline const int32_t* read_int32(const char* name, const DLTensor* t, int64_t size,
                                 const Problem& p) {
  return static_cast<const int32_t*>(read_vector(name, t, size, kDLInt, 32, p));
}

}  // namespace flashcore
