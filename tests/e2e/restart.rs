//! What is active survives a restart, also one without warning.

use pointsman_tests::looks;
use serde_json::{Value, json};

use crate::{host, journal};

#[test]
fn active_policies_survive_a_kill() {
    let host = host(&[]);
    let digest = host.builtin("route-prefix-aware");
    let activated = host.activate("router", &digest, json!({}));
    assert_eq!(activated.status, 200, "{activated:?}");
    assert_eq!(host.activate("scheduler", "native", json!({})).status, 200);
    let slots = |host: &pointsman_tests::Host| {
        let listed = host.admin("GET", "/admin/v1/slots", &Value::Null).body;
        let rows = listed["data"].as_array().expect("slots").clone();
        rows.into_iter().map(|s| (s["slot"].clone(), s["active"].clone(), s["previous"].clone())).collect::<Vec<_>>()
    };
    let before = slots(&host);
    let host = host.restart(&[]);
    assert_eq!(slots(&host), before, "revisions, generations and configs are as they were");
    let again = host.activate("router", &digest, json!({}));
    let generation = |a: &pointsman_tests::Answer| a.body["generation"].as_u64().expect("a generation");
    assert_eq!(generation(&again), generation(&activated) + 1, "generations go on");
    let lines = host.admin("GET", "/admin/v1/journal", &Value::Null).body;
    let text = lines.as_str().map_or_else(|| lines.to_string(), str::to_owned);
    assert!(text.contains("route-prefix-aware"), "the journal survives too: {text}");
}

#[test]
fn a_second_process_on_the_same_data_directory_is_refused() {
    let host = host(&[]);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"))
        .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir"])
        .arg(host.folder())
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another pointsman uses the data directory"), "{said}");
}

#[test]
fn safe_mode_serves_natively_and_changes_nothing() {
    let host = host(&[]).restart(&[("SAFE_MODE", "true")]);
    let answer = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 2 }));
    assert_eq!(answer.status, 200, "{answer:?}");
    let router = answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
    assert!(router.starts_with("native;g="), "{router}");
    let host = host.restart(&[]);
    let active = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    assert!(active["active"]["revision"].as_str().is_some_and(|r| r.starts_with("route-least-loaded@")), "{active}");
}

#[test]
fn safe_mode_lets_nobody_destroy_what_is_stored() {
    let host = host(&[]);
    let core =
        std::fs::read(pointsman_tests::root().join("plugins/prebuilt/route-least-loaded.core.wasm")).expect("a module");
    let digest = host.upload(&core);
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    let host = host.restart(&[("SAFE_MODE", "true")]);
    let deleted = host.admin("DELETE", &format!("/admin/v1/components/{digest}"), &Value::Null);
    assert_eq!(deleted.status, 409, "{deleted:?}");
    assert_eq!(host.activate("router", "native", json!({})).status, 409);
    let host = host.restart(&[]);
    let active = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    assert_eq!(active["component"], json!(digest), "{active}");
}

#[test]
fn what_cannot_be_stored_is_not_published_and_no_generation_is_given_twice() {
    let host = host(&[]);
    let slots = host.folder().join("slots");
    let aside = host.folder().join("slots-aside");
    std::fs::rename(&slots, &aside).expect("a folder");
    let refused = host.activate("router", "native", json!({}));
    assert_eq!(refused.status, 500, "{refused:?}");
    let active = || host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    assert_eq!(active()["generation"], 1, "{}", active());
    let answer = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }));
    let router = answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
    assert!(router.starts_with("route-least-loaded@") && router.ends_with(";g=1"), "{router}");
    std::fs::rename(&aside, &slots).expect("a folder");
    assert_eq!(host.activate("router", "native", json!({})).body["generation"], 2);
}

#[test]
fn a_stored_policy_that_is_gone_leaves_native_serving_and_says_so() {
    let host = host(&[]);
    let core =
        std::fs::read(pointsman_tests::root().join("plugins/prebuilt/route-least-loaded.core.wasm")).expect("a module");
    let digest = host.upload(&core);
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    let file = format!("components/{}.wasm", digest.trim_start_matches("sha256:"));
    std::fs::remove_file(host.folder().join(file)).expect("a stored component");
    let host = host.restart(&[]);
    let answer = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }));
    assert_eq!(answer.status, 200, "{answer:?}");
    let router = answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
    assert_eq!(router, "native;g=2");
    let state = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    assert_eq!(state["health"]["state"], "open", "{state}");
    assert!(state["health"]["reason"].as_str().is_some_and(|r| r.contains(&digest)), "{state}");
    let again = host.upload(&core);
    assert_eq!(host.activate("router", &again, json!({})).body["generation"], 3);
    assert_eq!(host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["health"]["state"], "closed");
}

#[test]
fn a_signal_lets_a_running_stream_end() {
    let host = host(&[]);
    let body = json!({ "model": "demo:f16", "prompt": "Ownership is", "temperature": 0, "max_tokens": 400, "ignore_eos": true });
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| host.stream(&body));
        let running = || {
            let text = host.get("/metrics").body;
            text.as_str().is_some_and(|t| {
                t.lines().any(|l| l == "vllm:num_requests_running{engine=\"cpu\",model_name=\"demo:f16\"} 1")
            })
        };
        assert!(looks().any(|_| running()), "the stream starts");
        host.signal("-TERM");
        let streamed = stream.join().expect("no panic").expect("a stream that has begun ends");
        assert_eq!((streamed.tokens.len(), streamed.finish.as_str()), (400, "length"));
    });
}

#[test]
fn a_start_writes_the_lines_that_are_missing_and_no_others() {
    let host = host(&[]);
    let digest = host.builtin("route-prefix-aware");
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    let weights = host.admin("PUT", "/admin/v1/aliases/demo", &json!({ "weights": { "demo:f16": 1 } }));
    assert_eq!(weights.status, 200, "{weights:?}");
    // More entries than a start reads back.
    let file = host.folder().join("journal.jsonl");
    let last = journal(&host).last().and_then(|e| e["sequence"].as_u64()).expect("an entry");
    let mut lines = std::fs::read_to_string(&file).expect("a journal");
    for sequence in last + 1..last + 5_001 {
        let line = json!({ "sequence": sequence, "at_unix_ms": 1, "actor": "t", "event": "deleted", "digest": "x" });
        lines += &format!("{line}\n");
    }
    std::fs::write(&file, lines).expect("a journal");
    let written = |host: &pointsman_tests::Host| -> Vec<Value> {
        let by_start = |entry: &Value| entry["actor"] == "startup" && entry["sequence"].as_u64() > Some(last + 5_000);
        let events = journal(host).into_iter().filter(by_start).map(|entry| entry["event"].clone());
        events.filter(|event| event != "differs").collect()
    };
    let host = host.restart(&[]);
    assert_eq!(written(&host), Vec::<Value>::new(), "every line was written once");
    assert_eq!(host.activate("router", "native", json!({})).status, 200);
    // As if it had died between the document and the line.
    let text = std::fs::read_to_string(&file).expect("a journal");
    let (before, _) = text.trim_end().rsplit_once('\n').expect("lines");
    std::fs::write(&file, format!("{before}\n")).expect("a journal");
    assert_eq!(written(&host.restart(&[])), ["recovered"]);
}
