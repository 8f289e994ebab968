// Outputs and workspaces, made by the framework that q came from.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "bindings/import.h"

namespace flashcore::python {

using Shape = std::vector<int64_t>;

// An output array: the caller's own, or a new one like q.
struct Output {
  Tensor tensor;
  nb::object array;  // what Python gets back

  void use(nb::handle given, const char* name, const Session& session);
  // zero: filled with zeros, for gradients that are accumulated into.
  void make(const char* name, const Session& session, const Shape& shape, DLDataType dtype,
            bool zero = false);
  // The same, shaped and strided like an input.
  void make_like(const char* name, const Session& session, nb::handle source,
                 const Tensor& source_tensor, bool zero = false);
  // After the computation: the finished array (JAX takes its buffer over here); None if there is
  // none.
  nb::object take(const Session& session);

 private:
  bool made_ = false;
};

// Scratch memory on the call's device: aligned host memory, or the framework's own on a GPU.
class Workspace {
 public:
  Workspace(const Session& session, size_t bytes);
  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> host_;
  nb::object array_;
  Tensor tensor_;
  void* data_ = nullptr;
};

// The dtype that out_dtype names: a string, or a dtype object of NumPy, torch, JAX or ml_dtypes.
std::string read_dtype_name(const char* call, nb::handle out_dtype);

}  // namespace flashcore::python
