// Attention of one token per row over its pages, cut into splits so that a few long rows occupy the whole device.
//
// The host lists the splits of each step, by how long its rows are. What the warps at the same place of a row's splits found is joined by
// the one that ends last. A block serves up to HEADS query heads of one key head, so that each key and value is read once. For 16-bit
// types the matrix units compute eight heads at once: a warp takes sixteen positions at a time, from memory into registers and from
// there into the units, and has their keys and values under way before it uses the first, as far as registers suffice. The f32 unit is
// there for exact checks against the CPU, so its attention is a plain one, a warp per head, here and in prefill.cu. Scores are in units
// of log 2, so that exponentials are single instructions.

static const float NO_SCORE = -1e30f, LOG2_E = 1.44269504f;

// Query heads that a block serves at most: as many columns as matrix units have, or a warp each.
#if PM_T == 0
static const u32 HEADS = 4;
#else
static const u32 HEADS = 8;
#endif

struct Decode {
    const u32 *n;
    const uint4 *splits;
    const T *qkv;
    Pages pages;
    T *out;
    uint4 *parts;
    u32 *counts;
    u32 heads;
    float scale;
    float cap;
};

// Positions.
struct Span {
    u32 begin, end;
};

// A stretch of a row's context, one of `count`, of which the first is split `first` of the list.
struct Split {
    u32 row, token;
    Span span;
    u32 first, count;
};

// This block's; none past the last.
DEVICE Split this_split(const Decode &a) {
    Split s = {};
    if (blockIdx.y >= *a.n) return s;
    uint4 what = a.splits[2 * blockIdx.y], among = a.splits[2 * blockIdx.y + 1];
    s.row = what.x, s.token = what.y, s.span.begin = what.z, s.span.end = what.w, s.first = among.x, s.count = among.y;
    return s;
}

// What a block computes: `count` query heads from `first`, which share a key head, over a split.
struct Cluster {
    Split split;
    u32 kv_head, first, count;
};

DEVICE const T *query_of(const Decode &a, const Cluster &c, u32 head, u32 d) {
    return a.qkv + ((u64)c.split.token * (a.heads + 2 * a.pages.kv_heads) + c.first + head) * d;
}

DEVICE T *result_of(const Decode &a, const Cluster &c, u32 head, u32 d) {
    return a.out + ((u64)c.split.token * a.heads + c.first + head) * d;
}

// The first of the sixteen positions that a warp begins with: the warps take turns.
DEVICE u32 first_of(Span span) { return (span.begin / 16 + threadIdx.x / 32) * 16; }

// Where the key of position `base` is; past the span, some key.
DEVICE const T *run_at(const Decode &a, const Cluster &c, u32 base) {
    return key_at(a.pages, c.split.row, c.kv_head, base < c.split.span.end ? base : 0);
}

