// What every kernel stands on: entry points, shared memory, and the instructions that C++ has no word for.
//
// Each of those is one small function here, and has a twin of the same name in the CPU shim of the tests, which defines
// PM_SHIM: kernels hold no `asm` and no `__shared__` of their own, so that the very same text runs on a CPU. Nothing is included,
// because a machine with a driver has no headers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef PM_SHIM

// The name of an entry point carries the unit's type.
#if !defined(PM_T)
#define PM_NAME(name) name
#elif PM_T == 0
#define PM_NAME(name) name##_f32
#elif PM_T == 1
#define PM_NAME(name) name##_f16
#else
#define PM_NAME(name) name##_bf16
#endif

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
// One that is called from several places and too large to stand in each.
#define DEVICE_CALL static __device__ __noinline__
// A kernel for blocks of exactly `threads`; `per_sm` blocks of them should fit a multiprocessor.
#define ENTRY(name, threads, per_sm, args) extern "C" __global__ void __launch_bounds__(threads, per_sm) PM_NAME(name) args
#define INFINITY __int_as_float(0x7f800000)
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

// Waits for the kernel before this one; a no-op where none is awaited.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one start up to its own wait.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that are read once: they should not displace what is read again. Not by the path for constants, whose loads the
// assembler moves behind the wait for the kernel before.
DEVICE uint4 load_once(const void *from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// Eight bytes likewise.
DEVICE u64 load_once_8(const void *from) {
    u64 v;
    asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}

// 16 bytes of what another block of this kernel has written and announced: not from this multiprocessor's own cache.
DEVICE uint4 load_announced(const void *from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

// Announces what this warp has written, one of `n` that come to this count. True for the last, which sees what all of them have
// written; it sets the count back for the next kernel.
DEVICE bool is_last_warp(u32 *count, u32 n) {
    // What the warp has written is released by its first lane, and what that lane acquires is there for the warp's loads.
    __syncwarp();
    u32 before = 0;
    if (threadIdx.x % 32 == 0)
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    __syncwarp();
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before + 1 != n) return false;
    if (threadIdx.x % 32 == 0) *count = 0;
    return true;
}

DEVICE float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

DEVICE u32 floats_to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE float f16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE u32 floats_to_f16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two f16: infinity of either sign becomes the largest number of that sign, and what is no number stays none.
DEVICE u32 finite_f16x2(u32 pair) {
    u32 capped;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(capped) : "r"(pair), "r"(0x7bff7bff));
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(capped), "r"(0xfbfffbff));
    return pair;
}

// 1 / v, to about its last bit.
DEVICE float reciprocal(float v) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// 2^v, to about its last bits; 0 where that is too small for a whole fraction.
DEVICE float power_of_two(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// Four of the eight bytes of `low` and then `high`, by their numbers in the digits of `which`, the last byte's first.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }

// Starts to copy 16 bytes to shared memory, or zeros where `live` is false; nothing is read then.
DEVICE void copy_async(void *to, const void *from, bool live) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(live ? 16 : 0) : "memory");
}

// Ends a group of copies.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `pending` groups of this thread are under way.
template <int pending> DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i%8 of matrix i/8.
DEVICE void load_matrices(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// An 8x8 matrix of 16-bit elements, of which lane i has row i/4, columns 2(i%4) and the next, with its rows for columns.
DEVICE u32 transposed(u32 pair) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

// c += a * b for a of 16x16, b of 16x8.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The value of the lane whose number differs in the bits of `mask`.
template <class V> DEVICE V from_lane_xor(V value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The value of lane `lane`.
template <class V> DEVICE V from_lane(V value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// A bit for each lane of the warp: whether it says so.
DEVICE u32 lanes_where(bool it_is) { return __ballot_sync(0xffffffffu, it_is); }

// A bit for each lane of the warp that has the same value.
DEVICE u32 lanes_alike(u32 v) { return __match_any_sync(0xffffffffu, v); }

// What the lanes of a warp have written to shared memory is there for all of them.
DEVICE void sync_warp() { __syncwarp(); }

// The sum over the lanes of a warp, modulo 2^32.
DEVICE u32 sum_of_lanes(u32 v) { return __reduce_add_sync(0xffffffffu, v); }

// The largest and the smallest over the lanes of a warp.
DEVICE u32 most_of_lanes(u32 v) { return __reduce_max_sync(0xffffffffu, v); }
DEVICE u32 least_of_lanes(u32 v) { return __reduce_min_sync(0xffffffffu, v); }

// The number of the lowest bit, and how many there are.
DEVICE u32 lowest_bit(u32 bits) { return (u32)__ffs((int)bits) - 1; }
DEVICE u32 count_bits(u32 bits) { return (u32)__popc(bits); }

#endif

DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 most(u32 a, u32 b) { return a > b ? a : b; }

// cap * tanh(v / cap)
DEVICE float soft_cap(float v, float cap) {
    return cap - 2.0f * cap * reciprocal(1.0f + power_of_two(2.88539008f * v * reciprocal(cap)));
}

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v += from_lane_xor(v, mask);
    return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, from_lane_xor(v, mask));
    return v;
}

// The sum over a block of 256 threads, for all of them.
DEVICE float block_sum_256(float v) {
    SHARED(float, sums, 8);
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += sums[i];
    return sum;
}
