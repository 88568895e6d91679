// The decoder's inner loops, written once on 8-lane vectors. Included by one file per instruction set,
// which defines SCONE_AVX2 or not; without it the compiler maps the vectors to what the target has.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef int8_t i8x8 __attribute__((vector_size(8)));

static inline f32x8 load(const float* p) {
    f32x8 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, f32x8 v) { __builtin_memcpy(p, &v, sizeof v); }

static inline f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

static inline f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
#ifdef SCONE_AVX2
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline f32x8 max8(f32x8 a, f32x8 b) { return a > b ? a : b; }

static inline float sum8(f32x8 v) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Lane j of the result is sum8(v[j]), in the same order of additions.
static inline f32x8 sum8_of_8(const f32x8* v) {
#ifdef SCONE_AVX2
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                                    _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4], (__m256)v[5]),
                                    _mm256_hadd_ps((__m256)v[6], (__m256)v[7]));
    return (f32x8)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
    return f32x8{sum8(v[0]), sum8(v[1]), sum8(v[2]), sum8(v[3]), sum8(v[4]), sum8(v[5]), sum8(v[6]), sum8(v[7])};
#endif
}

static inline f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }

// e^x by range reduction and a degree-5 polynomial (the coefficients of Cephes' expf); relative error
// below 2e-7, zero below -87.3; NaN stays NaN.
static inline f32x8 exp8(f32x8 x) {
    const f32x8 is_small = (f32x8)(x < splat(-87.3f));
    const f32x8 bounded = x < splat(-87.3f) ? splat(-87.3f) : (x > splat(88.3f) ? splat(88.3f) : x);
    const f32x8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32x8 n = (bounded * splat(1.44269504088896341f) + magic) - magic;
    f32x8 r = fma8(n, splat(-0.693359375f), bounded);
    r = fma8(n, splat(2.12194440e-4f), r);
    f32x8 p = splat(1.9875691500e-4f);
    p = fma8(p, r, splat(1.3981999507e-3f));
    p = fma8(p, r, splat(8.3334519073e-3f));
    p = fma8(p, r, splat(4.1665795894e-2f));
    p = fma8(p, r, splat(1.6666665459e-1f));
    p = fma8(p, r, splat(5.0000001201e-1f));
    p = fma8(p, r * r, r + splat(1.0f));
    const i32x8 exponent = __builtin_convertvector(n, i32x8);
    const f32x8 power = (f32x8)((exponent + 127) << 23);
    const f32x8 value = p * power;
    return (f32x8)((i32x8)value & ~(i32x8)is_small);
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    uint32_t bits;
    if (rest >= 0x7c00u) {
        bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
    } else if (rest >= 0x400u) {
        bits = sign | ((rest << 13) + 0x38000000u);
    } else {
        float small = (float)rest * 5.9604644775390625e-8f;  // 2^-24
        __builtin_memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline f32x8 load_half(const unsigned char* p) {
#ifdef SCONE_AVX2
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    uint16_t h[8];
    __builtin_memcpy(h, p, sizeof h);
    f32x8 v;
    for (int i = 0; i < 8; ++i) v[i] = half_to_float(h[i]);
    return v;
#endif
}

// ---- linear maps ----------------------------------------------------------------------------------

// Inputs per pass over a panel: with them, the panel's part stays in the first-level cache for all rows.
// Sums go on where the last pass left them, so passes change no result.
constexpr int kInputsPerPass = 256;

template <int kRows>
static void tile_f32_rows(const float* w, int count, const float* x, size_t stride, float* out) {
    f32x8 low[kRows], high[kRows];
    for (int r = 0; r < kRows; ++r) {
        low[r] = load(out + r * kPanel);
        high[r] = load(out + r * kPanel + 8);
    }
    for (int k = 0; k < count; ++k, w += kPanel) {
        const f32x8 w0 = load(w), w1 = load(w + 8);
        for (int r = 0; r < kRows; ++r) {
            const f32x8 v = splat(x[r * stride + k]);
            low[r] = fma8(v, w0, low[r]);
            high[r] = fma8(v, w1, high[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        store(out + r * kPanel, low[r]);
        store(out + r * kPanel + 8, high[r]);
    }
}

static void tile_f32(const unsigned char* panel, int num_inputs, const float* x, int rows, float* out) {
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int first = 0; first < num_inputs; first += kInputsPerPass) {
        const int count = num_inputs - first < kInputsPerPass ? num_inputs - first : kInputsPerPass;
        const float* w = (const float*)panel + (size_t)first * kPanel;
        const float* part = x + first;
        const size_t stride = num_inputs;
        int r = 0;
        for (; r + 6 <= rows; r += 6) tile_f32_rows<6>(w, count, part + r * stride, stride, out + r * kPanel);
        part += r * stride;
        float* target = out + r * kPanel;
        switch (rows - r) {
            case 5: tile_f32_rows<5>(w, count, part, stride, target); break;
            case 4: tile_f32_rows<4>(w, count, part, stride, target); break;
            case 3: tile_f32_rows<3>(w, count, part, stride, target); break;
            case 2: tile_f32_rows<2>(w, count, part, stride, target); break;
            case 1: tile_f32_rows<1>(w, count, part, stride, target); break;
            default: break;
        }
    }
}

// Sums over one group, for kRows rows (`stride` inputs apart), of 8 columns of int8 weights times int16
// inputs: exact in 32 bits, since 127 * 32767 * 32 < 2^31.
template <int kRows>
static inline void dot_int8(const unsigned char* w, const int16_t* x, size_t stride, i32x8* sums) {
#ifdef SCONE_AVX2
    __m256i acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_si256();
    for (int pair = 0; pair < 16; ++pair) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(w + 16 * pair)));
        for (int r = 0; r < kRows; ++r) {
            int32_t two;
            __builtin_memcpy(&two, x + r * stride + 2 * pair, 4);
            acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(wide, _mm256_set1_epi32(two)));
        }
    }
    for (int r = 0; r < kRows; ++r) sums[r] = (i32x8)acc[r];
#else
    for (int r = 0; r < kRows; ++r, x += stride) {
        sums[r] = i32x8{};
        for (int pair = 0; pair < 16; ++pair)
            for (int c = 0; c < 8; ++c)
                sums[r][c] += (int8_t)w[16 * pair + 2 * c] * x[2 * pair] +
                              (int8_t)w[16 * pair + 2 * c + 1] * x[2 * pair + 1];
    }
#endif
}

