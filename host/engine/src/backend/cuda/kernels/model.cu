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

// What a row is multiplied by: `plus` is 1 in models that keep their gains less 1.
struct Gain {
    const T *gain;
    float plus;
    float eps;

    METHOD float of(u32 i) const { return to_float(gain[i]) + plus; }
    METHOD float scale(float sum, u32 width) const { return 1.0f / sqrtf(sum / (float)width + eps); }
};

// out = x / rms(x) * gain
DEVICE void scale_row(const float *x, const Gain &gain, T *out, u32 hidden, float sum) {
    float scale = gain.scale(sum, hidden);
    for (u32 i = threadIdx.x; i < hidden; i += 256) out[i] = to_element(x[i] * scale * gain.of(i));
}

ENTRY(rms_norm, 256, 4, (const u32 *n, const float *x, const u32 *pick, const T *gain, T *out, u32 hidden, float eps,
        float plus)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const float *from = x + (u64)(pick ? pick[row] : row) * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += 256) sum += from[i] * from[i];
    Gain g = {gain, plus, eps};
    scale_row(from, g, out + (u64)row * hidden, hidden, block_sum_256(sum));
}

// x += delta / rms(delta) * gain
ENTRY(norm_add, 256, 4, (const u32 *n, float *x, const T *delta, const T *gain, u32 hidden, float eps, float plus)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const T *from = delta + (u64)row * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += 256) sum += to_float(from[i]) * to_float(from[i]);
    Gain g = {gain, plus, eps};
    float scale = g.scale(block_sum_256(sum), hidden);
    for (u32 i = threadIdx.x; i < hidden; i += 256) x[(u64)row * hidden + i] += to_float(from[i]) * scale * g.of(i);
}

ENTRY(add_rms_norm, 256, 4, (const u32 *n, float *x, const T *delta, const T *gain, T *out, u32 hidden, float eps)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    float *to = x + (u64)row * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += 256) {
        float v = to[i] + to_float(delta[(u64)row * hidden + i]);
        to[i] = v;
        sum += v * v;
    }
    // Each thread scales the elements that it added up itself.
    Gain g = {gain, 0.0f, eps};
    scale_row(to, g, out + (u64)row * hidden, hidden, block_sum_256(sum));
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
    wait_for_previous();
    u32 token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= *n || head >= heads + 2 * kv_heads) return;
    T *x = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * d;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    u32 position = positions[token], half = turned / 2;
    float low[PAIRS] = {}, high[PAIRS] = {};
#pragma unroll
    for (u32 j = 0; j < PAIRS; j++) {
        u32 i = lane + 32 * j;
        if (i >= d / 2) continue;
        low[j] = to_float(x[i < half ? i : 2 * i]);
        high[j] = to_float(x[i < half ? i + half : 2 * i + 1]);
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
    Pages pages = {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, d};
    T *to = x;
    if (!is_q) {
        to = key_at(pages, row_of[token], (head - heads) % kv_heads, position) + (is_v ? value_offset(pages) : 0);
    }
#pragma unroll
    for (u32 j = 0; j < PAIRS; j++) {
        u32 i = lane + 32 * j;
        if (i >= d / 2) continue;
        float c = 1.0f, s = 0.0f;
        if (!is_v && i < half) {
            c = rope[((u64)position * half + i) * 2];
            s = rope[((u64)position * half + i) * 2 + 1];
        }
        to[i < half ? i : 2 * i] = to_element(low[j] * c - high[j] * s);
        to[i < half ? i + half : 2 * i + 1] = to_element(high[j] * c + low[j] * s);
    }
}
