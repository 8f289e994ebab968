// Computing without the GIL.
#pragma once
#include <nanobind/nanobind.h>
#include <unistd.h>

#include "flashcore/flashcore.h"

namespace flashcore::python {

// Runs compute, which returns a status, with the GIL released.
//
// While the interpreter shuts down, Python before 3.14 ends a (daemon) thread that asks for the GIL
// with pthread_exit, which unwinds its stack as an exception does. That must neither meet a
// noexcept function or a handler that swallows it, which aborts the process, nor run destructors
// that drop references without the GIL. So such a thread sleeps here until the process ends, which
// is what Python 3.14 does by itself. No test beforehand could replace this: the shutdown may begin
// while the thread waits for the GIL.
template <class Compute>
flashcore_status without_gil(Compute compute) {
  PyThreadState* const thread = PyEval_SaveThread();
  flashcore_status const status = compute();
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {
    for (;;) pause();
  }
  return status;
}

}  // namespace flashcore::python
