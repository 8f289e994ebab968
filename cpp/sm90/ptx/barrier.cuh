// mbarriers, named barriers and proxy fences. One instruction, one function.
#pragma once
#include <cstdint>
#include <cstdio>

#include "common/types.h"

namespace flashcore::sm90 {

#define FC_DEVICE __device__ __forceinline__

FC_DEVICE uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A shared-memory barrier. A phase ends when `count` threads have arrived and all announced bytes
// have landed; wait(parity) returns once the phase with that parity is over.
struct alignas(8) Barrier {
  uint64_t state;

  FC_DEVICE void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(count));
  }
  FC_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(this)) : "memory");
  }
  // Arrives and announces bytes that the copy engine will deliver in this phase.
  FC_DEVICE void arrive_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  FC_DEVICE bool try_wait(uint32_t parity) const {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(smem_address(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
  FC_DEVICE void wait(uint32_t parity) const {
#ifdef FLASHCORE_WATCHDOG  // turns a hang into a trap that names the barrier, after about 2 s
    for (long long const start = clock64(); !try_wait(parity);)
      if (clock64() - start > 4000000000ll) {
        printf("flashcore watchdog: block %d thread %d waits for barrier at %u, parity %u\n",
               blockIdx.x, threadIdx.x, smem_address(this), parity);
        __trap();
      }
#else
    while (!try_wait(parity)) {
    }
#endif
  }
};

// Makes initialised mbarriers visible to the copy engine.
FC_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Makes this thread's ordinary shared-memory stores visible to the copy engine and to wgmma.
FC_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barrier: `threads` threads meet. Barrier 0 is __syncthreads.
FC_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same where threads come from different branches: bar.sync promises one instruction to all.
FC_DEVICE void named_barrier_sync_apart(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FC_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flashcore::sm90
