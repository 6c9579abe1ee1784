// Kernels with the faults that the shim must find, and one without.

typedef unsigned int u32;

// Every thread writes what its neighbour reads.
ENTRY(rotate, 64, 1, (const float *from, float *to)) {
    SHARED(float, held, 64);
    held[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = held[(threadIdx.x + 1) % 64];
}

ENTRY(rotate_without_barrier, 64, 1, (const float *from, float *to)) {
    SHARED(float, held, 64);
    held[threadIdx.x] = from[threadIdx.x];
    to[threadIdx.x] = held[(threadIdx.x + 1) % 64];
}

ENTRY(copy_without_wait, 32, 1, (const float *from, float *to)) {
    SHARED(float, held, 128);
    copy_async(held + 4 * threadIdx.x, from + 4 * threadIdx.x, true);
    commit_copies();
    __syncthreads();
    to[threadIdx.x] = held[127 - threadIdx.x];
}

ENTRY(some_end_before_the_barrier, 64, 1, (const float *from, float *to)) {
    if (threadIdx.x > 50) return;
    __syncthreads();
    to[threadIdx.x] = from[threadIdx.x];
}

ENTRY(different_barriers, 64, 1, (const float *from, float *to)) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    to[threadIdx.x] = from[threadIdx.x];
}

ENTRY(half_a_warp_shuffles, 64, 1, (const float *from, float *to)) {
    to[threadIdx.x] = threadIdx.x % 32 < 16 ? from_lane_xor(from[threadIdx.x], 1) : 0.0f;
}

ENTRY(reads_past_the_end, 64, 1, (const float *from, float *to)) { to[threadIdx.x] = from[threadIdx.x + 1]; }

ENTRY(writes_past_the_end, 64, 1, (const float *from, float *to)) { to[threadIdx.x + 1] = from[threadIdx.x]; }

ENTRY(leaves_shared_memory, 64, 1, (const float *from, float *to)) {
    SHARED(float, held, 63);
    held[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = held[0];
}

ENTRY(loads_unaligned, 64, 1, (const float *from, float *to)) {
    uint4 v = load_once(from + 1 + 4 * (threadIdx.x % 4));
    to[threadIdx.x] = __uint_as_float(v.x);
}
