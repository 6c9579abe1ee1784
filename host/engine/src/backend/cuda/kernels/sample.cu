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
    u32 mask, ban_start, ban_len, logprobs;
    u32 reserved[2];
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

// The candidates of a row.
struct Candidates {
    const float *logits;
    u32 vocab;
    float max;
    float per_degree;  // 1 / temperature
    float min_p;
    u32 id_bits;       // of ranks by id alone, which have so many; else 0
    u64 floor;         // the least rank that takes part
};

// A digit of a rank, of at most this many bits, has a bin each.
static const u32 DIGIT = 11, BINS = 1u << DIGIT;

DEVICE float share(const Candidates &c, float logit) { return expf((logit - c.max) * c.per_degree); }

DEVICE u64 weight(const Candidates &c, float logit) { return (u64)(share(c, logit) * 17592186044416.0f); }

// Better candidates have greater ranks: by logit as floats are ordered, then by descending id.
DEVICE u64 rank_of(const Candidates &c, u32 token, float logit) {
    if (c.id_bits != 0) return (1u << c.id_bits) - 1 - token;
    u32 bits = __float_as_uint(logit);
    u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)key << 32 | (u32)~token;
}

DEVICE bool takes_part(const Candidates &c, u32 token, float logit) {
    return logit > -INFINITY && rank_of(c, token, logit) >= c.floor &&
           (c.min_p <= 0.0f || logit == c.max || share(c, logit) >= c.min_p);
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

// How many candidates there are, or the sum of their weights.
DEVICE_CALL u64 total(const Candidates &c, bool weights) {
    u64 sum = 0;
    for (u32 token = threadIdx.x; token < c.vocab; token += 1024) {
        float logit = c.logits[token];
        if (takes_part(c, token, logit)) sum += weights ? weight(c, logit) : 1;
    }
    return block_sum_1024(sum);
}

// Where in the histogram the sum from the greatest bin down reaches `left`, for the first warp: the bin, what lies above it.
DEVICE void find_bin(const u64 *sums, u64 left, u32 *bin, u64 *above) {
    const u32 RUN = BINS / 32;
    u32 lane = threadIdx.x, first = BINS - 1 - lane * RUN;
    u64 own = 0;
    for (u32 i = 0; i < RUN; i++) own += sums[first - i];
    u64 upto = own;
    for (u32 step = 1; step < 32; step *= 2) {
        u64 other = from_lane(upto, (int)((lane - step) & 31));
        if (lane >= step) upto += other;
    }
    u64 before = upto - own;
    if (before >= left || upto < left) return;
    u32 i = first;
    for (; before + sums[i] < left; i--) before += sums[i];
    *bin = i;
    *above = before;
}

// Adds a candidate's weight to its bin. Called by whole warps: candidates that lie side by side often share a bin, mostly where rank is
// by id, and a sum of 64 bits in shared memory is a loop that tries until nobody else was quicker. So the lanes of a bin
// add up first and one of them speaks for all; once a bin has a single lane, the others do not look for company.
DEVICE void add_to_bin(u64 *sums, u32 *counts, bool live, u32 digit, u64 weight) {
    const u32 TURNS = 4;
    u32 lane = threadIdx.x % 32, left = lanes_where(live);
    for (u32 turn = 0; turn < TURNS && left != 0; turn++) {
        u32 first = lowest_bit(left), shared = from_lane(digit, (int)first);
        bool mine = live && digit == shared;
        u32 company = lanes_where(mine);
        u64 sum = mine ? weight : 0;
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
        if (lane == first) {
            atomicAdd(&sums[shared], sum);
            atomicAdd(&counts[shared], count_bits(company));
        }
        live = live && !mine;
        left &= ~company;
        if (count_bits(company) == 1) break;
    }
    if (!live) return;
    atomicAdd(&sums[digit], weight);
    atomicAdd(&counts[digit], 1u);
}

// The rank at which the count of candidates, or the sum of their weights, reaches `left` (of 1 up to the total), best first.
// The lowest bits are left at 0 where no other candidate shares the upper ones.
DEVICE_CALL u64 rank_at(const Candidates &c, bool weights, u64 left) {
    SHARED(u64, sums, BINS);
    SHARED(u32, counts, BINS);
    SHARED(u64, above, 1);
    SHARED(u32, bin, 1);
    u64 prefix = 0;
    u32 shift = c.id_bits != 0 ? c.id_bits : 64;
    while (shift > 0) {
        u32 width = least(DIGIT, shift), low = shift - width;
        // Nobody needs what is cleared: in a loop that goes on, whoever is late to read its bin's count finds it is not 1 either
        // way; and between two calls of this function stands one of `total`.
        for (u32 i = threadIdx.x; i < BINS; i += 1024) {
            sums[i] = 0;
            counts[i] = 0;
        }
        __syncthreads();
        for (u32 token = threadIdx.x; token - threadIdx.x < c.vocab; token += 1024) {
            float logit = token < c.vocab ? c.logits[token] : -INFINITY;
            u64 rank = rank_of(c, token, logit);
            bool live = takes_part(c, token, logit) && (shift == 64 || rank >> shift == prefix >> shift);
            u32 digit = (u32)(rank >> low) & ((1u << width) - 1);
            add_to_bin(sums, counts, live, digit, !live ? 0 : weights ? weight(c, logit) : 1);
        }
        __syncthreads();
        if (threadIdx.x < 32) find_bin(sums, left, bin, above);
        __syncthreads();
        prefix |= (u64)*bin << low;
        left -= *above;
        shift = low;
        if (counts[*bin] == 1) break;
    }
    return prefix > c.floor ? prefix : c.floor;
}

// The worst of the candidates with at least this rank.
DEVICE u32 worst_from(Candidates c, u64 rank) {
    SHARED(u64, ranks, 32);
    c.floor = rank;
    u64 least_rank = ~(u64)0;
    for (u32 token = threadIdx.x; token < c.vocab; token += 1024) {
        float logit = c.logits[token];
        if (!takes_part(c, token, logit)) continue;
        u64 own = rank_of(c, token, logit);
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
    return c.id_bits != 0 ? (1u << c.id_bits) - 1 - (u32)least_rank : ~(u32)least_rank;
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
    Candidates c = {logits, vocab, max, 1.0f / r.temperature, 0.0f, 0, 0};
    bool cut = r.top_k > 0 && r.top_k < total(c, false);
    if (cut) c.floor = rank_at(c, false, r.top_k);
    if (r.top_p < 1.0f) {
        u64 all = total(c, true);
        c.floor = rank_at(c, true, bounded(ceil((double)r.top_p * (double)all), all));
    }
    c.id_bits = cut || r.top_p < 1.0f ? 0 : bits_of_ids(vocab);
    c.min_p = r.min_p;
    u64 all = total(c, true);
    return worst_from(c, rank_at(c, true, bounded(floor(uniform(r.seed, r.index) * (double)all) + 1.0, all)));
}

// Log-probabilities of the distribution before temperature: of the chosen token, and of the likeliest.
DEVICE void report(const float *logits, u32 vocab, float max, u32 chosen, u32 wanted, Top *top) {
    SHARED(Best, kept, MOST_LOGPROBS);
    SHARED(u32, count, 1);
    Candidates c = {logits, vocab, max, 1.0f, 0.0f, 0, 0};
    // The barriers of `total` are this counter's too.
    if (threadIdx.x == 0) *count = 0;
    double log_sum = log((double)total(c, true) / 17592186044416.0);
    if (threadIdx.x == 0) top->chosen = (float)((double)logits[chosen] - (double)max - log_sum);
    wanted = least(wanted, MOST_LOGPROBS);
    if (wanted > 0 && wanted < total(c, false)) c.floor = rank_at(c, false, wanted);
    if (wanted > 0) {
        for (u32 token = threadIdx.x; token < vocab; token += 1024) {
            if (!takes_part(c, token, logits[token])) continue;
            Best one = {logits[token], token};
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
        token = r.temperature < 1e-5f ? best.token : draw(own, vocab, best.value, r);
        if (r.logprobs != NONE) report(own, vocab, best.value, token, r.logprobs, &tops[row]);
    }
    if (threadIdx.x == 0) sampled[row] = token;
}
