//! Weights in super-blocks: 32 columns by 256 values along K. Here those of GGML's K-quants; Q8_0 and Q4_0 join them in
//! `scaled_supers`.
//!
//! A column's scale within a super-block is an integer times one float. So the sum over a super-block is an integer, whoever
//! adds it: vectors multiply the sum of each run, or of as much of it as fits 16 bits, by its integer scale, tiles multiply
//! weights that had their scales worked in, as two bytes each (`planes`). One float scale and one float addition are left for
//! 256 values. Activations have one scale for 256 values for that reason, as they have in GGML.

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
    /// Whether tiles take the bytes as they are where one group of rows is all there is, block by block: less work than opening
    /// them, where they lie ready.
    const PLAIN: bool = false;
    /// Quads whose products add up in 16 bits, two of each four to either half of a lane, by activations of at most 127: 8 for
    /// weights of at most 15 (30,480), 4 for 31 (31,496), 2 for 63 (32,004). None where weights are signed.
    const QUADS: usize = 0;
    /// Bits that the second byte of [`planes`](Self::planes) stands above the first.
    const SHIFT: u32;

    /// The bytes of a block of 32, opened into `room` where they are packed.
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads;

    /// What the sum of a run begins with: takes back as much as the bytes are too large.
    fn start<S: Simd>(s: S, factor: &SuperFactor, run: usize) -> S::I;

    /// Each column gains the product of four of the bytes with four activations.
    #[inline(always)]
    fn dot<S: Simd>(s: S, acc: S::I, w: &[i8; 4 * LANES], x: [i8; 4]) -> S::I {
        s.dot4_unsigned(acc, w, x)
    }

    /// What the columns are multiplied by.
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors);

    /// The integer scales of a run, by half of the panel.
    fn scales(&self, run: usize, factors: &SuperFactors) -> [[i32; LANES]; 2];

    /// Bytes of a block of 32 times scales: `first + second * 2^SHIFT`, the first unsigned.
    fn planes<S: Simd>(&self, s: S, block: usize, factors: &SuperFactors, out: &mut Planes);
}

/// What the columns of a panel are multiplied by, by half of the panel.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct SuperFactors {
    pub(super) scale: [Lanes; 2],
    /// Its negative.
    pub(super) minimum: [Lanes; 2],
    /// The integer minima of two blocks of 32, side by side for each column.
    pub(super) minima: [[[i16; PANEL]; 2]; 4],
    /// The integer scales of the blocks of 32, where the weights have none themselves.
    pub(super) integers: [[[i32; LANES]; 2]; 8],
    /// Whether each of them fits an unsigned byte.
    pub(super) are_bytes: bool,
}

/// GGML's Q4_K.
pub(super) type Q4kBlock = MinimumBlock<0>;

/// GGML's Q5_K.
pub(super) type Q5kBlock = MinimumBlock<8>;

/// Eight blocks of unsigned values, each with a 6-bit scale and a 6-bit minimum, which have a scale themselves. Values have four
/// bits, and a fifth in so many of the blocks as have one: none or all. Fields lie in the order in which they are read.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct MinimumBlock<const FIFTHS: usize> {
    scales: [[u8; PANEL]; 8],
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[[u8; 4 * PANEL]; 4]; 8],
    /// Bit 4 of quads 0 to 7, from the lowest bit up.
    fifths: [[u8; 4 * PANEL]; FIFTHS],
    /// Of two blocks, side by side for each column.
    minima: [[u8; 2 * PANEL]; 4],
    scale: [f16; PANEL],
    minimum: [f16; PANEL],
}

/// GGML's Q6_K: eight blocks of 6-bit values, 32 too large, with an 8-bit scale for each sixteen, which have a scale themselves.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q6kBlock {
    scales: [[i8; PANEL]; 16],
    /// Low nibbles are quads 0 to 3, high nibbles 4 to 7.
    nibbles: [[[u8; 4 * PANEL]; 4]; 8],
    /// Bits 4 and 5 of quads 0, 2, 4, 6 and of 1, 3, 5, 7, from the lowest pair up.
    pairs: [[[u8; 4 * PANEL]; 2]; 8],
    scale: [f16; PANEL],
}

// === impl SuperFactors ===

impl SuperFactors {
    pub(super) const ZERO: Self = Self {
        scale: [[0.0; LANES]; 2],
        minimum: [[0.0; LANES]; 2],
        minima: [[[0; PANEL]; 2]; 4],
        integers: [[[0; LANES]; 2]; 8],
        are_bytes: false,
    };

