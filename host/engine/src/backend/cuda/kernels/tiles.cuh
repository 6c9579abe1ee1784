// Tiles of products: whose rows they have, and in shared memory, where they feed the matrix units, where a chunk lies and how a tile is
// filled.

// Rows `first .. end` of x; with `numbers`, of a list of rows of x.
struct Rows {
    const T *x;
    const u32 *numbers;
    u32 first;
    u32 end;

    METHOD u32 number(u32 row) const { return numbers ? numbers[row] : row; }
    METHOD const T *at(u32 row, u32 k) const { return x + (u64)number(row) * k; }
};

// Those from `first` on, of as many as stand at `n`.
DEVICE Rows rows_from(const T *x, u32 first, const u32 *n) {
    Rows rows = {x, 0, first, *n};
    return rows;
}

// Rows of tile `number` of a list of tiles, each of one expert's rows: how many tiles, then of each the expert and its rows. None past
// the last one.
struct ExpertTile {
    u32 expert;
    Rows rows;
};

DEVICE ExpertTile expert_tile(const u32 *tiles, u32 number, const T *x, const u32 *numbers) {
    ExpertTile tile = {0, {x, numbers, 0, 0}};
    if (number >= tiles[0]) return tile;
    const u32 *words = tiles + 1 + 3 * number;
    tile.expert = words[0], tile.rows.first = words[1], tile.rows.end = words[2];
    return tile;
}

#if PM_T != 0

// A tile in shared memory has 64 elements of k per row: eight 16-byte chunks, whose order is turned by the row's number so that
// the eight rows of a matrix lie in different banks.
DEVICE T *chunk(T *tile, u32 row, u32 column) { return tile + row * 64 + ((column ^ row) & 7) * 8; }

// Rows `first ..` of a matrix with `rows` of them, elements `at .. at + 64` of each; zeros past either end. A warp copies four rows.
template <u32 ROWS, u32 THREADS> DEVICE void fetch(T *tile, const T *from, u32 first, u32 rows, u32 at, u32 k) {
    u32 row = threadIdx.x / 8, column = threadIdx.x % 8;
    bool inside = at + column * 8 < k;
    T *to = chunk(tile, row, column);
    from += (u64)(first + row) * k + at + column * 8;
#pragma unroll
    for (u32 i = 0; i < ROWS; i += THREADS / 8) copy_async(to + i * 64, from + (u64)i * k, inside && first + row + i < rows);
}

// The same of rows of x, first of them `rows.first`.
template <u32 ROWS, u32 THREADS> DEVICE void fetch(T *tile, const Rows &rows, u32 at, u32 k) {
    if (!rows.numbers) return fetch<ROWS, THREADS>(tile, rows.x, rows.first, rows.end, at, k);
    u32 row = threadIdx.x / 8, column = threadIdx.x % 8;
    bool inside = at + column * 8 < k;
    T *to = chunk(tile, row, column);
#pragma unroll
    for (u32 i = 0; i < ROWS; i += THREADS / 8) {
        bool live = inside && rows.first + row + i < rows.end;
        copy_async(to + i * 64, live ? rows.at(rows.first + row + i, k) + at + column * 8 : rows.x, live);
    }
}

// Which tile a block computes. Blocks begin in the order of their numbers, and those of one tile of columns follow each other, for the
// sake of the cache: they read the same weight, which is the larger of the two matrices.
DEVICE u32 tile_row() { return (blockIdx.y * gridDim.x + blockIdx.x) % gridDim.y; }
DEVICE u32 tile_column() { return (blockIdx.y * gridDim.x + blockIdx.x) / gridDim.y; }

// A product whose k is cut into gridDim.z runs, for grids that would not fill the device: where the sums of each run go, and how many
// warps have brought theirs.
struct Runs {
    float *parts;
    u32 *counts;
    // Where this block's run of `tiles` tiles begins; the next one's is its end.
    METHOD static u32 start(u32 tiles, u32 run) { return tiles * run / gridDim.z; }
};

// A product that is never cut.
struct Whole {
    METHOD static u32 start(u32 tiles, u32 run) { return tiles * run; }
};

template <u32 WARPS, u32 I, u32 J> DEVICE bool join_runs(float (&)[I][J][4], const Whole &) { return true; }

// Brings this warp's sums together with those of the other runs. True for the warp that comes last: it has the sums of all then,
// added in the order of the runs, whoever that is. Every thread keeps its own numbers in the same places.
template <u32 WARPS, u32 I, u32 J> DEVICE bool join_runs(float (&sums)[I][J][4], const Runs &r) {
    u32 runs = gridDim.z;
    if (runs == 1) return true;
    u64 place = (u64)(blockIdx.y * gridDim.x + blockIdx.x) * WARPS + threadIdx.x / 32;
    float *parts = r.parts + place * runs * (I * J * 128) + threadIdx.x % 32 * 4, *own = parts + blockIdx.z * (I * J * 128);
#pragma unroll
    for (u32 i = 0; i < I; i++)
#pragma unroll
        for (u32 j = 0; j < J; j++) {
            *(uint4 *)(own + (i * J + j) * 128) = pack(sums[i][j]);
            sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0.0f;
        }
    if (!is_last_warp(r.counts + place, runs)) return false;
#pragma unroll(I * J > 8 ? 1 : 2)
    for (u32 run = 0; run < runs; run++)
#pragma unroll
        for (u32 i = 0; i < I; i++)
#pragma unroll
            for (u32 j = 0; j < J; j++) {
                uint4 v = load_announced(parts + (u64)run * (I * J * 128) + (i * J + j) * 128);
                sums[i][j][0] += __uint_as_float(v.x), sums[i][j][1] += __uint_as_float(v.y);
                sums[i][j][2] += __uint_as_float(v.z), sums[i][j][3] += __uint_as_float(v.w);
            }
    return true;
}

#endif
