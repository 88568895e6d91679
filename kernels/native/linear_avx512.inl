// Tiles of a linear map for AVX-512 with VNNI: a panel's 16 columns are one vector, and the sums of a strip of
// rows stay in registers over all inputs. Integer sums are exact, and every float operation is that of
// linear_kernels.inl in its order: the results are the same bits as AVX2's.

static inline __m512 load_halves(const unsigned char* p) {
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)p));
}

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

// Runs body(input, 16 weights) for the inputs of a group, front to back. The products with scales are exact,
// so that these are the weights that linear_kernels.inl expands.
template <WeightKind kKind, class Body>
static inline void each_input(const unsigned char* group, const Body& body) {
    if constexpr (kKind == WeightKind::f32) {
#pragma GCC unroll 32
        for (int i = 0; i < kGroup; ++i) body(i, _mm512_load_ps((const float*)group + i * kPanel));
    } else if constexpr (kKind == WeightKind::bf16) {
        const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; i += 2) {
            const __m512i pair = _mm512_load_si512(group + 2 * i * kPanel);
            body(i, _mm512_castsi512_ps(_mm512_and_si512(pair, upper)));
            body(i + 1, _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)));
        }
    } else if constexpr (kKind == WeightKind::int8) {
        const __m512 scale = load_halves(group);
        group += 2 * kPanel;
#pragma GCC unroll 16
        for (int i = 0; i < kGroup; i += 2) {
            const __m512i pair = _mm512_cvtepi16_epi32(_mm256_load_si256((const __m256i*)(group + i * kPanel)));
            const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(pair, 24), 24);
            body(i, _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale));
            body(i + 1, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 8)), scale));
        }
    } else {
        const __m512 scale = load_halves(group), minimum = load_halves(group + 2 * kPanel);
        const __m512i mask = _mm512_set1_epi32(15);
        __m512i both[4];
        for (int j = 0; j < 4; ++j) both[j] = _mm512_load_si512(group + 4 * kPanel + 64 * j);
#pragma GCC unroll 32
        for (int i = 0; i < kGroup; ++i) {
            const int shift = i % 4 * 8 + i / 16 * 4;
            const __m512i level = _mm512_and_si512(_mm512_srli_epi32(both[i / 4 % 4], shift), mask);
            body(i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(level), scale, minimum));
        }
    }
}

// out (kRows, 16) = x (inputs, kRows) times whole groups of packed weights: for few rows, where expanding
// first would take longer than multiplying.
template <WeightKind kKind, int kRows>
static void multiply_packed(const unsigned char* group, int num_groups, const float* x, float* out) {
    __m512 sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; ++g, group += group_bytes(kKind), x += kGroup * kRows)
        each_input<kKind>(group, [&](int i, __m512 w) {
            for (int r = 0; r < kRows; ++r)
                sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[i * kRows + r]), w, sums[r]);
        });
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * kPanel, sums[r]);
}

template <WeightKind kKind>
static void tile_packed(const unsigned char* panel, int num_groups, const float* x, int rows, float* out) {
    int r = 0;
    for (; r + kStrip <= rows; r += kStrip)
        multiply_packed<kKind, kStrip>(panel, num_groups, x + (size_t)r * num_groups * kGroup, out + r * kPanel);
    for_rest(rows - r, [&](auto n) {
        multiply_packed<kKind, n.value>(panel, num_groups, x + (size_t)r * num_groups * kGroup, out + r * kPanel);
    });
}

template <WeightKind kKind>
static void tile_expanded(const unsigned char* panel, int num_inputs, const float* x, int rows, float* out) {
    alignas(64) float expanded[kInputsPerPass * kPanel];
    for (int r = 0; r < rows; ++r) _mm512_storeu_ps(out + r * kPanel, _mm512_setzero_ps());
    for (int first = 0; first < num_inputs; first += kInputsPerPass) {
        const int count = num_inputs - first < kInputsPerPass ? num_inputs - first : kInputsPerPass;
        const unsigned char* group = panel + (size_t)(first / kGroup) * group_bytes(kKind);
        const float* w = (const float*)group;
        if constexpr (kKind != WeightKind::f32) {
            w = expanded;
            for (int k = 0; k < count; k += kGroup, group += group_bytes(kKind))
                each_input<kKind>(group, [&](int i, __m512 v) { _mm512_store_ps(expanded + (k + i) * kPanel, v); });
        }
        const size_t stride = (size_t)kStrip * num_inputs;
        const float* part = x + (size_t)first * kStrip;
        int r = 0;
        for (; r + 2 * kStrip <= rows; r += 2 * kStrip, part += 2 * stride)
            multiply_f32<2, kStrip>(w, count, part, stride, out + r * kPanel);
        for (; r + kStrip <= rows; r += kStrip, part += stride)
            multiply_f32<1, kStrip>(w, count, part, 0, out + r * kPanel);
        part = x + (size_t)r * num_inputs + first * (rows - r);
        for_rest(rows - r, [&](auto n) { multiply_f32<1, n.value>(w, count, part, 0, out + r * kPanel); });
    }
}

