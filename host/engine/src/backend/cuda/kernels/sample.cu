// From logits to tokens, for all rows of a batch at once: rules, greedy choice in two stages, draws without a sort.
//
// The order of rules and the random numbers are those of the CPU's sampler (host/engine/src/sampling.rs), so that a seed gives
// the same tokens on either. A draw that walks candidates best first needs no sorted list: candidates are ranked by (logit,
// id), and the rank at which a count or a sum of weights reaches a bound is found digit by digit from histograms. Sums are of integers
// (weights in units of 2^-44), which makes them the same in whatever order threads add.

struct Bias {
    u32 token;
    float add;
};

struct Rules {
    u64 seed;
    u32 index;
    float temperature;
    u32 top_k;
    float top_p, min_p, repetition, presence, frequency;
    u32 history_start, history_len, history_prompt, previous;
    u32 bias_start, bias_len, edit_start, edit_len;
    u32 mask, ban_start, ban_len, logprobs, known;
    u32 reserved;
};
static_assert(sizeof(Rules) == 96, "the layout of README.md");

static const u32 MOST_LOGPROBS = 20;

struct Top {
    float chosen;
    u32 count;
    u32 token[MOST_LOGPROBS];
    float logprob[MOST_LOGPROBS];
};
static_assert(sizeof(Top) == 168, "the layout of README.md");

struct Best {
    float value;
    u32 token;
};

static const u32 NONE = 0xffffffffu;
static const float LARGEST = 3.402823466e+38f;

DEVICE bool is_finite(float v) { return fabsf(v) <= LARGEST; }
// NaN stays NaN.
DEVICE float clamped(float v) { return v > LARGEST ? LARGEST : v < -LARGEST ? -LARGEST : v; }

ENTRY(take_sampled, 256, 4, (const u32 *n, const u32 *from, const u32 *sampled, u32 *tokens)) {
    let_next_start();
    wait_for_previous();
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= *n || from[i] == NONE) return;
    // A row without a token fails with its own step; until then the row after it takes any.
    u32 token = sampled[from[i]];
    if (token != NONE) tokens[i] = token;
}

// === Rules ===

struct Row {
    float *logits;
    u32 *seen;
    u32 vocab;
};

// Marks a token of the history: the highest bit for the prompt, a count of the output below.
DEVICE void mark(const Row &row, u32 token, bool in_prompt) {
    if (token >= row.vocab) return;
    if (in_prompt) {
        atomicOr(&row.seen[token], 0x80000000u);
    } else {
        atomicAdd(&row.seen[token], 1u);
    }
}

// The first visit takes the mark, so that a token is penalised once.
DEVICE void penalise(const Row &row, u32 token, const Rules &r) {
    if (token >= row.vocab) return;
    u32 mark = atomicExch(&row.seen[token], 0u);
    if (mark == 0) return;
    float v = row.logits[token], in_output = (float)(mark & 0x7fffffffu);
    v = v > 0.0f ? v / r.repetition : v * r.repetition;
    row.logits[token] = clamped(v - (in_output > 0.0f ? r.presence : 0.0f) - in_output * r.frequency);
}

DEVICE bool allows(const u32 *mask, u32 token) { return mask[token / 32] >> (token % 32) & 1; }

DEVICE bool is_in(const u32 *list, u32 len, u32 token) {
    for (u32 i = 0; i < len; i++)
        if (list[i] == token) return true;
    return false;
}

// Whether the mask holds: one that leaves no finite logit changes nothing.
DEVICE bool apply_mask(const Row &row, const u32 *mask) {
    int any = 0;
    for (u32 token = threadIdx.x; token < row.vocab; token += 1024) any |= allows(mask, token) && is_finite(row.logits[token]);
    if (!__syncthreads_or(any)) return false;
    for (u32 token = threadIdx.x; token < row.vocab; token += 1024)
        if (!allows(mask, token)) row.logits[token] = -INFINITY;
    return true;
}