template <int kRows>
static inline void group_int8(const unsigned char* w, f32x8 scale, const int16_t* x, const float* scales,
                              int num_groups, float* out) {
    i32x8 sums[kRows];
    dot_int8<kRows>(w, x, (size_t)num_groups * kGroup, sums);
    for (int r = 0; r < kRows; ++r) {
        float* acc = out + r * kPanel;
        store(acc, fma8(to_float(sums[r]), scale * splat(scales[(size_t)r * num_groups]), load(acc)));
    }
}

static void tile_int8(const unsigned char* panel, int num_groups, const int16_t* x, const float* scales, int rows,
                      float* out) {
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int g = 0; g < num_groups; ++g, panel += 32 + kGroup * kPanel) {
        for (int half = 0; half < 2; ++half) {
            const f32x8 scale = load_half(panel + 16 * half);
            const unsigned char* w = panel + 32 + half * kGroup * 8;
            int r = 0;
            for (; r + 4 <= rows; r += 4) {
                const size_t at = (size_t)r * num_groups + g;
                group_int8<4>(w, scale, x + at * kGroup, scales + at, num_groups, out + r * kPanel + 8 * half);
            }
            for (; r < rows; ++r) {
                const size_t at = (size_t)r * num_groups + g;
                group_int8<1>(w, scale, x + at * kGroup, scales + at, num_groups, out + r * kPanel + 8 * half);
            }
        }
    }
}

#ifdef SCONE_AVX2
// 8 columns x 32 inputs of 4-bit weights, unpacked: vector j holds inputs 4j .. 4j + 3 of each column.
struct Nibbles {
    __m256i v[8];
};

static inline Nibbles unpack(const unsigned char* w) {
    const __m256i mask = _mm256_set1_epi8(15);
    Nibbles n;
    for (int j = 0; j < 4; ++j) {
        const __m256i both = _mm256_load_si256((const __m256i*)(w + 32 * j));
        n.v[j] = _mm256_and_si256(both, mask);
        n.v[j + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
    return n;
}

// Sums of four products of at most 15 * 127 fit 16 bits eight times over: 8 * 2 * 15 * 127 = 30480.
static inline i32x8 dot_int4(const Nibbles& n, const int8_t* x) {
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
        int32_t four;
        __builtin_memcpy(&four, x + 4 * j, 4);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(n.v[j], _mm256_set1_epi32(four)));
    }
    return (i32x8)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
#else
struct Nibbles {
    const unsigned char* w;
};

static inline Nibbles unpack(const unsigned char* w) { return {w}; }

static inline i32x8 dot_int4(const Nibbles& n, const int8_t* x) {
    i32x8 sum = {};
    for (int j = 0; j < 4; ++j)
        for (int c = 0; c < 8; ++c)
            for (int i = 0; i < 4; ++i) {
                const int both = n.w[32 * j + 4 * c + i];
                sum[c] += (both & 15) * x[4 * j + i] + (both >> 4) * x[16 + 4 * j + i];
            }
    return sum;
}
#endif

static void tile_int4(const unsigned char* panel, int num_groups, const int8_t* x, const float* scales,
                      const float* sums, int rows, float* out) {
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int g = 0; g < num_groups; ++g, panel += 64 + kGroup * kPanel / 2) {
        for (int half = 0; half < 2; ++half) {
            const f32x8 scale = load_half(panel + 16 * half), minimum = load_half(panel + 32 + 16 * half);
            const Nibbles w = unpack(panel + 64 + half * kGroup * 4);
            for (int r = 0; r < rows; ++r) {
                const size_t at = (size_t)r * num_groups + g;
                float* acc = out + r * kPanel + 8 * half;
                const f32x8 low = fma8(minimum, splat(sums[at]), load(acc));
                store(acc, fma8(to_float(dot_int4(w, x + at * kGroup)), scale * splat(scales[at]), low));
            }
        }
    }
}

