// Vectors of 8 lanes, on which the decoder's inner loops are written once. Included by one file per
// instruction set, which defines SCONE_AVX2 or not; without it the compiler maps the vectors to what the
// target has.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef int8_t i8x8 __attribute__((vector_size(8)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// body(Constant<count>) for a count below kBelow that is known only now.
template <int kBelow = kStrip, class Body>
static inline void for_rest(int count, const Body& body) {
    if constexpr (kBelow > 1) {
        if (count == kBelow - 1)
            body(Constant<kBelow - 1>());
        else
            for_rest<kBelow - 1>(count, body);
    }
}

// body(row, Constant<rows of a strip>, Constant<rows of the next>) for `rows` rows, two strips at a time: their sums
// fill the registers of AVX-512, and each load of weights serves them all.
template <class Body>
static inline void each_two_strips(int rows, const Body& body) {
    int r = 0;
    for (; r + 2 * kStrip <= rows; r += 2 * kStrip) body(r, Constant<kStrip>(), Constant<kStrip>());
    if (r + kStrip <= rows) {
        if (r + kStrip == rows) return body(r, Constant<kStrip>(), Constant<0>());
        for_rest(rows - r - kStrip, [&](auto n) { body(r, Constant<kStrip>(), n); });
    } else {
        for_rest(rows - r, [&](auto n) { body(r, n, Constant<0>()); });
    }
}

// The widest vectors that the instruction set multiplies.
#ifdef SCONE_AVX512
typedef float wide __attribute__((vector_size(64)));
#else
typedef f32x8 wide;
#endif

template <class Vector>
constexpr int lanes = sizeof(Vector) / sizeof(float);

// As many 16-bit lanes.
template <class Vector>
struct Halves {
    typedef u16x8 type;
};
#ifdef SCONE_AVX512
template <>
struct Halves<wide> {
    typedef u16x16 type;
};
#endif

template <class Vector = f32x8>
static inline Vector load(const float* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// As floats.
static inline f32x8 expand(u16x8 halves) {
#ifdef SCONE_AVX2
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)halves), 16);
#else
    return (f32x8)(__builtin_convertvector(halves, u32x8) << 16);
#endif
}

#ifdef SCONE_AVX512
static inline wide expand(u16x16 halves) {
    return (wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
}
#endif

template <class Vector = f32x8>
static inline Vector load(const bfloat16* p) {
    typename Halves<Vector>::type v;
    __builtin_memcpy(&v, p, sizeof v);
    return expand(v);
}

static inline float load1(const float* p) { return *p; }
static inline float load1(const bfloat16* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

template <class Vector>
static inline void store(float* p, Vector v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class Vector = f32x8>
static inline Vector splat(float x) {
    return x - Vector{};  // not Vector{} + x: -0 would become 0
}

static inline f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
#ifdef SCONE_AVX2
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return fma8(a, b, c); }

#ifdef SCONE_AVX512
static inline wide fma(wide a, wide b, wide c) {
    return (wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

// How a * b + c is rounded: once, where the instruction set can, or twice, everywhere.
struct Fused {
    static inline f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) { return fma(a, b, c); }
};
struct Unfused {
    static inline f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
};

static inline f32x8 max8(f32x8 a, f32x8 b) { return a > b ? a : b; }

// Lane i becomes lane i ^ kDistance.
template <int kDistance, class Vector>
static inline Vector swap_lanes(Vector v) {
    constexpr int d = kDistance;
#if defined(__clang__)
    return __builtin_shufflevector(v, v, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d);
#else
    return __builtin_shuffle(v, i32x8{0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d});
#endif
}

static inline float sum8(f32x8 v) {
    v = v + swap_lanes<4>(v);
    v = v + swap_lanes<2>(v);
    return v[0] + v[1];
}

static inline float max_of(f32x8 v) {
    v = max8(v, swap_lanes<4>(v));
    v = max8(v, swap_lanes<2>(v));
    return v[0] > v[1] ? v[0] : v[1];
}

static inline f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }

// e^x by range reduction and a degree-5 polynomial (the coefficients of Cephes' expf); relative error
// below 2e-7, zero below -87.3; NaN stays NaN.
template <class Rounding = Fused>
static inline f32x8 exp8(f32x8 x) {
    const f32x8 is_small = (f32x8)(x < splat(-87.3f));
    const f32x8 bounded = x < splat(-87.3f) ? splat(-87.3f) : (x > splat(88.3f) ? splat(88.3f) : x);
    const f32x8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32x8 n = (bounded * splat(1.44269504088896341f) + magic) - magic;
    f32x8 r = Rounding::multiply_add(n, splat(-0.693359375f), bounded);
    r = Rounding::multiply_add(n, splat(2.12194440e-4f), r);
    f32x8 p = splat(1.9875691500e-4f);
    p = Rounding::multiply_add(p, r, splat(1.3981999507e-3f));
    p = Rounding::multiply_add(p, r, splat(8.3334519073e-3f));
    p = Rounding::multiply_add(p, r, splat(4.1665795894e-2f));
    p = Rounding::multiply_add(p, r, splat(1.6666665459e-1f));
    p = Rounding::multiply_add(p, r, splat(5.0000001201e-1f));
    p = Rounding::multiply_add(p, r * r, r + splat(1.0f));
    const i32x8 exponent = __builtin_convertvector(n, i32x8);
    const f32x8 power = (f32x8)((exponent + 127) << 23);
    const f32x8 value = p * power;
    return (f32x8)((i32x8)value & ~(i32x8)is_small);
}

// Eight 16-bit integers, with their signs.
static inline i32x8 widen(const unsigned char* p) {
    i16x8 v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, i32x8);
}

// Rounded to nearest even to the upper half of a float; a NaN does not become an infinity.
static inline float to_bfloat16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
    bits &= 0xffff0000u;
    __builtin_memcpy(&x, &bits, 4);
    return x;
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
