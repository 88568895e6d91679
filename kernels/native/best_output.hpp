// The greatest output of a map for each row, without the outputs themselves: of a language model's head they are
// megabytes a step, of which greedy sampling wants one number a row.
#pragma once

#include <limits>

#include "packed_linear.hpp"

namespace scone {

// The first of the greatest values so far; a NaN counts as greater than any number.
struct Best {
    float value = -std::numeric_limits<float>::infinity();
    int output = 0;

    void take(float other, int at) {
        if (value != value) return;
        if (other > value || other != other || (other == value && at < output)) *this = {other, at};
    }
};

// What `multiply` hands its tiles to. One for each thread, since panels come in any order.
struct BestOutput {
    const PackedLinear* map;
    const DecoderKernels* kernels;
    Best* best;  // (rows,)

    void finish(float* tile, int panel, int first_row, int count) const {
        const int first = panel * kPanel, columns = std::min(kPanel, map->num_outputs() - first);
        for (int r = 0; r < count; ++r, tile += kPanel) {
            map->add_bias(tile, panel);
            for (int c = columns; c < kPanel; ++c) tile[c] = -std::numeric_limits<float>::infinity();
            Best& row = best[first_row + r];
            const float greatest = kernels->greatest(tile);
            if (greatest < row.value) continue;
            for (int c = 0; c < columns; ++c) row.take(tile[c], first + c);
        }
    }
};

}  // namespace scone