// A lane's elements of its block's heads, in whichever order: `out` is a sum of values by their weights, which are relative to 2^top,
// and `sum` that of the weights. Each lane of a warp has the same tops and sums.
template <u32 D> struct Sums {
    static const u32 QUADS = (HEADS * D + 511) / 512, N = 4 * QUADS;
    float top[N], sum[N], out[N];

    // Joins the first `live` of them with those of the row's other splits. True for the warp that comes last: it has the sums of all then,
    // added in the order of the splits, whoever that is. Every lane has its own elements in the same places.
    METHOD bool join(const Decode &a, const Split &s, u32 live) {
        if (s.count == 1) return true;
        const u32 SIZE = 34 * QUADS;
        u32 lane = threadIdx.x % 32, warp = blockIdx.x * 4 + threadIdx.x / 32, warps = gridDim.x * 4;
        uint4 *own = a.parts + ((u64)blockIdx.y * warps + warp) * SIZE;
#pragma unroll
        for (u32 q = 0; q < QUADS; q++) {
            if (4 * q >= live) continue;
            own[32 * q + lane] = pack(out + 4 * q);
            if (lane == 0) own[32 * QUADS + 2 * q] = pack(top + 4 * q), own[32 * QUADS + 2 * q + 1] = pack(sum + 4 * q);
        }
        u64 first = (u64)s.first * warps + warp;
        if (!is_last_warp(a.counts + first, s.count)) return false;
#pragma unroll
        for (u32 i = 0; i < N; i++) top[i] = NO_SCORE, sum[i] = out[i] = 0.0f;
        const uint4 *parts = a.parts + first * SIZE;
        for (u32 i = 0; i < s.count; i += 32) add(parts + (u64)i * warps * SIZE, warps * SIZE, least(s.count - i, 32), live);
        return true;
    }

    // Adds what `n` splits wrote, at most 32: from `parts` on, each so much further.
    METHOD void add(const uint4 *parts, u32 pitch, u32 n, u32 live) {
        u32 lane = threadIdx.x % 32;
        // Of the lane's split.
        float weights[N];
#pragma unroll
        for (u32 q = 0; q < QUADS; q++) {
            float tops[4] = {NO_SCORE, NO_SCORE, NO_SCORE, NO_SCORE}, sums[4] = {};
            if (lane < n && 4 * q < live) {
                const uint4 *stat = parts + (u64)lane * pitch + 32 * QUADS + 2 * q;
                unpack(tops, load_announced(stat));
                unpack(sums, load_announced(stat + 1));
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 i = 4 * q + j;
                float highest = fmaxf(top[i], warp_max(tops[j])), shrink = power_of_two(top[i] - highest);
                weights[i] = power_of_two(tops[j] - highest);
                top[i] = highest;
                sum[i] = sum[i] * shrink + warp_sum(sums[j] * weights[i]);
                out[i] *= shrink;
            }
        }
        // Several are under way at once. Past the last, weights are zero.
        const u32 AHEAD = 8 / QUADS;
        for (u32 k = 0; k < n; k += AHEAD) {
            uint4 read[AHEAD][QUADS];
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++)
#pragma unroll
                for (u32 q = 0; q < QUADS; q++) {
                    read[i][q] = zero_vec();
                    if (k + i < n && 4 * q < live) read[i][q] = load_announced(parts + (u64)(k + i) * pitch + 32 * q + lane);
                }
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++)
#pragma unroll
                for (u32 q = 0; q < QUADS; q++) {
                    float part[4];
                    unpack(part, read[i][q]);
#pragma unroll
                    for (u32 j = 0; j < 4; j++) out[4 * q + j] += from_lane(weights[4 * q + j], (int)(k + i)) * part[j];
                }
        }
    }
};

#if PM_T == 0

// One query head, by one warp: lanes are positions for the scores, and elements of the head for the sum.
template <u32 D> struct Plain {
    float top, sum, out[D / 32];

    template <class A> METHOD void see(const A &a, u32 row, u32 kv_head, const T *q, Span span) {
        u32 lane = threadIdx.x % 32;
        u64 to_value = value_offset(a.pages);
        top = NO_SCORE;
        sum = 0.0f;
#pragma unroll
        for (u32 j = 0; j < D / 32; j++) out[j] = 0.0f;
        for (u32 base = span.begin; base < span.end; base += 32) {
            const T *key = key_at(a.pages, row, kv_head, least(base + lane, span.end - 1));
            float score = 0.0f;
            for (u32 i = 0; i < D; i++) score += q[i] * key[i];
            score *= a.scale * LOG2_E;
            if (a.cap != 0.0f) score = soft_cap(score, a.cap);
            if (base + lane >= span.end) score = -INFINITY;
            float highest = fmaxf(warp_max(score), top);
            float shrink = power_of_two(top - highest), weight = power_of_two(score - highest);
            top = highest;
            sum = sum * shrink + warp_sum(weight);
#pragma unroll
            for (u32 j = 0; j < D / 32; j++) out[j] *= shrink;
            for (u32 i = 0; i < least(32, span.end - base); i++) {
                const T *value = key_at(a.pages, row, kv_head, base + i) + to_value;
                float w = from_lane(weight, (int)i);
#pragma unroll
                for (u32 j = 0; j < D / 32; j++) out[j] += w * value[j * 32 + lane];
            }
        }
    }
};

