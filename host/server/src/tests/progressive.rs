//! A draft first and the final answer after it: what is told in which order, what either costs, and what is left of them.

use std::num::NonZeroU32;
use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use http_body_util::BodyExt;
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::request::{CancelCause, Failure, FinishReason, SinkEvent};
use serde_json::{Value, json};

use crate::entry::{Call, FaultKind, Request};
use crate::fakes::{Answer, Play, Rig, bytes, key, request, says, token};
use crate::ports::SubmitError;
use crate::{ApiKey, KeyLimits, ServerConfig};

const COMPLETIONS: &str = "/v1/completions";
const ACCEPT: (&str, &str) = ("accept", "application/x-ndjson");
const ID: (&str, &str) = ("x-request-id", "r");

/// Longer than any test takes.
const LONG: u64 = 60_000;

/// A host whose one device a draft has for so long.
fn rig(draft_lead_ms: u64) -> Rig {
    Rig::with(ServerConfig { draft_lead_ms, ..ServerConfig::default() })
}

/// By `m:a`, and by `m:b` before that.
fn body(extra: &Value) -> String {
    let mut body = json!({"model": "m:a", "draft": "m:b", "prompt": bytes("abc"), "max_tokens": 8});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

async fn open(rig: &Rig, extra: &Value) -> Response<Body> {
    rig.open(request("POST", COMPLETIONS, &[ACCEPT, ID], &body(extra))).await
}

async fn ask(rig: &Rig, extra: &Value) -> Answer {
    Answer::of(open(rig, extra).await).await
}

/// What is told, without the tokens between the first and the last of an answer.
fn told(lines: &[Value]) -> Vec<String> {
    let text = |line: &Value| line.as_str().unwrap_or_default().to_owned();
    let mut told: Vec<String> = lines.iter().map(|l| format!("{} {}", text(&l["stage"]), text(&l["event"]))).collect();
    told.dedup();
    told
}

fn texts(lines: &[Value], is_draft: bool) -> String {
    let own = lines.iter().filter(|line| (line["stage"] == "draft") == is_draft);
    own.filter_map(|line| line["text"].as_str()).collect()
}

fn cancels(rig: &Rig) -> Vec<(RequestId, CancelCause)> {
    rig.engine.cancels.lock().expect("unpoisoned").iter().map(|(_, id, cause)| (*id, *cause)).collect()
}

/// What was submitted of the final answer, and of its draft.
fn ids(rig: &Rig) -> [Vec<RequestId>; 2] {
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    // `m:b` has the third replica.
    [false, true].map(|is_draft| taken.iter().filter(|t| (t.replica.0 == 2) == is_draft).map(|t| t.id).collect())
}

/// What is remembered of a request.
async fn remembered(rig: &Rig, id: &str) -> Value {
    let list = rig.ask_admin(request("GET", "/admin/v1/requests", &[("host", "localhost")], "")).await.json();
    let found = list["data"].as_array().expect("a list").iter().find(|request| request["id"] == id);
    found.unwrap_or_else(|| panic!("{id}: {list}")).clone()
}

pub(super) async fn next_lines(response: &mut Response<Body>) -> Vec<Value> {
    let frame = response.body_mut().frame().await.expect("a frame").expect("bodies do not fail");
    let text = String::from_utf8(frame.into_data().expect("data").to_vec()).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn failed() -> Play {
    Play::Now(vec![SinkEvent::Failed(Failure::DroppedByPolicy)])
}

#[tokio::test]
async fn a_draft_is_told_and_then_replaced() {
    for lead in [0, LONG] {
        let rig = rig(lead);
        // At once, the final answer is submitted first; else when its draft is over.
        let (last, draft) = (Play::Now(says(&["better"])), Play::Now(says(&["quick"])));
        rig.engine.play(if lead == 0 { [last, draft] } else { [draft, last] });
        let answer = ask(&rig, &json!({})).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"));
        let headers = ["x-request-id", "x-pointsman-variant"].map(|name| answer.header(name));
        assert_eq!(headers, ["r", "m:b"], "who answers first");
        let lines = answer.lines();
        let draft = ["queued", "started", "token", "finished"].map(|event| format!("draft {event}"));
        let rest =
            ["queued queued", "prefill started", "decode replace", "decode token", "decode finished", "done done"];
        assert_eq!(told(&lines), [&draft[..], &rest.map(str::to_owned)].concat());
        assert_eq!((texts(&lines, true), texts(&lines, false)), ("quick".into(), "better".into()));
        let queued: Vec<&Value> = lines.iter().filter(|line| line["event"] == "queued").collect();
        let who = |line: &Value| ["id", "model", "replica"].map(|name| line[name].as_str().map(str::to_owned));
        assert_eq!(who(queued[0]), ["r.draft", "m:b", "m:b@x"].map(|name| Some(name.to_owned())));
        assert_eq!(who(queued[1]), ["r", "m:a", "m:a@x"].map(|name| Some(name.to_owned())));
        for is_draft in [true, false] {
            let own = lines.iter().filter(|line| (line["stage"] == "draft") == is_draft);
            let progress: Vec<u64> = own.filter_map(|line| line["progress"].as_u64()).collect();
            assert!(progress.is_sorted(), "each has its own: {progress:?}");
        }
        let done = lines.last().expect("a line");
        let counts = |usage: &Value| [&usage["prompt_tokens"], &usage["completion_tokens"]].map(Value::as_u64);
        assert_eq!(counts(&done["usage"]), [Some(3), Some(7)]);
        assert_eq!(counts(&done["draft"]["usage"]), [Some(3), Some(6)]);
        let times = [&done["draft"], done].map(|end| [&end["first_token_ms"], &end["ended_ms"]].map(Value::as_f64));
        assert!(times.as_flattened().iter().all(Option::is_some) && times.as_flattened().is_sorted(), "{done}");
        assert_eq!((rig.state.in_flight(), cancels(&rig)), (0, Vec::new()));
    }
}

#[tokio::test]
async fn whatever_becomes_of_a_draft_the_final_answer_is_told() {
    let breaks = || {
        let mut events = says(&["quick"]);
        *events.last_mut().expect("an end") = SinkEvent::Failed(Failure::Engine("boom".into()));
        Play::Now(events)
    };
    let refuses = || Play::Refuse(SubmitError::Full);
    for (lead, draft, says_of_draft, outcome, code, draft_tokens) in [
        (0, Play::Now(says(&["quick"])), "quick", "finished", None, Some(6)),
        (0, breaks(), "quick", "failed", Some("engine_fault"), Some(5)),
        (LONG, breaks(), "quick", "failed", Some("engine_fault"), Some(5)),
        (LONG, failed(), "", "failed", Some("dropped_by_policy"), Some(0)),
        (0, refuses(), "", "failed", Some("saturated"), None),
        (LONG, refuses(), "", "failed", Some("saturated"), None),
        (0, Play::Hold, "", "replaced", None, Some(0)),
        // It has had its time.
        (1, Play::Hold, "", "replaced", None, Some(0)),
    ] {
        let rig = rig(lead);
        let last = Play::Now(says(&["better"]));
        rig.engine.play(if lead == 0 { [last, draft] } else { [draft, last] });
        let answer = ask(&rig, &json!({})).await;
        let lines = answer.lines();
        let name = format!("{lead} {outcome} {code:?}: {}", answer.body);
        assert_eq!((texts(&lines, true), texts(&lines, false)), (says_of_draft.into(), "better".into()), "{name}");
        let fault = lines.iter().find(|line| line["event"] == "failed");
        assert_eq!(fault.and_then(|fault| fault["error"]["code"].as_str()), code, "{name}");
        let replaces: Vec<usize> = (0..lines.len()).filter(|i| lines[*i]["event"] == "replace").collect();
        assert_eq!(replaces.len(), 1, "{name}");
        let late = lines[replaces[0]..].iter().filter(|line| line["stage"] == "draft").count();
        assert_eq!(late, 0, "nothing of the draft comes after: {name}");
        let end = &lines.last().expect("a line")["draft"];
        assert_eq!((&end["outcome"], end["usage"]["completion_tokens"].as_u64()), (&json!(outcome), draft_tokens));
        let cut: Vec<RequestId> = cancels(&rig).iter().map(|(id, _)| *id).collect();
        let [_, drafts] = ids(&rig);
        assert_eq!(cut, if outcome == "replaced" { drafts } else { Vec::new() }, "{name}");
        assert_eq!(rig.state.in_flight(), 0, "{name}");
    }
}

#[tokio::test]
async fn the_final_answer_that_fails_is_an_error_and_takes_the_draft_with_it() {
    let breaks = || {
        let mut events = says(&["bet"]);
        *events.last_mut().expect("an end") = SinkEvent::Failed(Failure::DroppedByPolicy);
        Play::Now(events)
    };
    let quick = || Play::Now(says(&["quick"]));
    let refuses = || Play::Refuse(SubmitError::Full);
    let (full, dropped) = ("saturated", "dropped_by_policy");
    for (lead, plays, status, code, replaces, draft) in [
        // Refused before anything is told: no draft is asked for.
        (0, vec![refuses(), refuses()], 429, full, 0, ""),
        (LONG, vec![quick(), refuses(), refuses()], 200, full, 0, "quick"),
        (0, vec![failed(), quick()], 200, dropped, 0, "quick"),
        // What was held back is not told: the draft stands.
        (0, vec![breaks(), Play::Hold], 200, dropped, 0, ""),
        (0, vec![breaks(), quick()], 200, dropped, 1, "quick"),
        (LONG, vec![quick(), breaks()], 200, dropped, 1, "quick"),
    ] {
        let rig = rig(lead);
        rig.engine.play(plays);
        let answer = ask(&rig, &json!({})).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        let lines = answer.lines();
        let last = lines.last().expect("a line");
        assert_eq!(last["error"]["code"], code, "{last}");
        assert_eq!(lines.iter().filter(|line| line["event"] == "replace").count(), replaces, "{}", answer.body);
        assert_eq!(texts(&lines, true), draft);
        assert_eq!((rig.state.in_flight(), ids(&rig)[1].len()), (0, usize::from(status == 200)));
    }
}

#[tokio::test]
async fn what_cannot_have_a_draft_is_refused() {
    let rig = Rig::new();
    for (extra, accepts, status, param, expect) in [
        (json!({"draft": "nope"}), true, 404, "draft", "`nope` does not exist; known models: `m`, `m:a`, `m:b`"),
        (json!({"draft": "e"}), true, 400, "draft", "makes embeddings"),
        (json!({"draft": "m:a"}), true, 400, "draft", "must be another model than `model`, found `m:a`"),
        (json!({"draft": "m", "model": "m"}), true, 400, "draft", "must be another model"),
        (json!({"draft": 7}), true, 400, "draft", "must be a string"),
        (json!({}), false, 400, "draft", "needs `accept: application/x-ndjson`"),
        (json!({"stream": true}), false, 400, "draft", "needs `accept: application/x-ndjson`"),
        // What is wrong with the final answer is said as without a draft.
        (json!({"model": "nope"}), true, 404, "model", "`nope` does not exist"),
        (json!({"n": 99}), true, 400, "n", "from 1 to 8"),
        (json!({"model": null}), true, 400, "model", "`model` is required"),
    ] {
        let headers = if accepts { &[ACCEPT][..] } else { &[] };
        let answer = rig.send(request("POST", COMPLETIONS, headers, &body(&extra))).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{extra}: {}", answer.body);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(expect)), "{extra}: {}", answer.body);
    }
    let within = serde_json::from_str(&body(&json!({}))).expect("JSON");
    let fault =
        rig.state.submit(Request::new(Call::Completion, within)).await.expect_err("there is one kind of events");
    assert_eq!((fault.kind, fault.param.as_deref()), (FaultKind::Invalid, Some("draft")));
    assert_eq!((ids(&rig), rig.state.in_flight()), ([Vec::new(), Vec::new()], 0));
    let none = ask(&rig, &json!({"draft": null})).await.lines();
    assert!(none.iter().all(|line| line["stage"] != "draft" && line["event"] != "replace"), "{none:?}");
}

#[tokio::test]
async fn every_route_that_generates_takes_a_draft() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, asks) in [
        ("/v1/chat/completions", json!({"messages": messages, "stop": "er"})),
        ("/v1/completions", json!({"prompt": "hi", "stop": "er"})),
        ("/v1/responses", json!({"input": "hi", "stop": "er"})),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 8, "stop_sequences": ["er"]})),
    ] {
        let rig = rig(0);
        rig.engine.play([Play::Now(says(&["better"])), Play::Now(says(&["quicker"]))]);
        let mut body = asks.clone();
        (body["model"], body["draft"]) = ("m:a".into(), "m:b".into());
        let answer = rig.send(request("POST", path, &[ACCEPT], &body.to_string())).await;
        let lines = answer.lines();
        let said = (texts(&lines, true), texts(&lines, false));
        assert_eq!(said, ("quick".into(), "bett".into()), "{path}: {}", answer.body);
        assert_eq!(rig.state.in_flight(), 0);
    }
    let rig = rig(0);
    let plays = ["one", "two", "uno", "due"].map(|text| Play::Now(says(&[text])));
    rig.engine.play(plays);
    let lines = ask(&rig, &json!({"n": 2})).await.lines();
    for (is_draft, expect) in [(true, ["uno", "due"]), (false, ["one", "two"])] {
        let of = |index: u64| lines.iter().filter(|line| line["index"] == index).cloned().collect::<Vec<_>>();
        assert_eq!([0, 1].map(|index| texts(&of(index), is_draft)), expect, "{lines:?}");
    }
}

