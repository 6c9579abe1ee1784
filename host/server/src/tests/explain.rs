//! Why a request went where it went, and the decisions that are recorded.

use std::sync::atomic::Ordering;

use http_body_util::BodyExt;
use pointsman_sched::admit::Verdict;
use pointsman_sched::ids::Priority;
use pointsman_sched::request::SinkEvent;
use pointsman_sched::route::{Choice, Refusal, Rejection};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::ServerConfig;
use crate::admin::wire::calls::AdmissionCall;
use crate::admin::wire::decision::{Answer, Line};
use crate::fakes::{Play, Rig, bytes, request, token};
use crate::ports::SubmitError;

const COMPLETIONS: &str = "/v1/completions";
const HOST: (&str, &str) = ("host", "localhost");

fn body() -> String {
    json!({"model": "m", "prompt": bytes("abcdefghi"), "max_tokens": 4}).to_string()
}

async fn generate(rig: &Rig, id: &str) -> u16 {
    rig.send(request("POST", COMPLETIONS, &[("x-request-id", id), ("x-plan", "gold")], &body())).await.status
}

async fn explain(rig: &Rig, id: &str) -> Value {
    rig.ask_admin(request("GET", &format!("/admin/v1/requests/{id}"), &[HOST], "")).await.json()
}

#[tokio::test]
async fn an_explanation_has_inputs_answer_clamps_and_stages() {
    let rig = Rig::with(ServerConfig { route_headers: vec!["x-plan".into()], ..ServerConfig::default() });
    *rig.router.choice.lock().expect("unpoisoned") = Choice::Rank(vec![2, 1]);
    rig.engine.play([Play::Refuse(SubmitError::Full)]);
    assert_eq!(generate(&rig, "r").await, 200);
    let why = explain(&rig, "r").await;
    assert_eq!((&why["state"], &why["finish"]), (&json!("finished"), &json!("stop")));
    assert_eq!((&why["generated_tokens"], &why["cached_tokens"]), (&json!(6), &json!(2)));
    let decision = &why["decision"];
    for (path, expect) in [
        ("/revision", json!("r@1+0000")),
        ("/generation", json!(7)),
        ("/answer", json!({"rank": [2, 1]})),
        ("/rows", json!(["m:a@x", "m:a@y", "m:b@x"])),
        ("/clamps", json!(["row 2 (m:b@x) had no room"])),
        ("/chosen", json!({"row": 1, "replica": "m:a@y", "variant": "m:a"})),
        ("/request/model", json!("m")),
        ("/request/prompt_tokens", json!(9)),
        ("/request/priority", json!("normal")),
        ("/request/attributes", json!([["header.x-plan", "gold"]])),
        ("/replicas/id", json!([0, 1, 2])),
        ("/replicas/key", json!([0, 11, 22])),
        ("/fallback", Value::Null),
    ] {
        assert_eq!(decision.pointer(path).unwrap_or(&Value::Null), &expect, "{path} in {decision}");
    }
    let stages = &why["stages_us"];
    assert_eq!(stages["scheduled"], 5, "{stages}");
    assert!(["admitted", "routed", "first_token", "ended"].iter().all(|s| stages[*s].is_u64()), "{stages}");
    let before = json!({"revision": "q@1+0000", "generation": 6, "answer": {"rank": [2, 0]}, "row": 0});
    assert_eq!(why["previous"], before, "row 2 is known to have had no room");
}

#[tokio::test]
async fn every_end_is_told() {
    let reject = Choice::Reject(Rejection { reason: Refusal::Quota, retry_after_ms: 1, message: "no more".into() });
    let full = || Play::Refuse(SubmitError::Full);
    let cancelled = || Play::Now(vec![SinkEvent::Cancelled(pointsman_sched::request::CancelCause::Asked)]);
    for (choice, plays, status, state, finish, clamp) in [
        (reject, vec![], 429, "rejected", "quota used up: no more", None),
        (Choice::Pick(1), vec![full(), full(), full()], 429, "rejected", "queue of every", Some("no replica took")),
        (Choice::Pick(1), vec![full()], 200, "finished", "stop", Some("no row that it named had room")),
        (Choice::Abstain, vec![], 200, "finished", "stop", Some("left it to the host")),
        (Choice::Pick(1), vec![cancelled()], 499, "cancelled", "was cancelled", None),
    ] {
        let rig = Rig::new();
        *rig.router.choice.lock().expect("unpoisoned") = choice.clone();
        rig.engine.play(plays);
        assert_eq!(generate(&rig, "r").await, status, "{choice:?}");
        let why = explain(&rig, "r").await;
        assert_eq!(why["state"], state, "{why}");
        assert!(why["finish"].as_str().is_some_and(|text| text.contains(finish)), "{why}");
        let clamps = why["decision"]["clamps"].to_string();
        assert!(clamps.contains(clamp.unwrap_or("[]")), "{choice:?}: {clamps}");
    }
}

