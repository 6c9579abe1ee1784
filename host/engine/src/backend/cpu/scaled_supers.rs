//! Eight blocks of 32 that have a float scale each (Q8_0, Q4_0), multiplied as one super-block.
//!
//! A product by blocks scales and adds once for 32 values; tile registers spend most of its time on that. So where K is a
//! multiple of 256, the eight scales of a column become integers times one float, as a K-quant's are: the largest is 255, or
//! 2,047 where a value has four bits, and the others are rounded. That moves no weight by more than a 510th of the largest
//! that the 256 could have: half a step of the block with the largest scale, and more of the steps of blocks with small ones.
//! Q8_0 is packed with its integers, which are a byte each, in the place of its scales ([`Q8SuperBlock`]): a product reads 2 % less
//! and makes none. Where weights are also looked up, and for Q4_0, whose integers would be larger than its scales, blocks stay as
//! they are, and the integers are made right before the products: of finite scales the same ones.

use half::f16;

use super::blocks::{Q8Block, QuantBlock, ScaledBlock, at, half};
use super::isa::{LANES, Planes, Simd, WeightQuads};
use super::matrix::{BLOCK, PANEL};
use super::quant::SuperFactor;
use super::supers::{SuperBlock, SuperFactors, integers, put_words, words};
use crate::load::Elements;

/// Instead of a largest scale of zero, so that its inverse is finite: the least that is one is 6e-8.
const LEAST: f32 = f32::MIN_POSITIVE * 65_536.0;

/// GGML's Q8_0 with integer scales.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Q8SuperBlock {
    integers: [[u8; PANEL]; 8],
    quants: [WeightQuads; 8],
    /// The largest scale: what 255 stands for.
    largest: [f16; PANEL],
}

/// Puts the bytes of a block times integer scales of at most 255 into rows of both planes.
#[inline(always)]
fn put_scaled<S: Simd>(
    s: S,
    quads: &WeightQuads,
    scales: &[[i32; LANES]; 2],
    (first, second): (&mut [[i8; 4 * PANEL]], &mut [[i8; 4 * PANEL]]),
) {
    for (half, scales) in scales.iter().enumerate() {
        for (q, (first, second)) in quads.iter().zip(first.iter_mut().zip(&mut *second)) {
            let out = [first, second].map(|out| &mut out.as_chunks_mut().0[half]);
            s.scale_bytes(&q.as_chunks().0[half], scales, out);
        }
    }
}

/// What a run of signed values begins with.
#[inline(always)]
fn start<S: Simd>(s: S, factor: &SuperFactor, run: usize) -> S::I {
    s.dot_start(4 * (factor.offsets[2 * run] + factor.offsets[2 * run + 1]))
}

// === impl [B; 8] ===

impl<B: ScaledBlock> QuantBlock for [B; 8] {
    const BLOCKS: usize = 8;
    const EMPTY: Self = [B::EMPTY; 8];

    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        self.iter_mut().enumerate().for_each(|(i, part)| part.put(column, from, 8 * block + i));
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        self[k / BLOCK].value(column, k % BLOCK)
    }
}

impl<B: ScaledBlock> SuperBlock for [B; 8] {
    const RUNS: usize = 8;
    const MINIMA: bool = false;
    const PLAIN: bool = true;
    const SHIFT: u32 = 8;

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, room: &'a mut WeightQuads) -> &'a WeightQuads {
        self[block].quads(room)
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, factor: &SuperFactor, run: usize) -> S::I {
        start(s, factor, run)
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, acc: S::I, w: &[i8; 4 * LANES], x: [i8; 4]) -> S::I {
        s.dot4(acc, w, x)
    }

    #[inline(always)]
    fn scales(&self, run: usize, factors: &SuperFactors) -> [[i32; LANES]; 2] {
        factors.integers[run]
    }

