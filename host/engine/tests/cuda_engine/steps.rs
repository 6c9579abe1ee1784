//! Steps on both engines.

use std::sync::Arc;

use pointsman_engine::cuda::cases::{self, Call, Case, CaseRunner, Given, Placement};
use pointsman_engine::cuda::{
    CudaEngine, CudaError, CudaOptions, Element, Form, LibraryUse, Parity, ParityCase, Source, put_on_grid,
};
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::execute::{ExecuteError, Executor, InHalves, Row, Sample, Sampled, StepOutput, StepPlan};
use pointsman_sched::ids::RequestId;
use pointsman_sched::mask::TokenSet;
use pointsman_sched::request::Sampling;
use pointsman_sched::sampler::{Edit, EditSource, NoEdits};
use safetensors::Dtype;

use crate::common::{Rng, Sequence, Step, blocks, serialize, tensors, with_heads};
use crate::device::ShimDevice;

/// Small, with everything that has a shape of its own: grouped heads, a vocabulary and a width of odd sizes, a head of its own.
pub(crate) fn spec(head_dim: usize, tied: bool) -> ModelSpec {
    ModelSpec { layers: 2, context: 208, tied, ..with_heads(6, 2, head_dim) }
}

pub(crate) const CONFIG: EngineConfig =
    EngineConfig { n_blocks: 65, block_tokens: 16, max_step_tokens: 96, max_rows: 12, context_tokens: 208 };

/// Random weights of this type.
pub(crate) fn weights_of(spec: &ModelSpec, element: Element) -> Weights {
    let dtype = match element {
        Element::F32 => Dtype::F32,
        Element::F16 => Dtype::F16,
        Element::Bf16 => Dtype::BF16,
    };
    let weights = Weights::from_bytes(serialize(&tensors(spec, dtype, 7), dtype)).unwrap();
    assert_eq!(weights.stored(), Some(element));
    weights
}

/// The same model on both backends; `None` without a C++ compiler.
fn engines(spec: &ModelSpec, element: Element, graphs: bool) -> Option<(CpuEngine, CudaEngine)> {
    let weights = weights_of(spec, element);
    engines_of(spec, &weights, (element.into(), Precision::F16), graphs)
}

/// The same weights on both, on each in a form of its own.
fn engines_of(
    spec: &ModelSpec,
    weights: &Weights,
    (form, on_cpu): (Form, Precision),
    graphs: bool,
) -> Option<(CpuEngine, CudaEngine)> {
    let options = CudaOptions { form, graphs, library: LibraryUse::Faster };
    Some(engines_on(ShimDevice::start()?, spec, weights, options, on_cpu))
}

/// The same, on this device.
pub(crate) fn engines_on(
    device: ShimDevice,
    spec: &ModelSpec,
    weights: &Weights,
    options: CudaOptions,
    on_cpu: Precision,
) -> (CpuEngine, CudaEngine) {
    let (model, mut seen) = ((spec.clone(), Source::Files(weights)), 0);
    let mut see = |done| {
        seen = done;
        true
    };
    let cuda = CudaEngine::load(Box::new(device), model, CONFIG, options, &mut see).unwrap();
    let used = cuda.memory();
    assert!(seen > 0 && seen <= used.weights, "progress ends at {seen} of {}", used.weights);
    let model = Arc::new(Model::load(spec.clone(), weights, on_cpu).unwrap());
    let cpu = CpuEngine::new(model, ComputePool::start(1).unwrap(), CONFIG).unwrap();
    (cpu, cuda)
}

pub(crate) fn execute(engine: &mut dyn Executor, plan: &StepPlan, edits: &mut dyn EditSource) -> Vec<Sampled> {
    let mut out = StepOutput::default();
    engine.execute(plan, edits, &mut out).unwrap();
    out.sampled
}

pub(crate) fn tokens(sampled: &[Sampled]) -> Vec<u32> {
    sampled.iter().map(|sampled| sampled.token).collect()
}

