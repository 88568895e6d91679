#include "decode_row.hpp"

#include <algorithm>
#include <array>
#include <cstring>

// One binary for all hosts: the loader picks the widest clone that the processor runs.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define SCONE_WIDEST __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define SCONE_WIDEST
#endif

namespace scone {

constexpr int64_t kChunk = 256;  // values converted at a time, through a buffer that stays in L1

static inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

static inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // NaN must not round to infinity
}

static inline float from_float16(uint16_t h) {
    uint32_t magnitude = uint32_t(h & 0x7FFF) << 13;
    uint32_t exponent = magnitude & 0x0F800000;
    uint32_t normal = magnitude + ((127 - 15) << 23);
    uint32_t special = normal + ((128 - 16) << 23);  // infinity and NaN
    uint32_t subnormal = bits_of(float_of(normal + (1 << 23)) - float_of(113 << 23));
    uint32_t u = exponent == 0x0F800000 ? special : exponent == 0 ? subnormal : normal;
    return float_of(u | uint32_t(h & 0x8000) << 16);
}

static inline uint16_t to_float16(float x) {
    uint32_t u = bits_of(x);
    uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7FFFFFFF;
    uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    // adding 0.5 aligns the ten bits of a subnormal half at the bottom; the FPU rounds to even
    uint32_t subnormal = bits_of(float_of(magnitude) + float_of(126 << 23)) - (126u << 23);
    uint32_t odd = (magnitude >> 13) & 1;
    uint32_t normal = (magnitude - ((127u - 15) << 23) + 0xFFF + odd) >> 13;
    uint32_t half = magnitude >= (127u + 16) << 23 ? special : magnitude < 113u << 23 ? subnormal : normal;
    return uint16_t(half | sign);
}

static float from_fp8(uint8_t b) {
    int exponent = (b >> 3) & 15, mantissa = b & 7;
    float magnitude;
    if (exponent == 15 && mantissa == 7) {
        magnitude = float_of(0x7FC00000);
    } else if (exponent == 0) {
        magnitude = float(mantissa) * float_of((127 - 9) << 23);
    } else {
        magnitude = float_of(uint32_t(exponent - 7 + 127) << 23 | uint32_t(mantissa) << 20);
    }
    return b & 0x80 ? -magnitude : magnitude;
}

// e8m0: a power of two by its exponent alone; 255 is NaN, and 0 a subnormal of float32.
static inline float from_e8m0(uint8_t b) {
    return float_of(b == 0 ? 0x00400000u : b == 255 ? 0x7FC00000u : uint32_t(b) << 23);
}

static const std::array<float, 256> kFp8Values = [] {
    std::array<float, 256> values{};
    for (int b = 0; b < 256; b++) values[size_t(b)] = from_fp8(uint8_t(b));
    return values;
}();

static inline uint16_t load16(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return v;
}

static inline float load_float(const uint8_t* p) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
}

SCONE_WIDEST static void widen_bfloat16(const uint8_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = float_of(uint32_t(load16(from + 2 * i)) << 16);
}

SCONE_WIDEST static void widen_float16(const uint8_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from_float16(load16(from + 2 * i));
}

SCONE_WIDEST static void widen_int8(const uint8_t* from, float scale, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = float(int8_t(from[i])) * scale;
}

static void widen_fp8(const uint8_t* from, float scale, float* to) {
    for (int64_t i = 0; i < kGroup; i++) to[i] = kFp8Values[from[i]] * scale;
}

// One group: byte i holds value i in its low half and value i + 16 in its high half, each offset by 8.
SCONE_WIDEST static void widen_int4(const uint8_t* from, float scale, float* to) {
    constexpr int64_t half = kGroup / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = float(int(from[i] & 15) - 8) * scale;
        to[i + half] = float(int(from[i] >> 4) - 8) * scale;
    }
}

SCONE_WIDEST static void narrow_bfloat16(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_bfloat16(from[i]);
}

SCONE_WIDEST static void narrow_float16(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float16(from[i]);
}

SCONE_WIDEST static void round_bfloat16(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = float_of(uint32_t(to_bfloat16(x[i])) << 16);
}

SCONE_WIDEST static void round_float16(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = from_float16(to_float16(x[i]));
}

size_t float_bytes(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

size_t stored_row_bytes(const RowFormat& format) {
    size_t dim = size_t(format.dim);
    switch (format.codec) {
        case Codec::raw: return dim * float_bytes(format.dtype);
        case Codec::int4: return dim / kGroup * 2 + dim / 2;
        case Codec::fp8: return dim / kGroup + dim;
        default: return 4 + dim;
    }
}

// Values [begin, begin + n) of the row as float32.
static void widen(const RowFormat& format, const uint8_t* row, int64_t begin, int64_t n, float* to) {
    switch (format.codec) {
        case Codec::raw:
            if (format.dtype == FloatType::float32) std::memcpy(to, row + 4 * begin, size_t(4 * n));
            if (format.dtype == FloatType::bfloat16) widen_bfloat16(row + 2 * begin, to, n);
            if (format.dtype == FloatType::float16) widen_float16(row + 2 * begin, to, n);
            return;
        case Codec::int8: return widen_int8(row + 4 + begin, load_float(row), to, n);
        case Codec::int4: {
            const uint8_t* halves = row + format.dim / kGroup * 2;
            for (int64_t g = begin / kGroup; g < (begin + n) / kGroup; g++, to += kGroup)
                widen_int4(halves + g * (kGroup / 2), from_float16(load16(row + 2 * g)), to);
            return;
        }
        case Codec::fp8: {
            const uint8_t* values = row + format.dim / kGroup;
            for (int64_t g = begin / kGroup; g < (begin + n) / kGroup; g++, to += kGroup)
                widen_fp8(values + g * kGroup, from_e8m0(row[g]), to);
        }
    }
}

void decode_row(const RowFormat& format, const uint8_t* row, void* out, FloatType out_type) {
    if (format.codec == Codec::raw && format.dtype == out_type) {
        std::memcpy(out, row, stored_row_bytes(format));
        return;
    }
    float chunk[kChunk];
    for (int64_t begin = 0; begin < format.dim; begin += kChunk) {
        int64_t n = std::min(kChunk, format.dim - begin);
        widen(format, row, begin, n, chunk);
        // The row's values are those of the table's dtype, whatever the caller wants them in.
        if (format.codec != Codec::raw && format.dtype != out_type) {
            if (format.dtype == FloatType::bfloat16) round_bfloat16(chunk, n);
            if (format.dtype == FloatType::float16) round_float16(chunk, n);
        }
        if (out_type == FloatType::float32) std::memcpy(static_cast<float*>(out) + begin, chunk, size_t(4 * n));
        if (out_type == FloatType::bfloat16) narrow_bfloat16(chunk, static_cast<uint16_t*>(out) + begin, n);
        if (out_type == FloatType::float16) narrow_float16(chunk, static_cast<uint16_t*>(out) + begin, n);
    }
}

}  // namespace scone
