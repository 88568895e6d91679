// Weights of a linear map, packed for the kernels, with its optional bias.
#pragma once

#include <memory>
#include <vector>

#include "decoder_kernels.hpp"
#include "scratch.hpp"

namespace scone {

class PackedLinear {
public:
    // weight (num_outputs, num_inputs) row by row. Inputs of bf16, int8 and int4 weights are rounded if asked for.
    PackedLinear(const float* weight, int num_outputs, int num_inputs, WeightKind kind, bool round_inputs,
                 const float* bias);

    const PackedWeights& weights() const { return weights_; }
    int num_outputs() const { return weights_.num_outputs; }
    int num_inputs() const { return weights_.num_inputs; }
    // Whether the weights are kept as they were given.
    bool is_exact() const { return is_exact_; }
    size_t num_bytes() const { return weights_.num_panels * weights_.panel_bytes; }
    bool has_bias() const { return !bias_.empty(); }
    // Of int8 weights the Euclidean norm of each output's, not less: (num_panels * 16,), 0 for padding.
    const float* norms() const { return norms_.data(); }
    // To a tile (count, 16) of one panel's outputs.
    void add_bias(float* tile, int panel, int count) const {
        if (!has_bias()) return;
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < kPanel; ++c) tile[r * kPanel + c] += bias_[size_t(panel) * kPanel + c];
    }
    // The weights as the kernels use them: out (num_outputs, num_inputs).
    void unpack(float* out) const;

private:
    void pack_panel(const float* weight, int panel);
    void measure_norms();

    PackedWeights weights_;
    std::unique_ptr<unsigned char[], AlignedFree> data_;
    std::vector<float> bias_, norms_;
    bool is_exact_ = true;
};

}  // namespace scone
