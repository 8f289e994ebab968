// The CPU kernels for one instruction set; compiled once for each (see CMakeLists.txt).
//
// Everything included from cpu/ here lives in an anonymous namespace and works on raw pointers. An
// inline function with external linkage, or a template of the standard library, would leave a weak
// symbol, and the linker keeps only one copy of those: perhaps the AVX-512 one, for everybody.
// check_symbols.cmake fails the build if that happens.
#include "cpu/backward.h"
#include "cpu/dropout.h"
#include "cpu/entry.h"
#include "cpu/forward.h"
#include "cpu/merge.h"

#define FLASHCORE_ENTRY2(isa) kEntry_##isa
#define FLASHCORE_ENTRY(isa) FLASHCORE_ENTRY2(isa)

namespace flashcore::cpu {

// In the order of DType. The AVX512-BF16 build differs from AVX-512 for bfloat16 only.
#if defined(__AVX512BF16__)
constinit const IsaEntry FLASHCORE_ENTRY(FLASHCORE_ISA) = {
    .forward = {{}, forward_entry<DType::bf16>(), {}, {}},
    .backward = {{}, backward_entry<DType::bf16>(), {}, {}},
    .merge = nullptr,
    .dropout_mask = nullptr};
#else
constinit const IsaEntry FLASHCORE_ENTRY(FLASHCORE_ISA) = {
    .forward = {forward_entry<DType::f16>(), forward_entry<DType::bf16>(),
                forward_entry<DType::f32>(), forward_entry<DType::f64>()},
    .backward = {backward_entry<DType::f16>(), backward_entry<DType::bf16>(),
                 backward_entry<DType::f32>(), backward_entry<DType::f64>()},
    .merge = merge_rows,
    .dropout_mask = dropout_mask_rows};
#endif

}  // namespace flashcore::cpu
