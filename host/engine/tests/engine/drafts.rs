//! Drafts, end to end: what is chosen after a draft is what is chosen there one by one, log-probabilities to the bit, whether
//! the drafts beside it are right or wrong; and a model that drafts for itself is always right.

use std::ops::Range;
use std::sync::{Arc, mpsc};

use pointsman_engine::{ComputePool, CpuEngine, Model, Precision};
use pointsman_sched::batch::NativeBatch;
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::draft::model::{DraftModel, DraftTerms};
use pointsman_sched::execute::{Executor, Sampled, StepOutput};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::publish::PrefixSketch;
use pointsman_sched::request::{Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::sampler::NoEdits;
use pointsman_sched::scheduler::{Counters, Scheduler};
use safetensors::Dtype;

use crate::common::{Rng, Sequence, Step, blocks, engine, model, spec};

const N_NEW: usize = 24;

/// A text under way.
struct Text {
    sequence: Sequence,
    n_prompt: usize,
    sampling: Arc<Sampling>,
    /// Tokens that may not come before this many have.
    banned: (Arc<[u32]>, usize),
    said: Vec<Sampled>,
}

impl Text {
    fn new(prompt: Vec<u32>, pages: Range<u32>, sampling: &Arc<Sampling>) -> Self {
        let n_prompt = prompt.len();
        let sequence = Sequence { tokens: prompt, computed: 0, blocks: blocks(pages) };
        let banned = (Arc::from([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144]), 9);
        Self { sequence, n_prompt, sampling: Arc::clone(sampling), banned, said: Vec::new() }
    }

    /// Adds what is known and not computed, and then the drafts.
    fn push(&self, step: &mut Step, drafts: &[u32]) {
        let Sequence { tokens, computed, .. } = &self.sequence;
        step.push(&self.sequence, tokens.len() - computed, &self.sampling);
        let at = |len: usize| u32::try_from(len).unwrap();
        let (plan, needed) = (&mut step.plan, self.sampling.needs_history());
        plan.tokens.extend(drafts);
        let history = plan.history.len();
        plan.history.extend(tokens.iter().filter(|_| needed));
        let history = at(history)..at(plan.history.len());
        plan.history.extend(drafts.iter().filter(|_| needed));
        let row = plan.rows.last_mut().unwrap();
        row.tokens.end += at(drafts.len());
        row.drafts = at(drafts.len());
        let sample = row.sample.as_mut().unwrap();
        sample.index = at(self.said.len());
        sample.history_prompt = if needed { at(self.n_prompt) } else { 0 };
        sample.history = history;
        let (banned, until) = &self.banned;
        sample.banned = (self.said.len() < *until).then(|| Arc::clone(banned));
    }

    /// Drafts that it may have: what is banned is banned after all of them, or after none.
    fn most(&self) -> usize {
        let (until, n_said) = (self.banned.1, self.said.len());
        if n_said < until { until - n_said - 1 } else { usize::MAX }
    }

    /// Takes what was chosen as far as it follows from drafts that came true.
    fn take(&mut self, sampled: &Sampled, after: &[Sampled], drafts: &[u32]) {
        self.sequence.computed = self.sequence.tokens.len();
        let mut next = sampled;
        let mut rest = after.iter().zip(drafts);
        loop {
            self.sequence.tokens.push(next.token);
            self.said.push(next.clone());
            match rest.next() {
                Some((after, draft)) if *draft == next.token => next = after,
                _ => return,
            }
            self.sequence.computed += 1;
        }
    }
}

/// Computes texts together, each with the drafts that `guess` has for it, until all have come to their length.
fn run(engine: &mut CpuEngine, texts: &mut [Text], mut guess: impl FnMut(usize, &Text) -> Vec<u32>) {
    let mut out = StepOutput::default();
    while texts.iter().any(|text| text.said.len() < N_NEW) {
        let mut step = Step::default();
        let drafts: Vec<_> = texts.iter().enumerate().map(|(i, text)| guess(i, text)).collect();
        texts.iter().zip(&drafts).for_each(|(text, drafts)| text.push(&mut step, drafts));
        engine.execute(&step.plan, &mut NoEdits, &mut out).unwrap();
        let mut after = &out.after_drafts[..];
        for ((text, drafts), sampled) in texts.iter_mut().zip(&drafts).zip(&out.sampled) {
            let (own, others) = after.split_at(drafts.len());
            text.take(sampled, own, drafts);
            after = others;
        }
        assert!(after.is_empty());
    }
}

/// Tokens and bits of log-probabilities, one after the other.
fn bits(said: &[Sampled]) -> Vec<u32> {
    let bits = |sampled: &Sampled| {
        let logprobs = sampled.logprobs.as_ref().unwrap();
        let top = logprobs.top.iter().flat_map(|(token, logprob)| [*token, logprob.to_bits()]);
        [sampled.token, logprobs.chosen.to_bits()].into_iter().chain(top).collect::<Vec<_>>()
    };
    said[..N_NEW].iter().flat_map(bits).collect()
}

/// Rules of all kinds.
fn samplings(seed: u64) -> [Arc<Sampling>; 4] {
    let greedy = Sampling { logprobs: Some(3), seed, ..Sampling::default() };
    [
        greedy.clone(),
        Sampling { temperature: 0.8, ..greedy.clone() },
        Sampling { temperature: 1.3, top_p: 0.9, top_k: 40, min_p: 0.01, ..greedy.clone() },
        Sampling { temperature: 0.7, repetition_penalty: 1.2, presence_penalty: 0.4, frequency_penalty: 0.3, ..greedy },
    ]
    .map(Arc::new)
}

#[test]
fn a_token_after_a_draft_is_the_token_that_comes_there() {
    for (dtype, precision) in [(Dtype::F16, Precision::F16), (Dtype::F16, Precision::Q8_0)] {
        let model = model(&spec(), dtype, precision, 11);
        let vocab = model.spec().vocab;
        let [mut alone, mut engine] = [1, 2].map(|n| engine(&model, &ComputePool::start(n).unwrap()));
        let (mut n_right, mut n_wrong) = (0, 0);
        for seed in 0..12 {
            let mut rng = Rng(seed);
            let rules = samplings(seed);
            let prompts = rules.each_ref().map(|_| rng.below(60) as usize + 1).map(|n| rng.tokens(n, vocab));
            let text = |i: usize| Text::new(prompts[i].clone(), 8 * i as u32..8 * i as u32 + 8, &rules[i]);
            // One by one, alone.
            let expect: Vec<Text> = (0..rules.len())
                .map(|i| {
                    let mut only = [text(i)];
                    run(&mut alone, &mut only, |_, _| Vec::new());
                    let [only] = only;
                    only
                })
                .collect();
            // Together, with drafts that are right up to a random place.
            let mut texts: Vec<Text> = (0..rules.len()).map(text).collect();
            run(&mut engine, &mut texts, |i, text| {
                let known = &expect[i].said[text.said.len().min(N_NEW)..];
                let n = (rng.below(9) as usize).min(known.len()).min(text.most());
                let mut drafts: Vec<u32> = known[..n].iter().map(|sampled| sampled.token).collect();
                n_right += n;
                if n > 0 && rng.below(2) == 0 {
                    let wrong = rng.below(n as u64) as usize;
                    drafts[wrong] = rng.below(vocab as u64) as u32;
                    n_wrong += 1;
                }
                drafts
            });
            for (i, (text, expect)) in texts.iter().zip(&expect).enumerate() {
                assert_eq!(bits(&text.said), bits(&expect.said), "{precision:?}, seed {seed}, rules {i}");
            }
        }
        assert!(n_right > 500 && n_wrong > 100, "{n_right} {n_wrong}");
    }
}

/// Remembers the tokens of a request.
#[derive(Debug)]
struct Listener(mpsc::Sender<u32>);

impl TokenSink for Listener {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        match event {
            SinkEvent::Token { token, .. } if self.0.send(token).is_err() => SinkState::Closed,
            _ => SinkState::Open,
        }
    }
}

