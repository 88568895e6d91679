// What is done row by row: norms, activation and rotation between the linear maps, the greatest outputs after
// the last. Included after
// vector_math.inl, once per instruction set.

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    f32x8 squares = splat(0.0f);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const f32x8 v = load(x + i);
        squares = fma8(v, v, squares);
    }
    float total = sum8(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(total / (float)n + eps);
    for (i = 0; i + 8 <= n; i += 8) store(out + i, load(weight + i) * (load(x + i) * splat(factor)));
    for (; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const f32x8 g = load(gate + i);
        store(out + i, g / (splat(1.0f) + exp8(-g)) * load(up + i));
    }
    if (i < n) {
        float g[8] = {}, u[8] = {}, r[8];
        __builtin_memcpy(g, gate + i, sizeof(float) * (n - i));
        __builtin_memcpy(u, up + i, sizeof(float) * (n - i));
        const f32x8 v = load(g);
        store(r, v / (splat(1.0f) + exp8(-v)) * load(u));
        __builtin_memcpy(out + i, r, sizeof(float) * (n - i));
    }
}

static void rotate(float* head, const float* cos, const float* sin, int head_dim) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + 8 <= half; i += 8) {
        const f32x8 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

static float greatest(const float* x) {
    const f32x8 a = load(x), b = load(x + 8);
    i32x8 is_nan = (i32x8)(a != a) | (i32x8)(b != b);
    is_nan |= swap_lanes<4>(is_nan);
    is_nan |= swap_lanes<2>(is_nan);
    return is_nan[0] | is_nan[1] ? __builtin_nanf("") : max_of(max8(a, b));
}
