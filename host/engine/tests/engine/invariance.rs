//! Batch invariance, end to end: a sequence's tokens and logit bits do not know how it was computed.

use std::sync::Arc;

use pointsman_engine::backend::cpu::Isa;
use pointsman_engine::{ComputePool, CpuEngine, Precision};
use pointsman_sched::ids::RequestId;
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::{Edit, EditSource};
use safetensors::Dtype;

use crate::common::{Outcome, Rng, Sequence, Step, blocks, engine, from_cache, generate, logit_bits, model, spec};

const N_NEW: usize = 6;

/// Generates with random neighbours that come, go and prefill in random chunks.
fn crowded(engine: &mut CpuEngine, prompt: &[u32], seed: u64) -> Outcome {
    let (mut rng, greedy, vocab) = (Rng(seed), Arc::new(Sampling::default()), engine.model().spec().vocab);
    let mut subject =
        Sequence { tokens: prompt.to_vec(), computed: 0, blocks: blocks([40, 3, 17, 9, 21, 8, 1, 30, 44, 5]) };
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    while tokens.len() < N_NEW {
        let mut step = Step::default();
        let mut sampling_before = 0;
        let n_neighbours = rng.below(4);
        let place = rng.below(n_neighbours + 1);
        let left = subject.tokens.len() - subject.computed;
        let chunk = if left == 1 { 1 } else { 1 + rng.below(left as u64) as usize };
        for i in 0..=n_neighbours {
            if i == place {
                step.push(&subject, chunk, &greedy);
                continue;
            }
            let len = 1 + rng.below(48) as usize;
            let first = 50 + 3 * i as u32;
            let other = Sequence { tokens: rng.tokens(len, vocab), computed: 0, blocks: blocks(first..first + 3) };
            let whole = rng.below(2) == 0;
            step.push(&other, if whole { len } else { len.div_ceil(2) }, &greedy);
            let samples = step.plan.rows.last().is_some_and(|row| row.sample.is_some());
            sampling_before += usize::from(i < place && samples);
        }
        let sampled = step.run(engine);
        subject.computed += chunk;
        if chunk == left {
            logits.push(logit_bits(engine, sampling_before));
            tokens.push(sampled[sampling_before]);
            subject.tokens.push(sampled[sampling_before]);
        }
    }
    (tokens, logits)
}

/// Computes, forgets everything but the tokens half way, and recomputes into other pages in one chunk.
fn preempted(engine: &mut CpuEngine, prompt: &[u32]) -> Outcome {
    let (mut tokens, mut logits) = generate(engine, prompt, 7, N_NEW / 2);
    let again: Vec<u32> = prompt.iter().chain(&tokens).copied().collect();
    // Pages full of something else.
    let other = Sequence { tokens: Rng(9).tokens(160, 200), computed: 0, blocks: blocks(0..10) };
    Step::default().push(&other, 160, &Arc::new(Sampling::default())).run(engine);
    let (rest, rest_logits) = generate(engine, &again, 1_000, N_NEW - N_NEW / 2);
    tokens.extend(rest);
    logits.extend(rest_logits);
    (tokens, logits)
}

