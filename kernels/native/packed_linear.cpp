#include "packed_linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bfloat16.hpp"

namespace scone {
namespace {

// Half precision, rounded to nearest even; done here since packing must not need special instructions.
uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const float magnitude = std::fabs(value);
    if (!(magnitude < 65520.0f)) return uint16_t(sign | 0x7c00u | (value != value ? 0x200u : 0));
    if (magnitude < 6.103515625e-5f) return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 16777216.0f)));
    uint32_t rest = (bits & 0x7fffffffu) - 0x38000000u;
    rest += 0xfffu + (rest >> 13 & 1u);
    return uint16_t(sign | rest >> 13);
}

float from_half(uint16_t h) {
    const float sign = h & 0x8000u ? -1.0f : 1.0f;
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
    return sign * std::ldexp(float(1024 + mantissa), exponent - 25);
}

// To nearest even, for |x| < 2^22: a plain sum, which compilers vectorise for any processor.
float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

struct Group {  // of one column
    float scale, minimum;
    int values[kGroup];
};

struct Range {
    float least, largest;
};

// Eight at a time, which compilers vectorise; a plain loop would wait for each comparison.
Range range_of(const float* x) {
    float least[8], largest[8];
    for (int i = 0; i < 8; ++i) least[i] = largest[i] = x[i];
    for (int k = 8; k < kGroup; k += 8) {
        for (int i = 0; i < 8; ++i) {
            least[i] = std::min(least[i], x[k + i]);
            largest[i] = std::max(largest[i], x[k + i]);
        }
    }
    return {*std::min_element(least, least + 8), *std::max_element(largest, largest + 8)};
}

// Symmetric, 127 levels each way, as ggml's Q8_0: a tensor that was stored so is kept exactly.
Group round_int8(const float* x) {
    const Range range = range_of(x);
    Group g{from_half(to_half(std::max(-range.least, range.largest) / 127.0f)), 0.0f, {}};
    if (!(g.scale > 0)) return g;
    for (int i = 0; i < kGroup; ++i)
        g.values[i] = int(rounded(std::max(-127.0f, std::min(127.0f, x[i] / g.scale))));
    return g;
}

// 16 levels from least to largest, as ggml's Q4_1: a tensor that was stored so is kept exactly.
Group round_int4(const float* x) {
    const auto [least, largest] = range_of(x);
    Group g{from_half(to_half((largest - least) / 15.0f)), from_half(to_half(least)), {}};
    if (!(g.scale > 0)) return g;
    for (int i = 0; i < kGroup; ++i)
        g.values[i] = int(rounded(std::max(0.0f, std::min(15.0f, (x[i] - g.minimum) / g.scale))));
    return g;
}

// Where in a group of bf16 weights an input of a column lies.
size_t bf16_place(int input, int column) { return 4 * (input / 2 * kPanel + column) + 2 * (1 - input % 2); }

// One column's group into its places; whether each value is kept.
bool pack_group(WeightKind kind, const float* x, int column, unsigned char* group) {
    bool kept = true;
    if (kind == WeightKind::f32) {
        for (int i = 0; i < kGroup; ++i) std::memcpy(group + 4 * (i * kPanel + column), x + i, 4);
    } else if (kind == WeightKind::bf16) {
        for (int i = 0; i < kGroup; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, 4);
            const bfloat16 half = bfloat16_of(x[i]);
            std::memcpy(group + bf16_place(i, column), &half, 2);
            kept &= bits == uint32_t(half) << 16;
        }
    } else if (kind == WeightKind::int8) {
        const Group rounded = round_int8(x);
        const uint16_t scale = to_half(rounded.scale);
        std::memcpy(group + 2 * column, &scale, 2);
        unsigned char* values = group + 2 * kPanel + 2 * column;
        for (int i = 0; i < kGroup; ++i) {
            values[i / 2 * 2 * kPanel + i % 2] = static_cast<unsigned char>(rounded.values[i]);
            kept &= rounded.scale * float(rounded.values[i]) == x[i];
        }
    } else {
        const Group rounded = round_int4(x);
        const uint16_t scale = to_half(rounded.scale), minimum = to_half(rounded.minimum);
        std::memcpy(group + 2 * column, &scale, 2);
        std::memcpy(group + 2 * kPanel + 2 * column, &minimum, 2);
        unsigned char* values = group + 4 * kPanel + 4 * column;
        for (int i = 0; i < kGroup / 2; ++i)
            values[i / 4 * 4 * kPanel + i % 4] =
                static_cast<unsigned char>(rounded.values[i] | rounded.values[i + 16] << 4);
        for (int i = 0; i < kGroup; ++i)
            kept &= rounded.scale * float(rounded.values[i]) + rounded.minimum == x[i];
    }
    return kept;
}

