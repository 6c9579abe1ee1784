//! Chooses a row's next token from its logits.
//!
//! In this order: repetition penalty, presence and frequency penalties, bias, bans; log-probabilities are those of the
//! result. Then greedy (ties go to the lowest id), or: temperature, top-k, top-p over what is left and renormalised,
//! min-p, one draw. A draw is a function of (logits, rules, seed, index) alone.
//!
//! The random numbers are a counter-based mix of (seed, index) written out here, because they are part of what a user
//! can reproduce: a random-number crate may change its streams between versions, these twelve lines do not.

use std::cmp::Ordering;

use pointsman_sched::execute::{Sample, Sampled};
use pointsman_sched::request::{Sampling, TokenLogprobs};

use crate::backend::cpu::{Isa, LANES, Lanes, softmax};

/// Below this a temperature means greedy: dividing by it would overflow.
const MIN_TEMPERATURE: f32 = 1e-5;

/// One row's logits and scratch memory.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// The rules of this step.
    pub(crate) rule: Option<Sample>,
    /// The choice; `None` when no logit is finite.
    pub(crate) chosen: Option<Sampled>,
    isa: Isa,
    vocab: usize,
    /// Padded with -inf.
    logits: Vec<Lanes>,
    weights: Vec<Lanes>,
    /// Occurrences in prompt and in output, by token; zero between calls.
    seen: Vec<[u32; 2]>,
    candidates: Vec<u32>,
}

impl Sampler {
    pub(crate) fn allocate(vocab: usize, isa: Isa) -> Self {
        let padded = vocab.div_ceil(LANES);
        Self {
            rule: None,
            chosen: None,
            isa,
            vocab,
            logits: vec![[f32::NEG_INFINITY; LANES]; padded],
            weights: vec![[0.0; LANES]; padded],
            seen: vec![[0; 2]; vocab],
            candidates: Vec::with_capacity(vocab),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        2 * size_of_val(self.logits.as_slice()) + size_of_val(self.seen.as_slice()) + size_of::<u32>() * self.vocab
    }

    /// Takes the row's logits.
    pub(crate) fn fill<'a>(&mut self, logits: impl Iterator<Item = &'a Lanes>) {
        for (to, from) in self.logits.iter_mut().zip(logits) {
            *to = *from;
        }
        self.logits.as_flattened_mut()[self.vocab..].fill(f32::NEG_INFINITY);
    }

    /// Applies the rules. `history` is the plan's.
    pub(crate) fn choose(&mut self, history: &[u32]) {
        self.chosen = None;
        let Some(rule) = self.rule.take() else { return };
        let history = &history[rule.history.start as usize..rule.history.end as usize];
        self.adjust(&rule, history);
        let max = softmax::largest(self.isa, &self.logits);
        if max.is_finite() {
            let sampling = &*rule.sampling;
            let token = if sampling.temperature < MIN_TEMPERATURE {
                self.position_of(max)
            } else {
                self.draw(sampling, max, uniform(sampling.seed, rule.index))
            };
            let logprobs = sampling.logprobs.map(|n| Box::new(self.logprobs(token, max, usize::from(n))));
            self.chosen = Some(Sampled { token, logprobs });
        }
        self.rule = Some(rule);
    }

    fn logit(&self, token: u32) -> f32 {
        self.logits.as_flattened()[token as usize]
    }

    /// The first token with this logit.
    fn position_of(&self, logit: f32) -> u32 {
        let found = self.logits.as_flattened().iter().position(|&x| x == logit);
        found.and_then(|token| u32::try_from(token).ok()).unwrap_or(0)
    }

