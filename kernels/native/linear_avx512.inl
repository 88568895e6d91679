// Tiles of a linear map for AVX-512 with VNNI: a panel's 16 columns are one vector, and the sums of a strip of
// rows stay in registers over all inputs. Integer sums are exact, and every float operation is that of
// linear_kernels.inl in its order: the results are the same bits as AVX2's.

// ---- float32 --------------------------------------------------------------------------------------

// Inputs per pass over a panel: with them, the panel's part stays in the first-level cache for all rows.
constexpr int kInputsPerPass = 256;

// out (kStrips * kRows, 16) += x (strips of count inputs, kRows, `stride` floats apart) times w (count, 16)
template <int kStrips, int kRows>
static void multiply_f32(const float* w, int count, const float* x, size_t stride, float* out) {
    __m512 sums[kStrips * kRows];
    for (int r = 0; r < kStrips * kRows; ++r) sums[r] = _mm512_loadu_ps(out + r * kPanel);
    for (int k = 0; k < count; ++k, w += kPanel, x += kRows) {
        const __m512 v = _mm512_load_ps(w);
        for (int r = 0; r < kStrips * kRows; ++r)
            sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r / kRows * stride + r % kRows]), v, sums[r]);
    }
    for (int r = 0; r < kStrips * kRows; ++r) _mm512_storeu_ps(out + r * kPanel, sums[r]);
}

static void tile_f32(const unsigned char* panel, int num_inputs, const float* x, int rows, float* out) {
    for (int r = 0; r < rows; ++r) _mm512_storeu_ps(out + r * kPanel, _mm512_setzero_ps());
    for (int first = 0; first < num_inputs; first += kInputsPerPass) {
        const int count = num_inputs - first < kInputsPerPass ? num_inputs - first : kInputsPerPass;
        const float* w = (const float*)panel + (size_t)first * kPanel;
        const size_t stride = (size_t)kStrip * num_inputs;
        const float* part = x + (size_t)first * kStrip;
        int r = 0;
        for (; r + 2 * kStrip <= rows; r += 2 * kStrip, part += 2 * stride)
            multiply_f32<2, kStrip>(w, count, part, stride, out + r * kPanel);
        for (; r + kStrip <= rows; r += kStrip, part += stride)
            multiply_f32<1, kStrip>(w, count, part, 0, out + r * kPanel);
        part = x + (size_t)r * num_inputs + first * (rows - r);
        float* target = out + r * kPanel;
        switch (rows - r) {
            case 5: multiply_f32<1, 5>(w, count, part, 0, target); break;
            case 4: multiply_f32<1, 4>(w, count, part, 0, target); break;
            case 3: multiply_f32<1, 3>(w, count, part, 0, target); break;
            case 2: multiply_f32<1, 2>(w, count, part, 0, target); break;
            case 1: multiply_f32<1, 1>(w, count, part, 0, target); break;
            default: break;
        }
    }
}

// ---- integers -------------------------------------------------------------------------------------

static inline __m512 load_halves(const unsigned char* p) {
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)p));
}

// Two 16-bit or four 8-bit inputs for all columns.
static inline __m512i splat_inputs(const void* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
}

// total + dot * scale * input scale
static inline __m512 add_scaled(__m512i dot, __m512 scale, float input_scale, __m512 total) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(input_scale)), total);
}

// int8 weights times int16 inputs; exact in 32 bits, since 127 * 32767 * 32 < 2^31. `rows` is the number
// of rows that a group's inputs lie apart.
template <int kRows>
static void multiply_int8(const unsigned char* group, int num_groups, const int16_t* x, const float* scales,
                          int rows, float* out) {
    __m512 totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; ++g, x += rows * kGroup, scales += rows) {
        const __m512 scale = load_halves(group);
        group += 2 * kPanel;
        __m512i dot[kRows];
        for (int r = 0; r < kRows; ++r) dot[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int pair = 0; pair < kGroup / 2; ++pair, group += 2 * kPanel) {
            const __m512i w = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)group));
            for (int r = 0; r < kRows; ++r)
                dot[r] = _mm512_dpwssd_epi32(dot[r], w, splat_inputs(x + r * kGroup + 2 * pair));
        }
        for (int r = 0; r < kRows; ++r) totals[r] = add_scaled(dot[r], scale, scales[r], totals[r]);
    }
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kPanel, totals[r]);
}

static void tile_int8(const unsigned char* panel, int num_groups, const int16_t* x, const float* scales, int rows,
                      float* out) {
    int r = 0;
    const auto strip = [&](auto function, int count) {
        function(panel, num_groups, x + r * kGroup, scales + r, rows, out + r * kPanel);
        r += count;
    };
    while (r + 12 <= rows) strip(multiply_int8<12>, 12);
    while (r + 4 <= rows) strip(multiply_int8<4>, 4);
    while (r < rows) strip(multiply_int8<1>, 1);
}

// 4-bit weights times int8 inputs.
template <int kRows>
static void multiply_int4(const unsigned char* group, int num_groups, const int8_t* x, const float* scales,
                          const float* sums, int rows, float* out) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; ++g, x += rows * kGroup, scales += rows, sums += rows) {
        const __m512 scale = load_halves(group), minimum = load_halves(group + 2 * kPanel);
        group += 4 * kPanel;
        __m512i w[8];
        for (int j = 0; j < 4; ++j, group += 4 * kPanel) {
            const __m512i both = _mm512_load_si512(group);
            w[j] = _mm512_and_si512(both, mask);
            w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        }
        __m512i dot[kRows];
        for (int r = 0; r < kRows; ++r) dot[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            for (int r = 0; r < kRows; ++r)
                dot[r] = _mm512_dpbusd_epi32(dot[r], w[j], splat_inputs(x + r * kGroup + 4 * j));
        for (int r = 0; r < kRows; ++r) {
            totals[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[r]), totals[r]);
            totals[r] = add_scaled(dot[r], scale, scales[r], totals[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kPanel, totals[r]);
}

static void tile_int4(const unsigned char* panel, int num_groups, const int8_t* x, const float* scales,
                      const float* sums, int rows, float* out) {
    int r = 0;
    const auto strip = [&](auto function, int count) {
        function(panel, num_groups, x + r * kGroup, scales + r, sums + r, rows, out + r * kPanel);
        r += count;
    };
    while (r + 8 <= rows) strip(multiply_int4<8>, 8);
    while (r + 4 <= rows) strip(multiply_int4<4>, 4);
    while (r < rows) strip(multiply_int4<1>, 1);
}