#[test]
fn a_sequence_does_not_know_how_it_is_computed() {
    let cases = [
        (Dtype::F16, Precision::F16),
        (Dtype::F16, Precision::Q8_0),
        (Dtype::F32, Precision::F16),
        (Dtype::BF16, Precision::F16),
    ];
    for (dtype, precision) in cases {
        let model = model(&spec(), dtype, precision, 11);
        let prompt = Rng(5).tokens(83, model.spec().vocab);
        let expect = generate(&mut engine(&model, &ComputePool::start(1).unwrap()), &prompt, 1_000, N_NEW);
        for isa in Isa::available() {
            // The portable lanes are slow: one round of them.
            let (thread_counts, chunks, n_seeds) = if isa.name() == "portable" {
                (&[2][..], &[7][..], 1)
            } else {
                (&[1, 3][..], &[1, 5, 16, 33, 1_000][..], 4)
            };
            for &n_threads in thread_counts {
                let mut engine = engine(&model, &ComputePool::with_isa(n_threads, isa).unwrap());
                let what = format!("{precision:?} of {dtype:?}, {}, {n_threads} threads", isa.name());
                for &chunk in chunks {
                    assert!(generate(&mut engine, &prompt, chunk, N_NEW) == expect, "chunks of {chunk}: {what}");
                }
                for seed in 0..n_seeds {
                    assert!(crowded(&mut engine, &prompt, seed) == expect, "neighbours {seed}: {what}");
                }
                assert!(preempted(&mut engine, &prompt) == expect, "preempted: {what}");
                assert!(from_cache(&mut engine, &prompt, N_NEW) == expect, "from cache: {what}");
            }
        }
    }
}

/// Edits by row.
struct Masks(Vec<Option<Arc<Edit>>>);

impl EditSource for Masks {
    fn edit(&mut self, request: RequestId) -> Option<Arc<Edit>> {
        self.0[request.0 as usize - 1].clone()
    }
}

#[test]
fn a_masked_row_knows_its_own_mask_and_no_other() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 11);
    let (vocab, n_rows) = (model.spec().vocab, 9);
    for n_threads in [1, 3] {
        let mut engine = engine(&model, &ComputePool::start(n_threads).unwrap());
        for (seed, temperature) in [(1, 0.0), (2, 0.0), (3, 0.9)] {
            let mut rng = Rng(seed);
            let sampling = Arc::new(Sampling { temperature, seed, ..Sampling::default() });
            let rows: Vec<_> = (0..n_rows)
                .map(|i| {
                    let len = 1 + rng.below(40) as usize;
                    let first = 6 * i as u32;
                    let tokens = rng.tokens(len, vocab);
                    let n_allowed = 1 + rng.below(5) as usize;
                    let allowed = rng.tokens(n_allowed, vocab);
                    let edit = (i % 3 > 0).then(|| Arc::new(Edit::allow(allowed.clone(), vocab as u32).unwrap()));
                    (Sequence { tokens, computed: 0, blocks: blocks(first..first + 6) }, edit, allowed)
                })
                .collect();
            let mut alone = |(sequence, edit, _): &(Sequence, Option<Arc<Edit>>, Vec<u32>)| {
                let mut step = Step::default();
                step.push(sequence, sequence.tokens.len(), &sampling);
                step.run_edited(&mut engine, &mut Masks(vec![edit.clone()]))[0]
            };
            let expect: Vec<u32> = rows.iter().map(&mut alone).collect();
            let mut step = Step::default();
            for (sequence, ..) in &rows {
                step.push(sequence, sequence.tokens.len(), &sampling);
            }
            let masks = rows.iter().map(|(_, edit, _)| edit.clone()).collect();
            assert_eq!(step.run_edited(&mut engine, &mut Masks(masks)), expect, "{n_threads} threads, seed {seed}");
            for ((_, edit, allowed), token) in rows.iter().zip(&expect) {
                assert!(edit.is_none() || allowed.contains(token), "{token} is not in {allowed:?}");
            }
        }
    }
}

#[test]
fn engines_share_a_model_and_threads_but_no_pages() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 11);
    let pool = ComputePool::start(2).unwrap();
    let (mut one, mut two) = (engine(&model, &pool), engine(&model, &pool));
    let prompts = [Rng(1).tokens(40, 200), Rng(2).tokens(40, 200)];
    let alone = generate(&mut one, &prompts[0], 8, N_NEW);
    generate(&mut two, &prompts[1], 8, N_NEW);
    assert!(generate(&mut one, &prompts[0], 8, N_NEW) == alone);
    let memory = one.memory();
    assert_eq!((memory.weights, memory.kv), (model.bytes(), 64 * 16 * 3 * 2 * 64 * 4));
    assert!(memory.workspace > 0);
}