const TERMS: DraftTerms = DraftTerms {
    block_tokens: 16,
    n_blocks: 64,
    max_rows: 40,
    step_tokens: 256,
    context_tokens: 256,
    vocabulary: u32::MAX,
    least_percent: 50,
};

/// Three texts by a scheduler, with so many drafts of a model that is the same: what they say, and the steps.
fn by_itself(model: &Arc<Model>, rule: &Sampling, draft_tokens: u32) -> (Vec<Vec<u32>>, u32, Counters) {
    let config = Config {
        block_tokens: TERMS.block_tokens,
        n_blocks: TERMS.n_blocks,
        max_running: TERMS.max_rows,
        step_tokens: TERMS.step_tokens,
        max_waiting: 8,
        prefill_chunk: 32,
        starvation_us: 1_000_000,
        context_tokens: TERMS.context_tokens,
    };
    let pool = ComputePool::start(2).unwrap();
    let mut scheduler =
        Scheduler::new(config, 1, Arc::default(), Arc::new(PrefixSketch::new(config.n_blocks))).unwrap();
    scheduler.draft_with(DraftModel::new(Box::new(engine(model, &pool)), TERMS));
    let (mut engine, mut out, mut rng) = (engine(model, &pool), StepOutput::default(), Rng(3));
    let ears: Vec<_> = (0..3)
        .map(|i| {
            let (sink, ear) = mpsc::channel();
            let prompt = rng.tokens(7 + 25 * i as usize, model.spec().vocab);
            let sampling = Arc::new(Sampling { seed: i, ..rule.clone() });
            let drafted = Request { draft_tokens, sampling, sink: Box::new(Listener(sink)), ..request(i, prompt) };
            scheduler.submit(drafted, 0).map_err(|(_, failure)| failure).unwrap();
            ear
        })
        .collect();
    let mut n_steps = 0;
    while !scheduler.is_idle() {
        scheduler.propose(TERMS.max_rows, |_| true);
        let plan = scheduler.schedule(n_steps.into(), &mut NativeBatch, &mut |_| ()).unwrap();
        engine.execute(plan, &mut NoEdits, &mut out).unwrap();
        scheduler.complete(n_steps.into(), &mut out, &mut |_| ());
        n_steps += 1;
    }
    (ears.iter().map(|ear| ear.try_iter().collect()).collect(), n_steps, scheduler.take_counters())
}

