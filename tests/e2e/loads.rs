//! Models come and go while requests flow: loads, switches by alias, unloads that drain, refusals that change nothing, a
//! restart; and the memory of a model is given back.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pointsman_tests::large::{self, Sizes};
use pointsman_tests::rng::Rng;
use pointsman_tests::{Answer, Host, raw};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{doctor, journal};

pub(super) const PROGRAM: &str = env!("CARGO_BIN_EXE_pointsman-under-test");

/// A folder of models: `demo` as it is in the binary, `mini`, `broken`, which ends too early, and `foreign`, whose tokens end
/// elsewhere.
pub(super) fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/app/demo");
    for (name, of) in [("demo", "demo"), ("mini", "demo-mini"), ("broken", "demo-mini"), ("foreign", "demo-mini")] {
        let to = folder.path().join(name);
        std::fs::create_dir(&to).expect("a folder");
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(from.join(of).join(file), to.join(file)).expect("a file of the demo");
        }
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(from.join(file), to.join(file)).expect("a file of the demo");
        }
    }
    let cut = folder.path().join("broken/model.safetensors");
    let bytes = std::fs::read(&cut).expect("a file");
    std::fs::write(cut, &bytes[..bytes.len() / 2]).expect("a file");
    let config = folder.path().join("foreign/generation_config.json");
    std::fs::write(config, r#"{"eos_token_id": [7]}"#).expect("a file");
    folder
}

fn start(folder: &Path, more: &str) -> Host {
    let text = format!("[engine]\nmodel_dirs = [{:?}]\nkv_mib = 8\n{more}", folder.display().to_string());
    Host::configured(PROGRAM, &text)
}

pub(super) fn load(host: &Host, name: &str, path: &Path) -> Answer {
    let headers = [("content-type", "application/json"), ("accept", "application/json")];
    let body = json!({"name": name, "path": path}).to_string();
    host.send("POST", &format!("{}/admin/v1/models", host.admin), &headers, body.as_bytes())
}

pub(super) fn unload(host: &Host, name: &str, ask: &str) -> Answer {
    host.admin("DELETE", &format!("/admin/v1/models/{name}{ask}"), &Value::Null)
}

pub(super) fn ask(model: &str, tokens: usize) -> Value {
    json!({"model": model, "prompt": "Ownership is", "temperature": 0, "max_tokens": tokens, "ignore_eos": true})
}

/// What anybody can see of the models.
fn seen(host: &Host) -> (Value, Vec<String>, u64) {
    let ids = |list: &Value, key: &str| -> Vec<String> {
        let rows = list["data"].as_array().unwrap_or_else(|| panic!("{list}"));
        rows.iter().map(|row| row[key].as_str().expect("text").to_owned()).collect()
    };
    let memory = host.admin("GET", "/admin/v1/devices", &Value::Null).body["data"][0]["memory"]["weights"].clone();
    let models = host.admin("GET", "/admin/v1/models", &Value::Null).body;
    (json!(ids(&host.get("/v1/models").body, "id")), ids(&models, "name"), memory.as_u64().expect("bytes"))
}

