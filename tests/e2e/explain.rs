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

#[test]
fn decisions_of_router_and_scheduler_are_recorded() {
    let host = host(&[]);
    for (slot, limit) in [("router", 2), ("scheduler", 3)] {
        let path = format!("/admin/v1/slots/{slot}/record?limit={limit}&seconds=60");
        let lines = std::thread::scope(|scope| {
            let recording = scope.spawn(|| host.admin("GET", &path, &Value::Null));
            let mut requests = 0;
            while !recording.is_finished() && requests < 1_000 {
                complete(&host, &format!("{slot}-{requests}"));
                requests += 1;
            }
            let answer = recording.join().expect("no panic");
            assert_eq!(answer.status, 200, "{answer:?}");
            let text = answer.body.as_str().expect("lines").to_owned();
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
        });
        assert_eq!(lines.len(), limit + 1, "{lines:?}");
        assert_eq!(lines[limit], json!({ "dropped": 0 }));
        assert!(lines[..limit].iter().all(|line| line["slot"] == slot), "{lines:?}");
        if slot == "scheduler" {
            let replica = &lines[0]["replica"];
            assert_eq!(lines[0]["call"], "resync", "{lines:?}");
            let next = lines[1..limit].iter().find(|line| line["replica"] == *replica);
            assert!(next.is_none_or(|line| line["call"] == "step"), "{lines:?}");
        } else {
            assert!(lines[0]["chosen"].is_u64() && lines[0]["replicas"]["id"].is_array(), "{lines:?}");
        }
    }
}
