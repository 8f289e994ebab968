// The copy engine (TMA): boxes of a tensor to and from shared memory.
#pragma once
#include <cuda.h>

#include "sm90/ptx/barrier.cuh"

namespace flashcore::sm90 {

FC_DEVICE void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Box at {col, row, head, batch} -> shared memory; completes on `barrier`. Out of bounds reads
// zero.
FC_DEVICE void tma_load(void* smem, const CUtensorMap& map, Barrier& barrier, int col, int row,
                        int head, int batch, uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(smem)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(smem_address(&barrier)), "r"(col), "r"(row),
      "r"(head), "r"(batch), "l"(cache_policy)
      : "memory");
}

// The same of a tensor with one dimension more, for row_window() of layout.h.
FC_DEVICE void tma_load(void* smem, const CUtensorMap& map, Barrier& barrier, int col, int skipped,
                        int row, int head, int batch, uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(smem)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(smem_address(&barrier)), "r"(col), "r"(skipped),
      "r"(row), "r"(head), "r"(batch), "l"(cache_policy)
      : "memory");
}

// `bytes` contiguous bytes -> shared memory; addresses and size are multiples of 16.
FC_DEVICE void bulk_load(void* smem, const void* global, uint32_t bytes, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(smem)),
      "l"(global), "r"(bytes), "r"(smem_address(&barrier))
      : "memory");
}

// Shared memory -> box at {col, row, head, batch}. Out of bounds is not written.
FC_DEVICE void tma_store(const CUtensorMap& map, const void* smem, int col, int row, int head,
                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(smem_address(smem)), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// Adds `bytes` contiguous floats from shared memory to global memory; multiples of 16 bytes.
FC_DEVICE void bulk_reduce_add(float* global, const void* smem, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(smem_address(smem)), "r"(bytes)
      : "memory");
}
FC_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores have read their shared memory.
FC_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Waits until this thread's stores are visible in global memory.
FC_DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// L2 eviction priorities.
FC_DEVICE uint64_t policy_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
FC_DEVICE uint64_t policy_evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace flashcore::sm90