/// Largest difference of the logits of the last step's row `i`, relative to the largest of them.
pub(crate) fn difference(cpu: &CpuEngine, cuda: &mut CudaEngine, i: usize) -> f32 {
    let (expect, found) = (cpu.logits(i), cuda.logits(i).unwrap());
    assert_eq!(expect.len(), found.len());
    let largest = expect.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    expect.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Runs five sequences that arrive one after the other, prefilled in chunks between decodes; the first is long enough to be cut. Gives
/// the worst difference.
fn serve(cpu: &mut CpuEngine, cuda: &mut CudaEngine, same_tokens: bool) -> f32 {
    let greedy = Arc::new(Sampling::default());
    let mut rng = Rng(5);
    let prompts = [150, 1, 16, 17, 40];
    let sequence = |(i, len): (usize, usize)| Sequence {
        tokens: rng.tokens(len, 203),
        computed: 0,
        // Pages of different sequences alternate, and none is in order; tables are as wide as they can be.
        blocks: blocks((0..13).rev().map(|page| (page * 5 + i) as u32)),
    };
    let mut sequences: Vec<Sequence> = prompts.into_iter().enumerate().map(sequence).collect();
    let mut worst = 0.0f32;
    for round in 0..9 {
        let mut step = Step::default();
        let mut sampling = Vec::new();
        let active = sequences.len().min(round + 1);
        let mut room = 40;
        for (i, sequence) in sequences[..active].iter_mut().enumerate() {
            let left = sequence.tokens.len() - sequence.computed;
            let n = left.min(33).min(room);
            if n == 0 {
                continue;
            }
            step.push(sequence, n, &greedy);
            sequence.computed += n;
            room -= n;
            if n == left {
                sampling.push(i);
            }
        }
        let expect = tokens(&execute(cpu, &step.plan, &mut NoEdits));
        let found = tokens(&execute(cuda, &step.plan, &mut NoEdits));
        assert_eq!(found.len(), sampling.len());
        for (row, &i) in sampling.iter().enumerate() {
            worst = worst.max(difference(cpu, cuda, row));
            sequences[i].tokens.push(expect[row]);
        }
        if same_tokens {
            assert_eq!(found, expect, "round {round}");
        }
    }
    worst
}

#[test]
fn f32_steps_choose_the_tokens_of_the_cpu() {
    for (spec, graphs) in [(spec(64, true), true), (spec(128, false), false), (spec(32, false), true)] {
        let Some((mut cpu, mut cuda)) = engines(&spec, Element::F32, graphs) else { return };
        let worst = serve(&mut cpu, &mut cuda, true);
        assert!(worst < 1e-4, "{spec:?}: logits differ by {worst}");
    }
}

#[test]
fn what_cannot_be_captured_is_launched() {
    let Some(mut device) = ShimDevice::start() else { return };
    device.captures = 3;
    let spec = spec(64, true);
    let options = CudaOptions { form: Element::F32.into(), graphs: true, library: LibraryUse::Faster };
    let (mut cpu, mut cuda) = engines_on(device, &spec, &weights_of(&spec, Element::F32), options, Precision::F16);
    let note = cuda.take_note().unwrap_or_default();
    assert!(note.contains("launched one by one") && note.contains("as asked"), "{note}");
    assert!(!cuda.has_graphs());
    let worst = serve(&mut cpu, &mut cuda, true);
    assert!(worst < 1e-4, "logits differ by {worst}");
}

#[test]
fn sixteen_bits_stay_close_to_the_cpu() {
    for (element, head_dim) in [(Element::Bf16, 64), (Element::F16, 64), (Element::Bf16, 32), (Element::F16, 128)] {
        let Some((mut cpu, mut cuda)) = engines(&spec(head_dim, true), element, true) else { return };
        let worst = serve(&mut cpu, &mut cuda, false);
        assert!(worst < 2e-2, "{element}, heads of {head_dim}: logits differ by {worst}");
    }
}

/// A model whose matrices hold nothing but numbers of a precision, so that quantising it loses nothing and the CPU can be asked
/// for the same product.
fn on_grid(spec: &ModelSpec, precision: Precision) -> Weights {
    let mut tensors = tensors(spec, Dtype::F32, 7);
    for tensor in tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
        put_on_grid(precision, tensor.shape[1], &mut tensor.values);
    }
    Weights::from_bytes(serialize(&tensors, Dtype::F32)).unwrap()
}

