// Building error texts: text("head_dim must be ", 8, ", got ", shape(t)).
#pragma once
#include <cstdio>
#include <string>
#include <type_traits>

#include "flashcore/flashcore.h"

namespace flashcore {

inline std::string to_text(const char* s) { return s; }
inline std::string to_text(const std::string& s) { return s; }
inline std::string to_text(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", x);
  return buffer;
}
template <class Int>
  requires std::is_integral_v<Int>
std::string to_text(Int x) {
  return std::to_string(x);
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string s;
  ((s += to_text(parts)), ...);
  return s;
}

}  // namespace flashcore
