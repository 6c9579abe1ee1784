//! Weights of GGML's K-quants: 32 columns by a super-block, 256 values along K.
//!
//! A column's scale within a super-block is an integer times one float. So the sum over a super-block is an integer, whoever
//! adds it: vectors multiply the sum of each run by its integer scale, tiles multiply weights that had their scales worked
//! in, as two bytes each (`planes`). One float scale and one float addition are left for 256 values. Activations have one
//! scale for 256 values for that reason, as they have in GGML.

use half::f16;

use super::blocks::{QuantBlock, at, half};
use super::isa::{LANES, Lanes, Planes, Simd, WeightQuads};
use super::matrix::{BLOCK, PANEL};
use super::quant::SuperFactor;
use crate::load::{Elements, scale_and_minimum};

/// Values of a super-block along K.
pub(super) const SUPER: usize = 8 * BLOCK;

/// Weights of 32 columns by a super-block, for products with activations in 8 bits: column `c` of run `r` is
/// `scale * scales(r) * quads`, less `minimum * minima` where the type has minima.
pub(super) trait SuperBlock: QuantBlock {
    /// Runs of a super-block that have an integer scale: 8 of 32 values, or 16 of sixteen.
    const RUNS: usize;
    /// Whether each block of 32 has a minimum.
    const MINIMA: bool;
    /// Bits that the second byte of [`planes`](Self::planes) stands above the first.
    const SHIFT: u32;

    /// The bytes of a block of 32.
    fn quads(&self, block: usize, out: &mut WeightQuads);

    /// The integer scales of a run, by half of the panel.
    fn scales(&self, run: usize) -> [[i32; LANES]; 2];

    /// Bytes of a block of 32 times scales: `first + second * 2^SHIFT`.
    fn planes(&self, block: usize, out: &mut Planes);

    /// What the columns are multiplied by.
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors);
}

/// What the columns of a panel are multiplied by, by half of the panel.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct SuperFactors {
    pub(super) scale: [Lanes; 2],
    pub(super) minimum: [Lanes; 2],
    /// The integer minima of two blocks of 32, side by side for each column.
    pub(super) minima: [[[i16; PANEL]; 2]; 4],
}

/// GGML's Q4_K: eight blocks of unsigned nibbles, each with a 6-bit scale and a 6-bit minimum, which have a scale themselves.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q4kBlock {
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[[u8; 4 * PANEL]; 4]; 8],
    scales: [[u8; PANEL]; 8],
    /// Of two blocks, side by side for each column.
    minima: [[u8; 2 * PANEL]; 4],
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

// === impl SuperFactors ===

impl SuperFactors {
    pub(super) const ZERO: Self =
        Self { scale: [[0.0; LANES]; 2], minimum: [[0.0; LANES]; 2], minima: [[[0; PANEL]; 2]; 4] };

    /// Adds a super-block of one row, whose sum is `whole`, to `acc`.
    #[inline(always)]
    pub(super) fn add<S: Simd, B: SuperBlock>(
        &self,
        s: S,
        half: usize,
        factor: &SuperFactor,
        (whole, acc): (S::I, S::V),
    ) -> S::V {
        let scale = s.splat(factor.scale);
        let acc = s.fma(s.int_to_f32(whole), s.mul(s.load(&self.scale[half]), scale), acc);
        if !B::MINIMA {
            return acc;
        }
        let mut sum = s.dot_start(0);
        for (minima, &sums) in self.minima.iter().zip(&factor.sums) {
            sum = s.dot2(sum, &minima[half], sums);
        }
        s.fma(s.int_to_f32(sum), s.mul(s.load(&self.minimum[half]), s.splat(-factor.scale)), acc)
    }
}

/// Both halves of a panel as floats.
#[inline(always)]
fn widen<S: Simd>(s: S, x: &[f16; PANEL], out: &mut [Lanes; 2]) {
    let (halves, _) = x.as_chunks::<LANES>();
    for (half, out) in halves.iter().zip(out) {
        s.store(s.load_f16(half), out);
    }
}

/// Bytes of 32 columns, two to a word: what no compiler makes of loops over bytes that multiply.
type Words = [u16; 2 * PANEL];

#[inline(always)]
fn words(bytes: &[u8; 4 * PANEL]) -> Words {
    let mut words = [0; 2 * PANEL];
    words.iter_mut().zip(bytes.as_chunks().0).for_each(|(word, bytes)| *word = u16::from_le_bytes(*bytes));
    words
}

/// One number of each column, for both words of the column.
#[inline(always)]
fn spread<T: Copy + Default>(columns: &[T; PANEL]) -> [T; 2 * PANEL] {
    let mut words = [T::default(); 2 * PANEL];
    words.as_chunks_mut().0.iter_mut().zip(columns).for_each(|(words, column)| *words = [*column; 2]);
    words
}

#[inline(always)]
fn put_words(out: &mut [i8; 4 * PANEL], word: impl Fn(usize) -> u16) {
    let out = out.as_chunks_mut().0.iter_mut().enumerate();
    out.for_each(|(i, out)| *out = word(i).to_le_bytes().map(u8::cast_signed));
}

// === impl Q4kBlock ===

