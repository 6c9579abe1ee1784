// Attention of chunks of many tokens over the pages of their rows, causal; a chunk may have one token.
//
// A tile is up to 64 (token, query head) pairs that share one key head, so a key is read once for the heads of a group and for the
// tokens of a tile. Keys and values come in runs of 32 positions. Scores are in units of log 2. The plain attention of the f32 unit is
// decode.cu's.

struct Prefill {
    const u32 *n;
    const u32 *tiles;
    const T *qkv;
    Pages pages;
    const u32 *row_starts;
    const u32 *lens;
    T *out;
    u32 heads;
    u32 window;
    float scale;
    float cap;
};

// A tile, as its block sees it.
struct Tile {
    u32 kv_head;
    u32 row;
    u32 token0;     // in qkv and out
    u32 tokens;     // live ones; none past the last tile
    u32 position0;  // of the first token
    u32 group;
};

// Blocks begin in the order of their numbers. Tiles that see more are listed later, and come first: were they the last,
// most of the device would wait for them. So do those of several key heads, side by side, but of no more than eight: the blocks of
// one head find its keys in the cache.
DEVICE Tile tile_of(const Prefill &a) {
    Tile t = {};
    u32 block = blockIdx.y * gridDim.x + blockIdx.x, head0 = block / (8 * gridDim.x) * 8;
    u32 together = least(8, gridDim.y - head0), place = block - head0 * gridDim.x, n = *a.n;
    if (place / together >= n) return t;
    t.kv_head = head0 + place % together;
    const u32 *tile = a.tiles + 2 * (n - 1 - place / together);
    u32 first = tile[1];
    t.row = tile[0];
    t.group = a.heads / a.pages.kv_heads;
    u32 start = a.row_starts[t.row], chunk = a.row_starts[t.row + 1] - start;
    t.tokens = first < chunk ? least(64 / t.group, chunk - first) : 0;
    t.token0 = start + first;
    t.position0 = a.lens[t.row] - chunk + first;
    return t;
}

#if PM_T == 0

// A warp per pair.
template <u32 D> DEVICE void prefill_attention(const Prefill &a) {
    let_next_start();
    wait_for_previous();
    Tile t = tile_of(a);
    for (u32 pair = threadIdx.x / 32; pair < t.tokens * t.group; pair += 4) {
        u32 token = t.token0 + pair / t.group, end = t.position0 + pair / t.group + 1, head = t.kv_head * t.group + pair % t.group;
        Span span = {a.window && end > a.window ? end - a.window : 0, end};
        Plain<D> state;
        state.see(a, t.row, t.kv_head, a.qkv + ((u64)token * (a.heads + 2 * a.pages.kv_heads) + head) * D, span);
#pragma unroll
        for (u32 j = 0; j < D / 32; j++)
            a.out[((u64)token * a.heads + head) * D + j * 32 + threadIdx.x % 32] = state.out[j] / state.sum;
    }
}

#else

// The first position that the tile's first token sees.
DEVICE u32 lowest_seen(const Prefill &a, const Tile &t) {
    return a.window && t.position0 + 1 > a.window ? t.position0 + 1 - a.window : 0;
}

// Whether every token of the tile sees all of the 32 positions from `base` on.
DEVICE bool all_see(const Prefill &a, const Tile &t, u32 base) {
    return base + 31 <= t.position0 && (a.window == 0 || base + a.window >= t.position0 + t.tokens);
}

DEVICE bool sees(const Prefill &a, u32 position, u32 other) {
    return other <= position && (a.window == 0 || other + a.window > position);
}

// Elements of a position in shared memory: whole lines of banks.
template <u32 D> struct Pitch {
    static const u32 OF = D == 96 ? 128 : D;
};

// A run of 32 positions in shared memory; the order of a row's 16-byte chunks, up to eight at a time, is turned by the number of
// the row (of the pair of rows, where a row is half a line of banks), against bank conflicts.
template <u32 D> DEVICE T *kv_chunk(T *run, u32 position, u32 column) {
    const u32 TURNED = D < 64 ? D / 8 : 8;
    u32 turn = position / (8 / TURNED);
    return run + position * Pitch<D>::OF + ((column & ~(TURNED - 1)) | ((column ^ turn) & (TURNED - 1))) * 8;
}

