// Reading one tensor argument: its shape, strides and data, and what to say when they are wrong.
// Used by operand.h and the validate*.cpp files alone.
#pragma once
#include <initializer_list>
#include <string>

#include "common/error.h"
#include "common/problem.h"
#include "common/text.h"

namespace flashcore {

// ---- failing ------------------------------------------------------------------------------------

inline thread_local const char* current_call = "attention";

template <class... Parts>
[[noreturn]] void fail_as(flashcore_status status, const Parts&... parts) {
  throw Failure(status, text("[", current_call, "] ", parts...));
}
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  fail_as(FLASHCORE_INVALID_ARGUMENT, parts...);
}
template <class... Parts>
[[noreturn]] void unsupported(const Parts&... parts) {
  fail_as(FLASHCORE_UNSUPPORTED, parts...);
}

// ---- reading structures -------------------------------------------------------------------------

// The caller's structure. There is one version of each so far; an older one will be zero-extended.
template <class Args>
const Args& read_struct(const Args* args, const char* what) {
  if (!args) fail(what, " is NULL");
  uint32_t const size = args->struct_size;
  if (size > sizeof(Args))
    fail(what, ".struct_size is ", size, " but this library (", FLASHCORE_VERSION_MAJOR, ".",
         FLASHCORE_VERSION_MINOR, ") knows ", sizeof(Args),
         " bytes: the program was compiled against a newer flashcore.h");
  if (size < sizeof(Args))
    fail(what, ".struct_size is ", size, ", expected ", sizeof(Args), ": set it to sizeof(*args)");
  return *args;
}

// ---- reading tensors ----------------------------------------------------------------------------

inline std::string type_name(DLDataType t) {
  const char* const stem = t.code == kDLInt                                          ? "int"
                           : t.code == kDLUInt                                       ? "uint"
                           : t.code == kDLFloat                                      ? "float"
                           : t.code == kDLBfloat                                     ? "bfloat"
                           : t.code == kDLBool                                       ? "bool"
                           : t.code == kDLComplex                                    ? "complex"
                           : t.code >= kDLFloat8_e3m4 && t.code <= kDLFloat8_e8m0fnu ? "float8_"
                                                                                     : "dtype";
  if (t.code == kDLBool && t.bits == 8) return "bool";
  std::string s = text(stem, int{t.bits});
  if (t.lanes != 1) s += text("x", int{t.lanes});
  return s;
}

inline std::string device_name(int type, int id) {
  switch (type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDA:
      return text("cuda:", id);
    default:
      return text("device type ", type, ":", id);
  }
}

// "float32[2,1024,16,64]"
inline std::string show(const DLTensor& t) {
  constexpr int kMostShown = 8;  // ndim may be anything in a damaged structure
  if (t.ndim < 0 || t.ndim > kMostShown) return text(type_name(t.dtype), " with ndim ", t.ndim);
  std::string s = type_name(t.dtype) + "[";
  for (int d = 0; d < t.ndim; ++d) s += text(d ? "," : "", t.shape[d]);
  return s + "]";
}

inline bool is_type(DLDataType t, int code, int bits) {
  return t.code == code && t.bits == bits && t.lanes == 1;
}
inline bool is_float(DLDataType t, DType want) {
  switch (want) {
    case DType::f16:
      return is_type(t, kDLFloat, 16);
    case DType::bf16:
      return is_type(t, kDLBfloat, 16);
    case DType::f32:
      return is_type(t, kDLFloat, 32);
    case DType::f64:
      return is_type(t, kDLFloat, 64);
  }
  return false;
}

inline int device_type_of(const DLTensor& t) {
  switch (int const type = t.device.device_type) {
    case kDLCUDAHost:
      return kDLCPU;  // pinned memory is ordinary memory to the CPU
    case kDLCUDAManaged:
      return kDLCUDA;
    default:
      return type;
  }
}

inline constexpr int64_t kMaxExtent = INT32_MAX;  // positions are 32-bit inside the kernels
inline constexpr int64_t kMaxElements = int64_t{1} << 48;  // more than fits any memory

// One argument: its name for messages, its tensor, and its strides in elements.
struct Arg {
  const char* name;
  const DLTensor* tensor;
  int64_t stride[4] = {};
  bool empty = false;

  int64_t size(int d) const { return tensor->shape[d]; }
  // Never null, so that a given tensor without elements is not taken for one that was not given.
  void* data() const {
    return empty ? nothing : static_cast<char*>(tensor->data) + tensor->byte_offset;
  }
  alignas(FLASHCORE_WORKSPACE_ALIGNMENT) static inline char nothing[1] = {};
};

// Shape, strides and data of an argument; the dimensions' meaning is checked by the caller.
inline Arg read(const char* name, const DLTensor* tensor, int ndim, const char* dims) {
  if (!tensor) fail(name, " is required: pass a tensor ", dims);
  if (tensor->ndim != ndim || !tensor->shape)
    fail(name, " must have ", ndim, " dimensions ", dims, ", got ",
         tensor->shape ? show(*tensor) : text(tensor->ndim, " and no shape"));
  Arg arg{name, tensor};
  int64_t packed = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    int64_t const n = tensor->shape[d];
    if (n < 0 || n > kMaxExtent)
      fail(name, " has an extent outside 0..", kMaxExtent, ": ", show(*tensor));
    arg.stride[d] = n > 1 ? packed : 0;
    arg.empty |= n == 0;
    if (__builtin_mul_overflow(packed, max_of<int64_t>(n, 1), &packed) || packed > kMaxElements)
      fail(name, " has more than 2^48 elements: ", show(*tensor));
  }
  // Producers leave anything in dimensions of size 1 and in tensors without elements.
  if (tensor->strides && !arg.empty)
    for (int d = 0; d < ndim; ++d)
      if (tensor->shape[d] > 1) arg.stride[d] = tensor->strides[d];
  if (!tensor->data && !arg.empty)
    fail(name, " has no data (NULL) although it is ", show(*tensor),
         ": fake, meta and freed tensors cannot be computed on");
  return arg;
}

inline void require_unit_stride(const Arg& a) {
  int const last = a.tensor->ndim - 1;
  if (a.size(last) > 1 && a.stride[last] != 1)
    fail(a.name, " must have stride 1 along its last dimension, got ", a.stride[last], " (",
         show(*a.tensor), "): pass a contiguous copy");
}

inline void require_writable_layout(const Arg& a) {
  for (int d = 0; d < a.tensor->ndim; ++d)
    if (a.size(d) > 1 && a.stride[d] == 0)
      fail(a.name, " is an output but dimension ", d, " has stride 0, so its rows overlap (",
           show(*a.tensor), ")");
}

inline void require_device(const Problem& p, const Arg& a) {
  int const type = device_type_of(*a.tensor);
  int const id = a.tensor->device.device_id;
  if (type != p.device_type || (type != kDLCPU && id != p.device_id))
    fail(a.name, " is on ", device_name(type, id), " but q is on ",
         device_name(p.device_type, p.device_id), ": all tensors of a call share one device");
}

}  // namespace flashcore
