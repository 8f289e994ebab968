// Failures inside the core. Thrown anywhere on the host, caught once in api.cpp, where they become
// a status and this thread's error text.
#pragma once
#include <stdexcept>
#include <string>

#include "flashcore/flashcore.h"

namespace flashcore {

struct Failure : std::runtime_error {
  Failure(flashcore_status status, const std::string& text)
      : std::runtime_error(text), status(status) {}
  flashcore_status status;
};

}  // namespace flashcore
