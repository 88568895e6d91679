// The decoder's inner loops for any processor (SSE2, NEON: whatever the compiler's baseline has).
#include "decoder_kernels.hpp"

namespace scone {
namespace portable {
#include "vector_math.inl"
#include "input_kernels.inl"
#include "linear_kernels.inl"
#include "tile.inl"
#include "row_kernels.inl"
#include "sampling_kernels.inl"
#include "attention_kernels.inl"
}  // namespace portable

const DecoderKernels* decoder_kernels_portable() {
    static const DecoderKernels kernels = {
        "portable",         portable::tile,   portable::prepare, portable::rms_norm,
        portable::silu_mul, portable::rotate, portable::attend, portable::attend_span, portable::join_spans,
        portable::greatest, portable::greatest_of_chunk, portable::weigh_chunk, nullptr,
    };
    return &kernels;
}

}  // namespace scone
