// The paged cache: keys and values of all layers, in blocks of tokens.
#pragma once

#include <algorithm>

#include "decoder_kernels.hpp"

namespace scone {

// Somebody else's memory, of keys as of values (num_layers, num_blocks, num_kv_heads, block_size * head_dim); how a
// head's keys and values lie in a block, CacheView says.
struct KvCache {
    float *keys = nullptr, *values = nullptr;
    size_t layer = 0;  // floats of one
    int num_kv_heads = 0, block_size = 0, head_dim = 0;

    // A layer's, for attention.
    CacheView view(size_t layer_id) const {
        const size_t offset = layer_id * layer;
        return {keys + offset, values + offset, num_kv_heads, block_size, head_dim};
    }

    // Stores key and value (head_dim,) of the token at `place` in a block.
    void put(size_t layer_id, size_t block, int head, int place, const float* key, const float* value) const {
        const size_t run = size_t(block_size) * head_dim;
        const size_t offset = layer_id * layer + (block * num_kv_heads + head) * run;
        float* column = keys + offset + place;
        for (int d = 0; d < head_dim; ++d) column[size_t(d) * block_size] = key[d];
        std::copy_n(value, head_dim, values + offset + size_t(place) * head_dim);
    }
};

}  // namespace scone
