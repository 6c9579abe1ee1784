//! Quantised weights as they lie in memory: 32 columns by one block of a GGML type, in exactly its bits.
//!
//! Four values of a column lie together, as both the vectors' and the tiles' dot products want them; what is packed
//! tighter than a byte is opened into a byte per value right before its products. Why not bytes for all: a decode step is
//! bound by the weights that it reads.

use half::f16;

use super::isa::{LANES, Lanes, Simd, WeightQuads};
use super::matrix::{BLOCK, PANEL};
use crate::load::{Elements, scale_and_minimum};

/// Weights of 32 columns, for products with activations in 8 bits. Column `c` of a block of 32 along K is `scale * quads`,
/// less `minimum` where the type has one.
pub(super) trait QuantBlock: Send + Sync + 'static {
    /// Blocks of 32 along K.
    const BLOCKS: usize;
    /// Scales that a column has within 32 values: 1, or 2 for sixteen each.
    const RUNS: usize;
    /// Whether there are minima.
    const MINIMA: bool;
    /// All zeros.
    const EMPTY: Self;

    /// The bytes of a block, opened into `room` where they are packed.
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads;

    /// The factors of a block.
    fn factors<S: Simd>(&self, s: S, block: usize, out: &mut ColumnFactors);

    /// Takes over one column, which is all zeros, from a block of elements of its type.
    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize);

    /// The value `k` of a column.
    fn value(&self, column: usize, k: usize) -> f32;
}

/// What the columns of a panel are multiplied by, and what they begin at, by half of the panel.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct ColumnFactors {
    /// By run of K.
    pub(super) scales: [[Lanes; 2]; 2],
    pub(super) minima: [Lanes; 2],
}

/// GGML's Q8_0: signed bytes and a scale.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q8Block {
    pub(super) quants: WeightQuads,
    pub(super) scales: [f16; PANEL],
}

/// GGML's Q4_K: eight blocks of unsigned nibbles, each with a 6-bit scale and a 6-bit minimum, which have a scale themselves.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q4kBlock {
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[[u8; 4 * PANEL]; 4]; 8],
    scales: [[u8; PANEL]; 8],
    minima: [[u8; PANEL]; 8],
    scale: [f16; PANEL],
    minimum: [f16; PANEL],
}

/// GGML's Q6_K: eight blocks of 6-bit values, 32 too large, with an 8-bit scale for each sixteen, which have a scale themselves.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q6kBlock {
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[[u8; 4 * PANEL]; 4]; 8],
    /// Bits 4 and 5 of quads 0, 2, 4, 6 and of 1, 3, 5, 7, from the lowest pair up.
    pairs: [[[u8; 4 * PANEL]; 2]; 8],
    scales: [[i8; PANEL]; 16],
    scale: [f16; PANEL],
}