template <u32 D> DEVICE void attend(const Decode &a, const Cluster &c, const T *) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= c.count) return;
    Plain<D> head;
    head.see(a, c.split.row, c.kv_head, query_of(a, c, warp, D), c.split.span);
    Sums<D> own;
#pragma unroll
    for (u32 i = 0; i < Sums<D>::N; i++) own.top[i] = head.top, own.sum[i] = head.sum, own.out[i] = i < D / 32 ? head.out[i] : 0.0f;
    if (!own.join(a, c.split, D / 32)) return;
#pragma unroll
    for (u32 i = 0; i < D / 32; i++) result_of(a, c, warp, D)[i * 32 + lane] = own.out[i] / own.sum[i];
}

#else

// 2 * N elements.
template <u32 N> DEVICE void load_words(u32 (&to)[N], const T *from) {
    if constexpr (N == 4) {
        uint4 v = load_once(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
        u64 v = load_once_8(from);
        to[0] = (u32)v, to[1] = (u32)(v >> 32);
    }
}

// A warp's view of eight heads. Keys are the left operand of the scores' product and values, turned, that of the result's, so
// that heads are columns in both: this lane has heads `2t` and `2t + 1`, with t its number in its group of four, g.
//
// Of a key, a lane loads 16 bytes, whose words go to two products: which elements of the head the two pair up differs from the
// layout that the instruction names, for both operands alike, and a sum does not mind. Of values it
// loads those of the positions that it has as columns of the operand, and pairs up neighbours in position.
template <u32 D> struct Eight {
    // A value is taken in parts, so that a wide one fits the registers. Words of a part that a lane loads at once, and how often; what all
    // g load at once lies together.
    static const u32 PARTS = D > 128 ? 2 : 1, WORDS = D % 64 == 0 ? 4 : 2, LOADS = D / (16 * WORDS * PARTS);
    uint4 q[D / 32];
    float top[2], sum[2], out[D / 16][4];

    METHOD void begin(const Decode &a, const Cluster &c) {
        // Heads past the last are computed from it again and dropped.
        const T *from = query_of(a, c, least(threadIdx.x % 32 / 4, c.count - 1), D) + threadIdx.x % 4 * 8;
#pragma unroll
        for (u32 j = 0; j < D / 32; j++) q[j] = load_vec(from + 32 * j);
        top[0] = top[1] = NO_SCORE;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (u32 m = 0; m < D / 16; m++) out[m][0] = out[m][1] = out[m][2] = out[m][3] = 0.0f;
    }

    // Sixteen positions from `base`, which lie in one page, as far as they are of the span; `page` is where the key of the first is.
    METHOD void see(const Decode &a, u32 base, Span span, const T *page) {
        u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        u32 low = most(span.begin, base) - base, high = least(span.end - base, 16) - 1;
        const T *value_page = page + value_offset(a.pages);
        // Past either end of the span lies what nobody wrote: its nearest position instead.
        uint4 keys[2][D / 32];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            const T *key = page + least(most(g + 8 * h, low), high) * D + t * 8;
#pragma unroll
            for (u32 j = 0; j < D / 32; j++) keys[h][j] = load_once(key + 32 * j);
        }
        const T *of_values[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) of_values[i] = value_page + least(most(2 * t + i % 2 + i / 2 * 8, low), high) * D + g * 2 * WORDS;
        u32 values[PARTS][4][LOADS][WORDS];
        fetch(values[0], of_values, 0);
        // Of position g and head `2t`, then of the next head, then the same of position `g + 8`.
        float weights[4];
        score(weights, a.scale * LOG2_E, keys);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 at = g + i / 2 * 8;
            if (a.cap != 0.0f) weights[i] = soft_cap(weights[i], a.cap);
            if (at < low || at > high) weights[i] = -INFINITY;
        }
        soften(weights);
        // The registers of the keys are free again.
#pragma unroll
        for (u32 p = 1; p < PARTS; p++) fetch(values[p], of_values, p);
        // Positions become rows of the right operand, and heads columns.
        u32 first = transposed(to_elements(weights[0], weights[1])), second = transposed(to_elements(weights[2], weights[3]));
#pragma unroll
        for (u32 p = 0; p < PARTS; p++) mix(p, values[p], first, second);
    }

    // Part `p` of the values at four positions.
    METHOD static void fetch(u32 (&values)[4][LOADS][WORDS], const T *const (&from)[4], u32 p) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
