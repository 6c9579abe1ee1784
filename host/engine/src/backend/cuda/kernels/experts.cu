// Which experts a token goes through, whose rows a product has, and what becomes of their results.

static const u32 MOST_EXPERTS = 512;

// What a token's lane found: in the order of choice, an expert for each of the first lanes, and its part in the result.
struct Choice {
    u32 expert;
    float share;
};

// The best `chosen` of `count` experts, of equals the one with the lower number, for a warp whose lanes have EACH of them. A logit that is
// no number comes last.
template <u32 EACH> DEVICE Choice choose(const float *logits, u32 count, u32 chosen, bool normalised) {
    u32 lane = threadIdx.x % 32, keys[EACH];
    float own[EACH], max = -INFINITY, total = 0.0f;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) own[j] = lane + 32 * j < count ? logits[lane + 32 * j] : -INFINITY;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
        own[j] = own[j] == own[j] ? own[j] : -INFINITY;
        // More than 0, which is of an expert that is not there, or chosen already.
        keys[j] = lane + 32 * j < count ? ordered_bits(own[j]) : 0;
        max = fmaxf(max, own[j]);
    }
    max = warp_max(max);
#pragma unroll
    for (u32 j = 0; j < EACH; j++) total += expf(own[j] - max);
    Choice choice = {0, 0.0f};
    for (u32 i = 0; i < chosen; i++) {
        u32 best = 0, expert = 0;
#pragma unroll
        for (u32 j = 0; j < EACH; j++)
            if (keys[j] > best) best = keys[j], expert = lane + 32 * j;
        u32 key = most_of_lanes(best);
        expert = least_of_lanes(best == key ? expert : ~0u);
#pragma unroll
        for (u32 j = 0; j < EACH; j++)
            if (lane + 32 * j == expert) keys[j] = 0;
        if (lane == i) choice.expert = expert, choice.share = expf(ordered_float(key) - max);
    }
    float sum = warp_sum(choice.share);
    choice.share /= normalised ? sum : warp_sum(total);
    return choice;
}

// The sum of what the threads before this one have, of a block of a thread for each expert that there may be.
DEVICE u64 sum_before(u64 own) {
    SHARED(u64, sums, MOST_EXPERTS / 32);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 upto = own;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u64 other = from_lane(upto, (int)((lane - step) & 31));
        if (lane >= step) upto += other;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    u64 before = upto - own;
#pragma unroll
    for (u32 i = 0; i < MOST_EXPERTS / 32; i++) before += i < warp ? sums[i] : 0;
    return before;
}

// A warp's run of rows, and how many rows of each expert come before those of it that are still to be listed.
struct Run {
    u32 begin, end;
    u32 *before;
};

// Calls `f` with each row of a run, its expert, and how many rows come before it, for a warp.
template <class F> DEVICE void each_row(const Run &run, const u32 *experts, F f) {
    u32 lane = threadIdx.x % 32;
    for (u32 first = run.begin; first < run.end; first += 32) {
        u32 row = first + lane;
        bool is_row = row < run.end;
        u32 expert = is_row ? experts[row] : MOST_EXPERTS, alike = lanes_alike(expert), before = is_row ? run.before[expert] : 0;
        if (is_row) f(row, expert, before + count_bits(alike & ((1u << lane) - 1)));
        sync_warp();
        if (is_row && lowest_bit(alike) == lane) run.before[expert] = before + count_bits(alike);
        sync_warp();
    }
}

// From the expert that each row goes through to its place among all of them, by a block of a thread for each expert that there may be.
// Rows of an expert stand side by side, in their order.
DEVICE void list_rows(u32 *tiles, u32 *tokens, u32 *places, u32 rows, u32 chosen, u32 tile_rows) {
    const u32 WARPS = MOST_EXPERTS / 32;
    SHARED(u32, before, WARPS * MOST_EXPERTS);
    SHARED(u32, starts, MOST_EXPERTS);
    u32 warp = threadIdx.x / 32, length = ceil_div(rows, WARPS);
    Run run = {least(warp * length, rows), least((warp + 1) * length, rows), before + warp * MOST_EXPERTS};
    for (u32 i = threadIdx.x % 32; i < MOST_EXPERTS; i += 32) run.before[i] = 0;
    sync_warp();
    each_row(run, places, [](u32, u32, u32) {});
    __syncthreads();
    u32 size = 0, *of_warp = before + threadIdx.x;
    for (u32 i = 0; i < WARPS; i++, of_warp += MOST_EXPERTS) {
        u32 here = *of_warp;
        *of_warp = size;
        size += here;
    }
    u32 n_tiles = ceil_div(size, tile_rows);
    u64 sums = sum_before((u64)n_tiles << 32 | size);
    u32 start = (u32)sums, first_tile = (u32)(sums >> 32), *to = tiles + 1 + 3 * first_tile;
    starts[threadIdx.x] = start;
    if (threadIdx.x == MOST_EXPERTS - 1) *tiles = first_tile + n_tiles;
    __syncthreads();
    for (u32 first = 0; first < size; first += tile_rows, to += 3) {
        to[0] = threadIdx.x, to[1] = start + first, to[2] = start + least(first + tile_rows, size);
    }
    each_row(run, places, [=](u32 row, u32 expert, u32 before) {
        u32 place = starts[expert] + before;
        places[row] = place;
        tokens[place] = row / chosen;
    });
}

// A token for each warp; the block of the warp that ends last lists the rows of all.
ENTRY(choose_experts, 512, 1, (const u32 *n, const float *logits, u32 *tiles, u32 *tokens, u32 *places, float *shares, u32 count,
        u32 chosen, u32 normalised, u32 tile_rows, u32 *ended)) {
    SHARED(u32, is_last, 1);
    let_next_start();
    // Before its warp says that it has ended, and so before the last one does.
    if (threadIdx.x == 0) *is_last = 0;
    wait_for_previous();
    u32 live = *n, lane = threadIdx.x % 32, token = blockIdx.x * 16 + threadIdx.x / 32;
    if (token < live) {
        const float *own = logits + (u64)token * count;
        Choice choice = count > 128 ? choose<MOST_EXPERTS / 32>(own, count, chosen, normalised) : choose<4>(own, count, chosen, normalised);
        if (lane < chosen) places[token * chosen + lane] = choice.expert, shares[token * chosen + lane] = choice.share;
    }
    if (is_last_warp(ended, gridDim.x * 16) && lane == 0) *is_last = 1;
    __syncthreads();
    if (*is_last) list_rows(tiles, tokens, places, live * chosen, chosen, tile_rows);
}

// x += the results of a token's experts, each times its share
ENTRY(add_experts, 256, 8, (const u32 *n, const float *results, const u32 *places, const float *shares, float *x, u32 hidden,
        u32 chosen)) {
    let_next_start();
    wait_for_previous();
    u32 token = blockIdx.x, i = blockIdx.y * 256 + threadIdx.x;
    if (token >= *n || i >= hidden) return;
    float sum = 0.0f;
#pragma unroll 4
    for (u32 j = token * chosen; j < (token + 1) * chosen; j++) sum += shares[j] * results[(u64)places[j] * hidden + i];
    x[(u64)token * hidden + i] += sum;
}