static void tile(const PackedWeights& w, int panel, const Activations& x, int first_row, int rows, float* out) {
    const unsigned char* data = w.data + (size_t)panel * w.panel_bytes;
    const size_t group = (size_t)first_row * w.num_groups;
    switch (w.kind) {
        case WeightKind::f32:
            tile_f32(data, w.num_inputs, (const float*)x.values + (size_t)first_row * w.num_inputs, rows, out);
            break;
        case WeightKind::int8:
            tile_int8(data, w.num_groups, (const int16_t*)x.values + group * kGroup, x.scales + group, rows, out);
            break;
        case WeightKind::int4:
            tile_int4(data, w.num_groups, (const int8_t*)x.values + group * kGroup, x.scales + group,
                      x.sums + group, rows, out);
            break;
    }
}

// ---- rows -----------------------------------------------------------------------------------------

static inline void store_narrow(int16_t* p, i32x8 v) {
    const i16x8 narrow = __builtin_convertvector(v, i16x8);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}

static inline void store_narrow(int8_t* p, i32x8 v) {
    const i8x8 narrow = __builtin_convertvector(v, i8x8);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}

// Rounds one group to integers of at most `limit`; returns scale and the integers' sum. Rounding adds and
// takes away 1.5 * 2^23, exact for halves to even below 2^22. A NaN makes the scale NaN.
template <class Integer>
static inline int round_group(const float* x, float limit, Integer* values, float* scale) {
    f32x8 most = splat(0.0f), any = splat(0.0f);
    for (int i = 0; i < kGroup; i += 8) {
        const f32x8 v = load(x + i);
        const f32x8 magnitude = (f32x8)((i32x8)v & 0x7fffffff);
        most = max8(magnitude, most);
        any = any + v * splat(0.0f);  // NaN if any is NaN or infinite, else zero
    }
    float largest = 0.0f;
    for (int i = 0; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
    *scale = largest / limit + sum8(any);
    const f32x8 inverse = splat(largest > 0.0f && largest < 3e38f ? limit / largest : 0.0f);
    i32x8 sum = {};
    for (int i = 0; i < kGroup; i += 8) {
        const f32x8 magic = splat(12582912.0f);
        const f32x8 rounded = (load(x + i) * inverse + magic) - magic;
        const i32x8 q = __builtin_convertvector(rounded == rounded ? rounded : splat(0.0f), i32x8);
        store_narrow(values + i, q);
        sum += q;
    }
    int total = 0;
    for (int c = 0; c < 8; ++c) total += sum[c];
    return total;
}

static void prepare(WeightKind kind, const float* x, int num_inputs, int row, const Activations& out) {
    if (kind == WeightKind::f32) {
        float* target = (float*)out.values + (size_t)row * num_inputs;
        if (target != x) __builtin_memcpy(target, x, sizeof(float) * num_inputs);
        return;
    }
    const int num_groups = (num_inputs + kGroup - 1) / kGroup;
    for (int g = 0; g < num_groups; ++g) {
        const float* group = x + g * kGroup;
        float padded[kGroup];
        if ((g + 1) * kGroup > num_inputs) {
            for (int i = 0; i < kGroup; ++i) padded[i] = g * kGroup + i < num_inputs ? group[i] : 0.0f;
            group = padded;
        }
        const size_t at = (size_t)row * num_groups + g;
        if (kind == WeightKind::int8) {
            round_group(group, 32767.0f, (int16_t*)out.values + at * kGroup, out.scales + at);
        } else {
            const int sum = round_group(group, 127.0f, (int8_t*)out.values + at * kGroup, out.scales + at);
            out.sums[at] = out.scales[at] * (float)sum;
        }
    }
}

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    f32x8 squares = splat(0.0f);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const f32x8 v = load(x + i);
        squares = fma8(v, v, squares);
    }
    float total = sum8(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(total / (float)n + eps);
    for (i = 0; i + 8 <= n; i += 8) store(out + i, load(weight + i) * (load(x + i) * splat(factor)));
    for (; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const f32x8 g = load(gate + i);
        store(out + i, g / (splat(1.0f) + exp8(-g)) * load(up + i));
    }
    if (i < n) {
        float g[8] = {}, u[8] = {}, r[8];
        __builtin_memcpy(g, gate + i, sizeof(float) * (n - i));
        __builtin_memcpy(u, up + i, sizeof(float) * (n - i));
        const f32x8 v = load(g);
        store(r, v / (splat(1.0f) + exp8(-v)) * load(u));
        __builtin_memcpy(out + i, r, sizeof(float) * (n - i));
    }
}