#[test]
fn weights_in_8_bits_choose_the_tokens_of_the_same_numbers() {
    for (precision, tied) in [(Precision::Q8_0, true), (Precision::Fp8, false)] {
        let (spec, form) = (spec(64, tied), Form { element: Element::F32, precision });
        let weights = on_grid(&spec, precision);
        let Some((mut cpu, mut cuda)) = engines_of(&spec, &weights, (form, Precision::F16), tied) else { return };
        let worst = serve(&mut cpu, &mut cuda, true);
        assert!(worst < 1e-4, "{form}: logits differ by {worst}");
    }
}

#[test]
fn weights_in_8_bits_stay_close_in_sixteen() {
    let form = |element, precision| Form { element, precision };
    for form in [form(Element::Bf16, Precision::Q8_0), form(Element::F16, Precision::Fp8)] {
        let spec = spec(64, true);
        let weights = on_grid(&spec, form.precision);
        let Some((mut cpu, mut cuda)) = engines_of(&spec, &weights, (form, Precision::F16), true) else { return };
        let worst = serve(&mut cpu, &mut cuda, false);
        assert!(worst < 2e-2, "{form}: logits differ by {worst}");
    }
}

#[test]
fn q8_0_is_close_to_the_cpu_in_q8_0() {
    let spec = spec(64, true);
    let weights = Weights::from_bytes(serialize(&tensors(&spec, Dtype::F32, 7), Dtype::F32)).unwrap();
    let form = Form { element: Element::F32, precision: Precision::Q8_0 };
    let Some((mut cpu, mut cuda)) = engines_of(&spec, &weights, (form, Precision::Q8_0), false) else { return };
    let worst = serve(&mut cpu, &mut cuda, false);
    // The weights are the same. The CPU rounds the activations to 8 bits before each product, too (a step of 1/127 of the largest
    // of 32), and the GPU does not.
    assert!(worst < 3e-2, "logits differ by {worst}");
}

/// An edit for each request by its number.
struct Edits(Vec<Option<Edit>>);

impl EditSource for Edits {
    fn edit(&mut self, request: RequestId) -> Option<Arc<Edit>> {
        self.0[request.0 as usize - 1].clone().map(Arc::new)
    }
}

/// Rules of every kind, one row each, with a history, bans and edits.
fn rules() -> Vec<(Sampling, Vec<u32>, Option<Edit>)> {
    let drawn = Sampling { temperature: 0.9, seed: 11, ..Sampling::default() };
    let allow = Edit::allow(vec![3, 40, 99, 100, 202], 203).unwrap();
    vec![
        (Sampling { logprobs: Some(5), ..Sampling::default() }, vec![], None),
        (drawn.clone(), vec![], None),
        (Sampling { top_k: 3, logprobs: Some(20), ..drawn.clone() }, vec![], None),
        (Sampling { top_p: 0.6, min_p: 0.02, ..drawn.clone() }, vec![1, 2], None),
        (Sampling { repetition_penalty: 1.7, logprobs: Some(0), ..Sampling::default() }, vec![], None),
        (Sampling { presence_penalty: 1.0, frequency_penalty: 0.5, ..drawn.clone() }, vec![], None),
        (Sampling { logit_bias: vec![(7, 9.0), (8, -4.0)], ..drawn.clone() }, vec![], None),
        (drawn.clone(), vec![3, 40], Some(allow.clone())),
        (Sampling { logprobs: Some(3), ..Sampling::default() }, vec![], Some(allow)),
        (drawn.clone(), vec![], Some(Edit::forbid((0..190).collect(), 203).unwrap())),
        (drawn.clone(), vec![], Some(Edit::Only(TokenSet::from_words(vec![0x8000_0100, 0, 6])))),
        (drawn, vec![], Some(Edit::bias(vec![(5, 3.0), (6, -3.0)], 203).unwrap())),
    ]
}

