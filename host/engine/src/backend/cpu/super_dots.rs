//! Products with weights in super-blocks, by vectors.
//!
//! The sum over a super-block is one exact integer (`supers`), its minima another; super-blocks are added as floats in
//! ascending order, minima after the rest.

use super::dots::{Dots, Product};
use super::isa::{LANES, Simd};
use super::matrix::{BLOCK, PANEL};
use super::quant::SuperRows;
use super::supers::{SUPER, SuperBlock, SuperFactors};

/// Panels of a product.
pub(super) type SuperDots<'a, B> = Dots<'a, SuperRows<'a>, B>;

/// Cache lines of a super-block.
pub(super) const fn lines<B>() -> usize {
    size_of::<B>() / 64
}

/// Asks for some lines of the weights behind a super-block.
#[inline(always)]
pub(super) fn prefetch<S: Simd, B>(s: S, block: &B, first: usize, n_lines: usize) {
    let begin = std::ptr::from_ref(block).wrapping_add(1).wrapping_byte_add(64 * first);
    (0..n_lines).for_each(|line| s.prefetch(begin.wrapping_byte_add(64 * line)));
}

impl<B: SuperBlock> Product for SuperDots<'_, B> {
    fn depth(n_groups: usize) -> usize {
        if Self::is_plain(n_groups) { BLOCK } else { 2 * BLOCK }
    }

    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, s: S, (group, row): (usize, usize), panel: usize) {
        let (mut columns, mut acc) = (SuperFactors::ZERO, [[s.zero(); 2]; R]);
        for (b, block) in self.panel(panel).iter().enumerate() {
            let Some(factors) = self.x.block(group, b).1[row..].first_chunk::<R>() else { return };
            block.factors(s, &mut columns);
            let whole = self.integers::<S, R>(s, (group, row), (b, block), &columns);
            for r in 0..R {
                for half in 0..2 {
                    acc[r][half] = columns.add::<S, B>(s, half, &factors[r], (whole[r][half], acc[r][half]));
                }
            }
        }
        self.put(s, group * self.x.height + row, panel, &acc);
    }
}

impl<B: SuperBlock> SuperDots<'_, B> {
    /// Whether tiles take the weights' bytes as they are, as much of K at once as has one integer scale: nobody would share what
    /// is opened for one group.
    pub(super) fn is_plain(n_groups: usize) -> bool {
        n_groups == 1 && B::PLAIN
    }

    /// Sums over a super-block.
    #[inline(always)]
    fn integers<S: Simd, const R: usize>(
        &self,
        s: S,
        at: (usize, usize),
        (b, block): (usize, &B),
        columns: &SuperFactors,
    ) -> [[S::I; 2]; R] {
        let (mut room, mut whole) = ([[0; 4 * PANEL]; BLOCK / 4], [[s.splat_int(0); 2]; R]);
        let (x, factors) = self.x.block(at.0, b);
        let depth = SUPER / 4 / B::RUNS;
        for i in 0..SUPER / BLOCK {
            // As many for each eighth, so that the loop needs no branch.
            let n_lines = lines::<B>().div_ceil(8);
            prefetch(s, block, n_lines * i, n_lines);
            let quads = block.quads(i, &mut room);
            let (x, factors) = (&x[i / 2 * self.x.height + at.1..], &factors[at.1..]);
            let (Some(x), Some(factors)) = (x.first_chunk::<R>(), factors.first_chunk::<R>()) else { return whole };
            for (in_block, weights) in quads.chunks_exact(depth).enumerate() {
                let run = i * B::RUNS / 8 + in_block;
                let mut sums = [[s.splat_int(0); 2]; R];
                for r in 0..R {
                    sums[r] = [B::start(s, &factors[r], run); 2];
                }
                for (quad, weights) in weights.iter().enumerate() {
                    let (halves, _) = weights.as_chunks::<{ 4 * LANES }>();
                    for r in 0..R {
                        let x = x[r][i % 2 * 8 + in_block * depth + quad];
                        sums[r][0] = B::dot(s, sums[r][0], &halves[0], x);
                        sums[r][1] = B::dot(s, sums[r][1], &halves[1], x);
                    }
                }
                let scales = block.scales(run, columns);
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