    #[inline(always)]
    fn planes<S: Simd>(&self, s: S, block: usize, factors: &SuperFactors, [first, second]: &mut Planes) {
        let mut room = [[0; 4 * PANEL]; BLOCK / 4];
        let quads = self[block].quads(&mut room);
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        let scales = &factors.integers[block];
        if factors.are_bytes {
            return put_scaled(s, quads, scales, (first, second));
        }
        let scales: [i16; 2 * PANEL] = std::array::from_fn(|c| scales[c / 2 / LANES][c / 2 % LANES] as i16);
        for (q, (first, second)) in quads.iter().zip(first.iter_mut().zip(second)) {
            let q = words(&q.map(i8::cast_unsigned)).map(u16::cast_signed);
            let low: [i16; 2 * PANEL] = std::array::from_fn(|c| (q[c] << 8 >> 8) * scales[c]);
            let high: [i16; 2 * PANEL] = std::array::from_fn(|c| (q[c] >> 8) * scales[c]);
            put_words(first, |c| (low[c] & 255 | high[c] << 8).cast_unsigned());
            put_words(second, |c| (low[c] >> 8 & 255 | high[c] & !255).cast_unsigned());
        }
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        out.are_bytes = B::FINEST < 256.0;
        for half in 0..2 {
            let (mut highest, mut lowest) = (s.zero(), s.zero());
            for block in self {
                let scale = s.load_f16(&block.scales().as_chunks().0[half]);
                (highest, lowest) = (s.max(scale, highest), s.min(scale, lowest));
            }
            let negated = s.sub(s.zero(), lowest);
            let largest = s.max(highest, negated);
            out.are_bytes &= s.max_lane(negated) == 0.0;
            s.store(s.mul(largest, s.splat(1.0 / B::FINEST)), &mut out.scale[half]);
            let inverse = s.div(s.splat(B::FINEST), s.max(largest, s.splat(LEAST)));
            for (block, out) in self.iter().zip(&mut out.integers) {
                let scale = s.load_f16(&block.scales().as_chunks().0[half]);
                s.store_int(s.round_int(s.mul(scale, inverse)), &mut out[half]);
            }
        }
    }
}

// === impl Q8SuperBlock ===

impl QuantBlock for Q8SuperBlock {
    const BLOCKS: usize = 8;
    const EMPTY: Self =
        Self { integers: [[0; PANEL]; 8], quants: [[[0; 4 * PANEL]; BLOCK / 4]; 8], largest: [f16::ZERO; PANEL] };

    /// Scales become positive, and the values of a block with a negative one change their signs; GGML makes no -128.
    fn put(&mut self, column: usize, from: &Elements<'_>, block: usize) {
        let ggml = &from.blocks::<34>()[8 * block..][..8];
        let scales: [f32; 8] = std::array::from_fn(|i| half(&ggml[i], 0).to_f32());
        let largest = scales.iter().fold(0f32, |largest, scale| largest.max(scale.abs()));
        self.largest[column] = f16::from_f32(largest);
        for (i, scale) in scales.into_iter().enumerate() {
            self.integers[i][column] = (scale.abs() * (Q8Block::FINEST / largest.max(LEAST))).round_ties_even() as u8;
            for (k, q) in ggml[i][2..].iter().map(|q| q.cast_signed()).enumerate() {
                let (quad, byte) = at(column, k);
                self.quants[i][quad][byte] = if scale < 0.0 { q.saturating_neg() } else { q };
            }
        }
    }

    fn value(&self, column: usize, k: usize) -> f32 {
        let (block, (quad, byte)) = (k / BLOCK, at(column, k % BLOCK));
        let scale = self.largest[column].to_f32() * (1.0 / Q8Block::FINEST);
        f32::from(self.quants[block][quad][byte]) * f32::from(self.integers[block][column]) * scale
    }
}

impl SuperBlock for Q8SuperBlock {
    const RUNS: usize = 8;
    const MINIMA: bool = false;
    const PLAIN: bool = true;
    const SHIFT: u32 = 8;

    #[inline(always)]
    fn quads<'a>(&'a self, block: usize, _room: &'a mut WeightQuads) -> &'a WeightQuads {
        &self.quants[block]
    }

    #[inline(always)]
    fn start<S: Simd>(s: S, factor: &SuperFactor, run: usize) -> S::I {
        start(s, factor, run)
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, acc: S::I, w: &[i8; 4 * LANES], x: [i8; 4]) -> S::I {
        s.dot4(acc, w, x)
    }

    #[inline(always)]
    fn scales(&self, run: usize, _factors: &SuperFactors) -> [[i32; LANES]; 2] {
        integers(&self.integers[run])
    }

    #[inline(always)]
    fn planes<S: Simd>(&self, s: S, block: usize, _factors: &SuperFactors, [first, second]: &mut Planes) {
        let (first, second) = (&mut first[8 * block..][..8], &mut second[8 * block..][..8]);
        put_scaled(s, &self.quants[block], &integers(&self.integers[block]), (first, second));
    }

    #[inline(always)]
    fn factors<S: Simd>(&self, s: S, out: &mut SuperFactors) {
        for (largest, out) in self.largest.as_chunks().0.iter().zip(&mut out.scale) {
            s.store(s.mul(s.load_f16(largest), s.splat(1.0 / Q8Block::FINEST)), out);
        }
    }
}
