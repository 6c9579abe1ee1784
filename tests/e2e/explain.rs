//! Why a request went where it went, from a running host: through the admin API and as a person asks.

use std::process::Command;

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::host;

fn complete(host: &Host, id: &str) {
    let headers = [("content-type", "application/json"), ("x-request-id", id), ("x-plan", "gold")];
    let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 4, "temperature": 0 }).to_string();
    let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn a_request_is_explained_and_the_previous_policy_is_asked() {
    let host = host(&[]);
    complete(&host, "first");
    let why = host.admin("GET", "/admin/v1/requests/first", &Value::Null).body;
    let unavailable = why["previous"]["unavailable"].as_str().unwrap_or_default();
    assert!(unavailable.contains("no previous policy"), "{why}");
    let digest = host.builtin("route-weighted");
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    complete(&host, "second");
    let why = host.admin("GET", "/admin/v1/requests/second", &Value::Null).body;
    assert_eq!((&why["state"], &why["finish"]), (&json!("finished"), &json!("length")), "{why}");
    let decision = &why["decision"];
    assert!(decision["revision"].as_str().is_some_and(|r| r.starts_with("route-weighted@")), "{why}");
    assert_eq!(decision["rows"], json!(["demo:f16@cpu", "demo:q8_0@cpu"]), "{why}");
    let row = decision["chosen"]["row"].as_u64().expect("a row");
    assert_eq!(decision["rows"][usize::try_from(row).expect("small")], decision["chosen"]["replica"], "{why}");
    let before = &why["previous"];
    assert!(before["revision"].as_str().is_some_and(|r| r.starts_with("route-least-loaded@")), "{why}");
    assert!(before["generation"] == 1 && before["row"].is_u64(), "{why}");
    let order = ["admitted", "routed", "scheduled", "first_token", "ended"].map(|s| why["stages_us"][s].as_u64());
    assert!(order.iter().all(Option::is_some) && order[2..].is_sorted(), "{why}");

    let output = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"))
        .args(["policy", "explain", "second", "--url", &host.admin])
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    for part in
        ["request second  finished: length", "router  route-weighted@", "before  route-least-loaded@", "prefill"]
    {
        assert!(output.status.success() && said.contains(part), "{part}: {output:?}");
    }
}

/// Records so many lines of a slot, while requests come.
fn record(host: &Host, slot: &str, limit: usize) -> Vec<Value> {
    let path = format!("/admin/v1/slots/{slot}/record?limit={limit}&seconds=60");
    let mut lines = std::thread::scope(|scope| {
        let recording = scope.spawn(|| host.admin("GET", &path, &Value::Null));
        let mut requests = 0;
        while !recording.is_finished() && requests < 1_000 {
            // No two prompts share a block, so that caches fill up.
            let prompt = format!("{requests} is the number of a request to {slot}. ").repeat(8);
            let body = json!({ "model": "demo:f16", "prompt": prompt, "max_tokens": 3, "ignore_eos": true });
            let answer = host.post("/v1/completions", &body);
            assert_eq!(answer.status, 200, "{answer:?}");
            requests += 1;
        }
        let answer = recording.join().expect("no panic");
        assert_eq!(answer.status, 200, "{answer:?}");
        let text = answer.body.as_str().expect("lines").to_owned();
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    });
    assert_eq!(lines.len(), limit + 1, "{slot}: {lines:?}");
    assert_eq!(lines.pop(), Some(json!({ "dropped": 0 })), "{slot}");
    assert!(lines.iter().all(|line| line["slot"] == slot), "{lines:?}");
    lines
}

#[test]
fn decisions_of_router_and_scheduler_are_recorded() {
    let host = host(&[]);
    let router = record(&host, "router", 2);
    assert!(router[0]["chosen"].is_u64() && router[0]["replicas"]["id"].is_array(), "{router:?}");
    let scheduler = record(&host, "scheduler", 3);
    let replica = &scheduler[0]["replica"];
    assert_eq!(scheduler[0]["call"], "resync", "{scheduler:?}");
    let next = scheduler[1..].iter().find(|line| line["replica"] == *replica);
    assert!(next.is_none_or(|line| line["call"] == "step"), "{scheduler:?}");
}

