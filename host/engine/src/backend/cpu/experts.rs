//! Sparse experts: each token goes through the few feed-forward halves that its router prefers.
//!
//! Expert by expert, over the rows that chose it, so that a weight is read once per step. A row's sum has its experts in the
//! order of their numbers, whatever rows are beside it: that keeps batch invariance.

use super::aligned::Aligned;
use super::gemm::{Epilogue, Input, matmul};
use super::isa::{Isa, LANES, Lanes, stride};
use super::matrix::{Matrix, PANEL};
use super::model::Gated;
use super::pool::ComputePool;
use super::quant::Quantised;
use super::{rows, softmax};
use crate::spec::{Experts, ModelSpec};

/// Memory for the largest step.
#[derive(Debug)]
pub(super) struct ExpertWork {
    router: Aligned<f32, LANES>,
    /// One row's router logits, and what they become.
    logits: Vec<Lanes>,
    weights: Vec<Lanes>,
    /// By expert: the rows that chose it, and with what weight.
    picks: Vec<Vec<(u32, f32)>>,
    gathered: Aligned<f32, LANES>,
    result: Aligned<f32, LANES>,
}

/// A layer's experts, and where their products go.
pub(super) struct Sparse<'a> {
    pub(super) router: &'a Matrix,
    pub(super) experts: &'a [Gated],
    pub(super) choice: &'a Experts,
    pub(super) gated: Epilogue,
    pub(super) ffn: &'a mut [Lanes],
    pub(super) quantised: &'a mut Quantised,
    pub(super) rows: usize,
}

impl ExpertWork {
    pub(super) fn allocate(spec: &ModelSpec, experts: &Experts, tokens: usize) -> Self {
        let zeros = |n: usize| Aligned::filled(0.0, n / LANES * stride(tokens));
        let lanes = vec![[f32::NEG_INFINITY; LANES]; experts.count.div_ceil(LANES)];
        Self {
            router: zeros(experts.count.next_multiple_of(PANEL)),
            logits: lanes.clone(),
            weights: lanes,
            picks: vec![Vec::with_capacity(tokens); experts.count],
            gathered: zeros(spec.hidden),
            result: zeros(spec.hidden),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let Self { router, logits, weights, picks, gathered, result } = self;
        let lanes = router.len() + gathered.len() + result.len() + logits.len() + weights.len();
        let picks: usize = picks.iter().map(|picks| picks.capacity() * size_of::<(u32, f32)>()).sum();
        lanes * size_of::<Lanes>() + picks
    }

    /// Adds to `hidden` what the experts make of `x`.
    pub(super) fn run(&mut self, pool: &ComputePool, sparse: Sparse<'_>, x: &[Lanes], hidden: &mut [Lanes]) {
        let Sparse { router, experts, choice, gated, ffn, quantised, rows } = sparse;
        matmul(pool, router, Input { x, rows, quantised }, &mut self.router, Epilogue::Store);
        self.choose(pool.isa(), choice, rows);
        let Self { picks, gathered, result, .. } = self;
        for (expert, picks) in experts.iter().zip(picks).filter(|(_, picks)| !picks.is_empty()) {
            let n = picks.len();
            let vectors = expert.down.n / LANES;
            let x = &x[..vectors * stride(rows)];
            let (gathered, result) = (&mut gathered[..vectors * stride(n)], &mut result[..vectors * stride(n)]);
            rows::gather(x, rows, picks.iter().map(|&(row, _)| row as usize), gathered);
            matmul(pool, &expert.gate_up, Input { x: gathered, rows: n, quantised }, ffn, gated);
            matmul(pool, &expert.down, Input { x: ffn, rows: n, quantised }, result, Epilogue::Store);
            rows::scatter_add(pool.isa(), result, picks, &mut hidden[..vectors * stride(rows)], rows);
        }
    }

    /// Fills `picks` from the router's logits. Of equals, the lower number is preferred.
    fn choose(&mut self, isa: Isa, choice: &Experts, rows: usize) {
        let Self { router, logits, weights, picks, .. } = self;
        picks.iter_mut().for_each(Vec::clear);
        for row in 0..rows {
            for (panel, logits) in logits.iter_mut().enumerate() {
                *logits = router[panel * stride(rows) + row];
            }
            logits.as_flattened_mut()[choice.count..].fill(f32::NEG_INFINITY);
            let max = softmax::largest(isa, logits);
            let total = softmax::exponentials(isa, logits, max, 1.0, weights);
            let weights = &mut weights.as_flattened_mut()[..choice.count];
            let mut chosen = 0.0;
            for _ in 0..choice.per_token {
                let best = |best: usize, i: usize| if weights[i] > weights[best] { i } else { best };
                let expert = (1..choice.count).fold(0, best);
                picks[expert].push((row as u32, weights[expert]));
                chosen += weights[expert];
                weights[expert] = f32::NEG_INFINITY;
            }
            let scale = 1.0 / if choice.normalised { chosen } else { total };
            let of_row = picks.iter_mut().filter_map(|picks| picks.last_mut());
            of_row.filter(|pick| pick.0 == row as u32).for_each(|pick| pick.1 *= scale);
        }
    }
}
