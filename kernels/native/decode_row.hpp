// From the stored bytes of one row to numbers: raw, int8, int4 and fp8 rows into float32, bfloat16 or float16.
//
// Layouts are those of model_store/FORMAT.md, "Row codecs". Every conversion rounds to nearest, ties to even, by
// integer arithmetic, so that the result is the same on every processor and equal to the torch oracle.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scone {

enum class FloatType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Codec : int { raw = 0, int8 = 1, int4 = 2, fp8 = 3 };

struct RowFormat {
    Codec codec;
    FloatType dtype;  // what the row's values are rounded to
    int64_t dim;
};

constexpr int64_t kGroup = 32;  // values that share one scale in int4 and fp8 rows

size_t float_bytes(FloatType type);
// Bytes of one stored row.
size_t stored_row_bytes(const RowFormat& format);
// Decodes `row` (any alignment) to `out` (aligned to its type).
void decode_row(const RowFormat& format, const uint8_t* row, void* out, FloatType out_type);

}  // namespace scone
