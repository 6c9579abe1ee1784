//! Causal attention of one query head over the pages, one row at a time.
//!
//! A row sees positions 0 up to its own in a fixed order: each score is one chain over the head's width; the weights'
//! sum keeps a lane per position modulo 16; each output is four chains, by position modulo 4, joined at the end. Nothing
//! depends on the chunk a row came in, on other rows, or on where the pages lie. No flash-style running maximum: with all
//! scores of a row at hand (4 bytes a position) it would only add roundings that depend on block boundaries.

use pointsman_sched::ids::BlockId;

use super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use super::kv::{KvPool, Strided};
use super::math;

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
}

impl Attention<'_> {
    /// Computes one query head for all tokens. `scores` has a lane for every position of the longest sequence.
    pub(super) fn head(&self, head: usize, scores: &mut [Lanes], out: &mut [Lanes]) {
        self.isa.run(Head { shared: self, head, scores, out });
    }
}

struct Head<'a> {
    shared: &'a Attention<'a>,
    head: usize,
    scores: &'a mut [Lanes],
    out: &'a mut [Lanes],
}

impl Kernel for Head<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for row in 0..self.shared.tokens.len() {
            let total = self.scores_of(s, row);
            self.mix(s, row, 1.0 / total);
        }
    }
}

impl Head<'_> {
    /// Fills `scores` with the weights of a row's positions, not yet divided by their sum, which is returned.
    #[inline(always)]
    fn scores_of<S: Simd>(&mut self, s: S, row: usize) -> f32 {
        let Attention { kv, layer, tokens, q, head_dim, group, .. } = *self.shared;
        let n = tokens[row].position as usize + 1;
        let n_slabs = n.div_ceil(LANES);
        let panels = head_dim / LANES;
        let step = stride(tokens.len());
        let query = Strided { panels: &q[self.head * panels * step..], stride: step, row };
        let scale = s.splat(1.0 / (head_dim as f32).sqrt());
        let blocks = tokens[row].blocks_in(self.shared.blocks);
        for slab in 0..n_slabs {
            let keys = kv.slab(blocks, layer, self.head / group, slab).keys;
            let mut score = s.zero();
            for (panel, keys) in keys.as_chunks::<LANES>().0.iter().enumerate() {
                for (&q, key) in query.panel(panel).iter().zip(keys) {
                    score = s.fma(s.splat(q), s.load(key), score);
                }
            }
            s.store(s.mul(score, scale), &mut self.scores[slab]);
        }
        // Lanes after the last position hold whatever the page held before.
        for lane in &mut self.scores[n_slabs - 1][(n - 1) % LANES + 1..] {
            *lane = f32::NEG_INFINITY;
        }
        self.soften(s, n)
    }

    /// Turns scores into weights relative to the largest.
    #[inline(always)]
    fn soften<S: Simd>(&mut self, s: S, n: usize) -> f32 {
        let scores = &mut self.scores[..n.div_ceil(LANES)];
        let mut largest = s.splat(f32::NEG_INFINITY);
        for score in scores.iter() {
            largest = s.max(s.load(score), largest);
        }
        let largest = s.splat(s.max_lane(largest));
        for score in scores.iter_mut() {
            let weight = math::exp(s, s.sub(s.load(score), largest));
            s.store(weight, score);
        }
        let last = scores.len() - 1;
        for lane in &mut scores[last][(n - 1) % LANES + 1..] {
            *lane = 0.0;
        }
        let mut total = s.zero();
        for score in scores.iter() {
            total = s.add(total, s.load(score));
        }
        s.sum(total)
    }

    /// Writes the weighted sum of the values.
    #[inline(always)]
    fn mix<S: Simd>(&mut self, s: S, row: usize, scale: f32) {
        let Attention { kv, layer, tokens, head_dim, group, .. } = *self.shared;
        let n = tokens[row].position as usize + 1;
        let panels = head_dim / LANES;
        let blocks = tokens[row].blocks_in(self.shared.blocks);
        for panel in 0..panels {
            let mut acc = [s.zero(); 4];
            for slab in 0..n.div_ceil(LANES) {
                let values = kv.slab(blocks, layer, self.head / group, slab).values;
                let here = LANES.min(n - slab * LANES);
                let weights = &self.scores[slab];
                for first in (0..here).step_by(4) {
                    for i in 0..4 {
                        // Beyond the last position a page may hold anything, so a zero weight is not enough.
                        if first + i < here {
                            let value = s.load(&values[(first + i) * panels + panel]);
                            acc[i] = s.fma(s.splat(weights[first + i]), value, acc[i]);
                        }
                    }
                }
            }
            let sum = s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3]));
            s.store(s.mul(sum, s.splat(scale)), &mut self.out[panel * stride(tokens.len()) + row]);
        }
    }
}
