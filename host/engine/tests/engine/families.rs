//! Every supported family against `transformers`: tiny checkpoints and what it computed with them (`tests/goldens/make.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};
use pointsman_sched::request::Sampling;

use crate::common::{Outcome, Sequence, Step, blocks, from_cache, generate, logit_bits};

#[derive(serde::Deserialize)]
struct Golden {
    made_by: String,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
pub(crate) struct Case {
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) first_logits: Vec<f32>,
    pub(crate) last_logits: Vec<f32>,
}

fn goldens() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn open(folder: &Path) -> (Golden, CpuEngine) {
    let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
    let spec = ModelSpec::from_config(&read("config.json")).unwrap();
    let model = Model::load(spec, &Weights::open(folder).unwrap(), Precision::F16).unwrap();
    let config =
        EngineConfig { n_blocks: 64, block_tokens: 16, max_step_tokens: 256, max_rows: 8, context_tokens: 256 };
    let engine = CpuEngine::new(Arc::new(model), ComputePool::start(2).unwrap(), config).unwrap();
    (serde_json::from_slice(&read("golden.json")).unwrap(), engine)
}

/// Every case of every family, with its engine.
pub(crate) fn each_golden(mut check: impl FnMut(&str, &Case, &mut CpuEngine)) {
    for folder in goldens() {
        let (golden, mut engine) = open(&folder);
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        golden.cases.iter().for_each(|case| check(&name, case, &mut engine));
    }
}

/// Relative L2 distance.
fn distance(bits: &[u32], expect: &[f32]) -> f32 {
    assert_eq!(bits.len(), expect.len());
    let off: f32 = bits.iter().zip(expect).map(|(&bits, x)| (f32::from_bits(bits) - x).powi(2)).sum();
    (off / expect.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    println!("{:<10} {:>8} {:>9} {:>9}  reference", "family", "prompt", "first", "last");
    for folder in goldens() {
        let (golden, mut engine) = open(&folder);
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for case in &golden.cases {
            let (tokens, logits) = generate(&mut engine, &case.prompt, 1_000, case.tokens.len());
            let off =
                [distance(&logits[0], &case.first_logits), distance(&logits[case.tokens.len() - 1], &case.last_logits)];
            let prompt = case.prompt.len();
            println!("{name:<10} {prompt:>8} {:>9.1e} {:>9.1e}  {}", off[0], off[1], golden.made_by);
            assert!(off[0] < 1e-4, "{name}: logits after a prompt of {prompt} are off by {}", off[0]);
            assert_eq!(tokens, case.tokens, "{name}, prompt of {prompt}");
            assert!(off[1] < 1e-4, "{name}: the last logits after a prompt of {prompt} are off by {}", off[1]);
        }
    }
}

#[test]
fn each_family_gives_the_same_bits_in_chunks_in_batches_and_behind_a_cached_prefix() {
    for folder in goldens() {
        let (golden, mut engine) = open(&folder);
        let longest = golden.cases.iter().max_by_key(|case| case.prompt.len()).unwrap();
        let n = longest.tokens.len();
        let alone = generate(&mut engine, &longest.prompt, 1_000, n);
        for chunk in [1, 7, 16] {
            assert!(
                generate(&mut engine, &longest.prompt, chunk, n) == alone,
                "{}: chunks of {chunk}",
                folder.display()
            );
        }
        assert!(beside_others(&mut engine, &longest.prompt, n) == alone, "{}: in a batch", folder.display());
        assert!(from_cache(&mut engine, &longest.prompt, n) == alone, "{}: behind a prefix", folder.display());
    }
}

/// Between two others, one of which prefills while this one decodes.
fn beside_others(engine: &mut CpuEngine, prompt: &[u32], n: usize) -> Outcome {
    let greedy = Arc::new(Sampling::default());
    let sequence = |tokens: Vec<u32>, first: u32| Sequence { tokens, computed: 0, blocks: blocks(first..first + 10) };
    let mut subject = sequence(prompt.to_vec(), 0);
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    for step in 0..n {
        let before = sequence((0..5).map(|i| 3 + (i * 7 + step as u32) % 60).collect(), 20);
        let after = sequence((0..30).map(|i| 3 + (i * 11 + step as u32) % 60).collect(), 40);
        let left = subject.tokens.len() - subject.computed;
        let sampled = Step::default()
            .push(&before, 5, &greedy)
            .push(&subject, left, &greedy)
            .push(&after, 30, &greedy)
            .run(engine);
        logits.push(logit_bits(engine, 1));
        subject.computed = subject.tokens.len();
        subject.tokens.push(sampled[1]);
        tokens.push(sampled[1]);
    }
    (tokens, logits)
}
