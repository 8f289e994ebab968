// Warp and warpgroup control, register arithmetic, and ways out of registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/ptx/barrier.cuh"

namespace flashcore::sm90 {

// Moves registers between warpgroups; both must be executed by every warp of the warpgroup.
template <int N>
FC_DEVICE void release_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FC_DEVICE void claim_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// True in one lane of a converged warp.
FC_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// The index of the warpgroup, or warp, in the block, known to be the same in all lanes: so that
// descriptors and what the copy engine is told live in uniform registers. Else there is a loop over
// the lanes around the instruction.
FC_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
FC_DEVICE int warpgroup_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// threadIdx.x, read again each time: what is worked out from it is not kept in registers between
// uses, where there are none to spare.
FC_DEVICE int thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

FC_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FC_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 - 2 / (e^2x + 1): its error is absolute, as small as a rounding of 1, which is what the
// exponential of a softmax asks for. Near zero a polynomial, or a large softcap would magnify that
// error.
FC_DEVICE float tanh_approx(float x) {
  float const large = 1.0f - 2.0f * rcp_approx(exp2_approx(x * 2.8853900817779268f) + 1.0f);
  float const small = __fmaf_rn(x * x * -0.33333333f, x, x);
  return fabsf(x) < 0.04f ? small : large;
}

// NaN if any element of o is not finite, else 0.
template <int N>
FC_DEVICE float finite_probe(const float (&o)[N]) {
  float probe = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) probe = __fmaf_rn(o[i], 0.0f, probe);
  return probe;
}

// Two floats as one register of 16-bit values: lo in the low half.
template <class T>
FC_DEVICE uint32_t pack(float lo, float hi);
template <>
FC_DEVICE uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
template <>
FC_DEVICE uint32_t pack<__half>(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}

// And back.
template <class Element>
FC_DEVICE float2 unpack(uint32_t d);
template <>
FC_DEVICE float2 unpack<__nv_bfloat16>(uint32_t d) {
  return {__uint_as_float(d << 16), __uint_as_float(d & 0xffff0000u)};
}
template <>
FC_DEVICE float2 unpack<__half>(uint32_t d) {
  return __half22float2(reinterpret_cast<__half2&>(d));
}

// Stores four 8x8 matrices of 16-bit values; lane l gives the row address of row l%8 of matrix l/8.
FC_DEVICE void store_matrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                               uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// The same, each matrix transposed: its column i goes to the address of its row i.
FC_DEVICE void store_matrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                          uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

// Loads what that has stored.
FC_DEVICE void load_matrix_x4_transposed(uint32_t address, uint32_t& r0, uint32_t& r1, uint32_t& r2,
                                         uint32_t& r3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(address)
               : "memory");
}

// Adds to four neighbouring floats in global memory, in no particular order among threads.
FC_DEVICE void reduce_add_x4(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Lane i of a quad gives its x[j] to x[i] of lane j.
FC_DEVICE void quad_transpose(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      bool const upper = threadIdx.x & bit;
      uint32_t const got = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + bit], bit);
      x[i] = upper ? got : x[i];
      x[i + bit] = upper ? x[i + bit] : got;
    }
}

// Over the four lanes that hold one accumulator row.
FC_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FC_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace flashcore::sm90
