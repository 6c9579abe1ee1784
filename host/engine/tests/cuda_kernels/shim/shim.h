// The kernels' world on a CPU: the same words as common.cuh, with a fiber for every CUDA thread of a block.
//
// Blocks run one after another, in shuffled order. Within a block one fiber runs until it ends or waits (at a barrier, or in an
// operation of its warp); which one is next is drawn from a seed. So threads are as far apart as they can be,
// and a missing barrier shows as a wrong result under some seeds. Shared memory is filled with NaN for each block and, like
// every buffer, lies between the red zones of AddressSanitizer. An asynchronous copy happens at once or when it is awaited, as drawn.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#define PM_SHIM 1

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace shim {

struct Dim {
    unsigned x, y, z;
};

struct Copy {
    void *to;
    const void *from;
    bool live;
};

enum State { RUNNING, AT_BARRIER, IN_WARP, ENDED };

struct Fiber {
    Dim index;
    unsigned lane, warp;
    State state;
    // Where it waits.
    const char *file;
    int line;
    // Which of its warp's two sets of slots it used last.
    unsigned phase;
    // When it is next: see the scheduler.
    uint64_t rank, turn;
    // Copies under way, by group; the last group is open.
    std::vector<std::vector<Copy>> copies;
    void *stack;
    void *context;
    void *fake_stack;
};

// What a lane shows the others of its warp.
struct Slot {
    alignas(16) unsigned char bytes[48];
};

extern Fiber *current;
extern Dim block_index, grid_size;

// Ends the process with a message that names kernel, block, thread and seed.
[[noreturn]] void fail(const char *what, const char *file, int line);
int sync_threads(int predicate, const char *file, int line);
void *shared(const char *file, int line, size_t bytes);
void *dynamic_shared();
// Shows `bytes` to the warp and returns what all of its lanes show.
const Slot *exchange(const void *mine, size_t bytes);
void start_copy(Copy copy);
void await_copies(size_t pending);

inline void check_aligned(const void *p) {
    if ((uintptr_t)p % 16 != 0) fail("a 16-byte access is not aligned", "", 0);
}

// === Entry points ===

enum Kind { U32, U64, F32, ADDRESS };

struct Argument {
    Kind kind;
    uint64_t bits;
};

inline Kind kind_of(unsigned) { return U32; }
inline Kind kind_of(unsigned long long) { return U64; }
inline Kind kind_of(float) { return F32; }
template <class P> Kind kind_of(P *) { return ADDRESS; }

inline void unpack(const Argument &a, unsigned &v) { v = (unsigned)a.bits; }
inline void unpack(const Argument &a, unsigned long long &v) { v = a.bits; }
inline void unpack(const Argument &a, float &v) {
    unsigned bits = (unsigned)a.bits;
    memcpy(&v, &bits, 4);
}
template <class P> void unpack(const Argument &a, P *&v) { v = (P *)a.bits; }

template <class A> A take(const Argument &a) {
    A v{};
    if (a.kind != kind_of(v)) fail("an argument has another type than the kernel's", "", 0);
    unpack(a, v);
    return v;
}

struct Body {
    virtual void run(const std::vector<Argument> &arguments) = 0;
    virtual std::vector<Kind> kinds() const = 0;
};

template <class... A> struct BodyOf : Body {
    void (*kernel)(A...);
    explicit BodyOf(void (*k)(A...)) : kernel(k) {}
    template <size_t... I> void call(const std::vector<Argument> &a, std::index_sequence<I...>) { kernel(take<A>(a[I])...); }
    void run(const std::vector<Argument> &a) override {
        if (a.size() != sizeof...(A)) fail("the number of arguments is not the kernel's", "", 0);
        call(a, std::index_sequence_for<A...>{});
    }
    std::vector<Kind> kinds() const override { return {kind_of(A{})...}; }
};

struct Entry {
    const char *name;
    unsigned threads;
    Body *body;
    static std::vector<Entry> &all() {
        static std::vector<Entry> entries;
        return entries;
    }
    template <class... A> Entry(const char *n, unsigned t, void (*k)(A...)) : name(n), threads(t), body(new BodyOf<A...>(k)) { all().push_back(*this); }
};

}  // namespace shim

#define threadIdx (shim::current->index)
#define blockIdx (shim::block_index)
#define gridDim (shim::grid_size)
#define __syncthreads() ((void)shim::sync_threads(0, __FILE__, __LINE__))
#define __syncthreads_or(predicate) shim::sync_threads(predicate, __FILE__, __LINE__)

