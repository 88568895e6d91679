// What sampling does with a chunk of logits. Included after vector_math.inl, once per instruction set.

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

static float greatest_of_chunk(const float* x) {
    f32x8 greatest = load(x);
    i32x8 is_nan = (i32x8)(greatest != greatest);
    for (int i = 8; i < kSampledChunk; i += 8) {
        const f32x8 v = load(x + i);
        is_nan |= (i32x8)(v != v);
        greatest = max8(greatest, v);
    }
    is_nan |= swap_lanes<4>(is_nan);
    is_nan |= swap_lanes<2>(is_nan);
    return is_nan[0] | is_nan[1] ? __builtin_nanf("") : max_of(greatest);
}

// Nothing is fused here, so that every instruction set, and plain torch, gives the same bits.
static int64_t weigh_chunk(const float* x, float temperature, float highest, float floor, int64_t* weights) {
    const double magic = 4503599627370496.0;  // 2^52: adding it rounds to an integer, which the low bits are
    const f64x8 magics = {magic, magic, magic, magic, magic, magic, magic, magic};
    i64x8 sums = {};
    for (int i = 0; i < kSampledChunk; i += 8) {
        const f32x8 value = load(x + i) / splat(temperature);
        const f32x8 power = exp8<Unfused>(value - splat(highest));
        const f32x8 kept = (f32x8)((i32x8)power & (i32x8)(value >= splat(floor)));
        const f64x8 rounded = __builtin_convertvector(kept, f64x8) * 17592186044416.0 + magics;  // 2^44
        const i64x8 weight = (i64x8)rounded - (i64x8)magics;
        __builtin_memcpy(weights + i, &weight, sizeof weight);
        sums += weight;
    }
    int64_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += sums[i];
    return sum;
}
