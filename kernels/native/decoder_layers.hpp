// The weights of a decoder's layers.
#pragma once

#include <vector>

#include "packed_linear.hpp"

namespace scone {

struct DecoderShape {
    int dim, num_heads, num_kv_heads, head_dim, ffn_dim;
    float norm_eps;

    int q_dim() const { return num_heads * head_dim; }
    int kv_dim() const { return num_kv_heads * head_dim; }
};

// Maps are somebody else's. Maps that read the same inputs (q, k and v; gate and up) take the same kind of them.
struct DecoderLayer {
    std::vector<float> attention_norm, ffn_norm;  // (dim,)
    std::vector<float> q_norm, k_norm;            // (head_dim,), or empty: not normed
    const PackedLinear *q, *k, *v, *o, *gate, *up, *down;
};

}  // namespace scone