#[test]
fn decisions_of_admission_cache_and_sampler_are_recorded() {
    // A cache so small that it is full after a few requests.
    let host = host(&[("ENGINE__KV_MIB", "1")]);
    let activate = |slot: &str, name: &str, config: Value| {
        let activated = host.activate(slot, &host.builtin(name), config);
        assert_eq!(activated.status, 200, "{activated:?}");
    };
    activate("admission", "admit-token-bucket", json!({ "tokens_per_second": 1_000_000, "burst_tokens": 1_000_000 }));
    activate("kv-retention", "kv-lru-with-pins", json!({ "tenants": ["default"] }));
    activate("sampler", "sampler-allowlist", json!({ "allow": [40, 41] }));
    for line in record(&host, "admission", 20) {
        assert!(line["revision"].as_str().is_some_and(|r| r.starts_with("admit-token-bucket@")), "{line}");
        if line["call"] == "admit" {
            assert_eq!((&line["answer"], &line["request"]["tenant"]), (&json!({ "accept": true }), &json!("default")));
            assert_eq!(line["load"]["in_flight_limit"], 256, "{line}");
        } else {
            assert_eq!((&line["call"], &line["tenants"][0][1]), (&json!("settle"), &json!("default")), "{line}");
            assert_eq!(line["endings"][0]["outcome"], "finished", "{line}");
        }
    }
    for line in record(&host, "kv-retention", 2) {
        let rows = line["blocks"]["prefix"].as_array().map_or(0, Vec::len);
        assert_eq!((&line["replica"], &line["tenants"][0][1]), (&json!("demo:f16@cpu"), &json!("default")), "{line}");
        assert_eq!(line["answer"]["keep"].as_array().map(Vec::len), Some(rows), "all blocks are the tenant's: {line}");
    }
    let lines = record(&host, "sampler", 4);
    let started = &lines[0]["started"][0];
    assert_eq!((&started["tenant"], &lines[0]["variant"]), (&json!("default"), &json!("demo:f16")), "{lines:?}");
    let words = lines[0]["words"].as_array().expect("a list");
    assert_eq!(words[0][0], started["id"], "{lines:?}");
    let allowed = words[0][1]["allow"].as_array().expect("an edit");
    assert!(allowed.contains(&json!(40)) && allowed.contains(&json!(41)), "{lines:?}");
    assert!(lines.iter().any(|line| line["tokens"].as_array().is_some_and(|tokens| !tokens.is_empty())), "{lines:?}");
}

#[test]
fn a_refusal_at_the_door_is_explained() {
    let host = host(&[]);
    let bucket = host.builtin("admit-token-bucket");
    for burst in [1_000_000, 0] {
        let config = json!({ "tokens_per_second": 1_000_000, "burst_tokens": burst });
        assert_eq!(host.activate("admission", &bucket, config).status, 200);
        let headers = [("content-type", "application/json"), ("x-request-id", "asked"), ("x-tenant-id", "acme")];
        let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 2 }).to_string();
        let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
        assert_eq!(answer.status, if burst == 0 { 403 } else { 200 }, "{answer:?}");
    }
    let why = host.admin("GET", "/admin/v1/requests/asked", &Value::Null).body;
    let admission = &why["admission"];
    assert_eq!((&why["state"], &why["decision"]), (&json!("rejected"), &Value::Null), "{why}");
    assert_eq!(admission["answer"]["reject"]["reason"], "not-allowed", "{why}");
    assert_eq!(
        (&admission["request"]["tenant"], &admission["load"]["in_flight"]),
        (&json!("acme"), &json!(0)),
        "{why}"
    );
    assert_eq!(
        (&admission["previous"]["answer"], &admission["previous"]["generation"]),
        (&json!({ "accept": true }), &json!(1))
    );
    let output = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"))
        .args(["policy", "explain", "asked", "--url", &host.admin])
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    for part in [
        "request asked  rejected: a policy does not allow the request: tenant `acme` may not use this service",
        "model   demo  tenant acme",
        "said: reject (not-allowed) tenant `acme` may not use this service",
        "would have said: accept",
    ] {
        assert!(output.status.success() && said.contains(part), "{part}: {output:?}");
    }
}
