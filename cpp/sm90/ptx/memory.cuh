// Global memory between blocks of threads.
#pragma once
#include "sm90/ptx/barrier.cuh"

namespace flashcore::sm90 {

// What other blocks wrote before they stored the value that is read can be read after it.
FC_DEVICE int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
// Who reads the value sees what this thread wrote before, and what it has seen others write.
FC_DEVICE void store_release(int* to, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
// The same, adding.
FC_DEVICE void add_release(int* to, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
// Asks for the line of 128 bytes that holds `at` to be in L2.
FC_DEVICE void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

}  // namespace flashcore::sm90