#[tokio::test]
async fn a_running_request_can_be_asked_about_and_an_abandoned_one_too() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold]);
    let stream = json!({"model": "m", "prompt": bytes("ab"), "stream": true, "max_tokens": 4}).to_string();
    let headers = [("x-request-id", "r"), ("accept", "application/x-ndjson")];
    let response = rig.open(request("POST", COMPLETIONS, &headers, &stream)).await;
    rig.engine.push(rig.engine.last_id(), token(70));
    let mut body = response.into_body();
    let _ = body.frame().await;
    let why = explain(&rig, "r").await;
    assert_eq!((&why["state"], &why["generated_tokens"]), (&json!("running"), &json!(1)), "{why}");
    assert_eq!(why["stages_us"]["ended"], Value::Null);
    drop(body);
    let why = explain(&rig, "r").await;
    assert_eq!((&why["state"], &why["finish"]), (&json!("cancelled"), &json!("the client went away")), "{why}");
}

#[tokio::test]
async fn the_last_requests_are_listed_and_older_ones_forgotten() {
    let rig = Rig::with(ServerConfig { explain_requests: 2, ..ServerConfig::default() });
    for id in ["a", "b", "c"] {
        generate(&rig, id).await;
    }
    let list = rig.ask_admin(request("GET", "/admin/v1/requests", &[HOST], "")).await.json();
    let ids: Vec<&str> = list["data"].as_array().expect("a list").iter().filter_map(|r| r["id"].as_str()).collect();
    assert_eq!(ids, ["c", "b"]);
    assert_eq!((&list["data"][0]["replica"], &list["data"][0]["model"]), (&json!("m:a@x"), &json!("m")));
    let one = rig.ask_admin(request("GET", "/admin/v1/requests?limit=1", &[HOST], "")).await.json();
    assert_eq!(one["data"].as_array().map(Vec::len), Some(1));
    let gone = rig.ask_admin(request("GET", "/admin/v1/requests/a", &[HOST], "")).await;
    assert_eq!(gone.status, 404);
    assert!(gone.body.contains("among the last 2"), "{}", gone.body);
}

#[tokio::test]
async fn what_cannot_be_asked_says_why() {
    let rig = Rig::new();
    let long = json!({"model": "m", "prompt": bytes("abcdefghijkl"), "max_tokens": 4}).to_string();
    rig.send(request("POST", COMPLETIONS, &[("x-request-id", "r")], &long)).await;
    assert_eq!(explain(&rig, "r").await["previous"], json!({"unavailable": "the router has no previous policy"}));
}

