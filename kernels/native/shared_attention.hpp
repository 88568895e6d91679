// Attention of a step's queries over their contexts, shared among the threads of a team: by tiles of queries or,
// where there are too few of them to occupy all threads, by spans of their contexts. The bits are the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "scratch.hpp"
#include "wanted_tokens.hpp"
#include "workspace.hpp"

namespace scone {

// Tokens that attend in a step, and where their contexts lie.
struct Queries {
    const std::vector<TokenTile>* tiles;
    const int32_t* positions;     // (rows,)
    const int32_t* block_tables;  // (num_seqs, table_width)
    int table_width;
    int num_spans;  // of the longest context
};

class SharedAttention {
public:
    SharedAttention(Workspace& space, int num_heads, int num_kv_heads, int head_dim)
        : space_(space), num_kv_heads_(num_kv_heads), head_dim_(head_dim), group_(num_heads / num_kv_heads) {}

    // Tokens of a tile: as many as have kTileQueries queries for one key head.
    int tokens_per_tile() const { return std::max(1, kTileQueries / group_); }

    // Room for queries that are to attend.
    void reserve(const Queries& queries, int block_size) {
        scores_stride_ = kSpan + 2 * size_t(block_size) + 8;
        scratch_stride_ = attention_scratch(head_dim_, scores_stride_);
        scratch_.reserve(scratch_stride_ * space_.team.size());
        if (shares_contexts(queries))
            span_sums_.reserve(num_tiles(queries) * queries.num_spans * span_stride());
    }

    // q, out (rows, num_heads, head_dim). Called by all threads of the team.
    void attend(const Queries& queries, const float* q, float* out, const CacheView& cache, int thread) {
        const float scale = 1.0f / std::sqrt(float(head_dim_));
        const auto tile = [&](int index) { return query_tile(queries, q, out, index, thread); };
        if (shares_contexts(queries)) {
            attend_span_by_span(queries, cache, scale, tile);
        } else {
            space_.team.share(num_tiles(queries), 1,
                              [&](int index, int) { space_.kernels->attend(tile(index), cache, scale); });
        }
        space_.team.barrier();
    }

private:
    int num_tiles(const Queries& queries) const { return int(queries.tiles->size()) * num_kv_heads_; }

    // Whether there are too few tiles to occupy all threads, and contexts that can be shared among these.
    bool shares_contexts(const Queries& queries) const {
        return queries.num_spans > 1 && space_.team.size() > 1 && num_tiles(queries) < 2 * space_.team.size();
    }

    // Floats of what a tile's queries have of one span.
    size_t span_stride() const { return size_t(std::max(kTileQueries, group_)) * (head_dim_ + kSumsTail); }

    // Head by head, so that one head's keys and values stay in the second-level cache for all tiles; long
    // contexts first, so that no thread is left with one at the end.
    QueryTile query_tile(const Queries& queries, const float* q, float* out, int index, int thread) const {
        const int count = int(queries.tiles->size()), head = index / count;
        const TokenTile& tile = (*queries.tiles)[count - 1 - index % count];
        const size_t width = size_t(num_kv_heads_) * group_ * head_dim_;
        const size_t at = size_t(tile.first_row) * width + size_t(head) * group_ * head_dim_;
        return {q + at,
                out + at,
                width,
                tile.num_rows,
                group_,
                queries.positions[tile.first_row] + 1,
                head,
                queries.block_tables + size_t(tile.sequence) * queries.table_width,
                scratch_.get() + thread * scratch_stride_,
                scores_stride_};
    }

    template <class Tile>
    void attend_span_by_span(const Queries& queries, const CacheView& cache, float scale, const Tile& tile) {
        const size_t stride = span_stride();
        space_.team.share(num_tiles(queries) * queries.num_spans, 1, [&](int index, int) {
            const QueryTile some = tile(index / queries.num_spans);
            const int span = index % queries.num_spans;
            if (span < spans(some.context + some.num_tokens - 1))
                space_.kernels->attend_span(some, cache, scale, span, span_sums_.get() + index * stride);
        });
        space_.team.barrier();
        space_.team.share(num_tiles(queries), 1, [&](int index, int) {
            float* sums = span_sums_.get() + size_t(index) * queries.num_spans * stride;
            space_.kernels->join_spans(tile(index), head_dim_, sums, stride);
        });
    }

    Workspace& space_;
    const int num_kv_heads_, head_dim_, group_;
    size_t scores_stride_ = 0, scratch_stride_ = 0;
    Scratch<float> scratch_, span_sums_;
};

}  // namespace scone