    /// Adds a super-block of one row, whose sum is `whole`, to `acc`.
    #[inline(always)]
    pub(super) fn add<S: Simd, B: SuperBlock>(
        &self,
        s: S,
        half: usize,
        factor: &SuperFactor,
        (whole, acc): (S::I, S::V),
    ) -> S::V {
        let (scale, whole) = (s.splat(factor.scale), s.int_to_f32(whole));
        if !B::MINIMA {
            return s.fma(whole, s.mul(s.load(&self.scale[half]), scale), acc);
        }
        let mut sum = s.splat_int(0);
        for (minima, &sums) in self.minima.iter().zip(&factor.sums) {
            sum = s.dot2(sum, &minima[half], sums);
        }
        let lifted = s.mul(whole, s.load(&self.scale[half]));
        s.fma(s.fma(s.int_to_f32(sum), s.load(&self.minimum[half]), lifted), scale, acc)
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
pub(super) type Words = [u16; 2 * PANEL];

#[inline(always)]
pub(super) fn words(bytes: &[u8; 4 * PANEL]) -> Words {
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
pub(super) fn put_words(out: &mut [i8; 4 * PANEL], word: impl Fn(usize) -> u16) {
    let out = out.as_chunks_mut().0.iter_mut().enumerate();
    out.for_each(|(i, out)| *out = word(i).to_le_bytes().map(u8::cast_signed));
}

/// Puts the bytes of words, less `bias`, times scales: products of at most thirteen bits and a sign, of which seven bits go to
/// the first plane.
#[inline(always)]
fn put_products(out: (&mut [i8; 4 * PANEL], &mut [i8; 4 * PANEL]), q: &Words, bias: i16, scales: &[i16; 2 * PANEL]) {
    let low: [i16; 2 * PANEL] = std::array::from_fn(|c| ((q[c] & 255) as i16 - bias) * scales[c]);
    let high: [i16; 2 * PANEL] = std::array::from_fn(|c| ((q[c] >> 8) as i16 - bias) * scales[c]);
    put_words(out.0, |c| (low[c] & 127 | (high[c] & 127) << 8).cast_unsigned());
    put_words(out.1, |c| (low[c] >> 7 & 255 | high[c] >> 7 << 8).cast_unsigned());
}

/// A panel's scales of a run, by half.
#[inline(always)]
pub(super) fn integers<T: Copy + Into<i32>>(scales: &[T; PANEL]) -> [[i32; LANES]; 2] {
    std::array::from_fn(|half| std::array::from_fn(|i| scales[half * LANES + i].into()))
}

// === impl MinimumBlock ===

impl<const FIFTHS: usize> QuantBlock for MinimumBlock<FIFTHS> {
    const BLOCKS: usize = 8;
    const EMPTY: Self = Self {
        scales: [[0; PANEL]; 8],
        nibbles: [[[0; 4 * PANEL]; 4]; 8],
        fifths: [[0; 4 * PANEL]; FIFTHS],
        minima: [[0; 2 * PANEL]; 4],
        scale: [f16::ZERO; PANEL],
        minimum: [f16::ZERO; PANEL],
    };

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml: &[u8] = if FIFTHS == 0 { &from.blocks::<144>()[block] } else { &from.blocks::<176>()[block] };
        (self.scale[column], self.minimum[column]) = (half(ggml, 0), half(ggml, 2));
        for block in 0..8 {
            let minimum = &mut self.minima[block / 2][2 * column + block % 2];
            [self.scales[block][column], *minimum] = scale_and_minimum(&ggml[4..16], block);
            for i in 0..BLOCK {
                // A byte has nibbles of two blocks, and the fifth bits of all.
                let q = ggml[ggml.len() - 4 * BLOCK..][block / 2 * BLOCK + i] >> (block % 2 * 4) & 15;
                let (quad, byte) = at(column, i);
                self.nibbles[block][quad % 4][byte] |= q << (quad / 4 * 4);
                if let Some(fifths) = self.fifths.get_mut(block) {
                    fifths[byte] |= (ggml[16 + i] >> block & 1) << quad;
                }
            }
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (block, (quad, byte)) = (k / BLOCK, at(column, k % BLOCK));
        let low = self.nibbles[block][quad % 4][byte] >> (quad / 4 * 4) & 15;
        let high = self.fifths.get(block).map_or(0, |fifths| fifths[byte] >> quad & 1);
        let scale = self.scale[column].to_f32() * f32::from(self.scales[block][column]);
        let minimum = self.minimum[column].to_f32() * f32::from(self.minima[block / 2][2 * column + block % 2]);
        scale * f32::from(low | high << 4) - minimum
    }
}

impl<const FIFTHS: usize> SuperBlock for MinimumBlock<FIFTHS> {
    const RUNS: usize = 8;
    const MINIMA: bool = true;
    const QUADS: usize = if FIFTHS == 0 { 8 } else { 4 };
    const SHIFT: u32 = if FIFTHS == 0 { 3 } else { 7 };

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads {
        for (quad, out) in room.iter_mut().enumerate() {
            let (nibbles, up) = (&self.nibbles[block][quad % 4], 4 * (quad / 4));
            match self.fifths.get(block) {
                None => {
                    out.iter_mut().zip(nibbles).for_each(|(out, nibbles)| *out = (nibbles >> up & 15).cast_signed())
                }
                Some(fifths) => {
                    for (out, (nibbles, fifths)) in out.iter_mut().zip(nibbles.iter().zip(fifths)) {
                        *out = (nibbles >> up & 15 | (fifths >> quad & 1) << 4).cast_signed();
                    }
                }
            }
        }
        room
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, _factor: &SuperFactor, _run: usize) -> S::I {
        s.splat_int(0)
    }

    #[inline(always)]
    fn scales(&self, run: usize, _factors: &SuperFactors) -> [[i32; LANES]; 2] {
        integers(&self.scales[run])
    }

    /// A scale has six bits. Of four-bit values three go to each byte: no byte exceeds 15 * 7, so that a word is multiplied as
    /// one number.
    #[inline(always)]
    fn planes<S: Simd>(&self, _s: S, block: usize, _factors: &SuperFactors, [first, second]: &mut Planes) {
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        let scales = spread(&self.scales[block]).map(u16::from);
        for (quad, out) in first.iter_mut().zip(second).enumerate() {
            let (nibbles, up) = (words(&self.nibbles[block][quad % 4]), 4 * (quad / 4));
            match self.fifths.get(block) {
                None => {
                    put_words(out.0, |c| (nibbles[c] >> up & 0x0f0f) * (scales[c] & 7));
                    put_words(out.1, |c| (nibbles[c] >> up & 0x0f0f) * (scales[c] >> 3));
                }
                Some(fifths) => {
                    let fifths = words(fifths);
                    let q = std::array::from_fn(|c| nibbles[c] >> up & 0x0f0f | (fifths[c] >> quad & 0x0101) << 4);
                    put_products(out, &q, 0, &scales.map(u16::cast_signed));
                }
            }
        }
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        widen(s, &self.scale, &mut out.scale);
        widen(s, &self.minimum, &mut out.minimum);
        for minimum in &mut out.minimum {
            s.store(s.sub(s.zero(), s.load(minimum)), minimum);
        }
        for (minima, out) in self.minima.iter().zip(&mut out.minima) {
            for (minima, out) in minima.as_chunks::<PANEL>().0.iter().zip(out) {
                s.widen_bytes(minima, out);
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

impl SuperBlock for Q6kBlock {
    const RUNS: usize = 16;
    const MINIMA: bool = false;
    const QUADS: usize = 2;
    const SHIFT: u32 = 7;

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads {
        for (quad, out) in room.iter_mut().enumerate() {
            let (nibbles, pairs) = (&self.nibbles[block][quad % 4], &self.pairs[block][quad % 2]);
            let (up, down) = (4 * (quad / 4), 2 * (quad / 2));
            for (out, (nibbles, pairs)) in out.iter_mut().zip(nibbles.iter().zip(pairs)) {
                *out = (nibbles >> up & 15 | (pairs >> down & 3) << 4).cast_signed();
            }
        }
        room
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, factor: &SuperFactor, run: usize) -> S::I {
        s.splat_int(factor.offsets[run])
    }

    #[inline(always)]
    fn scales(&self, run: usize, _factors: &SuperFactors) -> [[i32; LANES]; 2] {
        integers(&self.scales[run])
    }

    #[inline(always)]
    fn planes<S: Simd>(&self, _s: S, block: usize, _factors: &SuperFactors, [first, second]: &mut Planes) {
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        for half in 0..2 {
            let scales = spread(&self.scales[2 * block + half]).map(i16::from);
            for quad in 0..4 {
                let (nibbles, pairs) = (words(&self.nibbles[block][quad]), words(&self.pairs[block][quad % 2]));
                let q = std::array::from_fn(|c| {
                    let high = pairs[c] >> (4 * half + quad / 2 * 2) & 0x0303;
                    nibbles[c] >> (4 * half) & 0x0f0f | high << 4
                });
                put_products((&mut first[4 * half + quad], &mut second[4 * half + quad]), &q, 32, &scales);
            }
        }
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        widen(s, &self.scale, &mut out.scale);
    }
}
