// What all native maps of one model share, and the products of prepared inputs with packed weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed_linear.hpp"
#include "scratch.hpp"
#include "thread_team.hpp"

namespace scone {

// What the compiler and the processor have, best first.
inline std::vector<const DecoderKernels*> available_kernels() {
    std::vector<const DecoderKernels*> found;
    for (const DecoderKernels* kernels : {decoder_kernels_avx512_bf16(), decoder_kernels_avx512(),
                                          decoder_kernels_avx2(), decoder_kernels_portable()})
        if (kernels != nullptr) found.push_back(kernels);
    return found;
}

// Threads, kernels and scratch; one caller at a time.
class Workspace {
public:
    // `instruction_set` empty: the best.
    Workspace(int num_threads, const std::string& instruction_set)
        : team(num_threads), kernels(find_kernels(instruction_set)) {}

    // Room for `rows` rows of `width` inputs prepared for weights of any kind.
    Activations prepared(int rows, int width) {
        const size_t num_groups = size_t(width + kGroup - 1) / kGroup;
        values_.reserve(rows * num_groups * kGroup * sizeof(float));
        scales_.reserve(rows * num_groups);
        sums_.reserve(rows * num_groups);
        return {values_.get(), scales_.get(), sums_.get()};
    }

    // Runs body(first_row, count) for each strip of rows; then x (rows, width) is prepared in `target`.
    // Called by all threads of the team.
    template <class Body>
    void prepare(InputKind kind, const float* x, int rows, int width, const Activations& target, const Body& body) {
        team.share((rows + kStrip - 1) / kStrip, 1, [&](int strip, int) {
            const int first = strip * kStrip;
            body(first, std::min(kStrip, rows - first));
            kernels->prepare(kind, x, width, rows, first, target);
        });
        team.barrier();
    }

    ThreadTeam team;
    const DecoderKernels* kernels;

private:
    static const DecoderKernels* find_kernels(const std::string& name) {
        for (const DecoderKernels* kernels : available_kernels())
            if (name.empty() || name == kernels->name) return kernels;
        throw std::invalid_argument("this processor has no instruction set '" + name + "'");
    }

    Scratch<char> values_;
    Scratch<float> scales_, sums_;
};

// out (rows, num_outputs) = x times the map, or += where `add` is set.
struct Product {
    const PackedLinear* map;
    float* out;
    bool add = false;

    bool wants(int, int, int) const { return true; }

    // Tile (count, 16) of the panel into place; changes the tile.
    void finish(float* tile, int panel, int first_row, int count) const {
        const int first = panel * kPanel, columns = std::min(kPanel, map->num_outputs() - first);
        map->add_bias(tile, panel, count);
        for (int r = 0; r < count; ++r, tile += kPanel) {
            float* target = out + size_t(first_row + r) * map->num_outputs() + first;
            if (add)
                for (int c = 0; c < columns; ++c) tile[c] += target[c];
            if (columns == kPanel)
                std::memcpy(target, tile, kPanel * sizeof(float));  // of a known size: no call
            else
                std::copy_n(tile, columns, target);
        }
    }
};

// The products of the same prepared inputs with several maps that take that kind; each tile that its product
// `wants` is handed to that one's `finish`. Called by all threads of the team.
template <class AnyProduct = Product>
void multiply(Workspace& space, const Activations& x, int rows, std::initializer_list<AnyProduct> products) {
    int num_panels = 0;
    for (const AnyProduct& product : products) num_panels += product.map->weights().num_panels;
    const int num_blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int chunk = std::max(1, num_panels / (space.team.size() * 8));
    const int num_chunks = (num_panels + chunk - 1) / chunk;
    space.team.share(num_blocks * num_chunks, 1, [&](int item, int) {
        const int first_row = item / num_chunks * kRowBlock, begin = item % num_chunks * chunk;
        const int count = std::min(kRowBlock, rows - first_row), end = std::min(begin + chunk, num_panels);
        alignas(64) float tile[kRowBlock * kPanel];
        int first = 0;  // panel of the first product's map
        for (const AnyProduct& product : products) {
            const PackedWeights& w = product.map->weights();
            for (int panel = std::max(begin - first, 0); panel < std::min(end - first, w.num_panels); ++panel) {
                if (!product.wants(panel, first_row, count)) continue;
                space.kernels->tile(w, panel, x, first_row, count, tile);
                product.finish(tile, panel, first_row, count);
            }
            first += w.num_panels;
        }
    });
    space.team.barrier();
}

}  // namespace scone