// Bans, unless they would leave nothing of a mask. Its barrier also ends a policy's bias, which leaves what is finite finite.
DEVICE void ban(const Row &row, const u32 *banned, u32 len, bool masked) {
    if (len == 0) return;
    int any = !masked;
    for (u32 token = threadIdx.x; masked && !any && token < row.vocab; token += 1024)
        any |= is_finite(row.logits[token]) && !is_in(banned, len, token);
    if (!__syncthreads_or(any)) return;
    for (u32 i = threadIdx.x; i < len; i += 1024)
        if (banned[i] < row.vocab) row.logits[banned[i]] = -INFINITY;
}

ENTRY(sample_rules, 1024, 1, (const u32 *n, const Rules *rules, float *logits, const u32 *history, const u32 *sampled, u32 *seen,
        const Bias *biases, const u32 *banned, const u32 *masks, u32 vocab)) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x >= *n) return;
    const Rules &r = rules[blockIdx.x];
    Row row = {logits + (u64)blockIdx.x * vocab, seen + (u64)blockIdx.x * vocab, vocab};
    bool penalties = r.repetition != 1.0f || r.presence != 0.0f || r.frequency != 0.0f;
    if (penalties) {
        u32 last = r.previous == NONE ? NONE : sampled[r.previous];
        for (u32 i = threadIdx.x; i < r.history_len; i += 1024) mark(row, history[r.history_start + i], i < r.history_prompt);
        if (threadIdx.x == 0) mark(row, last, false);
        __syncthreads();
        for (u32 i = threadIdx.x; i < r.history_len; i += 1024) penalise(row, history[r.history_start + i], r);
        if (threadIdx.x == 0) penalise(row, last, r);
        __syncthreads();
    }
    for (u32 i = threadIdx.x; i < r.bias_len; i += 1024) {
        Bias bias = biases[r.bias_start + i];
        if (bias.token < vocab) row.logits[bias.token] += bias.add;
    }
    __syncthreads();
    bool masked = r.mask != NONE && apply_mask(row, masks + (u64)r.mask * ceil_div(vocab, 32));
    // Not both: no barrier stands between them.
    u32 edits = r.mask == NONE ? r.edit_len : 0;
    for (u32 i = threadIdx.x; i < edits; i += 1024) {
        Bias bias = biases[r.edit_start + i];
        if (bias.token < vocab && is_finite(row.logits[bias.token]))
            row.logits[bias.token] = clamped(row.logits[bias.token] + bias.add);
    }
    ban(row, banned + r.ban_start, r.ban_len, masked);
}

// === Greedy ===

// The larger value, of equal ones the lower token.
DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a; }

DEVICE Best best_of_warp(Best best) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        Best other = {from_lane_xor(best.value, mask), from_lane_xor(best.token, mask)};
        best = better(best, other);
    }
    return best;
}

ENTRY(argmax_parts, 256, 4, (const u32 *n, const float *logits, Best *parts, u32 vocab)) {
    SHARED(Best, found, 8);
    let_next_start();
    wait_for_previous();
    if (blockIdx.y >= *n) return;
    const float *row = logits + (u64)blockIdx.y * vocab;
    u32 run = ceil_div(vocab, gridDim.x), end = least(vocab, (blockIdx.x + 1) * run);
    Best best = {-INFINITY, NONE};
#pragma unroll 4
    for (u32 token = blockIdx.x * run + threadIdx.x; token < end; token += 256)
        // No number is larger than nothing, and NaN is no number.
        if (row[token] > best.value) {
            best.value = row[token];
            best.token = token;
        }
    best = best_of_warp(best);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll
    for (u32 i = 0; i < 8; i++) best = better(best, found[i]);
    parts[(u64)blockIdx.y * gridDim.x + blockIdx.x] = best;
}

// === Draws ===

