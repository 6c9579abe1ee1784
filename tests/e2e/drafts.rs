//! Drafts on the real engine: every answer is the one without them, whatever the rules are and whoever is beside it.

use std::path::Path;
use std::process::Command;

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::{embeddings, host, loads};

/// A prompt that the model goes on repeating.
const LIST: &str =
    "fn add(a: u32, b: u32) -> u32 { a + b }\nfn sub(a: u32, b: u32) -> u32 { a - b }\nfn mul(a: u32, b: u32)";

/// Another one, of which it goes on for long.
fn table() -> String {
    let rows = (0..12).map(|i| format!("| item {i} | {i} bytes |\n"));
    std::iter::once("| name | size |\n|---|---|\n".to_owned()).chain(rows).collect()
}

/// Requests of all kinds, without a word on drafts.
fn requests() -> Vec<Value> {
    let mut all = vec![
        json!({ "prompt": LIST, "temperature": 0, "logprobs": 3 }),
        json!({ "prompt": table(), "temperature": 0, "logprobs": 1 }),
        json!({ "prompt": "Rust is", "temperature": 0, "logprobs": 1, "ignore_eos": true }),
        json!({ "prompt": [LIST, "Ownership is", "A trait is"], "temperature": 0.3, "seed": 5, "n": 2 }),
        json!({ "prompt": LIST, "temperature": 0, "stop": ["mul", "u32 {"], "min_tokens": 9 }),
        json!({ "prompt": LIST, "temperature": 0, "repetition_penalty": 1.05, "presence_penalty": 0.2 }),
        json!({ "prompt": LIST, "temperature": 0, "cache_prompt": false, "n": 2 }),
        json!({ "prompt": LIST, "temperature": 0, "max_tokens": 2 }),
    ];
    for seed in 0..8 {
        all.push(json!({ "prompt": LIST, "temperature": 0.8, "top_p": 0.9, "seed": seed, "logprobs": 2 }));
        all.push(
            json!({ "prompt": "Ownership is", "temperature": 0.5, "seed": seed, "n": 3, "frequency_penalty": 0.1 }),
        );
    }
    all.iter_mut().for_each(|body| {
        let model = ["demo:f16", "demo:q8_0"][usize::from(body["seed"].as_u64().is_some_and(|seed| seed % 2 == 1))];
        body["model"] = model.into();
        if body.get("max_tokens").is_none() {
            body["max_tokens"] = 90.into();
        }
    });
    all
}

/// What drafts must not change, and how many came true.
fn answer(host: &Host, mut body: Value, drafts: u32) -> ([Value; 3], u64) {
    body["speculative_config"] = json!({ "method": "ngram", "num_speculative_tokens": drafts });
    let answer = host.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let usage = &answer.body["usage"];
    let accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"].as_u64().unwrap_or_default();
    let same = [&answer.body["choices"], &usage["prompt_tokens"], &usage["completion_tokens"]].map(Value::clone);
    (same, accepted)
}

#[test]
fn answers_are_the_same_with_and_without() {
    let host = host(&[]);
    let bodies = requests();
    let expect: Vec<_> = bodies.iter().map(|body| answer(&host, body.clone(), 0)).collect();
    assert!(expect.iter().all(|(_, accepted)| *accepted == 0));
    let mut accepted = 0;
    for drafts in [1, 5, 16] {
        // Two at once, so that each has others beside it and steps have places left.
        for (bodies, expect) in bodies.chunks(2).zip(expect.chunks(2)) {
            let found: Vec<_> = std::thread::scope(|scope| {
                let ask = |body: &Value| {
                    let (host, body) = (&host, body.clone());
                    scope.spawn(move || answer(host, body, drafts))
                };
                let asked: Vec<_> = bodies.iter().map(ask).collect();
                asked.into_iter().map(|asked| asked.join().expect("an answer")).collect()
            });
            for ((body, (expect, _)), (found, n)) in bodies.iter().zip(expect).zip(&found) {
                assert_eq!(found, expect, "{drafts} drafts: {body}");
                accepted += n;
            }
        }
    }
    assert!(accepted > 100, "{accepted} drafts came true");
    let metrics = host.get("/metrics").body;
    let counted = |name: &str| -> u64 {
        let lines = metrics.as_str().expect("text").lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    };
    let [drafted, came_true] =
        ["draft", "accepted"].map(|kind| counted(&format!("vllm:spec_decode_num_{kind}_tokens_total")));
    // A last step is counted after its answer, and a text that a stop string has ended goes on for a moment.
    assert!(drafted > came_true && 2 * came_true > accepted, "{drafted} {came_true} {accepted}");
}

#[test]
fn the_configuration_drafts_for_those_who_do_not_say() {
    let host = host(&[("SCHED__DRAFT_TOKENS", "6")]);
    let body = json!({ "model": "demo:f16", "prompt": table(), "temperature": 0, "max_tokens": 90 });
    let drafted = host.post("/v1/completions", &body);
    let details = &drafted.body["usage"]["completion_tokens_details"];
    assert!(details["accepted_prediction_tokens"].as_u64() > Some(10), "{drafted:?}");
    let streamed = host.stream(&body).expect("a stream");
    let ([choices, ..], accepted) = answer(&host, body, 0);
    assert_eq!(accepted, 0);
    assert_eq!((&choices[0]["text"], &choices), (&json!(streamed.text), &drafted.body["choices"]));
}