#[test]
fn rules_edits_and_log_probabilities_are_those_of_the_cpu() {
    let Some((mut cpu, mut cuda)) = engines(&spec(64, true), Element::F32, true) else { return };
    let mut rng = Rng(9);
    let mut step = Step::default();
    let rules = rules();
    for (i, (sampling, banned, _)) in rules.iter().enumerate() {
        let tokens = rng.tokens(5, 203);
        let sequence = Sequence { tokens, computed: 0, blocks: blocks([i as u32]) };
        step.push(&sequence, 5, &Arc::new(sampling.clone()));
        let start = step.plan.history.len() as u32;
        step.plan.history.extend([9, 9, 7, 9, 120, 7]);
        let sample = step.plan.rows[i].sample.as_mut().unwrap();
        *sample = Sample {
            index: 4 + i as u32,
            history: start..start + 6,
            history_prompt: 3,
            banned: (!banned.is_empty()).then(|| banned.as_slice().into()),
            ..sample.clone()
        };
    }
    let mut edits = Edits(rules.into_iter().map(|(_, _, edit)| edit).collect());
    // The same rows again as decodes: through the graph, and with scratch memory that has been used.
    for round in 0..3 {
        let expect = execute(&mut cpu, &step.plan, &mut edits);
        let found = execute(&mut cuda, &step.plan, &mut edits);
        assert_eq!(tokens(&found), tokens(&expect), "round {round}");
        for (i, (found, expect)) in found.iter().zip(&expect).enumerate() {
            match (&found.logprobs, &expect.logprobs) {
                (None, None) => {}
                (Some(found), Some(expect)) => {
                    assert!((found.chosen - expect.chosen).abs() < 1e-4, "row {i}: {found:?}, {expect:?}");
                    let ids = |of: &[(u32, f32)]| of.iter().map(|(id, _)| *id).collect::<Vec<_>>();
                    assert_eq!(ids(&found.top), ids(&expect.top), "row {i}");
                    let close = |(a, b): (&(u32, f32), &(u32, f32))| (a.1 - b.1).abs() < 1e-4;
                    assert!(found.top.iter().zip(&expect.top).all(close), "row {i}: {found:?}, {expect:?}");
                }
                _ => panic!("row {i} has log-probabilities on one side"),
            }
        }
        for (i, sampled) in expect.iter().enumerate() {
            let (plan, at) = (&mut step.plan, i as u32);
            if round == 0 {
                plan.rows[i].tokens = at..at + 1;
                plan.rows[i].position = 5;
            } else {
                plan.rows[i].position += 1;
            }
            plan.tokens[i] = sampled.token;
            plan.rows[i].sample.as_mut().unwrap().index += 1;
        }
        step.plan.tokens.truncate(expect.len());
    }
}

/// An engine that launches every kernel by itself, and a step for it.
fn without_graphs(device: ShimDevice) -> (CudaEngine, Step) {
    let spec = spec(64, true);
    let weights = Weights::from_bytes(serialize(&tensors(&spec, Dtype::F32, 7), Dtype::F32)).unwrap();
    let options = CudaOptions { form: Element::F32.into(), graphs: false, library: LibraryUse::Faster };
    let model = (spec, Source::Files(&weights));
    let cuda = CudaEngine::load(Box::new(device), model, CONFIG, options, &mut |_| true).unwrap();
    let sequence = Sequence { tokens: vec![7; 20], computed: 0, blocks: blocks([3, 2]) };
    let mut step = Step::default();
    step.push(&sequence, 20, &Arc::default());
    (cuda, step)
}

