//! The stock OpenAI client, as people use it; skipped where Python or the package is absent.

use std::process::Command;

use pointsman_tests::{root, skip};
use serde_json::{Value, json};

use crate::host;

#[test]
fn the_stock_openai_client_chats_streams_and_lists() {
    let present = Command::new("python3").args(["-c", "import openai"]).output();
    if !present.is_ok_and(|output| output.status.success()) && skip("openai", "python3 has no package `openai`") {
        return;
    }
    let host = host(&[]);
    let script = root().join("tests/e2e/client.py");
    let output = Command::new("python3").arg(script).arg(&host.data).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_door_answers_wrong_input_with_what_to_change() {
    let host = host(&[]);
    let json = [("content-type", "application/json")];
    let url = |path: &str| format!("{}{path}", host.data);
    let long = "word ".repeat(3_000);
    for (body, status, param, part) in [
        (&br#"{"model": "demo""#[..], 400, Value::Null, "JSON"),
        (b"\xff\xfe", 400, Value::Null, "UTF-8"),
        (br#"{"model": 5, "prompt": "x"}"#, 400, json!("model"), "string"),
        (br#"{"model": "demo"}"#, 400, json!("prompt"), "prompt"),
        (br#"{"model": "nope", "prompt": "x"}"#, 404, json!("model"), "demo"),
        (br#"{"model": "demo", "prompt": "x", "temperature": 9}"#, 400, json!("temperature"), "2"),
        (format!(r#"{{"model": "demo", "prompt": "{long}"}}"#).as_bytes(), 400, json!("prompt"), "context"),
    ] {
        let answer = host.send("POST", &url("/v1/completions"), &json, body);
        let error = &answer.body["error"];
        assert_eq!(
            (answer.status, &error["param"]),
            (status, &param),
            "{}: {answer:?}",
            String::from_utf8_lossy(&body[..body.len().min(80)])
        );
        assert!(error["message"].as_str().is_some_and(|m| m.contains(part)), "{error}");
    }
    let large = vec![b' '; 9 << 20];
    assert_eq!(host.send("POST", &url("/v1/completions"), &json, &large).status, 413);
    assert_eq!(host.get("/v1/nothing").status, 404);
    assert_eq!(host.get("/v1/completions").status, 405);
}

#[test]
fn the_admin_plane_refuses_what_is_not_a_policy() {
    let host = host(&[]);
    let before = host.admin("GET", "/admin/v1/slots", &Value::Null).body;
    let upload = |bytes: &[u8]| {
        host.send(
            "POST",
            &format!("{}/admin/v1/components", host.admin),
            &[("content-type", "application/wasm")],
            bytes,
        )
    };
    for (bytes, part) in
        [(&b"fn main() {}\n"[..], "text"), (b"\0asm\x01\0\0\0", "component type"), (b"\x7fELF....", "wasm")]
    {
        let answer = upload(bytes);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.body["error"]["message"].as_str().is_some_and(|m| m.contains(part)), "{answer:?}");
    }
    let scheduler = host.builtin("sched-fcfs");
    let router = host.builtin("route-weighted");
    for (slot, component, config, status) in [
        ("router", scheduler.as_str(), json!({}), 400),
        ("router", "sha256:00", json!({}), 404),
        ("router", router.as_str(), json!({ "no_such_key": 1 }), 422),
        ("nowhere", router.as_str(), json!({}), 404),
    ] {
        let answer = host.activate(slot, component, config);
        assert_eq!(answer.status, status, "{slot} {component}: {answer:?}");
        assert!(answer.body["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{answer:?}");
    }
    let foreign =
        host.send("GET", &format!("{}/admin/v1/slots", host.admin), &[("origin", "http://evil.example")], b"");
    assert_eq!(foreign.status, 403, "{foreign:?}");
    let served = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust", "max_tokens": 1 }));
    assert_eq!(served.status, 200, "the old policies still serve: {served:?}");
    let after = host.admin("GET", "/admin/v1/slots", &Value::Null).body;
    let active =
        |slots: &Value| slots["data"].as_array().map(|s| s.iter().map(|s| s["active"].clone()).collect::<Vec<_>>());
    assert_eq!(active(&after), active(&before));
}
