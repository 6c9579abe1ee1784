//! Rollouts between the variants of an alias on a running host: one whose answers nobody wants loses its share, a good one is
//! promoted, tenants stay at their arm, a restart pauses, and who names a variant is in no experiment.

use std::io::{Read, Write};
use std::net::TcpStream;

use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use crate::trust::pointsman;
use crate::{host, journal};

/// Requests until something must have happened.
const PATIENCE: usize = 6_000;

const CONTROL: &str = "demo:f16";
const CANDIDATE: &str = "demo:q8_0";

/// The variant that served a tenant's request.
fn served(host: &Host, model: &str, tenant: &str) -> String {
    let body = json!({ "model": model, "prompt": "Rust is", "max_tokens": 2, "temperature": 0 }).to_string();
    let headers = [("content-type", "application/json"), ("x-tenant-id", tenant)];
    let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "a rollout costs no request: {answer:?}");
    answer.headers.get("x-pointsman-variant").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

/// Asks for many tokens and hangs up on the candidate.
fn ask_and_judge(host: &Host) {
    let address = host.data.trim_start_matches("http://");
    let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 150, "ignore_eos": true, "stream": true });
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).expect("the host listens");
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    let request = format!("{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).expect("it is taken");
    let (mut answer, mut piece) = (Vec::new(), [0; 4_096]);
    loop {
        let n = stream.read(&mut piece).expect("an answer");
        answer.extend_from_slice(&piece[..n]);
        let text = String::from_utf8_lossy(&answer);
        if n == 0 || (text.contains("\r\n\r\n") && text.contains(CANDIDATE)) {
            return;
        }
    }
}

/// An alias that one variant serves.
fn alone(host: &Host) {
    let put = host.admin("PUT", "/admin/v1/aliases/demo", &json!({ "weights": { CONTROL: 10 }, "sticky": "tenant" }));
    assert_eq!(put.status, 200, "{put:?}");
}

/// Periods so short that a test sees many of them.
fn plan(change: &Value) -> Value {
    let mut plan = json!({
        "candidate": CANDIDATE, "mode": "ab", "seed": 1, "sticky": "request",
        "block_ms": 300, "burn_in_ms": 0, "settle_ms": 2_000, "min_periods": 3,
        "guards": [{ "metric": "error-rate", "margin": 0.5 }],
    });
    change.as_object().expect("members").iter().for_each(|(name, value)| plan[name] = value.clone());
    plan
}

fn start(host: &Host, change: &Value) -> String {
    let started = host.admin("POST", "/admin/v1/aliases/demo/rollouts", &plan(change));
    assert_eq!(started.status, 201, "{started:?}");
    started.body["id"].as_str().expect("an id").to_owned()
}

fn report(host: &Host, id: &str) -> Value {
    let found = host.admin("GET", &format!("/admin/v1/aliases/demo/rollouts/{id}"), &Value::Null);
    assert_eq!(found.status, 200, "{found:?}");
    found.body
}

fn alias(host: &Host) -> Value {
    host.admin("GET", "/admin/v1/aliases/demo", &Value::Null).body
}

/// Asks until the report says so.
fn until(host: &Host, id: &str, ask: impl Fn(), holds: impl Fn(&Value) -> bool) -> Value {
    let found = (0..PATIENCE).find_map(|_| {
        ask();
        Some(report(host, id)).filter(&holds)
    });
    found.unwrap_or_else(|| panic!("{}", report(host, id)))
}

fn periods(report: &Value) -> u64 {
    report["evidence"]["periods"].as_u64().expect("a number")
}

#[test]
fn a_variant_that_nobody_wants_loses_its_share() {
    let host = host(&[]);
    alone(&host);
    let before = alias(&host);
    let id = start(&host, &json!({ "guards": [{ "metric": "goodput-loss", "margin": 0.4 }] }));
    assert_eq!(id, "alias.demo-1");
    let busy = host.admin("PUT", "/admin/v1/aliases/demo", &json!({ "weights": { CANDIDATE: 1 } }));
    assert!(busy.status == 409 && busy.body.to_string().contains(&id), "a change during a rollout: {busy:?}");
    let ended = until(&host, &id, || ask_and_judge(&host), |r| r["phase"]["is"] == "aborted");
    assert_eq!(ended["phase"]["cause"], json!({ "kind": "guard", "metric": "goodput-loss" }), "{ended}");
    assert!(ended["candidate"]["counts"]["cancelled"].as_u64().is_some_and(|n| n > 0), "{ended}");
    assert_eq!(ended["control"]["counts"]["cancelled"], 0, "{ended}");
    assert_eq!(ended["evidence"]["misplaced"], 0.0, "{ended}");
    assert!((0..40).all(|i| served(&host, "demo", &format!("tenant-{i}")) == CONTROL), "traffic is back");
    assert_eq!(alias(&host), before, "the alias is as it was");
    let gone = looks().any(|_| !host.get("/metrics").body.as_str().expect("text").contains("alias.demo"));
    assert!(gone, "its series are gone");
    let again = start(&host, &json!({}));
    assert_eq!(again, "alias.demo-2", "an id is not given twice");
}

