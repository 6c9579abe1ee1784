//! Activations in 8 bits, for products with quantised weights: by super-blocks of 256 along K, or by blocks of 32 for Q8_0 and
//! Q4_0 where K is no multiple of 256.
//!
//! Rows come in groups, a group being what one tile takes: rows as even as can be among the fewest groups of at most sixteen.
//! Blocks are `[group][k / 32][row of the group]`, super-blocks `[k / 256][group][k / 64 % 4][row of the group]`: each in the
//! order in which tiles read it. The scale stays `f32`: it is never stored, and a second rounding would buy nothing.

use super::aligned::Aligned;
use super::isa::{Kernel, LANES, Lanes, Quads, Simd, Stretch, TILE_ROWS, stride};
use super::matrix::BLOCK;
use super::pool::{ComputePool, Units};
use super::supers::SUPER;

/// Rows whose values are asked for before their turn.
const AHEAD: usize = 4;

/// Room for quantised activations.
#[derive(Debug)]
pub(super) struct Quantised {
    pub(super) blocks: Blocks,
    pub(super) supers: Supers,
}

/// Room for blocks.
#[derive(Debug)]
pub(super) struct Blocks {
    quads: Aligned<[i8; 4], { BLOCK / 4 }>,
    factors: Vec<Factor>,
}

/// Room for super-blocks.
#[derive(Debug)]
pub(super) struct Supers {
    stretches: Aligned<[i8; 4], 16>,
    factors: Vec<SuperFactor>,
}

/// What belongs to one block of one row beside its values.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Factor {
    /// What the values are multiplied by.
    pub(super) scale: f32,
    /// -128 times the sum of the values: see [`Simd::dot_start`].
    pub(super) offset: i32,
}

/// What belongs to one super-block of one row beside its values.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct SuperFactor {
    /// What the values are multiplied by.
    pub(super) scale: f32,
    /// Sums of the values of 32, two by two: what the minima of columns are multiplied by.
    pub(super) sums: [[i16; 2]; 4],
    /// -32 times the sums of sixteen values: values of Q6_K are stored 32 too large.
    pub(super) offsets: [i32; 16],
}

/// Rows by blocks. Those that fill up the last group are zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockRows<'a> {
    quads: &'a [Quads],
    factors: &'a [Factor],
    /// Rows of a group.
    pub(super) height: usize,
    n_blocks: usize,
}

/// Rows by super-blocks. Those that fill up the last group are zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct SuperRows<'a> {
    stretches: &'a [Stretch],
    factors: &'a [SuperFactor],
    /// Rows of a group.
    pub(super) height: usize,
    pub(super) n_groups: usize,
}

/// Number of groups, and rows of a group.
pub(super) fn groups(rows: usize) -> (usize, usize) {
    let n_groups = rows.div_ceil(TILE_ROWS);
    (n_groups, rows.div_ceil(n_groups))
}

// === impl Quantised ===

impl Quantised {
    /// Room for `rows` rows of `width` values, or fewer of both.
    pub(super) fn allocate(width: usize, rows: usize) -> Self {
        let rows = rows.next_multiple_of(TILE_ROWS);
        let (n_blocks, n_supers) = (width / BLOCK * rows, width / SUPER * rows);
        let blocks = Blocks { quads: Aligned::filled([0; 4], n_blocks), factors: vec![Factor::default(); n_blocks] };
        let stretches = Aligned::filled([0; 4], 4 * n_supers);
        Self { blocks, supers: Supers { stretches, factors: vec![SuperFactor::default(); n_supers] } }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { blocks, supers } = self;
        size_of_val(&*blocks.quads)
            + size_of_val(blocks.factors.as_slice())
            + size_of_val(&*supers.stretches)
            + size_of_val(supers.factors.as_slice())
    }
}

impl Blocks {
    /// Quantises the first `k` columns of panel-major activations `[k / 16][stride(rows)][16]`.
    pub(super) fn fill(&mut self, pool: &ComputePool, x: &[Lanes], rows: usize, k: usize) -> BlockRows<'_> {
        let ((n_groups, height), n_blocks) = (groups(rows), k / BLOCK);
        let unit = n_blocks * height;
        let (quads, factors) = (&mut self.quads[..n_groups * unit], &mut self.factors[..n_groups * unit]);
        let units = Units { items: quads, unit, scratch: factors, scratch_unit: unit };
        // A value costs about as much as eight multiply-adds.
        pool.split_with(8 * rows * k, units, |first, quads, factors| {
            pool.isa().run(QuantiseBlocks { x, rows, first, n_blocks, height, quads, factors });
        });
        BlockRows { quads: &self.quads[..n_groups * unit], factors: &self.factors[..n_groups * unit], height, n_blocks }
    }
}

