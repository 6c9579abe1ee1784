//! Causal attention over the pages: the query heads of one key head together, one row at a time.
//!
//! A row sees its window's positions up to its own in a fixed order: each score is one chain over the head's width; the weights'
//! sum keeps a lane per position modulo 16; each output is one chain over the positions. Nothing
//! depends on the chunk a row came in, on other rows, or on where the pages lie. No flash-style running maximum: with all
//! scores of a row at hand (4 bytes a position) it would only add roundings that depend on block boundaries.

use std::ops::Range;

use pointsman_sched::ids::BlockId;

use super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use super::kv::{KvPool, Strided};
use super::math;

/// Slabs or panels of all heads of a group at once, where there are 32 registers: a chain waits four cycles per step, and what is
/// loaded should serve many.
const TOGETHER: usize = 4;

/// One token of the step: where it stands and where its sequence's pages are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub(super) position: u32,
    /// Range in the plan's block tables.
    pub(super) blocks: (u32, u32),
}

impl Token {
    /// The block table of its sequence.
    #[inline(always)]
    pub(super) fn blocks_in<'a>(&self, blocks: &'a [BlockId]) -> &'a [BlockId] {
        &blocks[self.blocks.0 as usize..self.blocks.1 as usize]
    }
}

/// What all heads of a layer share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention<'a> {
    pub(super) isa: Isa,
    pub(super) kv: &'a KvPool,
    pub(super) layer: usize,
    pub(super) tokens: &'a [Token],
    pub(super) blocks: &'a [BlockId],
    /// Queries, panel-major: `[heads * head_dim / 16][stride(tokens)][16]`.
    pub(super) q: &'a [Lanes],
    pub(super) head_dim: usize,
    /// Query heads per key head.
    pub(super) group: usize,
    /// What a product of query and key is multiplied by.
    pub(super) scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub(super) cap: Option<f32>,
    /// Positions that a token sees, itself included.
    pub(super) window: Option<usize>,
}

impl Attention<'_> {
    /// Computes query heads `first ..` for all tokens, as many as `out` holds. `scores` has, for each of them, a lane for
    /// every position of the longest sequence.
    pub(super) fn heads(&self, first: usize, scores: &mut [Lanes], out: &mut [Lanes]) {
        self.isa.run(Heads { shared: self, first, scores, out });
    }

    /// Positions that a row sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.tokens[row].position as usize + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }

    /// Whether nobody before this row has read its pages.
    #[inline(always)]
    fn is_first(&self, row: usize) -> bool {
        row == 0 || self.tokens[row - 1].blocks != self.tokens[row].blocks
    }

    /// Vectors of one head's output.
    fn unit(&self) -> usize {
        self.head_dim / LANES * stride(self.tokens.len())
    }
}

struct Heads<'a> {
    shared: &'a Attention<'a>,
    first: usize,
    scores: &'a mut [Lanes],
    out: &'a mut [Lanes],
}

/// `G` query heads that share a key head: a key or value is read once for all of them.
struct Group<'a, const G: usize> {
    shared: &'a Attention<'a>,
    first: usize,
    scores: [&'a mut [Lanes]; G],
    out: &'a mut [Lanes],
}

impl Kernel for Heads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shared, first, scores, out } = self;
        let (unit, group) = (shared.unit(), shared.group);
        let n = out.len() / unit;
        let scores_unit = scores.len() / n.max(1);
        let mut at = 0;
        while at < n {
            let together = (group - (first + at) % group).min(n - at);
            let together = if together >= 4 { 4 } else { together.min(2) };
            let scores = &mut scores[at * scores_unit..][..together * scores_unit];
            let out = &mut out[at * unit..][..together * unit];
            let (one, first) = (scores_unit, first + at);
            match together {
                4 => Group::<4> { shared, first, scores: parts(scores, one), out }.run(s),
                2 => Group::<2> { shared, first, scores: parts(scores, one), out }.run(s),
                _ => Group::<1> { shared, first, scores: parts(scores, one), out }.run(s),
            }
            at += together;
        }
    }
}

