//! Plans that break the seam's promises are refused before anything is computed, and impossible sizes at the start.

use std::sync::Arc;

use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, KvPlan, Precision};
use pointsman_sched::execute::{ExecuteError, Executor, Score, StepOutput, StepPlan};
use pointsman_sched::ids::BlockId;
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::NoEdits;
use safetensors::Dtype;

use crate::common::{Sequence, Step, blocks, config, engine, model, spec};

#[test]
fn malformed_plans_are_named() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 1);
    let mut engine = engine(&model, &ComputePool::start(1).unwrap());
    type Break = fn(&mut StepPlan);
    let cases: [(Break, &str); 22] = [
        (|plan| plan.tokens[1] = 203, "a token outside the vocabulary"),
        (|plan| plan.blocks[0] = BlockId(64), "a block outside the pool"),
        (|plan| plan.rows[0].tokens.start = 1, "token ranges that leave gaps or are empty"),
        (|plan| plan.rows[1].tokens = 3..3, "token ranges that leave gaps or are empty"),
        (|plan| plan.rows[1].tokens.end = 99, "a token range beyond the tokens"),
        (|plan| plan.tokens.push(1), "tokens that belong to no row"),
        (|plan| plan.rows[1].blocks.end = 99, "a block range beyond the blocks"),
        (|plan| plan.rows[0].position = 254, "a position beyond the context"),
        (|plan| plan.rows[0].position = 14, "a position without a block"),
        (|plan| plan.rows[0].sample.as_mut().unwrap().history = 0..1, "a history range beyond the history"),
        (|plan| plan.rows[0].sample.as_mut().unwrap().history_prompt = 1, "more prompt than history"),
        (|plan| plan.rows = vec![plan.rows[0].clone(); 41], "more rows than max_rows"),
        (|plan| plan.tokens = vec![0; 257], "more tokens than max_step_tokens"),
        (|plan| plan.rows[0].drafts = 40, "more tokens to choose than max_rows"),
        (|plan| plan.rows[0].drafts = 3, "drafts without a token to choose before them"),
        (|plan| (plan.rows[0].drafts, plan.rows[0].sample) = (1, None), "drafts without a token to choose before them"),
        (
            |plan| {
                plan.history.push(1);
                plan.rows[0].drafts = 1;
                plan.rows[0].sample.as_mut().unwrap().history = 0..1;
            },
            "a history range beyond the history",
        ),
        (|plan| plan.scored[0] = 203, "a token to score outside the vocabulary"),
        (|plan| plan.scores[0].next = 0..2, "tokens to score that leave gaps or are missing"),
        (|plan| plan.scores[0].after = 1..1, "tokens to score after other tokens than the step has"),
        (|plan| plan.scores[0].after = 5..6, "tokens to score after other tokens than the step has"),
        (|plan| plan.scored.push(1), "tokens to score that nobody asks about"),
    ];
    let greedy = Arc::new(Sampling::default());
    let sequence = |n: usize, block: u32| Sequence { tokens: vec![7; n], computed: 0, blocks: blocks([block]) };
    for (change, what) in cases {
        let mut step = Step::default();
        step.push(&sequence(3, 0), 3, &greedy).push(&sequence(2, 1), 2, &greedy);
        step.plan.scored.push(7);
        step.plan.scores.push(Score { after: 1..2, next: 0..1, top: 0 });
        assert_eq!(step.run(&mut engine).len(), 2);
        change(&mut step.plan);
        let mut out = StepOutput::default();
        assert_eq!(engine.execute(&step.plan, &mut NoEdits, &mut out), Err(ExecuteError::Malformed { what }));
        assert!(out.sampled.is_empty());
    }
}

#[test]
fn an_empty_plan_and_a_plan_that_samples_nothing_are_fine() {
    let model = model(&spec(), Dtype::F16, Precision::Q8_0, 1);
    let mut engine = engine(&model, &ComputePool::start(1).unwrap());
    assert!(Step::default().run(&mut engine).is_empty());
    let sequence = Sequence { tokens: vec![7; 20], computed: 0, blocks: blocks([3, 2]) };
    assert!(Step::default().push(&sequence, 19, &Arc::default()).run(&mut engine).is_empty());
}

#[test]
fn impossible_sizes_are_refused() {
    let model = model(&spec(), Dtype::F16, Precision::F16, 1);
    let good = config(&model);
    for (config, expect) in [
        (EngineConfig { block_tokens: 24, ..good }, "block_tokens is 24; it must be a multiple of 16"),
        (EngineConfig { n_blocks: 0, ..good }, "n_blocks is 0; it must be at least 1"),
        (EngineConfig { context_tokens: 257, ..good }, "context_tokens is 257, the model was made for 256"),
    ] {
        let error = CpuEngine::new(Arc::clone(&model), ComputePool::start(1).unwrap(), config).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}

#[test]
fn blocks_are_counted_in_bytes() {
    let plan = KvPlan::for_memory(&spec(), 32, 1_000_000);
    // Keys and values, four bytes, three layers, two heads of 32.
    assert_eq!(plan.block_bytes, 2 * 4 * 3 * 64 * 32);
    assert_eq!((plan.n_blocks, plan.block_tokens), (20, 32));
    assert!(plan.bytes() <= 1_000_000);
}