    /// Penalties, bias and bans.
    fn adjust(&mut self, rule: &Sample, history: &[u32]) {
        let sampling = &*rule.sampling;
        let logits = &mut self.logits.as_flattened_mut()[..self.vocab];
        if sampling.needs_history() {
            for (i, &token) in history.iter().enumerate() {
                if let Some(seen) = self.seen.get_mut(token as usize) {
                    seen[usize::from(i >= rule.history_prompt as usize)] += 1;
                }
            }
            for &token in history {
                let Some(seen) = self.seen.get_mut(token as usize) else { continue };
                // The first visit resets the counts, so that a token is penalised once.
                let [in_prompt, in_output] = std::mem::take(seen);
                if in_prompt + in_output > 0 {
                    let logit = &mut logits[token as usize];
                    *logit = penalised(*logit, sampling, in_output);
                }
            }
        }
        for &(token, bias) in &sampling.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for &token in rule.banned.as_deref().unwrap_or_default() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Draws with the uniform number `u`.
    fn draw(&mut self, sampling: &Sampling, max: f32, u: f64) -> u32 {
        softmax::exponentials(self.isa, &self.logits, max, 1.0 / sampling.temperature, &mut self.weights);
        let (logits, weights) = (self.logits.as_flattened(), self.weights.as_flattened());
        let weight = |token: u32| f64::from(weights[token as usize]);
        let best_first = |a: &u32, b: &u32| by_logit(logits, *a, *b);

        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0..self.vocab as u32).filter(|&token| logits[token as usize] > f32::NEG_INFINITY));
        let k = sampling.top_k as usize;
        if k > 0 && k < candidates.len() {
            candidates.select_nth_unstable_by(k - 1, best_first);
            candidates.truncate(k);
            candidates.sort_unstable_by(best_first);
        }
        if sampling.top_p < 1.0 {
            keep_top_p(candidates, f64::from(sampling.top_p), weight, best_first);
        }
        if sampling.min_p > 0.0 {
            // The largest weight is e^0.
            candidates.retain(|&token| weight(token) >= f64::from(sampling.min_p) || logits[token as usize] == max);
        }
        let total: f64 = candidates.iter().map(|&token| weight(token)).sum();
        let mut left = u * total;
        for &token in candidates.iter() {
            left -= weight(token);
            if left < 0.0 {
                return token;
            }
        }
        // Rounding may leave a crumb: it belongs to the last candidate, of which there is always one.
        candidates.last().copied().unwrap_or_default()
    }

    fn logprobs(&mut self, token: u32, max: f32, n: usize) -> TokenLogprobs {
        let sum = softmax::exponentials(self.isa, &self.logits, max, 1.0, &mut self.weights);
        let log_sum = f64::from(sum).ln();
        let logprob = |logit: f32| (f64::from(logit) - f64::from(max) - log_sum) as f32;
        let logits = self.logits.as_flattened();
        let mut top: Vec<u32> = Vec::with_capacity(n + 1);
        for candidate in (0..self.vocab as u32).filter(|&token| logits[token as usize] > f32::NEG_INFINITY) {
            let full = top.len() == n;
            if n == 0 || full && logits[candidate as usize] <= logits[top[n - 1] as usize] {
                continue;
            }
            let at = top.partition_point(|&other| by_logit(logits, other, candidate) == Ordering::Less);
            top.insert(at, candidate);
            top.truncate(n);
        }
        let top = top.into_iter().map(|token| (token, logprob(self.logit(token)))).collect();
        TokenLogprobs { chosen: logprob(self.logit(token)), top }
    }
}

fn penalised(logit: f32, sampling: &Sampling, in_output: u32) -> f32 {
    let penalty = sampling.repetition_penalty;
    let logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
    let present = if in_output > 0 { sampling.presence_penalty } else { 0.0 };
    logit - present - in_output as f32 * sampling.frequency_penalty
}

/// Largest logit first, ties by id: a total order.
fn by_logit(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// Cuts the candidates to the smallest set with a share of at least `p`, best first. Sorts only as far as needed.
fn keep_top_p(
    candidates: &mut Vec<u32>,
    p: f64,
    weight: impl Fn(u32) -> f64,
    best_first: impl Fn(&u32, &u32) -> Ordering,
) {
    let target = p * candidates.iter().map(|&token| weight(token)).sum::<f64>();
    let mut sorted = 64;
    loop {
        sorted = sorted.min(candidates.len());
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted, &best_first);
        }
        candidates[..sorted].sort_unstable_by(&best_first);
        let mut sum = 0.0;
        let enough = candidates[..sorted].iter().position(|&token| {
            sum += weight(token);
            sum >= target
        });
        match enough {
            Some(last) => return candidates.truncate(last + 1),
            None if sorted == candidates.len() => return,
            None => sorted *= 8,
        }
    }
}

/// A number in [0, 1) from a seed and a counter: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), twice.
fn uniform(seed: u64, index: u32) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |x: u64| {
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let stream = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(stream.wrapping_add(GOLDEN.wrapping_mul(u64::from(index) + 1)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