/// Answers of `demo` with drafts by `demo-mini`, beside those without.
#[test]
fn a_draft_model_changes_no_answer() {
    let host = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), "[draft_models]\ndemo = \"demo-mini\"\n");
    let by_model = |mut body: Value, drafts: u32| {
        body["speculative_config"] =
            json!({ "method": "draft_model", "model": "demo-mini", "num_speculative_tokens": drafts });
        let answer = host.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let details = &answer.body["usage"]["completion_tokens_details"];
        (answer.body["choices"].clone(), details["accepted_prediction_tokens"].as_u64().unwrap_or_default())
    };
    let mut accepted = 0;
    for body in requests() {
        let (expect, none) = by_model(body.clone(), 0);
        let (found, n) = by_model(body.clone(), 3);
        assert_eq!((found, none), (expect, 0), "{body}");
        accepted += n;
    }
    assert!(accepted > 100, "{accepted} drafts came true");
    let metrics = host.get("/metrics").body;
    let counted = |kind: &str| {
        let name = format!("pointsman_draft_tokens_total{{kind=\"{kind}\",method=\"draft_model\",");
        let lines = metrics.as_str().expect("text").lines().filter(|line| line.starts_with(&name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    assert!(counted("proposed") > counted("accepted") && counted("accepted") > 100);
    let devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body.to_string();
    assert!(devices.contains("\"drafts\":"), "{devices}");
    for (model, config, param) in [
        ("demo-mini", json!({ "method": "draft_model" }), "speculative_config.method"),
        ("demo", json!({ "method": "draft_model", "model": "demo" }), "speculative_config.model"),
    ] {
        let body = json!({ "model": model, "prompt": "Rust is", "speculative_config": config });
        let refused = host.post("/v1/completions", &body);
        assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!(param)), "{refused:?}");
    }
}

/// Adds `other-tokens` to a folder of models: `mini`, to which two tokens mean each other.
pub(super) fn other_tokenizer(folder: &Path) {
    let (from, to) = (folder.join("mini"), folder.join("other-tokens"));
    std::fs::create_dir(&to).expect("a folder");
    for file in std::fs::read_dir(from).expect("a folder").flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).expect("a file");
    }
    let path = to.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON");
    let vocab = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
    let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
    vocab.extend([("a".to_owned(), b), ("b".to_owned(), a)]);
    std::fs::write(path, tokenizer.to_string()).expect("a file");
}

#[test]
fn a_start_that_cannot_draft_is_refused_and_says_why() {
    let folder = loads::folder();
    other_tokenizer(folder.path());
    let (encoder, at) = (embeddings::tiny(), |name: &str| folder.path().join(name));
    let models = format!("models.other = {:?}\nmodels.encoder = {:?}\n", at("other-tokens"), encoder.path());
    let lazy = format!("on_demand.lazy = {:?}\ndraft_models.demo = \"lazy\"\n", at("mini"));
    for (more, expect) in [
        ("draft_models.demo = \"none\"\n", "there is no model `none`; models are `demo`, `demo-mini`, `other`"),
        ("draft_models.none = \"demo\"\n", "draft_models.\"none\" names no model"),
        ("draft_models.demo = \"other\"\n", "the two have different tokenizers"),
        ("draft_models.demo = \"encoder\"\n", "`encoder` makes embeddings"),
        ("draft_models.demo = \"demo:q8_0\"\n", "another model, a smaller one with the same tokenizer"),
        (&lazy, "`lazy` is loaded on demand"),
        ("draft_models.demo = \"demo-mini\"\nengine.draft_kv_mib = 0\n", "1 to 1048576 MiB"),
        ("draft_models.demo = \"demo-mini\"\nengine.devices = [\"null\"]\n", "is not on the CPU"),
    ] {
        let config = folder.path().join("config.toml");
        std::fs::write(&config, format!("{models}{more}")).expect("a file");
        let output = Command::new(loads::PROGRAM)
            .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir"])
            .arg(folder.path().join("data"))
            .arg("--config")
            .arg(&config)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(expect), "{more}: {said}");
    }
}

#[test]
fn a_model_that_is_loaded_later_has_its_draft_model() {
    let folder = loads::folder();
    let dirs = format!("engine.model_dirs = [{:?}]\nengine.kv_mib = 8\n", folder.path());
    // A draft model may have one of its own.
    let chain = "draft_models = { late = \"demo-mini\", demo-mini = \"demo\" }\n";
    let host = Host::configured(loads::PROGRAM, &format!("{dirs}{chain}"));
    assert_eq!(loads::load(&host, "late", &folder.path().join("demo")).status, 201);
    let body = |model: &str| {
        let config = json!({ "method": "draft_model", "num_speculative_tokens": 3 });
        let mut body = loads::ask(model, 60);
        body["speculative_config"] = config;
        host.post("/v1/completions", &body)
    };
    let [late, mini] = ["late", "demo-mini"].map(body);
    let accepted = |answer: &Answer| {
        answer.body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"].as_u64().unwrap_or_default()
    };
    assert!(late.status == 200 && accepted(&late) > 10, "{late:?}");
    assert!(mini.status == 200 && accepted(&mini) > 10, "{mini:?}");
    assert_eq!(late.body["choices"], host.post("/v1/completions", &loads::ask("demo:f16", 60)).body["choices"]);
    let refused = loads::unload(&host, "demo-mini", "");
    assert!(refused.status == 409 && refused.body.to_string().contains("`demo-mini` drafts for `late`"), "{refused:?}");
    let gone = loads::unload(&host, "late", "");
    assert_eq!(gone.status, 200, "{gone:?}");
    other_tokenizer(folder.path());
    let refused = loads::load(&host, "late", &folder.path().join("other-tokens"));
    assert!(refused.status == 422 && refused.body.to_string().contains("different tokenizers"), "{refused:?}");
}
