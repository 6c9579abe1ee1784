//! Shadows on a running host: asked about live decisions, compared, explained, never obeyed, whatever they do.

use std::process::Command;

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::{host, journal};

/// Requests until something must have happened.
const PATIENCE: usize = 6_000;

/// Serves a request; who decided it.
fn serve(host: &Host, id: &str) -> String {
    let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 3, "temperature": 0 });
    serve_for(host, (id, "default"), &body)
}

/// The same of a tenant.
fn serve_for(host: &Host, (id, tenant): (&str, &str), body: &Value) -> String {
    let headers = [("content-type", "application/json"), ("x-request-id", id), ("x-tenant-id", tenant)];
    let body = body.to_string();
    let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "a shadow costs no request: {answer:?}");
    answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

/// Everything is put to the candidate, in periods so short that a test sees some.
fn plan(component: &str, config: Value) -> Value {
    json!({
        "component": component, "config": config, "mode": "shadow", "sample": 1.0, "seed": 1,
        "block_ms": 300, "burn_in_ms": 0, "settle_ms": 1_000, "min_periods": 2,
    })
}

fn start(host: &Host, slot: &str, body: &Value) -> String {
    let started = host.admin("POST", &format!("/admin/v1/slots/{slot}/rollouts"), body);
    assert_eq!(started.status, 201, "{started:?}");
    started.body["id"].as_str().expect("an id").to_owned()
}

fn report(host: &Host, slot: &str, id: &str) -> Value {
    let found = host.admin("GET", &format!("/admin/v1/slots/{slot}/rollouts/{id}"), &Value::Null);
    assert_eq!(found.status, 200, "{found:?}");
    found.body
}

fn steer(host: &Host, slot: &str, id: &str, verb: &str) -> Value {
    let steered = host.admin("POST", &format!("/admin/v1/slots/{slot}/rollouts/{id}/{verb}"), &Value::Null);
    assert_eq!(steered.status, 200, "{steered:?}");
    steered.body
}

/// Serves requests until the report says so; the policy that is active decides each of them.
fn until(host: &Host, slot: &str, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let router = serve(host, "first");
    let found = (0..PATIENCE).find_map(|n| {
        assert_eq!(serve(host, &format!("{id}-{n}")), router, "the shadow decides nothing");
        Some(report(host, slot, id)).filter(&holds)
    });
    found.unwrap_or_else(|| panic!("{}", report(host, slot, id)))
}

/// The same, where nobody looks who decided.
fn until_by(
    host: &Host,
    (slot, id): (&str, &str),
    mut serve: impl FnMut(usize),
    holds: impl Fn(&Value) -> bool,
) -> Value {
    let found = (0..PATIENCE).find_map(|n| {
        serve(n);
        Some(report(host, slot, id)).filter(&holds)
    });
    found.unwrap_or_else(|| panic!("{}", report(host, slot, id)))
}

fn periods(report: &Value) -> u64 {
    report["evidence"]["shadow"]["n"].as_u64().expect("a number")
}

fn active(host: &Host, slot: &str) -> String {
    let state = host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null).body;
    state["active"]["revision"].as_str().expect("a revision").to_owned()
}

fn fixture(host: &Host, name: &str) -> String {
    let path = pointsman_tests::root().join(format!("plugins/prebuilt/fixture-{name}.wasm"));
    host.upload(&std::fs::read(path).expect("a committed fixture"))
}

#[test]
fn an_equal_router_agrees_and_can_be_promoted() {
    let host = host(&[]);
    let id = start(&host, "router", &plan(&host.builtin("route-least-loaded"), json!({ "sequence_tokens": 16 })));
    let found = until(&host, "router", &id, |r| periods(r) >= 3);
    let shadow = &found["evidence"]["shadow"];
    assert_eq!(
        (&shadow["share"], &shadow["lower"], &shadow["upper"]),
        (&json!(1.0), &json!(1.0), &json!(1.0)),
        "{found}"
    );
    let answers = &shadow["answers"];
    assert!(answers["agreed"].as_u64() >= Some(3) && answers["call_p50_ns"].as_u64() > Some(0), "{found}");
    assert_eq!((&answers["unanswered"], &found["candidate"]["policy"]["faults"]), (&json!(0), &json!(0)), "{found}");
    assert_eq!((&found["candidate"]["requests"], &found["percent"]), (&json!(0), &json!(0)), "{found}");
    let metrics = host.get("/metrics").body;
    let counted = "pointsman_shadow_decisions_total{outcome=\"agreed\",slot=\"router\"}";
    assert!(metrics.as_str().is_some_and(|text| text.contains(counted)), "{metrics}");
    assert_eq!(steer(&host, "router", &id, "promote")["phase"]["is"], "promoted");
    assert!(serve(&host, "after").ends_with(";g=2"));
    // What is scraped may be a moment old.
    let text = || host.get("/metrics").body.as_str().expect("text").to_owned();
    assert!((0..PATIENCE).any(|_| !text().contains("pointsman_shadow_decisions_total{")), "its series are gone");
    let ended = report(&host, "router", &id);
    assert!(periods(&ended) >= 3, "what it came to stays in the report: {ended}");
}

