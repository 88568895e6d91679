// Causal attention of a few tokens over a paged cache. Included after vector_math.inl, once per
// instruction set.
//
// A context is taken span by span of kSpan tokens, and their sums are added front to back: spans may be computed
// one after the other or by several threads. Within a span a score is summed over the head's dimensions and a
// result over the tokens, both front to back in one lane. So queries may be taken together or alone, blocks be of
// any size and vectors of any width, without a bit of difference. Keys and values that are held in 16 bits are expanded
// as they are loaded, which is exact, so that the bits are those of floats with these values. What the block after
// this one will be read for is asked for meanwhile: blocks lie anywhere, and the processor's own prefetch ends with
// each.

#ifdef SCONE_AVX512
constexpr int kQueries = 12;  // that are taken at once
constexpr int kSums = 24;     // vectors of sums that fit in registers beside what they are made of
#else
constexpr int kQueries = 6;
constexpr int kSums = 12;
#endif
static_assert(kQueries <= kTileQueries, "");
template <class Held>
constexpr int kLine = 64 / sizeof(Held);  // values of a cache line

static inline float fma1(float a, float b, float c) {
#ifdef SCONE_AVX2
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Scores of kRows queries (head_dim, kRows) with the `size` keys of one block (head_dim, size).
template <int kRows, class Held>
static void score_block(const float* queries, const Held* keys, const Held* next, int size, int head_dim,
                        float scale, float* scores, size_t stride) {
    constexpr int kVectors = 16 / lanes<wide>;
    int t = 0;
    for (; t + 16 <= size; t += 16) {
        wide sums[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < kVectors; ++j) sums[r][j] = splat<wide>(0.0f);
        const Held* k = keys + t;
        const float* q = queries;
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
            for (int d = 0; d < head_dim; ++d) sum = fma1(queries[d * kRows + r], load1(keys + d * size + t), sum);
            scores[r * stride + t] = sum * scale;
        }
}

// Scores less the greatest one, which goes to `most`, to the power of e; returns their sum.
static float exponentials(float* scores, int n, float& most) {
    // Padded to whole vectors with what adds nothing.
    const int padded = (n + 7) / 8 * 8;
    for (int i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    f32x8 greatest = load(scores);
    for (int i = 8; i < padded; i += 8) greatest = max8(greatest, load(scores + i));
    most = max_of(greatest);
    f32x8 total = splat(0.0f);
    for (int i = 0; i < padded; i += 8) {
        const f32x8 e = exp8(load(scores + i) - splat(most));
        store(scores + i, e);
        total = total + e;
    }
    return sum8(total);
}

// One sequence's keys or values of one head: block after block.
template <class Held>
struct HeadBlocks {
    const Held* side;
    const int32_t* table;
    size_t block_stride;
    int size;  // tokens of a block

    const Held* of(int token) const { return side + table[token / size] * block_stride; }
};

// sums[r] (kVectors vectors from `d` on) += sum over tokens [begin, end) of weights[r][t - begin] * values.
// `after`: the block that is read next.
template <class Vector, int kRows, int kVectors, class Held>
static void weigh(const float* weights, size_t stride, const HeadBlocks<Held>& values, int begin, int end,
                  const Held* after, int head_dim, float* sums, int d) {
    const int row = head_dim + kSumsTail;
    Vector acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) acc[r][j] = load<Vector>(sums + r * row + d + j * lanes<Vector>);
    for (int t = begin, stop; t < end; t = stop) {
        const int first = t - t % values.size;
        stop = first + values.size < end ? first + values.size : end;
        const Held *v = values.of(t) + (t - first) * head_dim + d, *next = (stop < end ? values.of(stop) : after) + d;
        for (; t < stop; ++t, v += head_dim, next += head_dim) {
            for (int j = 0; j < kVectors * lanes<Vector>; j += kLine<Held>) __builtin_prefetch(next + j);
            Vector value[kVectors];
            for (int j = 0; j < kVectors; ++j) value[j] = load<Vector>(v + j * lanes<Vector>);
            for (int r = 0; r < kRows; ++r) {
                const Vector w = splat<Vector>(weights[r * stride + (t - begin)]);
                for (int j = 0; j < kVectors; ++j) acc[r][j] = fma(w, value[j], acc[r][j]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) store(sums + r * row + d + j * lanes<Vector>, acc[r][j]);
}

template <int kRows, class Held>
static void weigh_all(const float* weights, size_t stride, const HeadBlocks<Held>& values, int begin, int end,
                      const Held* after, int head_dim, float* sums) {
    if (begin >= end) return;
    constexpr int kVectors = kSums / kRows >= 4 ? 4 : kSums / kRows;
    int d = 0;
    for (; d + kVectors * lanes<wide> <= head_dim; d += kVectors * lanes<wide>)
        weigh<wide, kRows, kVectors>(weights, stride, values, begin, end, after, head_dim, sums, d);
    for (; d + lanes<wide> <= head_dim; d += lanes<wide>)
        weigh<wide, kRows, 1>(weights, stride, values, begin, end, after, head_dim, sums, d);
    for (; d < head_dim; d += 8) weigh<f32x8, kRows, 1>(weights, stride, values, begin, end, after, head_dim, sums, d);
}

// kRows queries of a tile, from the `begin`-th on, with the cache of their key head; contexts grow with the token.
template <int kRows, class Held>
struct Strip {
    const QueryTile& tile;
    const int begin, head_dim;
    const HeadBlocks<Held> keys, values;
    float *const queries, *const scores;  // scratch

    Strip(const QueryTile& tile, const CacheView& cache, int begin)
        : tile(tile), begin(begin), head_dim(cache.head_dim), keys(blocks(tile, cache, cache.keys)),
          values(blocks(tile, cache, cache.values)), queries(tile.scratch),
          scores(tile.scratch + kTileQueries * head_dim) {
        for (int r = 0; r < kRows; ++r) {
            const float* q = tile.q + place(r);
            for (int d = 0; d < head_dim; ++d) queries[d * kRows + r] = q[d];
        }
    }

    static HeadBlocks<Held> blocks(const QueryTile& tile, const CacheView& cache, const void* side) {
        const size_t run = (size_t)cache.block_size * cache.head_dim;
        return {(const Held*)side + tile.kv_head * run, tile.block_table, run * cache.num_kv_heads, cache.block_size};
    }

    int context(int r) const { return tile.context + (begin + r) / tile.group; }

    size_t place(int r) const {
        return (begin + r) / tile.group * tile.stride + (begin + r) % tile.group * head_dim;
    }

    int num_spans() const { return spans(context(kRows - 1)); }

    // The rows' sums over one span; see QueryTile.
    void sum(int span, float scale, float* sums) const {
        const int size = keys.size, row = head_dim + kSumsTail, first = span * kSpan;
        const int origin = first - first % size;
        const size_t stride = tile.scores_stride;
        int ends[kRows];
        for (int r = 0; r < kRows; ++r) {
            ends[r] = context(r) < first + kSpan ? context(r) : first + kSpan;
            for (int d = 0; d < row; ++d) sums[r * row + d] = 0.0f;
        }
        const int last = ends[kRows - 1];
        for (int block = origin; block < last; block += size)
            score_block<kRows>(queries, keys.of(block), block + size < last ? keys.of(block + size) : values.of(first),
                               size, head_dim, scale, scores + (block - origin), stride);
        float* weights = scores + (first - origin);
        for (int r = 0; r < kRows; ++r)
            if (ends[r] > first)
                sums[r * row + head_dim] = exponentials(weights + r * stride, ends[r] - first, sums[r * row + head_dim + 1]);
        const int common = ends[0] > first ? ends[0] : first;
        const Held* after = last < context(kRows - 1) ? keys.of(last) : values.of(first);
        weigh_all<kRows>(weights, stride, values, first, common, after, head_dim, sums);
        for (int r = 0; r < kRows; ++r)  // the tokens that only the later queries see
            weigh_all<1>(weights + r * stride + (common - first), 0, values, common, ends[r], after, head_dim,
                         sums + r * row);
    }
};

static inline float exp1(float x) { return exp8(splat(x))[0]; }

// Adds what a query has of a later span.
static void add_span(float* sums, const float* more, int head_dim) {
    if (more[head_dim] == 0.0f) return;  // its context ends before
    const float most = sums[head_dim + 1], others = more[head_dim + 1];
    const float largest = most > others ? most : others;
    const float a = exp1(most - largest), b = exp1(others - largest);
    for (int d = 0; d < head_dim; d += 8)
        store(sums + d, load(sums + d) * splat(a) + load(more + d) * splat(b));
    sums[head_dim] = sums[head_dim] * a + more[head_dim] * b;
    sums[head_dim + 1] = largest;
}

static void divide(const float* sums, int head_dim, float* out) {
    const f32x8 inverse = splat(1.0f / sums[head_dim]);
    for (int d = 0; d < head_dim; d += 8) store(out + d, load(sums + d) * inverse);
}

template <int kRows, class Held>
static void attend_rows(const QueryTile& tile, const CacheView& cache, float scale, int begin) {
    const Strip<kRows, Held> strip(tile, cache, begin);
    const int head_dim = cache.head_dim, row = head_dim + kSumsTail;
    float *const sums = strip.scores + kTileQueries * tile.scores_stride, *const more = sums + kTileQueries * row;
    strip.sum(0, scale, sums);
    for (int span = 1; span < strip.num_spans(); ++span) {
        strip.sum(span, scale, more);
        for (int r = 0; r < kRows; ++r) add_span(sums + r * row, more + r * row, head_dim);
    }
    for (int r = 0; r < kRows; ++r) divide(sums + r * row, head_dim, tile.out + strip.place(r));
}

// body(Constant<count>, begin) for the queries of a tile, kQueries at a time.
template <class Body>
static void for_strips(const QueryTile& tile, const Body& body) {
    const int num_queries = tile.num_tokens * tile.group;
    int begin = 0;
    for (; begin + kQueries <= num_queries; begin += kQueries) body(Constant<kQueries>(), begin);
    for_rest<kQueries>(num_queries - begin, [&](auto n) { body(n, begin); });
}

template <class Held>
static void attend_held(const QueryTile& tile, const CacheView& cache, float scale) {
    for_strips(tile, [&](auto n, int begin) { attend_rows<n.value, Held>(tile, cache, scale, begin); });
}

static void attend(const QueryTile& tile, const CacheView& cache, float scale) {
    if (cache.kind == CacheKind::bf16) return attend_held<bfloat16>(tile, cache, scale);
    attend_held<float>(tile, cache, scale);
}

template <class Held>
static void attend_span_held(const QueryTile& tile, const CacheView& cache, float scale, int span, float* sums) {
    for_strips(tile, [&](auto n, int begin) {
        Strip<n.value, Held>(tile, cache, begin).sum(span, scale, sums + begin * (cache.head_dim + kSumsTail));
    });
}

static void attend_span(const QueryTile& tile, const CacheView& cache, float scale, int span, float* sums) {
    if (cache.kind == CacheKind::bf16) return attend_span_held<bfloat16>(tile, cache, scale, span, sums);
    attend_span_held<float>(tile, cache, scale, span, sums);
}

static void join_spans(const QueryTile& tile, int head_dim, float* sums, size_t span_stride) {
    for (int i = 0; i < tile.num_tokens * tile.group; ++i) {
        const int token = i / tile.group;
        float* first = sums + i * (head_dim + kSumsTail);
        for (int span = 1; span < spans(tile.context + token); ++span)
            add_span(first, first + span * span_stride, head_dim);
        divide(first, head_dim, tile.out + token * tile.stride + i % tile.group * head_dim);
    }
}
