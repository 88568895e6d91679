// The decoder's inner loops for AVX-512 with bfloat16 products (Zen 4, Cooper Lake, Sapphire Rapids and later):
// those of AVX-512, but for maps of bfloat16 inputs.
//
// Only the functions between push and pop are compiled for it, and none of the headers': nothing that
// another file might be linked against uses an instruction that the processor may lack.
#include "decoder_kernels.hpp"

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header (PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define SCONE_AVX2 1
#define SCONE_AVX512 1
#define SCONE_AVX512_BF16 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
namespace scone {
namespace avx512_bf16 {
#include "vector_math.inl"
#include "linear_bf16.inl"

static void tile(const PackedWeights& w, int panel, const Activations& x, int first_row, int rows, float* out) {
    if (w.inputs != InputKind::bf16) return decoder_kernels_avx512()->tile(w, panel, x, first_row, rows, out);
    const uint32_t* pairs = (const uint32_t*)x.values + (size_t)first_row * ((w.num_inputs + 1) / 2);
    tile_pairs(w.data + (size_t)panel * w.panel_bytes, w.num_inputs, pairs, rows, out);
}

static void prepare(InputKind kind, const float* x, int num_inputs, int num_rows, int first_row,
                    const Activations& out) {
    if (kind != InputKind::bf16)
        return decoder_kernels_avx512()->prepare(kind, x, num_inputs, num_rows, first_row, out);
    prepare_pairs(x, num_inputs, num_rows, first_row, (uint32_t*)out.values);
}
}  // namespace avx512_bf16
}  // namespace scone
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace scone {

const DecoderKernels* decoder_kernels_avx512_bf16() {
#ifdef SCONE_AVX512_BF16
    if (decoder_kernels_avx512() == nullptr || !__builtin_cpu_supports("avx512bf16")) return nullptr;
    static const DecoderKernels kernels = [] {
        DecoderKernels changed = *decoder_kernels_avx512();
        changed.name = "avx512_bf16";
        changed.tile = avx512_bf16::tile;
        changed.prepare = avx512_bf16::prepare;
        return changed;
    }();
    return &kernels;
#else
    return nullptr;
#endif
}

}  // namespace scone
