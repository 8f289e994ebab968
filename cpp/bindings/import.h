// Reading Python arrays: any object that speaks DLPack becomes a DLTensor for the duration of a
// call. Nothing is copied and no framework is imported or linked.
//
// Two ways in, in order:
//   1. the C exchange API (PyTorch): the table is found once per Python type; a tensor costs 50 ns,
//      is borrowed rather than owned, and the producer's current stream comes from the same table;
//   2. __dlpack__() (NumPy, CuPy, JAX, others): the capsule is owned until the call returns.
#pragma once
#include <nanobind/nanobind.h>

#include "bindings/error.h"
#include "bindings/exchange_table.h"

namespace flashcore::python {

enum class Family { torch, numpy, cupy, jax, exchange, dlpack, capsule, refused };

// What a Python type is. Of array types found once and kept while the type lives; of others valid
// until the thread asks again.
struct TypeInfo {
  Family family = Family::dlpack;
  const ExchangeTable* exchange = nullptr;
  const char* refusal = nullptr;    // Family::refused: why, and what to do instead
  mutable bool max_version = true;  // __dlpack__ takes max_version (false once it said it does not)
};
const TypeInfo& array_type(nb::handle object);

// What the arguments of one call share: who leads it (q), where it runs, on which stream.
struct Session {
  const char* call = "";  // for messages: "attention"
  const TypeInfo* lead = nullptr;
  nb::object lead_type;  // lead lives as long as it does
  nb::handle like;       // the leading array: outputs are made like it
  DLDevice device{kDLCPU, 0};
  bool grads = false;         // torch leads and autograd records
  bool stream_given = false;  // by the caller's stream=
  void* stream = nullptr;     // a raw cudaStream_t

  bool cuda() const { return device.device_type == kDLCUDA; }
};

enum class Access {
  read,
  write,
  made,  // written, and made by us just now: nothing about it needs a check
};

// One array argument. Not movable: the DLTensor points into the object.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (versioned_ || unversioned_) release();
  }

  // The first argument of a call: decides session.lead, device and stream.
  void import_lead(nb::handle object, const char* name, Session& session,
                   Access access = Access::read);
  void import(nb::handle object, const char* name, const Session& session,
              Access access = Access::read);

  // NULL unless something was imported.
  DLTensor* get() { return given_ ? &tensor_ : nullptr; }
  bool given() const { return given_; }
  const DLTensor& operator*() const { return tensor_; }
  const DLTensor* operator->() const { return &tensor_; }

 private:
  static constexpr int kMaxDims = 8;

  struct Where {  // an argument, for messages
    const Session& session;
    const char* name;
    nb::handle object;
  };

  void view(const Where& where, const ExchangeTable& table);
  void call_dlpack(const Where& where, const TypeInfo& info, nb::handle stream);
  void own(const Where& where, nb::handle capsule);
  void adopt(const Where& where, const DLTensor& from);
  void finish(const Where& where, const TypeInfo& info, Access access);
  void release();

  DLTensor tensor_;
  int64_t shape_[kMaxDims];
  int64_t strides_[kMaxDims];
  uint64_t flags_ = 0;
  bool given_ = false;
  DLManagedTensorVersioned* versioned_ = nullptr;
  DLManagedTensor* unversioned_ = nullptr;
};

// "float32", "bfloat16", ...; "" for what no framework allocates for us.
std::string dtype_name(DLDataType type);

}  // namespace flashcore::python
