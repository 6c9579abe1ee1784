//! Products with weights in super-blocks, by tile registers.
//!
//! Scales are worked into the weights first (`SuperBlock::planes`), once for some groups of rows; then a tile adds up all 256
//! values of a super-block before its sums leave through memory, the slowest part of a product by tiles. Where the activations do not
//! fit the second cache, K passes in spans that do, some panels for each.

use std::ops::Range;

use super::dots::{Gathered, Tiled};
use super::isa::{Kernel, LANES, Planes, Simd, TILE_ROWS, TileSums};
use super::matrix::{BLOCK, PANEL};
use super::super_dots::{SuperDots, lines, prefetch};
use super::supers::{SUPER, SuperBlock, SuperFactors};

/// Groups that share one opening of the weights: what they gather stays in the second cache.
const TOGETHER: usize = 32;

/// Panels that pass over a span of K before the next span, where there is more than one.
const PANELS: usize = 4;

/// Groups times super-blocks of K, 4 KiB each, that stay in the second cache while some panels pass.
const NEAR: usize = 256;

/// What is at hand while `P` panels pass.
#[repr(align(64))]
struct Room<const P: usize> {
    planes: Planes,
    /// By byte of the weights, or by block of 32, and by half of the panel.
    sums: [[TileSums; 2]; SUPER / BLOCK],
    columns: SuperFactors,
    /// By panel and group.
    gathered: [[Gathered; TOGETHER]; P],
}

impl<const P: usize> Room<P> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            planes: [[[0; 4 * PANEL]; 64]; 2],
            sums: [[[[0; LANES]; TILE_ROWS]; 2]; SUPER / BLOCK],
            columns: SuperFactors::ZERO,
            gathered: [[[[[0.0; LANES]; TILE_ROWS]; 2]; TOGETHER]; P],
        }
    }
}

impl<B: SuperBlock> Kernel for Tiled<SuperDots<'_, B>> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n_groups, n_blocks) = (self.dots.x.n_groups, self.dots.part.k / SUPER);
        if SuperDots::<B>::is_plain(n_groups) {
            self.plain(s);
        } else if n_groups.min(TOGETHER) * n_blocks <= NEAR {
            self.pass::<S, 1>(s);
        } else {
            self.pass::<S, PANELS>(s);
        }
    }
}

