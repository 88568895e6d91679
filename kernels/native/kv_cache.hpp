// The paged cache: keys and values of all layers, in blocks of tokens.
#pragma once

#include <algorithm>

#include "decoder_kernels.hpp"

namespace scone {

// Somebody else's memory, of keys as of values (num_layers, num_blocks, num_kv_heads, block_size * head_dim); how a
// head's keys and values lie in a block, CacheView says.
struct KvCache {
    CacheKind kind = CacheKind::f32;
    char *keys = nullptr, *values = nullptr;
    size_t layer_values = 0;
    int num_kv_heads = 0, block_size = 0, head_dim = 0;

    // A layer's, for attention.
    CacheView view(size_t layer_id) const {
        const size_t offset = layer_id * layer_values * (kind == CacheKind::bf16 ? sizeof(bfloat16) : sizeof(float));
        return {kind, keys + offset, values + offset, num_kv_heads, block_size, head_dim};
    }

    // Stores key and value (head_dim,) of the token at `place` in a block.
    void put(size_t layer_id, size_t block, int head, int place, const float* key, const float* value) const {
        const size_t run = size_t(block_size) * head_dim;
        const size_t at = layer_id * layer_values + (block * num_kv_heads + head) * run;
        if (kind == CacheKind::bf16)
            put_as<bfloat16>(at, place, key, value, bfloat16_of);
        else
            put_as<float>(at, place, key, value, [](float x) { return x; });
    }

private:
    template <class Held, class Rounding>
    void put_as(size_t at, int place, const float* key, const float* value, const Rounding& rounding) const {
        Held* column = reinterpret_cast<Held*>(keys) + at + place;
        for (int d = 0; d < head_dim; ++d) column[size_t(d) * block_size] = rounding(key[d]);
        std::transform(value, value + head_dim, reinterpret_cast<Held*>(values) + at + size_t(place) * head_dim,
                       rounding);
    }
};

}  // namespace scone