/// The first `N` parts of `len`.
#[inline(always)]
fn parts<const N: usize>(all: &mut [Lanes], len: usize) -> [&mut [Lanes]; N] {
    let mut parts = all.chunks_exact_mut(len);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

impl<const G: usize> Group<'_, G> {
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for row in 0..self.shared.tokens.len() {
            self.scores_of(s, row);
            let seen = self.shared.seen(row);
            let (first, last) = (seen.start % LANES, (seen.end - 1) % LANES + 1);
            let slabs = slabs(&seen);
            let mut scales = [0.0; G];
            for (scores, scale) in self.scores.iter_mut().zip(&mut scales) {
                *scale = 1.0 / soften(s, &mut scores[slabs.clone()], first, last);
            }
            self.mix(s, row, scales);
        }
    }

    /// Fills `scores` for the slabs that a row sees; lanes after its last are what the page held before.
    #[inline(always)]
    fn scores_of<S: Simd>(&mut self, s: S, row: usize) {
        let slabs = slabs(&self.shared.seen(row));
        let mut slab = slabs.start;
        while S::WIDE && slab + TOGETHER <= slabs.end {
            self.scores_at::<S, TOGETHER>(s, row, slab);
            slab += TOGETHER;
        }
        for slab in slab..slabs.end {
            self.scores_at::<S, 1>(s, row, slab);
        }
    }

    /// The scores of `N` slabs.
    #[inline(always)]
    fn scores_at<S: Simd, const N: usize>(&mut self, s: S, row: usize, first: usize) {
        let Attention { kv, layer, tokens, q, group, scale, cap, .. } = *self.shared;
        let (unit, step) = (self.shared.unit(), stride(tokens.len()));
        let queries: [_; G] =
            std::array::from_fn(|g| Strided { panels: &q[(self.first + g) * unit..], stride: step, row });
        let blocks = tokens[row].blocks_in(self.shared.blocks);
        let pages: [_; N] = std::array::from_fn(|n| kv.slab(blocks, layer, self.first / group, first + n));
        if self.shared.is_first(row) {
            pages.iter().for_each(|page| page.values.iter().for_each(|line| s.prefetch(line)));
        }
        let keys = pages.map(|page| page.keys.as_chunks::<LANES>().0);
        let mut score = [[s.zero(); N]; G];
        for panel in 0..keys[0].len() {
            let (q, keys) = (queries.map(|query| query.panel(panel)), keys.map(|keys| &keys[panel]));
            for i in 0..LANES {
                let keys = keys.map(|keys| s.load(&keys[i]));
                for (score, q) in score.iter_mut().zip(q) {
                    let q = s.splat(q[i]);
                    for (score, key) in score.iter_mut().zip(keys) {
                        *score = s.fma(q, key, *score);
                    }
                }
            }
        }
        let scale = s.splat(scale);
        for (score, out) in score.into_iter().zip(&mut self.scores) {
            for (score, out) in score.into_iter().zip(&mut out[first..]) {
                let score = s.mul(score, scale);
                s.store(cap.map_or(score, |cap| math::cap(s, score, cap)), out);
            }
        }
    }

    /// Writes the weighted sums of the values. Asks for the next sequence's keys.
    #[inline(always)]
    fn mix<S: Simd>(&mut self, s: S, row: usize, scales: [f32; G]) {
        let Attention { kv, layer, tokens, head_dim, group, .. } = *self.shared;
        if row + 1 < tokens.len() && self.shared.is_first(row + 1) {
            let blocks = tokens[row + 1].blocks_in(self.shared.blocks);
            for slab in slabs(&self.shared.seen(row + 1)) {
                kv.slab(blocks, layer, self.first / group, slab).keys.iter().for_each(|line| s.prefetch(line));
            }
        }
        let panels = head_dim / LANES;
        let mut panel = 0;
        while S::WIDE && panel + TOGETHER <= panels {
            self.mix_panels::<S, TOGETHER>(s, (row, panel), scales);
            panel += TOGETHER;
        }
        for panel in panel..panels {
            self.mix_panels::<S, 1>(s, (row, panel), scales);
        }
    }

    /// `P` panels of the weighted sums.
    #[inline(always)]
    fn mix_panels<S: Simd, const P: usize>(&mut self, s: S, (row, first): (usize, usize), scales: [f32; G]) {
        let Attention { kv, layer, tokens, head_dim, group, .. } = *self.shared;
        let (seen, panels) = (self.shared.seen(row), head_dim / LANES);
        let blocks = tokens[row].blocks_in(self.shared.blocks);
        let mut acc = [[s.zero(); P]; G];
        for slab in slabs(&seen) {
            let values = kv.slab(blocks, layer, self.first / group, slab).values;
            let weights: [_; G] = std::array::from_fn(|g| &self.scores[g][slab]);
            // Beyond the last position a page may hold anything, so a zero weight is not enough.
            let n = LANES.min(seen.end - slab * LANES);
            for (i, values) in values.chunks_exact(panels).take(n).enumerate() {
                let Some(values) = values[first..].first_chunk::<P>() else { return };
                let values = std::array::from_fn::<_, P, _>(|p| s.load(&values[p]));
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    let weight = s.splat(weights[i]);
                    for (acc, value) in acc.iter_mut().zip(values) {
                        *acc = s.fma(weight, value, *acc);
                    }
                }
            }
        }
        for (g, (acc, scale)) in acc.into_iter().zip(scales).enumerate() {
            for (panel, sum) in (first..).zip(acc) {
                let at = (g * panels + panel) * stride(tokens.len()) + row;
                s.store(s.mul(sum, s.splat(scale)), &mut self.out[at]);
            }
        }
    }
}

/// Vectors of sixteen positions that hold these.
#[inline(always)]
fn slabs(positions: &Range<usize>) -> Range<usize> {
    positions.start / LANES..positions.end.div_ceil(LANES)
}

/// Turns scores into weights relative to the largest, and returns their sum. They begin at lane `first` of the first vector
/// and end before lane `last` of the last.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut [Lanes], first: usize, last: usize) -> f32 {
    let end = scores.len() - 1;
    scores[0][..first].fill(f32::NEG_INFINITY);
    scores[end][last..].fill(f32::NEG_INFINITY);
    let mut largest = s.splat(f32::NEG_INFINITY);
    for score in scores.iter() {
        largest = s.max(s.load(score), largest);
    }
    let largest = s.splat(s.max_lane(largest));
    for score in scores.iter_mut() {
        let weight = math::exp(s, s.sub(s.load(score), largest));
        s.store(weight, score);
    }
    scores[0][..first].fill(0.0);
    scores[end][last..].fill(0.0);
    let mut total = s.zero();
    for score in scores.iter() {
        total = s.add(total, s.load(score));
    }
    s.sum(total)
}
