// Products of a weight in 8 bits with rows of T, those of experts too, and an embedding that is kept so.
//
// Two forms. Q8: whole numbers from -128 to 127 and a 16-bit scale for each 32 of them along k (GGML's Q8_0). Fp8: e4m3 floats and a
// float scale for each row. Either is widened in registers, by the same integer arithmetic on every generation: the
// instructions that convert e4m3 are younger than the oldest device that is served, and no faster than this.
//
// Of each 16 bytes of a row, word t holds elements 2t, 2t+1, 2t+8 and 2t+9: what thread t of four wants of a matrix unit's 16.

struct Quantised {
    const u8 *w;
    const void *scales;
    u32 k;
    u32 n_out;
    // Rows of other matrices that stand above its own.
    u32 above;
};

struct Q8 {
    // The numbers are kept with 128 added.
    METHOD static void widen(float (&to)[4], u32 bytes) {
#pragma unroll
        // 2^23 + byte: the byte is the end of its fraction.
        for (u32 i = 0; i < 4; i++) to[i] = __uint_as_float(pick_bytes(bytes, 0x4b000000, 0x7440 | i)) - 8388736.0f;
    }

    // Of the 32 elements that hold `at` of a row, counted from above, as it is stored.
    METHOD static u16 stored_scale(const Quantised &q, u32 row, u32 at) { return ((const u16 *)q.scales)[(u64)row * (q.k / 32) + at / 32]; }
    METHOD static float scale(u16 stored) { return f16_to_float(stored); }
    METHOD static float row_scale(const Quantised &, u32) { return 1.0f; }

    // Elements 2t, 2t+1 and 2t+8, 2t+9 as T, scaled and rounded.
#if PM_T != 0
    METHOD static void narrow(u32 (&to)[2], u32 bytes, float scale) {
        float v[4];
#pragma unroll
        // 2^15 + byte has few enough digits for all of this to be exact: a scale has eleven.
        for (u32 i = 0; i < 4; i++) v[i] = fmaf(__uint_as_float(pick_bytes(bytes, 0x47000000, 0x7404 | i << 4)), scale, -32896.0f * scale);
        to[0] = to_elements(v[0], v[1]);
        to[1] = to_elements(v[2], v[3]);
    }
#endif
};

struct Fp8 {
    // Two f16, each 1/256 of its number: the same bits under an exponent whose zero lies 8 further. The scale makes up for it.
    METHOD static void halves(u32 (&to)[2], u32 bytes) {
        u32 low = pick_bytes(bytes, 0, 0x1404), high = pick_bytes(bytes, 0, 0x3424);
        to[0] = (low & 0x80008000) | (low & 0x7f007f00) >> 1;
        to[1] = (high & 0x80008000) | (high & 0x7f007f00) >> 1;
    }

    METHOD static void widen(float (&to)[4], u32 bytes) {
        u32 pairs[2];
        halves(pairs, bytes);
#pragma unroll
        for (u32 i = 0; i < 4; i++) to[i] = f16_to_float((u16)(pairs[i / 2] >> i % 2 * 16));
    }

    METHOD static u16 stored_scale(const Quantised &, u32, u32) { return 0; }
    METHOD static float scale(u16) { return 1.0f; }
    METHOD static float row_scale(const Quantised &q, u32 row) { return ((const float *)q.scales)[q.above + least(row, q.n_out - 1)]; }

#if PM_T == 1
    METHOD static void narrow(u32 (&to)[2], u32 bytes, float) { halves(to, bytes); }
#elif PM_T == 2
    METHOD static void narrow(u32 (&to)[2], u32 bytes, float) {
        float v[4];
        widen(v, bytes);
        to[0] = to_elements(v[0], v[1]);
        to[1] = to_elements(v[2], v[3]);
    }
#endif
};

// One element of a row.
template <class W> DEVICE float element_of(const Quantised &q, u32 row, u32 at) {
    float v[4];
    W::widen(v, *(const u32 *)(q.w + (u64)(q.above + row) * q.k + at / 16 * 16 + at % 8 / 2 * 4));
    float scale = W::scale(W::stored_scale(q, q.above + row, at)) * W::row_scale(q, row);
    return (at % 16 < 8 ? (at % 2 ? v[1] : v[0]) : (at % 2 ? v[3] : v[2])) * scale;
}