#[tokio::test]
async fn a_draft_never_takes_the_room_of_the_final_answer() {
    let limited = |concurrent: u32, requests: u32, tokens: u32| {
        let limits = KeyLimits {
            concurrent: NonZeroU32::new(concurrent),
            requests_per_minute: NonZeroU32::new(requests),
            tokens_per_minute: NonZeroU32::new(tokens),
        };
        let api_keys = vec![ApiKey { limits, ..key("k1", Priority::Normal) }];
        ServerConfig { api_keys, draft_lead_ms: 0, ..ServerConfig::default() }
    };
    // Either may use 3 tokens and generate 8.
    for (config, code) in [
        (limited(2, 2, 22), None),
        (limited(1, 0, 0), Some("rate_limit_exceeded")),
        (limited(0, 1, 0), Some("rate_limit_exceeded")),
        (limited(0, 0, 21), Some("rate_limit_exceeded")),
        (ServerConfig { max_requests: 1, ..limited(0, 0, 0) }, Some("saturated")),
        (ServerConfig { max_queued_tokens: 5, ..limited(0, 0, 0) }, Some("saturated")),
    ] {
        let rig = Rig::with(config);
        // What is computed at once waits for nothing.
        rig.engine.play([Play::Hold]);
        let headers = [ACCEPT, ("authorization", "Bearer k1")];
        let mut response = rig.open(request("POST", COMPLETIONS, &headers, &body(&json!({})))).await;
        let mut lines = next_lines(&mut response).await;
        for event in says(&["better"]) {
            rig.engine.push(ids(&rig)[0][0], event);
        }
        lines.extend(Answer::of(response).await.lines());
        let fault = lines.iter().find(|line| line["event"] == "failed");
        assert_eq!(fault.and_then(|fault| fault["error"]["code"].as_str()), code, "{lines:?}");
        assert_eq!(texts(&lines, false), "better");
        let spent = if code.is_none() { 2 } else { 1 };
        let usage = rig.ask_admin(request("GET", "/admin/v1/usage", &[("host", "localhost")], "")).await.json();
        assert_eq!(usage["data"][0]["requests"], spent, "each is charged: {usage}");
        assert_eq!(usage["data"][0]["prompt_tokens"], 3 * spent, "{usage}");
        assert_eq!(rig.state.in_flight(), 0);
    }
}

