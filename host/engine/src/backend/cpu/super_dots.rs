//! `out = x * W^T` for weights of K-quants: 8-bit integers, by quantised activations.
//!
//! The sum over a super-block is one exact integer (`supers`), its minima another; super-blocks are added as floats in
//! ascending order, minima after the rest. That order is the contract (batch invariance); here integers are added by vectors,
//! in `super_tiles` by tile registers.

use super::dots::TILE_FROM;
use super::gemm::{Part, tiles};
use super::isa::{Isa, Kernel, LANES, Lanes, Simd};
use super::matrix::{BLOCK, PANEL};
use super::quant::SuperRows;
use super::super_tiles::SuperTiles;
use super::supers::{SUPER, SuperBlock, SuperFactors};

/// Panels of a product.
pub(super) struct SuperDots<'a, B> {
    pub(super) part: Part,
    pub(super) x: SuperRows<'a>,
    pub(super) w: &'a [B],
    pub(super) out: &'a mut [Lanes],
}

impl<'a, B: SuperBlock> SuperDots<'a, B> {
    pub(super) fn run(self, isa: Isa) {
        let tiles = if self.part.rows < TILE_FROM { None } else { isa.tiles(self.x.height, 2 * BLOCK) };
        match tiles {
            Some(tiles) => isa.run(SuperTiles { tiles, dots: self }),
            None => isa.run(self),
        }
    }

    /// The weights of a panel.
    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &'a [B] {
        let n_blocks = self.part.k / SUPER;
        &self.w[(self.part.first + panel) * n_blocks..][..n_blocks]
    }
}

/// Asks for one eighth of the weights behind a super-block.
#[inline(always)]
pub(super) fn prefetch<S: Simd, B>(s: S, block: &B, eighth: usize) {
    // As many for each eighth, so that the loop needs no branch.
    let lines = (size_of::<B>() / 64).div_ceil(8);
    let begin = std::ptr::from_ref(block).wrapping_add(1).wrapping_byte_add(64 * lines * eighth);
    (0..lines).for_each(|line| s.prefetch(begin.wrapping_byte_add(64 * line)));
}

impl<B: SuperBlock> Kernel for SuperDots<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let max = if S::WIDE { 6 } else { 2 };
        for panel in 0..self.part.n_panels(self.out.len()) {
            for group in 0..self.x.n_groups {
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

impl<B: SuperBlock> SuperDots<'_, B> {
    /// `R` rows of a group, by one panel.
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, s: S, (group, row): (usize, usize), panel: usize) {
        let Part { rows, epilogue, .. } = self.part;
        let (mut columns, mut acc) = (SuperFactors::ZERO, [[s.zero(); 2]; R]);
        for (b, block) in self.panel(panel).iter().enumerate() {
            block.factors(s, &mut columns);
            let Some(factors) = self.x.block(group, b).1[row..].first_chunk::<R>() else { return };
            let whole = self.integers::<S, R>(s, (group, row), (b, block));
            for r in 0..R {
                for half in 0..2 {
                    acc[r][half] = columns.add::<S, B>(s, half, &factors[r], (whole[r][half], acc[r][half]));
                }
            }
        }
        let first_row = group * self.x.height + row;
        for (r, &sums) in acc.iter().enumerate().take_while(|(r, _)| first_row + r < rows) {
            epilogue.apply(s, sums, self.out, self.part.at(panel, first_row + r));
        }
    }

    /// Sums over a super-block.
    #[inline(always)]
    fn integers<S: Simd, const R: usize>(&self, s: S, at: (usize, usize), (b, block): (usize, &B)) -> [[S::I; 2]; R] {
        let (mut quads, mut whole) = ([[0; 4 * PANEL]; BLOCK / 4], [[s.dot_start(0); 2]; R]);
        let (x, factors) = self.x.block(at.0, b);
        let depth = SUPER / 4 / B::RUNS;
        for i in 0..SUPER / BLOCK {
            prefetch(s, block, i);
            block.quads(i, &mut quads);
            let (x, factors) = (&x[i / 2 * self.x.height + at.1..], &factors[at.1..]);
            let (Some(x), Some(factors)) = (x.first_chunk::<R>(), factors.first_chunk::<R>()) else { return whole };
            for (in_block, weights) in quads.chunks_exact(depth).enumerate() {
                let run = i * B::RUNS / 8 + in_block;
                let mut sums = [[s.dot_start(0); 2]; R];
                for r in 0..R {
                    sums[r] = [s.dot_start(factors[r].offset(run, B::RUNS)); 2];
                }
                for (quad, weights) in weights.iter().enumerate() {
                    let (halves, _) = weights.as_chunks::<{ 4 * LANES }>();
                    for r in 0..R {
                        let x = x[r][i % 2 * 8 + in_block * depth + quad];
                        sums[r][0] = s.dot4(sums[r][0], &halves[0], x);
                        sums[r][1] = s.dot4(sums[r][1], &halves[1], x);
                    }
                }
                let scales = block.scales(run);
                for r in 0..R {
                    for half in 0..2 {
                        whole[r][half] = s.int_mul_add(whole[r][half], sums[r][half], &scales[half]);
                    }
                }
            }
        }
        whole
    }
}
