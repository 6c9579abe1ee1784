//! `out = x * W^T` for weights in Q8_0: 8-bit integers, by quantised activations.
//!
//! Within 32 values along K the sums are exact integers; they are added in ascending order, each scaled by the product of
//! both scales. That order is the contract (batch invariance); here it is kept by vectors, in `tiles` by tile registers, and
//! the two agree to the bit.

use std::ops::Range;

use super::blocks::Q8Block;
use super::gemm::{Part, tiles};
use super::isa::{Isa, Kernel, LANES, Lanes, Simd};
use super::matrix::BLOCK;
use super::quant::BlockRows;
use super::tiles::TileDots;

/// Rows from which on tile registers are faster than vectors.
pub(super) const TILE_FROM: usize = 8;

/// Blocks of K ahead for which weights are asked.
const AHEAD: usize = 8;

/// Lines of a block.
const LINES: usize = size_of::<Q8Block>() / 64;

/// Panels of a product.
pub(super) struct Dots<'a> {
    pub(super) part: Part,
    pub(super) x: BlockRows<'a>,
    pub(super) w: &'a [Q8Block],
    pub(super) out: &'a mut [Lanes],
}

impl<'a> Dots<'a> {
    pub(super) fn run(self, isa: Isa) {
        let tiles = if self.part.rows < TILE_FROM { None } else { isa.tiles(self.x.height, BLOCK) };
        match tiles {
            Some(tiles) => isa.run(TileDots { tiles, dots: self }),
            None => isa.run(self),
        }
    }

    /// The weights of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &'a [Q8Block] {
        let n_blocks = self.part.k / BLOCK;
        &self.w[(self.part.first + panel) * n_blocks..][..n_blocks]
    }
}

/// Asks for some eighths of the weights some blocks ahead, in ascending order, for the CPU's own prefetching to take up.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, w: &[Q8Block], block: usize, eighths: Range<usize>) {
    let begin = w.as_ptr().wrapping_add(block + AHEAD);
    (LINES * eighths.start / 8..LINES * eighths.end / 8)
        .for_each(|line| s.prefetch(begin.wrapping_byte_add(64 * line)));
}

impl Kernel for Dots<'_> {
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

impl Dots<'_> {
    /// `R` rows of a group, by one panel.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, (group, row): (usize, usize), panel: usize) {
        let Part { rows, epilogue, .. } = self.part;
        let w = self.panel(panel);
        let mut acc = [[s.zero(); 2]; R];
        for (b, block) in w.iter().enumerate() {
            prefetch(s, w, b, 0..8);
            let (quads, factors) = self.x.block(group, b);
            let (Some(quads), Some(factors)) = (quads[row..].first_chunk::<R>(), factors[row..].first_chunk::<R>())
            else {
                return;
            };
            let mut sums = [[s.dot_start(0); 2]; R];
            for r in 0..R {
                sums[r] = [s.dot_start(factors[r].offset); 2];
            }
            for (i, weights) in block.quants.iter().enumerate() {
                let (halves, _) = weights.as_chunks::<{ 4 * LANES }>();
                for r in 0..R {
                    sums[r][0] = s.dot4(sums[r][0], &halves[0], quads[r][i]);
                    sums[r][1] = s.dot4(sums[r][1], &halves[1], quads[r][i]);
                }
            }
            let (scales, _) = block.scales.as_chunks::<LANES>();
            let scales = [s.load_f16(&scales[0]), s.load_f16(&scales[1])];
            for r in 0..R {
                let scale = s.splat(factors[r].scale);
                for half in 0..2 {
                    acc[r][half] = s.fma(s.int_to_f32(sums[r][half]), s.mul(scales[half], scale), acc[r][half]);
                }
            }
        }
        let first_row = group * self.x.height + row;
        for (r, &sums) in acc.iter().enumerate().take_while(|(r, _)| first_row + r < rows) {
            epilogue.apply(s, sums, self.out, self.part.at(panel, first_row + r));
        }
    }
}
