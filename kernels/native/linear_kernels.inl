// Tiles of a linear map: up to kRowBlock rows times one panel of 16 columns (decoder_kernels.hpp has the
// layouts). Included after vector_math.inl, once per instruction set.

// ---- float32 --------------------------------------------------------------------------------------

// Inputs per pass over a panel: with them, the panel's part stays in the first-level cache for all rows.
// Sums go on where the last pass left them, so passes change no result.
constexpr int kInputsPerPass = 256;

// out (kRows, 16) += x (count inputs, kRows) times w (count inputs, 16)
template <int kRows>
static void multiply_f32(const float* w, int count, const float* x, float* out) {
    f32x8 low[kRows], high[kRows];
    for (int r = 0; r < kRows; ++r) {
        low[r] = load(out + r * kPanel);
        high[r] = load(out + r * kPanel + 8);
    }
    for (int k = 0; k < count; ++k, w += kPanel, x += kRows) {
        const f32x8 w0 = load(w), w1 = load(w + 8);
        for (int r = 0; r < kRows; ++r) {
            const f32x8 v = splat(x[r]);
            low[r] = fma8(v, w0, low[r]);
            high[r] = fma8(v, w1, high[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        store(out + r * kPanel, low[r]);
        store(out + r * kPanel + 8, high[r]);
    }
}

// A group of a panel as floats (32 inputs, 16). The products with scales are exact, so that rounding happens
// once, in the sum, and the weights are the same bits with and without fused operations.
static inline void expand(WeightKind kind, const unsigned char* group, float* out) {
    for (int half = 0; half < 2; ++half, out += 8) {
        const f32x8 scale = load_half(group + 16 * half);
        if (kind == WeightKind::bf16) {
            for (int i = 0; i < kGroup; i += 2) {
                i32x8 pair;
                __builtin_memcpy(&pair, group + 2 * i * kPanel + 32 * half, sizeof pair);
                store(out + i * kPanel, (f32x8)(pair & (int32_t)0xffff0000));
                store(out + (i + 1) * kPanel, (f32x8)(pair << 16));
            }
        } else if (kind == WeightKind::int8) {
            for (int i = 0; i < kGroup; i += 2) {
                const i32x8 pair = widen(group + 2 * kPanel + i * kPanel + 16 * half);
                store(out + i * kPanel, to_float((pair << 24) >> 24) * scale);
                store(out + (i + 1) * kPanel, to_float(pair >> 8) * scale);
            }
        } else {
            const f32x8 minimum = load_half(group + 2 * kPanel + 16 * half);
            for (int i = 0; i < kGroup / 2; ++i) {
                i32x8 both;
                __builtin_memcpy(&both, group + 4 * kPanel + i / 4 * 64 + 32 * half, sizeof both);
                const i32x8 low = (both >> (i % 4 * 8)) & 15, high = (both >> (i % 4 * 8 + 4)) & 15;
                store(out + i * kPanel, fma8(to_float(low), scale, minimum));
                store(out + (i + kGroup / 2) * kPanel, fma8(to_float(high), scale, minimum));
            }
        }
    }
}

static void tile_f32(WeightKind kind, const unsigned char* panel, int num_inputs, const float* x, int rows,
                     float* out) {
    alignas(64) float expanded[kInputsPerPass * kPanel];
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int first = 0; first < num_inputs; first += kInputsPerPass) {
        const int count = num_inputs - first < kInputsPerPass ? num_inputs - first : kInputsPerPass;
        const unsigned char* group = panel + (size_t)(first / kGroup) * group_bytes(kind);
        const float* w = kind == WeightKind::f32 ? (const float*)group : expanded;
        if (kind != WeightKind::f32)
            for (int k = 0; k < count; k += kGroup, group += group_bytes(kind))
                expand(kind, group, expanded + k * kPanel);
        int r = 0;
        for (; r + kStrip <= rows; r += kStrip)
            multiply_f32<kStrip>(w, count, x + (size_t)r * num_inputs + first * kStrip, out + r * kPanel);
        const float* rest = x + (size_t)r * num_inputs + first * (rows - r);
        for_rest(rows - r, [&](auto n) { multiply_f32<n.value>(w, count, rest, out + r * kPanel); });
    }
}

// ---- 8 bits ---------------------------------------------------------------------------------------

// Sums over one group, for kRows rows, of 16 columns (two halves) of int8 weights times int16 inputs:
// exact in 32 bits, since 127 * 32767 * 32 < 2^31.
template <int kRows>
static inline void dot_int8(const unsigned char* w, const int16_t* x, i32x8 (*sums)[2]) {
#ifdef SCONE_AVX2
    __m256i low[kRows], high[kRows];
    for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_si256();
    for (int pair = 0; pair < kGroup / 2; ++pair) {
        const __m256i w0 = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(w + 32 * pair)));
        const __m256i w1 = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(w + 32 * pair + 16)));
        for (int r = 0; r < kRows; ++r) {
            int32_t two;
            __builtin_memcpy(&two, x + r * kGroup + 2 * pair, 4);
            const __m256i v = _mm256_set1_epi32(two);
            low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(w0, v));
            high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(w1, v));
        }
    }
    for (int r = 0; r < kRows; ++r) {
        sums[r][0] = (i32x8)low[r];
        sums[r][1] = (i32x8)high[r];
    }
