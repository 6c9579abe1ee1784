//! The embedded demo model against the greedy tokens that its training recipe recorded (another implementation, in numpy).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, Model, ModelSpec, Precision, Weights};

use crate::common::generate;

#[derive(serde::Deserialize)]
struct Golden {
    model: String,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../app/demo")
}

fn load(folder: &Path, precision: Precision) -> CpuEngine {
    let spec = ModelSpec::from_config(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let model = Model::load(spec, &Weights::open(folder).unwrap(), precision).unwrap();
    let config =
        EngineConfig { n_blocks: 16, block_tokens: 16, max_step_tokens: 128, max_rows: 4, context_tokens: 256 };
    CpuEngine::new(Arc::new(model), ComputePool::start(2).unwrap(), config).unwrap()
}

#[test]
fn the_demo_model_reproduces_its_golden_tokens() {
    let Ok(text) = std::fs::read(demo().join("golden.json")) else {
        eprintln!("skipped: host/app/demo/golden.json is not there; train.py writes it");
        return;
    };
    let golden: Golden = serde_json::from_slice(&text).unwrap();
    let mut engine = load(&demo().join(&golden.model), Precision::F16);
    assert!(!golden.cases.is_empty());
    for case in &golden.cases {
        let (tokens, _) = generate(&mut engine, &case.prompt_ids, 16, case.greedy_ids.len());
        assert_eq!(tokens, case.greedy_ids, "after {:?}", case.prompt_ids);
    }
}

#[test]
fn both_demo_models_load_in_both_precisions() {
    for name in ["demo", "demo-mini"] {
        for precision in [Precision::F16, Precision::Q8_0] {
            let (tokens, _) = generate(&mut load(&demo().join(name), precision), &[0, 100, 200], 16, 4);
            assert_eq!(tokens.len(), 4, "{name} {precision:?}");
        }
    }
}