#[test]
fn another_router_differs_and_a_request_tells_how() {
    let host = host(&[]);
    let id = start(&host, "router", &plan(&fixture(&host, "router"), json!({ "do": "reject" })));
    let found = until(&host, "router", &id, |r| periods(r) >= 2);
    let shadow = &found["evidence"]["shadow"];
    assert_eq!((&shadow["share"], &shadow["answers"]["agreed"]), (&json!(0.0), &json!(0)), "{found}");
    assert!(shadow["answers"]["differed"]["would-refuse"].as_u64() >= Some(2), "{found}");
    let why = host.admin("GET", &format!("/admin/v1/requests/{id}-0"), &Value::Null).body;
    assert_eq!(why["shadow"]["answer"]["reject"]["reason"], "quota", "{why}");
    assert!(why["shadow"]["revision"].as_str().is_some_and(|r| r.starts_with("fixture-router@")), "{why}");
    let run = |arguments: &[&str], expect: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
        let output = command.arg("policy").args(arguments).args(["--url", &host.admin]).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout);
        expect.iter().for_each(|part| assert!(output.status.success() && said.contains(part), "{part}: {output:?}"));
    };
    run(&["explain", &format!("{id}-0")], &["shadow  fixture-router@", "would have said: reject (quota)"]);
    run(
        &["rollout", "status", &id],
        &["is asked about 100 % of what", "agreement                0.0000", "would-refuse"],
    );
    assert_eq!(steer(&host, "router", &id, "abort")["phase"]["cause"]["kind"], "asked");
    let least_loaded = host.builtin("route-least-loaded");
    let arguments = ["start", "router", &least_loaded, "--mode", "shadow", "--sample", "0.5"];
    run(&[&["rollout"][..], &arguments].concat(), &["router-3  shadow  running", "is asked about 50 %"]);
}

#[test]
fn a_shadow_that_traps_or_spins_is_off_at_its_third_fault_and_no_request_notices() {
    for deed in ["trap", "spin"] {
        let host = host(&[]);
        let before = active(&host, "router");
        let id = start(&host, "router", &plan(&fixture(&host, "router"), json!({ "do": deed, "after": 40 })));
        let ended = until(&host, "router", &id, |r| r["phase"]["is"] == "aborted");
        assert_eq!(ended["phase"]["cause"]["kind"], "hard", "{deed}: {ended}");
        assert!(ended["phase"]["cause"]["what"].as_str().is_some_and(|w| w.starts_with("3 faults in ")), "{ended}");
        assert_eq!(active(&host, "router"), before, "{deed}");
        let slot = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
        assert_eq!((&slot["counters"]["fallbacks"], &slot["health"]["state"]), (&json!(0), &json!("closed")), "{slot}");
        // The observer journals faults after it has looked at rollouts.
        let n_faults = || journal(&host).iter().filter(|line| line["event"] == "fault").count();
        assert!((0..PATIENCE).any(|n| !serve(&host, &format!("after-{n}")).is_empty() && n_faults() == 3), "{deed}");
    }
}

#[test]
fn a_restart_pauses_or_resumes_a_shadow() {
    for (on_restart, phase) in [("pause", "paused"), ("resume", "running")] {
        let host = host(&[]);
        let mut body = plan(&host.builtin("route-weighted"), json!({}));
        body["on_restart"] = on_restart.into();
        let id = start(&host, "router", &body);
        let before = until(&host, "router", &id, |r| periods(r) >= 1);
        let host = host.restart(&[]);
        let after = report(&host, "router", &id);
        assert_eq!(after["phase"]["is"], phase, "{after}");
        assert!(periods(&after) >= periods(&before), "{after}");
        if phase == "paused" {
            let calls = |r: &Value| r["candidate"]["policy"]["calls"].as_u64();
            (0..20).for_each(|n| assert!(serve(&host, &format!("paused-{n}")).ends_with(";g=1")));
            assert_eq!(calls(&report(&host, "router", &id)), Some(0), "nothing is put to it while it is paused");
            steer(&host, "router", &id, "resume");
        }
        until(&host, "router", &id, |r| periods(r) > periods(&after));
    }
}

