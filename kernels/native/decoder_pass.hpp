// All layers of a decoder over a flat batch of tokens, and keys and values alone from what went into the layers.
// Knows no Python: what it is given has been checked.
//
// Threads share the rows or tiles of each part of a layer and wait for each other after it. Every element is
// computed in an order that depends on its own sequence alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "decoder_layers.hpp"
#include "kv_cache.hpp"
#include "layer_inputs.hpp"
#include "scratch.hpp"
#include "shared_attention.hpp"
#include "wanted_tokens.hpp"
#include "workspace.hpp"

namespace scone {

// Which rows of a step are whose.
struct StepSequences {
    int count;
    const int32_t* query_starts;  // (count + 1,)
    const int32_t* context_lens;  // (count,)
    const int32_t* num_wanted;    // (count,) of their last rows, whose states are asked for; nullptr: of all
};

// hidden (rows, dim): states before layer first_layer in (embeddings, where that is 0), states after the first
// num_layers out; after all, normalised. Rows that are not wanted hold anything then.
struct DecoderStep : Queries {
    int rows;
    float* hidden;
    size_t first_layer, num_layers;
    KvCache cache;
    LayerInputs kept;
    const int32_t* kept_rows = nullptr;  // (rows,) where among `kept`, -1: nowhere; nullptr: none is kept
};

// Blocks whose keys and values are to be computed from what went into the layers.
struct BlocksToRestore {
    int count;
    LayerInputs inputs;
    const int32_t *slots, *block_ids, *first_positions;  // (count,)
};

class DecoderPass {
public:
    // cos and sin (positions, head_dim / 2)
    DecoderPass(Workspace& space, const DecoderShape& shape, std::vector<float> final_norm, std::vector<float> cos,
                std::vector<float> sin)
        : space_(space), shape_(shape), attention_(space, shape.num_heads, shape.num_kv_heads, shape.head_dim),
          final_norm_(std::move(final_norm)), cos_(std::move(cos)), sin_(std::move(sin)) {}

    void add_layer(DecoderLayer layer) { layers_.push_back(std::move(layer)); }
    size_t num_layers() const { return layers_.size(); }

    // The tiles and spans of the step need not be filled in. Of tokens that are not wanted the last layer computes no
    // more than keys and values.
    void forward(DecoderStep step, const StepSequences& sequences) {
        plan(step, sequences);
        reserve(step);
        space_.team.run([&](int thread) { run(step, thread); });
    }

    // Keys and values as `forward` computed them.
    void restore(const BlocksToRestore& blocks, const KvCache& cache) {
        const int rows = blocks.count * cache.block_size;
        normed_.reserve(size_t(rows) * shape_.dim);
        k_.reserve(size_t(rows) * shape_.kv_dim());
        v_.reserve(size_t(rows) * shape_.kv_dim());
        prepared_ = space_.prepared(rows, shape_.dim);
        space_.team.run([&](int) {
            for (size_t i = 0; i < layers_.size(); ++i) restore_layer(blocks, cache, i);
        });
    }

private:
    void plan(DecoderStep& step, const StepSequences& sequences) {
        tiles_.clear();
        wanted_.clear();
        const int per_tile = attention_.tokens_per_tile();
        for (int seq = 0; seq < sequences.count; ++seq) {
            const int begin = sequences.query_starts[seq], end = sequences.query_starts[seq + 1];
            const int count = sequences.num_wanted != nullptr ? sequences.num_wanted[seq] : end - begin;
            add_tiles(tiles_, begin, end, per_tile, seq);
            wanted_.add(end - count, end, per_tile, seq, step.positions);
        }
        step.tiles = &tiles_;
        step.num_spans = spans(*std::max_element(sequences.context_lens, sequences.context_lens + sequences.count));
    }

