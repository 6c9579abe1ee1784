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

// A number that is too large for f16 is stored as the largest one, so that nothing becomes a NaN which would be none had it stayed a
// float. What a library stored so is infinite, and `finite` makes it the same. `to_elements` is for numbers that T has room for.
#if PM_T == 0
DEVICE float to_float(T v) { return v; }
DEVICE T finite(T v) { return v; }
DEVICE T to_element(float v) { return v; }
#elif PM_T == 1
DEVICE float to_float(T v) { return f16_to_float(v); }
DEVICE T finite(T v) { return (T)finite_f16x2(v); }
DEVICE u32 to_elements(float low, float high) { return floats_to_f16x2(low, high); }
DEVICE u32 to_finite(float low, float high) { return finite_f16x2(floats_to_f16x2(low, high)); }
DEVICE T to_element(float v) { return (T)to_finite(v, 0.0f); }
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
#else
DEVICE float to_float(T v) { return bf16_to_float(v); }
DEVICE T finite(T v) { return v; }
DEVICE u32 to_elements(float low, float high) { return floats_to_bf16x2(low, high); }
DEVICE u32 to_finite(float low, float high) { return to_elements(low, high); }
DEVICE T to_element(float v) { return (T)to_elements(v, 0.0f); }
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
#endif

DEVICE uint4 load_vec(const T *from) { return *(const uint4 *)from; }

DEVICE uint4 zero_vec() {
    uint4 v;
    v.x = v.y = v.z = v.w = 0;
    return v;
}

DEVICE uint4 finite(uint4 v) {
#if PM_T == 1
    v.x = finite_f16x2(v.x), v.y = finite_f16x2(v.y), v.z = finite_f16x2(v.z), v.w = finite_f16x2(v.w);
#endif
    return v;
}

// Four floats in 16 bytes, and back.
DEVICE uint4 pack(const float *v) {
    uint4 r;
    r.x = __float_as_uint(v[0]), r.y = __float_as_uint(v[1]), r.z = __float_as_uint(v[2]), r.w = __float_as_uint(v[3]);
    return r;
}

DEVICE void unpack(float *v, uint4 from) {
    v[0] = __uint_as_float(from.x), v[1] = __uint_as_float(from.y), v[2] = __uint_as_float(from.z), v[3] = __uint_as_float(from.w);
}

// As many floats as T have place in 16 bytes.
DEVICE void load_floats(float (&to)[VEC], const float *from) {
#pragma unroll
    for (u32 i = 0; i < VEC; i += 4) unpack(to + i, *(const uint4 *)(from + i));
}

DEVICE void store_floats(float *to, const float (&from)[VEC]) {
#pragma unroll
    for (u32 i = 0; i < VEC; i += 4) *(uint4 *)(to + i) = pack(from + i);
}

// The elements of 16 bytes.
DEVICE void widen(float (&to)[VEC], uint4 from) {
#if PM_T == 0
    unpack(to, from);
#else
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        to[2 * i] = to_float((T)(words[i] & 0xffff));
        to[2 * i + 1] = to_float((T)(words[i] >> 16));
    }
#endif
}

// The same the other way.
DEVICE void store_vec(T *to, const float (&from)[VEC]) {
#if PM_T == 0
    store_floats(to, from);
#else
    uint4 v;
    v.x = to_finite(from[0], from[1]), v.y = to_finite(from[2], from[3]);
    v.z = to_finite(from[4], from[5]), v.w = to_finite(from[6], from[7]);
    *(uint4 *)to = v;
#endif
}

// Turns of a loop that become one, where each loads what the next one uses: of a single turn the assembler would move what it
// loaded to where the next expects it, and a move waits for the load.
static const u32 TURNS = PM_T == 0 ? 1 : 2;

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