// Starts to copy the keys and values of positions `base .. base + 32`; those outside of the span become zeros. Sixteen positions from a
// multiple of that lie in one page.
template <u32 D> DEVICE void fetch_run(const Prefill &a, const Tile &t, T *keys, u32 base, Span span) {
    u64 to_value = value_offset(a.pages);
    const T *halves[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) halves[h] = key_at(a.pages, t.row, t.kv_head, least(base + 16 * h, (span.end - 1) / 16 * 16));
    // All addresses of the widest heads at once would not fit the registers.
#pragma unroll(4)
    for (u32 j = 0; j < D / 32; j++) {
        u32 i = threadIdx.x % 128 + 128 * j, position = i / (D / 8), column = i % (D / 8);
        bool live = base + position >= span.begin && base + position < span.end;
        const T *key = (position < 16 ? halves[0] : halves[1]) + position % 16 * D + column * 8;
        copy_async(kv_chunk<D>(keys, position, column), key, live);
        copy_async(kv_chunk<D>(keys + 32 * Pitch<D>::OF, position, column), key + to_value, live);
    }
}

// One warp's sixteen pairs. A thread has two rows of the matrices, `lane / 4` and eight further.
template <u32 D> struct Pairs {
    // Kept in registers where they suffice; wide heads are read again for each run.
    static const bool KEPT = D < 256;
    const T *from[2];
    u32 q[KEPT ? D / 16 : 1][4];
    u32 position[2];
    float top[2], sum[2], out[D / 8][4];

    METHOD void begin(const Prefill &a, const Tile &t) {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            u32 pair = threadIdx.x / 32 * 16 + lane / 4 + h * 8, token = pair / t.group;
            position[h] = t.position0 + token;
            top[h] = NO_SCORE;
            sum[h] = 0.0f;
            u32 head = t.kv_head * t.group + pair % t.group;
            // Pairs past the last are computed from the first token, and dropped.
            u64 at = (u64)(t.token0 + (token < t.tokens ? token : 0)) * (a.heads + 2 * a.pages.kv_heads) + head;
            from[h] = a.qkv + at * D + lane % 4 * 2;
        }
        if (KEPT) {
#pragma unroll
            for (u32 i = 0; i < D / 16; i++) read_query(q[KEPT ? i : 0], i);
        }
#pragma unroll
        for (u32 i = 0; i < D / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    }

    // Elements 16i .. 16i + 16 of the queries.
    METHOD void read_query(u32 (&to)[4], u32 i) const {
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            to[h] = *(const u32 *)(from[h] + i * 16);
            to[h + 2] = *(const u32 *)(from[h] + i * 16 + 8);
        }
    }

    // scores = q * keys, scaled.
    METHOD void score(const Prefill &a, T *keys, float (&scores)[4][4]) {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 i = 0; i < D / 16; i++) {
            if (!KEPT) read_query(q[0], i);
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 b[4];
                load_matrices(b, kv_chunk<D>(keys, j * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
                mma(scores[2 * j], q[KEPT ? i : 0], b[0], b[1]);
                mma(scores[2 * j + 1], q[KEPT ? i : 0], b[2], b[3]);
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                scores[j][i] *= a.scale * LOG2_E;
                if (a.cap != 0.0f) scores[j][i] = soft_cap(scores[j][i], a.cap);
            }
    }

    METHOD void mask(const Prefill &a, u32 base, float (&scores)[4][4]) const {
        u32 first = base + threadIdx.x % 4 * 2;
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                bool seen = sees(a, position[i / 2], first + j * 8 + i % 2);
                scores[j][i] = seen ? scores[j][i] : -INFINITY;
            }
    }

    // Turns scores into weights relative to the running maximum, which seldom rises.
    METHOD void soften(float (&scores)[4][4]) {
        float highest[2];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            highest[h] = top[h];
#pragma unroll
            for (u32 j = 0; j < 4; j++) highest[h] = fmaxf(highest[h], fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
            highest[h] = fmaxf(highest[h], from_lane_xor(highest[h], 1));
            highest[h] = fmaxf(highest[h], from_lane_xor(highest[h], 2));
        }
        if (lanes_where(highest[0] > top[0] || highest[1] > top[1])) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                float shrink = power_of_two(top[h] - highest[h]);
                top[h] = highest[h];
                sum[h] *= shrink;
#pragma unroll
                for (u32 i = 0; i < D / 8; i++) {
                    out[i][2 * h] *= shrink;
                    out[i][2 * h + 1] *= shrink;
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                scores[j][i] = power_of_two(scores[j][i] - top[i / 2]);
                sum[i / 2] += scores[j][i];
            }
    }

    // out += weights * values
    METHOD void mix(T *values, const float (&weights)[4][4]) {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const u32 w[4] = {to_elements(weights[2 * j][0], weights[2 * j][1]), to_elements(weights[2 * j][2], weights[2 * j][3]),
                              to_elements(weights[2 * j + 1][0], weights[2 * j + 1][1]),
                              to_elements(weights[2 * j + 1][2], weights[2 * j + 1][3])};
#pragma unroll
            for (u32 i = 0; i < D / 16; i++) {
                u32 b[4];
                load_matrices_transposed(b, kv_chunk<D>(values, j * 16 + lane % 16, i * 2 + lane / 16));
                mma(out[2 * i], w, b[0], b[1]);
                mma(out[2 * i + 1], w, b[2], b[3]);
            }
        }
    }

    METHOD void end(const Prefill &a, const Tile &t) {
        u32 lane = threadIdx.x % 32;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            // The four threads of a row each summed their own columns.
            float all = sum[h] + from_lane_xor(sum[h], 1);
            all += from_lane_xor(all, 2);
            u32 pair = threadIdx.x / 32 * 16 + lane / 4 + h * 8;
            if (pair / t.group >= t.tokens) continue;
            float share = reciprocal(all);
            u32 head = t.kv_head * t.group + pair % t.group;
            T *to = a.out + ((u64)(t.token0 + pair / t.group) * a.heads + head) * D;
#pragma unroll
            for (u32 i = 0; i < D / 8; i++)
                *(u32 *)(to + i * 8 + lane % 4 * 2) = to_finite(out[i][2 * h] * share, out[i][2 * h + 1] * share);
        }
    }
};