#pragma unroll
            for (u32 j = 0; j < LOADS; j++) load_words(values[i][j], from[i] + (p * LOADS + j) * 16 * WORDS);
    }

    METHOD void score(float (&scores)[4], float scale, const uint4 (&keys)[2][D / 32]) const {
        float halves[2][4] = {};
#pragma unroll
        for (u32 j = 0; j < D / 32; j++) {
            const u32 first[4] = {keys[0][j].x, keys[1][j].x, keys[0][j].y, keys[1][j].y};
            const u32 second[4] = {keys[0][j].z, keys[1][j].z, keys[0][j].w, keys[1][j].w};
            mma(halves[0], first, q[j].x, q[j].y);
            mma(halves[1], second, q[j].z, q[j].w);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) scores[i] = (halves[0][i] + halves[1][i]) * scale;
    }

    // Turns scores into weights relative to the running maximum, which seldom rises.
    METHOD void soften(float (&scores)[4]) {
        float highest[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            highest[i] = fmaxf(top[i], fmaxf(scores[i], scores[i + 2]));
#pragma unroll
            for (int mask = 16; mask > 2; mask /= 2) highest[i] = fmaxf(highest[i], from_lane_xor(highest[i], mask));
        }
        if (lanes_where(highest[0] > top[0] || highest[1] > top[1])) {
            float shrink[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                shrink[i] = power_of_two(top[i] - highest[i]);
                top[i] = highest[i];
                sum[i] *= shrink[i];
            }
#pragma unroll
            for (u32 m = 0; m < D / 16; m++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) out[m][i] *= shrink[i % 2];
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            scores[i] = power_of_two(scores[i] - top[i % 2]);
            sum[i % 2] += scores[i];
        }
    }

    // out += values * weights
    METHOD void mix(u32 p, const u32 (&values)[4][LOADS][WORDS], u32 first, u32 second) {
#pragma unroll
        for (u32 j = 0; j < LOADS; j++)
#pragma unroll
            for (u32 i = 0; i < WORDS; i++) {
                const u32 v[4] = {pick_bytes(values[0][j][i], values[1][j][i], 0x5410), pick_bytes(values[0][j][i], values[1][j][i], 0x7632),
                                  pick_bytes(values[2][j][i], values[3][j][i], 0x5410), pick_bytes(values[2][j][i], values[3][j][i], 0x7632)};
                mma(out[(p * LOADS + j) * WORDS + i], v, first, second);
            }
    }

    // The element of the head that `out[m][i]` belongs to.
    METHOD static u32 element(u32 m, u32 i) { return (m / WORDS * 8 + threadIdx.x % 32 / 4) * 2 * WORDS + m % WORDS * 2 + i / 2; }
};