// The candidates of a row. Functions that are called get them by value: through a reference they would be read from memory again
// for each token.
struct Candidates {
    const float *logits;
    u32 vocab;
    float max;
    float per_degree;  // 1 / temperature
    float min_p;
    u32 id_bits;       // of ranks by id alone, which have so many; else 0
    u64 floor;         // the least rank that takes part
    u32 part_bits;     // the row is at most 32 parts of 2^part_bits tokens
    u32 parts;         // a bit for each part in which this warp may have candidates
};

// A digit of a rank, of at most this many bits, has a bin each.
static const u32 DIGIT = 11, BINS = 1u << DIGIT;

DEVICE float share(const Candidates &c, float logit) { return expf((logit - c.max) * c.per_degree); }

DEVICE u64 weight(const Candidates &c, float logit) { return (u64)(share(c, logit) * 17592186044416.0f); }

// Bits that are ordered as floats are.
DEVICE u32 ordered_bits(float v) {
    u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float of such bits.
DEVICE float ordered_float(u32 bits) { return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits); }

// Better candidates have greater ranks: by logit as floats are ordered, then by descending id.
DEVICE u64 rank_of(const Candidates &c, u32 token, float logit) {
    if (c.id_bits != 0) return (1u << c.id_bits) - 1 - token;
    return (u64)ordered_bits(logit) << 32 | (u32)~token;
}

DEVICE bool takes_part(const Candidates &c, float logit, u64 rank) {
    return logit > -INFINITY && rank >= c.floor && (c.min_p <= 0.0f || logit == c.max || share(c, logit) >= c.min_p);
}

// All of a row.
DEVICE Candidates candidates_of(const float *logits, u32 vocab, float max, float per_degree) {
    Candidates c = {logits, vocab, max, per_degree, 0.0f, 0, 0, 10, ~0u};
    while ((vocab - 1) >> c.part_bits >= 32) c.part_bits++;
    return c;
}

// Where a thread that walks along the row goes on from `token`: there, or at its first token of the next part that may have
// candidates. Parts hold whole turns of 1024 tokens, so that a warp has the same tokens in every walk, and its lanes go together.
DEVICE u32 visit(const Candidates &c, u32 token) {
    u32 part = token >> c.part_bits, ahead = part < 32 ? c.parts >> part : 0;
    if (ahead & 1) return token;
    return (ahead == 0 ? c.vocab : (part + lowest_bit(ahead)) << c.part_bits) + threadIdx.x;
}

// The sum over a block of 1024 threads, for all of them.
DEVICE u64 block_sum_1024(u64 v) {
    SHARED(u64, sums, 32);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v += from_lane_xor(v, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    u64 sum = 0;
    for (u32 i = 0; i < 32; i++) sum += sums[i];
    return sum;
}

struct Total {
    u64 sum;    // of the block
    u32 parts;  // of the warp
};

DEVICE_CALL Total total_and_parts(Candidates c, bool weights) {
    Total found = {0, 0};
    for (u32 token = visit(c, threadIdx.x); token < c.vocab; token = visit(c, token + 1024)) {
        float logit = c.logits[token];
        if (!takes_part(c, logit, rank_of(c, token, logit))) continue;
        found.sum += weights ? weight(c, logit) : 1;
        found.parts |= 1u << (token >> c.part_bits);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) found.parts |= from_lane_xor(found.parts, mask);
    found.sum = block_sum_1024(found.sum);
    return found;
}

// How many candidates there are, or the sum of their weights. Later walks pass over the parts that turn out to have none, which are
// nearly all once the row is cut. So what takes part may become less after this, never more.
DEVICE u64 total(Candidates &c, bool weights) {
    Total found = total_and_parts(c, weights);
    c.parts = found.parts;
    return found.sum;
}

// A histogram in shared memory. Sums of 64 bits are in two halves: to add 64 bits there is no instruction but a loop that tries
// until nobody else was quicker.
struct Bins {
    u32 *low, *high, *counts;
};

DEVICE u64 sum_of(const Bins &bins, u32 digit) { return (u64)bins.high[digit] << 32 | bins.low[digit]; }

// Whose addition overflows the lower half carries it to the upper.
DEVICE void add(const Bins &bins, u32 digit, u64 sum, u32 count) {
    u32 low = (u32)sum, before = atomicAdd(&bins.low[digit], low);
    u32 high = (u32)(sum >> 32) + (before + low < low);
    if (high != 0) atomicAdd(&bins.high[digit], high);
    atomicAdd(&bins.counts[digit], count);
}

// The lane of a warp at which the sum of `own`, lane by lane, reaches `left`, and the sum before it.
DEVICE u32 lane_that_reaches(u64 own, u64 left, u64 *before) {
    u32 lane = threadIdx.x % 32;
    u64 upto = own;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u64 other = from_lane(upto, (int)((lane - step) & 31));
        if (lane >= step) upto += other;
    }
    u32 found = lowest_bit(lanes_where(upto >= left));
    *before = from_lane(upto - own, (int)found);
    return found;
}