template <class W> DEVICE void embed_quantised(const u32 *n, const u32 *tokens, const Quantised &table, float *x, float scale) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    for (u32 i = threadIdx.x; i < table.k; i += 256) x[(u64)row * table.k + i] = element_of<W>(table, tokens[row], i) * scale;
}

// As in gemv.cu: a warp computes R rows and keeps eight 16-byte loads per thread in flight.
template <class W, u32 R, u32 U> struct QuantisedStream {
    Quantised q;
    // Counted from above.
    u32 rows[R];
    uint4 held[U][R];
    u16 scales[U][R];

    METHOD void load(u32 u, u32 at) {
        bool live = at < q.k;
#pragma unroll
        for (u32 r = 0; r < R; r++) {
            held[u][r] = live ? load_once(q.w + (u64)rows[r] * q.k + at) : zero_vec();
            scales[u][r] = live ? W::stored_scale(q, rows[r], at) : (u16)0;
        }
    }
};

// The sixteen elements behind `from`, in the order of the bytes that they meet.
DEVICE void load_sixteen(float (&to)[16], const T *from) {
#pragma unroll
    for (u32 i = 0; i < 16; i += VEC) {
        float v[VEC];
        widen(v, load_vec(from + i));
#pragma unroll
        for (u32 j = 0; j < VEC; j++) to[(i + j) % 8 / 2 * 4 + (i + j) / 8 * 2 + j % 2] = v[j];
    }
}

template <class W, u32 B> DEVICE void gemv_quantised(const u32 *n, const Quantised &q, const T *x, Epilogue e) {
    const u32 R = 2, U = 4, STEP = 32 * 16;
    u32 lane = threadIdx.x % 32, first = (blockIdx.x * 4 + threadIdx.x / 32) * R;
    if (first >= q.n_out) return;
    QuantisedStream<W, R, U> stream;
    stream.q = q;
#pragma unroll
    for (u32 r = 0; r < R; r++) stream.rows[r] = least(first + r, q.n_out - 1);
    let_next_start();
#pragma unroll
    for (u32 u = 0; u < U; u++) stream.load(u, lane * 16 + u * STEP);
    u32 live = least(*n, B);
    wait_for_previous();
    if (live == 0) return;
    float sums[R][B] = {};
#pragma unroll(TURNS)
    for (u32 base = lane * 16; base < q.k; base += U * STEP) {
#pragma unroll
        for (u32 u = 0; u < U; u++) {
            u32 at = base + u * STEP;
            float wide[R][4][4], scale[R];
#pragma unroll
            for (u32 r = 0; r < R; r++) {
                const u32 words[4] = {stream.held[u][r].x, stream.held[u][r].y, stream.held[u][r].z, stream.held[u][r].w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) W::widen(wide[r][i], words[i]);
                scale[r] = W::scale(stream.scales[u][r]);
            }
            stream.load(u, at + U * STEP);
            if (at >= q.k) continue;
#pragma unroll
            for (u32 b = 0; b < B; b++) {
                float v[16];
                load_sixteen(v, x + (u64)least(b, live - 1) * q.k + at);
#pragma unroll
                for (u32 r = 0; r < R; r++) {
                    float sum = 0.0f;
#pragma unroll
                    for (u32 i = 0; i < 16; i++) sum += wide[r][i / 4][i % 4] * v[i];
                    sums[r][b] += sum * scale[r];
                }
            }
        }
    }
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (u32 b = 0; b < B; b++) {
        float one = warp_sum(sums[0][b]), other = warp_sum(sums[1][b]);
        if (lane == b) even = one, odd = other;
    }
    if (lane < live) finish(e, lane, first, even * W::row_scale(q, first), odd * W::row_scale(q, first + 1));
}

#if PM_T == 0

