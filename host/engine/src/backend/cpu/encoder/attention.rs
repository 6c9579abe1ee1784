//! Attention both ways: every row of a sequence sees all of its rows, a head at a time.
//!
//! Keys are turned once per sequence and head, so that sixteen scores are computed at once without adding lanes together.
//! Four rows share each key and value that is read. Every score is one chain over the head's width and every output one
//! over the positions, whatever the other rows.

use std::ops::Range;

use super::super::isa::{Isa, Kernel, LANES, Lanes, Simd, stride};
use super::super::math;

/// Rows that share what is read.
const ROWS: usize = 4;

/// What all heads of a layer share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention<'a> {
    pub(super) isa: Isa,
    /// Queries, keys and values, panel-major: `[3 * heads * head_dim / 16][stride(rows)][16]`.
    pub(super) qkv: &'a [Lanes],
    /// Rows of each sequence.
    pub(super) sequences: &'a [Range<usize>],
    pub(super) rows: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

/// Vectors that a head needs beside its output.
pub(super) fn scratch(head_dim: usize, max_tokens: usize) -> usize {
    (head_dim + ROWS) * max_tokens.div_ceil(LANES)
}

impl Attention<'_> {
    /// Computes heads `first ..`, as many as `out` holds.
    pub(super) fn heads_from(&self, first: usize, scratch: &mut [Lanes], out: &mut [Lanes]) {
        let unit = scratch.len() / (out.len() / self.unit()).max(1);
        for (i, (out, scratch)) in out.chunks_exact_mut(self.unit()).zip(scratch.chunks_exact_mut(unit)).enumerate() {
            let part = |part: usize| &self.qkv[(part * self.heads + first + i) * self.unit()..][..self.unit()];
            self.isa.run(Head { shared: self, q: part(0), k: part(1), v: part(2), scratch, out });
        }
    }

    /// Vectors of one head of one of q, k, v and the output.
    pub(super) fn unit(&self) -> usize {
        self.head_dim / LANES * stride(self.rows)
    }
}

struct Head<'a> {
    shared: &'a Attention<'a>,
    q: &'a [Lanes],
    k: &'a [Lanes],
    v: &'a [Lanes],
    scratch: &'a mut [Lanes],
    out: &'a mut [Lanes],
}

impl Kernel for Head<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { shared, q, k, v, scratch, out } = self;
        let step = stride(shared.rows);
        for rows in shared.sequences {
            let slabs = rows.len().div_ceil(LANES);
            let (keys, weights) = scratch.split_at_mut(shared.head_dim * slabs);
            turn(&k[rows.start..], step, rows.len(), keys);
            let sequence = Sequence { q, keys, v, rows: rows.clone(), step, head_dim: shared.head_dim };
            let whole = rows.len() / ROWS * ROWS;
            for row in (0..whole).step_by(ROWS) {
                sequence.attend::<S, ROWS>(s, row, &mut weights[..ROWS * slabs], out);
            }
            for row in whole..rows.len() {
                sequence.attend::<S, 1>(s, row, &mut weights[..slabs], out);
            }
        }
    }
}

/// Writes keys as `[slab][head_dim][16 positions]`; positions beyond the last are zero.
#[inline(always)]
fn turn(k: &[Lanes], step: usize, n: usize, keys: &mut [Lanes]) {
    let slabs = n.div_ceil(LANES);
    let head_dim = keys.len() / slabs;
    for (slab, keys) in keys.chunks_exact_mut(head_dim).enumerate() {
        for (d, key) in keys.iter_mut().enumerate() {
            let panel = &k[d / LANES * step..];
            let at = |lane: usize| if slab * LANES + lane < n { panel[slab * LANES + lane][d % LANES] } else { 0.0 };
            *key = std::array::from_fn(at);
        }
    }
}

/// One head's view of one sequence.
struct Sequence<'a> {
    q: &'a [Lanes],
    keys: &'a [Lanes],
    v: &'a [Lanes],
    rows: Range<usize>,
    step: usize,
    head_dim: usize,
}

impl Sequence<'_> {
    /// Computes `R` rows from `row` of the sequence on.
    #[inline(always)]
    fn attend<S: Simd, const R: usize>(&self, s: S, row: usize, weights: &mut [Lanes], out: &mut [Lanes]) {
        let (slabs, first) = (weights.len() / R, self.rows.start + row);
        self.scores::<S, R>(s, first, weights);
        let mut scales = [0.0; R];
        for (weights, scale) in weights.chunks_exact_mut(slabs).zip(&mut scales) {
            *scale = 1.0 / soften(s, weights, self.rows.len());
        }
        for panel in 0..self.head_dim / LANES {
            let values = &self.v[panel * self.step..][self.rows.clone()];
            let mut sums = [s.zero(); R];
            for (i, value) in values.iter().enumerate() {
                let value = s.load(value);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = s.fma(s.splat(weights[r * slabs + i / LANES][i % LANES]), value, *sum);
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                s.store(s.mul(sum, s.splat(scales[r])), &mut out[panel * self.step + first + r]);
            }
        }
    }

    #[inline(always)]
    fn scores<S: Simd, const R: usize>(&self, s: S, first: usize, weights: &mut [Lanes]) {
        let slabs = weights.len() / R;
        let scale = s.splat(1.0 / (self.head_dim as f32).sqrt());
        for (slab, keys) in self.keys.chunks_exact(self.head_dim).enumerate() {
            let mut sums = [s.zero(); R];
            for (panel, keys) in keys.as_chunks::<LANES>().0.iter().enumerate() {
                let q = &self.q[panel * self.step + first..][..R];
                for (i, key) in keys.iter().enumerate() {
                    let key = s.load(key);
                    for (sum, q) in sums.iter_mut().zip(q) {
                        *sum = s.fma(s.splat(q[i]), key, *sum);
                    }
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                s.store(s.mul(sum, scale), &mut weights[r * slabs + slab]);
            }
        }
    }
}

/// Turns the scores of `n` positions into weights relative to the largest, and returns their sum.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut [Lanes], n: usize) -> f32 {
    let (last, used) = (scores.len() - 1, n - (scores.len() - 1) * LANES);
    scores[last][used..].fill(f32::NEG_INFINITY);
    let mut largest = s.splat(f32::NEG_INFINITY);
    for score in scores.iter() {
        largest = s.max(s.load(score), largest);
    }
    let largest = s.splat(s.max_lane(largest));
    for score in scores.iter_mut() {
        s.store(math::exp(s, s.sub(s.load(score), largest)), score);
    }
    scores[last][used..].fill(0.0);
    let mut total = s.zero();
    for score in scores.iter() {
        total = s.add(total, s.load(score));
    }
    s.sum(total)
}