// Where in the histogram the sum from the greatest bin down reaches `left`, for the first warp: the bin, what lies above it, and
// whether a single candidate is in it.
DEVICE void find_bin(const Bins &bins, u64 left, u32 *bin, u64 *above, u32 *is_single) {
    const u32 RUN = BINS / 32;
    u32 lane = threadIdx.x, first = BINS - 1 - lane * RUN;
    u64 own = 0, before, between;
    // Each lane begins elsewhere in its run: from its first bin on, all of them would want the same bank of memory.
#pragma unroll 8
    for (u32 i = 0; i < RUN; i++) own += sum_of(bins, first - (i + lane) % RUN);
    u32 run = lane_that_reaches(own, left, &before);
    // The bins of that run, two to a lane.
    u32 upper = BINS - 1 - run * RUN - lane * 2;
    u64 sum = sum_of(bins, upper);
    u32 pair = lane_that_reaches(sum + sum_of(bins, upper - 1), left - before, &between);
    if (lane != pair) return;
    before += between;
    bool is_upper = before + sum >= left;
    *bin = is_upper ? upper : upper - 1;
    *above = is_upper ? before : before + sum;
    *is_single = bins.counts[*bin] == 1;
}

// The sum of a warp's weights, in halves of 27 bits: 32 of those fit in a word, and a weight has no more than 45.
DEVICE u64 warp_sum_of_weights(u64 v) {
    const u32 HALF = 27;
    return ((u64)sum_of_lanes((u32)(v >> HALF)) << HALF) + sum_of_lanes((u32)v & ((1u << HALF) - 1));
}

// Adds a candidate's weight to its bin. Called by whole warps: candidates that lie side by side often share a bin, mostly where
// rank is by id, and additions to one word wait for each other. So the lanes of a bin add up first and one of them speaks for all;
// once a bin has a single lane, the others do not look for company.
DEVICE void add_to_bin(const Bins &bins, bool live, u32 digit, u64 weight) {
    const u32 TURNS = 4;
    u32 lane = threadIdx.x % 32, left = lanes_where(live), count = 1;
    for (u32 turn = 0; turn < TURNS && left != 0; turn++) {
        u32 first = lowest_bit(left), shared = from_lane(digit, (int)first);
        bool mine = live && digit == shared;
        u32 company = lanes_where(mine);
        if (count_bits(company) == 1) break;
        u64 sum = warp_sum_of_weights(mine ? weight : 0);
        if (lane == first) {
            weight = sum;
            count = count_bits(company);
        } else if (mine) {
            live = false;
        }
        left &= ~company;
    }
    if (live) add(bins, digit, weight, count);
}

