//! Chooses a row's next token from its logits.
//!
//! In this order: repetition penalty, presence and frequency penalties, the request's bias, a sampler policy's edit, bans;
//! log-probabilities are those of the result. A mask that leaves no token is set aside for that token, and bans that would
//! leave none of a mask are too: the operator's mask stands above the client's minimum length. Then greedy (ties go to the lowest id), or: temperature, top-k, top-p over what is left and renormalised,
//! min-p, one draw. A draw is a function of (logits, rules, seed, index) alone.
//!
//! The random numbers are a counter-based mix of (seed, index) written out here, because they are part of what a user
//! can reproduce: a random-number crate may change its streams between versions, these twelve lines do not.

use std::cmp::Ordering;
use std::sync::Arc;

use pointsman_sched::execute::{Sample, Sampled};
use pointsman_sched::request::{Sampling, TokenLogprobs};
use pointsman_sched::sampler::Edit;

use crate::backend::cpu::{Isa, LANES, Lanes, softmax};

/// Below this a temperature means greedy: dividing by it would overflow.
const MIN_TEMPERATURE: f32 = 1e-5;

/// One row's logits and scratch memory.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// The rules of this step.
    pub(crate) rule: Option<Sample>,
    /// What a sampler policy wants of this token.
    pub(crate) edit: Option<Arc<Edit>>,
    /// The choice; `None` when no logit is finite.
    pub(crate) chosen: Option<Sampled>,
    /// How likely a prompt token was, where that was asked.
    pub(crate) scored: Option<TokenLogprobs>,
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
            edit: None,
            chosen: None,
            scored: None,
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
        let is_masked = self.edit.take().is_some_and(|edit| self.apply(&edit));
        self.ban(rule.banned.as_deref().unwrap_or_default(), is_masked);
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

    /// How likely a token is by the row's logits as they are, with so many most likely ones beside it; `None` when no logit is
    /// finite.
    pub(crate) fn score(&mut self, token: u32, top: u8) -> Option<TokenLogprobs> {
        let max = softmax::largest(self.isa, &self.logits);
        max.is_finite().then(|| self.logprobs(token, max, top.into()))
    }

    fn logit(&self, token: u32) -> f32 {
        self.logits.as_flattened()[token as usize]
    }

    /// The first token with this logit.
    fn position_of(&self, logit: f32) -> u32 {
        let found = self.logits.as_flattened().iter().position(|&x| x == logit);
        found.and_then(|token| u32::try_from(token).ok()).unwrap_or(0)
    }

    /// Penalties and bias.
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
    }

    /// Applies an edit; whether it was a mask and holds. One that leaves no finite logit changes nothing.
    fn apply(&mut self, edit: &Edit) -> bool {
        let logits = &mut self.logits.as_flattened_mut()[..self.vocab];
        let logit = |token: u32| logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        match edit {
            Edit::Allow(tokens) => {
                if !tokens.iter().any(|&token| logit(token).is_finite()) {
                    return false;
                }
                // Ascending and each once, so those that exist fit the row.
                let tokens = &tokens[..tokens.partition_point(|&token| (token as usize) < self.vocab)];
                let kept = &mut self.weights.as_flattened_mut()[..tokens.len()];
                for (kept, &token) in kept.iter_mut().zip(tokens) {
                    *kept = logits[token as usize];
                }
                logits.fill(f32::NEG_INFINITY);
                for (kept, &token) in kept.iter().zip(tokens) {
                    logits[token as usize] = *kept;
                }
                true
            }
            Edit::Forbid(tokens) => {
                let spared = |token: u32| logit(token).is_finite() && tokens.binary_search(&token).is_err();
                if !(0..self.vocab as u32).any(spared) {
                    return false;
                }
                for &token in tokens {
                    set(logits, token, f32::NEG_INFINITY);
                }
                true
            }
            Edit::Only(set) => {
                if !(0..).zip(logits.iter()).any(|(token, logit)| set.contains(token) && logit.is_finite()) {
                    return false;
                }
                let outside = (0..).zip(logits.iter_mut()).filter(|(token, _)| !set.contains(*token));
                outside.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                true
            }
            Edit::Bias(biases) => {
                for &(token, bias) in biases {
                    if let Some(logit) = logits.get_mut(token as usize).filter(|logit| logit.is_finite()) {
                        *logit = (*logit + bias).clamp(f32::MIN, f32::MAX);
                    }
                }
                false
            }
        }
    }

    fn ban(&mut self, banned: &[u32], is_masked: bool) {
        let logits = &mut self.logits.as_flattened_mut()[..self.vocab];
        let spared = |(token, logit): (u32, &f32)| logit.is_finite() && !banned.contains(&token);
        if !banned.is_empty() && is_masked && !(0..).zip(logits.iter()).any(spared) {
            return;
        }
        for &token in banned {
            set(logits, token, f32::NEG_INFINITY);
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

fn set(logits: &mut [f32], token: u32, to: f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = to;
    }
}

fn penalised(logit: f32, sampling: &Sampling, in_output: u32) -> f32 {
    let penalty = sampling.repetition_penalty;
    let logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
    let present = if in_output > 0 { sampling.presence_penalty } else { 0.0 };
    // Whatever the penalties, one row's logits stay numbers: a row without any fails the step of all.
    (logit - present - in_output as f32 * sampling.frequency_penalty).clamp(f32::MIN, f32::MAX)
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

#[cfg(test)]
mod tests {
    use pointsman_sched::mask::TokenSet;

    use super::*;

    #[derive(Clone)]
    struct Case<'a> {
        logits: &'a [f32],
        sampling: Sampling,
        index: u32,
        /// Prompt, then output.
        history: [&'a [u32]; 2],
        banned: &'a [u32],
        edit: Option<Edit>,
    }

    fn case(logits: &[f32], sampling: Sampling) -> Case<'_> {
        Case { logits, sampling, index: 0, history: [&[], &[]], banned: &[], edit: None }
    }

    fn sampler(vocab: usize) -> Sampler {
        Sampler::allocate(vocab, Isa::best())
    }

    fn choose(sampler: &mut Sampler, case: &Case<'_>) -> Option<Sampled> {
        let history: Vec<u32> = case.history.concat();
        let mut lanes = vec![[9e9; LANES]; case.logits.len().div_ceil(LANES)];
        lanes.as_flattened_mut()[..case.logits.len()].copy_from_slice(case.logits);
        sampler.fill(lanes.iter());
        sampler.rule = Some(Sample {
            sampling: Arc::new(case.sampling.clone()),
            index: case.index,
            history: 0..history.len() as u32,
            history_prompt: case.history[0].len() as u32,
            banned: (!case.banned.is_empty()).then(|| case.banned.into()),
        });
        sampler.edit = case.edit.clone().map(Arc::new);
        sampler.choose(&history);
        sampler.chosen.take()
    }

    fn token(case: &Case<'_>) -> u32 {
        choose(&mut sampler(case.logits.len()), case).unwrap().token
    }

    #[test]
    fn greedy_follows_the_rules() {
        let plain = Sampling::default;
        let bias = |token, by| Sampling { logit_bias: vec![(token, by)], ..plain() };
        let repetition = Sampling { repetition_penalty: 2.0, ..plain() };
        let presence = Sampling { presence_penalty: 1.5, ..plain() };
        let frequency = Sampling { frequency_penalty: 0.6, ..plain() };
        let up = [1.0, 3.0, 2.0];
        for (case, expect) in [
            (case(&up, plain()), 1),
            (case(&[2.0, 3.0, 3.0], plain()), 1),
            (case(&[-5.0, -3.0, -4.0], plain()), 1),
            (case(&up, bias(2, 1.5)), 2),
            (case(&up, bias(1, -100.0)), 2),
            (case(&up, bias(99, 1e9)), 1),
            (Case { banned: &[1], ..case(&up, plain()) }, 2),
            (Case { banned: &[1, 2, 77], ..case(&up, plain()) }, 0),
            // Repetition counts prompt and output alike, once.
            (Case { history: [&[1], &[]], ..case(&up, repetition.clone()) }, 2),
            (Case { history: [&[], &[1, 1]], ..case(&[1.0, 3.0, 1.4], repetition.clone()) }, 1),
            (Case { history: [&[2], &[]], ..case(&[-4.0, -9.0, -3.0], repetition) }, 0),
            // Presence and frequency count the output alone.
            (Case { history: [&[1], &[]], ..case(&up, presence.clone()) }, 1),
            (Case { history: [&[], &[1]], ..case(&up, presence) }, 2),
            (Case { history: [&[1], &[1]], ..case(&up, frequency.clone()) }, 1),
            (Case { history: [&[], &[1, 1]], ..case(&up, frequency) }, 2),
            (case(&[f32::NAN, 1.0, f32::NEG_INFINITY], plain()), 1),
            (case(&up, Sampling { temperature: 1e-9, ..plain() }), 1),
        ] {
            assert_eq!(token(&case), expect, "{:?} {:?} {:?}", case.logits, case.sampling, case.history);
        }
    }

    #[test]
    fn an_edit_comes_after_the_requests_rules_and_before_the_choice() {
        let plain = Sampling::default;
        let allow = |tokens: &[u32]| Some(Edit::allow(tokens.to_vec(), 100).unwrap());
        let forbid = |tokens: &[u32]| Some(Edit::forbid(tokens.to_vec(), 100).unwrap());
        let bias = |biases: &[(u32, f32)]| Some(Edit::bias(biases.to_vec(), 100).unwrap());
        let only = |bits: u32| Some(Edit::Only(TokenSet::from_words(vec![bits])));
        let biased = Sampling { logit_bias: vec![(0, 50.0)], ..plain() };
        let up = [1.0, 3.0, 2.0, 2.5];
        let hole = [1.0, f32::NAN, f32::NEG_INFINITY, 2.5];
        let (inf, max) = (f32::NEG_INFINITY, f32::MAX);
        for (case, edit, expect) in [
            (case(&up, plain()), allow(&[0, 2]), 2),
            (case(&up, plain()), allow(&[2, 0, 2]), 2),
            (case(&up, biased.clone()), allow(&[1, 2]), 1),
            (case(&up, biased.clone()), allow(&[0, 2]), 0),
            (case(&up, plain()), only(0b0101), 2),
            (case(&up, plain()), only(0b1_0000), 1),
            (Case { banned: &[1], ..case(&up, plain()) }, only(0b0010), 1),
            (case(&up, plain()), forbid(&[1, 3]), 2),
            (case(&up, plain()), forbid(&[]), 1),
            (case(&up, plain()), bias(&[(2, 2.0)]), 2),
            (case(&up, plain()), bias(&[(2, 0.6), (2, 0.6)]), 2),
            (case(&up, plain()), bias(&[(1, -max)]), 3),
            (case(&[max, 1.0], plain()), bias(&[(1, max), (0, max)]), 0),
            // A token that cannot be stays impossible.
            (case(&[1.0, inf], plain()), bias(&[(1, 9.0)]), 0),
            // A mask that leaves nothing is set aside: tokens without a logit, or all of them.
            (case(&hole, plain()), allow(&[1, 2]), 3),
            (case(&hole, plain()), allow(&[1, 0]), 0),
            (case(&hole, plain()), forbid(&[0, 3]), 3),
            (case(&up, plain()), allow(&[50, 99]), 1),
            (case(&up, plain()), forbid(&[0, 1, 2, 3]), 1),
            // Bans hold within a mask, unless they would leave nothing of it.
            (Case { banned: &[1], ..case(&up, plain()) }, allow(&[0, 1]), 0),
            (Case { banned: &[1], ..case(&up, plain()) }, allow(&[1]), 1),
            (Case { banned: &[1, 3], ..case(&up, plain()) }, forbid(&[0, 2]), 1),
            (Case { banned: &[1], ..case(&up, plain()) }, bias(&[(1, 100.0)]), 3),
            // Penalties are the request's own, whatever the mask.
            (
                Case { history: [&[], &[3]], ..case(&up, Sampling { presence_penalty: 1.5, ..plain() }) },
                allow(&[2, 3]),
                2,
            ),
        ] {
            let case = Case { edit, ..case };
            assert_eq!(token(&case), expect, "{:?} {:?} banned {:?}", case.logits, case.edit, case.banned);
            // Drawing obeys the same rules: with one candidate it is the greedy choice.
            let drawn = Sampling { temperature: 1.5, top_k: 1, ..case.sampling.clone() };
            assert_eq!(token(&Case { sampling: drawn, ..case.clone() }), expect, "drawn, {:?}", case.edit);
        }
        // A sampler forgets the edit of the row before.
        let mut sampler = sampler(4);
        let masked = Case { edit: allow(&[0]), ..case(&up, plain()) };
        assert_eq!(choose(&mut sampler, &masked).unwrap().token, 0);
        assert_eq!(choose(&mut sampler, &case(&up, plain())).unwrap().token, 1);
    }

    #[test]
    fn logprobs_are_those_of_the_masked_distribution() {
        let sampling = Sampling { logprobs: Some(3), ..Sampling::default() };
        let edit = Some(Edit::allow(vec![0, 2], 3).unwrap());
        let found = choose(&mut sampler(3), &Case { edit, ..case(&[1.0, 3.0, 2.0], sampling) }).unwrap();
        let logprobs = found.logprobs.unwrap();
        assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 0]);
        let expect = 2.0 - (1f64.exp() + 2f64.exp()).ln();
        assert!((f64::from(logprobs.chosen) - expect).abs() < 1e-6);
    }

    #[test]
    fn no_finite_logit_is_no_choice() {
        for logits in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY; 3]] {
            assert_eq!(choose(&mut sampler(3), &case(&logits, Sampling::default())), None);
        }
        assert_eq!(choose(&mut sampler(1), &Case { banned: &[0], ..case(&[1.0], Sampling::default()) }), None);
    }

    #[test]
    fn a_sampler_forgets_the_row_before() {
        let mut sampler = sampler(3);
        let penalties = Sampling { frequency_penalty: 5.0, ..Sampling::default() };
        let with_history = Case { history: [&[], &[1, 1, 2]], ..case(&[1.0, 3.0, 2.0], penalties.clone()) };
        assert_eq!(choose(&mut sampler, &with_history).unwrap().token, 0);
        assert_eq!(choose(&mut sampler, &case(&[1.0, 3.0, 2.0], penalties)).unwrap().token, 1);
    }

    #[test]
    fn logprobs_are_natural_after_the_rules_and_before_temperature() {
        let sampling = Sampling {
            logprobs: Some(2),
            temperature: 0.5,
            top_k: 1,
            logit_bias: vec![(3, 1.0)],
            ..Sampling::default()
        };
        let logits = [1.0, 2.0, 0.5, 2.0, 7.0];
        let banned = Case { banned: &[4], ..case(&logits, sampling) };
        let found = choose(&mut sampler(5), &banned).unwrap();
        let log_sum = [1.0, 2.0, 0.5, 3.0].iter().map(|x: &f64| x.exp()).sum::<f64>().ln();
        let found_logprobs = found.logprobs.unwrap();
        assert_eq!(found.token, 3);
        assert!((f64::from(found_logprobs.chosen) - (3.0 - log_sum)).abs() < 1e-6);
        let ids: Vec<u32> = found_logprobs.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [3, 1]);
        assert!((f64::from(found_logprobs.top[1].1) - (2.0 - log_sum)).abs() < 1e-6);
        // Ties by id; more asked for than there is.
        let many = Sampling { logprobs: Some(20), ..Sampling::default() };
        let top = choose(&mut sampler(3), &case(&[1.0, 2.0, 1.0], many)).unwrap().logprobs.unwrap().top;
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 0, 2]);
    }

    #[test]
    fn a_draw_is_a_function_of_seed_and_index() {
        // Recorded once: a change here changes what users can reproduce.
        let draws: Vec<u32> = (0..4).map(|i| (uniform(42, i) * 1e6) as u32).collect();
        assert_eq!(draws, RECORDED);
        assert_ne!(uniform(42, 0), uniform(43, 0));
    }

    const RECORDED: [u32; 4] = [343_291, 955_746, 486_349, 67_357];

    /// Counts of `n` draws, one per index, against expected shares: Pearson's chi-square.
    fn chi_square(logits: &[f32], sampling: &Sampling, edit: Option<&Edit>, shares: &[f64]) -> f64 {
        let n = 20_000;
        let mut sampler = sampler(logits.len());
        let mut counts = vec![0u32; logits.len()];
        for index in 0..n {
            let drawn =
                choose(&mut sampler, &Case { index, edit: edit.cloned(), ..case(logits, sampling.clone()) }).unwrap();
            counts[drawn.token as usize] += 1;
        }
        let total: f64 = shares.iter().sum();
        counts.iter().zip(shares).fold(0.0, |sum, (&count, share)| {
            let expect = share / total * f64::from(n);
            assert!(expect > 0.0 || count == 0, "{sampling:?}: a token outside the set was drawn: {counts:?}");
            if expect > 0.0 { sum + (f64::from(count) - expect).powi(2) / expect } else { sum }
        })
    }

    #[test]
    fn draws_follow_the_distribution() {
        // Probabilities 0.1, 0.4, 0.2, 0.25, 0.05 at temperature 1.
        let p = [0.1f64, 0.4, 0.2, 0.25, 0.05];
        let logits = p.map(|p| (p.ln() + 3.0) as f32);
        let at = |temperature: f32| Sampling { temperature, seed: 7, ..Sampling::default() };
        let square = p.map(|p| p * p);
        for (sampling, shares) in [
            (at(1.0), p),
            (at(0.5), square),
            (Sampling { top_k: 2, ..at(1.0) }, [0.0, 0.4, 0.0, 0.25, 0.0]),
            (Sampling { top_k: 9, ..at(1.0) }, p),
            (Sampling { top_p: 0.8, ..at(1.0) }, [0.0, 0.4, 0.2, 0.25, 0.0]),
            (Sampling { top_p: 0.01, ..at(1.0) }, [0.0, 1.0, 0.0, 0.0, 0.0]),
            (Sampling { top_p: 0.0, ..at(1.0) }, [0.0, 1.0, 0.0, 0.0, 0.0]),
            (Sampling { min_p: 0.3, ..at(1.0) }, [0.0, 0.4, 0.2, 0.25, 0.0]),
            (Sampling { min_p: 1.0, ..at(1.0) }, [0.0, 1.0, 0.0, 0.0, 0.0]),
            // Top-p counts shares of what top-k left: 0.4 of 0.65 is enough for 0.6.
            (Sampling { top_k: 2, top_p: 0.6, ..at(1.0) }, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ] {
            // 99.9 % quantile for four degrees of freedom.
            assert!(chi_square(&logits, &sampling, None, &shares) < 18.5, "{sampling:?}");
        }
        let without_the_best = Edit::forbid(vec![1], 5).unwrap();
        let twice = Edit::bias(vec![(0, 2f32.ln())], 5).unwrap();
        for (edit, sampling, shares) in [
            (&without_the_best, at(1.0), [0.1, 0.0, 0.2, 0.25, 0.05]),
            // Top-k and top-p count what the mask left.
            (&without_the_best, Sampling { top_k: 2, ..at(1.0) }, [0.0, 0.0, 0.2, 0.25, 0.0]),
            (&without_the_best, Sampling { top_p: 0.7, ..at(1.0) }, [0.0, 0.0, 0.2, 0.25, 0.0]),
            (&twice, at(1.0), [0.2, 0.4, 0.2, 0.25, 0.05]),
        ] {
            assert!(chi_square(&logits, &sampling, Some(edit), &shares) < 18.5, "{edit:?} {sampling:?}");
        }
    }

    #[test]
    fn top_p_sorts_as_far_as_it_must() {
        // 1,000 tokens of nearly equal weight: the set is larger than the first sorted run.
        let logits: Vec<f32> = (0..1_000).map(|i| (i % 100) as f32 * 1e-4).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 0.5, ..Sampling::default() };
        let mut sampler = sampler(1_000);
        let mut lowest = u32::MAX;
        for index in 0..2_000 {
            let drawn = choose(&mut sampler, &Case { index, ..case(&logits, sampling.clone()) }).unwrap().token;
            lowest = lowest.min(drawn % 100);
        }
        assert!((50..55).contains(&lowest), "the better half: {lowest}");
    }
}
