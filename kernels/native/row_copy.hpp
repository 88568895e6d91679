// Copies of rows that ask for the next rows meanwhile.
//
// Rows lie anywhere in memory, so that no hardware foresees where the next one begins: with each line that is
// copied, one of a row further on is asked for, into the second-level cache, where far more can be on their way
// than in the first. Outputs that no cache can hold are written past the caches: an ordinary store first reads
// the line that it will overwrite, a third of the traffic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scone {

constexpr size_t kLineBytes = 64;
constexpr size_t kStreamAlign = 32;

// Copies `size` bytes and asks for as many at `next`, unless that is null.
using RowCopy = void (*)(uint8_t* to, const uint8_t* from, size_t size, const uint8_t* next);

struct RowCopies {
    RowCopy cached;
    RowCopy streaming;  // `to` and `size` must be multiples of kStreamAlign; others see it after stream_fence()
};

// The fastest ones that this processor runs.
const RowCopies& row_copies();

void stream_fence();

// Asks for one line.
inline void ask_for_line(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

}  // namespace scone
