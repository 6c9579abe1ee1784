//! Rollouts on a running host: a candidate that traps is off at its third fault, a good one is promoted, a restart pauses, and
//! no request ever pays.

use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use crate::host;

/// Requests until something must have happened.
const PATIENCE: usize = 6_000;

fn serve(host: &Host) -> String {
    let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 3, "temperature": 0 });
    let answer = host.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "a rollout costs no request: {answer:?}");
    answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

/// Blocks so short that a test sees many of them.
fn plan(component: &str, config: Value) -> Value {
    json!({
        "component": component, "config": config, "mode": "canary", "steps": [50], "seed": 1,
        "block_ms": 400, "burn_in_ms": 0, "settle_ms": 2_000, "min_periods": 3, "on_restart": "pause",
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

/// Serves requests until the report says so.
fn until(host: &Host, slot: &str, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let found = (0..PATIENCE).find_map(|_| {
        serve(host);
        Some(report(host, slot, id)).filter(&holds)
    });
    found.unwrap_or_else(|| panic!("{}", report(host, slot, id)))
}

fn active(host: &Host, slot: &str) -> (String, u64) {
    let state = host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null).body;
    let text = state["active"]["revision"].as_str().expect("a revision").to_owned();
    (text, state["active"]["generation"].as_u64().expect("a generation"))
}

fn journal(host: &Host) -> String {
    let lines = host.admin("GET", "/admin/v1/journal", &Value::Null).body;
    lines.as_str().map_or_else(|| lines.to_string(), str::to_owned)
}

fn fixture(host: &Host, name: &str) -> String {
    let path = pointsman_tests::root().join(format!("plugins/prebuilt/fixture-{name}.wasm"));
    host.upload(&std::fs::read(path).expect("a committed fixture"))
}

#[test]
fn a_candidate_that_traps_on_every_call_is_off_at_its_third_and_costs_no_request() {
    let host = host(&[]);
    let before = active(&host, "router");
    let digest = fixture(&host, "router");
    let id = start(&host, "router", &plan(&digest, json!({ "do": "trap", "after": 40 })));
    let busy = host.activate("router", "native", json!({}));
    assert!(busy.status == 409 && busy.body.to_string().contains(&id), "a change during a rollout: {busy:?}");
    let ended = until(&host, "router", &id, |r| r["phase"]["is"] == "aborted");
    assert_eq!(ended["phase"]["cause"]["kind"], "hard", "{ended}");
    assert!(ended["phase"]["cause"]["what"].as_str().is_some_and(|w| w.starts_with("3 faults in ")), "{ended}");
    assert_eq!(active(&host, "router"), before);
    assert!((0..20).all(|_| serve(&host).starts_with("route-least-loaded@")));
    // The observer journals faults, and forgets series, after it has looked at rollouts.
    let n_faults = || journal(&host).lines().filter(|l| l.contains("\"event\":\"fault\"")).count();
    assert!(looks().any(|_| n_faults() == 3), "{}", journal(&host));
    let has_series = |text: &str| text.lines().any(|l| l.contains("arm=\"") || l.contains("fixture"));
    let gone = looks().any(|_| !has_series(host.get("/metrics").body.as_str().expect("text")));
    assert!(gone, "its series are gone");
    let next = host.activate("router", "native", json!({}));
    assert_eq!(next.body["generation"].as_u64(), Some(before.1 + 2), "the candidate's generation stays its own");
}

#[test]
fn a_good_candidate_is_measured_and_promoted() {
    let host = host(&[]);
    let (_, generation) = active(&host, "router");
    let id = start(&host, "router", &plan(&host.builtin("route-weighted"), json!({})));
    let slot = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    assert!(slot["candidate"]["revision"].as_str().is_some_and(|r| r.starts_with("route-weighted@")), "{slot}");
    let measured = until(&host, "router", &id, |r| r["evidence"]["periods"].as_u64().is_some_and(|n| n >= 3));
    for arm in ["control", "candidate"] {
        assert!(measured[arm]["requests"].as_u64().is_some_and(|n| n > 0), "{measured}");
        assert!(measured[arm]["ttft_mean_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{measured}");
        assert!(measured[arm]["policy"]["calls"].as_u64().is_some_and(|n| n > 0), "{measured}");
    }
    let misplaced = measured["evidence"]["misplaced"].as_f64();
    assert!(misplaced.is_some_and(|share| share < 0.01), "requests are decided by their block's arm: {measured}");
    for (arm, count) in [("control", "late"), ("candidate", "late"), ("control", "failed"), ("candidate", "failed")] {
        assert_eq!(measured[arm]["counts"][count], 0, "{measured}");
    }
    let metrics = host.get("/metrics").body;
    let counted = "pointsman_rollout_requests_total{arm=\"candidate\",outcome=\"finished\",slot=\"router\"}";
    assert!(metrics.as_str().is_some_and(|t| t.contains(counted)), "{metrics}");
    let promoted = host.admin("POST", &format!("/admin/v1/slots/router/rollouts/{id}/promote"), &Value::Null);
    assert_eq!((promoted.status, &promoted.body["phase"]["is"]), (200, &json!("promoted")), "{promoted:?}");
    let (revision, now) = active(&host, "router");
    assert!(revision.starts_with("route-weighted@") && now == generation + 1, "{revision};g={now}");
    assert_eq!(serve(&host), format!("{revision};g={now}"));
    let again = host.admin("POST", &format!("/admin/v1/slots/router/rollouts/{id}/abort"), &Value::Null);
    assert_eq!(again.status, 409, "what is over stays over: {again:?}");
    let back = host.admin("POST", "/admin/v1/slots/router/rollback", &Value::Null);
    assert!(back.body["revision"].as_str().is_some_and(|r| r.starts_with("route-least-loaded@")), "{back:?}");
}

#[test]
fn an_admission_candidate_that_traps_is_off_and_everybody_enters() {
    let host = host(&[]);
    let bucket = host.builtin("admit-token-bucket");
    assert_eq!(host.activate("admission", &bucket, json!({})).status, 200);
    let before = active(&host, "admission");
    let id = start(&host, "admission", &plan(&fixture(&host, "admission"), json!({ "do": "trap", "after": 60 })));
    let ended = until(&host, "admission", &id, |r| r["phase"]["is"] == "aborted");
    assert!(ended["phase"]["cause"]["what"].as_str().is_some_and(|w| w.contains(" faults in ")), "{ended}");
    assert_eq!(active(&host, "admission"), before);
    assert!((0..20).all(|_| serve(&host).starts_with("route-least-loaded@")));
}

#[test]
fn a_quota_is_tried_beside_the_old_one_and_promoted() {
    let host = host(&[]);
    let bucket = host.builtin("admit-token-bucket");
    let quota = |burst: u32| json!({ "tokens_per_second": 1_000_000, "burst_tokens": burst });
    assert_eq!(host.activate("admission", &bucket, quota(500_000)).status, 200);
    let id = start(&host, "admission", &plan(&bucket, quota(1_000_000)));
    let measured = until(&host, "admission", &id, |r| r["evidence"]["periods"].as_u64().is_some_and(|n| n >= 3));
    for arm in ["control", "candidate"] {
        assert!(measured[arm]["requests"].as_u64().is_some_and(|n| n > 0), "{measured}");
        // Asked about requests and told of their ends.
        assert!(measured[arm]["policy"]["calls"].as_u64() > measured[arm]["requests"].as_u64(), "{measured}");
        assert_eq!((&measured[arm]["policy"]["faults"], &measured[arm]["policy"]["fallbacks"]), (&json!(0), &json!(0)));
    }
    let promoted = host.admin("POST", &format!("/admin/v1/slots/admission/rollouts/{id}/promote"), &Value::Null);
    assert_eq!((promoted.status, &promoted.body["phase"]["is"]), (200, &json!("promoted")), "{promoted:?}");
    assert_eq!(active(&host, "admission").1, 2);
    serve(&host);
}

#[test]
fn a_restart_pauses_a_rollout_with_what_it_knew_and_it_goes_on() {
    let host = host(&[]);
    let id = start(&host, "scheduler", &plan(&host.builtin("sched-priority"), json!({})));
    let before = until(&host, "scheduler", &id, |r| r["evidence"]["periods"].as_u64().is_some_and(|n| n >= 1));
    let host = host.restart(&[]);
    let after = report(&host, "scheduler", &id);
    assert_eq!(after["phase"], json!({ "is": "paused", "why": "the host was restarted" }), "{after}");
    let periods = |r: &Value| r["evidence"]["periods"].as_u64().expect("a number");
    assert!(periods(&after) >= periods(&before), "{after}");
    let steer =
        |verb: &str| host.admin("POST", &format!("/admin/v1/slots/scheduler/rollouts/{id}/{verb}"), &Value::Null);
    assert_eq!(steer("resume").status, 200);
    until(&host, "scheduler", &id, |r| periods(r) > periods(&after));
    assert_eq!(steer("abort").body["phase"]["cause"]["kind"], "asked");
    let slot = host.admin("GET", "/admin/v1/slots/scheduler", &Value::Null).body;
    assert_eq!(slot["candidate"], Value::Null, "{slot}");
    let text = journal(&host);
    for event in
        ["rollout-started", "rollout-observed", "rollout-restored", "\"decision\":\"pause\"", "\"decision\":\"abort\""]
    {
        assert!(text.contains(event), "{event} is in the journal: {text}");
    }
}

#[test]
fn the_command_line_starts_shows_and_aborts() {
    let host = host(&[]);
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
        command.args(["policy", "rollout"]).args(arguments).args(["--url", &host.admin]);
        let output = command.output().expect("it starts");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("UTF-8"))
    };
    let plan = r#"{"block_ms": 400, "burn_in_ms": 0}"#;
    for (arguments, code, expect) in [
        (&["status", "router"][..], 0, "no rollout here yet"),
        (&["start", "router", "route-weighted", "--mode", "ab"], 1, "use `switchback`"),
        (
            &["start", "router", "route-weighted", "--mode", "canary", "--steps", "10,50", "--plan", plan],
            0,
            "router-2  canary",
        ),
        (&["start", "router", "native", "--mode", "canary"], 1, "rollout router-2 is under way"),
        (&["status"], 0, "router-2"),
        (&["status", "router-2"], 0, "ttft-over-slo"),
        (&["promote", "router-2", "--step"], 0, "at 50 % of the time"),
        (&["promote", "router-2", "--step"], 1, "is at its last step"),
        (&["pause", "router-2"], 0, "paused  asked"),
        (&["resume", "router-2"], 0, "running"),
        (&["abort", "router-2"], 0, "aborted  asked"),
        (&["abort", "router"], 1, "is not the id of a rollout"),
    ] {
        let (found, said) = run(arguments);
        assert!(found == Some(code) && said.contains(expect), "{arguments:?}: {found:?} {said}");
    }
}

#[test]
fn a_plan_that_is_no_experiment_is_refused_with_the_reason() {
    let host = host(&[]);
    let refuse = |slot: &str, change: (&str, Value), expect: (u16, &str)| {
        let mut body = plan("native", json!({}));
        body[change.0] = change.1;
        let answer = host.admin("POST", &format!("/admin/v1/slots/{slot}/rollouts"), &body);
        assert!(answer.status == expect.0 && answer.body.to_string().contains(expect.1), "{expect:?}: {answer:?}");
    };
    refuse("router", ("mode", json!("ab")), (400, "use `switchback`"));
    refuse("telemetry.slo-log", ("mode", json!("canary")), (400, "`telemetry.<another name>`"));
    refuse("router", ("steps", json!([50, 10])), (400, "`steps` must ascend"));
    refuse("router", ("step", json!([50])), (400, "unknown field `step`"));
    refuse("router", ("component", json!("sha256:00")), (404, "upload it first"));
    refuse("nowhere", ("mode", json!("canary")), (404, "there is no slot `nowhere`"));
    refuse("router", ("if_generation", json!(9)), (409, "the active generation of `router` is 1, not 9"));
}
