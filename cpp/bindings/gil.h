// Giving the GIL away, in a process that may be about to end.
#pragma once
#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

#include "flashcore/flashcore.h"

namespace flashcore::python {

// Calls f, in which this thread waits for the GIL.
//
// While the interpreter shuts down, Python before 3.14 ends a (daemon) thread that waits for the
// GIL with pthread_exit, which unwinds its stack as an exception does. That must neither meet a
// noexcept function or a handler that swallows it (nanobind's), which ends the process with a
// signal, nor run destructors that drop references without the GIL. So such a thread sleeps here
// until the process ends, which is what Python 3.14 does by itself. No test beforehand could
// replace this: the shutdown may begin while the thread waits.
template <class F>
auto survive_exit(F f) {
  try {
    return f();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

// Runs compute, which returns a status, with the GIL released.
template <class Compute>
flashcore_status without_gil(Compute compute) {
  PyThreadState* const thread = PyEval_SaveThread();
  flashcore_status const status = compute();
  survive_exit([&] { PyEval_RestoreThread(thread); });
  return status;
}

}  // namespace flashcore::python
