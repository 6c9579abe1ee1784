//! The contract with guests: whatever a guest does wrong, in whatever slot, no request pays for it, and it shows.
//!
//! Tables of deeds (`plugins/fixtures/misdeeds`), each with what must come of it. One host per slot, on real sockets; every
//! row is activated, driven until its deed has happened, looked up in metrics, health and journal, and removed again.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken host should stop the test where it is")]

mod admission;
mod deeds;
mod handover;
mod refused;
mod versions;

use std::sync::atomic::{AtomicU64, Ordering};

use pointsman_tests::{Answer, Host, root};
use serde_json::{Value, json};

/// A host with one router instance, so that calls are counted in one place, a starvation bound that a test can wait for, and
/// a KV pool that a few requests fill.
fn host() -> Host {
    let settings = [
        ("POLICY__ROUTER_INSTANCES", "1"),
        ("SCHED__STARVATION_MS", "20"),
        ("ENGINE__KV_MIB", "1"),
        ("LOG__LEVEL", "off"),
    ];
    Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), &settings)
}

/// A committed fixture.
fn fixture(name: &str) -> Vec<u8> {
    let path = root().join(format!("plugins/prebuilt/fixture-{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A component built against 0.1.0 of the package, which is never built again.
fn frozen(name: &str) -> Vec<u8> {
    let path = root().join(format!("tests/contract/frozen/0.1.0/{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// One short request, whose prompt fills a block that no other has; it must be served.
fn served(host: &Host, why: &str) -> Answer {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let prompt = format!("{number}, and that once more is {number}, as we have known for long: Rust is a");
    let answer = host.post("/v1/completions", &json!({ "model": "demo", "prompt": prompt, "max_tokens": 2 }));
    assert_eq!(answer.status, 200, "{why}: {answer:?}");
    assert!(answer.body["choices"][0]["text"].is_string(), "{why}: {answer:?}");
    answer
}

/// The state of a slot.
fn slot(host: &Host, name: &str) -> Value {
    host.admin("GET", &format!("/admin/v1/slots/{name}"), &Value::Null).body
}

/// The journal as text, one JSON object a line.
fn journal(host: &Host) -> String {
    let body = host.admin("GET", "/admin/v1/journal", &Value::Null).body;
    body.as_str().map_or_else(|| body.to_string(), str::to_owned)
}
