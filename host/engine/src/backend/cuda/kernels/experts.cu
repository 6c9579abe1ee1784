// Which experts a token goes through, whose rows a product has, and what becomes of their results.

static const u32 MOST_EXPERTS = 512, EXPERTS_OF_A_LANE = MOST_EXPERTS / 32;

// What a token's lane found: in the order of choice, an expert for each of the first lanes, and its part in the result.
struct Choice {
    u32 expert;
    float share;
};

// The best `chosen` of `count` experts, of equals the one with the lower number, for a warp. A logit that is none comes last.
DEVICE Choice choose(const float *logits, u32 count, u32 chosen, bool normalised) {
    u32 lane = threadIdx.x % 32, left = 0;
    float own[EXPERTS_OF_A_LANE], max = -INFINITY, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < EXPERTS_OF_A_LANE; j++) {
        bool is_there = lane + 32 * j < count;
        left |= (u32)is_there << j;
        own[j] = is_there ? logits[lane + 32 * j] : -INFINITY;
        max = fmaxf(max, own[j]);
    }
    max = warp_max(max);
#pragma unroll
    for (u32 j = 0; j < EXPERTS_OF_A_LANE; j++) total += left >> j & 1 ? expf(own[j] - max) : 0.0f;
    Choice choice = {0, 0.0f};
    for (u32 i = 0; i < chosen; i++) {
        u64 best = 0;
        float logit = 0.0f;
#pragma unroll
        for (u32 j = 0; j < EXPERTS_OF_A_LANE; j++) {
            float v = own[j] == own[j] ? own[j] : -INFINITY;
            u64 rank = left >> j & 1 ? (u64)ordered_bits(v) << 32 | (u32)~(lane + 32 * j) : 0;
            if (rank > best) best = rank, logit = own[j];
        }
        u64 mine = best;
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            u64 other = from_lane_xor(best, mask);
            best = other > best ? other : best;
        }
        u32 expert = ~(u32)best;
        logit = from_lane(logit, (int)(expert % 32));
        if (mine == best) left &= ~(1u << expert / 32);
        if (lane == i) choice.expert = expert, choice.share = expf(logit - max);
    }
    sum = warp_sum(choice.share);
    total = warp_sum(total);
    choice.share /= normalised ? sum : total;
    return choice;
}

// Where the rows and the tiles of each expert begin, from how many rows it has, for the first warp.
DEVICE void place_experts(const u32 *sizes, u32 *starts, u32 *first_tiles, u32 tile_rows, u32 *n_tiles) {
    u32 lane = threadIdx.x % 32, rows = 0, tiles = 0;
    for (u32 i = 0; i < EXPERTS_OF_A_LANE; i++) {
        u32 size = sizes[lane * EXPERTS_OF_A_LANE + i];
        rows += size, tiles += ceil_div(size, tile_rows);
    }
    u32 rows_upto = rows, tiles_upto = tiles;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other_rows = from_lane(rows_upto, (int)((lane - step) & 31)), other_tiles = from_lane(tiles_upto, (int)((lane - step) & 31));
        if (lane >= step) rows_upto += other_rows, tiles_upto += other_tiles;
    }
    u32 row = rows_upto - rows, tile = tiles_upto - tiles;
    for (u32 i = 0; i < EXPERTS_OF_A_LANE; i++) {
        u32 expert = lane * EXPERTS_OF_A_LANE + i;
        starts[expert] = row, first_tiles[expert] = tile;
        row += sizes[expert], tile += ceil_div(sizes[expert], tile_rows);
    }
    if (lane == 31) *n_tiles = tile;
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
    SHARED(u32, sizes, MOST_EXPERTS);
    SHARED(u32, starts, MOST_EXPERTS);
    SHARED(u32, first_tiles, MOST_EXPERTS);
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
    sizes[threadIdx.x] = size;
    __syncthreads();
    if (threadIdx.x < 32) place_experts(sizes, starts, first_tiles, tile_rows, tiles);
    __syncthreads();
    u32 start = starts[threadIdx.x], *to = tiles + 1 + 3 * first_tiles[threadIdx.x];
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
        Choice choice = choose(logits + (u64)token * count, count, chosen, normalised);
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
    u32 token = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
    if (token >= *n || i >= hidden) return;
    float sum = 0.0f;
#pragma unroll 4
    for (u32 j = token * chosen; j < (token + 1) * chosen; j++) sum += shares[j] * results[(u64)places[j] * hidden + i];
    x[(u64)token * hidden + i] += sum;
}
