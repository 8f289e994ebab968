// A tensor that owns its memory, for calling the C ABI.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "flashcore/flashcore.h"

namespace check {

constexpr DLDataType kF32{kDLFloat, 32, 1};
constexpr DLDataType kF64{kDLFloat, 64, 1};
constexpr DLDataType kI32{kDLInt, 32, 1};
constexpr DLDataType kI64{kDLInt, 64, 1};
constexpr DLDataType kBool{kDLBool, 8, 1};

template <class T>
constexpr DLDataType type_of() {
  if (sizeof(T) == 1) return kBool;
  bool const floating = T(0.5) != T(0);
  return {static_cast<uint8_t>(floating ? kDLFloat : kDLInt), sizeof(T) * 8, 1};
}

// Row-major and packed; change stride, dtype or dl before a call to make a special one.
template <class T>
struct Array {
  std::vector<int64_t> shape, stride;
  std::vector<T> data;
  DLTensor dl{};

  Array() = default;
  explicit Array(std::vector<int64_t> dims, T fill = T(0)) : shape(dims), stride(dims.size()) {
    int64_t n = 1;
    for (size_t d = dims.size(); d-- > 0; n *= dims[d]) stride[d] = n;
    data.assign(static_cast<size_t>(n), fill);
    dl.data = data.data();
    dl.device = {kDLCPU, 0};
    dl.ndim = static_cast<int32_t>(dims.size());
    dl.dtype = type_of<T>();
    dl.shape = shape.data();
    dl.strides = stride.data();
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  template <class Engine>
  void randomise(Engine& engine) {
    std::normal_distribution<double> normal;
    for (T& x : data) x = static_cast<T>(normal(engine));
  }
  T& at(std::initializer_list<int64_t> index) {
    int64_t offset = 0;
    size_t d = 0;
    for (int64_t i : index) offset += i * stride[d++];
    return data[static_cast<size_t>(offset)];
  }
  operator DLTensor*() { return &dl; }
};

// Memory aligned as a workspace must be.
struct Workspace {
  explicit Workspace(uint64_t n) : bytes(n), memory(n + FLASHCORE_WORKSPACE_ALIGNMENT) {}
  void* data() {
    auto const at = reinterpret_cast<uintptr_t>(memory.data());
    auto const a = uintptr_t{FLASHCORE_WORKSPACE_ALIGNMENT};
    return memory.data() + ((at + a - 1) / a * a - at);
  }
  uint64_t bytes;
  std::vector<unsigned char> memory;
};

}  // namespace check