// As gemm.cu's: a tile of 64 rows by 64 columns; each thread has 8 by 4 of them.
template <class W> DEVICE void gemm_quantised(const Rows &rows, const Quantised &q, Epilogue e) {
    const u32 DEPTH = 16, PITCH = 65;
    SHARED(float, xs, 16 * 65);
    SHARED(float, ws, 16 * 65);
    let_next_start();
    wait_for_previous();
    u32 live = rows.end, row0 = rows.first, column0 = blockIdx.x * 64;
    if (row0 >= live) return;
    u32 column = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 8;
    float sums[8][4] = {};
    for (u32 base = 0; base < q.k; base += DEPTH) {
        for (u32 i = threadIdx.x; i < 64 * DEPTH; i += 128) {
            u32 line = i / DEPTH, at = base + i % DEPTH;
            xs[i % DEPTH * PITCH + line] = row0 + line < live ? rows.at(row0 + line, q.k)[at] : 0.0f;
            ws[i % DEPTH * PITCH + line] = column0 + line < q.n_out ? element_of<W>(q, column0 + line, at) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (u32 step = 0; step < DEPTH; step++)
#pragma unroll
            for (u32 i = 0; i < 8; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) sums[i][j] += xs[step * PITCH + row + i] * ws[step * PITCH + column + j];
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (row0 + row + i >= live) continue;
        finish(e, row0 + row + i, column0 + column, sums[i][0], sums[i][1]);
        finish(e, row0 + row + i, column0 + column + 2, sums[i][2], sums[i][3]);
    }
}

#else

// A tile of bytes has 64 elements of k per row: four 16-byte chunks, turned by the number of the pair of rows.
DEVICE u8 *byte_chunk(u8 *tile, u32 row, u32 column) { return tile + row * 64 + ((column ^ row / 2) & 3) * 16; }

template <u32 ROWS, u32 THREADS> DEVICE void fetch_bytes(u8 *tile, const Quantised &q, u32 first, u32 at) {
    u32 row = threadIdx.x / 4, column = threadIdx.x % 4;
    bool inside = at + column * 16 < q.k;
    u8 *to = byte_chunk(tile, row, column);
    const u8 *from = q.w + (u64)(q.above + first + row) * q.k + at + column * 16;
#pragma unroll
    for (u32 i = 0; i < ROWS; i += THREADS / 4) copy_async(to + i * 64, from + (u64)i * q.k, inside && first + row + i < q.n_out);
}

// The scales that this thread brings for a tile: each of one column, for the first 32 or the last 32 elements of k. Zero past either end.
template <class W, u32 N, u32 THREADS> DEVICE void tile_scales(float (&to)[2 * N / THREADS], const Quantised &q, u32 column0, u32 at) {
#pragma unroll
    for (u32 i = 0; i < 2 * N / THREADS; i++) {
        u32 place = threadIdx.x + i * THREADS, column = column0 + place % N, from = at + place / N * 32;
        to[i] = column < q.n_out && from < q.k ? W::scale(W::stored_scale(q, q.above + column, from)) : 0.0f;
    }
}

template <u32 SCALES, u32 THREADS> DEVICE void put_scales(u8 *slot, const float (&scales)[SCALES]) {
#pragma unroll
    for (u32 i = 0; i < SCALES; i++) ((float *)slot)[threadIdx.x + i * THREADS] = scales[i];
}

// M tokens by N columns, in warps of WM by 32: gemm.cu's ring of tiles, with the weight in bytes and its scales beside it.
template <class W, u32 M, u32 N, u32 WM, u32 STAGES, class R>
DEVICE void gemm_quantised(u8 *shared, const Rows &rows, const Quantised &q, Epilogue e, R runs) {
    const u32 THREADS = M / WM * (N / 32) * 32, STAGE = M * 128 + N * 64 + N * 8, SCALES = 2 * N / THREADS;
    static_assert(SCALES * THREADS == 2 * N, "as many scales for each thread");
    let_next_start();
    u32 live = rows.end, row0 = rows.first, column0 = tile_column() * N;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 wm = warp / (N / 32) * WM, wn = warp % (N / 32) * 32;
    u32 first = R::start(ceil_div(q.k, 64), blockIdx.z), tiles = R::start(ceil_div(q.k, 64), blockIdx.z + 1) - first;
    float sums[WM / 16][4][4] = {};
    // As in gemm.cu, the weight comes before the kernel that makes x has ended.
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++) {
        u8 *slot = shared + s * STAGE + M * 128;
        if (row0 >= live) continue;
        if (s < tiles) fetch_bytes<N, THREADS>(slot, q, column0, (first + s) * 64);
        float scales[SCALES];
        tile_scales<W, N, THREADS>(scales, q, column0, (first + s) * 64);
        put_scales<SCALES, THREADS>(slot + N * 64, scales);
    }
    wait_for_previous();
    if (row0 >= live) return;
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (s < tiles) fetch<M, THREADS>((T *)(shared + s * STAGE), rows, (first + s) * 64, q.k);
        commit_copies();
    }
    for (u32 tile = 0; tile < tiles; tile++) {
        await_copies<STAGES - 2>();
        // Also: nobody reads the slot any more that is filled next.
        __syncthreads();
        u32 ahead = tile + STAGES - 1;
        u8 *next = shared + ahead % STAGES * STAGE;
        if (ahead < tiles) {
            fetch<M, THREADS>((T *)next, rows, (first + ahead) * 64, q.k);
            fetch_bytes<N, THREADS>(next + M * 128, q, column0, (first + ahead) * 64);
        }
        commit_copies();
        float next_scales[SCALES];
        tile_scales<W, N, THREADS>(next_scales, q, column0, (first + ahead) * 64);
        u8 *slot = shared + tile % STAGES * STAGE;
        const float *scales = (const float *)(slot + M * 128 + N * 64) + wn + lane / 4;
#pragma unroll
        for (u32 step = 0; step < 4; step++) {
            u32 a[WM / 16][4], b[4];
#pragma unroll
            for (u32 i = 0; i < WM / 16; i++) load_matrices(a[i], chunk((T *)slot, wm + i * 16 + lane % 16, step * 2 + lane / 16));
            // Sixteen bytes of each of the warp's 32 columns: a word is one thread's part of eight of them.
            load_matrices(b, byte_chunk(slot + M * 128, wn + lane, step));
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 pairs[2];
                W::narrow(pairs, b[j], scales[step / 2 * N + j * 8]);
#pragma unroll
                for (u32 i = 0; i < WM / 16; i++) mma(sums[i][j], a[i], pairs[0], pairs[1]);
            }
        }
        // Read after as many barriers as there are stages ahead; nobody read it since the last one.
        put_scales<SCALES, THREADS>(next + M * 128 + N * 64, next_scales);
    }
    if (!join_runs<THREADS / 32>(sums, runs)) return;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        u32 column = column0 + wn + j * 8 + lane % 4 * 2;
        float even = W::row_scale(q, column), odd = W::row_scale(q, column + 1);