#[test]
fn a_lost_device_fails_its_steps_and_says_so() {
    let Some(mut device) = ShimDevice::start() else { return };
    // Enough launches for the start without graphs, and a few more.
    device.fails_after = Some(400);
    let (mut cuda, step) = without_graphs(device);
    let fault = (0..40).find_map(|_| cuda.execute(&step.plan, &mut NoEdits, &mut StepOutput::default()).err());
    let Some(ExecuteError::Lost { what }) = fault else { panic!("{fault:?}") };
    assert!(what.contains("the device is lost") && what.contains("restart"), "{what}");
    let again = cuda.execute(&step.plan, &mut NoEdits, &mut StepOutput::default());
    assert_eq!(again, Err(ExecuteError::Lost { what }));
}

#[test]
fn a_refused_launch_fails_one_step_and_leaves_nothing_under_way() {
    let Some(mut device) = ShimDevice::start() else { return };
    // After the launches of the start, in the middle of the first steps.
    device.refuses = Some(400);
    let (mut cuda, step) = without_graphs(device);
    let mut steps = || cuda.execute(&step.plan, &mut NoEdits, &mut StepOutput::default());
    let outcomes: Vec<bool> = (0..40).map(|_| steps().is_ok()).collect();
    assert_eq!(outcomes.iter().filter(|is_ok| !**is_ok).count(), 1, "{outcomes:?}");
    assert!(!cuda.is_lost() && outcomes[39]);
}

/// A step's plan, and that of a step behind it, of a sequence whose prompt has 20 tokens.
fn two_plans() -> [StepPlan; 2] {
    [(20, vec![]), (21, vec![0])].map(|(n, follows)| {
        let sequence = Sequence { tokens: vec![7; n], computed: if n > 20 { 20 } else { 0 }, blocks: blocks([3, 2]) };
        let mut step = Step::default();
        step.push(&sequence, n - sequence.computed, &Arc::default());
        StepPlan { follows, ..step.plan }
    })
}

#[test]
fn steps_are_begun_behind_one_and_finished_in_order() {
    let Some(device) = ShimDevice::start() else { return };
    let (mut cuda, _) = without_graphs(device);
    let [first, behind] = two_plans();
    let mut out = StepOutput::default();
    let malformed = |what| Err(ExecuteError::Malformed { what });
    assert_eq!(cuda.finish(&first, &mut out), malformed("a step that was not begun"));
    let alone = malformed("a row that follows no token of a step under way");
    assert_eq!(cuda.begin(&behind, &mut NoEdits), alone);
    cuda.begin(&first, &mut NoEdits).unwrap();
    let [_, mut beyond] = two_plans();
    beyond.follows = vec![1];
    assert_eq!(cuda.begin(&beyond, &mut NoEdits), alone);
    cuda.begin(&behind, &mut NoEdits).unwrap();
    assert_eq!(cuda.begin(&behind, &mut NoEdits), malformed("a third step, where two can be under way"));
    cuda.finish(&first, &mut out).unwrap();
    cuda.finish(&behind, &mut out).unwrap();
    assert_eq!(out.sampled.len(), 1);
    assert_eq!(cuda.finish(&behind, &mut out), malformed("a step that was not begun"));
}

#[test]
fn a_step_that_cannot_be_begun_leaves_the_one_before_it() {
    // A launch of a first step, and one of a step behind it: each has some 23.
    let mut refused = Vec::new();
    for at in [400, 423] {
        let Some(mut device) = ShimDevice::start() else { return };
        device.refuses = Some(at);
        let (mut cuda, _) = without_graphs(device);
        let [first, behind] = two_plans();
        let mut out = StepOutput::default();
        for _ in 0..40 {
            let begun = cuda.begin(&first, &mut NoEdits).is_ok();
            let two = begun && cuda.begin(&behind, &mut NoEdits).is_ok();
            refused.extend((!two).then_some(begun));
            for plan in [begun.then_some(&first), two.then_some(&behind)].into_iter().flatten() {
                cuda.finish(plan, &mut out).unwrap();
            }
        }
        assert!(!cuda.is_lost());
    }
    refused.sort_unstable();
    assert_eq!(refused, [false, true], "one of each");
}