#[tokio::test]
async fn a_client_that_leaves_or_cancels_ends_both() {
    for (lead, asks) in [(0, true), (0, false), (LONG, true), (LONG, false)] {
        let rig = rig(lead);
        rig.engine.play([Play::Hold, Play::Hold]);
        let mut response = open(&rig, &json!({})).await;
        let [last, draft] = ids(&rig);
        assert_eq!((last.len(), draft.len()), (usize::from(lead == 0), 1), "the final answer waits for its turn");
        for event in [SinkEvent::Started { queued_us: 1, cached_tokens: 0 }, token(70)] {
            rig.engine.push(draft[0], event);
        }
        let lines = told(&next_lines(&mut response).await);
        assert_eq!(lines[..3], ["draft queued", "draft started", "draft token"]);
        assert_eq!((lines.len(), rig.state.in_flight()), (3 + last.len(), 2));
        let both = [&last[..], &draft].concat();
        if asks {
            assert_eq!(rig.send(request("DELETE", "/v1/requests/r", &[], "")).await.status, 200);
            let asked: Vec<_> = both.iter().map(|id| (*id, CancelCause::Asked)).collect();
            assert_eq!(cancels(&rig), asked);
            for id in &both {
                rig.engine.push(*id, SinkEvent::Cancelled(CancelCause::Asked));
            }
            let lines = next_lines(&mut response).await;
            assert_eq!(lines.last().expect("a line")["error"]["code"], "cancelled");
        }
        drop(response);
        let mut ended: Vec<RequestId> = cancels(&rig).iter().map(|(id, _)| *id).collect();
        ended.sort_unstable();
        ended.dedup();
        assert_eq!((&ended, rig.state.in_flight()), (&both, 0));
        let usage = rig.ask_admin(request("GET", "/admin/v1/usage", &[("host", "localhost")], "")).await.json();
        let paid = ["requests", "prompt_tokens"].map(|what| usage["data"][0][what].as_u64());
        let n = both.len() as u64;
        assert_eq!(paid, [Some(n), Some(3 * n)], "what was not submitted costs nothing: {usage}");
        for id in ["r", "r.draft"] {
            assert_eq!(remembered(&rig, id).await["state"], "cancelled", "{id}");
        }
    }
}

