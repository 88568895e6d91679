// Inputs of linear maps, rounded and laid out as the tiles read them. Included after vector_math.inl, once per
// instruction set.

// The integers fit: they are at most 32767 or 127.
static inline i16x8 narrow(i32x8 v) {
#ifdef SCONE_AVX2
    return (i16x8)_mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
    return __builtin_convertvector(v, i16x8);
#endif
}

static inline void store_narrow(int16_t* p, i32x8 v) {
    const i16x8 values = narrow(v);
    __builtin_memcpy(p, &values, sizeof values);
}

static inline void store_narrow(int8_t* p, i32x8 v) {
#ifdef SCONE_AVX2
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16((__m128i)narrow(v), (__m128i)narrow(v)));
#else
    const i8x8 values = __builtin_convertvector(v, i8x8);
    __builtin_memcpy(p, &values, sizeof values);
#endif
}

// Rounds one group to integers of at most `limit`; returns scale and the integers' sum. Rounding adds and
// takes away 1.5 * 2^23, exact for halves to even below 2^22. A NaN makes the scale NaN.
template <class Integer>
static inline int round_group(const float* x, float limit, Integer* values, float* scale) {
    f32x8 most = splat(0.0f), any = splat(0.0f);
    for (int i = 0; i < kGroup; i += 8) {
        const f32x8 v = load(x + i);
        most = max8((f32x8)((i32x8)v & 0x7fffffff), most);
        any = any + v * splat(0.0f);  // NaN if any is NaN or infinite, else zero
    }
    const float largest = max_of(most);
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
    sum += swap_lanes<4>(sum);
    sum += swap_lanes<2>(sum);
    return sum[0] + sum[1];
}

template <class Rounding>
static inline void interleave(const float* x, int num_inputs, int count, float* out, const Rounding& rounding) {
    for (int k = 0; k < num_inputs; ++k)
        for (int r = 0; r < count; ++r) *out++ = rounding(x[(size_t)r * num_inputs + k]);
}

// A strip of float inputs, as they are or rounded.
template <class Rounding>
static inline void prepare_strip(const float* x, int num_inputs, int count, float* strip, const Rounding& rounding) {
    if (count == kStrip) {
        interleave(x, num_inputs, kStrip, strip, rounding);  // a constant, so that the inner loop is unrolled
    } else {
        interleave(x, num_inputs, count, strip, rounding);
    }
}

static void prepare(InputKind kind, const float* x, int num_inputs, int num_rows, int first_row,
                    const Activations& out) {
    const int count = num_rows - first_row < kStrip ? num_rows - first_row : kStrip;
    x += (size_t)first_row * num_inputs;
    float* strip = (float*)out.values + (size_t)first_row * num_inputs;
    if (kind == InputKind::f32) return prepare_strip(x, num_inputs, count, strip, [](float v) { return v; });
    if (kind == InputKind::bf16) return prepare_strip(x, num_inputs, count, strip, to_bfloat16);
    const int num_groups = (num_inputs + kGroup - 1) / kGroup;
    const int block = first_row / kRowBlock * kRowBlock;
    const int block_rows = num_rows - block < kRowBlock ? num_rows - block : kRowBlock;
    for (int g = 0; g < num_groups; ++g)
        for (int r = 0; r < count; ++r) {
            const float* group = x + (size_t)r * num_inputs + g * kGroup;
            float padded[kGroup];
            if ((g + 1) * kGroup > num_inputs) {
                for (int i = 0; i < kGroup; ++i) padded[i] = g * kGroup + i < num_inputs ? group[i] : 0.0f;
                group = padded;
            }
            const size_t at = (size_t)block * num_groups + (size_t)g * block_rows + (first_row - block + r);
            if (kind == InputKind::int16) {
                round_group(group, 32767.0f, (int16_t*)out.values + at * kGroup, out.scales + at);
            } else {
                const int sum = round_group(group, 127.0f, (int8_t*)out.values + at * kGroup, out.scales + at);
                out.sums[at] = out.scales[at] * (float)sum;
            }
        }
}