#[tokio::test]
async fn decisions_are_recorded_until_there_are_enough() {
    let rig = Rig::new();
    let ask = request("GET", "/admin/v1/slots/router/record?limit=2&seconds=60", &[HOST], "");
    let response = rig.admin().oneshot(ask).await.expect("routers do not fail");
    assert_eq!(response.status(), 200);
    let second = rig.ask_admin(request("GET", "/admin/v1/slots/router/record", &[HOST], "")).await;
    assert_eq!(second.status, 409, "one recording at a time");
    *rig.router.choice.lock().expect("unpoisoned") = Choice::Pick(2);
    generate(&rig, "a").await;
    rig.engine.play(std::iter::repeat_with(|| Play::Refuse(SubmitError::Full)).take(3));
    generate(&rig, "b").await;
    let text = response.into_body().collect().await.expect("bodies do not fail").to_bytes();
    let text = String::from_utf8(text.to_vec()).expect("UTF-8");
    let lines: Vec<&str> = text.lines().collect();
    let [first, second, last] = lines.as_slice() else { panic!("three lines: {text}") };
    assert_eq!(*last, r#"{"dropped":0}"#);
    let router = |line: &str| match serde_json::from_str::<Line>(line).expect("a line") {
        Line::Router(line) => *line,
        other => panic!("{other:?}"),
    };
    let (first, second) = (router(first), router(second));
    assert_eq!((&first.answer, first.chosen, first.generation), (&Answer::Pick(2), Some(2), 7));
    assert_eq!((second.chosen, first.replicas.id), (None, vec![0, 1, 2]));
    assert_eq!(rig.state.taps.router.recording(), 0, "over");
}

#[tokio::test]
async fn a_decision_at_the_door_is_explained_and_recorded() {
    let rig = Rig::with(ServerConfig { route_headers: vec!["x-plan".into()], ..ServerConfig::default() });
    rig.door.native.store(false, Ordering::Relaxed);
    let ask = request("GET", "/admin/v1/slots/admission/record?limit=3&seconds=60", &[HOST], "");
    let response = rig.admin().oneshot(ask).await.expect("routers do not fail");
    let rejection = Rejection { reason: Refusal::Quota, retry_after_ms: 5, message: "no more".into() };
    for (id, verdict, status, state, answer, clamp) in [
        ("a", Some(Verdict::AcceptAs(Priority::Low)), 200, "finished", json!({"accept-as": "low"}), "[]"),
        (
            "b",
            Some(Verdict::Reject(rejection)),
            429,
            "rejected",
            json!({"reject": {"reason": "quota", "retry_after_ms": 5, "message": "no more"}}),
            "[]",
        ),
        ("c", None, 200, "finished", Value::Null, "the policy did not answer (trap): the request entered as it was"),
    ] {
        *rig.door.verdict.lock().expect("unpoisoned") = verdict;
        assert_eq!(generate(&rig, id).await, status, "{id}");
        let why = explain(&rig, id).await;
        let admission = &why["admission"];
        assert_eq!((&why["state"], &admission["answer"]), (&json!(state), &answer), "{why}");
        assert!(admission["clamps"].to_string().contains(clamp), "{admission}");
        for (path, expect) in [
            ("/revision", json!("d@1+0000")),
            ("/generation", json!(9)),
            ("/request/prompt_tokens", json!(9)),
            ("/request/highest", json!("critical")),
            ("/request/attributes", json!([["header.x-plan", "gold"]])),
            ("/load/in_flight_limit", json!(1_024)),
            ("/previous", json!({"revision": "e@1+0000", "generation": 8, "answer": {"accept-as": "low"}})),
        ] {
            assert_eq!(admission.pointer(path).unwrap_or(&Value::Null), &expect, "{path} in {admission}");
        }
        assert_eq!(why["decision"].is_null(), state == "rejected", "who is refused is not routed: {why}");
    }
    let text = response.into_body().collect().await.expect("bodies do not fail").to_bytes();
    let text = String::from_utf8(text.to_vec()).expect("UTF-8");
    let answers: Vec<String> = text
        .lines()
        .filter_map(|line| match serde_json::from_str::<Line>(line).ok()? {
            Line::Admission(line) => Some(*line),
            other => panic!("{other:?}"),
        })
        .map(|line| match line.call {
            AdmissionCall::Admit { answer, request, .. } if request.tenant == "default" => format!("{answer:?}"),
            other => panic!("{other:?}"),
        })
        .collect();
    let [first, second, third] = answers.as_slice() else { panic!("{text}") };
    assert!(first.contains("AcceptAs(Low)") && second.contains("Reject") && third == "None", "{answers:?}");
    let list = rig.ask_admin(request("GET", "/admin/v1/requests", &[HOST], "")).await.json();
    assert_eq!((&list["data"][1]["id"], &list["data"][1]["model"]), (&json!("b"), &json!("m")), "{list}");
}

#[tokio::test]
async fn only_what_can_be_recorded_is() {
    let rig = Rig::new();
    for (path, status, part) in [
        ("/admin/v1/slots/telemetry.slo-log/record", 404, "admission, router, scheduler, kv-retention and sampler can"),
        ("/admin/v1/slots/router/record?limit=0", 400, "`limit` must be 1 to 1000000, found 0"),
        ("/admin/v1/slots/router/record?seconds=9999", 400, "`seconds` must be 1 to 3600, found 9999"),
        ("/admin/v1/slots/router/record?limit=x", 400, "invalid digit"),
    ] {
        let answer = rig.ask_admin(request("GET", path, &[HOST], "")).await;
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.body.contains(part), "{path}: {}", answer.body);
    }
}
