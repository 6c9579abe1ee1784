// The small kernels between the products: embedding, norms, and what happens to q, k and v before attention.

ENTRY(embed, 256, 4, (const u32 *n, const u32 *tokens, const T *table, float *x, u32 hidden)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const T *from = table + (u64)tokens[row] * hidden;
    for (u32 i = threadIdx.x * VEC; i < hidden; i += 256 * VEC) {
        float v[VEC];
        widen(v, load_vec(from + i));
#pragma unroll
        for (u32 j = 0; j < VEC; j++) x[(u64)row * hidden + i + j] = v[j];
    }
}

// out = x / rms(x) * gain
DEVICE void scale_row(const float *x, const T *gain, T *out, u32 hidden, float sum, float eps) {
    float scale = 1.0f / sqrtf(sum / (float)hidden + eps);
    for (u32 i = threadIdx.x; i < hidden; i += 256) out[i] = to_element(x[i] * scale * to_float(gain[i]));
}

ENTRY(rms_norm, 256, 4, (const u32 *n, const float *x, const u32 *pick, const T *gain, T *out, u32 hidden, float eps)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const float *from = x + (u64)(pick ? pick[row] : row) * hidden;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += 256) sum += from[i] * from[i];
    scale_row(from, gain, out + (u64)row * hidden, hidden, block_sum_256(sum), eps);
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
    scale_row(to, gain, out + (u64)row * hidden, hidden, block_sum_256(sum), eps);
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

// One warp per head of one token. A lane holds the pairs (i, i + d/2) for i = lane, lane + 32.
ENTRY(qk_rope_store, 128, 8, (const u32 *n, T *qkv, const u32 *positions, const u32 *row_of, const u32 *block_tables,
        u32 max_blocks, const float *rope, const T *q_gain, const T *k_gain, float eps, T *kv, u64 page_stride, u32 heads,
        u32 kv_heads, u32 d, u32 block_tokens)) {
    let_next_start();
    wait_for_previous();
    u32 token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= *n || head >= heads + 2 * kv_heads) return;
    T *x = qkv + ((u64)token * (heads + 2 * kv_heads) + head) * d;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    u32 position = positions[token], half = d / 2;
    float low[2] = {0.0f, 0.0f}, high[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        u32 i = lane + 32 * j;
        if (i < half) {
            low[j] = to_float(x[i]);
            high[j] = to_float(x[i + half]);
        }
    }
    const T *gain = is_q ? q_gain : k_gain;
    if (gain && !is_v) {
        float squares = low[0] * low[0] + low[1] * low[1] + high[0] * high[0] + high[1] * high[1];
        float scale = 1.0f / sqrtf(warp_sum(squares) / (float)d + eps);
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            u32 i = lane + 32 * j;
            if (i < half) {
                low[j] *= scale * to_float(gain[i]);
                high[j] *= scale * to_float(gain[i + half]);
            }
        }
    }
    Pages pages = {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, d};
    T *to = x;
    if (!is_q) {
        to = key_at(pages, row_of[token], (head - heads) % kv_heads, position) + (is_v ? value_offset(pages) : 0);
    }
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        u32 i = lane + 32 * j;
        if (i >= half) continue;
        float c = 1.0f, s = 0.0f;
        if (!is_v) {
            c = rope[((u64)position * half + i) * 2];
            s = rope[((u64)position * half + i) * 2 + 1];
        }
        to[i] = to_element(low[j] * c - high[j] * s);
        to[i + half] = to_element(high[j] * c + low[j] * s);
    }
}
