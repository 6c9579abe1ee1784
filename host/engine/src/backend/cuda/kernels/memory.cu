// Kernels that move or touch memory and know nothing of models.

// Copies pages: block column `y` copies pair `y`. No page may be in two pairs, unless as the source of both.
ENTRY(copy_pages, 256, 4, (const u32 *n, const u32 *pairs, u8 *base, u64 page_bytes)) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.y >= *n) return;
    const uint4 *from = (const uint4 *)(base + pairs[blockIdx.y * 2] * page_bytes);
    uint4 *to = (uint4 *)(base + pairs[blockIdx.y * 2 + 1] * page_bytes);
    for (u64 i = blockIdx.x * 256 + threadIdx.x; i < page_bytes / 16; i += (u64)gridDim.x * 256) to[i] = from[i];
}

// Reads everything once and keeps a word per block: how fast memory can be read at all. Eight loads per thread are under way.
ENTRY(read_stream, 256, 4, (const u8 *from, u64 bytes, u32 *out)) {
    SHARED(u32, words, 8);
    wait_for_previous();
    u64 all = bytes / 16, stride = (u64)gridDim.x * 256;
    u32 word = 0;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < all; i += 8 * stride) {
        uint4 held[8];
#pragma unroll
        for (u32 u = 0; u < 8; u++) {
            u64 at = i + u * stride;
            held[u] = load_once(from + (at < all ? at : i) * 16);
        }
#pragma unroll
        for (u32 u = 0; u < 8; u++)
            if (i + u * stride < all) word ^= held[u].x ^ held[u].y ^ held[u].z ^ held[u].w;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) word ^= from_lane_xor(word, mask);
    if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = word;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 i = 1; i < 8; i++) word ^= words[i];
    out[blockIdx.x] = word;
}

// Fills words with `word`, in which the bits of `mask` are as good as random.
ENTRY(fill_words, 256, 4, (u32 *to, u64 words, u32 word, u32 mask)) {
    wait_for_previous();
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < words; i += (u64)gridDim.x * 256)
        to[i] = word ^ (u32)(i * 0x9e3779b97f4a7c15 >> 32) & mask;
}