#[tokio::test]
async fn a_final_answer_that_is_far_ahead_waits_no_longer() {
    let rig = rig(0);
    rig.engine.play([Play::Hold, Play::Hold]);
    let mut response = open(&rig, &json!({})).await;
    let [last, draft] = ids(&rig).map(|ids| ids[0]);
    rig.engine.push(draft, token(70));
    for event in std::iter::repeat_n(token(70), 3_000) {
        rig.engine.push(last, event);
    }
    let mut lines = next_lines(&mut response).await;
    while lines.iter().all(|line| line["event"] != "replace") {
        lines.extend(next_lines(&mut response).await);
    }
    let expect = ["draft queued", "draft token", "queued queued", "decode replace", "decode token"];
    assert_eq!(told(&lines), expect);
    assert_eq!(cancels(&rig), [(draft, CancelCause::Asked)], "no client has gone");
    assert_eq!(remembered(&rig, "r.draft").await["finish"], "the final answer ended first");
    rig.engine.push(last, SinkEvent::Finished(FinishReason::Length));
    let rest = Answer::of(response).await.lines();
    assert_eq!(rest.last().expect("a line")["draft"]["outcome"], "replaced");
    assert_eq!(lines.len() + rest.len(), 4 + 3_000 + 2);
}

#[tokio::test]
async fn either_may_pass_its_deadline() {
    for lead in [0, LONG] {
        let rig = rig(lead);
        rig.engine.play([Play::Hold, Play::Hold]);
        let lines = ask(&rig, &json!({"timeout_ms": 1})).await.lines();
        let last = lines.last().expect("a line");
        assert_eq!(
            (&last["event"], &last["error"]["code"]),
            (&json!("error"), &json!("deadline_exceeded")),
            "{lines:?}"
        );
        let ended = cancels(&rig);
        assert!(ids(&rig).concat().iter().all(|id| ended.iter().any(|(ended, _)| ended == id)), "{ended:?}");
        assert_eq!(rig.state.in_flight(), 0);
    }
}