// `shared` holds two runs, each of keys and values.
template <u32 D> DEVICE void prefill_attention(const Prefill &a, T *shared) {
    const u32 RUN = 64 * Pitch<D>::OF;
    let_next_start();
    wait_for_previous();
    Tile t = tile_of(a);
    if (t.tokens == 0) return;
    Span span = {lowest_seen(a, t), t.position0 + t.tokens};
    u32 begin = span.begin / 16 * 16, slot = 0;
    fetch_run<D>(a, t, shared, begin, span);
    commit_copies();
    Pairs<D> pairs;
    pairs.begin(a, t);
    for (u32 base = begin; base < span.end; base += 32, slot ^= 1) {
        await_copies<0>();
        // Also: nobody reads the other slot any more.
        __syncthreads();
        if (base + 32 < span.end) fetch_run<D>(a, t, shared + (slot ^ 1) * RUN, base + 32, span);
        commit_copies();
        T *keys = shared + slot * RUN;
        float scores[4][4] = {};
        pairs.score(a, keys, scores);
        // Of most runs nothing is hidden.
        if (!all_see(a, t, base)) pairs.mask(a, base, scores);
        pairs.soften(scores);
        pairs.mix(keys + RUN / 2, scores);
    }
    pairs.end(a, t);
}

#endif

#if PM_T == 0
#define ATTEND(width) prefill_attention<width>(a)
#define ATTEND_LARGE(width) prefill_attention<width>(a)
#else
#define ATTEND(width)                                     \
    SHARED(T, shared, 2 * 64 * Pitch<width>::OF);         \
    prefill_attention<width>(a, shared)
#define ATTEND_LARGE(width)                               \
    DYNAMIC_SHARED(shared);                               \
    prefill_attention<width>(a, (T *)shared)
#endif

#define PREFILL(name, width, attend)                                                                                              \
    ENTRY(name, 128, PM_T == 0 ? 3 : 2, (const u32 *n, const u32 *tiles, const T *qkv, T *kv, u64 page_stride,                    \
            const u32 *block_tables, u32 max_blocks, const u32 *row_starts, const u32 *lens, T *out, u32 heads, u32 kv_heads,     \
            u32 block_tokens, u32 window, float scale, float cap)) {                                                              \
        Prefill a = {n, tiles, qkv, {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, width}, row_starts, lens, \
                     out, heads, window, scale, cap * LOG2_E};                                                                    \
        attend(width);                                                                                                            \
    }

PREFILL(prefill_attention_d32, 32, ATTEND)
PREFILL(prefill_attention_d64, 64, ATTEND)
PREFILL(prefill_attention_d96, 96, ATTEND)
PREFILL(prefill_attention_d128, 128, ATTEND)
PREFILL(prefill_attention_d256, 256, ATTEND_LARGE)

#undef ATTEND
#undef ATTEND_LARGE