// Joins the warps' sums and writes the heads.
template <u32 D> DEVICE void write_heads(const Decode &a, const Cluster &c, Eight<D> &state) {
    // Against bank conflicts.
    const u32 PITCH = D + 1;
    SHARED(float, tops, 4 * HEADS);
    SHARED(float, sums, 4 * HEADS);
    SHARED(float, outs, 4 * HEADS * (D + 1));
    u32 warp = threadIdx.x / 32, t = threadIdx.x % 4;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        // Each g saw its own positions.
#pragma unroll
        for (int mask = 16; mask > 2; mask /= 2) state.sum[i] += from_lane_xor(state.sum[i], mask);
        if (threadIdx.x % 32 >= 4) continue;
        tops[warp * HEADS + 2 * t + i] = state.top[i];
        sums[warp * HEADS + 2 * t + i] = state.sum[i];
    }
#pragma unroll
    for (u32 m = 0; m < D / 16; m++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) outs[(warp * HEADS + 2 * t + i % 2) * PITCH + Eight<D>::element(m, i)] = state.out[m][i];
    __syncthreads();
    Sums<D> own;
#pragma unroll
    for (u32 i = 0; i < Sums<D>::N; i++) {
        // Those of heads past the last are dropped.
        u32 at = threadIdx.x + 128 * i, head = least(at / D, HEADS - 1);
        own.sum[i] = own.out[i] = 0.0f;
        own.top[i] = fmaxf(fmaxf(tops[head], tops[HEADS + head]), fmaxf(tops[2 * HEADS + head], tops[3 * HEADS + head]));
#pragma unroll
        for (u32 from = 0; from < 4; from++) {
            float weight = power_of_two(tops[from * HEADS + head] - own.top[i]);
            own.sum[i] += sums[from * HEADS + head] * weight;
            own.out[i] += outs[(from * HEADS + head) * PITCH + at % D] * weight;
        }
    }
    if (!own.join(a, c.split, ceil_div(c.count * D, 128))) return;
#pragma unroll
    for (u32 i = 0; i < Sums<D>::N; i++) {
        u32 at = threadIdx.x + 128 * i, head = at / D;
        if (head < c.count) result_of(a, c, head, D)[at % D] = to_element(own.out[i] / own.sum[i]);
    }
}

template <u32 D> DEVICE void attend(const Decode &a, const Cluster &c, const T *page) {
    Span span = c.split.span;
    Eight<D> state;
    state.begin(a, c);
    for (u32 base = first_of(span); base < span.end; base += 64) {
        // Looked up while this one's keys are under way.
        const T *next = run_at(a, c, base + 64);
        state.see(a, base, span, page);
        page = next;
    }
    write_heads<D>(a, c, state);
}

#endif

template <u32 D> DEVICE void decode_attention(const Decode &a) {
    let_next_start();
    u32 group = a.heads / a.pages.kv_heads, per_key = ceil_div(group, HEADS);
    u32 kv_head = blockIdx.x / per_key, first = kv_head * group + blockIdx.x % per_key * HEADS;
    Cluster c = {this_split(a), kv_head, first, least(HEADS, (kv_head + 1) * group - first)};
    // What is known without the kernel before, and to the first page's place that is much, is found out while it runs.
    const T *page = run_at(a, c, first_of(c.split.span));
    wait_for_previous();
    if (c.split.count > 0) attend<D>(a, c, page);
}

#define DECODE(name, width, per_sm)                                                                                               \
    ENTRY(name, 128, per_sm, (const u32 *n, const uint4 *splits, const T *qkv, T *kv, u64 page_stride, const u32 *block_tables,   \
            u32 max_blocks, T *out, uint4 *parts, u32 *counts, u32 heads, u32 kv_heads, u32 block_tokens, float scale,            \
            float cap)) {                                                                                                         \
        Decode a = {n, splits, qkv, {kv, page_stride, block_tables, max_blocks, block_tokens, kv_heads, width}, out, parts,       \
                    counts, heads, scale, cap * LOG2_E};                                                                          \
        decode_attention<width>(a);                                                                                               \
    }

DECODE(decode_attention_d32, 32, 4)
DECODE(decode_attention_d64, 64, 4)
DECODE(decode_attention_d96, 96, 3)
DECODE(decode_attention_d128, 128, 3)
DECODE(decode_attention_d256, 256, 2)