#[test]
fn a_load_ends_where_whoever_follows_it_says_no() {
    let Some(device) = ShimDevice::start() else { return };
    let spec = spec(64, true);
    let weights = Weights::from_bytes(serialize(&tensors(&spec, Dtype::F32, 7), Dtype::F32)).unwrap();
    let options = CudaOptions { form: Element::F32.into(), graphs: true, library: LibraryUse::Faster };
    let (model, mut n_told) = ((spec, Source::Files(&weights)), 0);
    let mut say_no = |_| {
        n_told += 1;
        false
    };
    let error = CudaEngine::load(Box::new(device), model, CONFIG, options, &mut say_no).unwrap_err();
    assert!(matches!(error, CudaError::Load(pointsman_engine::LoadError::Stopped)), "{error}");
    assert_eq!(n_told, 1);
}

#[test]
fn models_and_plans_that_the_kernels_do_not_cover_are_refused() {
    let Some(device) = ShimDevice::start() else { return };
    let odd = spec(160, true);
    let weights = Weights::from_bytes(serialize(&tensors(&odd, Dtype::F32, 7), Dtype::F32)).unwrap();
    let options = CudaOptions { form: Element::F32.into(), graphs: true, library: LibraryUse::Faster };
    let error =
        CudaEngine::load(Box::new(device), (odd, Source::Files(&weights)), CONFIG, options, &mut |_| true).unwrap_err();
    assert!(matches!(error, CudaError::Unsupported { .. }), "{error}");
    assert!(
        error.to_string().contains("do not cover heads of this width (160); they cover 32, 64, 96, 128 and 256"),
        "{error}"
    );
    let Some((_, mut cuda)) = engines(&spec(64, true), Element::F32, false) else { return };
    let sequence = Sequence { tokens: vec![7; 20], computed: 0, blocks: blocks([3]) };
    let mut step = Step::default();
    step.push(&sequence, 20, &Arc::default());
    let error = cuda.execute(&step.plan, &mut NoEdits, &mut StepOutput::default());
    assert_eq!(error, Err(ExecuteError::Malformed { what: "a position without a block" }));
    assert!(execute(&mut cuda, &StepPlan::default(), &mut NoEdits).is_empty());
}

#[test]
fn the_check_for_a_gpu_passes_on_the_shim() {
    // Each model once, in one type or another: all of them take minutes without a GPU, where each step takes seconds.
    let chosen = [0, 4, 8, 9, 12, 17, 18, 19, 23];
    let all = ParityCase::all().into_iter().enumerate().filter(|(i, _)| chosen.contains(i)).map(|(_, case)| case);
    let long = ParityCase::long().into_iter().step_by(2).map(|case| ParityCase { prompts: vec![200, 3], ..case });
    let ahead = ParityCase::ahead().into_iter();
    let beside = ParityCase::beside().into_iter();
    for mut case in all.chain(long).chain(ParityCase::in_8_bits()).chain(ahead).chain(beside) {
        let Some(device) = ShimDevice::start() else { return };
        case.rows.retain(|rows| *rows <= 4);
        let parity = case.run(Box::new(device), &ComputePool::start(1).unwrap()).unwrap();
        assert!(parity.is_good(), "{case:?}: {parity}");
    }
}

#[test]
fn sparse_experts_choose_and_compute_what_they_do_on_the_cpu() {
    for mut case in ParityCase::experts() {
        let Some(device) = ShimDevice::start() else { return };
        case.rows.retain(|rows| *rows <= 9);
        case.prompts.truncate(24);
        let parity = case.run(Box::new(device), &ComputePool::start(1).unwrap()).unwrap();
        assert!(parity.is_good(), "{case:?}: {parity}");
    }
}

