// The small kernels between the products: embedding, norms, and what happens to q, k and v before attention.

ENTRY(embed, 256, 4, (const u32 *n, const u32 *tokens, const T *table, float *x, u32 hidden, float scale)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const T *from = table + (u64)tokens[row] * hidden;
    for (u32 i = threadIdx.x * VEC; i < hidden; i += 256 * VEC) {
        float v[VEC];
        widen(v, load_vec(from + i));
#pragma unroll
        for (u32 j = 0; j < VEC; j++) x[(u64)row * hidden + i + j] = v[j] * scale;
    }
}

// === Norms ===
//
// A block has a row, a thread groups of VEC neighbours of it, 256 groups apart: the first HELD in registers, all loaded before
// any is used, which is a row of 8,192 elements; what lies beyond is read again. One group after the other would wait for memory
// that many times over, in a kernel that does nothing else.

static const u32 HELD = 32 / VEC;

// The first element of a thread's `j`-th group.
DEVICE u32 group(u32 j) { return (threadIdx.x + 256 * j) * VEC; }

// What a row is multiplied by: `plus` is 1 in models that keep their gains less 1.
struct Gain {
    const T *gain;
    float plus;
    float eps;

    METHOD float of(u32 i) const { return to_float(gain[i]) + plus; }
    METHOD float scale(float sum, u32 width) const { return 1.0f / sqrtf(sum / (float)width + eps); }
};

// Nothing writes gains, so they are loaded while the kernel before this one still runs.
DEVICE void hold_gains(uint4 (&held)[HELD], const T *gain, u32 hidden) {
#pragma unroll
    for (u32 j = 0; j < HELD; j++) held[j] = group(j) < hidden ? load_vec(gain + group(j)) : zero_vec();
}

// v * scale * gain
DEVICE void scale_group(float (&v)[VEC], float scale, uint4 gains, float plus) {
    float g[VEC];
    widen(g, gains);
#pragma unroll
    for (u32 i = 0; i < VEC; i++) v[i] *= scale * (g[i] + plus);
}

DEVICE float squares(const float (&v)[VEC]) {
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < VEC; i++) sum += v[i] * v[i];
    return sum;
}

// to = v + delta * scale * gain
DEVICE void add_group(float *to, float (&v)[VEC], uint4 deltas, float scale, uint4 gains, float plus) {
    float d[VEC];
    widen(d, deltas);
    scale_group(d, scale, gains, plus);
#pragma unroll
    for (u32 i = 0; i < VEC; i++) v[i] += d[i];
    store_floats(to, v);
}

// out = x / rms(x) * gain, of a row of which the first groups are in `x` and the rest at `from`, with `sum` its thread's squares.
DEVICE void scale_row(float (&x)[HELD][VEC], const float *from, const Gain &g, const uint4 (&gains)[HELD], T *out, u32 hidden,
        float sum) {
    float scale = g.scale(block_sum_256(sum), hidden);
#pragma unroll
    for (u32 j = 0; j < HELD; j++) {
        if (group(j) >= hidden) continue;
        scale_group(x[j], scale, gains[j], g.plus);
        store_vec(out + group(j), x[j]);
    }
    for (u32 j = HELD; group(j) < hidden; j++) {
        float v[VEC];
        load_floats(v, from + group(j));
        scale_group(v, scale, load_vec(g.gain + group(j)), g.plus);
        store_vec(out + group(j), v);
    }
}

ENTRY(rms_norm, 256, 2, (const u32 *n, const float *x, const u32 *pick, const T *gain, T *out, u32 hidden, float eps,
        float plus)) {
    let_next_start();
    uint4 gains[HELD];
    hold_gains(gains, gain, hidden);
    u32 row = blockIdx.x;
    bool is_live = row < *n;
    const float *from = x + (u64)(is_live && pick ? pick[row] : row) * hidden;
    wait_for_previous();
    if (!is_live) return;
    float held[HELD][VEC] = {}, sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < HELD; j++)
        if (group(j) < hidden) load_floats(held[j], from + group(j));
#pragma unroll
    for (u32 j = 0; j < HELD; j++) sum += squares(held[j]);
    for (u32 j = HELD; group(j) < hidden; j++) {
        float v[VEC];
        load_floats(v, from + group(j));
        sum += squares(v);
    }
    Gain g = {gain, plus, eps};
    scale_row(held, from, g, gains, out + (u64)row * hidden, hidden, sum);
}

