//! `out = x * W^T` in 8-bit integers: quantised activations by quantised weights.
//!
//! Within 32 values along K, or a run of sixteen with its own scale, the sums are exact integers; they are added in
//! ascending order, each scaled by the product of both scales, a block's minima after them. That order is the contract
//! (batch invariance); here it is kept by vectors, in `tiles` by tile registers, and the two agree to the bit.

use std::ops::Range;

use super::blocks::{ColumnFactors, QuantBlock};
use super::gemm::{Part, tiles};
use super::isa::{Isa, Kernel, LANES, Lanes, Simd, WeightQuads};
use super::matrix::{BLOCK, PANEL};
use super::quant::QuantRows;
use super::tiles::TileDots;

/// Rows from which on tile registers are faster than vectors.
const TILE_FROM: usize = 8;

/// Blocks of K ahead for which weights are asked.
const AHEAD: usize = 8;

/// Panels of a product with quantised weights.
pub(super) struct Dots<'a, B> {
    pub(super) part: Part,
    pub(super) x: QuantRows<'a>,
    pub(super) w: &'a [B],
    pub(super) out: &'a mut [Lanes],
}

impl<'a, B: QuantBlock> Dots<'a, B> {
    pub(super) fn run(self, isa: Isa) {
        let depth = BLOCK / B::RUNS;
        let tiles = if self.part.rows < TILE_FROM { None } else { isa.tiles(self.x.height, depth) };
        match tiles {
            Some(tiles) => isa.run(TileDots { tiles, dots: self }),
            None => isa.run(self),
        }
    }

    /// The weights of a panel, and all that follow.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> Panel<'a, B> {
        let n_blocks = self.part.k / BLOCK;
        Panel { n_blocks, w: &self.w[(self.part.first + panel) * (n_blocks / B::BLOCKS)..] }
    }
}

/// Weights of 32 columns.
pub(super) struct Panel<'a, B> {
    /// Along K, of 32 values.
    pub(super) n_blocks: usize,
    w: &'a [B],
}

impl<'a, B: QuantBlock> Panel<'a, B> {
    #[inline(always)]
    pub(super) fn quads<'r>(&self, block: usize, room: &'r mut WeightQuads) -> &'r WeightQuads
    where
        'a: 'r,
    {
        self.w[block / B::BLOCKS].quads(block % B::BLOCKS, room)
    }

    #[inline(always)]
    pub(super) fn factors<S: Simd>(&self, s: S, block: usize, out: &mut ColumnFactors) {
        self.w[block / B::BLOCKS].factors(s, block % B::BLOCKS, out);
    }

    /// Asks for some eighths of the weights some blocks ahead, in ascending order, for the CPU's own prefetching to take up.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, s: S, block: usize, eighths: Range<usize>) {
        let (block, lines) = (block + AHEAD, size_of::<B>() / 64);
        let begin = self.w.as_ptr().wrapping_add(block / B::BLOCKS);
        let begin = begin.wrapping_byte_add(64 * (lines * (block % B::BLOCKS) / B::BLOCKS));
        // As many for each block, so that the loop needs no branch.
        let lines = lines.div_ceil(B::BLOCKS);
        let lines = lines * eighths.start / 8..lines * eighths.end / 8;
        lines.for_each(|line| s.prefetch(begin.wrapping_byte_add(64 * line)));
    }
}

impl<B: QuantBlock> Kernel for Dots<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let max = if S::WIDE { 6 } else { 2 };
        for panel in 0..self.part.n_panels(self.out.len()) {
            for group in 0..self.x.n_groups() {
                for (row, len) in tiles(self.x.height, max) {
                    let at = (group, row);
                    match len {
                        1 => self.tile::<S, 1>(s, at, panel),
                        2 => self.tile::<S, 2>(s, at, panel),
                        3 if S::WIDE => self.tile::<S, 3>(s, at, panel),
                        4 if S::WIDE => self.tile::<S, 4>(s, at, panel),
                        5 if S::WIDE => self.tile::<S, 5>(s, at, panel),
                        _ if S::WIDE => self.tile::<S, 6>(s, at, panel),
                        _ => {}
                    }
                }
            }
        }
    }
}

impl<B: QuantBlock> Dots<'_, B> {
    /// `R` rows of a group, by one panel.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, (group, row): (usize, usize), panel: usize) {
        let Part { rows, epilogue, .. } = self.part;
        let w = self.panel(panel);
        let (mut room, mut columns) = ([[0; 4 * PANEL]; BLOCK / 4], ColumnFactors::ZERO);
        let mut acc = [[s.zero(); 2]; R];
        for b in 0..w.n_blocks {
            w.prefetch(s, b, 0..8);
            let (quads, factors) = self.x.block(group, b);
            let (Some(quads), Some(factors)) = (quads[row..].first_chunk::<R>(), factors[row..].first_chunk::<R>())
            else {
                return;
            };
            w.factors(s, b, &mut columns);
            let weights = w.quads(b, &mut room);
            for run in 0..B::RUNS {
                let depth = BLOCK / 4 / B::RUNS;
                let mut sums = [[s.dot_start(0); 2]; R];
                for r in 0..R {
                    sums[r] = [s.dot_start(factors[r].offset(B::RUNS, run)); 2];
                }
                for i in run * depth..(run + 1) * depth {
                    let (halves, _) = weights[i].as_chunks::<{ 4 * LANES }>();
                    for r in 0..R {
                        sums[r][0] = s.dot4(sums[r][0], &halves[0], quads[r][i]);
                        sums[r][1] = s.dot4(sums[r][1], &halves[1], quads[r][i]);
                    }
                }
                let scales = [s.load(&columns.scales[run][0]), s.load(&columns.scales[run][1])];
                for r in 0..R {
                    let scale = s.splat(factors[r].scale);
                    for half in 0..2 {
                        acc[r][half] = s.fma(s.int_to_f32(sums[r][half]), s.mul(scales[half], scale), acc[r][half]);
                    }
                }
            }
            if B::MINIMA {
                let minima = [s.load(&columns.minima[0]), s.load(&columns.minima[1])];
                for r in 0..R {
                    let mass = s.splat(factors[r].mass);
                    acc[r] = [s.fma(minima[0], mass, acc[r][0]), s.fma(minima[1], mass, acc[r][1])];
                }
            }
        }
        let first_row = group * self.x.height + row;
        for (r, &sums) in acc.iter().enumerate().take_while(|(r, _)| first_row + r < rows) {
            epilogue.apply(s, sums, self.out, self.part.at(panel, first_row + r));
        }
    }
}