#[test]
fn what_comes_after_a_draft_is_what_the_cpu_says() {
    for mut case in ParityCase::drafted() {
        let Some(device) = ShimDevice::start() else { return };
        case.rows.retain(|rows| *rows <= 9);
        case.prompts.truncate(9);
        let parity = case.run(Box::new(device), &ComputePool::start(1).unwrap()).unwrap();
        assert!(parity.is_good(), "{case:?}: {parity}");
    }
}

#[test]
fn steps_with_drafts_have_no_more_places_than_rows_and_no_step_follows_them() {
    let Some((_, mut cuda)) = engines(&spec(64, true), Element::F32, true) else { return };
    assert_eq!(cuda.draft_places() as usize, CONFIG.max_rows);
    let sequence = Sequence { tokens: vec![7; 20], computed: 19, blocks: blocks([3, 2]) };
    let with_drafts = |n: u32| {
        let mut step = Step::default();
        step.push(&sequence, 1, &Arc::default());
        let row = &mut step.plan.rows[0];
        (row.drafts, row.tokens.end) = (n, row.tokens.end + n);
        step.plan.tokens.extend((0..n).map(|i| 30 + i));
        step.plan
    };
    let [most, too_many] = [11, 12].map(with_drafts);
    let malformed = |what| Err(ExecuteError::Malformed { what });
    let refused = cuda.begin(&too_many, &mut NoEdits);
    assert_eq!(refused, malformed("more tokens to choose than max_rows"));
    let beside = |n: u32| {
        let (mut plan, mut chunk) = (with_drafts(n), Step::default());
        chunk.push(&Sequence { tokens: vec![9; 20], computed: 0, blocks: blocks([5, 6]) }, 4, &Arc::default());
        let (n_tokens, n_blocks) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
        plan.tokens.extend(&chunk.plan.tokens);
        plan.blocks.extend(&chunk.plan.blocks);
        plan.rows.extend(chunk.plan.rows.into_iter().map(|row| Row {
            tokens: row.tokens.start + n_tokens..row.tokens.end + n_tokens,
            blocks: row.blocks.start + n_blocks..row.blocks.end + n_blocks,
            sample: None,
            ..row
        }));
        plan
    };
    assert_eq!(cuda.begin(&beside(11), &mut NoEdits), malformed("more rows and drafts than max_rows"));
    let mut out = StepOutput::default();
    cuda.execute(&beside(10), &mut NoEdits, &mut out).unwrap();
    assert_eq!((out.sampled.len(), out.after_drafts.len()), (1, 10));
    cuda.begin(&most, &mut NoEdits).unwrap();
    let [_, behind] = two_plans();
    assert_eq!(cuda.begin(&behind, &mut NoEdits), malformed("a row that follows no token of a step under way"));
    cuda.finish(&most, &mut out).unwrap();
    assert_eq!((out.sampled.len(), out.after_drafts.len()), (1, 11));
}

#[test]
fn prompts_are_scored_as_on_the_cpu() {
    for (case, tokens) in ParityCase::scored().into_iter().zip([9, 40, 9, 40]) {
        let Some(device) = ShimDevice::start() else { return };
        // Of the longest, ten pieces of four.
        let case = ParityCase { prompts: vec![tokens, 3, 1, 2], ..case };
        let parity = case.run(Box::new(device), &ComputePool::start(1).unwrap()).unwrap();
        assert!(parity.is_good() && parity.worst_logprob > 0.0, "{case:?}: {parity}");
    }
}

#[test]
fn no_step_is_begun_behind_one_whose_prompts_are_scored() {
    let Some((_, mut cuda)) = engines(&spec(64, true), Element::F32, false) else { return };
    let sequence = Sequence { tokens: vec![7; 6], computed: 0, blocks: blocks([3]) };
    let mut step = Step::default();
    step.push(&sequence, 6, &Arc::default()).score(&sequence, 6, 2);
    cuda.begin(&step.plan, &mut NoEdits).unwrap();
    let mut behind = Step::default();
    let refused = cuda.begin(&behind.push(&sequence, 6, &Arc::default()).plan, &mut NoEdits);
    assert_eq!(refused, Err(ExecuteError::Malformed { what: "a step behind one whose prompts are scored" }));
    let mut out = StepOutput::default();
    cuda.finish(&step.plan, &mut out).unwrap();
    assert_eq!((out.scores.len(), out.scores[4].top.len(), out.sampled.len()), (5, 2, 1));
    assert!(out.scores.iter().all(|score| score.chosen <= score.top[0].1 && score.chosen.is_finite()));
}

