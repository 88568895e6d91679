// Floats of which only the upper halves are held.
#pragma once

#include <cstdint>
#include <cstring>

namespace scone {

enum class bfloat16 : uint16_t {};

// Rounded to nearest even; a NaN does not become an infinity. Branchless, so that compilers vectorise it.
inline bfloat16 bfloat16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u), nan = bits | 0x400000u;
    return bfloat16((value == value ? rounded : nan) >> 16);
}

}  // namespace scone
