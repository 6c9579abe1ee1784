//! Products with weights in super-blocks, by vectors.
//!
//! The sum over a super-block is one exact integer (`supers`), its minima another; super-blocks are added as floats in
//! ascending order, minima after the rest.

use super::blocks::Opened;
use super::dots::{Dots, Gathered, Product, Rows, each_rows, rows_at_once};
use super::isa::{LANES, Simd, Stretch, TILE_ROWS, WeightQuads};
use super::matrix::BLOCK;
use super::quant::{SuperFactor, SuperRows};
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

/// Asks for an eighth of the super-block so many super-blocks behind the next: as many lines for each, so that the loop needs no
/// branch.
#[inline(always)]
fn prefetch_eighth<S: Simd, B>(s: S, block: &B, behind: usize, eighth: usize) {
    let n_lines = lines::<B>().div_ceil(SUPER / BLOCK);
    prefetch(s, block, behind * lines::<B>() + n_lines * eighth, n_lines);
}

impl<B: SuperBlock> Product for SuperDots<'_, B> {
    fn depth(n_groups: usize) -> usize {
        if Self::is_plain(n_groups) { BLOCK } else { 2 * BLOCK }
    }

    #[inline(always)]
    fn group<S: Simd>(&mut self, s: S, (group, panel): (usize, usize)) {
        if self.x.height <= rows_at_once::<S>() {
            return each_rows(s, self.x.height, &mut FewRows { dots: self, group, panel });
        }
        let mut room = [Opened::EMPTY; SUPER / BLOCK];
        let (mut columns, mut gathered) = (SuperFactors::ZERO, [[[0.0; LANES]; TILE_ROWS]; 2]);
        for (b, block) in self.panel(panel).iter().enumerate() {
            let mut opened = [&Opened::EMPTY.0; SUPER / BLOCK];
            for (i, (opened, room)) in opened.iter_mut().zip(&mut room).enumerate() {
                prefetch_eighth(s, block, 0, i);
                *opened = block.quads(i, &mut room.0);
            }
            block.factors(s, &mut columns);
            let (x, gathered) = (self.x.block(group, b), &mut gathered);
            each_rows(s, self.x.height, &mut ManyRows { block, opened, columns: &columns, x, gathered });
        }
        self.finish(s, (group, panel), &gathered);
    }
}

impl<B: SuperBlock> SuperDots<'_, B> {
    /// Whether tiles take the weights' bytes as they are, as much of K at once as has one integer scale: nobody would share what
    /// is opened for one group.
    pub(super) fn is_plain(n_groups: usize) -> bool {
        n_groups == 1 && B::PLAIN
    }
}

/// A group that one run takes, by one panel: weights are opened when they are multiplied.
struct FewRows<'r, 'a, B> {
    dots: &'r mut SuperDots<'a, B>,
    group: usize,
    panel: usize,
}

/// A group by one super-block, which is opened once for all.
struct ManyRows<'a, B> {
    block: &'a B,
    opened: [&'a WeightQuads; SUPER / BLOCK],
    columns: &'a SuperFactors,
    x: (&'a [Stretch], &'a [SuperFactor]),
    gathered: &'a mut Gathered,
}

impl<B: SuperBlock> Rows for FewRows<'_, '_, B> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (mut room, mut columns, mut acc) = (Opened::EMPTY, SuperFactors::ZERO, [[s.zero(); 2]; R]);
        for (b, block) in self.dots.panel(self.panel).iter().enumerate() {
            let (x, factors) = self.dots.x.block(self.group, b);
            let Some(factors) = factors[row..].first_chunk::<R>() else { return };
            block.factors(s, &mut columns);
            let mut whole = [[s.splat_int(0); 2]; R];
            for i in 0..SUPER / BLOCK {
                // Two rows of narrow vectors gain by asking earlier (`benches/RESULTS.md`), wide vectors lose a little.
                prefetch_eighth(s, block, usize::from(!S::WIDE), i);
                let quads = block.quads(i, &mut room.0);
                let Some(x) = x[i / 2 * self.dots.x.height + row..].first_chunk::<R>() else { return };
                add(s, (block, &columns), (i, quads), (x, factors), &mut whole);
            }
            for r in 0..R {
                for half in 0..2 {
                    acc[r][half] = columns.add::<S, B>(s, half, &factors[r], (whole[r][half], acc[r][half]));
                }
            }
        }
        self.dots.put(s, self.group * self.dots.x.height + row, self.panel, &acc);
    }
}

impl<B: SuperBlock> Rows for ManyRows<'_, B> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(&mut self, s: S, row: usize) {
        let (x, factors) = self.x;
        let height = factors.len();
        let Some(factors) = factors[row..].first_chunk::<R>() else { return };
        let mut whole = [[s.splat_int(0); 2]; R];
        for (i, quads) in self.opened.into_iter().enumerate() {
            let Some(x) = x[i / 2 * height + row..].first_chunk::<R>() else { return };
            add(s, (self.block, self.columns), (i, quads), (x, factors), &mut whole);
        }
        for r in 0..R {
            for (half, &whole) in whole[r].iter().enumerate() {
                let out = &mut self.gathered[half][row + r];
                let sum = self.columns.add::<S, B>(s, half, &factors[r], (whole, s.load(out)));
                s.store(sum, out);
            }
        }
    }
}

/// Adds the sums over a block of rows to those over the super-block.
#[inline(always)]
fn add<S: Simd, B: SuperBlock, const R: usize>(
    s: S,
    (super_block, columns): (&B, &SuperFactors),
    (block, quads): (usize, &WeightQuads),
    (x, factors): (&[Stretch; R], &[SuperFactor; R]),
    whole: &mut [[S::I; 2]; R],
) {
    let (depth, is_short) = (SUPER / 4 / B::RUNS, S::SHORT_SUMS && B::QUADS > 0);
    const { assert!(B::QUADS == 0 || (SUPER / 4 / B::RUNS).is_multiple_of(B::QUADS), "short sums have one scale each") };
    let step = if is_short { B::QUADS } else { depth };
    for (part, weights) in quads.chunks_exact(step).enumerate() {
        let first = part * step;
        let run = block * B::RUNS / 8 + first / depth;
        let mut sums = [[s.splat_int(0); 2]; R];
        if !is_short {
            for r in 0..R {
                sums[r] = [B::start(s, &factors[r], run); 2];
            }
        }
        for (quad, weights) in weights.iter().enumerate() {
            let (halves, _) = weights.as_chunks::<{ 4 * LANES }>();
            for r in 0..R {
                let x = x[r][block % 2 * 8 + first + quad];
                for half in 0..2 {
                    let (sum, w) = (&mut sums[r][half], &halves[half]);
                    *sum = if is_short { s.dot4_short(*sum, w, x) } else { B::dot(s, *sum, w, x) };
                }
            }
        }
        let scales = super_block.scales(run, columns);
        for r in 0..R {
            for half in 0..2 {
                let (whole, sums, scales) = (&mut whole[r][half], sums[r][half], &scales[half]);
                *whole = match is_short {
                    false => s.int_mul_add(*whole, sums, scales),
                    // A run's start has no room in short sums.
                    true if first.is_multiple_of(depth) => {
                        s.add_short(s.int_mul_add(*whole, B::start(s, &factors[r], run), scales), sums, scales)
                    }
                    true => s.add_short(*whole, sums, scales),
                };
            }
        }
    }
}