template <WeightKind kKind>
static void tile_f32(const unsigned char* panel, int num_inputs, const float* x, int rows, float* out) {
    if (rows <= 2 * kStrip && num_inputs % kGroup == 0)
        tile_packed<kKind>(panel, num_inputs / kGroup, x, rows, out);
    else
        tile_expanded<kKind>(panel, num_inputs, x, rows, out);
}

static void tile_f32(WeightKind kind, const unsigned char* panel, int num_inputs, const float* x, int rows,
                     float* out) {
    switch (kind) {
        case WeightKind::f32: tile_f32<WeightKind::f32>(panel, num_inputs, x, rows, out); break;
        case WeightKind::bf16: tile_f32<WeightKind::bf16>(panel, num_inputs, x, rows, out); break;
        case WeightKind::int8: tile_f32<WeightKind::int8>(panel, num_inputs, x, rows, out); break;
        case WeightKind::int4: tile_f32<WeightKind::int4>(panel, num_inputs, x, rows, out); break;
    }
}

// ---- integers -------------------------------------------------------------------------------------

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

// int8 weights times int8 inputs, and the bounds that DecoderKernels::screen is asked for.
template <int kRows>
static void screen_rows(const unsigned char* group, int num_groups, const int8_t* x, const float* scales,
                        const int32_t* offsets, int rows, __mmask16 columns, __m512 norms, const float* slack,
                        float* high, float* low) {
    // Two pairs of inputs, 16 columns each, become four inputs of each column.
    alignas(64) static const int16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kOrder), flip = _mm512_set1_epi8(-128);
    __m512 totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; ++g, x += rows * kGroup, scales += rows, offsets += rows) {
        const __m512 scale = load_halves(group);
        group += 2 * kPanel;
        __m512i dot[kRows];
        for (int r = 0; r < kRows; ++r) dot[r] = _mm512_set1_epi32(offsets[r]);
#pragma GCC unroll 8
        for (int j = 0; j < kGroup / 4; ++j, group += 4 * kPanel) {
            const __m512i w = _mm512_xor_si512(_mm512_permutexvar_epi16(order, _mm512_loadu_si512(group)), flip);
            for (int r = 0; r < kRows; ++r)
                dot[r] = _mm512_dpbusd_epi32(dot[r], w, splat_inputs(x + r * kGroup + 4 * j));
        }
        for (int r = 0; r < kRows; ++r) totals[r] = add_scaled(dot[r], scale, scales[r], totals[r]);
    }
    for (int r = 0; r < kRows; ++r) {
        const __m512 spread = _mm512_mul_ps(norms, _mm512_set1_ps(slack[r]));
        high[r] = _mm512_mask_reduce_max_ps(columns, _mm512_add_ps(totals[r], spread));
        const float least = _mm512_mask_reduce_max_ps(columns, _mm512_sub_ps(totals[r], spread));
        if (least > low[r]) low[r] = least;
    }
}

static void screen(const PackedWeights& w, int panel, const Activations& inputs, const int32_t* offsets, int first_row,
                   int rows, const float* norms, const float* slack, float* high, float* low) {
    const unsigned char* data = w.data + (size_t)panel * w.panel_bytes;
    const size_t at = (size_t)first_row * w.num_groups;
    const int num_columns = w.num_outputs - panel * kPanel;
    const __mmask16 columns = num_columns < kPanel ? (__mmask16)((1 << num_columns) - 1) : (__mmask16)0xffff;
    int r = 0;
    const auto strip = [&](auto function, int count) {
        const int row = first_row + r;
        function(data, w.num_groups, (const int8_t*)inputs.values + (at + r) * kGroup, inputs.scales + at + r,
                 offsets + at + r, rows, columns, _mm512_loadu_ps(norms), slack + row, high + row, low + row);
        r += count;
    };
    while (r + 12 <= rows) strip(screen_rows<12>, 12);
    while (r + 4 <= rows) strip(screen_rows<4>, 4);
    while (r < rows) strip(screen_rows<1>, 1);
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
        __m512i dot[kRows];
        for (int r = 0; r < kRows; ++r) dot[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, group += 4 * kPanel) {
            const __m512i both = _mm512_load_si512(group);
            const __m512i low = _mm512_and_si512(both, mask);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            for (int r = 0; r < kRows; ++r) {
                dot[r] = _mm512_dpbusd_epi32(dot[r], low, splat_inputs(x + r * kGroup + 4 * j));
                dot[r] = _mm512_dpbusd_epi32(dot[r], high, splat_inputs(x + r * kGroup + 4 * j + 16));
            }
        }
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
    while (r + 12 <= rows) strip(multiply_int4<12>, 12);
    while (r + 8 <= rows) strip(multiply_int4<8>, 8);
    while (r + 4 <= rows) strip(multiply_int4<4>, 4);
    while (r < rows) strip(multiply_int4<1>, 1);
}
