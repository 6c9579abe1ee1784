//! Products with weights of K-quants, by tile registers.
//!
//! Scales are worked into the weights first (`SuperBlock::planes`), once for some groups of rows; then a tile adds up all 256
//! values of a super-block before its sums leave through memory, the slowest part of a product by tiles.

use std::ops::Range;

use super::dots::{Gathered, Tiled};
use super::isa::{Kernel, LANES, Planes, Simd, TILE_ROWS, TileSums};
use super::matrix::{BLOCK, PANEL};
use super::super_dots::{SuperDots, prefetch};
use super::supers::{SUPER, SuperBlock, SuperFactors};

/// Groups that share one opening of the weights: what they gather stays in the second cache.
const TOGETHER: usize = 32;

/// What is at hand while a panel passes.
#[repr(align(64))]
struct Room {
    planes: Planes,
    /// By byte of the weights and half of the panel.
    sums: [[TileSums; 2]; 2],
    columns: SuperFactors,
    /// By group.
    gathered: [Gathered; TOGETHER],
}

impl<B: SuperBlock> Kernel for Tiled<SuperDots<'_, B>> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let mut room = Room {
            planes: [[[0; 4 * PANEL]; 64]; 2],
            sums: [[[[0; LANES]; TILE_ROWS]; 2]; 2],
            columns: SuperFactors::ZERO,
            gathered: [[[[0.0; LANES]; TILE_ROWS]; 2]; TOGETHER],
        };
        let n_groups = self.dots.x.n_groups;
        for first in (0..n_groups).step_by(TOGETHER) {
            let groups = first..n_groups.min(first + TOGETHER);
            for panel in 0..self.dots.part.n_panels(self.dots.out.len()) {
                self.panel(s, panel, groups.clone(), &mut room);
            }
        }
    }
}

impl<B: SuperBlock> Tiled<SuperDots<'_, B>> {
    /// Some groups, by one panel.
    #[inline(always)]
    fn panel<S: Simd>(&mut self, s: S, panel: usize, groups: Range<usize>, room: &mut Room) {
        let Room { planes, sums, columns, gathered } = room;
        gathered[..groups.len()].fill([[[0.0; LANES]; TILE_ROWS]; 2]);
        for (b, block) in self.dots.panel(panel).iter().enumerate() {
            for i in 0..SUPER / BLOCK {
                prefetch(s, block, i);
                block.planes(i, planes);
            }
            block.factors(s, columns);
            for (group, gathered) in groups.clone().zip(&mut *gathered) {
                self.tiles.planes(self.dots.x.block(group, b).0, planes, sums);
                self.gather(s, (group, b), (sums, columns), gathered);
            }
        }
        for (group, gathered) in groups.zip(&*gathered) {
            self.dots.finish(s, (group, panel), gathered);
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
