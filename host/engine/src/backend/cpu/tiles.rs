//! `out = x * W^T` in 8-bit integers, by tile registers.
//!
//! A tile product covers sixteen rows, sixteen columns and as much of K as has one scale. Its sums leave the tile through
//! memory and are scaled and added as vectors; that costs more than the product itself, so the loops serve it: the sums of
//! a few blocks stay in the nearest cache, and a row's accumulators in registers while these blocks are added.

use super::blocks::{ColumnFactors, QuantBlock};
use super::dots::{Dots, Panel};
use super::gemm::Part;
use super::isa::{Kernel, LANES, Lanes, Simd, TILE_ROWS, TileSums, Tiles};
use super::matrix::{BLOCK, PANEL};
use super::quant::QuantRows;

/// A product by tiles.
pub(super) struct TileDots<'a, B> {
    pub(super) tiles: Tiles,
    pub(super) dots: Dots<'a, B>,
}

/// Products along K between two visits of an accumulator: their sums, 16 KiB for two groups, fit the nearest cache.
const STEP: usize = 4;

/// Bytes of activations that are to stay in the second cache while the panels pass.
const NEAR_BYTES: usize = 1 << 20;

/// Sums of two groups by both halves of a panel, for some products along K.
#[repr(align(64))]
struct Sums([[[TileSums; 2]; 2]; STEP]);

/// What the rows of a group have gathered, by half of the panel.
type Gathered = [[Lanes; TILE_ROWS]; 2];

impl<B: QuantBlock> Kernel for TileDots<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut sums = Sums([[[[[0; LANES]; TILE_ROWS]; 2]; 2]; STEP]);
        let (n_groups, k) = (self.dots.x.n_groups(), self.dots.part.k);
        let together = (NEAR_BYTES / (k * TILE_ROWS)).next_multiple_of(2).max(2);
        for first in (0..n_groups).step_by(together) {
            for panel in 0..self.dots.part.n_panels(self.dots.out.len()) {
                for group in (first..n_groups.min(first + together)).step_by(2) {
                    // Once a panel has been read it is near.
                    let at = At { group, panel, near: group != first };
                    match n_groups - group {
                        1 => self.groups::<S, 1>(s, at, &mut sums),
                        _ => self.groups::<S, 2>(s, at, &mut sums),
                    }
                }
            }
        }
    }
}

/// Where a product of some groups with a panel is.
#[derive(Clone, Copy)]
struct At {
    group: usize,
    panel: usize,
    /// Whether the panel is in the second cache.
    near: bool,
}

impl<B: QuantBlock> TileDots<'_, B> {
    /// `G` groups, one or two, by one panel.
    #[inline(always)]
    fn groups<S: Simd, const G: usize>(&mut self, s: S, at: At, sums: &mut Sums) {
        let mut gathered = [[[[0.0; LANES]; TILE_ROWS]; 2]; G];
        let (mut room, mut columns) = ([[0; 4 * PANEL]; BLOCK / 4], [ColumnFactors::ZERO; STEP]);
        let w = self.dots.panel(at.panel);
        let step = STEP / B::RUNS;
        for begin in (0..w.n_blocks).step_by(step) {
            let n = step.min(w.n_blocks - begin);
            for (b, columns) in columns[..n].iter_mut().enumerate() {
                let block = begin + b;
                if !at.near {
                    w.prefetch(s, block, 0..4);
                }
                w.factors(s, block, columns);
                let weights = w.quads(block, &mut room);
                let x: [_; G] = std::array::from_fn(|g| self.dots.x.block(at.group + g, block).0);
                for run in 0..B::RUNS {
                    let sums = &mut sums.0[b * B::RUNS + run];
                    match x.as_slice() {
                        [x0, x1] => self.tiles.two([x0, x1], weights, run, sums),
                        _ => self.tiles.one(x[0], weights, run, &mut sums[0]),
                    }
                }
            }
            for (g, gathered) in gathered.iter_mut().enumerate() {
                let (group, columns, share) = (at.group + g, &columns[..n], 2 / G);
                let ahead = if at.near { None } else { Some(&w) };
                Blocks { x: &self.dots.x, group, begin, sums: &sums.0, g, columns, ahead, share }.gather(s, gathered);
            }
        }
        for (g, gathered) in gathered.iter().enumerate() {
            self.finish(s, (at.group + g, at.panel), gathered);
        }
    }

    /// The outputs of a group.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, s: S, (group, panel): (usize, usize), gathered: &Gathered) {
        let Part { rows, epilogue, .. } = self.dots.part;
        let begin = group * self.dots.x.height;
        for row in begin..rows.min(begin + self.dots.x.height) {
            let sums = [s.load(&gathered[0][row - begin]), s.load(&gathered[1][row - begin])];
            epilogue.apply(s, sums, self.dots.out, self.dots.part.at(panel, row));
        }
    }
}

