// Products of a weight with many rows.
//
// `gemm` serves any number of rows. For 16-bit types `gemm_m64` and `gemm_m128` are its larger twins, for large decode batches and for
// prefill, which cut k into runs where their tiles are too few for the device, and `gemm_m8`, `gemm_m16` and
// `gemm_m32` are for decode batches, where the reading of the weight is what takes time. The f32 unit is there for exact checks against
// the CPU, so its product is a plain one.
//
// `experts_m8` and `experts_m64` compute the products of all experts of a layer: their weights stand one below the other, and a block's
// rows are those of one expert. Which rows those are is known when the kernel before has ended, so they ask for nothing ahead of it.

#if PM_T == 0

// A tile of 64 rows by 64 columns; each thread has 8 by 4 of them.
DEVICE void gemm_plain(const Rows &rows, const T *w, u32 k, Epilogue e) {
    const u32 DEPTH = 16, PITCH = 65;
    SHARED(float, xs, 16 * 65);
    SHARED(float, ws, 16 * 65);
    let_next_start();
    wait_for_previous();
    u32 live = rows.end, row0 = rows.first, column0 = blockIdx.x * 64, n_out = e.n_out;
    if (row0 >= live) return;
    u32 column = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 8;
    float sums[8][4] = {};
    for (u32 base = 0; base < k; base += DEPTH) {
        for (u32 i = threadIdx.x; i < 64 * DEPTH; i += 128) {
            u32 line = i / DEPTH, at = base + i % DEPTH;
            bool inside = at < k;
            xs[i % DEPTH * PITCH + line] = inside && row0 + line < live ? rows.at(row0 + line, k)[at] : 0.0f;
            ws[i % DEPTH * PITCH + line] = inside && column0 + line < n_out ? w[(u64)(column0 + line) * k + at] : 0.0f;
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

ENTRY(gemm, 128, 3, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {
    Epilogue e = {y, bias, n_out, epilogue};
    gemm_plain(rows_from(x, blockIdx.y * 64, n), w, k, e);
}

ENTRY(experts_m64, 128, 3, (const u32 *tiles, const T *w, const u32 *numbers, const T *x, void *y, u32 k, u32 n_out, u32 epilogue)) {
    let_next_start();
    wait_for_previous();
    ExpertTile tile = expert_tile(tiles, blockIdx.y, x, numbers);
    Epilogue e = {y, 0, n_out, epilogue};
    gemm_plain(tile.rows, w + (u64)tile.expert * n_out * k, k, e);
}

#else

// M tokens by N columns of the weight, in warps of WM by WN; a ring of tiles in shared memory is filled ahead of use.
template <u32 M, u32 N, u32 WM, u32 WN, u32 STAGES, class R>
DEVICE void gemm_tile(T *shared, const Rows &rows, const T *w, u32 k, Epilogue e, R runs) {
    const u32 THREADS = M / WM * (N / WN) * 32, STAGE = (M + N) * 64;
    let_next_start();
    u32 live = rows.end, row0 = rows.first, column0 = tile_column() * N;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 wm = warp / (N / WN) * WM, wn = warp % (N / WN) * WN;
    u32 first = R::start(ceil_div(k, 64), blockIdx.z), tiles = R::start(ceil_div(k, 64), blockIdx.z + 1) - first;
    float sums[WM / 16][WN / 8][4] = {};
    // Weights are there before the kernel that makes x has ended. They belong to the first group of copies, all of them.
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++)
        if (row0 < live && s < tiles) fetch<N, THREADS>(shared + s * STAGE + M * 64, w, column0, e.n_out, (first + s) * 64, k);
    wait_for_previous();
    if (row0 >= live) return;
#pragma unroll
    for (u32 s = 0; s + 1 < STAGES; s++) {
        if (s < tiles) fetch<M, THREADS>(shared + s * STAGE, rows, (first + s) * 64, k);
        commit_copies();
    }
    for (u32 tile = 0; tile < tiles; tile++) {
        await_copies<STAGES - 2>();
        // Also: nobody reads the slot any more that is filled next.
        __syncthreads();
        u32 ahead = tile + STAGES - 1;
        if (ahead < tiles) {
            T *slot = shared + ahead % STAGES * STAGE;
            fetch<M, THREADS>(slot, rows, (first + ahead) * 64, k);
            fetch<N, THREADS>(slot + M * 64, w, column0, e.n_out, (first + ahead) * 64, k);
        }
        commit_copies();
        T *xs = shared + tile % STAGES * STAGE, *ws = xs + M * 64;
#pragma unroll
        for (u32 step = 0; step < 4; step++) {
            u32 a[WM / 16][4], b[WN / 16][4];
#pragma unroll
            for (u32 i = 0; i < WM / 16; i++)
                load_matrices(a[i], chunk(xs, wm + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (u32 j = 0; j < WN / 16; j++)
                load_matrices(b[j], chunk(ws, wn + j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (u32 i = 0; i < WM / 16; i++)
#pragma unroll
                for (u32 j = 0; j < WN / 16; j++) {
                    mma(sums[i][2 * j], a[i], b[j][0], b[j][1]);
                    mma(sums[i][2 * j + 1], a[i], b[j][2], b[j][3]);
                }
        }
    }
    if (!join_runs<THREADS / 32>(sums, runs)) return;
#pragma unroll
    for (u32 i = 0; i < WM / 16; i++)
#pragma unroll
        for (u32 j = 0; j < WN / 8; j++) {
            u32 row = row0 + wm + i * 16 + lane / 4, column = column0 + wn + j * 8 + lane % 4 * 2;
            if (row < live) finish(e, row, column, sums[i][j][0], sums[i][j][1]);
            if (row + 8 < live) finish(e, row + 8, column, sums[i][j][2], sums[i][j][3]);
        }
}

ENTRY(gemm, 128, 3, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {
    SHARED(T, shared, 3 * 128 * 64);
    Epilogue e = {y, bias, n_out, epilogue};
    gemm_tile<64, 64, 32, 32, 3>(shared, rows_from(x, tile_row() * 64, n), w, k, e, Whole());
}

ENTRY(experts_m64, 128, 3, (const u32 *tiles, const T *w, const u32 *numbers, const T *x, void *y, u32 k, u32 n_out, u32 epilogue)) {
    SHARED(T, shared, 3 * 128 * 64);
    let_next_start();
    wait_for_previous();
    ExpertTile tile = expert_tile(tiles, tile_row(), x, numbers);
    Epilogue e = {y, 0, n_out, epilogue};
    gemm_tile<64, 64, 32, 32, 3>(shared, tile.rows, w + (u64)tile.expert * n_out * k, k, e, Whole());
}

ENTRY(gemm_m64, 256, 2, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue,
        float *parts, u32 *counts)) {
    DYNAMIC_SHARED(shared);
    Epilogue e = {y, bias, n_out, epilogue};
    Runs runs = {parts, counts};
    gemm_tile<64, 128, 32, 32, 4>((T *)shared, rows_from(x, tile_row() * 64, n), w, k, e, runs);
}

ENTRY(gemm_m128, 256, 1, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue,
        float *parts, u32 *counts)) {
    DYNAMIC_SHARED(shared);
    Epilogue e = {y, bias, n_out, epilogue};
    Runs runs = {parts, counts};
    gemm_tile<128, 128, 64, 32, 3>((T *)shared, rows_from(x, tile_row() * 128, n), w, k, e, runs);
}

// 32 rows of the weight by 8 * NT tokens; the eight warps each take every eighth run of 64 elements of k.
//
// The weight goes from memory into registers and there into the matrix units as their left operand, 16 bytes per load. A
// load's four words are two products' words for the same thread: which elements of k the two products pair up
// differs from the layout that the instruction names, for both operands alike, and a sum does not mind.
template <u32 NT> DEVICE void gemm_few(const Rows &tokens, u32 row0, const T *w, u32 k, Epilogue e) {
    const u32 TOKENS = 8 * NT;
    SHARED(float, parts, 8 * 32 * TOKENS);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const T *rows[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) rows[i] = w + (u64)least(row0 + i * 8 + g, e.n_out - 1) * k;
    uint4 held[2][4];
    u32 at = warp * 64 + t * 8;
    let_next_start();
#pragma unroll
    for (u32 u = 0; u < 2; u++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) held[u][i] = at + u * 32 < k ? load_once(rows[i] + at + u * 32) : zero_vec();
    u32 live = least(tokens.end - tokens.first, TOKENS);
    wait_for_previous();
    if (live == 0) return;
    const T *xs[NT];
#pragma unroll
    // Tokens past the last are computed from it again and dropped.
    for (u32 j = 0; j < NT; j++) xs[j] = tokens.at(tokens.first + least(j * 8 + g, live - 1), k);
    float sums[2][NT][4] = {};
#pragma unroll(TURNS)
    for (u32 base = warp * 64; base < k; base += 512) {
#pragma unroll
        for (u32 u = 0; u < 2; u++) {
            uint4 now[4];
            u32 here = base + u * 32 + t * 8, next = here + 512;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                now[i] = held[u][i];
                held[u][i] = next < k ? load_once(rows[i] + next) : zero_vec();
            }
#pragma unroll
            for (u32 j = 0; j < NT; j++) {
                uint4 v = here < k ? load_vec(xs[j] + here) : zero_vec();
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const u32 first[4] = {now[2 * i].x, now[2 * i + 1].x, now[2 * i].y, now[2 * i + 1].y};
                    const u32 second[4] = {now[2 * i].z, now[2 * i + 1].z, now[2 * i].w, now[2 * i + 1].w};
                    mma(sums[i][j], first, v.x, v.y);
                    mma(sums[i][j], second, v.z, v.w);
                }
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
        finish(e, tokens.first + token, row0 + pair, even, odd);
    }
}

ENTRY(gemm_m8, 256, 2, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {
    Epilogue e = {y, bias, n_out, epilogue};
    gemm_few<1>(rows_from(x, 0, n), blockIdx.x * 32, w, k, e);
}

ENTRY(experts_m8, 256, 2, (const u32 *tiles, const T *w, const u32 *numbers, const T *x, void *y, u32 k, u32 n_out, u32 epilogue)) {
    let_next_start();
    wait_for_previous();
    ExpertTile tile = expert_tile(tiles, tile_row(), x, numbers);
    if (tile.rows.first == tile.rows.end) return;
    Epilogue e = {y, 0, n_out, epilogue};
    gemm_few<1>(tile.rows, tile_column() * 32, w + (u64)tile.expert * n_out * k, k, e);
}

ENTRY(gemm_m16, 256, 2, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {
    Epilogue e = {y, bias, n_out, epilogue};
    gemm_few<2>(rows_from(x, 0, n), blockIdx.x * 32, w, k, e);
}

ENTRY(gemm_m32, 256, 1, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {
    Epilogue e = {y, bias, n_out, epilogue};
    gemm_few<4>(rows_from(x, 0, n), blockIdx.x * 32, w, k, e);
}

#endif