#[test]
fn every_rule_of_the_check_is_met_on_the_shim() {
    let mut case = ParityCase::eager().remove(0);
    case.prompts.truncate(13);
    case.prompts.iter_mut().for_each(|tokens| *tokens = (*tokens).min(6));
    case.rows = vec![13];
    let run = |case: &ParityCase| {
        let device = ShimDevice::start()?;
        let parity = case.run(Box::new(device), &ComputePool::start(1).unwrap()).unwrap();
        assert!(parity.is_good() && parity.other_tokens == 0 && parity.worst_logprob > 0.0, "{parity}");
        Some(parity)
    };
    let Some(parity) = run(&case) else { return };
    let behind = run(&ParityCase { ahead: true, ..case }).unwrap();
    assert_eq!((parity.tokens, behind.tokens), (26, 50));
    let broken = Parity { other_tokens: 2, ..parity.clone() };
    let wrong = Parity { worst: f64::INFINITY, ..parity };
    assert!(!broken.is_good() && !wrong.is_good(), "{broken} {wrong}");
}

#[test]
fn single_kernels_are_checked_on_a_device() {
    let Some(mut device) = ShimDevice::start() else { return };
    for placement in [Placement::Fenced, Placement::Apart] {
        let mut runner = CaseRunner::new(&mut device, placement).unwrap();
        for case in cases::memory::cases() {
            runner.run(&case).unwrap();
        }
        // One whose output is too short for what it writes, and one that expects something else.
        let fill = || Call::new("fill_words", [1, 1, 1], 256).poisoned(8).u64(2).u32(7).u32(0);
        let mut long = fill();
        long.args[1] = Given::U64(3);
        let case = |call| Case { what: "fill".to_owned(), call, check: Box::new(|_| Err("as asked".to_owned())) };
        let error = runner.run(&case(fill())).unwrap_err();
        assert_eq!(error.to_string(), "as asked");
        if placement == Placement::Fenced {
            let error = runner.run(&case(long)).unwrap_err();
            assert!(error.to_string().contains("which is of no output"), "{error}");
        }
    }
}

#[test]
fn random_numbers_fill_every_matrix() {
    for (tied, precision) in [(false, Precision::F16), (true, Precision::Q8_0), (false, Precision::Fp8)] {
        let Some(device) = ShimDevice::start() else { return };
        let options =
            CudaOptions { form: Form { element: Element::Bf16, precision }, graphs: true, library: LibraryUse::Faster };
        let model = (spec(64, tied), Source::Random(3));
        let mut cuda = CudaEngine::load(Box::new(device), model, CONFIG, options, &mut |_| true).unwrap();
        let sequence = Sequence { tokens: vec![7; 20], computed: 0, blocks: blocks([3, 2]) };
        let mut step = Step::default();
        step.push(&sequence, 20, &Arc::default());
        assert_eq!(execute(&mut cuda, &step.plan, &mut NoEdits).len(), 1);
        let logits = cuda.logits(0).unwrap();
        let largest = logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        assert!(logits.iter().all(|x| x.is_finite()) && largest > 1e-3, "{precision:?}: {largest}");
    }
}

#[test]
fn a_check_of_graphs_fails_where_there_are_none() {
    let Some(mut device) = ShimDevice::start() else { return };
    device.captures = 0;
    let case = ParityCase { prompts: vec![3], rows: vec![1], ..ParityCase::all().remove(0) };
    let error = case.run(Box::new(device), &ComputePool::start(1).unwrap()).expect_err("nothing is captured");
    assert!(error.to_string().contains("nothing is captured"), "{error}");
}
