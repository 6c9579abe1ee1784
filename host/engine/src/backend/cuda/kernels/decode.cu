// Attention of one token per row over its pages, cut into splits so that a few long rows occupy the whole device.
//
// A block serves up to eight query heads of one key head, so that each key and value is read once. The D elements of a key are
// spread over a power of two of lanes, in runs of 16 bytes: a warp reads several positions at once, and four such loads of keys
// and four of values are under way per thread. Where D is no power of two, some lanes have nothing to read. Every lane group keeps its own running maximum; they meet at the end. Scores are
// in units of log 2, so that exponentials are single instructions.

static const float NO_SCORE = -1e30f;

struct Decode {
    const u32 *n;
    const T *qkv;
    Pages pages;
    const u32 *lens;
    T *out;
    float *part;
    float *stat;
    u32 heads;
    u32 window;
    float scale;
    float cap;
};

// How a key of D elements lies over lanes: a lane has `RUNS` runs of VEC elements, `LANES * VEC` apart.
template <u32 D> struct Lay {
    static const u32 WANTED = D / VEC;
    static const u32 LANES = WANTED > 16 ? 32 : WANTED > 8 ? 16 : WANTED > 4 ? 8 : 4;
    static const u32 RUNS = (WANTED + LANES - 1) / LANES;
    static const u32 MINE = RUNS * VEC;

    METHOD static u32 column(u32 run) { return (run * LANES + threadIdx.x % LANES) * VEC; }
    // Whether this lane has elements of the key at all.
    METHOD static bool has(u32 run) { return WANTED % LANES == 0 || column(run) < D; }
};

// The positions of this block's split.
struct Span {
    u32 begin, end;
};

DEVICE Span span_of(const Decode &a, u32 len) {
    u32 tokens = a.pages.block_tokens, low = a.window && len > a.window ? len - a.window : 0;
    u32 first = low / tokens, per = ceil_div(ceil_div(len, tokens) - first, gridDim.z);
    Span span = {most(low, (first + blockIdx.z * per) * tokens), least(len, (first + (blockIdx.z + 1) * per) * tokens)};
    return span;
}

// M elements of each of G heads.
template <u32 G, u32 M> struct Running {
    float top[G], sum[G], out[G][M];

    // Takes another's state of the same heads.
    METHOD void join(u32 g, float other_top, float other_sum, const float (&other)[M]) {
        float highest = fmaxf(top[g], other_top);
        float mine = exp2f(top[g] - highest), its = exp2f(other_top - highest);
        top[g] = highest;
        sum[g] = sum[g] * mine + other_sum * its;
#pragma unroll
        for (u32 i = 0; i < M; i++) out[g][i] = out[g][i] * mine + other[i] * its;
    }
};

// This lane's runs as floats.
template <u32 RUNS> DEVICE void widen_runs(float (&to)[RUNS * VEC], const uint4 (&from)[RUNS]) {
#pragma unroll
    for (u32 run = 0; run < RUNS; run++) {
        float v[VEC];
        widen(v, from[run]);
#pragma unroll
        for (u32 i = 0; i < VEC; i++) to[run * VEC + i] = v[i];
    }
}

// Four positions of this lane group: `keys` and `values` are its runs of each.
template <u32 G, u32 D>
DEVICE void attend(const Decode &a, Running<G, Lay<D>::MINE> &state, const float (&q)[G][Lay<D>::MINE],
                   const uint4 (&keys)[4][Lay<D>::RUNS], const uint4 (&values)[4][Lay<D>::RUNS], const bool (&live)[4]) {
    const u32 M = Lay<D>::MINE;
    float scores[4][G] = {};
#pragma unroll
    for (u32 u = 0; u < 4; u++) {
        float key[M];
        widen_runs<Lay<D>::RUNS>(key, keys[u]);
#pragma unroll
        for (u32 g = 0; g < G; g++) {
#pragma unroll
            for (u32 i = 0; i < M; i++) scores[u][g] += q[g][i] * key[i];
#pragma unroll
            for (int mask = Lay<D>::LANES / 2; mask > 0; mask /= 2) scores[u][g] += from_lane_xor(scores[u][g], mask);
            if (!live[u]) scores[u][g] = -INFINITY;
        }
    }
    if (a.cap != 0.0f) {
#pragma unroll
        for (u32 u = 0; u < 4; u++)
#pragma unroll
            for (u32 g = 0; g < G; g++)
                if (live[u]) scores[u][g] = soft_cap(scores[u][g], a.cap);
    }
#pragma unroll
    for (u32 g = 0; g < G; g++) {
        float highest = state.top[g];
#pragma unroll
        for (u32 u = 0; u < 4; u++) highest = fmaxf(highest, scores[u][g]);
        float shrink = exp2f(state.top[g] - highest);
        state.top[g] = highest;
        state.sum[g] *= shrink;
#pragma unroll
        for (u32 i = 0; i < M; i++) state.out[g][i] *= shrink;
#pragma unroll
        for (u32 u = 0; u < 4; u++) {
            scores[u][g] = exp2f(scores[u][g] - highest);
            state.sum[g] += scores[u][g];
        }
    }
#pragma unroll
    for (u32 u = 0; u < 4; u++) {
        float value[M];
        widen_runs<Lay<D>::RUNS>(value, values[u]);
#pragma unroll
        for (u32 g = 0; g < G; g++)
#pragma unroll
            for (u32 i = 0; i < M; i++) state.out[g][i] += scores[u][g] * value[i];
    }
}