    void reserve(const DecoderStep& step) {
        const size_t rows = step.rows;
        normed_.reserve(rows * shape_.dim);
        q_.reserve(rows * shape_.q_dim());
        k_.reserve(rows * shape_.kv_dim());
        v_.reserve(rows * shape_.kv_dim());
        attended_.reserve(rows * shape_.q_dim());
        gate_.reserve(rows * shape_.ffn_dim);
        up_.reserve(rows * shape_.ffn_dim);
        for (const std::vector<TokenTile>* tiles : {&std::as_const(tiles_), &wanted_.tiles()}) {
            Queries some = step;
            some.tiles = tiles;
            attention_.reserve(some, step.cache.block_size);
        }
        prepared_ = space_.prepared(step.rows, std::max({shape_.dim, shape_.q_dim(), shape_.ffn_dim}));
    }

    // From here on: called by all threads of the team.

    void run(const DecoderStep& whole, int thread) {
        DecoderStep step = whole;
        for (size_t i = step.first_layer; i < step.num_layers; ++i) {
            project(step, i);
            rotate_and_store(step, i);
            if (i + 1 == step.num_layers && wanted_.size() < step.rows) step = narrowed(step, thread);
            attention_.attend(step, q_.get(), attended_.get(), step.cache.view(i), thread);
            add_attended(step, layers_[i]);
            add_ffn(step, layers_[i]);
        }
        if (step.num_layers == layers_.size()) norm_last(step);
        if (thread == 0 && step.rows < whole.rows) wanted_.to_places(step.hidden, shape_.dim);
    }

    void project(const DecoderStep& step, size_t layer_id) {
        const DecoderLayer& layer = layers_[layer_id];
        prepare_normed(step.rows, layer.attention_norm, inputs_of(layer.q),
                       [&](int r) { return layer_input(step, layer_id, r); });
        multiply(space_, prepared_, step.rows, {{layer.q, q_.get()}, {layer.k, k_.get()}, {layer.v, v_.get()}});
    }

    void rotate_and_store(const DecoderStep& step, size_t layer_id) {
        const DecoderLayer& layer = layers_[layer_id];
        space_.team.share(int(step.tiles->size()), 1, [&](int item, int) {
            const TokenTile& tile = (*step.tiles)[item];
            const int32_t* table = step.block_tables + size_t(tile.sequence) * step.table_width;
            for (int r = tile.first_row; r < tile.first_row + tile.num_rows; ++r) {
                const int position = step.positions[r];
                for (int h = 0; h < shape_.num_heads; ++h)
                    turn(q_.get() + (size_t(r) * shape_.num_heads + h) * shape_.head_dim, layer.q_norm, position);
                store(step.cache, layer_id, r, position, table[position / step.cache.block_size]);
            }
        });
        space_.team.barrier();
    }

    // The step with the wanted rows alone, for all that follows its queries, keys and values.
    DecoderStep narrowed(const DecoderStep& step, int thread) {
        if (thread == 0) {
            wanted_.to_front(step.hidden, shape_.dim);
            wanted_.to_front(q_.get(), shape_.q_dim());
        }
        space_.team.barrier();
        DecoderStep narrow = step;
        narrow.rows = wanted_.size();
        narrow.positions = wanted_.positions();
        narrow.tiles = &wanted_.tiles();
        return narrow;
    }

    void add_attended(const DecoderStep& step, const DecoderLayer& layer) {
        const auto as_it_is = [](int, int) {};
        space_.prepare(inputs_of(layer.o), attended_.get(), step.rows, shape_.q_dim(), prepared_, as_it_is);
        multiply(space_, prepared_, step.rows, {{layer.o, step.hidden, true}});
    }

    void add_ffn(const DecoderStep& step, const DecoderLayer& layer) {
        const int ffn_dim = shape_.ffn_dim;
        prepare_normed(step.rows, layer.ffn_norm, inputs_of(layer.gate), [&](int r) { return hidden_row(step, r); });
        multiply(space_, prepared_, step.rows, {{layer.gate, gate_.get()}, {layer.up, up_.get()}});
        space_.prepare(inputs_of(layer.down), gate_.get(), step.rows, ffn_dim, prepared_, [&](int first, int count) {
            float* gate = gate_.get() + size_t(first) * ffn_dim;
            space_.kernels->silu_mul(gate, up_.get() + size_t(first) * ffn_dim, count * ffn_dim, gate);
        });
        multiply(space_, prepared_, step.rows, {{layer.down, step.hidden, true}});
    }

