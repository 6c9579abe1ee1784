//! Products with weights in blocks of 32 (Q8_0 and Q4_0 where K is no multiple of 256), by tile registers.
//!
//! A tile product covers sixteen rows, sixteen columns and as much of K as has one scale, 32. Its sums leave the tile through
//! memory and are scaled and added as vectors; that costs more than the product itself, so the loops serve it: the sums of
//! a few blocks stay in the nearest cache, and a row's accumulators in registers while these blocks are added.

use super::block_dots::{BlockDots, prefetch};
use super::blocks::{Opened, ScaledBlock};
use super::dots::{Gathered, Tiled};
use super::isa::{Kernel, LANES, Lanes, Simd, TILE_ROWS, TileSums};
use super::quant::BlockRows;

/// Products along K between two visits of an accumulator: their sums, 16 KiB for two groups, fit the nearest cache.
const STEP: usize = 4;

/// Bytes of activations that are to stay in the second cache while the panels pass.
const NEAR_BYTES: usize = 1 << 20;

/// Sums of two groups by both halves of a panel, for some products along K.
#[repr(align(64))]
struct Sums([[[TileSums; 2]; 2]; STEP]);

impl<B: ScaledBlock> Kernel for Tiled<BlockDots<'_, B>> {
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

impl<B: ScaledBlock> Tiled<BlockDots<'_, B>> {
    /// `G` groups, one or two, by one panel.
    #[inline(always)]
    fn groups<S: Simd, const G: usize>(&mut self, s: S, at: At, sums: &mut Sums) {
        let mut gathered = [[[[0.0; LANES]; TILE_ROWS]; 2]; G];
        let (mut opened, mut scales) = (Opened::EMPTY, [[[0.0; LANES]; 2]; STEP]);
        let w = self.dots.panel(at.panel);
        for begin in (0..w.len()).step_by(STEP) {
            let n = STEP.min(w.len() - begin);
            for (b, scales) in scales[..n].iter_mut().enumerate() {
                let block = begin + b;
                if !at.near {
                    prefetch(s, w, block, 0..4);
                }
                let (halves, _) = w[block].scales().as_chunks::<LANES>();
                s.store(s.load_f16(&halves[0]), &mut scales[0]);
                s.store(s.load_f16(&halves[1]), &mut scales[1]);
                let x: [_; G] = std::array::from_fn(|g| self.dots.x.block(at.group + g, block).0);
                let quads = w[block].quads(&mut opened.0);
                match x.as_slice() {
                    [x0, x1] => self.tiles.two([x0, x1], quads, &mut sums.0[b]),
                    _ => self.tiles.one(x[0], quads, &mut sums.0[b][0]),
                }
            }
            for (g, gathered) in gathered.iter_mut().enumerate() {
                let (group, scales, share) = (at.group + g, &scales[..n], 2 / G);
                let ahead = if at.near { None } else { Some(w) };
                Blocks { x: &self.dots.x, group, begin, sums: &sums.0, g, scales, ahead, share }.gather(s, gathered);
            }
        }
        for (g, gathered) in gathered.iter().enumerate() {
            self.dots.finish(s, (at.group + g, at.panel), gathered);
        }
    }
}

/// Sums of some blocks, for one group.
struct Blocks<'a, B> {
    x: &'a BlockRows<'a>,
    group: usize,
    begin: usize,
    sums: &'a [[[TileSums; 2]; 2]; STEP],
    /// Which of the two groups of the sums.
    g: usize,
    /// Of the columns, by half of the panel.
    scales: &'a [[Lanes; 2]],
    /// Weights to ask for, and how many eighths in each half.
    ahead: Option<&'a [B]>,
    share: usize,
}

impl<B> Blocks<'_, B> {
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
        for (b, scales) in self.scales.iter().enumerate() {
            let block = self.begin + b;
            self.x.prefetch(s, self.group, block + STEP, half);
            if let Some(w) = self.ahead {
                let first = 4 + (2 * self.g + half) * self.share;
                prefetch(s, w, block, first..first + self.share);
            }
            let Some(factors) = self.x.block(self.group, block).1[row..].first_chunk::<R>() else { return R };
            let Some(sums) = self.sums[b][self.g][half][row..].first_chunk::<R>() else { return R };
            let scales = s.load(&scales[half]);
            for r in 0..R {
                let sum = s.int_to_f32(s.load_int(&sums[r]));
                acc[r] = s.fma(sum, s.mul(scales, s.splat(factors[r].scale)), acc[r]);
            }
        }
        for r in 0..R {
            s.store(acc[r], &mut rows[r]);
        }
        R
    }
}
