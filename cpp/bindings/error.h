// Errors on their way to Python: every failure becomes one of the classes of flashcore.errors.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "common/text.h"
#include "flashcore/flashcore.h"

namespace flashcore::python {

namespace nb = nanobind;

// Becomes flashcore.errors.<python_class>. Thrown where the GIL is held.
struct Refusal : std::runtime_error {
  Refusal(const char* python_class, const std::string& text)
      : std::runtime_error(text), python_class(python_class) {}
  const char* python_class;
};

template <class... Parts>
[[noreturn]] void refuse_argument(const Parts&... parts) {
  throw Refusal("ArgumentError", text(parts...));
}
template <class... Parts>
[[noreturn]] void refuse_type(const Parts&... parts) {
  throw Refusal("ArgumentTypeError", text(parts...));
}
template <class... Parts>
[[noreturn]] void refuse_unsupported(const Parts&... parts) {
  throw Refusal("UnsupportedError", text(parts...));
}

// Throws for the core's failures, with the core's text.
inline void check(flashcore_status status) {
  switch (status) {
    case FLASHCORE_OK:
      return;
    case FLASHCORE_INVALID_ARGUMENT:
      throw Refusal("ArgumentError", flashcore_last_error());
    case FLASHCORE_UNSUPPORTED:
      throw Refusal("UnsupportedError", flashcore_last_error());
    case FLASHCORE_DEVICE_ERROR:
      throw Refusal("DeviceError", flashcore_last_error());
    case FLASHCORE_INTERNAL_ERROR:
      break;
  }
  throw Refusal("Error", flashcore_last_error());
}

// A new reference to a Python string, as UTF-8. Python strings may hold what UTF-8 cannot (lone
// surrogates); those become escapes.
inline std::string utf8(PyObject* string) {
  nb::object const owned = nb::steal(string);
  if (!owned) throw nb::python_error();
  nb::object const bytes =
      nb::steal(PyUnicode_AsEncodedString(string, "utf-8", "backslashreplace"));
  if (!bytes) throw nb::python_error();
  return {PyBytes_AsString(bytes.ptr()), static_cast<size_t>(PyBytes_Size(bytes.ptr()))};
}

// str(object)
inline std::string str_text(nb::handle object) { return utf8(PyObject_Str(object.ptr())); }

// For messages: 'bsdh', 3, (1, 2)
inline std::string shown(nb::handle object) { return utf8(PyObject_Repr(object.ptr())); }

// "list", "torch.Tensor", "numpy.ndarray"
inline std::string type_text(nb::handle object) {
  nb::handle const type = object.type();
  std::string const module = str_text(nb::object(type.attr("__module__")));
  std::string const name = str_text(nb::object(type.attr("__qualname__")));
  return module == "builtins" ? name : module + "." + name;
}

}  // namespace flashcore::python