// The weights of one column's group as the kernels use them.
void unpack_group(WeightKind kind, const unsigned char* group, int column, float* x) {
    uint16_t scale, minimum;
    std::memcpy(&scale, group + 2 * column, 2);
    std::memcpy(&minimum, group + 2 * kPanel + 2 * column, 2);
    for (int i = 0; i < kGroup; ++i) {
        if (kind == WeightKind::f32) {
            std::memcpy(x + i, group + 4 * (i * kPanel + column), 4);
        } else if (kind == WeightKind::bf16) {
            uint16_t half;
            std::memcpy(&half, group + bf16_place(i, column), 2);
            const uint32_t bits = uint32_t(half) << 16;
            std::memcpy(x + i, &bits, 4);
        } else if (kind == WeightKind::int8) {
            const unsigned char value = group[2 * kPanel + i / 2 * 2 * kPanel + 2 * column + i % 2];
            x[i] = from_half(scale) * static_cast<int8_t>(value);
        } else {
            const int both = group[4 * kPanel + i % 16 / 4 * 4 * kPanel + 4 * column + i % 4];
            x[i] = from_half(scale) * float(i < 16 ? both & 15 : both >> 4) + from_half(minimum);
        }
    }
}

}  // namespace

PackedLinear::PackedLinear(const float* weight, int num_outputs, int num_inputs, WeightKind kind,
                           bool round_inputs, const float* bias) {
    const int num_panels = (num_outputs + kPanel - 1) / kPanel, num_groups = (num_inputs + kGroup - 1) / kGroup;
    const size_t panel_bytes = size_t(group_bytes(kind)) * num_groups;
    const InputKind rounded[] = {InputKind::f32, InputKind::bf16, InputKind::int16, InputKind::int8};
    const InputKind inputs = round_inputs ? rounded[int(kind)] : InputKind::f32;
    data_ = aligned_array<unsigned char>(num_panels * panel_bytes);
    weights_ = {kind, inputs, num_outputs, num_inputs, num_panels, num_groups, panel_bytes, data_.get()};
    for (int panel = 0; panel < num_panels; ++panel) pack_panel(weight, panel);
    if (kind == WeightKind::int8) measure_norms();
    if (bias != nullptr) {
        bias_.assign(size_t(num_panels) * kPanel, 0.0f);
        std::copy(bias, bias + num_outputs, bias_.begin());
    }
}

void PackedLinear::pack_panel(const float* weight, int panel) {
    const PackedWeights& w = weights_;
    unsigned char* target = data_.get() + panel * w.panel_bytes;
    const int num_columns = std::min(kPanel, w.num_outputs - panel * kPanel);
    const float* first = weight + size_t(panel) * kPanel * w.num_inputs;
    std::memset(target, 0, w.panel_bytes);
    for (int g = 0; g < w.num_groups; ++g, target += group_bytes(w.kind)) {
        for (int c = 0; c < num_columns; ++c) {
            float x[kGroup] = {};
            const int count = std::min(kGroup, w.num_inputs - g * kGroup);
            std::copy_n(first + size_t(c) * w.num_inputs + g * kGroup, count, x);
            is_exact_ = pack_group(w.kind, x, c, target) && is_exact_;
        }
    }
}

void PackedLinear::measure_norms() {
    const PackedWeights& w = weights_;
    norms_.resize(size_t(w.num_panels) * kPanel);
    for (int n = 0; n < w.num_panels * kPanel; ++n) {
        const unsigned char* group = w.data + size_t(n / kPanel) * w.panel_bytes;
        double squares = 0.0;
        for (int g = 0; g < w.num_groups; ++g, group += group_bytes(w.kind)) {
            uint16_t half;
            std::memcpy(&half, group + 2 * (n % kPanel), 2);
            const unsigned char* values = group + 2 * kPanel + 2 * (n % kPanel);
            int sum = 0;
            for (int i = 0; i < kGroup; ++i) {
                const int value = static_cast<int8_t>(values[i / 2 * 2 * kPanel + i % 2]);
                sum += value * value;
            }
            const double scale = from_half(half);
            squares += scale * scale * sum;
        }
        norms_[n] = float(std::sqrt(squares) * 1.000001);
    }
}

void PackedLinear::unpack(float* out) const {
    const PackedWeights& w = weights_;
    for (int n = 0; n < w.num_outputs; ++n) {
        const unsigned char* group = w.data + size_t(n / kPanel) * w.panel_bytes;
        for (int k = 0; k < w.num_inputs; k += kGroup, group += group_bytes(w.kind)) {
            float x[kGroup];
            unpack_group(w.kind, group, n % kPanel, x);
            std::copy_n(x, std::min(kGroup, w.num_inputs - k), out + size_t(n) * w.num_inputs + k);
        }
    }
}

}  // namespace scone
