//! How likely a prompt is: the log-probabilities of its tokens are those of the logits that choose after each of its beginnings,
//! to the bit, whatever the chunks, the threads, and the number of logits that are kept at once.

use std::sync::Arc;

use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Precision};
use pointsman_sched::execute::{Executor, StepOutput};
use pointsman_sched::request::{Sampling, TokenLogprobs};
use pointsman_sched::sampler::NoEdits;
use safetensors::Dtype;

use crate::common::{Rng, Sequence, Step, blocks, config, engine, model, spec};
use crate::families::each_golden;

/// Scores a prompt in chunks, and what is chosen after it.
fn score(engine: &mut CpuEngine, prompt: &[u32], chunk: usize, top: u8) -> (Vec<TokenLogprobs>, u32) {
    let mut sequence = Sequence { tokens: prompt.to_vec(), computed: 0, blocks: blocks(0..16) };
    let (mut scores, mut out) = (Vec::new(), StepOutput::default());
    loop {
        let n = chunk.min(prompt.len() - sequence.computed);
        let mut step = Step::default();
        step.push(&sequence, n, &Arc::default()).score(&sequence, n, top);
        engine.execute(&step.plan, &mut NoEdits, &mut out).unwrap();
        assert_eq!(out.scores.len(), step.plan.scored.len());
        scores.append(&mut out.scores);
        sequence.computed += n;
        if let [chosen] = &out.sampled[..] {
            return (scores, chosen.token);
        }
    }
}

fn bits(scores: &[TokenLogprobs]) -> Vec<u32> {
    let top = |score: &TokenLogprobs| score.top.iter().flat_map(|(token, x)| [*token, x.to_bits()]).collect::<Vec<_>>();
    scores.iter().flat_map(|score| [vec![score.chosen.to_bits()], top(score)].concat()).collect()
}

/// Log-probabilities of a row of logits.
fn logprobs(logits: &[f32]) -> Vec<f64> {
    let log_sum = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    logits.iter().map(|&x| f64::from(x) - log_sum).collect()
}

#[test]
fn a_prompt_is_as_likely_as_the_logits_say() {
    for (dtype, precision) in [(Dtype::F16, Precision::F16), (Dtype::F16, Precision::Q8_0)] {
        let model = model(&spec(), dtype, precision, 5);
        let prompt = Rng(3).tokens(70, model.spec().vocab);
        let mut alone = engine(&model, &ComputePool::start(1).unwrap());
        let (scores, chosen) = score(&mut alone, &prompt, 1_000, 3);
        assert_eq!(scores.len(), prompt.len() - 1);
        for (i, score) in scores.iter().enumerate() {
            let sequence = Sequence { tokens: prompt[..=i].to_vec(), computed: 0, blocks: blocks(16..32) };
            Step::default().push(&sequence, i + 1, &Arc::default()).run(&mut alone);
            let expect = logprobs(&alone.logits(0));
            let near = |x: f32, token: u32| (f64::from(x) - expect[token as usize]).abs() < 1e-5;
            assert!(near(score.chosen, prompt[i + 1]), "{precision:?}, token {i}: {score:?}");
            let mut best: Vec<u32> = (0..expect.len() as u32).collect();
            best.sort_by(|a, b| expect[*b as usize].total_cmp(&expect[*a as usize]));
            assert_eq!(score.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), best[..3]);
            assert!(score.top.iter().all(|(token, x)| near(*x, *token)), "{precision:?}, token {i}: {score:?}");
        }
        // Whatever the pieces: of the prompt, of the logits, and of the work.
        for (chunk, max_rows, n_threads) in [(1, 40, 1), (7, 40, 2), (64, 1, 2), (1_000, 3, 1), (1_000, 256, 2)] {
            let config = EngineConfig { max_rows, ..config(&model) };
            let pool = ComputePool::start(n_threads).unwrap();
            let mut engine = CpuEngine::new(Arc::clone(&model), pool, config).unwrap();
            let (again, chosen_again) = score(&mut engine, &prompt, chunk, 3);
            assert!(
                bits(&again) == bits(&scores),
                "{precision:?}, chunks of {chunk}, {max_rows} rows, {n_threads} threads"
            );
            assert_eq!(chosen_again, chosen);
        }
    }
}

#[test]
fn rows_beside_one_that_is_scored_choose_what_they_would() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 5);
    let mut engine = engine(&model, &ComputePool::start(2).unwrap());
    let prompts = [11, 30, 5].map(|n| Rng(n as u64).tokens(n, model.spec().vocab));
    let sampling = Arc::new(Sampling { logprobs: Some(2), ..Sampling::default() });
    let mut outs = [false, true].map(|is_scored| {
        let mut step = Step::default();
        for (first, prompt) in (0..).step_by(8).zip(&prompts) {
            let sequence = Sequence { tokens: prompt.clone(), computed: 0, blocks: blocks(first..first + 8) };
            step.push(&sequence, prompt.len(), &sampling);
            if is_scored && first != 8 {
                step.score(&sequence, prompt.len(), 0);
            }
        }
        let mut out = StepOutput::default();
        engine.execute(&step.plan, &mut NoEdits, &mut out).unwrap();
        out
    });
    assert_eq!(outs[0].sampled, outs[1].sampled);
    let scores = std::mem::take(&mut outs[1].scores);
    let apart = [0, 2].map(|i| score(&mut engine, &prompts[i], 1_000, 0).0).concat();
    assert_eq!((scores.len(), bits(&scores)), (14, bits(&apart)));
}

#[test]
fn each_family_finds_its_golden_text_as_likely_as_transformers_does() {
    each_golden(|name, case, engine| {
        let text = [&case.prompt[..], &case.tokens].concat();
        let (scores, _) = score(engine, &text, 100, 1);
        let n = case.prompt.len();
        for (i, score) in scores.iter().enumerate().skip(n - 1) {
            assert_eq!(score.top[0].0, text[i + 1], "{name}: token {i} was chosen greedily");
            assert_eq!(score.top[0].1, score.chosen);
        }
        let last = text.len() - 2;
        for (i, logits) in [(n - 1, &case.first_logits), (last, &case.last_logits)] {
            let expect = logprobs(logits)[text[i + 1] as usize];
            assert!((f64::from(scores[i].chosen) - expect).abs() < 1e-3, "{name}: {} for {expect}", scores[i].chosen);
        }
    });
}