#[test]
fn a_plan_that_says_nothing_is_refused_with_the_reason() {
    let host = host(&[]);
    let nothing = host.admin("POST", "/admin/v1/slots/admission/rollouts", &plan("native", json!({})));
    assert!(nothing.status == 404 && nothing.body.to_string().contains("activate `native`"), "{nothing:?}");
    for (slot, member, value, expect) in [
        ("router", "sample", json!(0), "`sample` must be above 0 and at most 1"),
        ("router", "steps", json!([50]), "takes no `steps`"),
        ("router", "guards", json!([{ "metric": "error-rate", "margin": 0.1 }]), "takes no `guards`"),
        ("router", "auto_promote", json!(true), "promote it by hand"),
        ("admission", "steps", json!([50]), "takes no `steps`"),
        ("sampler", "auto_promote", json!(true), "promote it by hand"),
        ("telemetry.slo-log", "sample", json!(1), "a hook is heard beside the others in any case"),
        ("telemetry.slo-log", "sample", json!(1), "PUT as `telemetry.<another name>`"),
    ] {
        let mut body = plan("native", json!({}));
        body[member] = value;
        let answer = host.admin("POST", &format!("/admin/v1/slots/{slot}/rollouts"), &body);
        assert!(answer.status == 400 && answer.body.to_string().contains(expect), "{slot}, {expect}: {answer:?}");
    }
}

#[test]
fn a_scheduler_is_shadowed_too() {
    let host = host(&[]);
    assert_eq!(host.activate("scheduler", &host.builtin("sched-fcfs"), json!({})).status, 200);
    let id = start(&host, "scheduler", &plan(&host.builtin("sched-fcfs"), json!({})));
    let found = until(&host, "scheduler", &id, |r| periods(r) >= 3);
    let shadow = &found["evidence"]["shadow"];
    assert_eq!((&shadow["share"], &shadow["answers"]["unanswered"]), (&json!(1.0), &json!(0)), "{found}");
    assert_eq!(steer(&host, "scheduler", &id, "promote")["phase"]["is"], "promoted");
    assert!(!serve(&host, "after").is_empty());

    let id = start(&host, "scheduler", &plan(&fixture(&host, "scheduler"), json!({ "do": "trap", "after": 12 })));
    let ended = until(&host, "scheduler", &id, |r| r["phase"]["is"] == "aborted");
    assert_eq!(ended["phase"]["cause"]["kind"], "hard", "{ended}");
    let slot = host.admin("GET", "/admin/v1/slots/scheduler", &Value::Null).body;
    assert_eq!((&slot["counters"]["fallbacks"], &slot["health"]["state"]), (&json!(0), &json!("closed")), "{slot}");

    let native = host.admin("POST", "/admin/v1/slots/scheduler/rollouts", &plan("native", json!({})));
    assert!(native.status == 400 && native.body.to_string().contains("`sched-fcfs` orders"), "{native:?}");
}

#[test]
fn a_quota_is_tried_beside_an_open_door() {
    let host = host(&[]);
    assert_eq!(host.activate("admission", "native", json!({})).status, 200);
    let bucket = host.builtin("admit-token-bucket");
    let id = start(&host, "admission", &plan(&bucket, json!({ "tokens_per_second": 1_000_000 })));
    let found = until(&host, "admission", &id, |r| periods(r) >= 2);
    let shadow = &found["evidence"]["shadow"];
    assert_eq!((&shadow["share"], &shadow["answers"]["unanswered"]), (&json!(1.0), &json!(0)), "{found}");
    let why = host.admin("GET", &format!("/admin/v1/requests/{id}-0"), &Value::Null).body;
    assert_eq!((&why["admission"]["revision"], &why["admission"]["answer"]), (&json!("native"), &Value::Null), "{why}");
    assert_eq!(why["admission"]["shadow"]["answer"], json!({ "accept": true }), "{why}");
    assert_eq!(steer(&host, "admission", &id, "abort")["phase"]["cause"]["kind"], "asked");

    // One that lets nobody in: everybody is served all the same, until it is promoted.
    let id = start(&host, "admission", &plan(&bucket, json!({ "burst_tokens": 0 })));
    let found = until(&host, "admission", &id, |r| periods(r) >= 2);
    let answers = &found["evidence"]["shadow"]["answers"];
    assert_eq!((&found["evidence"]["shadow"]["share"], &answers["agreed"]), (&json!(0.0), &json!(0)), "{found}");
    assert!(answers["differed"]["would-refuse"].as_u64() >= Some(2), "{found}");
    let mut explain = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
    let output = explain.args(["policy", "explain", &format!("{id}-0"), "--url", &host.admin]).output();
    let said = output.expect("it starts").stdout;
    let line = "would have said: reject (not-allowed)";
    assert!(String::from_utf8_lossy(&said).contains(line), "{}", String::from_utf8_lossy(&said));
    assert_eq!(steer(&host, "admission", &id, "promote")["phase"]["is"], "promoted");
    let refused = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 3 }));
    assert_eq!(refused.status, 403, "{refused:?}");
}