// SUFFIX is what the names of the unit's entry points end in.
#define DEVICE static inline
#define DEVICE_CALL static
#define METHOD
#define SHARED(type, name, count) type *name = (type *)shim::shared(__FILE__, __LINE__, sizeof(type) * (count))
#define DYNAMIC_SHARED(name) unsigned char *name = (unsigned char *)shim::dynamic_shared()
#define ENTRY(name, threads, per_sm, args)                     \
    static void name args;                                     \
    static shim::Entry entry_of_##name(#name SUFFIX, threads, name);  \
    static void name args

// === The instructions of common.cuh ===

static inline float __uint_as_float(unsigned bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static inline unsigned __float_as_uint(float v) {
    unsigned bits;
    memcpy(&bits, &v, 4);
    return bits;
}

template <class V> static inline V atomicAdd(V *to, V v) {
    V old = *to;
    *to += v;
    return old;
}

static inline unsigned atomicOr(unsigned *to, unsigned v) {
    unsigned old = *to;
    *to |= v;
    return old;
}

static inline unsigned atomicExch(unsigned *to, unsigned v) {
    unsigned old = *to;
    *to = v;
    return old;
}

static inline void wait_for_previous() {}
static inline void let_next_start() {}

static inline uint4 load_once(const void *from) {
    shim::check_aligned(from);
    return *(const uint4 *)from;
}

static inline unsigned long long load_once_8(const void *from) {
    if ((uintptr_t)from % 8 != 0) shim::fail("an 8-byte access is not aligned", "", 0);
    return *(const unsigned long long *)from;
}

static inline uint4 load_announced(const void *from) { return load_once(from); }

// Blocks run one after another: whoever comes sees what those before it have written. A warp's lanes come together.
static inline bool is_last_warp(unsigned *count, unsigned n) {
    unsigned before = 0;
    shim::exchange(&before, sizeof before);
    // No other thread comes in between.
    if (shim::current->lane == 0) {
        before = *count;
        *count = before + 1 == n ? 0 : before + 1;
    }
    memcpy(&before, shim::exchange(&before, sizeof before)[0].bytes, sizeof before);
    return before + 1 == n;
}

static inline float bf16_to_float(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// To nearest, ties to even.
static inline unsigned float_to_bf16(float v) {
    unsigned bits = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline unsigned floats_to_bf16x2(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }

static inline float f16_to_float(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float v = exponent == 0    ? ldexpf((float)fraction, -24)
              : exponent == 31 ? (fraction ? NAN : INFINITY)
                               : ldexpf((float)(fraction | 1024), exponent - 25);
    return bits & 0x8000 ? -v : v;
}

// To nearest, ties to even: in units of the last place, which nearbyintf rounds so.
static inline unsigned float_to_f16(float v) {
    unsigned sign = __float_as_uint(v) >> 16 & 0x8000;
    float size = fabsf(v);
    if (v != v) return 0x7fff;
    if (size == 0.0f) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    frexpf(size, &exponent);
    int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    unsigned units = (unsigned)nearbyintf(ldexpf(size, -unit));
    // A carry out of the fraction moves on into the exponent.
    return unit == -24 ? sign | units : sign | (((unsigned)(unit + 24) << 10) + units);
}

static inline unsigned floats_to_f16x2(float low, float high) { return float_to_f16(low) | float_to_f16(high) << 16; }

static inline unsigned finite_f16(unsigned bits) {
    unsigned size = bits & 0x7fff;
    return size > 0x7c00 ? 0x7fff : size == 0x7c00 ? bits - 1 : bits;
}

static inline unsigned finite_f16x2(unsigned pair) { return finite_f16(pair & 0xffff) | finite_f16(pair >> 16) << 16; }

static inline float reciprocal(float v) { return 1.0f / v; }

static inline float power_of_two(float v) {
    float power = exp2f(v);
    return power < 1.17549435e-38f ? 0.0f : power;
}

static inline unsigned pick_bytes(unsigned low, unsigned high, unsigned which) {
    uint64_t all = (uint64_t)high << 32 | low;
    unsigned picked = 0;
    for (unsigned i = 0; i < 4; i++) picked |= (unsigned)(all >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return picked;
}

static inline void copy_async(void *to, const void *from, bool live) {
    shim::check_aligned(to);
    shim::check_aligned(from);
    shim::start_copy({to, from, live});
}

static inline void commit_copies() { shim::current->copies.emplace_back(); }

template <int pending> static inline void await_copies() { shim::await_copies(pending); }

// A lane reads its row when it arrives, as the instruction does for all lanes at once.
static inline void load_matrices(unsigned (&r)[4], const void *row) {
    shim::check_aligned(row);
    const shim::Slot *rows = shim::exchange(row, 16);
    unsigned lane = shim::current->lane;
    for (unsigned m = 0; m < 4; m++) memcpy(&r[m], rows[m * 8 + lane / 4].bytes + lane % 4 * 4, 4);
}

static inline void load_matrices_transposed(unsigned (&r)[4], const void *row) {
    shim::check_aligned(row);
    const shim::Slot *rows = shim::exchange(row, 16);
    unsigned lane = shim::current->lane;
    for (unsigned m = 0; m < 4; m++) {
        unsigned short low, high;
        memcpy(&low, rows[m * 8 + lane % 4 * 2].bytes + lane / 4 * 2, 2);
        memcpy(&high, rows[m * 8 + lane % 4 * 2 + 1].bytes + lane / 4 * 2, 2);
        r[m] = low | (unsigned)high << 16;
    }
}

static inline unsigned transposed(unsigned pair) {
    const shim::Slot *pairs = shim::exchange(&pair, 4);
    unsigned lane = shim::current->lane, rows[2];
    for (unsigned i = 0; i < 2; i++) memcpy(&rows[i], pairs[(lane % 4 * 2 + i) * 4 + lane / 8].bytes, 4);
    unsigned half = lane / 4 % 2 * 16;
    return (rows[0] >> half & 0xffff) | (rows[1] >> half & 0xffff) << 16;
}

// The element of a fragment: of `a` at (row, k), of `b` at (k, column).
struct Fragments {
    unsigned a[4], b[2];
};

template <float widen(unsigned short)> static inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const shim::Slot *all = shim::exchange(&mine, sizeof mine);
    unsigned lane = shim::current->lane;
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            const Fragments *of_a = (const Fragments *)all[row % 8 * 4 + k % 8 / 2].bytes;
            const Fragments *of_b = (const Fragments *)all[column * 4 + k % 8 / 2].bytes;
            unsigned x = of_a->a[row / 8 + k / 8 * 2] >> k % 2 * 16, y = of_b->b[k / 8] >> k % 2 * 16;
            c[i] += widen((unsigned short)x) * widen((unsigned short)y);
        }
    }
}

static inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply<bf16_to_float>(c, a, b0, b1); }
static inline void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { multiply<f16_to_float>(c, a, b0, b1); }