impl Supers {
    /// Quantises the first `k` columns of panel-major activations `[k / 16][stride(rows)][16]`.
    pub(super) fn fill(&mut self, pool: &ComputePool, x: &[Lanes], rows: usize, k: usize) -> SuperRows<'_> {
        let ((n_groups, height), n_supers) = (groups(rows), k / SUPER);
        let unit = n_groups * height;
        let (stretches, factors) = (&mut self.stretches[..4 * n_supers * unit], &mut self.factors[..n_supers * unit]);
        let units = Units { items: stretches, unit: 4 * unit, scratch: factors, scratch_unit: unit };
        pool.split_with(8 * rows * k, units, |first, stretches, factors| {
            pool.isa().run(QuantiseSupers { x, rows, first, n_groups, height, stretches, factors });
        });
        let (stretches, factors) = (&self.stretches[..4 * n_supers * unit], &self.factors[..n_supers * unit]);
        SuperRows { stretches, factors, height, n_groups }
    }
}

// === impl BlockRows ===

impl<'a> BlockRows<'a> {
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
        s.prefetch_near(factors.wrapping_byte_add(64 * half));
    }
}

// === impl SuperRows ===

impl<'a> SuperRows<'a> {
    /// One super-block of the rows of a group: 64 values of each row, four times, and their factors.
    #[inline(always)]
    pub(super) fn block(&self, group: usize, block: usize) -> (&'a [Stretch], &'a [SuperFactor]) {
        let at = (block * self.n_groups + group) * self.height;
        (&self.stretches[4 * at..4 * (at + self.height)], &self.factors[at..at + self.height])
    }
}

/// Groups `first ..`, as many as the slices hold.
struct QuantiseBlocks<'a> {
    x: &'a [Lanes],
    rows: usize,
    first: usize,
    n_blocks: usize,
    height: usize,
    quads: &'a mut [Quads],
    factors: &'a mut [Factor],
}

impl Kernel for QuantiseBlocks<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, rows, first, n_blocks, height, quads, factors } = self;
        let step = stride(rows);
        let blocks = quads.chunks_exact_mut(height).zip(factors.chunks_exact_mut(height));
        for (i, (quads, factors)) in blocks.enumerate() {
            let (begin, at) = ((first + i / n_blocks) * height, 2 * (i % n_blocks) * step);
            for (row, (quads, factor)) in (begin..).zip(quads.iter_mut().zip(factors)) {
                (*quads, *factor) = Default::default();
                if row < rows {
                    let scale = quantise(s, [&x[at + row], &x[at + step + row]], quads.as_chunks_mut().0);
                    let sum: i32 = quads.as_flattened().iter().map(|x| i32::from(*x)).sum();
                    *factor = Factor { scale, offset: -128 * sum };
                }
            }
        }
    }
}

/// Super-blocks `first ..`, as many as the slices hold.
struct QuantiseSupers<'a> {
    x: &'a [Lanes],
    rows: usize,
    first: usize,
    n_groups: usize,
    height: usize,
    stretches: &'a mut [Stretch],
    factors: &'a mut [SuperFactor],
}

impl Kernel for QuantiseSupers<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, rows, first, n_groups, height, stretches, factors } = self;
        let step = stride(rows);
        for (i, (stretches, factors)) in
            stretches.chunks_exact_mut(4 * height).zip(factors.chunks_exact_mut(height)).enumerate()
        {
            let (begin, x) = (i % n_groups * height, &x[16 * (first + i / n_groups) * step..]);
            for (in_group, factor) in factors.iter_mut().enumerate() {
                let row = begin + in_group;
                let mut quads = [[[0; 4]; 4]; SUPER / LANES];
                *factor = SuperFactor::default();
                if row < rows {
                    let x: [&Lanes; SUPER / LANES] = std::array::from_fn(|i| &x[i * step + row]);
                    x.iter().for_each(|x| s.prefetch_near(std::ptr::from_ref(*x).wrapping_add(AHEAD)));
                    let scale = quantise(s, x, &mut quads);
                    let mut sums = [0; SUPER / LANES];
                    let bytes = quads.as_flattened().as_flattened().as_chunks().0;
                    for (sums, bytes) in sums.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
                        *sums = s.sum_bytes(bytes);
                    }
                    let of = |block: usize| (sums[2 * block] + sums[2 * block + 1]) as i16;
                    let pairs = std::array::from_fn(|pair| [of(2 * pair), of(2 * pair + 1)]);
                    *factor = SuperFactor { scale, sums: pairs, offsets: sums.map(|sum| -32 * sum) };
                }
                for (t, quads) in quads.as_chunks::<4>().0.iter().enumerate() {
                    stretches[t * height + in_group].copy_from_slice(quads.as_flattened());
                }
            }
        }
    }
}

/// Quantises vectors by one scale, which it returns.
#[inline(always)]
fn quantise<S: Simd, const N: usize>(s: S, x: [&Lanes; N], out: &mut [[[i8; 4]; 4]]) -> f32 {
    let (zero, mut magnitude) = (s.zero(), s.zero());
    for x in x {
        let x = s.load(x);
        magnitude = s.max(magnitude, s.max(x, s.sub(zero, x)));
    }
    let largest = s.max_lane(magnitude);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    // A denormal maximum would make the inverse infinite.
    let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
    for (x, out) in x.into_iter().zip(out) {
        out.copy_from_slice(s.round_i8(s.mul(s.load(x), inverse)).as_chunks().0);
    }
    largest / 127.0
}