    void norm_last(const DecoderStep& step) {
        space_.team.share(step.rows, kStrip, [&](int begin, int end) {
            for (int r = begin; r < end; ++r) {
                float* row = step.hidden + size_t(r) * shape_.dim;
                space_.kernels->rms_norm(row, final_norm_.data(), shape_.norm_eps, shape_.dim, row);
            }
        });
        space_.team.barrier();
    }

    void restore_layer(const BlocksToRestore& blocks, const KvCache& cache, size_t layer_id) {
        const DecoderLayer& layer = layers_[layer_id];
        const int rows = blocks.count * cache.block_size;
        prepare_normed(rows, layer.attention_norm, inputs_of(layer.k), [&](int r) {
            const size_t slot = blocks.slots[r / cache.block_size];
            return blocks.inputs.at(slot * cache.block_size + r % cache.block_size, layer_id);
        });
        multiply(space_, prepared_, rows, {{layer.k, k_.get()}, {layer.v, v_.get()}});
        space_.team.share(rows, kStrip, [&](int begin, int end) {
            for (int r = begin; r < end; ++r) {
                const int block = r / cache.block_size, place = r % cache.block_size;
                store(cache, layer_id, r, blocks.first_positions[block] + place, blocks.block_ids[block]);
            }
        });
        space_.team.barrier();
    }

    static InputKind inputs_of(const PackedLinear* map) { return map->weights().inputs; }

    // Rows, normed, as inputs of maps of one kind; row(r) is where the r-th lies.
    template <class Row>
    void prepare_normed(int rows, const std::vector<float>& weight, InputKind kind, const Row& row) {
        space_.prepare(kind, normed_.get(), rows, shape_.dim, prepared_, [&](int first, int count) {
            for (int r = first; r < first + count; ++r)
                space_.kernels->rms_norm(row(r), weight.data(), shape_.norm_eps, shape_.dim,
                                         normed_.get() + size_t(r) * shape_.dim);
        });
    }

    const float* hidden_row(const DecoderStep& step, int r) const { return step.hidden + size_t(r) * shape_.dim; }

    // The input of a layer, kept if it is asked for.
    const float* layer_input(const DecoderStep& step, size_t layer_id, int r) const {
        const float* hidden = hidden_row(step, r);
        if (step.kept_rows != nullptr && step.kept_rows[r] >= 0)
            std::copy_n(hidden, shape_.dim, step.kept.at(step.kept_rows[r], layer_id));
        return hidden;
    }

    // One head, normed if the model does that, and rotated.
    void turn(float* head, const std::vector<float>& norm, int position) const {
        const size_t at = size_t(position) * (shape_.head_dim / 2);
        if (!norm.empty()) space_.kernels->rms_norm(head, norm.data(), shape_.norm_eps, shape_.head_dim, head);
        space_.kernels->rotate(head, cos_.data() + at, sin_.data() + at, shape_.head_dim);
    }

    // Row r of keys, rotated, and of values to its place in a block.
    void store(const KvCache& cache, size_t layer_id, int r, int position, size_t block) {
        for (int h = 0; h < shape_.num_kv_heads; ++h) {
            const size_t head = (size_t(r) * shape_.num_kv_heads + h) * shape_.head_dim;
            turn(k_.get() + head, layers_[layer_id].k_norm, position);
            cache.put(layer_id, block, h, position % cache.block_size, k_.get() + head, v_.get() + head);
        }
    }

    Workspace& space_;
    const DecoderShape shape_;
    SharedAttention attention_;
    const std::vector<float> final_norm_, cos_, sin_;
    std::vector<DecoderLayer> layers_;
    std::vector<TokenTile> tiles_;
    WantedTokens wanted_;
    Activations prepared_{};
    Scratch<float> normed_, q_, k_, v_, attended_, gate_, up_;
};

}  // namespace scone
