//! `out = x * W^T` for quantised weights: 8-bit integers, by quantised activations.
//!
//! Values along K that have one float scale are summed as integers, exactly; these sums are scaled and added in ascending order.
//! That order is the contract (batch invariance). It is kept by vectors (`block_dots`, `super_dots`) and by tile registers
//! (`block_tiles`, `super_tiles`), which agree to the bit; here is what all of them share.

use super::blocks::QuantBlock;
use super::gemm::{Part, tiles};
use super::isa::{Isa, Kernel, Lanes, Simd, TILE_ROWS, Tiles};
use super::matrix::BLOCK;
use super::quant::groups;

/// Rows from which on tile registers are faster than vectors.
const TILE_FROM: usize = 8;

/// Panels of a product of rows `X`, in groups, with weights in blocks `B`.
pub(super) struct Dots<'a, X, B> {
    pub(super) part: Part,
    pub(super) x: X,
    pub(super) w: &'a [B],
    pub(super) out: &'a mut [Lanes],
}

/// A product by tiles.
pub(super) struct Tiled<D> {
    pub(super) tiles: Tiles,
    pub(super) dots: D,
}

/// How rows are multiplied.
pub(super) trait Product {
    /// Values of K that a tile register takes with so many groups of rows.
    fn depth(n_groups: usize) -> usize;

    /// A group of rows by one panel, with vectors.
    fn group<S: Simd>(&mut self, s: S, group_and_panel: (usize, usize));
}

/// What is done with the rows of a group, as many at once as registers allow. No closure, which cannot be generic over a number
/// and would be compiled for every CPU where it is not inlined.
pub(super) trait Rows {
    /// `R` rows from one on.
    fn run<S: Simd, const R: usize>(&mut self, s: S, row: usize);
}

/// Rows that registers allow at once.
#[inline(always)]
pub(super) fn rows_at_once<S: Simd>() -> usize {
    if S::WIDE { 6 } else { 2 }
}

/// All rows of a group.
#[inline(always)]
pub(super) fn each_rows<S: Simd>(s: S, height: usize, rows: &mut impl Rows) {
    for (row, len) in tiles(height, rows_at_once::<S>()) {
        match len {
            1 => rows.run::<S, 1>(s, row),
            2 => rows.run::<S, 2>(s, row),
            3 if S::WIDE => rows.run::<S, 3>(s, row),
            4 if S::WIDE => rows.run::<S, 4>(s, row),
            5 if S::WIDE => rows.run::<S, 5>(s, row),
            _ if S::WIDE => rows.run::<S, 6>(s, row),
            _ => {}
        }
    }
}

/// What the rows of a group have gathered, by half of the panel.
pub(super) type Gathered = [[Lanes; TILE_ROWS]; 2];

impl<'a, X, B: QuantBlock> Dots<'a, X, B> {
    pub(super) fn run(self, isa: Isa)
    where
        Self: Product,
        Tiled<Self>: Kernel<Out = ()>,
    {
        let Part { rows, .. } = self.part;
        let (n_groups, height) = groups(rows);
        let tiles = if rows < TILE_FROM { None } else { isa.tiles(height, Self::depth(n_groups)) };
        match tiles {
            Some(tiles) => isa.run(Tiled { tiles, dots: self }),
            None => isa.run(self),
        }
    }

    /// The weights of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &'a [B] {
        let n_blocks = self.part.k / (BLOCK * B::BLOCKS);
        &self.w[(self.part.first + panel) * n_blocks..][..n_blocks]
    }

    /// The outputs of rows from the first on; those that fill up the last group are left out.
    #[inline(always)]
    pub(super) fn put<S: Simd>(&mut self, s: S, first_row: usize, panel: usize, sums: &[[S::V; 2]]) {
        let Part { rows, epilogue, .. } = self.part;
        for (row, &sums) in (first_row..rows).zip(sums) {
            epilogue.apply(s, sums, self.out, self.part.at(panel, row));
        }
    }

    /// Asks for the lines of the outputs of a group, which will be written.
    #[inline(always)]
    pub(super) fn prefetch_out<S: Simd>(&self, s: S, group: usize, panel: usize) {
        let height = groups(self.part.rows).1;
        let [low, high] = self.part.at(panel, group * height);
        let out = self.out.as_ptr();
        for row in 0..height {
            s.prefetch_write(out.wrapping_add(low + row));
            if high != low {
                s.prefetch_write(out.wrapping_add(high + row));
            }
        }
    }

    /// The outputs of a group.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(&mut self, s: S, (group, panel): (usize, usize), gathered: &Gathered) {
        let height = groups(self.part.rows).1;
        for (row, (low, high)) in gathered[0].iter().zip(&gathered[1]).take(height).enumerate() {
            self.put(s, group * height + row, panel, &[[s.load(low), s.load(high)]]);
        }
    }
}

impl<X, B> Kernel for Dots<'_, X, B>
where
    B: QuantBlock,
    Self: Product,
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let n_groups = groups(self.part.rows).0;
        for panel in 0..self.part.n_panels(self.out.len()) {
            for group in 0..n_groups {
                self.group(s, (group, panel));
            }
        }
    }
}