// The rank at which the count of candidates, or the sum of their weights, reaches `left` (of 1 up to the total), best first.
// The lowest bits of a rank by logit are left at 0 where no other candidate shares the upper ones.
DEVICE_CALL u64 rank_at(Candidates c, bool weights, u64 left) {
    SHARED(u32, low_sums, BINS);
    SHARED(u32, high_sums, BINS);
    SHARED(u32, counts, BINS);
    SHARED(u64, above, 1);
    SHARED(u32, bin, 1);
    SHARED(u32, is_single, 1);
    const Bins bins = {low_sums, high_sums, counts};
    u64 prefix = 0;
    u32 shift = c.id_bits != 0 ? c.id_bits : 64;
    while (shift > 0) {
        u32 width = least(DIGIT, shift), low = shift - width;
        // Nobody needs what is cleared: the first warp alone read it, before the barrier at the end of a turn.
        for (u32 i = threadIdx.x; i < BINS; i += 1024) low_sums[i] = high_sums[i] = counts[i] = 0;
        __syncthreads();
        // The ranks that begin with the prefix are at most `last` above it. By id they are a run of tokens, and a walk begins at a
        // whole turn.
        u64 last = ~(u64)0 >> (64 - shift);
        u32 begin = 0, end = c.vocab;
        if (c.id_bits != 0) {
            begin = (1u << c.id_bits) - (u32)prefix - (1u << shift);
            end = least(end, begin + (1u << shift));
            begin -= begin % 1024;
        }
        for (u32 token = visit(c, begin + threadIdx.x); token - threadIdx.x < end; token = visit(c, token + 1024)) {
            float logit = token < end ? c.logits[token] : -INFINITY;
            u64 rank = rank_of(c, token, logit);
            bool live = rank - prefix <= last && takes_part(c, logit, rank);
            u32 digit = (u32)(rank >> low) & ((1u << width) - 1);
            add_to_bin(bins, live, digit, !live ? 0 : weights ? weight(c, logit) : 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) find_bin(bins, left, bin, above, is_single);
        __syncthreads();
        prefix |= (u64)*bin << low;
        left -= *above;
        shift = low;
        // By id the digits that are left cost less than the search for the candidate.
        if (c.id_bits == 0 && *is_single) break;
    }
    return prefix > c.floor ? prefix : c.floor;
}

// The worst of the candidates with at least this rank, which is by logit.
DEVICE u32 worst_from(Candidates c, u64 rank) {
    SHARED(u64, ranks, 32);
    c.floor = rank;
    u64 least_rank = ~(u64)0;
    for (u32 token = visit(c, threadIdx.x); token < c.vocab; token = visit(c, token + 1024)) {
        float logit = c.logits[token];
        u64 own = rank_of(c, token, logit);
        if (!takes_part(c, logit, own)) continue;
        least_rank = own < least_rank ? own : least_rank;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        u64 other = from_lane_xor(least_rank, mask);
        least_rank = other < least_rank ? other : least_rank;
    }
    if (threadIdx.x % 32 == 0) ranks[threadIdx.x / 32] = least_rank;
    __syncthreads();
    for (u32 i = 0; i < 32; i++) least_rank = ranks[i] < least_rank ? ranks[i] : least_rank;
    return ~(u32)least_rank;
}

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
DEVICE u64 mix(u64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// A number in [0, 1) from a seed and a counter.
DEVICE double uniform(u64 seed, u32 index) {
    const u64 GOLDEN = 0x9e3779b97f4a7c15ull;
    u64 bits = mix(mix(seed + GOLDEN) + GOLDEN * ((u64)index + 1));
    return (double)(bits >> 11) / 9007199254740992.0;
}

// The first sum that is not below `part` of `all`, within bounds.
DEVICE u64 bounded(double sum, u64 all) {
    u64 v = (u64)sum;
    return v < 1 ? 1 : v > all ? all : v;
}

// Bits of the ids of so many tokens. No more, so that few ids share a bin of the first digit: those that do are added one after
// another.
DEVICE u32 bits_of_ids(u32 vocab) {
    u32 bits = 1;
    while (bits < 31 && (1u << bits) < vocab) bits++;
    return bits;
}

DEVICE u32 draw(const float *logits, u32 vocab, float max, const Rules &r) {
    Candidates c = candidates_of(logits, vocab, max, 1.0f / r.temperature);
    bool cut = r.top_k > 0 && r.top_k < total(c, false);
    if (cut) c.floor = rank_at(c, false, r.top_k);
    if (r.top_p < 1.0f) {
        u64 all = total(c, true);
        c.floor = rank_at(c, true, bounded(ceil((double)r.top_p * (double)all), all));
    }
    c.id_bits = cut || r.top_p < 1.0f ? 0 : bits_of_ids(vocab);
    c.min_p = r.min_p;
    u64 all = total(c, true);
    u64 rank = rank_at(c, true, bounded(floor(uniform(r.seed, r.index) * (double)all) + 1.0, all));
    return c.id_bits != 0 ? (1u << c.id_bits) - 1 - (u32)rank : worst_from(c, rank);
}

// Log-probabilities of the distribution before temperature: of the chosen token, and of the likeliest.
DEVICE void report(const float *logits, u32 vocab, float max, u32 chosen, u32 wanted, Top *top) {
    SHARED(Best, kept, MOST_LOGPROBS);
    SHARED(u32, count, 1);
    Candidates c = candidates_of(logits, vocab, max, 1.0f);
    // The barriers of `total` are this counter's too.
    if (threadIdx.x == 0) *count = 0;
    double log_sum = log((double)total(c, true) / 17592186044416.0);
    if (threadIdx.x == 0) top->chosen = (float)((double)logits[chosen] - (double)max - log_sum);
    wanted = least(wanted, MOST_LOGPROBS);
    if (wanted > 0 && wanted < total(c, false)) c.floor = rank_at(c, false, wanted);
    if (wanted > 0) {
        for (u32 token = threadIdx.x; token < vocab; token += 1024) {
            Best one = {logits[token], token};
            if (!takes_part(c, one.value, rank_of(c, token, one.value))) continue;
            kept[atomicAdd(count, 1u)] = one;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) top->count = *count;
    if (threadIdx.x >= *count) return;
    Best own = kept[threadIdx.x];
    u32 place = 0;
    for (u32 i = 0; i < *count; i++) place += rank_of(c, kept[i].token, kept[i].value) > rank_of(c, own.token, own.value);
    top->token[place] = own.token;
    top->logprob[place] = (float)((double)own.value - (double)max - log_sum);
}

// logits = cap * tanh(logits / cap)
ENTRY(cap_logits, 256, 4, (const u32 *n, float *logits, u32 vocab, float cap)) {
    let_next_start();
    wait_for_previous();
    u32 i = blockIdx.x * 256 + threadIdx.x;
    if (blockIdx.y >= *n || i >= vocab) return;
    float *logit = logits + (u64)blockIdx.y * vocab + i;
    *logit = cap * tanhf(*logit / cap);
}

ENTRY(sample_choose, 1024, 1, (const u32 *n, const Rules *rules, const float *logits, const Best *parts, u32 n_parts, u32 *sampled,
        Top *tops, u32 vocab)) {
    let_next_start();
    wait_for_previous();
    u32 row = blockIdx.x;
    if (row >= *n) return;
    const Rules &r = rules[row];
    const float *own = logits + (u64)row * vocab;
    Best best = {-INFINITY, NONE};
    for (u32 i = 0; i < n_parts; i++) best = better(best, parts[(u64)row * n_parts + i]);
    u32 token = NONE;
    if (is_finite(best.value)) {
        token = r.known != NONE ? r.known : r.temperature < 1e-5f ? best.token : draw(own, vocab, best.value, r);
        if (r.logprobs != NONE) report(own, vocab, best.value, token, r.logprobs, &tops[row]);
    }
    if (threadIdx.x == 0) sampled[row] = token;
}