/// Sums of some blocks, for one group.
struct Blocks<'a, B> {
    x: &'a QuantRows<'a>,
    group: usize,
    begin: usize,
    sums: &'a [[[TileSums; 2]; 2]; STEP],
    /// Which of the two groups of the sums.
    g: usize,
    columns: &'a [ColumnFactors],
    /// Weights to ask for, and how many eighths in each half.
    ahead: Option<&'a Panel<'a, B>>,
    share: usize,
}

impl<B: QuantBlock> Blocks<'_, B> {
    /// Scales them and adds them.
    #[inline(always)]
    fn gather<S: Simd>(&self, s: S, gathered: &mut Gathered) {
        for (half, gathered) in gathered.iter_mut().enumerate() {
            let mut row = 0;
            while row < self.x.height {
                row += match self.x.height - row {
                    16.. => self.add::<S, 16>(s, (half, row), gathered),
                    8.. => self.add::<S, 8>(s, (half, row), gathered),
                    4.. => self.add::<S, 4>(s, (half, row), gathered),
                    2.. => self.add::<S, 2>(s, (half, row), gathered),
                    _ => self.add::<S, 1>(s, (half, row), gathered),
                };
            }
        }
    }

    /// Adds them to `R` rows, and returns `R`.
    #[inline(always)]
    fn add<S: Simd, const R: usize>(&self, s: S, (half, row): (usize, usize), rows: &mut [Lanes; TILE_ROWS]) -> usize {
        let Some(rows) = rows[row..].first_chunk_mut::<R>() else { return R };
        let mut acc = [s.zero(); R];
        for r in 0..R {
            acc[r] = s.load(&rows[r]);
        }
        for (b, columns) in self.columns.iter().enumerate() {
            let block = self.begin + b;
            self.x.prefetch(s, self.group, block + STEP / B::RUNS, half);
            if let Some(w) = self.ahead {
                let first = 4 + (2 * self.g + half) * self.share;
                w.prefetch(s, block, first..first + self.share);
            }
            let Some(factors) = self.x.block(self.group, block).1[row..].first_chunk::<R>() else { return R };
            for run in 0..B::RUNS {
                let sums = &self.sums[b * B::RUNS + run][self.g][half];
                let Some(sums) = sums[row..].first_chunk::<R>() else { return R };
                let scales = s.load(&columns.scales[run][half]);
                for r in 0..R {
                    let sum = s.int_to_f32(s.load_int(&sums[r]));
                    acc[r] = s.fma(sum, s.mul(scales, s.splat(factors[r].scale)), acc[r]);
                }
            }
            if B::MINIMA {
                let minima = s.load(&columns.minima[half]);
                for r in 0..R {
                    acc[r] = s.fma(minima, s.splat(factors[r].mass), acc[r]);
                }
            }
        }
        for r in 0..R {
            s.store(acc[r], &mut rows[r]);
        }
        R
    }
}