// Joins the lane groups of a warp: every lane has the result for its elements.
template <u32 G, u32 M, u32 LANES> DEVICE void join_groups(Running<G, M> &state) {
#pragma unroll
    for (int mask = 16; mask >= (int)LANES; mask /= 2)
#pragma unroll
        for (u32 g = 0; g < G; g++) {
            float top = from_lane_xor(state.top[g], mask), sum = from_lane_xor(state.sum[g], mask), out[M];
#pragma unroll
            for (u32 i = 0; i < M; i++) out[i] = from_lane_xor(state.out[g][i], mask);
            state.join(g, top, sum, out);
        }
}

// Joins the warps and writes heads `first ..`, `count` of them.
template <u32 D, u32 G>
DEVICE void write_heads(const Decode &a, const Running<G, Lay<D>::MINE> &state, u32 row, u32 first, u32 count) {
    SHARED(float, tops, 4 * G);
    SHARED(float, sums, 4 * G);
    SHARED(float, outs, 4 * G * D);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < Lay<D>::LANES) {
#pragma unroll
        for (u32 g = 0; g < G; g++) {
            tops[warp * G + g] = state.top[g];
            sums[warp * G + g] = state.sum[g];
#pragma unroll
            for (u32 i = 0; i < Lay<D>::MINE; i++)
                if (Lay<D>::has(i / VEC)) outs[(warp * G + g) * D + Lay<D>::column(i / VEC) + i % VEC] = state.out[g][i];
        }
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < count * D; at += 128) {
        u32 g = at / D, i = at % D;
        float highest = fmaxf(fmaxf(tops[g], tops[G + g]), fmaxf(tops[2 * G + g], tops[3 * G + g]));
        float sum = 0.0f, out = 0.0f;
#pragma unroll
        for (u32 from = 0; from < 4; from++) {
            float weight = exp2f(tops[from * G + g] - highest);
            sum += sums[from * G + g] * weight;
            out += outs[(from * G + g) * D + i] * weight;
        }
        u64 head = (u64)row * a.heads + first + g;
        if (gridDim.z == 1) {
            a.out[head * D + i] = to_element(out / sum);
            continue;
        }
        u64 split = head * gridDim.z + blockIdx.z;
        a.part[split * D + i] = out;
        if (i == 0) {
            a.stat[split * 2] = highest;
            a.stat[split * 2 + 1] = sum;
        }
    }
}