#pragma unroll
        for (u32 i = 0; i < WM / 16; i++) {
            u32 row = row0 + wm + i * 16 + lane / 4;
            if (row < live) finish(e, row, column, sums[i][j][0] * even, sums[i][j][1] * odd);
            if (row + 8 < live) finish(e, row + 8, column, sums[i][j][2] * even, sums[i][j][3] * odd);
        }
    }
}

// gemm.cu's `gemm_few`: 32 rows of the weight by 8 * NT tokens, straight from memory into the left operand; the eight warps each
// take every eighth run of 128 elements of k.
template <class W, u32 NT> DEVICE void gemm_few_quantised(const Rows &tokens, u32 row0, const Quantised &q, Epilogue e) {
    const u32 TOKENS = 8 * NT;
    SHARED(float, parts, 8 * 32 * TOKENS);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    QuantisedStream<W, 4, 2> stream;
    stream.q = q;
#pragma unroll
    for (u32 i = 0; i < 4; i++) stream.rows[i] = q.above + least(row0 + i * 8 + g, q.n_out - 1);
    let_next_start();
#pragma unroll
    for (u32 u = 0; u < 2; u++) stream.load(u, warp * 128 + u * 64 + t * 16);
    u32 live = least(tokens.end - tokens.first, TOKENS);
    wait_for_previous();
    if (live == 0) return;
    u32 numbers[NT];
#pragma unroll
    // Tokens past the last are computed from it again and dropped.
    for (u32 j = 0; j < NT; j++) numbers[j] = tokens.number(tokens.first + least(j * 8 + g, live - 1));
    float sums[2][NT][4] = {};
#pragma unroll(TURNS)
    for (u32 base = warp * 128; base < q.k; base += 1024) {
#pragma unroll
        for (u32 u = 0; u < 2; u++) {
            u32 at = base + u * 64 + t * 16, words[4][4];
            u32 v[NT][8];
#pragma unroll
            for (u32 j = 0; j < NT; j++) {
                const T *from = tokens.x + (u64)numbers[j] * q.k + at;
                uint4 low = at < q.k ? load_vec(from) : zero_vec(), high = at < q.k ? load_vec(from + 8) : zero_vec();
                v[j][0] = low.x, v[j][1] = low.y, v[j][2] = low.z, v[j][3] = low.w;
                v[j][4] = high.x, v[j][5] = high.y, v[j][6] = high.z, v[j][7] = high.w;
            }
            float scale[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                words[i][0] = stream.held[u][i].x;
                words[i][1] = stream.held[u][i].y;
                words[i][2] = stream.held[u][i].z;
                words[i][3] = stream.held[u][i].w;
                scale[i] = W::scale(stream.scales[u][i]);
            }
            stream.load(u, at + 1024);
#pragma unroll
            for (u32 word = 0; word < 4; word++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 above[2], below[2];
                    W::narrow(above, words[2 * i][word], scale[2 * i]);
                    W::narrow(below, words[2 * i + 1][word], scale[2 * i + 1]);
                    const u32 a[4] = {above[0], below[0], above[1], below[1]};
#pragma unroll
                    for (u32 j = 0; j < NT; j++) mma(sums[i][j], a, v[j][word], v[j][word + 4]);
                }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < NT; j++) {
            float *to = parts + (warp * TOKENS + j * 8 + 2 * t) * 32 + i * 16 + g;
            to[0] = sums[i][j][0];
            to[32] = sums[i][j][1];
            to[8] = sums[i][j][2];
            to[40] = sums[i][j][3];
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 16 * live; i += 256) {
        u32 token = i / 16, pair = i % 16 * 2;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (u32 from = 0; from < 8; from++) {
            even += parts[(from * TOKENS + token) * 32 + pair];
            odd += parts[(from * TOKENS + token) * 32 + pair + 1];
        }
        finish(e, tokens.first + token, row0 + pair, even * W::row_scale(q, row0 + pair), odd * W::row_scale(q, row0 + pair + 1));
    }
}

#endif

#define PRODUCT(name, threads, per_sm, ...)                                                                                      \
    ENTRY(name, threads, per_sm, (const u32 *n, const u8 *w, const void *scales, const T *x, const T *bias, void *y, u32 k,       \
            u32 n_out, u32 epilogue)) {                                                                                           \
        Quantised q = {w, scales, k, n_out, 0};                                                                                      \
        Epilogue e = {y, bias, n_out, epilogue};                                                                                  \
        __VA_ARGS__;                                                                                                              \
    }

// One of the experts' products. A block without rows asks for nothing.
#define EXPERTS(name, threads, per_sm, number, ...)                                                                              \
    ENTRY(name, threads, per_sm, (const u32 *tiles, const u8 *w, const void *scales, const u32 *numbers, const T *x, void *y,     \
            u32 k, u32 n_out, u32 epilogue)) {                                                                                    \
        let_next_start();                                                                                                         \
        wait_for_previous();                                                                                                      \
        ExpertTile tile = expert_tile(tiles, number, x, numbers);                                                                 \
        if (tile.rows.first == tile.rows.end) return;                                                                             \
        Quantised q = {w, scales, k, n_out, tile.expert * n_out};                                                                 \
        Epilogue e = {y, 0, n_out, epilogue};                                                                                     \
        __VA_ARGS__;                                                                                                              \
    }

// One that may be cut into runs of k.
#define CUT_PRODUCT(name, threads, per_sm, ...)                                                                                  \
    ENTRY(name, threads, per_sm, (const u32 *n, const u8 *w, const void *scales, const T *x, const T *bias, void *y, u32 k,       \
            u32 n_out, u32 epilogue, float *parts, u32 *counts)) {                                                                \
        DYNAMIC_SHARED(shared);                                                                                                   \
        Quantised q = {w, scales, k, n_out, 0};                                                                                      \
        Epilogue e = {y, bias, n_out, epilogue};                                                                                  \
        Runs runs = {parts, counts};                                                                                              \
        __VA_ARGS__;                                                                                                              \
    }

#define EMBED(name, W)                                                                                                            \
    ENTRY(name, 256, 4, (const u32 *n, const u32 *tokens, const u8 *table, const void *scales, float *x, u32 hidden,             \
            float scale)) {                                                                                                       \
        Quantised q = {table, scales, hidden, 0xffffffff, 0};                                                                                 \
        embed_quantised<W>(n, tokens, q, x, scale);                                                                               \
    }

EMBED(embed_q8, Q8)
EMBED(embed_fp8, Fp8)
PRODUCT(gemv_b1_q8, 128, 4, gemv_quantised<Q8, 1>(n, q, x, e))
PRODUCT(gemv_b1_fp8, 128, 4, gemv_quantised<Fp8, 1>(n, q, x, e))

#if PM_T == 0

PRODUCT(gemv_b2_q8, 128, 3, gemv_quantised<Q8, 2>(n, q, x, e))
PRODUCT(gemv_b2_fp8, 128, 3, gemv_quantised<Fp8, 2>(n, q, x, e))
PRODUCT(gemm_q8, 128, 3, gemm_quantised<Q8>(rows_from(x, blockIdx.y * 64, n), q, e))
PRODUCT(gemm_fp8, 128, 3, gemm_quantised<Fp8>(rows_from(x, blockIdx.y * 64, n), q, e))
EXPERTS(experts_m64_q8, 128, 3, blockIdx.y, gemm_quantised<Q8>(tile.rows, q, e))
EXPERTS(experts_m64_fp8, 128, 3, blockIdx.y, gemm_quantised<Fp8>(tile.rows, q, e))

#else

PRODUCT(gemv_b2_q8, 128, 4, gemv_quantised<Q8, 2>(n, q, x, e))
PRODUCT(gemv_b2_fp8, 128, 4, gemv_quantised<Fp8, 2>(n, q, x, e))
PRODUCT(gemm_m8_q8, 256, 2, gemm_few_quantised<Q8, 1>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_m8_fp8, 256, 2, gemm_few_quantised<Fp8, 1>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_m16_q8, 256, 1, gemm_few_quantised<Q8, 2>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_m16_fp8, 256, 1, gemm_few_quantised<Fp8, 2>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_m32_q8, 256, 1, gemm_few_quantised<Q8, 4>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_m32_fp8, 256, 1, gemm_few_quantised<Fp8, 4>(rows_from(x, 0, n), blockIdx.x * 32, q, e))
PRODUCT(gemm_q8, 128, 3, SHARED(u8, shared, 3 * 64 * 200); gemm_quantised<Q8, 64, 64, 32, 3>(shared, rows_from(x, tile_row() * 64, n), q, e, Whole()))
PRODUCT(gemm_fp8, 128, 3, SHARED(u8, shared, 3 * 64 * 200); gemm_quantised<Fp8, 64, 64, 32, 3>(shared, rows_from(x, tile_row() * 64, n), q, e, Whole()))
EXPERTS(experts_m8_q8, 256, 1, tile_row(), gemm_few_quantised<Q8, 1>(tile.rows, tile_column() * 32, q, e))
EXPERTS(experts_m8_fp8, 256, 1, tile_row(), gemm_few_quantised<Fp8, 1>(tile.rows, tile_column() * 32, q, e))
EXPERTS(experts_m64_q8, 128, 3, tile_row(),
        SHARED(u8, shared, 3 * 64 * 200); gemm_quantised<Q8, 64, 64, 32, 3>(shared, tile.rows, q, e, Whole()))
EXPERTS(experts_m64_fp8, 128, 3, tile_row(),
        SHARED(u8, shared, 3 * 64 * 200); gemm_quantised<Fp8, 64, 64, 32, 3>(shared, tile.rows, q, e, Whole()))
CUT_PRODUCT(gemm_m64_q8, 128, 3, gemm_quantised<Q8, 64, 128, 64, 4>(shared, rows_from(x, tile_row() * 64, n), q, e, runs))
CUT_PRODUCT(gemm_m64_fp8, 128, 3, gemm_quantised<Fp8, 64, 128, 64, 4>(shared, rows_from(x, tile_row() * 64, n), q, e, runs))
CUT_PRODUCT(gemm_m128_q8, 256, 1, gemm_quantised<Q8, 128, 128, 64, 3>(shared, rows_from(x, tile_row() * 128, n), q, e, runs))
CUT_PRODUCT(gemm_m128_fp8, 256, 1, gemm_quantised<Fp8, 128, 128, 64, 3>(shared, rows_from(x, tile_row() * 128, n), q, e, runs))

#endif