impl QuantBlock for Q4kBlock {
    const BLOCKS: usize = 8;
    const EMPTY: Self = Self {
        nibbles: [[[0; 4 * PANEL]; 4]; 8],
        scales: [[0; PANEL]; 8],
        minima: [[0; 2 * PANEL]; 4],
        scale: [f16::ZERO; PANEL],
        minimum: [f16::ZERO; PANEL],
    };

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<144>()[block];
        (self.scale[column], self.minimum[column]) = (half(ggml, 0), half(ggml, 2));
        for block in 0..8 {
            let minimum = &mut self.minima[block / 2][2 * column + block % 2];
            [self.scales[block][column], *minimum] = scale_and_minimum(&ggml[4..16], block);
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
        scale * f32::from(q) - self.minimum[column].to_f32() * f32::from(self.minima[block / 2][2 * column + block % 2])
    }
}

impl SuperBlock for Q4kBlock {
    const RUNS: usize = 8;
    const MINIMA: bool = true;
    const SHIFT: u32 = 3;

    #[inline(always)]
    fn quads(&self, block: usize, out: &mut WeightQuads) {
        let (low, high) = out.split_at_mut(BLOCK / 8);
        for (nibbles, (low, high)) in self.nibbles[block].iter().zip(low.iter_mut().zip(high)) {
            for (nibbles, (low, high)) in nibbles.iter().zip(low.iter_mut().zip(high)) {
                (*low, *high) = ((nibbles & 15).cast_signed(), (nibbles >> 4).cast_signed());
            }
        }
    }

    #[inline(always)]
    fn scales(&self, run: usize) -> [[i32; LANES]; 2] {
        std::array::from_fn(|half| std::array::from_fn(|i| i32::from(self.scales[run][half * LANES + i])))
    }

    /// A scale has six bits: three go to each byte. No byte exceeds 15 * 7, so that a word is multiplied as one number.
    #[inline(always)]
    fn planes(&self, block: usize, [first, second]: &mut Planes) {
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        let scales = spread(&self.scales[block]).map(u16::from);
        for (i, nibbles) in self.nibbles[block].iter().enumerate() {
            let nibbles = words(nibbles);
            for (quad, shift) in [(i, 0), (i + 4, 4)] {
                put_words(&mut first[quad], |c| (nibbles[c] >> shift & 0x0f0f) * (scales[c] & 7));
                put_words(&mut second[quad], |c| (nibbles[c] >> shift & 0x0f0f) * (scales[c] >> 3));
            }
        }
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        widen(s, &self.scale, &mut out.scale);
        widen(s, &self.minimum, &mut out.minimum);
        for (minima, out) in self.minima.iter().zip(&mut out.minima) {
            for (minimum, out) in minima.iter().zip(out.as_flattened_mut()) {
                *out = i16::from(*minimum);
            }
        }
    }
}

// === impl Q6kBlock ===

impl QuantBlock for Q6kBlock {
    const BLOCKS: usize = 8;
    const EMPTY: Self = Self {
        nibbles: [[[0; 4 * PANEL]; 4]; 8],
        pairs: [[[0; 4 * PANEL]; 2]; 8],
        scales: [[0; PANEL]; 16],
        scale: [f16::ZERO; PANEL],
    };

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

impl Q6kBlock {
    /// One quad of a block.
    #[inline(always)]
    fn quad(&self, block: usize, quad: usize, out: &mut [i8; 4 * PANEL]) {
        let (nibbles, pairs) = (&self.nibbles[block][quad % 4], &self.pairs[block][quad % 2]);
        let (up, down) = (4 * (quad / 4), 2 * (quad / 2));
        for (out, (nibbles, pairs)) in out.iter_mut().zip(nibbles.iter().zip(pairs)) {
            *out = (nibbles >> up & 15 | (pairs >> down & 3) << 4).cast_signed() - 32;
        }
    }
}

impl SuperBlock for Q6kBlock {
    const RUNS: usize = 16;
    const MINIMA: bool = false;
    const SHIFT: u32 = 7;

    #[inline(always)]
    fn quads(&self, block: usize, out: &mut WeightQuads) {
        out.iter_mut().enumerate().for_each(|(quad, out)| self.quad(block, quad, out));
    }

    #[inline(always)]
    fn scales(&self, run: usize) -> [[i32; LANES]; 2] {
        std::array::from_fn(|half| std::array::from_fn(|i| i32::from(self.scales[run][half * LANES + i])))
    }

    /// A product has thirteen bits and a sign: seven go to the first byte.
    #[inline(always)]
    fn planes(&self, block: usize, [first, second]: &mut Planes) {
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        for half in 0..2 {
            let scales = spread(&self.scales[2 * block + half]).map(i16::from);
            for quad in 0..4 {
                let (nibbles, pairs) = (words(&self.nibbles[block][quad]), words(&self.pairs[block][quad % 2]));
                let product = |c: usize| {
                    let high = pairs[c] >> (4 * half + quad / 2 * 2) & 0x0303;
                    let q = (nibbles[c] >> (4 * half) & 0x0f0f | high << 4).to_le_bytes();
                    q.map(|q| (i16::from(q) - 32) * scales[c])
                };
                let low = |product: i16| (product & 127) as u8;
                let high = |product: i16| (product >> 7) as u8;
                put_words(&mut first[4 * half + quad], |c| u16::from_le_bytes(product(c).map(low)));
                put_words(&mut second[4 * half + quad], |c| u16::from_le_bytes(product(c).map(high)));
            }
        }
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        widen(s, &self.scale, &mut out.scale);
    }
}