#[tokio::test]
async fn nobody_else_waits_for_a_draft() {
    let rig = Rig::with(ServerConfig { cache_bytes: 1 << 20, draft_lead_ms: LONG, ..ServerConfig::default() });
    rig.engine.play([Play::Hold, Play::Now(says(&["better"]))]);
    let mut response = open(&rig, &json!({"temperature": 0})).await;
    let plain = rig.post(COMPLETIONS, &body(&json!({"temperature": 0, "draft": null}))).await;
    assert_eq!((plain.status, plain.header("x-pointsman-cache")), (200, "miss"), "{}", plain.body);
    let draft = ids(&rig)[1][0];
    rig.engine.push(draft, SinkEvent::Finished(FinishReason::Length));
    let mut lines = next_lines(&mut response).await;
    lines.extend(Answer::of(response).await.lines());
    assert_eq!(texts(&lines, false), "better");
    assert_eq!(ids(&rig)[0].len(), 1, "and it has the answer of the other: {lines:?}");
}

#[tokio::test]
async fn a_drain_that_begins_while_a_draft_leads_lets_both_end() {
    let rig = rig(LONG);
    rig.engine.play([Play::Hold, Play::Now(says(&["better"]))]);
    let mut response = open(&rig, &json!({})).await;
    let [last, draft] = ids(&rig);
    assert_eq!((last.len(), draft.len()), (0, 1), "the final answer waits for its turn");
    rig.state.drain();
    let late = rig.post(COMPLETIONS, &body(&json!({"draft": null}))).await;
    assert_eq!(late.status, 503, "{}", late.body);
    let mut empty = Box::pin(rig.state.admission.empty());
    assert!(tokio::time::timeout(Duration::ZERO, &mut empty).await.is_err(), "two are inside");
    for event in says(&["quick"]) {
        rig.engine.push(draft[0], event);
    }
    let mut lines = next_lines(&mut response).await;
    lines.extend(Answer::of(response).await.lines());
    assert_eq!((texts(&lines, true), texts(&lines, false)), ("quick".into(), "better".into()));
    assert_eq!(lines.last().expect("a line")["draft"]["outcome"], "finished");
    empty.await;
    assert_eq!((rig.state.in_flight(), cancels(&rig)), (0, Vec::new()));
}