#[test]
fn a_good_variant_is_measured_and_promoted() {
    let host = host(&[]);
    alone(&host);
    let id = start(&host, &json!({ "mode": "canary", "steps": [20, 50], "auto_promote": true }));
    let measured = until(
        &host,
        &id,
        || {
            served(&host, "demo", "t");
            served(&host, CANDIDATE, "t");
        },
        |r| {
            let n = |arm: &str| r[arm]["requests"].as_u64().unwrap_or(0);
            // So many that the shares show.
            (r["percent"] == 50 && n("candidate") > 0 && n("control") >= 30) || r["phase"]["is"] == "promoted"
        },
    );
    for arm in ["control", "candidate"] {
        assert!(measured[arm]["requests"].as_u64().is_some_and(|n| n > 0), "{measured}");
        assert!(measured[arm]["ttft_mean_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{measured}");
    }
    let requests = |arm: &str| measured[arm]["requests"].as_u64().expect("a number");
    assert!(requests("candidate") < requests("control"), "who names the variant is not counted: {measured}");
    assert!(measured["caveats"].to_string().contains("one device"), "{measured}");
    if measured["phase"]["is"] == "running" {
        let metrics = host.get("/metrics").body;
        let counted = "pointsman_rollout_requests_total{arm=\"candidate\",outcome=\"finished\",slot=\"alias.demo\"}";
        assert!(metrics.as_str().is_some_and(|t| t.contains(counted)), "{metrics}");
    }
    let ended = until(&host, &id, || drop(served(&host, "demo", "t")), |r| r["phase"]["is"] != "running");
    assert_eq!(ended["phase"]["is"], "promoted", "{ended}");
    let check = |host: &Host| {
        let now = alias(host);
        assert_eq!((&now["generation"], &now["rollout"]), (&json!(2), &Value::Null), "{now}");
        assert_eq!(now["variants"][0]["weight"], 0, "{now}");
        assert_eq!(now["variants"][1]["weight"], 10, "{now}");
        assert!((0..20).all(|i| served(host, "demo", &format!("tenant-{i}")) == CANDIDATE));
    };
    check(&host);
    let host = host.restart(&[]);
    check(&host);
    let lines = journal(&host);
    let changed = lines.iter().rfind(|e| e["event"] == "alias-changed").expect("a line");
    assert_eq!((&changed["actor"], &changed["weights"]), (&json!("rollout"), &json!({ CANDIDATE: 10 })), "{changed}");
    let again = host.admin("POST", &format!("/admin/v1/aliases/demo/rollouts/{id}/abort"), &Value::Null);
    assert_eq!(again.status, 409, "what is over stays over: {again:?}");
}

#[test]
fn tenants_stay_at_their_arm_and_a_restart_pauses_or_goes_on() {
    let host = host(&[]);
    alone(&host);
    let id = start(&host, &json!({ "sticky": "tenant" }));
    let all = |host: &Host| -> Vec<bool> {
        (0..60).map(|i| served(host, "demo", &format!("tenant-{i}")) == CANDIDATE).collect()
    };
    let ask = |host: &Host| drop(all(host));
    let before = until(&host, &id, || ask(&host), |r| periods(r) >= 1);
    let split = all(&host);
    let n = split.iter().filter(|candidate| **candidate).count();
    assert!((15..=45).contains(&n), "about half of 60: {n}");
    assert_eq!(all(&host), split, "tenants stay");
    let host = host.restart(&[]);
    let paused = report(&host, &id);
    assert_eq!(paused["phase"], json!({ "is": "paused", "why": "the host was restarted" }), "{paused}");
    assert!(periods(&paused) >= periods(&before), "{paused}");
    assert!(all(&host).iter().all(|candidate| !candidate), "control serves while it is paused");
    let steer = |host: &Host, verb: &str| {
        host.admin("POST", &format!("/admin/v1/aliases/demo/rollouts/{id}/{verb}"), &Value::Null)
    };
    assert_eq!(steer(&host, "resume").status, 200);
    until(&host, &id, || ask(&host), |r| periods(r) > periods(&paused));
    assert_eq!(all(&host), split, "and have the arm that they had");
    assert_eq!(steer(&host, "abort").body["phase"]["cause"]["kind"], "asked");
    assert!(all(&host).iter().all(|candidate| !candidate));
    let id = start(&host, &json!({ "on_restart": "resume" }));
    let before = until(&host, &id, || ask(&host), |r| periods(r) >= 1);
    let host = host.restart(&[]);
    until(&host, &id, || ask(&host), |r| r["phase"]["is"] == "running" && periods(r) > periods(&before));
    // In safe mode it is left as it is, and control serves.
    let host = host.restart(&[("SAFE_MODE", "true")]);
    assert!(all(&host).iter().all(|candidate| !candidate));
    assert_eq!(host.admin("POST", &format!("/admin/v1/aliases/demo/rollouts/{id}/abort"), &Value::Null).status, 409);
    let host = host.restart(&[]);
    assert_eq!(report(&host, &id)["phase"]["is"], "running");
}

#[test]
fn a_rollout_that_compares_nothing_is_refused_with_the_reason() {
    let host = host(&[]);
    let refuse = |change: Value, status: u16, part: &str| {
        let answer = host.admin("POST", "/admin/v1/aliases/demo/rollouts", &plan(&change));
        assert!(answer.status == status && answer.body.to_string().contains(part), "{part}: {answer:?}");
    };
    refuse(json!({}), 409, "give one of them all the weight first");
    alone(&host);
    refuse(json!({ "candidate": CONTROL }), 400, "serves the alias already");
    refuse(json!({ "candidate": "demo:f32" }), 400, "its variants are `demo:f16`, `demo:q8_0`");
    refuse(json!({ "mode": "switchback" }), 400, "use `canary` or `ab`");
    refuse(json!({ "mode": "shadow" }), 400, "use `canary` or `ab`");
    refuse(json!({ "component": "native" }), 400, "unknown field `component`");
    let nowhere = host.admin("GET", "/admin/v1/aliases/other/rollouts", &Value::Null);
    assert_eq!(nowhere.status, 404, "{nowhere:?}");
}

#[test]
fn the_command_line_starts_shows_and_steers() {
    let host = host(&[]);
    let run = |arguments: &[&str]| pointsman(&[arguments, &["--url", &host.admin]].concat());
    run(&["alias", "set", "demo", "demo:f16=1"]).expect("a good weight");
    let rollout = |arguments: &[&str]| run(&[&["policy", "rollout"], arguments].concat());
    let plan = r#"{"block_ms": 400, "burn_in_ms": 0}"#;
    for (arguments, expect) in [
        (&["status", "alias.demo"][..], Ok("no rollout here yet")),
        (&["start", "alias.demo", "demo:q8_0", "--mode", "switchback"], Err("use `canary` or `ab`")),
        (&["start", "alias.demo", "demo:q8_0", "--mode", "ab", "--set", "{}"], Err("takes no --set")),
        (
            &["start", "alias.demo", "demo:q8_0", "--mode", "canary", "--steps", "10,50", "--plan", plan],
            Ok("candidate demo:q8_0 at 10 % of the requests against demo:f16"),
        ),
        (&["start", "alias.demo", "demo:q8_0", "--mode", "ab"], Err("rollout alias.demo-1 is under way")),
        (&["status"], Ok("alias.demo-1")),
        (&["status", "alias.demo"], Ok("ttft-over-slo")),
        (&["promote", "alias.demo-1", "--step"], Ok("at 50 % of the requests")),
        (&["pause", "alias.demo-1"], Ok("paused  asked")),
        (&["resume", "alias.demo-1"], Ok("running")),
        (&["promote", "alias.demo-1"], Ok("promoted")),
        (&["abort", "alias.demo-2"], Err("no rollout `alias.demo-2`")),
    ] {
        match (rollout(arguments), expect) {
            (Ok(said), Ok(part)) | (Err(said), Err(part)) if said.contains(part) => {}
            (found, expect) => panic!("{arguments:?}: {found:?}, not {expect:?}"),
        }
    }
    let listed = run(&["alias", "list"]).expect("a list");
    assert!(listed.contains("demo;g=2  by weight"), "{listed}");
}