// x += delta / rms(delta) * gain
ENTRY(norm_add, 256, 2, (const u32 *n, float *x, const T *delta, const T *gain, u32 hidden, float eps, float plus)) {
    let_next_start();
    uint4 gains[HELD], deltas[HELD];
    hold_gains(gains, gain, hidden);
    u32 row = blockIdx.x;
    bool is_live = row < *n;
    wait_for_previous();
    if (!is_live) return;
    const T *from = delta + (u64)row * hidden;
    float *to = x + (u64)row * hidden, held[HELD][VEC] = {}, sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < HELD; j++) {
        deltas[j] = group(j) < hidden ? load_vec(from + group(j)) : zero_vec();
        if (group(j) < hidden) load_floats(held[j], to + group(j));
    }
    float v[VEC];
#pragma unroll
    for (u32 j = 0; j < HELD; j++) {
        deltas[j] = finite(deltas[j]);
        widen(v, deltas[j]);
        sum += squares(v);
    }
    for (u32 j = HELD; group(j) < hidden; j++) {
        widen(v, finite(load_vec(from + group(j))));
        sum += squares(v);
    }
    Gain g = {gain, plus, eps};
    float scale = g.scale(block_sum_256(sum), hidden);
#pragma unroll
    for (u32 j = 0; j < HELD; j++)
        if (group(j) < hidden) add_group(to + group(j), held[j], deltas[j], scale, gains[j], plus);
    for (u32 j = HELD; group(j) < hidden; j++) {
        load_floats(v, to + group(j));
        add_group(to + group(j), v, finite(load_vec(from + group(j))), scale, load_vec(gain + group(j)), plus);
    }
}

// Logits of a router: a warp has two experts and eight tokens. Its weight is in float, as the file's numbers are: a choice between experts
// may hang on the last bit.
ENTRY(router_logits, 128, 4, (const u32 *n, const float *w, const T *x, float *logits, u32 hidden, u32 count)) {
    const u32 TOKENS = 8;
    let_next_start();
    wait_for_previous();
    u32 lane = threadIdx.x % 32, first = (blockIdx.x * 4 + threadIdx.x / 32) * 2, row0 = blockIdx.y * TOKENS;
    if (first >= count || row0 >= *n) return;
    u32 live = least(*n - row0, TOKENS);
    const float *of[2] = {w + (u64)first * hidden, w + (u64)least(first + 1, count - 1) * hidden};
    float sums[2][TOKENS] = {};
#pragma unroll 2
    for (u32 at = lane * VEC; at < hidden; at += 32 * VEC) {
        float wide[2][VEC];
        load_floats(wide[0], of[0] + at);
        load_floats(wide[1], of[1] + at);
#pragma unroll
        for (u32 b = 0; b < TOKENS; b++) {
            if (b >= live) continue;
            float v[VEC];
            widen(v, load_vec(x + (u64)(row0 + b) * hidden + at));
#pragma unroll
            for (u32 i = 0; i < VEC; i++) sums[0][b] += wide[0][i] * v[i], sums[1][b] += wide[1][i] * v[i];
        }
    }
#pragma unroll
    for (u32 b = 0; b < TOKENS; b++) {
        if (b >= live) continue;
        float one = warp_sum(sums[0][b]), other = warp_sum(sums[1][b]);
        float *to = logits + (u64)(row0 + b) * count + first;
        if (lane == 0) to[0] = one;
        if (lane == 1 && first + 1 < count) to[1] = other;
    }
}

// Ends a product of gate and up that a library stored as it is, in pairs: of the rows from `first` on, which are all of `pairs`.
ENTRY(gated, 256, 8, (const u32 *n, const T *pairs, T *out, u32 first, u32 ffn, u32 kind)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.y, i = (blockIdx.x * 256 + threadIdx.x) * VEC;
    if (first + row >= *n || i >= ffn) return;
    const T *from = pairs + 2 * ((u64)row * ffn + i);
    float v[VEC];
    const uint4 read[2] = {load_vec(from), load_vec(from + VEC)};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float pair[VEC];
        widen(pair, finite(read[half]));
#pragma unroll
        for (u32 j = 0; j < VEC; j += 2) v[(half * VEC + j) / 2] = gated_by(kind, pair[j], pair[j + 1]);
    }
    store_vec(out + (u64)(first + row) * ffn + i, v);
}