#[tokio::test]
async fn a_request_that_is_called_like_a_draft_is_none() {
    let rig = rig(0);
    rig.engine.play([Play::Hold, Play::Hold]);
    let named = [("x-request-id", "r.draft"), ACCEPT];
    let other = rig.open(request("POST", COMPLETIONS, &named, &body(&json!({"draft": null})))).await;
    let mut response = open(&rig, &json!({})).await;
    let lines = next_lines(&mut response).await;
    assert_eq!(lines[0]["error"]["code"], "request_id_in_use", "the draft has failed: {lines:?}");
    let [of_other, own] = ids(&rig)[0][..] else { panic!("two requests") };
    assert_eq!(rig.send(request("DELETE", "/v1/requests/r", &[], "")).await.status, 200);
    assert_eq!(cancels(&rig), [(own, CancelCause::Asked)]);
    drop(response);
    rig.engine.push(of_other, SinkEvent::Finished(FinishReason::Length));
    assert_eq!(Answer::of(other).await.lines().last().expect("a line")["event"], "done");
    // One that is as long as it may be has a draft whose id may be sent on.
    rig.engine.forget_plays();
    let id = "r".repeat(128);
    let long = rig.open(request("POST", COMPLETIONS, &[ACCEPT, ("x-request-id", &id)], &body(&json!({})))).await;
    let lines = Answer::of(long).await.lines();
    assert_eq!(lines[0]["id"].as_str().map(str::len), Some(128), "{lines:?}");
}
