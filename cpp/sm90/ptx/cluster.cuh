// Clusters: blocks of threads that run side by side and reach each other's shared memory.
#pragma once
#include "sm90/ptx/barrier.cuh"

namespace flashcore::sm90 {

FC_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks that have not ended meet: each arrives, and waits until all have.
FC_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FC_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
FC_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where an address of this block's shared memory is in that of block `rank`.
FC_DEVICE uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Arrives at the barrier that is here in block `rank`; it may be this one.
FC_DEVICE void arrive_in(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(smem_address(&barrier), rank))
      : "memory");
}

// `bytes` contiguous bytes -> shared memory of block `rank`, where `to` and `barrier` are here.
FC_DEVICE void copy_to(uint32_t rank, void* to, const void* from, uint32_t bytes,
                       Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(address_in(smem_address(to), rank)),
      "r"(smem_address(from)), "r"(bytes), "r"(address_in(smem_address(&barrier), rank))
      : "memory");
}

// Four floats -> where another block's shared memory is at `to`, and its barrier at `barrier`.
FC_DEVICE void store_x4_to(uint32_t to, float x, float y, float z, float w, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x), "f"(y), "f"(z), "f"(w), "r"(barrier)
      : "memory");
}

// One word -> shared memory of block `rank`, where `to` and `barrier` are here.
FC_DEVICE void store_to(uint32_t rank, int& to, int value, Barrier& barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in(smem_address(&to), rank)),
               "r"(value), "r"(address_in(smem_address(&barrier), rank))
               : "memory");
}

}  // namespace flashcore::sm90
