// The inner loops of the decoder on a CPU: one table of functions per instruction set.
//
// Every function computes each output element in an order that depends neither on how many rows there
// are nor on which thread has them: results are the same alone and in any batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scone {

constexpr int kPanel = 16;     // output columns per panel of packed weights
constexpr int kGroup = 32;     // inputs that share a scale
constexpr int kRowBlock = 64;  // rows per tile: their activations stay in the second-level cache

enum class WeightKind { f32, int8, int4 };

// Weights (num_outputs, num_inputs), rearranged so that a panel is read front to back.
//   f32:  [panel][input][16] float
//   int8: [panel][group]{ scale f16[16]; [half][16 pairs]{ 8 columns x 2 inputs int8 } }
//   int4: [panel][group]{ scale f16[16]; minimum f16[16]; [half][4]{ 8 columns x 4 inputs, two nibbles } }
//         the low nibble is for input 4j + i of the group, the high one for 16 + 4j + i
struct PackedWeights {
    WeightKind kind;
    int num_outputs, num_inputs;
    int num_panels, num_groups;
    size_t panel_bytes;
    const unsigned char* data;  // 64-byte aligned
};

// Rows of inputs in the form that a kind of weights wants; padded with zeros to whole groups.
//   f32:  values (rows, num_inputs) float
//   int8: values (rows, num_groups * 32) int16, scales (rows, num_groups)
//   int4: values (rows, num_groups * 32) int8, scales and sums (rows, num_groups)
struct Activations {
    void* values;
    float* scales;
    float* sums;  // scale * sum of the group's values: what the minimum is multiplied by
};

// What attention needs of one layer's cache (num_blocks, num_kv_heads, block_size, head_dim).
struct CacheView {
    const float* keys;
    const float* values;
    int num_kv_heads, block_size, head_dim;
};

struct DecoderKernels {
    const char* name;
    // out (rows, 16) = activations [first_row, first_row + rows) times one panel; rows <= kRowBlock.
    void (*tile)(const PackedWeights&, int panel, const Activations&, int first_row, int rows, float* out);
    // One row (num_inputs,) float into row `row` of the activations.
    void (*prepare)(WeightKind, const float* x, int num_inputs, int row, const Activations&);
    // out = weight * x / rms(x); may be done in place.
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
    // out = silu(gate) * up
    void (*silu_mul)(const float* gate, const float* up, int n, float* out);
    // Rotates one head in place; cos and sin hold head_dim / 2 values.
    void (*rotate)(float* head, const float* cos, const float* sin, int head_dim);
    // `group` query heads that share one key head attend to the first `context` tokens.
    // q and out (group, head_dim); scores is scratch of group * (context + 8) floats.
    void (*attend)(const float* q, int group, const CacheView&, int kv_head, const int32_t* block_table,
                   int context, float scale, float* scores, float* out);
};

// nullptr where the compiler or the processor has none.
const DecoderKernels* decoder_kernels_avx2();
const DecoderKernels* decoder_kernels_portable();

}  // namespace scone
