// Small types every ring of the core shares. Host and device.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FC_HD __host__ __device__
#elif defined(FLASHCORE_CPU_KERNELS)  // a copy out of line would be shared between instruction sets
#define FC_HD [[gnu::always_inline]] inline
#else
#define FC_HD
#endif

namespace flashcore {

enum class DType : uint8_t { f16, bf16, f32, f64 };
enum class Direction : uint8_t { forward, backward };

constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
  }
  return "?";
}
constexpr int64_t dtype_bytes(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

template <class T>
FC_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
FC_HD constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}
template <class T>
FC_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FC_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace flashcore
