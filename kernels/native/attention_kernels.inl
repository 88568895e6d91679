// Causal attention of a few tokens over a paged cache. Included after vector_math.inl, once per
// instruction set.
//
// A score is summed over the head's dimensions and a result over the context, both front to back in one
// lane: queries may be taken together or alone, blocks be of any size and vectors of any width, without a
// bit of difference. What the block after this one will be read for is asked for meanwhile: blocks lie
// anywhere, and the processor's own prefetch ends with each.

#ifdef SCONE_AVX512
constexpr int kQueries = 12;  // that are taken at once
constexpr int kSums = 24;     // vectors of sums that fit in registers beside what they are made of
#else
constexpr int kQueries = 6;
constexpr int kSums = 12;
#endif
static_assert(kQueries <= kTileQueries, "");
constexpr int kLine = 16;  // floats of a cache line

static inline float fma1(float a, float b, float c) {
#ifdef SCONE_AVX2
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Scores of kRows queries (head_dim, kRows) with the `size` keys of one block (head_dim, size).
template <int kRows>
static void score_block(const float* queries, const float* keys, const float* next, int size, int head_dim,
                        float scale, float* scores, size_t stride) {
    constexpr int kVectors = 16 / lanes<wide>;
    int t = 0;
    for (; t + 16 <= size; t += 16) {
        wide sums[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kVectors; ++j) sums[r][j] = splat<wide>(0.0f);
        const float *k = keys + t, *q = queries;
        for (int d = 0; d < head_dim; ++d, k += size, q += kRows) {
            __builtin_prefetch(next + (k - keys));
            wide key[kVectors];
            for (int j = 0; j < kVectors; ++j) key[j] = load<wide>(k + j * lanes<wide>);
            for (int r = 0; r < kRows; ++r) {
                const wide v = splat<wide>(q[r]);
                for (int j = 0; j < kVectors; ++j) sums[r][j] = fma(v, key[j], sums[r][j]);
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kVectors; ++j)
                store(scores + r * stride + t + j * lanes<wide>, sums[r][j] * splat<wide>(scale));
    }
    for (; t + 8 <= size; t += 8)
        for (int r = 0; r < kRows; ++r) {
            f32x8 sum = splat(0.0f);
            for (int d = 0; d < head_dim; ++d) sum = fma8(splat(queries[d * kRows + r]), load(keys + d * size + t), sum);
            store(scores + r * stride + t, sum * splat(scale));
        }
    for (; t < size; ++t)
        for (int r = 0; r < kRows; ++r) {
            float sum = 0.0f;
            for (int d = 0; d < head_dim; ++d) sum = fma1(queries[d * kRows + r], keys[d * size + t], sum);
            scores[r * stride + t] = sum * scale;
        }
}

static void softmax(float* scores, int n) {
    // Padded to whole vectors with what adds nothing.
    const int padded = (n + 7) / 8 * 8;
    for (int i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    f32x8 most = load(scores);
    for (int i = 8; i < padded; i += 8) most = max8(most, load(scores + i));
    const float largest = max_of(most);
    f32x8 total = splat(0.0f);
    for (int i = 0; i < padded; i += 8) {
        const f32x8 e = exp8(load(scores + i) - splat(largest));
        store(scores + i, e);
        total = total + e;
    }
    const f32x8 inverse = splat(1.0f / sum8(total));
    for (int i = 0; i < padded; i += 8) store(scores + i, load(scores + i) * inverse);
}

// One sequence's keys or values of one head: block after block.
struct HeadBlocks {
    const float* side;
    const int32_t* table;
    size_t block_stride;
    int size;  // tokens of a block

    // The block of token `first`, or of the last of `end` tokens if that is before it.
    const float* at(int first, int end) const {
        return side + table[(first < end ? first : end - 1) / size] * block_stride;
    }
};

// out[r] (kVectors vectors from `d` on) += sum over tokens [begin, end) of scores[r] * values.
template <class Vector, int kRows, int kVectors>
static void weigh(const float* scores, size_t stride, const HeadBlocks& values, int begin, int end, int head_dim,
                  float* const* out, int d) {
    Vector sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) sums[r][j] = load<Vector>(out[r] + d + j * lanes<Vector>);
    for (int t = begin, stop; t < end; t = stop) {
        const int first = t - t % values.size;
        stop = first + values.size < end ? first + values.size : end;
        const float *v = values.at(first, end) + (t - first) * head_dim + d, *next = values.at(stop, end) + d;
        for (; t < stop; ++t, v += head_dim, next += head_dim) {
            for (int j = 0; j < kVectors * lanes<Vector>; j += kLine) __builtin_prefetch(next + j);
            Vector value[kVectors];
            for (int j = 0; j < kVectors; ++j) value[j] = load<Vector>(v + j * lanes<Vector>);
            for (int r = 0; r < kRows; ++r) {
                const Vector w = splat<Vector>(scores[r * stride + t]);
                for (int j = 0; j < kVectors; ++j) sums[r][j] = fma(w, value[j], sums[r][j]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) store(out[r] + d + j * lanes<Vector>, sums[r][j]);
}

template <int kRows>
static void weigh_all(const float* scores, size_t stride, const HeadBlocks& values, int begin, int end,
                      int head_dim, float* const* out) {
    constexpr int kVectors = kSums / kRows >= 4 ? 4 : kSums / kRows;
    int d = 0;
    for (; d + kVectors * lanes<wide> <= head_dim; d += kVectors * lanes<wide>)
        weigh<wide, kRows, kVectors>(scores, stride, values, begin, end, head_dim, out, d);
    for (; d + lanes<wide> <= head_dim; d += lanes<wide>)
        weigh<wide, kRows, 1>(scores, stride, values, begin, end, head_dim, out, d);
    for (; d < head_dim; d += 8) weigh<f32x8, kRows, 1>(scores, stride, values, begin, end, head_dim, out, d);
}

// kRows queries of a tile, from the `begin`-th on; contexts grow with the token.
template <int kRows>
static void attend_rows(const QueryTile& tile, const CacheView& cache, float scale, int begin) {
    const int head_dim = cache.head_dim, size = cache.block_size;
    const size_t run = (size_t)size * head_dim, block_stride = run * cache.num_kv_heads;
    const size_t offset = tile.kv_head * run, stride = tile.scores_stride;
    const HeadBlocks keys{cache.keys + offset, tile.block_table, block_stride, size};
    const HeadBlocks values{cache.values + offset, tile.block_table, block_stride, size};
    float *const queries = tile.scratch, *const scores = tile.scratch + kTileQueries * head_dim;
    float* out[kRows];
    int contexts[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int token = (begin + r) / tile.group, head = (begin + r) % tile.group;
        const size_t at = token * tile.stride + head * head_dim;
        out[r] = tile.out + at;
        contexts[r] = tile.context + token;
        for (int d = 0; d < head_dim; ++d) queries[d * kRows + r] = tile.q[at + d];
    }
    const int shortest = contexts[0], longest = contexts[kRows - 1];
    for (int first = 0; first < longest; first += size)
        score_block<kRows>(queries, keys.at(first, longest), keys.at(first + size, longest), size, head_dim, scale,
                           scores + first, stride);
    for (int r = 0; r < kRows; ++r) {
        softmax(scores + r * stride, contexts[r]);
        for (int d = 0; d < head_dim; ++d) out[r][d] = 0.0f;
    }
    weigh_all<kRows>(scores, stride, values, 0, shortest, head_dim, out);
    for (int r = 0; r < kRows; ++r)  // the tokens that only the later queries see
        weigh_all<1>(scores + r * stride, 0, values, shortest, contexts[r], head_dim, out + r);
}

static void attend(const QueryTile& tile, const CacheView& cache, float scale) {
    const int num_queries = tile.num_tokens * tile.group;
    int begin = 0;
    for (; begin + kQueries <= num_queries; begin += kQueries) attend_rows<kQueries>(tile, cache, scale, begin);
    for_rest<kQueries>(num_queries - begin, [&](auto n) { attend_rows<n.value>(tile, cache, scale, begin); });
}