template <u32 D, u32 G> DEVICE void decode_attention(const Decode &a) {
    const u32 LANES = Lay<D>::LANES, RUNS = Lay<D>::RUNS, M = Lay<D>::MINE, AT_ONCE = 32 / LANES;
    let_next_start();
    u32 row = blockIdx.y;
    bool is_live = row < *a.n;
    Span span = span_of(a, is_live ? a.lens[row] : 0);
    wait_for_previous();
    if (!is_live) return;
    u32 group = a.heads / a.pages.kv_heads, runs = ceil_div(group, G);
    u32 kv_head = blockIdx.x / runs, first = kv_head * group + blockIdx.x % runs * G;
    u32 count = least(G, (kv_head + 1) * group - first);
    if (gridDim.z > 1 && span.begin >= span.end) {
        // Nothing to see: `combine` reads no `part` of it.
        if (threadIdx.x < count) {
            u64 split = ((u64)row * a.heads + first + threadIdx.x) * gridDim.z + blockIdx.z;
            a.stat[split * 2] = NO_SCORE;
            a.stat[split * 2 + 1] = 0.0f;
        }
        return;
    }
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float q[G][M];
#pragma unroll
    for (u32 g = 0; g < G; g++) {
        // Heads past the last are computed from it again and dropped.
        u64 head = (u64)row * (a.heads + 2 * a.pages.kv_heads) + first + least(g, count - 1);
        uint4 held[RUNS];
#pragma unroll
        for (u32 run = 0; run < RUNS; run++)
            held[run] = Lay<D>::has(run) ? load_vec(a.qkv + head * D + Lay<D>::column(run)) : zero_vec();
        widen_runs<RUNS>(q[g], held);
#pragma unroll
        for (u32 i = 0; i < M; i++) q[g][i] *= a.scale * 1.44269504f;
    }
    Running<G, M> state;
#pragma unroll
    for (u32 g = 0; g < G; g++) {
        state.top[g] = NO_SCORE;
        state.sum[g] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < M; i++) state.out[g][i] = 0.0f;
    }
    u64 to_value = value_offset(a.pages);
    for (u32 base = span.begin + warp * 4 * AT_ONCE; base < span.end; base += 16 * AT_ONCE) {
        uint4 keys[4][RUNS], values[4][RUNS];
        bool live[4];
#pragma unroll
        for (u32 u = 0; u < 4; u++) {
            u32 position = base + u * AT_ONCE + lane / LANES;
            live[u] = position < span.end;
            const T *key = key_at(a.pages, row, kv_head, least(position, span.end - 1));
#pragma unroll
            for (u32 run = 0; run < RUNS; run++) {
                const T *mine = key + Lay<D>::column(run);
                keys[u][run] = Lay<D>::has(run) ? load_once_written(mine) : zero_vec();
                values[u][run] = Lay<D>::has(run) ? load_once_written(mine + to_value) : zero_vec();
            }
        }
        attend<G, D>(a, state, q, keys, values, live);
    }
    join_groups<G, M, LANES>(state);
    write_heads<D, G>(a, state, row, first, count);
}

#define DECODE(name, width, most_heads, per_sm)                                                                                   \
    ENTRY(name, 128, per_sm, (const u32 *n, const T *qkv, T *kv, u64 page_stride, const u32 *block_tables, u32 max_blocks,        \
            const u32 *lens, T *out, float *part, float *stat, u32 heads, u32 kv_heads, u32 block_tokens, u32 window,             \
            float scale, float cap)) {                                                                                            \
        Decode a = {n, qkv, {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, width}, lens, out, part, stat,    \
                    heads, window, scale, cap * 1.44269504f};                                                                     \
        decode_attention<width, most_heads>(a);                                                                                   \
    }

DECODE(decode_attention_d32_g4, 32, 4, 3)
DECODE(decode_attention_d32_g8, 32, 8, 2)
DECODE(decode_attention_d64_g4, 64, 4, 4)
DECODE(decode_attention_d64_g8, 64, 8, 2)
DECODE(decode_attention_d96_g4, 96, 4, 3)
DECODE(decode_attention_d96_g8, 96, 8, 2)
DECODE(decode_attention_d128_g4, 128, 4, 4)
DECODE(decode_attention_d128_g8, 128, 8, 2)
DECODE(decode_attention_d256_g4, 256, 4, 2)

// A thread per element of a head.
template <u32 D> DEVICE void combine(const u32 *n, const float *part, const float *stat, T *out, u32 heads, u32 splits) {
    let_next_start();
    bool is_live = blockIdx.y < *n;
    wait_for_previous();
    if (!is_live) return;
    u64 head = (u64)blockIdx.y * heads + blockIdx.x;
    float highest = NO_SCORE, sum = 0.0f, total = 0.0f;
#pragma unroll 16
    for (u32 s = 0; s < splits; s++) highest = fmaxf(highest, stat[(head * splits + s) * 2]);
#pragma unroll 8
    for (u32 s = 0; s < splits; s++) {
        u64 split = head * splits + s;
        float weight = exp2f(stat[split * 2] - highest), own = stat[split * 2 + 1];
        sum += own * weight;
        // A split that saw nothing wrote no part.
        total += own > 0.0f ? part[split * D + threadIdx.x] * weight : 0.0f;
    }
    out[head * D + threadIdx.x] = to_element(total / sum);
}

#define COMBINE(name, width)                                                                                                      \
    ENTRY(name, width, 4, (const u32 *n, const float *part, const float *stat, T *out, u32 heads, u32 splits)) {                  \
        combine<width>(n, part, stat, out, heads, splits);                                                                        \
    }

COMBINE(combine_d32, 32)
COMBINE(combine_d64, 64)
COMBINE(combine_d96, 96)
COMBINE(combine_d128, 128)
COMBINE(combine_d256, 256)
