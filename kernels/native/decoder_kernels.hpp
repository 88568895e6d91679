// The inner loops of the decoder on a CPU: one table of functions per instruction set.
//
// Every function computes each output element in an order that depends neither on how many rows there
// are nor on which thread has them: results are the same alone and in any batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bfloat16.hpp"

namespace scone {

constexpr int kPanel = 16;     // output columns per panel of packed weights
constexpr int kGroup = 32;     // inputs that share a scale
constexpr int kStrip = 6;      // rows that are multiplied at once: their sums fill the registers
constexpr int kTileQueries = 12;  // queries of tokens that attend together, or those of one token if it has more
constexpr int kSpan = 256;         // tokens of a context that attention takes together
constexpr int kSumsTail = 8;       // floats after a query's sums of values: of the weights, the greatest score, unused
constexpr int kSampledChunk = 64;  // logits that sampling looks at together
constexpr int kRowBlock = 96;  // rows per tile: their activations stay in the second-level cache

// How weights are held, and what they are multiplied with: f32 with any of them, else bf16 with bf16, int16 with
// int8 and int8 with int4.
enum class WeightKind { f32, bf16, int8, int4 };
enum class InputKind { f32, bf16, int16, int8 };

// Weights (num_outputs, num_inputs), rearranged so that a panel is read front to back; padded with zeros to
// whole panels and groups.
//   f32:  [panel][input][16] float
//   bf16: [panel][pair of inputs]{ 16 columns x 2 inputs, the upper halves of floats, the later input first }
//   int8: [panel][group]{ scale f16[16]; [16 pairs]{ 16 columns x 2 inputs int8 } }
//   int4: [panel][group]{ scale f16[16]; minimum f16[16]; [4]{ 16 columns x 4 inputs, two nibbles } }
//         the low nibble is for input 4j + i of the group, the high one for 16 + 4j + i
struct PackedWeights {
    WeightKind kind;
    InputKind inputs;
    int num_outputs, num_inputs;
    int num_panels, num_groups;
    size_t panel_bytes;
    const unsigned char* data;  // 64-byte aligned
};

// Bytes of one group of a panel.
constexpr int group_bytes(WeightKind kind) {
    return kind == WeightKind::f32    ? 4 * kPanel * kGroup
           : kind == WeightKind::bf16 ? 2 * kPanel * kGroup
           : kind == WeightKind::int8 ? 2 * kPanel + kPanel * kGroup
                                      : 4 * kPanel + kPanel * kGroup / 2;
}

// Rows of inputs of some kind, so that a tile is read front to back too. Rows come in blocks of kRowBlock, the
// last one shorter; rounded inputs are padded with zeros to whole groups.
//   f32:   values [block][strip of 6 rows, the last one shorter][input][row] float
//   bf16:  the same, rounded; with AVX512_BF16 [pair of inputs][row] 2 inputs, the later one first
//   int16: values [block][group][row][32], scales [block][group][row]
//   int8:  values [block][group][row][32], scales and sums [block][group][row]
struct Activations {
    void* values;
    float* scales;
    float* sums;  // scale * sum of the group's values: what the minimum is multiplied by
};

// How keys and values are held: float, or bfloat16, to which they are rounded when they are stored. Attention
// computes with floats either way.
enum class CacheKind { f32, bf16 };

// What attention needs of one layer's cache: keys (num_blocks, num_kv_heads, head_dim, block_size), so that
// one query meets eight keys at a time, and values (num_blocks, num_kv_heads, block_size, head_dim).
struct CacheView {
    CacheKind kind;
    const void* keys;
    const void* values;
    int num_kv_heads, block_size, head_dim;
};

// Consecutive tokens of one sequence whose `group` query heads share one key head. Token i attends to the
// first `context + i` tokens. Queries and results of a token are (group, head_dim) and `stride` floats
// after those of the token before.
struct QueryTile {
    const float* q;
    float* out;
    size_t stride;
    int num_tokens, group, context, kv_head;
    const int32_t* block_table;
    float* scratch;        // attention_scratch() floats
    size_t scores_stride;  // a span's scores, from the block on that it begins in, and 8 more
};

constexpr int spans(int context) { return (context + kSpan - 1) / kSpan; }

constexpr size_t attention_scratch(size_t head_dim, size_t scores_stride) {
    return kTileQueries * (head_dim + scores_stride + 2 * (head_dim + kSumsTail));
}

struct DecoderKernels {
    const char* name;
    // out (count, 16) = activations [first_row, first_row + count) times one panel; whole row blocks only.
    void (*tile)(const PackedWeights&, int panel, const Activations&, int first_row, int count, float* out);
    // The strip of x (num_rows, num_inputs) that begins at `first_row`, into the activations.
    void (*prepare)(InputKind, const float* x, int num_inputs, int num_rows, int first_row, const Activations&);
    // out = weight * x / rms(x); may be done in place.
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
    // out = silu(gate) * up
    void (*silu_mul)(const float* gate, const float* up, int n, float* out);
    // Rotates one head in place; cos and sin hold head_dim / 2 values.
    void (*rotate)(float* head, const float* cos, const float* sin, int head_dim);
    void (*attend)(const QueryTile&, const CacheView&, float scale);
    // The same in two parts, for contexts that threads share: what each query has of one span,
    // sums (num_queries, head_dim + kSumsTail); and the results of all spans, whose sums lie `span_stride` apart.
    void (*attend_span)(const QueryTile&, const CacheView&, float scale, int span, float* sums);
    void (*join_spans)(const QueryTile&, int head_dim, float* sums, size_t span_stride);
    // Of 16 values; NaN if one of them is.
    float (*greatest)(const float* x);
    // Of kSampledChunk values; NaN if one of them is.
    float (*greatest_of_chunk)(const float* x);
    // weights (kSampledChunk,) = e^(x / temperature - highest) in units of 2^-44, 0 where x / temperature is below
    // the floor; their sum. No x / temperature is above the highest.
    int64_t (*weigh_chunk)(const float* x, float temperature, float highest, float floor, int64_t* weights);
    // For a panel of int8 weights and a block of rows rounded to int8, with bounds of the error: norms (16,) of the
    // weights, slack (rows,) of each row. high (rows,) = what no output of the panel exceeds; low (rows,) = what
    // some output reaches, if that is more than it was. offsets [block][group][row] = -128 * the sum of the row's
    // integers. nullptr where it would not pay.
    void (*screen)(const PackedWeights&, int panel, const Activations&, const int32_t* offsets, int first_row,
                   int count, const float* norms, const float* slack, float* high, float* low);
};

// nullptr where the compiler or the processor has none.
const DecoderKernels* decoder_kernels_avx512_bf16();
const DecoderKernels* decoder_kernels_avx512();
const DecoderKernels* decoder_kernels_avx2();
const DecoderKernels* decoder_kernels_portable();

}  // namespace scone
