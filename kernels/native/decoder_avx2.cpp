// The decoder's inner loops for AVX2 with FMA and half-float conversion (x86-64-v3).
//
// Only the functions between push and pop are compiled for it, and none of the headers': nothing that
// another file might be linked against uses an instruction that the processor may lack.
#include "decoder_kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define SCONE_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace scone {
namespace avx2 {
#include "vector_math.inl"
#include "input_kernels.inl"
#include "linear_kernels.inl"
#include "tile.inl"
#include "row_kernels.inl"
#include "sampling_kernels.inl"
#include "attention_kernels.inl"
}  // namespace avx2
}  // namespace scone
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace scone {

const DecoderKernels* decoder_kernels_avx2() {
#ifdef SCONE_AVX2
    static const DecoderKernels kernels = {
        "avx2", avx2::tile, avx2::prepare, avx2::rms_norm, avx2::silu_mul, avx2::rotate, avx2::attend, avx2::attend_span, avx2::join_spans,
        avx2::greatest, avx2::greatest_of_chunk, avx2::weigh_chunk, nullptr,
    };
    const bool has_it = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has_it && __builtin_cpu_supports("f16c") ? &kernels : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace scone