impl<B: SuperBlock> Tiled<SuperDots<'_, B>> {
    /// All of it, `P` panels at a time.
    #[inline(always)]
    fn pass<S: Simd, const P: usize>(mut self, s: S) {
        let mut room = Room::<P>::new();
        let (n_groups, n_blocks) = (self.dots.x.n_groups, self.dots.part.k / SUPER);
        let n_panels = self.dots.part.n_panels(self.dots.out.len());
        for first in (0..n_groups).step_by(TOGETHER) {
            let groups = first..n_groups.min(first + TOGETHER);
            let span = NEAR.div_ceil(groups.len());
            for first in (0..n_panels).step_by(P) {
                for begin in (0..n_blocks).step_by(span) {
                    let blocks = begin..n_blocks.min(begin + span);
                    for panel in first..n_panels.min(first + P) {
                        self.panel(s, panel, (groups.clone(), blocks.clone()), &mut room);
                    }
                }
            }
        }
    }

    /// Some groups, by some super-blocks of one panel.
    #[inline(always)]
    fn panel<S: Simd, const P: usize>(
        &mut self,
        s: S,
        panel: usize,
        (groups, blocks): (Range<usize>, Range<usize>),
        Room { planes, sums, columns, gathered }: &mut Room<P>,
    ) {
        let (weights, gathered) = (self.dots.panel(panel), &mut gathered[panel % P][..groups.len()]);
        let sums = &mut sums.as_chunks_mut().0[0];
        if blocks.start == 0 {
            gathered.fill([[[0.0; LANES]; TILE_ROWS]; 2]);
        }
        for b in blocks.clone() {
            let block = &weights[b];
            block.factors(s, columns);
            // Memory is slower than what is computed here and should never rest: a third of the next super-block but one is asked
            // for while this one is opened, and a third with each of two groups, or the rest with one.
            let mut asked = lines::<B>();
            let mut ask = |n_lines| {
                prefetch(s, block, asked, n_lines);
                asked += n_lines;
            };
            let share = lines::<B>().div_ceil(1 + groups.len().min(2));
            for i in 0..SUPER / BLOCK {
                ask(share.div_ceil(SUPER / BLOCK));
                block.planes(s, i, columns, planes);
            }
            for (group, gathered) in groups.clone().zip(&mut *gathered) {
                if group < groups.start + 2 {
                    ask(share);
                }
                if b + 1 == weights.len() {
                    self.dots.prefetch_out(s, group, panel);
                }
                self.tiles.planes(self.dots.x.block(group, b).0, planes, sums);
                self.gather(s, (group, b), (sums, columns), gathered);
            }
        }
        if blocks.end == weights.len() {
            for (group, gathered) in groups.zip(&*gathered) {
                self.dots.finish(s, (group, panel), gathered);
            }
        }
    }

    /// One group, with the weights' bytes as they are.
    #[inline(always)]
    fn plain<S: Simd>(mut self, s: S) {
        let Room { planes, sums, columns, gathered } = &mut Room::<1>::new();
        let (opened, gathered) = (&mut planes[0].as_chunks_mut::<{ BLOCK / 4 }>().0[0], &mut gathered[0][0]);
        let n_lines = lines::<B>().div_ceil(2 * SUPER / BLOCK);
        for panel in 0..self.dots.part.n_panels(self.dots.out.len()) {
            *gathered = [[[0.0; LANES]; TILE_ROWS]; 2];
            for (b, block) in self.dots.panel(panel).iter().enumerate() {
                block.factors(s, columns);
                let (x, factors) = self.dots.x.block(0, b);
                for (i, sums) in sums.iter_mut().enumerate() {
                    prefetch(s, block, n_lines * i, n_lines);
                    let x = &x[i / 2 * factors.len()..][..factors.len()];
                    self.tiles.half(x, i % 2, block.quads(i, opened), sums);
                }
                for (half, gathered) in gathered.iter_mut().enumerate() {
                    for (row, (gathered, factor)) in gathered.iter_mut().zip(factors).enumerate() {
                        let mut whole = s.splat_int(0);
                        for (i, sums) in sums.iter().enumerate() {
                            let scales = &block.scales(i, columns)[half];
                            whole = s.int_mul_add(whole, s.load_int(&sums[half][row]), scales);
                        }
                        s.store(columns.add::<S, B>(s, half, factor, (whole, s.load(gathered))), gathered);
                    }
                    for i in 0..SUPER / BLOCK / 2 {
                        prefetch(s, block, n_lines * (SUPER / BLOCK + half * SUPER / BLOCK / 2 + i), n_lines);
                    }
                }
            }
            self.dots.finish(s, (0, panel), gathered);
        }
    }

    /// Scales the sums of a group over a super-block and adds them.
    #[inline(always)]
    fn gather<S: Simd>(
        &self,
        s: S,
        (group, block): (usize, usize),
        (sums, columns): (&[[TileSums; 2]; 2], &SuperFactors),
        gathered: &mut Gathered,
    ) {
        let (x, factors) = self.dots.x.block(group, block);
        // What follows in memory comes next, mostly.
        let next = x.as_ptr().wrapping_add(x.len());
        for (half, gathered) in gathered.iter_mut().enumerate() {
            for (row, (gathered, factor)) in gathered.iter_mut().zip(factors).enumerate() {
                let (first, second) = (s.load_int(&sums[0][half][row]), s.load_int(&sums[1][half][row]));
                let sum = (s.shift_add(second, first, B::SHIFT), s.load(gathered));
                s.store(columns.add::<S, B>(s, half, factor, sum), gathered);
                (0..2).for_each(|line| s.prefetch_near(next.wrapping_add(4 * row + 2 * half + line)));
            }
        }
    }
}
