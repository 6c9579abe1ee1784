//! Products with weights in blocks of 32 (Q8_0 and Q4_0 where K is no multiple of 256), by vectors: integers within a block,
//! times both scales.

use std::ops::Range;

use super::blocks::{Opened, ScaledBlock};
use super::dots::{Dots, Product, Rows, each_rows};
use super::isa::{LANES, Simd};
use super::matrix::BLOCK;
use super::quant::BlockRows;

/// Blocks of K ahead for which weights are asked.
const AHEAD: usize = 8;

/// Panels of a product.
pub(super) type BlockDots<'a, B> = Dots<'a, BlockRows<'a>, B>;

/// Asks for some eighths of the weights some blocks ahead, in ascending order, for the CPU's own prefetching to take up.
#[inline(always)]
pub(super) fn prefetch<S: Simd, B>(s: S, w: &[B], block: usize, eighths: Range<usize>) {
    let (begin, lines) = (w.as_ptr().wrapping_add(block + AHEAD), size_of::<B>() / 64);
    (lines * eighths.start / 8..lines * eighths.end / 8)
        .for_each(|line| s.prefetch(begin.wrapping_byte_add(64 * line)));
}

impl<B: ScaledBlock> Product for BlockDots<'_, B> {
    fn depth(_n_groups: usize) -> usize {
        BLOCK
    }

    #[inline(always)]
    fn group<S: Simd>(&mut self, s: S, (group, panel): (usize, usize)) {
        each_rows(s, self.x.height, &mut BlockGroup { dots: self, group, panel });
    }
}

/// A group of rows by one panel.
struct BlockGroup<'r, 'a, B> {
    dots: &'r mut BlockDots<'a, B>,
    group: usize,
    panel: usize,
}

impl<B: ScaledBlock> Rows for BlockGroup<'_, '_, B> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (w, x) = (self.dots.panel(self.panel), self.dots.x);
        let (mut room, mut acc) = (Opened::EMPTY, [[s.zero(); 2]; R]);
        for (b, block) in w.iter().enumerate() {
            prefetch(s, w, b, 0..8);
            let (quads, factors) = x.block(self.group, b);
            let (Some(quads), Some(factors)) = (quads[row..].first_chunk::<R>(), factors[row..].first_chunk::<R>())
            else {
                return;
            };
            let mut sums = [[s.dot_start(0); 2]; R];
            for r in 0..R {
                sums[r] = [s.dot_start(factors[r].offset); 2];
            }
            for (i, weights) in block.quads(&mut room.0).iter().enumerate() {
                let (halves, _) = weights.as_chunks::<{ 4 * LANES }>();
                for r in 0..R {
                    sums[r][0] = s.dot4(sums[r][0], &halves[0], quads[r][i]);
                    sums[r][1] = s.dot4(sums[r][1], &halves[1], quads[r][i]);
                }
            }
            let (scales, _) = block.scales().as_chunks::<LANES>();
            let scales = [s.load_f16(&scales[0]), s.load_f16(&scales[1])];
            for r in 0..R {
                let scale = s.splat(factors[r].scale);
                for half in 0..2 {
                    acc[r][half] = s.fma(s.int_to_f32(sums[r][half]), s.mul(scales[half], scale), acc[r][half]);
                }
            }
        }
        self.dots.put(s, self.group * x.height + row, self.panel, &acc);
    }
}
