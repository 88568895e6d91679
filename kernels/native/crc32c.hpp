// CRC-32C (Castagnoli, reflected, initial and final complement), with the processor's instruction if it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scone {

// Continues `crc` (0 at the start) over `size` bytes.
uint32_t crc32c(uint32_t crc, const void* data, size_t size);

}  // namespace scone
