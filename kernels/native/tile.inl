// While it lives, denormal numbers are zero, as results and as inputs.
struct FlushedDenormals {
#if defined(__SSE__)
    // The memory clobbers keep arithmetic, which begins and ends in memory, on its side of the change.
    FlushedDenormals() : before(__builtin_ia32_stmxcsr()) { set(before | 0x8040u); }
    ~FlushedDenormals() { set(before); }
    static void set(unsigned control) {
        asm volatile("" ::: "memory");
        __builtin_ia32_ldmxcsr(control);
        asm volatile("" ::: "memory");
    }
    const unsigned before;
#endif
};

// The tile of whatever kinds of weights and inputs. Included after the tiles of an instruction set.

static void tile(const PackedWeights& w, int panel, const Activations& x, int first_row, int rows, float* out) {
    const unsigned char* data = w.data + (size_t)panel * w.panel_bytes;
    const size_t group = (size_t)first_row * w.num_groups;
    switch (w.inputs) {
        case InputKind::f32:
            tile_f32(w.kind, data, w.num_inputs, (const float*)x.values + (size_t)first_row * w.num_inputs, rows, out);
            break;
        case InputKind::bf16: {
            const FlushedDenormals as_bfloat16_instructions_do;
            tile_f32(w.kind, data, w.num_inputs, (const float*)x.values + (size_t)first_row * w.num_inputs, rows, out);
            break;
        }
        case InputKind::int16:
            tile_int8(data, w.num_groups, (const int16_t*)x.values + group * kGroup, x.scales + group, rows, out);
            break;
        case InputKind::int8:
            tile_int4(data, w.num_groups, (const int8_t*)x.values + group * kGroup, x.scales + group,
                      x.sums + group, rows, out);
            break;
    }
}
