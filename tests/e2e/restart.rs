//! What is active survives a restart, also one without warning.

use serde_json::{Value, json};

use crate::host;

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