fn request(id: u64, prompt: Vec<u32>) -> Request {
    Request {
        id: RequestId(id + 1),
        tenant: 0,
        tenant_name: "".into(),
        session: 0,
        priority: Priority::Normal,
        arrived: 0,
        deadline: 0,
        block_hashes: chain_hashes(&prompt, TERMS.block_tokens).into(),
        prompt: prompt.into(),
        max_new_tokens: 40,
        min_new_tokens: 5,
        stop_tokens: Arc::from([7]),
        sampling: Arc::default(),
        attributes: Arc::default(),
        transient: false,
        draft_tokens: 0,
        draft_method: DraftMethod::Model,
        fork_of: None,
        mask: None,
        router_generation: 0,
        sink: Box::new(Listener(mpsc::channel().0)),
    }
}

#[test]
fn all_drafts_of_a_model_for_itself_come_true() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 11);
    for rule in samplings(0) {
        let (expect, alone, _) = by_itself(&model, &rule, 0);
        let (found, n_steps, counters) = by_itself(&model, &rule, 4);
        assert_eq!(found, expect, "{rule:?}");
        assert_eq!(counters.model_accepted_tokens, counters.model_draft_tokens, "{rule:?}");
        assert!(counters.model_draft_tokens > 40 && 2 * n_steps < alone, "{counters:?} {n_steps} {alone} {rule:?}");
    }
}
