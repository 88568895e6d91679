#include "row_copy.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace scone {

static void copy_portable(uint8_t* to, const uint8_t* from, size_t size, const uint8_t* next) {
    size_t at = 0;
    for (; at + kLineBytes <= size; at += kLineBytes) {
        if (next != nullptr) ask_for_line(next + at);
        std::memcpy(to + at, from + at, kLineBytes);
    }
    if (at == size) return;
    if (next != nullptr) ask_for_line(next + at);
    std::memcpy(to + at, from + at, size - at);
}

#if defined(__x86_64__)

static void stream_sse2(uint8_t* to, const uint8_t* from, size_t size, const uint8_t* next) {
    for (size_t at = 0; at < size; at += 16) {
        if (next != nullptr && at % kLineBytes == 0) ask_for_line(next + at);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
    }
}

__attribute__((target("avx"))) static void copy_avx(uint8_t* to, const uint8_t* from, size_t size,
                                                    const uint8_t* next) {
    size_t at = 0;
    for (; at + kLineBytes <= size; at += kLineBytes) {
        if (next != nullptr) ask_for_line(next + at);
        for (size_t half = at; half < at + kLineBytes; half += 32)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half)));
    }
    if (at == size) return;
    if (next != nullptr) ask_for_line(next + at);
    std::memcpy(to + at, from + at, size - at);
}

__attribute__((target("avx"))) static void stream_avx(uint8_t* to, const uint8_t* from, size_t size,
                                                      const uint8_t* next) {
    for (size_t at = 0; at < size; at += 32) {
        if (next != nullptr && at % kLineBytes == 0) ask_for_line(next + at);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
    }
}

__attribute__((target("avx512f"))) static void copy_avx512(uint8_t* to, const uint8_t* from, size_t size,
                                                          const uint8_t* next) {
    size_t at = 0;
    for (; at + kLineBytes <= size; at += kLineBytes) {
        if (next != nullptr) ask_for_line(next + at);
        _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
    }
    if (at == size) return;
    if (next != nullptr) ask_for_line(next + at);
    std::memcpy(to + at, from + at, size - at);
}

// Whole lines in one store each, where the output has them.
__attribute__((target("avx512f"))) static void stream_avx512(uint8_t* to, const uint8_t* from, size_t size,
                                                            const uint8_t* next) {
    if ((uintptr_t(to) | size) % kLineBytes != 0) return stream_avx(to, from, size, next);
    for (size_t at = 0; at < size; at += kLineBytes) {
        if (next != nullptr) ask_for_line(next + at);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    }
}

static RowCopies fastest_copies() {
    if (__builtin_cpu_supports("avx512f")) return {copy_avx512, stream_avx512};
    if (__builtin_cpu_supports("avx")) return {copy_avx, stream_avx};
    return {copy_portable, stream_sse2};
}

const RowCopies& row_copies() {
    static const RowCopies copies = fastest_copies();
    return copies;
}

void stream_fence() { _mm_sfence(); }

#else

const RowCopies& row_copies() {
    static const RowCopies copies{copy_portable, copy_portable};
    return copies;
}

void stream_fence() {}

#endif

}  // namespace scone
