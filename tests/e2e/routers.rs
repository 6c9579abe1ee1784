//! Routers of the shipped set on a running host: a canary by header, sessions that stay, a preferred kind of device, and one that
//! learns from a hook.

use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::host;

/// Requests until something must have happened.
const PATIENCE: usize = 3_000;

fn complete(host: &Host, model: &str, headers: &[(&str, &str)]) -> Answer {
    let body = json!({ "model": model, "prompt": "Rust is", "max_tokens": 2, "ignore_eos": true }).to_string();
    let headers = [&[("content-type", "application/json")], headers].concat();
    let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    answer
}

fn variant(host: &Host, model: &str, headers: &[(&str, &str)]) -> String {
    let answer = complete(host, model, headers);
    answer.headers.get("x-pointsman-variant").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn route(host: &Host, name: &str, config: Value) {
    let activated = host.activate("router", &host.builtin(name), config);
    assert_eq!(activated.status, 200, "{activated:?}");
}

#[test]
fn a_header_chooses_the_canary_and_a_share_of_the_rest_follows() {
    let host = host(&[]);
    let (stable, canary) = ("demo:f16", "demo:q8_0");
    // The second variant is the canary, and a header with another value keeps a request off it.
    for (share, header, expect) in [
        (0, Some("1"), canary),
        (0, Some("0"), stable),
        (0, None, stable),
        (1_000, None, canary),
        (1_000, Some("0"), stable),
    ] {
        route(&host, "route-canary-by-header", json!({ "share_permille": share }));
        let headers: Vec<(&str, &str)> = header.iter().map(|value| ("x-canary", *value)).collect();
        for _ in 0..4 {
            assert_eq!(variant(&host, "demo", &headers), expect, "{share} {header:?}");
        }
    }
    assert_eq!(variant(&host, canary, &[("x-canary", "0")]), canary, "a pinned variant is served all the same");
    // Half of the sessions, each always on its side.
    route(&host, "route-canary-by-header", json!({ "share_permille": 500 }));
    let sides = || (0..32).map(|i| variant(&host, "demo", &[("x-session-id", &format!("session-{i}"))]));
    let first: Vec<String> = sides().collect();
    assert!((6..=26).contains(&first.iter().filter(|side| *side == canary).count()), "{first:?}");
    assert_eq!(sides().collect::<Vec<_>>(), first);
    // The same by a label of the operator's.
    let host = host.reconfigure("[replicas.\"demo:f16@cpu\"]\nlabels = { track = \"canary\" }\n");
    let by_label = json!({ "column": "replica.label.track", "equals": "canary" });
    route(&host, "route-canary-by-header", by_label);
    assert_eq!(variant(&host, "demo", &[("x-canary", "1")]), stable, "it carries the label now");
    assert_eq!(variant(&host, "demo", &[]), canary);
}

#[test]
fn a_session_leaves_a_saturated_replica_and_comes_back() {
    let host = host(&[("SCHED__MAX_RUNNING", "1")]);
    route(&host, "route-sticky-until-saturated", json!({ "max_waiting": 1, "min_free_percent": 0 }));
    let of = |i: usize| variant(&host, "demo", &[("x-session-id", &format!("session-{i}"))]);
    let homes: Vec<String> = (0..16).map(of).collect();
    for home in ["demo:f16", "demo:q8_0"] {
        assert!(homes.iter().any(|found| found == home), "sessions are spread: {homes:?}");
    }
    assert_eq!((0..16).map(of).collect::<Vec<_>>(), homes, "and stay");
    let sticks = homes.iter().position(|home| home == "demo:f16").expect("asserted above");
    let loading = AtomicBool::new(true);
    std::thread::scope(|scope| {
        // One runs and the others wait, as long as they are asked for.
        for _ in 0..6 {
            let (host, loading) = (&host, &loading);
            scope.spawn(move || {
                while loading.load(Ordering::Acquire) {
                    complete(host, "demo:f16", &[]);
                }
            });
        }
        let moved = (0..PATIENCE).find(|_| of(sticks) == "demo:q8_0");
        loading.store(false, Ordering::Release);
        assert!(moved.is_some(), "requests wait there, and it never went elsewhere");
    });
    assert_eq!(of(sticks), "demo:f16", "nobody waits there any more");
}

#[test]
fn a_preferred_kind_of_device_serves_first() {
    let host = host(&[("ENGINE__DEVICES", "[\"cpu\", \"null\"]")]);
    let device = || {
        let answer = complete(&host, "demo:f16", &[]);
        let replica = answer.headers.get("x-pointsman-replica").and_then(|v| v.to_str().ok()).unwrap_or_default();
        replica.split_once('@').map(|(_, device)| device.to_owned()).expect("variant@device")
    };
    for (prefer, expect) in
        [(json!(["null", "cpu"]), "null"), (json!(["cuda", "cpu"]), "cpu"), (json!(["null"]), "null")]
    {
        route(&host, "route-device-affinity", json!({ "prefer": prefer }));
        for _ in 0..4 {
            assert_eq!(device(), expect, "{prefer}");
        }
    }
    let body = json!({ "component": host.builtin("route-device-affinity"), "config": { "prefer": ["gpu"] } });
    let refused = host.admin("PUT", "/admin/v1/slots/router", &body);
    assert!(refused.status == 422 && refused.body.to_string().contains("known are cuda"), "{refused:?}");
}

/// What the router said of a request.
fn said(host: &Host, n: usize) -> Value {
    let id = format!("learner-{n}");
    complete(host, "demo", &[("x-request-id", &id)]);
    host.admin("GET", &format!("/admin/v1/requests/{id}"), &Value::Null).body["decision"]["answer"].clone()
}

#[test]
fn a_router_learns_what_a_hook_writes_into_their_namespace() {
    let host = host(&[]);
    let activate = |slot: &str, name: &str, namespace: &str| {
        let body = json!({ "component": host.builtin(name), "config": {}, "state_namespace": namespace });
        let activated = host.admin("PUT", &format!("/admin/v1/slots/{slot}"), &body);
        assert_eq!(activated.status, 200, "{activated:?}");
    };
    let abstains = json!({ "abstain": true });
    activate("router", "route-bandit", "outcomes");
    assert_eq!(said(&host, 0), abstains, "nothing is known yet");
    activate("telemetry.outcomes", "hook-outcomes", "outcomes");
    let learned = (1..PATIENCE).find(|&n| said(&host, n)["pick"].is_u64());
    assert!(learned.is_some(), "the hook has seen {PATIENCE} outcomes and the router none");
    activate("router", "route-bandit", "elsewhere");
    assert_eq!(said(&host, PATIENCE), abstains, "another namespace");
    activate("router", "route-bandit", "outcomes");
    assert!(said(&host, PATIENCE + 1)["pick"].is_u64(), "what was learned outlives the swap");
    let hook = host.admin("GET", "/admin/v1/slots/telemetry.outcomes", &Value::Null).body;
    assert_eq!(hook["active"]["state_namespace"], "outcomes", "{hook}");
    assert_eq!(hook["counters"]["faults"], json!({}), "{hook}");
}