// Where the pages of a layer are.
struct Pages {
    T *kv;
    u64 page_stride;
    const u32 *tables;
    u32 max_blocks;
    u32 block_tokens;
    u32 kv_heads;
    u32 d;
};

// The key of a head at a position of a row; the value lies `value_offset` further.
DEVICE T *key_at(const Pages &p, u32 row, u32 head, u32 position) {
    u32 page = p.tables[(u64)row * p.max_blocks + position / p.block_tokens];
    return p.kv + page * p.page_stride + ((u64)head * p.block_tokens + position % p.block_tokens) * p.d;
}

DEVICE u64 value_offset(const Pages &p) { return (u64)p.kv_heads * p.block_tokens * p.d; }

// One warp per head of one token. A lane holds the pairs lane, lane + 32 and so on: first those that are turned, of elements i and
// i + turned/2, then, where a head is turned in part, neighbours of the rest.
ENTRY(qk_rope_store, 128, 8, (const u32 *n, T *qkv, const u32 *positions, const u32 *row_of, const u32 *block_tables,
        u32 max_blocks, const float *rope, u32 turned, const T *q_gain, const T *k_gain, float eps, float plus, T *kv,
        u64 page_stride, u32 heads, u32 kv_heads, u32 d, u32 block_tokens)) {
    const u32 PAIRS = 4;
    let_next_start();
    u32 token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    bool is_live = token < *n && head < heads + 2 * kv_heads, is_q = head < heads, is_v = head >= heads + kv_heads;
    T *x = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * d, *to = x;
    u32 half = turned / 2;
    float cosines[PAIRS] = {}, sines[PAIRS] = {}, low[PAIRS] = {}, high[PAIRS] = {};
    // All of this comes from the host, and is here when the kernel before this one has ended.
    if (is_live) {
        u32 position = positions[token];
        Pages pages = {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, d};
        if (!is_q) {
            to = key_at(pages, row_of[token], (head - heads) % kv_heads, position) + (is_v ? value_offset(pages) : 0);
        }
#pragma unroll
        for (u32 j = 0; j < PAIRS; j++) {
            u32 i = lane + 32 * j;
            if (is_v || i >= half) continue;
            cosines[j] = rope[((u64)position * half + i) * 2];
            sines[j] = rope[((u64)position * half + i) * 2 + 1];
        }
    }
    wait_for_previous();
    if (!is_live) return;
#pragma unroll
    for (u32 j = 0; j < PAIRS; j++) {
        u32 i = lane + 32 * j;
        if (i >= d / 2) continue;
        low[j] = to_float(finite(x[i < half ? i : 2 * i]));
        high[j] = to_float(finite(x[i < half ? i + half : 2 * i + 1]));
    }
    Gain g = {is_q ? q_gain : k_gain, plus, eps};
    if (g.gain && !is_v) {
        float squares = 0.0f;
#pragma unroll
        for (u32 j = 0; j < PAIRS; j++) squares += low[j] * low[j] + high[j] * high[j];
        float scale = g.scale(warp_sum(squares), d);
#pragma unroll
        for (u32 j = 0; j < PAIRS; j++) {
            u32 i = lane + 32 * j;
            if (i >= d / 2) continue;
            low[j] *= scale * g.of(i < half ? i : 2 * i);
            high[j] *= scale * g.of(i < half ? i + half : 2 * i + 1);
        }
    }
#pragma unroll
    for (u32 j = 0; j < PAIRS; j++) {
        u32 i = lane + 32 * j;
        if (i >= d / 2) continue;
        float one = low[j], other = high[j];
        // What is not turned is not multiplied either: a large number times a sine of 0 may be none.
        if (!is_v && i < half) {
            one = low[j] * cosines[j] - high[j] * sines[j];
            other = high[j] * cosines[j] + low[j] * sines[j];
        }
        to[i < half ? i : 2 * i] = to_element(one);
        to[i < half ? i + half : 2 * i + 1] = to_element(other);
    }
}