#[test]
fn models_come_and_go_while_streams_run_and_are_cancelled() {
    let folder = folder();
    let host = start(folder.path(), "");
    let before = seen(&host);
    let expect = host.stream(&ask("demo:f16", 24)).expect("a stream").tokens;
    let (is_over, n_done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..3 {
            let (host, expect, is_over, n_done) = (&host, &expect, &is_over, &n_done);
            scope.spawn(move || {
                let mut rng = Rng::new(client);
                while !is_over.load(Ordering::Relaxed) {
                    if rng.chance(300_000) {
                        // Gone after a few tokens, wherever that falls.
                        let url = format!("{}/v1/completions", host.data);
                        let mut body = ask("demo", 200);
                        body["stream"] = true.into();
                        hang_up(&url, &body, rng.below(4) as usize);
                    }
                    let streamed = host.stream(&ask("demo:f16", 24)).expect("the demo serves throughout");
                    assert_eq!(streamed.tokens, *expect);
                    n_done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..3 {
            let loaded = load(&host, "copy", &folder.path().join("demo"));
            assert_eq!(loaded.status, 201, "{loaded:?}");
            assert_eq!(loaded.body["variants"], json!(["copy:f16"]), "{loaded:?}");
            let same = host.stream(&ask("copy", 24)).expect("it is served").tokens;
            assert_eq!(same, expect, "the same files say the same");
            // Those that run when it goes may finish.
            let running = scope.spawn(|| host.stream(&ask("copy:f16", 400)));
            while running_on(&host, "copy:f16@cpu") == 0 && !running.is_finished() {
                std::thread::yield_now();
            }
            let gone = unload(&host, "copy", "?grace_ms=600000");
            assert_eq!((gone.status, &gone.body["ended"]), (200, &json!(0)), "round {round}: {gone:?}");
            assert_eq!(running.join().expect("a client").expect("it was let finish").tokens.len(), 400);
            let refused = host.post("/v1/completions", &ask("copy", 1));
            assert_eq!(refused.status, 404, "{refused:?}");
            assert_eq!(seen(&host), before, "everything is as it was");
            assert!(!host.get("/metrics").body.to_string().contains("copy:f16"), "its series have gone");
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(n_done.load(Ordering::Relaxed) > 3);
    // The last of those who went away may not have been noticed yet.
    raw::rests(&host);
    let lines = journal(&host);
    let count = |event: &str| lines.iter().filter(|line| line["event"] == event).count();
    assert_eq!((count("model-loaded"), count("model-unloaded"), count("model-refused")), (3, 3, 0), "{lines:?}");
}

fn running_on(host: &Host, replica: &str) -> u64 {
    let devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
    let rows = devices["data"][0]["replicas"].as_array().expect("a list").clone();
    rows.iter().find(|row| row["name"] == replica).map_or(0, |row| row["running"].as_u64().expect("a number"))
}

/// Reads a few lines of a stream and goes away.
fn hang_up(url: &str, body: &Value, lines: usize) {
    use std::io::BufRead as _;
    let request = ureq::http::Request::post(url).header("content-type", "application/json");
    let request = request.body(body.to_string()).expect("a request");
    let answer = ureq::Agent::new_with_defaults().run(request).expect("the demo serves throughout");
    let reader = std::io::BufReader::new(answer.into_body().into_reader());
    let _ = reader.lines().take(lines).count();
}

#[test]
fn what_is_refused_changes_nothing_and_says_what_to_change() {
    let folder = folder();
    let outside = tempfile::tempdir().expect("a temporary folder");
    std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).expect("a link");
    let host = start(folder.path(), "max_loaded = 1\n");
    let before = seen(&host);
    let inside = |name: &str| folder.path().join(name);
    let rows: [(&str, PathBuf, u16, &str); 12] = [
        ("a b", inside("mini"), 400, "a model's name has 1 to 100"),
        ("a:b:c", inside("mini"), 400, "a model's name has 1 to 100"),
        ("m", "mini".into(), 400, "must be absolute"),
        ("m", outside.path().into(), 400, "is below none of engine.model_dirs"),
        ("m", inside("link"), 400, "is below none of engine.model_dirs"),
        ("m", inside("nothing"), 400, "cannot read"),
        ("m", inside("demo/../mini"), 400, "without `..`"),
        ("demo", inside("mini"), 409, "there is a model `demo` already"),
        ("m:v2", inside("mini"), 409, "there is no model `m`"),
        ("demo:f16", inside("mini"), 409, "`demo:f16` is served already"),
        ("m", inside("broken"), 422, "is not a complete safetensors file"),
        ("demo:v2", inside("foreign"), 422, "stop tokens are not those of the model"),
    ];
    for (name, path, status, expect) in rows {
        let refused = load(&host, name, &path);
        let message = refused.body["error"]["message"].as_str().unwrap_or_default();
        assert!(refused.status == status && message.contains(expect), "{name} {path:?}: {refused:?}");
        assert_eq!(seen(&host), before, "{name} {path:?}");
    }
    assert_eq!(load(&host, "m", &inside("mini")).status, 201);
    let full = load(&host, "n", &inside("mini"));
    assert!(full.status == 409 && full.body.to_string().contains("engine.max_loaded"), "{full:?}");
    for (name, status, expect) in [("other", 404, "models are `demo`"), ("demo:f16", 404, "there is no model")] {
        let refused = unload(&host, name, "");
        assert!(refused.status == status && refused.body.to_string().contains(expect), "{name}: {refused:?}");
    }
    for name in ["m", "demo-mini"] {
        assert_eq!(unload(&host, name, "").status, 200, "{name}");
    }
    let last = unload(&host, "demo", "");
    assert!(last.status == 409 && last.body.to_string().contains("the only model"), "{last:?}");
    let refused = journal(&host).iter().filter(|line| line["event"] == "model-refused").count();
    assert_eq!(refused, 2, "those that were begun");
    for (config, expect) in [
        ("", "and there are none"),
        ("memory_mib = 1\n", "it needs"),
        ("max_loaded = 0\n", "raise engine.max_loaded (0)"),
    ] {
        let host = match config {
            "" => crate::host(&[]),
            _ => start(folder.path(), config),
        };
        let refused = load(&host, "m", &inside("mini"));
        assert!(refused.status >= 400 && refused.body.to_string().contains(expect), "{config:?}: {refused:?}");
        assert_eq!(host.post("/v1/completions", &ask("demo", 1)).status, 200);
    }
}

#[test]
fn traffic_moves_by_alias_to_a_variant_that_was_loaded() {
    let folder = folder();
    let host = start(folder.path(), "");
    let weights = |weights: Value| {
        let set = host.admin("PUT", "/admin/v1/aliases/demo", &json!({"weights": weights}));
        assert_eq!(set.status, 200, "{set:?}");
    };
    let served_by = || {
        let answer = host.post("/v1/completions", &ask("demo", 2));
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.headers["x-pointsman-variant"].to_str().expect("text").to_owned()
    };
    weights(json!({"demo:f16": 1}));
    assert_eq!(load(&host, "demo:v2", &folder.path().join("mini")).status, 201);
    assert_eq!(served_by(), "demo:f16", "a new variant has no weight");
    weights(json!({"demo:v2": 1}));
    assert_eq!(served_by(), "demo:v2");
    let started =
        host.admin("POST", "/admin/v1/aliases/demo/rollouts", &json!({"candidate": "demo:f16", "mode": "canary"}));
    assert_eq!(started.status, 201, "{started:?}");
    let busy = unload(&host, "demo:v2", "");
    assert!(busy.status == 409 && busy.body.to_string().contains("promote or abort it first"), "{busy:?}");
    let id = started.body["id"].as_str().expect("an id");
    let abort = host.admin("POST", &format!("/admin/v1/aliases/demo/rollouts/{id}/abort"), &Value::Null);
    assert_eq!(abort.status, 200, "{abort:?}");
    assert_eq!(unload(&host, "demo:v2", "").status, 200);
    assert!(served_by().starts_with("demo:"), "the others have its share");
}

#[test]
fn requests_that_take_longer_than_they_are_given_are_ended_and_told() {
    let folder = folder();
    // So slow that they are not over when they are to end.
    let host = start(folder.path(), "devices = [\"null:20000\"]\n");
    assert_eq!(load(&host, "copy", &folder.path().join("demo")).status, 201);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| host.stream(&ask("copy", 1_000)));
        while running_on(&host, "copy:f16@null") == 0 && !running.is_finished() {
            std::thread::yield_now();
        }
        let gone = unload(&host, "copy", "?grace_ms=0");
        assert_eq!((gone.status, &gone.body["ended"]), (200, &json!(1)), "{gone:?}");
        let error = running.join().expect("a client").expect_err("it was cut off");
        assert!(error.contains("\"code\":\"unloaded\""), "{error}");
    });
}

#[test]
fn what_was_loaded_is_there_after_a_restart_or_says_why_not() {
    let folder = folder();
    let host = start(folder.path(), "");
    let shown = |host: &Host, name: &str| host.admin("GET", &format!("/admin/v1/models/{name}"), &Value::Null).body;
    for name in ["m", "m:v2", "demo:v2"] {
        assert_eq!(load(&host, name, &folder.path().join("mini")).status, 201);
    }
    for name in ["m", "demo-mini"] {
        assert_eq!(unload(&host, name, "").status, 200);
    }
    let host = host.restart(&[]);
    for name in ["m:v2", "demo:v2"] {
        let model = shown(&host, name);
        assert_eq!((&model["state"], &model["source"]), (&json!("ready"), &json!("loaded")), "{model}");
        assert_eq!(host.post("/v1/completions", &ask(name, 1)).status, 200);
    }
    assert_eq!(host.post("/v1/completions", &ask("m", 1)).status, 200, "a variant stands for what it has replaced");
    assert_eq!(shown(&host, "demo-mini")["state"], "ready", "what the start brings, the start brings again");
    std::fs::rename(folder.path().join("mini"), folder.path().join("away")).expect("a folder");
    let host = host.restart(&[]);
    let lost = shown(&host, "m:v2");
    assert_eq!(lost["state"], "failed");
    assert!(lost["error"].as_str().is_some_and(|error| error.contains("mini")), "{lost}");
    assert_eq!(host.post("/v1/completions", &ask("demo", 1)).status, 200, "the others are served");
    let ready = host.get("/ready");
    assert_eq!((ready.status, &ready.body["degraded"]), (200, &json!(["model demo:v2", "model m:v2"])));
    let failed = "pointsman_models_loads_total{outcome=\"failed\"} 2\n";
    assert!(host.get("/metrics").body.as_str().is_some_and(|metrics| metrics.contains(failed)), "{failed}");
    // The same before a start, with the way out; a host that runs has nothing to do with it.
    let config = host.folder().join("pointsman.toml");
    let (code, report) = doctor::doctor(host.folder(), &["--config", config.to_str().expect("a path")]);
    assert_eq!((code, &report["faults"]), (1, &json!(2)), "{report:#}");
    let finding = doctor::finding(&report, "models", "m:v2");
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains("/mini") && remedy.contains("pointsman model unload m:v2"), "{finding}");
    let host = host.restart(&[("ENGINE__DEMO", "false")]);
    assert_eq!(host.get("/ready").status, 503, "it waits for what is lost");
    assert_eq!(unload(&host, "m:v2", "").status, 200);
    let host = host.restart(&[]);
    assert_eq!(shown(&host, "m:v2")["error"]["code"], "not_found");
    assert_eq!(shown(&host, "demo:v2")["state"], "failed");
}

#[test]
fn the_command_line_loads_with_progress_lists_and_unloads() {
    let folder = folder();
    let host = start(folder.path(), "");
    let run = |arguments: &[&str]| {
        let output = Command::new(PROGRAM).args(arguments).args(["--url", &host.admin]).output().expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let named = format!("org/m={}", folder.path().join("demo").display());
    let (code, said, errors) = run(&["model", "load", &named]);
    assert_eq!(code, Some(0), "{errors}");
    for part in [" %  ", "org/m is served: org/m:f16"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let (_, listed, _) = run(&["model", "list"]);
    assert!(listed.lines().any(|line| line.starts_with("org/m ") && line.contains("loaded")), "{listed}");
    let (code, said, errors) = run(&["model", "unload", "org/m", "--grace-s", "5"]);
    assert!(code == Some(0) && said.contains("org/m is unloaded after"), "{said}{errors}");
    let (code, _, errors) = run(&["model", "load", "m=/nowhere"]);
    assert!(code == Some(1) && errors.contains("engine.model_dirs"), "{errors}");
}

#[test]
fn the_memory_of_a_model_is_given_back() {
    let folder = folder();
    let path = folder.path().join("large");
    std::fs::create_dir(&path).expect("a folder");
    // 81 MB.
    large::write(&path, Sizes { hidden: 512, ffn: 1_536, layers: 13 });
    let host = start(folder.path(), "");
    // Once, so that what the first load leaves behind for good is not counted.
    assert_eq!(load(&host, "first", &folder.path().join("mini")).status, 201);
    assert_eq!(unload(&host, "first", "").status, 200);
    for round in 0..2 {
        let before = host.resident_bytes();
        let loaded = load(&host, "large", &path);
        assert_eq!(loaded.status, 201, "{loaded:?}");
        assert_eq!(host.post("/v1/completions", &ask("large", 8)).status, 200);
        let with = host.resident_bytes();
        let gone = unload(&host, "large", "");
        assert_eq!(gone.status, 200, "{gone:?}");
        let after = host.resident_bytes();
        let (taken, kept) = (with.saturating_sub(before), after.saturating_sub(before));
        println!("round {round}: {before} bytes, with the model {with}, after it {after}");
        assert!(taken > 70_000_000, "it takes its memory: {taken}");
        assert!(kept * 10 <= taken, "round {round}: {kept} of {taken} bytes were kept");
    }
}
