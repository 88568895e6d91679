// The greatest output of a map for each row, without the outputs themselves: of a language model's head they are
// megabytes a step, of which greedy sampling wants one number a row.
//
// Where 8-bit weights meet several rows, panels are screened first: products with inputs rounded to 8 bits take a
// half to a third of the time, and by the Cauchy-Schwarz inequality no output is farther from them than its
// weights' norm times that of the rounding error. Only panels that may hold a row's greatest output are computed,
// as ever: some percent of them. The result is the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "workspace.hpp"

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

// Which panels may hold the greatest outputs. Its functions are called by all threads of the team.
class Screen {
public:
    Screen(Workspace& space, const PackedLinear& map, int rows)
        : space_(space), map_(map), rows_(rows),
          is_used_(space.kernels->screen != nullptr && map.weights().kind == WeightKind::int8 && !map.has_bias() &&
                   rows >= kFewestRows) {
        if (!is_used_) return;
        const PackedWeights& w = map.weights();
        highs_.resize(size_t(w.num_panels) * rows);
        lows_.assign(space.team.size(), std::vector<float>(rows, -std::numeric_limits<float>::infinity()));
        slack_.resize(rows);
        offsets_.resize(size_t(w.num_groups) * rows);
    }

    // x (rows, num_inputs); uses the memory of `rounded`.
    void run(const float* x, const Activations& rounded, int thread) {
        if (!is_used_) return;
        const PackedWeights& w = map_.weights();
        space_.prepare(InputKind::int8, x, rows_, w.num_inputs, rounded, [](int, int) {});
        space_.team.share(rows_, 1, [&](int row, int) { measure(x, rounded, row); });
        space_.team.barrier();
        const int num_blocks = (rows_ + kRowBlock - 1) / kRowBlock;
        const int chunk = std::max(1, w.num_panels / (space_.team.size() * 8));
        space_.team.share(num_blocks * w.num_panels, chunk, [&](int begin, int end) {
            for (int item = begin; item < end; ++item) {
                const int panel = item % w.num_panels, first_row = item / w.num_panels * kRowBlock;
                space_.kernels->screen(w, panel, rounded, offsets_.data(), first_row,
                                       std::min(kRowBlock, rows_ - first_row), map_.norms() + panel * kPanel,
                                       slack_.data(), highs_.data() + size_t(panel) * rows_, lows_[thread].data());
            }
        });
        space_.team.barrier();
        if (thread == 0)
            for (const std::vector<float>& lows : lows_)
                for (int r = 0; r < rows_; ++r) lows_[0][r] = std::max(lows_[0][r], lows[r]);
        space_.team.barrier();
    }

    // Whether some of these rows may have its greatest output in the panel.
    bool may_hold(int panel, int first_row, int count) const {
        if (!is_used_) return true;
        for (int r = first_row; r < first_row + count; ++r)
            if (!(highs_[size_t(panel) * rows_ + r] < lows_[0][r])) return true;  // a NaN may be anything
        return false;
    }

private:
    static constexpr int kFewestRows = 4;  // below, the weights' way from memory takes longer than any arithmetic

    // How far a row's outputs may be from those of its rounded inputs, for weights of norm 1.
    void measure(const float* x, const Activations& rounded, int row) {
        const PackedWeights& w = map_.weights();
        const int block = row / kRowBlock * kRowBlock, block_rows = std::min(kRowBlock, rows_ - block);
        double errors = 0.0, squares = 0.0;
        for (int g = 0; g < w.num_groups; ++g) {
            const size_t at = size_t(block) * w.num_groups + size_t(g) * block_rows + (row - block);
            const int8_t* values = static_cast<const int8_t*>(rounded.values) + at * kGroup;
            int sum = 0;
            for (int i = 0; i < kGroup && g * kGroup + i < w.num_inputs; ++i) {
                const float input = x[size_t(row) * w.num_inputs + g * kGroup + i];
                const double error = double(input) - double(rounded.scales[at]) * values[i];
                errors += error * error;
                squares += double(input) * input;
                sum += values[i];
            }
            offsets_[at] = -128 * sum;  // of the weights, 128 is added to make them unsigned
        }
        // Beyond that: rounding of the inputs to 16 bits, at most 9e-5 of their norm, and of each float operation.
        const double rounding = 2e-4 + 2e-7 * w.num_inputs;
        slack_[row] = float(1.0001 * (std::sqrt(errors) + rounding * std::sqrt(squares)));
    }

    Workspace& space_;
    const PackedLinear& map_;
    const int rows_;
    const bool is_used_;
    std::vector<float> highs_;  // (num_panels, rows): no output of the panel is greater
    std::vector<std::vector<float>> lows_;  // of each thread (rows,): some output is at least so great
    std::vector<float> slack_;
    std::vector<int32_t> offsets_;  // (num_groups, rows) of each block
};

// What `multiply` hands its tiles to. One for each thread, since panels come in any order.
struct BestOutput {
    const PackedLinear* map;
    const DecoderKernels* kernels;
    const Screen* screen;
    Best* best;  // (rows,)

    bool wants(int panel, int first_row, int count) const { return screen->may_hold(panel, first_row, count); }

    void finish(float* tile, int panel, int first_row, int count) const {
        const int first = panel * kPanel, columns = std::min(kPanel, map->num_outputs() - first);
        map->add_bias(tile, panel, count);
        for (int r = 0; r < count; ++r, tile += kPanel) {
            for (int c = columns; c < kPanel; ++c) tile[c] = -std::numeric_limits<float>::infinity();
            Best& row = best[first_row + r];
            if (kernels->greatest(tile) < row.value) continue;
            for (int c = 0; c < columns; ++c) row.take(tile[c], first + c);
        }
    }
};

// For each row of x (rows, num_inputs) the first greatest output and its value.
inline std::vector<Best> find_best(Workspace& space, const PackedLinear& map, const float* x, int rows) {
    const PackedWeights& w = map.weights();
    const Activations inputs = space.prepared(rows, w.num_inputs);
    std::vector<std::vector<Best>> found(space.team.size(), std::vector<Best>(rows));
    Screen screen(space, map, rows);
    space.team.run([&](int thread) {
        screen.run(x, inputs, thread);
        space.prepare(w.inputs, x, rows, w.num_inputs, inputs, [](int, int) {});
        multiply(space, inputs, rows, {BestOutput{&map, space.kernels, &screen, found[thread].data()}});
    });
    for (const std::vector<Best>& part : found)
        for (int r = 0; r < rows; ++r) found[0][r].take(part[r].value, part[r].output);
    return found[0];
}

}  // namespace scone