template <class V> static inline V from_lane(V value, int lane) {
    const shim::Slot *all = shim::exchange(&value, sizeof value);
    V other;
    memcpy(&other, all[lane & 31].bytes, sizeof other);
    return other;
}

template <class V> static inline V from_lane_xor(V value, int mask) { return from_lane(value, (int)shim::current->lane ^ mask); }

static inline unsigned lanes_where(bool it_is) {
    const shim::Slot *all = shim::exchange(&it_is, sizeof it_is);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= (unsigned)(all[lane].bytes[0] != 0) << lane;
    return bits;
}

static inline unsigned lanes_alike(unsigned v) {
    const shim::Slot *all = shim::exchange(&v, sizeof v);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= (unsigned)(memcmp(all[lane].bytes, &v, sizeof v) == 0) << lane;
    return bits;
}

static inline void sync_warp() {
    bool met = true;
    shim::exchange(&met, sizeof met);
}

static inline unsigned most_of_lanes(unsigned v) {
    const shim::Slot *all = shim::exchange(&v, sizeof v);
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned other;
        memcpy(&other, all[lane].bytes, sizeof other);
        v = other > v ? other : v;
    }
    return v;
}

static inline unsigned least_of_lanes(unsigned v) { return ~most_of_lanes(~v); }

static inline unsigned sum_of_lanes(unsigned v) {
    const shim::Slot *all = shim::exchange(&v, sizeof v);
    unsigned sum = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned other;
        memcpy(&other, all[lane].bytes, sizeof other);
        sum += other;
    }
    return sum;
}

static inline unsigned lowest_bit(unsigned bits) { return (unsigned)__builtin_ctz(bits); }
static inline unsigned count_bits(unsigned bits) { return (unsigned)__builtin_popcount(bits); }
