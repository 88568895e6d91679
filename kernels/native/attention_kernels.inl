// Causal attention of a few tokens over a paged cache. Included after vector_math.inl, once per
// instruction set.
//
// A score is summed over the head's dimensions and a result over the context, both front to back in one
// lane: queries may be taken together or alone, and blocks be of any size, without a bit of difference.

static inline float fma1(float a, float b, float c) {
#ifdef SCONE_AVX2
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Scores of kRows queries with the `size` keys of one block (head_dim, size).
template <int kRows>
static void score_block(const float* const* q, const float* keys, int size, int head_dim, float scale,
                        float* const* scores, int first) {
    int t = 0;
    for (; t + 16 <= size; t += 16) {
        f32x8 low[kRows], high[kRows];
        for (int r = 0; r < kRows; ++r) low[r] = high[r] = splat(0.0f);
        const float* k = keys + t;
        for (int d = 0; d < head_dim; ++d, k += size) {
            const f32x8 k0 = load(k), k1 = load(k + 8);
            for (int r = 0; r < kRows; ++r) {
                const f32x8 v = splat(q[r][d]);
                low[r] = fma8(v, k0, low[r]);
                high[r] = fma8(v, k1, high[r]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            store(scores[r] + first + t, low[r] * splat(scale));
            store(scores[r] + first + t + 8, high[r] * splat(scale));
        }
    }
    for (; t + 8 <= size; t += 8)
        for (int r = 0; r < kRows; ++r) {
            f32x8 sum = splat(0.0f);
            for (int d = 0; d < head_dim; ++d) sum = fma8(splat(q[r][d]), load(keys + d * size + t), sum);
            store(scores[r] + first + t, sum * splat(scale));
        }
    for (; t < size; ++t)
        for (int r = 0; r < kRows; ++r) {
            float sum = 0.0f;
            for (int d = 0; d < head_dim; ++d) sum = fma1(q[r][d], keys[d * size + t], sum);
            scores[r][first + t] = sum * scale;
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

// out[r] (8 * kVectors,) += sum over t of weights[r][t] * values[t], values being head_dim apart.
template <int kRows, int kVectors>
static inline void weigh(const float* const* weights, int first, const float* values, int count, int head_dim,
                         float* const* out, int d) {
    f32x8 acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) acc[r][j] = load(out[r] + d + 8 * j);
    values += d;
    for (int t = 0; t < count; ++t, values += head_dim) {
        f32x8 v[kVectors];
        for (int j = 0; j < kVectors; ++j) v[j] = load(values + 8 * j);
        for (int r = 0; r < kRows; ++r) {
            const f32x8 w = splat(weights[r][first + t]);
            for (int j = 0; j < kVectors; ++j) acc[r][j] = fma8(w, v[j], acc[r][j]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVectors; ++j) store(out[r] + d + 8 * j, acc[r][j]);
}

template <int kRows>
static void weigh_block(const float* const* weights, int first, const float* values, int count, int head_dim,
                        float* const* out) {
    int d = 0;
    for (; d + 16 <= head_dim; d += 16) weigh<kRows, 2>(weights, first, values, count, head_dim, out, d);
    for (; d < head_dim; d += 8) weigh<kRows, 1>(weights, first, values, count, head_dim, out, d);
}

// kRows queries of a tile, from the `begin`-th on; contexts grow with the token.
template <int kRows>
static void attend_rows(const QueryTile& tile, const CacheView& cache, float scale, int begin) {
    const int head_dim = cache.head_dim, size = cache.block_size;
    const size_t run = (size_t)size * head_dim, block_stride = run * cache.num_kv_heads;
    const float* q[kRows];
    float *out[kRows], *scores[kRows];
    int contexts[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int token = (begin + r) / tile.group, head = (begin + r) % tile.group;
        q[r] = tile.q + token * tile.stride + head * head_dim;
        out[r] = tile.out + token * tile.stride + head * head_dim;
        scores[r] = tile.scores + (begin + r) * tile.scores_stride;
        contexts[r] = tile.context + token;
    }
    const int shortest = contexts[0], longest = contexts[kRows - 1];
    const auto at = [&](const float* side, int first) {
        return side + tile.block_table[first / size] * block_stride + tile.kv_head * run;
    };
    for (int first = 0; first < longest; first += size)
        score_block<kRows>(q, at(cache.keys, first), size, head_dim, scale, scores, first);
    for (int r = 0; r < kRows; ++r) {
        softmax(scores[r], contexts[r]);
        for (int d = 0; d < head_dim; ++d) out[r][d] = 0.0f;
    }
    for (int first = 0; first < longest; first += size) {
        const float* values = at(cache.values, first);
        const int all = shortest - first < size ? (shortest > first ? shortest - first : 0) : size;
        if (all > 0) weigh_block<kRows>(scores, first, values, all, head_dim, out);
        for (int r = 0; r < kRows; ++r) {  // the tokens that only the later queries see
            const int more = (contexts[r] - first < size ? contexts[r] - first : size) - all;
            if (more > 0) weigh_block<1>(scores + r, first + all, values + all * head_dim, more, head_dim, out + r);
        }
    }
}

static void attend(const QueryTile& tile, const CacheView& cache, float scale) {
    const int num_queries = tile.num_tokens * tile.group;
    int begin = 0;
    for (; begin + kStrip <= num_queries; begin += kStrip) attend_rows<kStrip>(tile, cache, scale, begin);
    for_rest(num_queries - begin, [&](auto n) { attend_rows<n.value>(tile, cache, scale, begin); });
}