#[test]
fn an_order_of_eviction_is_tried_beside_the_hosts() {
    // A cache so small that it is full after a few requests, of two tenants in turn.
    let host = host(&[("ENGINE__KV_MIB", "1")]);
    let serve = |n: usize| {
        let prompt = format!("{:03} is the number of a request to a small cache. ", n % 1_000).repeat(8);
        let body = json!({ "model": "demo:f16", "prompt": prompt, "max_tokens": 3, "ignore_eos": true });
        serve_for(&host, (&format!("kv-{n}"), ["pinned", "other"][n % 2]), &body);
    };
    assert_eq!(host.activate("kv-retention", "native", json!({})).status, 200);
    let config = json!({ "tenants": ["pinned"] });
    let pins = host.builtin("kv-lru-with-pins");
    let id = start(&host, "kv-retention", &plan(&pins, config.clone()));
    let found = until_by(&host, ("kv-retention", &id), serve, |r| periods(r) >= 2);
    let answers = &found["evidence"]["shadow"]["answers"];
    assert!(answers["agreed"].as_u64() > Some(0) && answers["differed"]["other-block"].as_u64() > Some(0), "{found}");
    assert_eq!((&answers["unanswered"], &found["candidate"]["policy"]["faults"]), (&json!(0), &json!(0)), "{found}");
    assert_eq!(steer(&host, "kv-retention", &id, "promote")["phase"]["is"], "promoted");

    let id = start(&host, "kv-retention", &plan(&pins, config));
    let found = until_by(&host, ("kv-retention", &id), serve, |r| periods(r) >= 2);
    assert_eq!(found["evidence"]["shadow"]["share"], json!(1.0), "the same policy gives up the same blocks: {found}");
}

#[test]
fn a_list_of_words_is_tried_and_changes_none() {
    let host = host(&[]);
    assert_eq!(host.activate("sampler", "native", json!({})).status, 200);
    let list = host.builtin("sampler-allowlist");
    let body =
        json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 8, "temperature": 0, "ignore_eos": true });
    let said = || host.post("/v1/completions", &body).body["choices"][0]["text"].clone();
    let free = said();
    let serve = |n: usize| drop(serve_for(&host, (&format!("sampler-{n}"), "default"), &body));
    let id = start(&host, "sampler", &plan(&list, json!({ "allow": [40, 41] })));
    let found = until_by(&host, ("sampler", &id), serve, |r| periods(r) >= 2);
    let answers = &found["evidence"]["shadow"]["answers"];
    assert_eq!((&found["evidence"]["shadow"]["share"], &answers["agreed"]), (&json!(0.0), &json!(0)), "{found}");
    assert!(answers["differed"]["would-edit"].as_u64() >= Some(8), "{found}");
    assert_eq!((said(), &answers["unanswered"]), (free.clone(), &json!(0)), "{found}");
    assert_eq!(steer(&host, "sampler", &id, "promote")["phase"]["is"], "promoted");
    assert_ne!(said(), free, "now it has a say");

    let id = start(&host, "sampler", &plan(&list, json!({ "allow": [41, 40] })));
    let serve = |n: usize| drop(serve_for(&host, (&format!("listed-{n}"), "default"), &body));
    let found = until_by(&host, ("sampler", &id), serve, |r| periods(r) >= 2);
    assert_eq!(found["evidence"]["shadow"]["share"], json!(1.0), "the same list: {found}");
}
