// Tiles of shared memory that feed the matrix units: where a chunk lies, and how a tile is filled.

#if PM_T != 0

// A tile in shared memory has 64 elements of k per row: eight 16-byte chunks, whose order is turned by the row's number so that
// the eight rows of a matrix lie in different banks.
DEVICE T *chunk(T *tile, u32 row, u32 column) { return tile + row * 64 + ((column ^ row) & 7) * 8; }

// Rows `first ..` of a matrix with `rows` of them, elements `at .. at + 64` of each.
template <u32 ROWS, u32 THREADS> DEVICE void fetch(T *tile, const T *from, u32 first, u32 rows, u32 at, u32 k) {
#pragma unroll
    for (u32 i = threadIdx.x; i < ROWS * 8; i += THREADS) {
        u32 row = i / 8, column = i % 8;
        bool live = first + row < rows && at + column * 8 < k;
        copy_async(chunk(tile, row, column), live ? from + (u64)(first + row) * k + at + column * 8 : from, live);
    }
}

#endif
