//! Activations in 8 bits, for products with quantised weights: blocks of 32 along K, as the weights have them.
//!
//! `[group of rows][k / 32][row of the group]`, a group being what one tile takes: rows as even as can be among the fewest
//! groups of at most sixteen. The scale stays `f32`: it is never stored, and a second rounding would buy nothing.

use super::aligned::Aligned;
use super::isa::{Kernel, Lanes, Quads, Simd, TILE_ROWS, stride};
use super::matrix::BLOCK;
use super::pool::{ComputePool, Units};

/// Room for quantised activations.
#[derive(Debug)]
pub(super) struct Quantised {
    quads: Aligned<[i8; 4], { BLOCK / 4 }>,
    factors: Vec<Factor>,
}

/// What belongs to one block of one row beside its values.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Factor {
    /// What the values are multiplied by.
    pub(super) scale: f32,
    /// Minus the sum of the values, scaled: what a column's minimum is multiplied by.
    pub(super) mass: f32,
    /// -128 times the sum of the values, by half: see [`Simd::dot_start`].
    offsets: [i32; 2],
}

impl Factor {
    /// The offset of one of `runs` runs of the values.
    #[inline(always)]
    pub(super) fn offset(&self, runs: usize, run: usize) -> i32 {
        if runs == 1 { self.offsets[0] + self.offsets[1] } else { self.offsets[run] }
    }
}

/// Quantised rows. Those that fill up the last group are zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct QuantRows<'a> {
    quads: &'a [Quads],
    factors: &'a [Factor],
    /// Rows of a group.
    pub(super) height: usize,
    n_blocks: usize,
}

// === impl Quantised ===

impl Quantised {
    /// Room for `rows` rows of `width` values, or fewer of both.
    pub(super) fn allocate(width: usize, rows: usize) -> Self {
        let n = width / BLOCK * rows.next_multiple_of(TILE_ROWS);
        Self { quads: Aligned::filled([0; 4], n), factors: vec![Factor::default(); n] }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.quads) + size_of_val(self.factors.as_slice())
    }

    /// Quantises the first `k` columns of panel-major activations `[k / 16][stride(rows)][16]`.
    pub(super) fn fill(&mut self, pool: &ComputePool, x: &[Lanes], rows: usize, k: usize) -> QuantRows<'_> {
        let n_groups = rows.div_ceil(TILE_ROWS);
        let (height, n_blocks) = (rows.div_ceil(n_groups), k / BLOCK);
        let unit = n_blocks * height;
        let (quads, factors) = (&mut self.quads[..n_groups * unit], &mut self.factors[..n_groups * unit]);
        let units = Units { items: quads, unit, scratch: factors, scratch_unit: unit };
        // A value costs about as much as eight multiply-adds.
        pool.split_with(8 * rows * k, units, |first, quads, factors| {
            pool.isa().run(Quantise { x, rows, first, n_blocks, height, quads, factors });
        });
        QuantRows { quads: &self.quads[..n_groups * unit], factors: &self.factors[..n_groups * unit], height, n_blocks }
    }
}

// === impl QuantRows ===

impl<'a> QuantRows<'a> {
    pub(super) fn n_groups(&self) -> usize {
        self.quads.len() / (self.n_blocks * self.height)
    }

    /// One block of K of the rows of a group.
    #[inline(always)]
    pub(super) fn block(&self, group: usize, block: usize) -> (&'a [Quads], &'a [Factor]) {
        let at = (group * self.n_blocks + block) * self.height;
        (&self.quads[at..at + self.height], &self.factors[at..at + self.height])
    }

    /// Asks for one half of the lines of a block of sixteen rows, which need not exist.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, s: S, group: usize, block: usize, half: usize) {
        let at = (group * self.n_blocks + block) * self.height;
        let (quads, factors) = (self.quads.as_ptr().wrapping_add(at), self.factors.as_ptr().wrapping_add(at));
        (0..4).for_each(|line| s.prefetch_near(quads.wrapping_byte_add(64 * (4 * half + line))));
        (0..2).for_each(|line| s.prefetch_near(factors.wrapping_byte_add(64 * (2 * half + line))));
    }
}

/// Groups `first ..`, as many as the slices hold.
struct Quantise<'a> {
    x: &'a [Lanes],
    rows: usize,
    first: usize,
    n_blocks: usize,
    height: usize,
    quads: &'a mut [Quads],
    factors: &'a mut [Factor],
}

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, rows, first, n_blocks, height, quads, factors } = self;
        let step = stride(rows);
        let blocks = quads.chunks_exact_mut(height).zip(factors.chunks_exact_mut(height));
        for (i, (quads, factors)) in blocks.enumerate() {
            let (begin, at) = ((first + i / n_blocks) * height, 2 * (i % n_blocks) * step);
            for (row, (quads, factor)) in (begin..).zip(quads.iter_mut().zip(factors)) {
                (*quads, *factor) = match row < rows {
                    true => quantised(s, s.load(&x[at + row]), s.load(&x[at + step + row])),
                    false => Default::default(),
                };
            }
        }
    }
}

/// One block of one row, given as its two halves.
#[inline(always)]
fn quantised<S: Simd>(s: S, low: S::V, high: S::V) -> (Quads, Factor) {
    let zero = s.zero();
    let magnitude = s.max(s.max(low, s.sub(zero, low)), s.max(high, s.sub(zero, high)));
    let largest = s.max_lane(magnitude);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    // A denormal maximum would make the inverse infinite.
    let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
    let (low, high) = (s.mul(low, inverse), s.mul(high, inverse));
    // At most 16 * 127 each: exact, in any order.
    let sums = [s.sum(s.round(low)), s.sum(s.round(high))];
    let mut quads = Quads::default();
    let (first, last) = quads.split_at_mut(BLOCK / 8);
    first.copy_from_slice(s.round_i8(low).as_chunks().0);
    last.copy_from_slice(s.round_i8(high).as_chunks().0);
    let scale = largest / 127.0;
    (quads, Factor { scale, mass: -scale * (sums[0] + sums[1]), offsets: sums.map(|sum| -128 * sum as i32) })
}
