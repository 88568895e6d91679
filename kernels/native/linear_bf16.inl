// A linear map of bfloat16 weights and inputs for AVX512_BF16. vdpbf16ps takes two inputs of sixteen outputs at
// a time: a product is exact in float32, each of the two sums is rounded to nearest even, that of the upper halves
// first, and denormal numbers are zero on the way in and out. With the earlier input in the upper half these are
// the sums that linear_kernels.inl makes of rounded inputs where denormals are flushed: the same bits.

// Pairs of inputs per pass over a panel: with them, the panel's part stays in the first-level cache for all rows.
constexpr int kPairsPerPass = 256;

// Rounded to nearest even, in the upper halves, as to_bfloat16 does.
static inline __m512i round_to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
}

// The first `count` inputs, at most 16, the others -0: adding products with that changes no sum.
static inline __m512 load_some(const float* x, int count) {
    const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1 << count) - 1);
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-0.0f), mask, x);
}

// 16 pairs of `count` inputs.
static inline __m512i load_pairs(const float* x, int count) {
    alignas(64) static const int32_t kFirst[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const __m512i first = _mm512_load_si512(kFirst), second = _mm512_or_si512(first, _mm512_set1_epi32(1));
    const __m512i low = round_to_bfloat16(load_some(x, count)), high = round_to_bfloat16(load_some(x + 16, count - 16));
    const __m512i upper = _mm512_permutex2var_epi32(low, first, high);
    const __m512i lower = _mm512_srli_epi32(_mm512_permutex2var_epi32(low, second, high), 16);
    return _mm512_or_si512(_mm512_and_si512(upper, _mm512_set1_epi32((int)0xffff0000)), lower);
}

// A strip of inputs x (count, num_inputs) as pairs: values (num_pairs, count).
static inline void interleave_pairs(const float* x, int num_inputs, int count, uint32_t* values) {
    for (int k = 0; k < num_inputs; k += 32) {
        alignas(64) uint32_t pairs[kStrip][16];
        for (int r = 0; r < count; ++r)
            _mm512_store_si512(pairs[r], load_pairs(x + (size_t)r * num_inputs + k, num_inputs - k));
        const int num_pairs = num_inputs - k < 32 ? (num_inputs - k + 1) / 2 : 16;
        for (int p = 0; p < num_pairs; ++p)
            for (int r = 0; r < count; ++r) *values++ = pairs[r][p];
    }
}

// The strip of x that begins at `first_row`: values [block][strip of 6 rows, the last one shorter][pair][row].
static void prepare_pairs(const float* x, int num_inputs, int num_rows, int first_row, uint32_t* values) {
    x += (size_t)first_row * num_inputs;
    values += (size_t)first_row * ((num_inputs + 1) / 2);
    if (num_rows - first_row >= kStrip) {
        interleave_pairs(x, num_inputs, kStrip, values);  // a constant, so that the inner loop is unrolled
    } else {
        interleave_pairs(x, num_inputs, num_rows - first_row, values);
    }
}

// out (kRows + kMore, 16) += two strips of inputs, x (count pairs, kRows) and more (count pairs, kMore), times
// w (count pairs, 16)
template <int kRows, int kMore>
static void multiply_pairs(const unsigned char* w, int count, const uint32_t* x, const uint32_t* more, float* out) {
    __m512 sums[kRows + kMore];
    for (int r = 0; r < kRows + kMore; ++r) sums[r] = _mm512_loadu_ps(out + r * kPanel);
    for (int k = 0; k < count; ++k, w += 4 * kPanel, x += kRows, more += kMore) {
        const __m512bh v = (__m512bh)_mm512_load_si512(w);
        for (int r = 0; r < kRows + kMore; ++r) {
            const __m512i both = _mm512_set1_epi32((int)(r < kRows ? x[r] : more[r - kRows]));
            sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)both, v);
        }
    }
    for (int r = 0; r < kRows + kMore; ++r) _mm512_storeu_ps(out + r * kPanel, sums[r]);
}

static void tile_pairs(const unsigned char* panel, int num_inputs, const uint32_t* x, int rows, float* out) {
    const int num_pairs = (num_inputs + 1) / 2;
    const size_t strip = (size_t)kStrip * num_pairs;
    for (int i = 0; i < rows * kPanel; ++i) out[i] = 0.0f;
    for (int first = 0; first < num_pairs; first += kPairsPerPass) {
        const int count = num_pairs - first < kPairsPerPass ? num_pairs - first : kPairsPerPass;
        const unsigned char* w = panel + (size_t)first * 4 * kPanel;
        const uint32_t* part = x + (size_t)first * kStrip;
        int r = 0;
        for (; r + 2 * kStrip <= rows; r += 2 * kStrip, part += 2 * strip)
            multiply_pairs<kStrip, kStrip>(w, count, part, part + strip, out + r * kPanel);
        if (r + kStrip == rows) {
            multiply_pairs<kStrip, 0>(w, count, part, part, out + r * kPanel);
        } else if (r + kStrip < rows) {
            const uint32_t* rest = x + (r + kStrip) * (size_t)num_pairs + (size_t)first * (rows - r - kStrip);
            for_rest(rows - r - kStrip, [&](auto n) {
                multiply_pairs<kStrip, n.value>(w, count, part, rest, out + r * kPanel);
            });
        } else {
            const uint32_t* rest = x + (size_t)r * num_pairs + (size_t)first * (rows - r);
            for_rest(rows - r, [&](auto n) { multiply_pairs<n.value, 0>(w, count, rest, rest, out + r * kPanel); });
        }
    }
}
