// Copies that leave the caches alone.
//
// An ordinary store first reads the line it will overwrite. For outputs that no cache can hold, streaming stores
// save that third of the traffic. They need SSE2, which every x86-64 has; elsewhere this is memcpy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace scone {

constexpr size_t kStreamAlign = 16;

// `to` and `size` must be multiples of kStreamAlign. The data is visible to other threads after stream_fence().
inline void stream_copy(uint8_t* to, const uint8_t* from, size_t size) {
#if defined(__x86_64__)
    for (size_t i = 0; i < size; i += kStreamAlign)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
    std::memcpy(to, from, size);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace scone