/// Where value `i` of a column in a block of 32 is: its quad and the byte there.
#[inline(always)]
fn at(column: usize, i: usize) -> (usize, usize) {
    (i / 4, 4 * column + i % 4)
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// `scale * factors`, for both halves of a panel.
#[inline(always)]
fn scaled<S: Simd>(s: S, scale: &[f16; PANEL], factor: impl Fn(usize) -> f32, out: &mut [Lanes; 2]) {
    let (halves, _) = scale.as_chunks::<LANES>();
    for (half, (scale, out)) in halves.iter().zip(out).enumerate() {
        let factors: Lanes = std::array::from_fn(|i| factor(half * LANES + i));
        s.store(s.mul(s.load_f16(scale), s.load(&factors)), out);
    }
}

// === impl ColumnFactors ===

impl ColumnFactors {
    pub(super) const ZERO: Self = Self { scales: [[[0.0; LANES]; 2]; 2], minima: [[0.0; LANES]; 2] };
}

// === impl Q8Block ===

impl QuantBlock for Q8Block {
    const BLOCKS: usize = 1;
    const RUNS: usize = 1;
    const MINIMA: bool = false;
    const EMPTY: Self = Self { quants: [[0; 4 * PANEL]; BLOCK / 4], scales: [f16::ZERO; PANEL] };

    #[inline(always)]
    fn quads<'a>(&'a self, _block: usize, _room: &'a mut WeightQuads) -> &'a WeightQuads {
        &self.quants
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, _block: usize, out: &mut ColumnFactors) {
        let (halves, _) = self.scales.as_chunks::<LANES>();
        s.store(s.load_f16(&halves[0]), &mut out.scales[0][0]);
        s.store(s.load_f16(&halves[1]), &mut out.scales[0][1]);
    }

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<34>()[block];
        self.scales[column] = half(ggml, 0);
        for (i, q) in ggml[2..].iter().enumerate() {
            let (quad, byte) = at(column, i);
            self.quants[quad][byte] = q.cast_signed();
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (quad, byte) = at(column, k);
        f32::from(self.quants[quad][byte]) * self.scales[column].to_f32()
    }
}

// === impl Q4kBlock ===

impl QuantBlock for Q4kBlock {
    const BLOCKS: usize = 8;
    const RUNS: usize = 1;
    const MINIMA: bool = true;
    const EMPTY: Self = Self {
        nibbles: [[[0; 4 * PANEL]; 4]; 8],
        scales: [[0; PANEL]; 8],
        minima: [[0; PANEL]; 8],
        scale: [f16::ZERO; PANEL],
        minimum: [f16::ZERO; PANEL],
    };

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads {
        let (low, high) = room.split_at_mut(BLOCK / 8);
        for (nibbles, (low, high)) in self.nibbles[block].iter().zip(low.iter_mut().zip(high)) {
            for (nibbles, (low, high)) in nibbles.iter().zip(low.iter_mut().zip(high)) {
                (*low, *high) = ((nibbles & 15).cast_signed(), (nibbles >> 4).cast_signed());
            }
        }
        room
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, block: usize, out: &mut ColumnFactors) {
        let (scales, minima) = (&self.scales[block], &self.minima[block]);
        scaled(s, &self.scale, |c| f32::from(scales[c]), &mut out.scales[0]);
        scaled(s, &self.minimum, |c| f32::from(minima[c]), &mut out.minima);
    }

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<144>()[block];
        (self.scale[column], self.minimum[column]) = (half(ggml, 0), half(ggml, 2));
        for block in 0..8 {
            [self.scales[block][column], self.minima[block][column]] = scale_and_minimum(&ggml[4..16], block);
            for i in 0..BLOCK {
                // A byte has values of two blocks.
                let q = ggml[16 + block / 2 * BLOCK + i] >> (block % 2 * 4) & 15;
                let (quad, byte) = at(column, i);
                self.nibbles[block][quad % 4][byte] |= q << (quad / 4 * 4);
            }
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (block, (quad, byte)) = (k / BLOCK, at(column, k % BLOCK));
        let q = self.nibbles[block][quad % 4][byte] >> (quad / 4 * 4) & 15;
        let scale = self.scale[column].to_f32() * f32::from(self.scales[block][column]);
        scale * f32::from(q) - self.minimum[column].to_f32() * f32::from(self.minima[block][column])
    }
}

// === impl Q6kBlock ===

impl QuantBlock for Q6kBlock {
    const BLOCKS: usize = 8;
    const RUNS: usize = 2;
    const MINIMA: bool = false;
    const EMPTY: Self = Self {
        nibbles: [[[0; 4 * PANEL]; 4]; 8],
        pairs: [[[0; 4 * PANEL]; 2]; 8],
        scales: [[0; PANEL]; 16],
        scale: [f16::ZERO; PANEL],
    };

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads {
        for (quad, out) in room.iter_mut().enumerate() {
            let (nibbles, pairs) = (&self.nibbles[block][quad % 4], &self.pairs[block][quad % 2]);
            let (up, down) = (4 * (quad / 4), 2 * (quad / 2));
            for (out, (nibbles, pairs)) in out.iter_mut().zip(nibbles.iter().zip(pairs)) {
                *out = (nibbles >> up & 15 | (pairs >> down & 3) << 4).cast_signed() - 32;
            }
        }
        room
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, block: usize, out: &mut ColumnFactors) {
        for (run, out) in out.scales.iter_mut().enumerate() {
            let scales = &self.scales[2 * block + run];
            scaled(s, &self.scale, |c| f32::from(scales[c]), out);
        }
    }

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<210>()[block];
        self.scale[column] = half(ggml, 208);
        for (run, scales) in self.scales.iter_mut().enumerate() {
            scales[column] = ggml[192 + run].cast_signed();
        }
        for k in 0..8 * BLOCK {
            // Of 128 values, the four quarters share bytes of pairs, and two of them each bytes of nibbles.
            let (part, quarter, i) = (k / 128, k % 128 / BLOCK, k % BLOCK);
            let low = ggml[64 * part + quarter % 2 * BLOCK + i] >> (quarter / 2 * 4) & 15;
            let high = ggml[128 + part * BLOCK + i] >> (2 * quarter) & 3;
            let (quad, byte) = at(column, i);
            self.nibbles[k / BLOCK][quad % 4][byte] |= low << (quad / 4 * 4);
            self.pairs[k / BLOCK][quad % 2][byte] |= high << (quad / 2 * 2);
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (block, (quad, byte)) = (k / BLOCK, at(column, k % BLOCK));
        let low = self.nibbles[block][quad % 4][byte] >> (quad / 4 * 4) & 15;
        let high = self.pairs[block][quad % 2][byte] >> (quad / 2 * 2) & 3;
        let q = (low | high << 4).cast_signed() - 32;
        self.scale[column].to_f32() * f32::from(self.scales[k / 16][column]) * f32::from(q)
    }
}