static void rotate(float* head, const float* cos, const float* sin, int head_dim) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + 8 <= half; i += 8) {
        const f32x8 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

// ---- attention ------------------------------------------------------------------------------------

static inline float dot(const float* a, const float* b, int n) {
    f32x8 sum = splat(0.0f);
    for (int i = 0; i < n; i += 8) sum = fma8(load(a + i), load(b + i), sum);
    return sum8(sum);
}

// Lane j of the result is dot(q, keys + j * n, n), in the same order of additions.
static inline f32x8 dot_8(const float* q, const float* keys, int n) {
    f32x8 sums[8];
    for (int j = 0; j < 8; ++j) sums[j] = splat(0.0f);
    for (int i = 0; i < n; i += 8) {
        const f32x8 part = load(q + i);
        for (int j = 0; j < 8; ++j) sums[j] = fma8(part, load(keys + j * n + i), sums[j]);
    }
    return sum8_of_8(sums);
}

static void softmax(float* scores, int n) {
    // Padded to whole vectors with what adds nothing.
    const int padded = (n + 7) / 8 * 8;
    for (int i = n; i < padded; ++i) scores[i] = -__builtin_inff();
    f32x8 most = load(scores);
    for (int i = 8; i < padded; i += 8) most = max8(most, load(scores + i));
    float largest = most[0];
    for (int i = 1; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
    f32x8 total = splat(0.0f);
    for (int i = 0; i < padded; i += 8) {
        const f32x8 e = exp8(load(scores + i) - splat(largest));
        store(scores + i, e);
        total = total + e;
    }
    const f32x8 inverse = splat(1.0f / sum8(total));
    for (int i = 0; i < padded; i += 8) store(scores + i, load(scores + i) * inverse);
}

// out (8 * kVectors,) += sum over t of weights[t] * values[t], values being head_dim apart.
template <int kVectors>
static inline void weigh(const float* weights, const float* values, int count, int head_dim, float* out) {
    f32x8 acc[kVectors];
    for (int j = 0; j < kVectors; ++j) acc[j] = load(out + 8 * j);
    for (int t = 0; t < count; ++t, values += head_dim) {
        const f32x8 w = splat(weights[t]);
        for (int j = 0; j < kVectors; ++j) acc[j] = fma8(w, load(values + 8 * j), acc[j]);
    }
    for (int j = 0; j < kVectors; ++j) store(out + 8 * j, acc[j]);
}

static void attend(const float* q, int group, const CacheView& cache, int kv_head, const int32_t* block_table,
                   int context, float scale, float* scores, float* out) {
    const int head_dim = cache.head_dim, size = cache.block_size;
    const size_t run = (size_t)size * head_dim, block_stride = run * cache.num_kv_heads;
    const int stride = (context + 7) / 8 * 8;
    for (int first = 0; first < context; first += size) {
        const float* keys = cache.keys + block_table[first / size] * block_stride + kv_head * run;
        const int count = context - first < size ? context - first : size;
        for (int h = 0; h < group; ++h) {
            const float* head = q + h * head_dim;
            float* target = scores + h * stride + first;
            int t = 0;
            for (; t + 8 <= count; t += 8)
                store(target + t, dot_8(head, keys + t * head_dim, head_dim) * splat(scale));
            for (; t < count; ++t) target[t] = dot(head, keys + t * head_dim, head_dim) * scale;
        }
    }
    for (int h = 0; h < group; ++h) softmax(scores + h * stride, context);
    for (int i = 0; i < group * head_dim; ++i) out[i] = 0.0f;
    for (int first = 0; first < context; first += size) {
        const float* values = cache.values + block_table[first / size] * block_stride + kv_head * run;
        const int count = context - first < size ? context - first : size;
        for (int h = 0; h < group; ++h) {
            const float* weights = scores + h * stride + first;
            float* target = out + h * head_dim;
            int d = 0;
            for (; d + 64 <= head_dim; d += 64) weigh<8>(weights, values + d, count, head_dim, target + d);
            for (; d < head_dim; d += 8) weigh<1>(weights, values + d, count, head_dim, target + d);
        }
    }
}
