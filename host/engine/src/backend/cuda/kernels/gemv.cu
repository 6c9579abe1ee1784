// Products of a weight with one to four rows: bound by the reading of the weight.
//
// A warp computes R rows of the weight over all of k and keeps eight 16-byte loads per thread in flight, the first of
// them before it waits for the kernel that makes x. x is read through L1: with R rows per warp each of its bytes serves R
// products, so shared memory would save nothing but a few kilobytes of L1 traffic and cost a barrier.

template <u32 R, u32 U> struct Stream {
    const T *rows[R];
    uint4 held[U][R];
    u32 k;

    METHOD void load(u32 u, u32 at) {
#pragma unroll
        for (u32 r = 0; r < R; r++) held[u][r] = at < k ? load_once(rows[r] + at) : zero_vec();
    }
};

template <u32 B, u32 R> DEVICE void gemv(const u32 *n, const T *w, const T *x, u32 k, Epilogue e) {
    const u32 U = 8 / R, STEP = 32 * VEC;
    u32 lane = threadIdx.x % 32, first = (blockIdx.x * 4 + threadIdx.x / 32) * R;
    if (first >= e.n_out) return;
    Stream<R, U> stream;
    stream.k = k;
#pragma unroll
    for (u32 r = 0; r < R; r++) stream.rows[r] = w + (u64)least(first + r, e.n_out - 1) * k;
    let_next_start();
#pragma unroll
    for (u32 u = 0; u < U; u++) stream.load(u, lane * VEC + u * STEP);
    u32 live = least(*n, B);
    wait_for_previous();
    if (live == 0) return;
    float sums[R][B] = {};
#pragma unroll(TURNS)
    for (u32 base = lane * VEC; base < k; base += U * STEP) {
#pragma unroll
        for (u32 u = 0; u < U; u++) {
            u32 at = base + u * STEP;
            float wide[R][VEC];
#pragma unroll
            for (u32 r = 0; r < R; r++) widen(wide[r], stream.held[u][r]);
            stream.load(u, at + U * STEP);
            if (at >= k) continue;
#pragma unroll
            for (u32 b = 0; b < B; b++) {
                float v[VEC];
                widen(v, load_vec(x + (u64)least(b, live - 1) * k + at));
#pragma unroll
                for (u32 r = 0; r < R; r++)
#pragma unroll
                    for (u32 i = 0; i < VEC; i++) sums[r][b] += wide[r][i] * v[i];
            }
        }
    }
    // Each lane keeps its own pair, so that all finish at once.
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (u32 r = 0; r < R; r += 2)
#pragma unroll
        for (u32 b = 0; b < B; b++) {
            float one = warp_sum(sums[r][b]), other = warp_sum(sums[r + 1][b]);
            if (lane == r / 2 * B + b) even = one, odd = other;
        }
    if (lane < R / 2 * B && lane % B < live) finish(e, lane % B, first + lane / B * 2, even, odd);
}

#define GEMV(name, rows, per_warp, per_sm)                                                                                        \
    ENTRY(name, 128, per_sm, (const u32 *n, const T *w, const T *x, const T *bias, void *y, u32 k, u32 n_out, u32 epilogue)) {    \
        Epilogue e = {y, bias, n_out, epilogue};                                                                                  \
        gemv<rows, per_warp>(n, w, x, k, e);                                                                                      \
    }

GEMV(gemv_b1, 1, 2, 6)
GEMV(gemv_b2, 2, 2, 4)
GEMV(gemv_b4, 4, 4, 3)