#else
    for (int r = 0; r < kRows; ++r, x += kGroup)
        for (int half = 0; half < 2; ++half) {
            i32x8 sum = {};
            for (int pair = 0; pair < kGroup / 2; ++pair)
                for (int c = 0; c < 8; ++c) {
                    const unsigned char* two = w + 32 * pair + 16 * half + 2 * c;
                    sum[c] += (int8_t)two[0] * x[2 * pair] + (int8_t)two[1] * x[2 * pair + 1];
                }
            sums[r][half] = sum;
        }
#endif
}

template <int kRows>
static inline void group_int8(const unsigned char* group, const int16_t* x, const float* scales, float* out) {
    i32x8 sums[kRows][2];
    dot_int8<kRows>(group + 2 * kPanel, x, sums);
    for (int half = 0; half < 2; ++half) {
        const f32x8 scale = load_half(group + 16 * half);
        for (int r = 0; r < kRows; ++r) {
            float* acc = out + r * kPanel + 8 * half;
            store(acc, fma8(to_float(sums[r][half]), scale * splat(scales[r]), load(acc)));
        }
    }
}

static void tile_int8(const unsigned char* panel, int num_groups, const int16_t* x, const float* scales, int rows,
                      float* out) {
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int g = 0; g < num_groups; ++g, panel += 2 * kPanel + kGroup * kPanel) {
        int r = 0;
        for (; r + 4 <= rows; r += 4, x += 4 * kGroup, scales += 4)
            group_int8<4>(panel, x, scales, out + r * kPanel);
        for (; r < rows; ++r, x += kGroup, ++scales) group_int8<1>(panel, x, scales, out + r * kPanel);
    }
}

// ---- 4 bits ---------------------------------------------------------------------------------------

#ifdef SCONE_AVX2
// 16 columns (two halves) x 32 inputs, unpacked: vector j holds inputs 4j .. 4j + 3 of 8 columns.
struct Nibbles {
    __m256i v[2][8];
};

static inline void unpack(const unsigned char* w, Nibbles& n) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 4; ++j) {
            const __m256i both = _mm256_load_si256((const __m256i*)(w + 64 * j + 32 * half));
            n.v[half][j] = _mm256_and_si256(both, mask);
            n.v[half][j + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        }
}

// Sums of four products of at most 15 * 127 fit 16 bits eight times over: 8 * 2 * 15 * 127 = 30480.
template <int kRows>
static inline void dot_int4(const Nibbles& n, const int8_t* x, i32x8 (*sums)[2]) {
    __m256i low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        const __m256i w0 = n.v[0][j], w1 = n.v[1][j];
        for (int r = 0; r < kRows; ++r) {
            int32_t four;
            __builtin_memcpy(&four, x + r * kGroup + 4 * j, 4);
            const __m256i v = _mm256_set1_epi32(four);
            const __m256i a = _mm256_maddubs_epi16(w0, v), b = _mm256_maddubs_epi16(w1, v);
            low[r] = j == 0 ? a : _mm256_add_epi16(low[r], a);
            high[r] = j == 0 ? b : _mm256_add_epi16(high[r], b);
            // Left alone, the compiler adds up in a tree, for which there are not enough registers.
            asm("" : "+x"(low[r]), "+x"(high[r]));
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < kRows; ++r) {
        sums[r][0] = (i32x8)_mm256_madd_epi16(low[r], ones);
        sums[r][1] = (i32x8)_mm256_madd_epi16(high[r], ones);
    }
}
#else
struct Nibbles {
    const unsigned char* w;
};

static inline void unpack(const unsigned char* w, Nibbles& n) { n.w = w; }

template <int kRows>
static inline void dot_int4(const Nibbles& n, const int8_t* x, i32x8 (*sums)[2]) {
    for (int r = 0; r < kRows; ++r, x += kGroup)
        for (int half = 0; half < 2; ++half) {
            i32x8 sum = {};
            for (int j = 0; j < 4; ++j)
                for (int c = 0; c < 8; ++c)
                    for (int i = 0; i < 4; ++i) {
                        const int both = n.w[64 * j + 32 * half + 4 * c + i];
                        sum[c] += (both & 15) * x[4 * j + i] + (both >> 4) * x[16 + 4 * j + i];
                    }
            sums[r][half] = sum;
        }
}
#endif

template <int kRows>
static inline void group_int4(const unsigned char* group, const Nibbles& n, const int8_t* x, const float* scales,
                              const float* input_sums, float* out) {
    i32x8 sums[kRows][2];
    dot_int4<kRows>(n, x, sums);
    for (int half = 0; half < 2; ++half) {
        const f32x8 scale = load_half(group + 16 * half), minimum = load_half(group + 2 * kPanel + 16 * half);
        for (int r = 0; r < kRows; ++r) {
            float* acc = out + r * kPanel + 8 * half;
            const f32x8 low = fma8(minimum, splat(input_sums[r]), load(acc));
            store(acc, fma8(to_float(sums[r][half]), scale * splat(scales[r]), low));
        }
    }
}

static void tile_int4(const unsigned char* panel, int num_groups, const int8_t* x, const float* scales,
                      const float* sums, int rows, float* out) {
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int g = 0; g < num_groups; ++g, panel += 4 * kPanel + kGroup * kPanel / 2) {
        Nibbles n;
        unpack(panel + 4 * kPanel, n);
        int r = 0;
        for (; r + 4 <= rows; r += 4, x += 4 * kGroup, scales += 4, sums += 4)
            group_int4<4>(panel, n, x, scales, sums, out + r * kPanel);
        for (; r < rows; ++r, x += kGroup, ++scales, ++sums)
            group_int4<1>(panel, n, x, scales, sums, out + r * kPanel);
    }
}
