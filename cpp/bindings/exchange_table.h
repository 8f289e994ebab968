// DLPack's C exchange API: the table behind type(x).__dlpack_c_exchange_api__ (DLPack 1.2 and
// later, major version 1). Declared here under our own names because <dlpack/dlpack.h>, where
// there is one, may be older or newer.
#pragma once
#include "flashcore/dlpack.h"

namespace flashcore::python {

struct ExchangeTable {
  struct Header {
    DLPackVersion version;
    Header* previous;  // an older table of the same producer, or null
  } header;
  // All return 0, or -1 with a Python exception set.
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*from_object)(void* object, DLManagedTensorVersioned** out);   // owning
  int (*to_object)(DLManagedTensorVersioned* tensor, void** object);  // steals tensor
  int (*view_object)(void* object, DLTensor* out);  // borrows from the object; may be null
  int (*current_stream)(DLDeviceType type, int32_t device_id, void** stream);
};

}  // namespace flashcore::python
