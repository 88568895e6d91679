// What goes into each layer, of the tokens of some blocks: kept on the way, so that keys and values can be computed
// from it alone.
#pragma once

#include <cstddef>

namespace scone {

// Somebody else's memory (num_slots, num_layers, block_size, dim); a block has a slot.
struct LayerInputs {
    float* states = nullptr;
    size_t num_layers = 0;
    int block_size = 0, dim = 0;

    // The input of a layer (dim,) of the token in row slot * block_size + place.
    float* at(size_t row, size_t layer) const {
        const size_t slot = row / block_size, place = row % block_size;
        return states + ((slot * num_layers + layer) * block_size + place) * dim;
    }
};

}  // namespace scone
