// Names of Python attributes, made once and interned: Python's cache of attribute lookups knows a
// name by its address, so that a name made for each use would search every class anew.
#pragma once
#include <nanobind/nanobind.h>

#include <algorithm>

namespace flashcore::python {

namespace nb = nanobind;

template <size_t N>
struct NameText {
  char characters[N];
  consteval NameText(const char (&text)[N]) { std::copy_n(text, N, characters); }
};

// interned<"requires_grad">(): for attr() and getattr().
template <NameText Text>
nb::handle interned() {
  static PyObject* made = nullptr;  // no initialiser: see Call::read_inputs
  if (!made) made = PyUnicode_InternFromString(Text.characters);
  return made;
}

}  // namespace flashcore::python
