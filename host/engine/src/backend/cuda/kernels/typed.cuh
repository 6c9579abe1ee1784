// The element type of a unit: what weights, activations and KV pages hold. Arithmetic is in float always.
//
// 16-bit elements are kept as bare bits, because the types of CUDA live in headers that NVRTC does not have.

#if PM_T == 0
typedef float T;
#else
typedef u16 T;
#endif

// Elements in 16 bytes.
static const u32 VEC = 16 / sizeof(T);

#if PM_T == 0
DEVICE float to_float(T v) { return v; }
DEVICE T to_element(float v) { return v; }
#elif PM_T == 1
DEVICE float to_float(T v) { return f16_to_float(v); }
DEVICE u32 to_elements(float low, float high) { return floats_to_f16x2(low, high); }
DEVICE T to_element(float v) { return (T)floats_to_f16x2(v, 0.0f); }
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
#else
DEVICE float to_float(T v) { return bf16_to_float(v); }
DEVICE u32 to_elements(float low, float high) { return floats_to_bf16x2(low, high); }
DEVICE T to_element(float v) { return (T)floats_to_bf16x2(v, 0.0f); }
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
#endif

DEVICE uint4 load_vec(const T *from) { return *(const uint4 *)from; }

DEVICE uint4 zero_vec() {
    uint4 v;
    v.x = v.y = v.z = v.w = 0;
    return v;
}

// The elements of 16 bytes.
DEVICE void widen(float (&to)[VEC], uint4 from) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#if PM_T == 0
        to[i] = __uint_as_float(words[i]);
#else
        to[2 * i] = to_float((T)(words[i] & 0xffff));
        to[2 * i + 1] = to_float((T)(words[i] >> 16));
#endif
    }
}

// The same the other way.
DEVICE void store_vec(T *to, const float (&from)[VEC]) {
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#if PM_T == 0
        words[i] = __float_as_uint(from[i]);
#else
        words[i] = to_elements(from[2 * i], from[2 * i + 1]);
#endif
    }
    uint4 v;
    v.x = words[0], v.y = words[1], v.z = words[2], v.w = words[3];
    *(uint4 *)to = v;
}

// Turns of a loop that become one, where each loads what the next one uses: of a single turn the assembler would move what it
// loaded to where the next expects it, and a move waits for the load.
static const u32 TURNS = PM_T == 0 ? 1 : 2;

// As many floats as T have place in 16 bytes.
DEVICE void load_floats(float (&to)[VEC], const float *from) {
#pragma unroll
    for (u32 i = 0; i < VEC; i += 4) {
        uint4 v = *(const uint4 *)(from + i);
        to[i] = __uint_as_float(v.x), to[i + 1] = __uint_as_float(v.y);
        to[i + 2] = __uint_as_float(v.z), to[i + 3] = __uint_as_float(v.w);
    }
}

DEVICE void store_floats(float *to, const float (&from)[VEC]) {
#pragma unroll
    for (u32 i = 0; i < VEC; i += 4) {
        uint4 v;
        v.x = __float_as_uint(from[i]), v.y = __float_as_uint(from[i + 1]);
        v.z = __float_as_uint(from[i + 2]), v.w = __float_as_uint(from[i + 3]);
        *(uint4 *)(to + i) = v;
    }
}

// What becomes of a product: see README.md.
static const u32 STORE = 0, STORE_FLOAT = 1, ADD_FLOAT = 2, SILU_MUL = 3, GELU_MUL = 4;

// One token's row of a product's result.
struct Epilogue {
    void *y;
    const T *bias;
    u32 n_out;
    u32 kind;
};

DEVICE void put(const Epilogue &e, u32 row, u32 column, float v) {
    u64 at = (u64)row * e.n_out + column;
    if (e.kind == STORE) {
        ((T *)e.y)[at] = to_element(v);
    } else if (e.kind == STORE_FLOAT) {
        ((float *)e.y)[at] = v;
    } else {
        // Nobody else adds to it. Nothing waits for what was there, as a load, an addition and a store would, one element after another.
        atomicAdd((float *)e.y + at, v);
    }
}

// Up, times the activation of gate. The tanh form of GELU is a sigmoid, too.
DEVICE float gated_by(u32 kind, float gate, float up) {
    float z = kind == SILU_MUL ? gate : 1.59576912f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + expf(-z)) * up;
}

// Finishes columns `column` (even) and the one after it; columns past the end are dropped.
DEVICE void finish(const Epilogue &e, u32 row, u32 column, float a, float b) {
    if (column >= e.n_out) return;
    bool both = column + 1 < e.n_out;
    if (e.bias) {
        a += to_float(e.bias[column]);
        if (both) b += to_float(e.bias[column + 1]);
    }
    if (e.kind >= SILU_MUL) {
        ((T *)e.y)[(u64)row * (e.n_out / 2) + column / 2] = to_element(gated_by(e.kind, a, b));
        return;
    }
    put(e, row, column, a);
    if (both) put(e, row, column + 1, b);
}
