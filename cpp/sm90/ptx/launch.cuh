// Kernels of one stream that begin before the one before them has ended (programmatic dependent
// launch): the next one's launch and start are hidden.
#pragma once
#include "sm90/ptx/barrier.cuh"

namespace flashcore::sm90 {

// The next kernel may begin when every block of this one has said so or has ended.
FC_DEVICE void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Until the kernel before has ended, and what it wrote is there. Nothing it writes may be read, and
// nothing it reads written, before this.
FC_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace flashcore::sm90
