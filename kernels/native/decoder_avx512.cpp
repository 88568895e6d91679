// The decoder's inner loops for AVX-512 with VNNI (server processors since Cascade Lake and Zen 4).
//
// Only the functions between push and pop are compiled for it, and none of the headers': nothing that
// another file might be linked against uses an instruction that the processor may lack.
#include "decoder_kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header (PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define SCONE_AVX2 1
#define SCONE_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
namespace scone {
namespace avx512 {
#include "vector_math.inl"
#include "input_kernels.inl"
#include "linear_avx512.inl"
#include "tile.inl"
#include "row_kernels.inl"
#include "sampling_kernels.inl"
#include "attention_kernels.inl"
}  // namespace avx512
}  // namespace scone
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace scone {

const DecoderKernels* decoder_kernels_avx512() {
#ifdef SCONE_AVX512
    static const DecoderKernels kernels = {
        "avx512",         avx512::tile,   avx512::prepare, avx512::rms_norm,
        avx512::silu_mul, avx512::rotate, avx512::attend, avx512::attend_span, avx512::join_spans,
        avx512::greatest, avx512::greatest_of_chunk, avx512::weigh_chunk, avx512::screen,
    };
    const bool has_it = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_it && __builtin_cpu_supports("avx512vnni") && decoder_kernels_avx2() != nullptr ? &kernels : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace scone
