//! The response cache: who gets whose answer, and what becomes of those that wait for one.

use std::pin::Pin;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{Request as HttpRequest, Response};
use pointsman_sched::admit::{Outcome, Verdict};
use pointsman_sched::ids::RequestId;
use pointsman_sched::request::{CancelCause, Drafted, Failure, FinishReason, SinkEvent};
use pointsman_sched::route::{Refusal, Rejection};
use serde_json::{Value, json};

use crate::ServerConfig;
use crate::admin::wire;
use crate::fakes::{Answer, Play, Rig, bytes, request, says, token};
use crate::ports::{Author, SubmitError};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const SECOND: u64 = 1_000_000;

fn rig() -> Rig {
    Rig::with(ServerConfig { cache_bytes: 1 << 20, cache_ttl_ms: 10_000, ..ServerConfig::default() })
}

fn body(extra: &Value) -> String {
    let mut body = json!({"model": "m:b", "prompt": "hi", "max_tokens": 8, "temperature": 0});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

fn asking(headers: &[(&str, &str)], extra: &Value) -> HttpRequest<Body> {
    request("POST", COMPLETIONS, headers, &body(extra))
}

/// How the cache served it.
async fn served(rig: &Rig, headers: &[(&str, &str)], extra: &Value) -> String {
    // The fake engine's drivers take nothing out of their mailboxes.
    for replica in rig.state.engine.catalog().variants.iter().flat_map(|variant| &variant.replicas) {
        replica.gauges.reserved_requests.store(0, Ordering::Relaxed);
    }
    let answer = rig.send(asking(headers, extra)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.header("x-pointsman-cache").to_owned()
}

fn n_computed(rig: &Rig) -> usize {
    rig.engine.taken.lock().expect("unpoisoned").len()
}

fn stats(rig: &Rig) -> Value {
    serde_json::to_value(rig.state.cache.stats()).expect("JSON")
}

/// Runs requests that wait until something has come about.
async fn until(waiting: &mut [&mut Pin<Box<dyn Future<Output = Response<Body>> + '_>>], happened: impl Fn() -> bool) {
    std::future::poll_fn(|cx| {
        for request in &mut *waiting {
            assert!(request.as_mut().poll(cx).is_pending(), "it waits");
        }
        if happened() {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

fn opened<'a>(
    rig: &'a Rig,
    headers: &[(&str, &str)],
    extra: &Value,
) -> Pin<Box<dyn Future<Output = Response<Body>> + 'a>> {
    Box::pin(rig.open(asking(headers, extra)))
}

/// Pushes events into a held request.
fn tell(rig: &Rig, id: RequestId, events: Vec<SinkEvent>) {
    for event in events {
        rig.engine.push(id, event);
    }
}

#[tokio::test]
async fn an_answer_is_told_again_in_every_shape() {
    let rig = rig();
    let talk =
        json!({"model": "m:b", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]});
    let with = |extra: &[(&str, Value)]| {
        let mut body = talk.clone();
        extra.iter().for_each(|(name, value)| body[*name] = value.clone());
        body.to_string()
    };
    let first = rig.post(CHAT, &talk.to_string()).await;
    assert_eq!((first.header("x-pointsman-cache"), first.header("age")), ("miss", ""));
    rig.clock.now.fetch_add(3 * SECOND, Ordering::Relaxed);
    let again = rig.post(CHAT, &talk.to_string()).await;
    assert_eq!((again.header("x-pointsman-cache"), again.header("age")), ("hit", "3"));
    assert_eq!(again.header("x-pointsman-replica"), "m:b@x");
    let (mut then, mut now) = (first.json(), again.json());
    assert_ne!(then["id"], now["id"]);
    assert_eq!(now["usage"]["prompt_tokens_details"]["cached_tokens"], now["usage"]["prompt_tokens"]);
    for answer in [&mut then, &mut now] {
        answer["id"] = Value::Null;
        answer["usage"]["prompt_tokens_details"] = Value::Null;
    }
    assert_eq!(then, now);

    let streamed = rig.post(CHAT, &with(&[("stream", true.into())])).await;
    let computed = Rig::new().post(CHAT, &with(&[("stream", true.into())])).await;
    let deltas = |answer: &Answer| -> Vec<Value> {
        answer.events().iter().filter_map(|event| event.get("choices").cloned()).collect()
    };
    assert_eq!(streamed.header("x-pointsman-cache"), "hit");
    assert_eq!(deltas(&streamed), deltas(&computed), "the same chunks as from an engine");
    let lines = rig.send(request("POST", CHAT, &[("accept", "application/x-ndjson")], &talk.to_string())).await.lines();
    let kinds: Vec<&str> = lines.iter().filter_map(|line| line["event"].as_str()).collect();
    assert_eq!(kinds, ["queued", "started", "token", "token", "token", "token", "token", "finished", "done"]);
    let message = rig.post("/v1/messages", &talk.to_string()).await;
    assert_eq!(message.header("x-pointsman-cache"), "hit");
    let usage = &message.json()["usage"];
    assert_eq!((&usage["input_tokens"], &usage["output_tokens"]), (&json!(0), &json!(6)), "{usage}");
    let response = json!({"model": "m:b", "input": "hi", "max_output_tokens": 8, "temperature": 0, "stream": true});
    assert_eq!(rig.post("/v1/responses", &response.to_string()).await.header("x-pointsman-cache"), "hit");
    assert_eq!(n_computed(&rig), 1);
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn choices_and_log_probabilities_are_told_again() {
    let rig = rig();
    let logprobs =
        |chosen: f32| Some(Box::new(pointsman_sched::request::TokenLogprobs { chosen, top: vec![(100, -0.5)] }));
    let said = |id: u32| {
        Play::Now(vec![
            SinkEvent::Token { token: id, logprobs: logprobs(-0.25), drafted: Drafted::default() },
            SinkEvent::Token { token: id + 1, logprobs: logprobs(-1.5), drafted: Drafted::default() },
            SinkEvent::Finished(FinishReason::Length),
        ])
    };
    rig.engine.play([said(100), said(101), said(102), said(103)]);
    let extra = json!({"prompt": ["hi", "ho"], "n": 2, "logprobs": 1, "seed": 7, "temperature": 1});
    let (first, again) = (rig.send(asking(&[], &extra)).await, rig.send(asking(&[], &extra)).await);
    assert_eq!(again.header("x-pointsman-cache"), "hit");
    assert_eq!((first.json()["choices"].as_array().map(Vec::len), n_computed(&rig)), (Some(4), 4));
    assert_eq!(first.json()["choices"], again.json()["choices"]);
}

#[tokio::test]
async fn what_may_change_the_answer_makes_another_request() {
    let rig = rig();
    assert_eq!(served(&rig, &[], &json!({})).await, "miss");
    for same in [
        json!({}),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
        json!({"user": "u", "priority": "low", "timeout_ms": 5_000, "cache_prompt": false, "unknown": 1}),
        json!({"n": 1, "top_p": 1, "top_k": 0, "presence_penalty": -0.0, "seed": 3, "echo": true}),
    ] {
        assert_eq!(served(&rig, &[], &same).await, "hit", "{same}");
    }
    let others = [
        json!({"prompt": "ho"}),
        json!({"prompt": ["hi", "hi"]}),
        json!({"prompt": "h", "stop": "i"}),
        json!({"model": "m:a"}),
        json!({"model": "m"}),
        json!({"max_tokens": 9}),
        json!({"min_tokens": 1}),
        json!({"n": 2}),
        json!({"stop": "x"}),
        json!({"stop": ["x", "y"]}),
        json!({"stop": ["xy"]}),
        json!({"stop": ["y", "x"]}),
        json!({"stop_token_ids": [9]}),
        json!({"ignore_eos": true}),
        json!({"skip_special_tokens": false}),
        json!({"temperature": 1, "seed": 3}),
        json!({"temperature": 1, "seed": 4}),
        json!({"temperature": 0.5, "seed": 4}),
        json!({"temperature": 1, "cache_response": true}),
        json!({"top_p": 0.5}),
        json!({"top_k": 2}),
        json!({"min_p": 0.5}),
        json!({"repetition_penalty": 1.5}),
        json!({"presence_penalty": 1}),
        json!({"frequency_penalty": 1}),
        json!({"logit_bias": {"9": 1}}),
        json!({"logit_bias": {"9": 1, "10": 2}}),
        json!({"logprobs": 0}),
        json!({"logprobs": 1}),
        json!({"guided_regex": "a+"}),
        json!({"guided_regex": "b+"}),
        json!({"guided_grammar": "start: \"a\""}),
        json!({"guided_json": {"type": "object", "properties": {"a": {}, "b": {}}}}),
        json!({"guided_json": {"type": "object", "properties": {"b": {}, "a": {}}}}),
    ];
    for other in &others {
        assert_eq!(served(&rig, &[], other).await, "miss", "{other}");
    }
    for other in others {
        assert_eq!(served(&rig, &[], &other).await, "hit", "{other}");
    }
    assert_eq!(served(&rig, &[], &json!({"logit_bias": {"10": 2, "9": 1}})).await, "hit", "their order means nothing");
    for (tenant, expect) in [("a", "miss"), ("b", "miss"), ("a", "hit")] {
        assert_eq!(served(&rig, &[("x-tenant-id", tenant)], &json!({})).await, expect, "{tenant}");
    }
}

#[tokio::test]
async fn a_client_says_what_it_wants_of_the_cache() {
    let rig = rig();
    let control = |text: &'static str| [("cache-control", text)];
    for (at, headers, extra, expect) in [
        (0, &[][..], json!({"temperature": 1}), "bypass"),
        (0, &[], json!({"temperature": 1, "cache_response": true}), "miss"),
        (0, &[], json!({"temperature": 1, "cache_response": true}), "hit"),
        (0, &[], json!({"temperature": 1}), "bypass"),
        (0, &control("no-store"), json!({}), "bypass"),
        (0, &[], json!({"cache_response": false}), "bypass"),
        (0, &[], json!({}), "miss"),
        (1, &control("no-store"), json!({}), "bypass"),
        (5, &control("max-age=6"), json!({}), "hit"),
        (5, &control("max-age=4"), json!({}), "miss"),
        (8, &control("max-age=4"), json!({}), "hit"),
        (8, &control("no-cache"), json!({}), "miss"),
        (17, &[], json!({}), "hit"),
        // It lives for 10 s.
        (18, &[], json!({}), "stale"),
    ] {
        rig.clock.now.store(at * SECOND, Ordering::Relaxed);
        assert_eq!(served(&rig, headers, &extra).await, expect, "at {at}: {headers:?} {extra}");
    }
    // The answer of time 0 that nobody has asked for since went when the last one came.
    let stats = stats(&rig);
    assert_eq!((&stats["stale"], &stats["entries"], &stats["bypassed"]), (&json!(1), &json!(1), &json!(5)), "{stats}");
    assert_eq!(served(&Rig::new(), &[], &json!({})).await, "", "off");
}

#[tokio::test]
async fn policies_that_have_a_say_are_part_of_the_request() {
    let rig = rig();
    let headers = [("x-plan", "gold")];
    let sampled_by = |generation, mark| {
        rig.admin.authors.lock().expect("unpoisoned").sampler = Author { generation, mark, is_trial: false }
    };
    assert_eq!(served(&rig, &headers, &json!({})).await, "miss");
    sampled_by(Some(5), 1);
    assert_eq!(served(&rig, &headers, &json!({})).await, "miss");
    assert_eq!(served(&rig, &headers, &json!({})).await, "hit");
    sampled_by(None, 2);
    assert_eq!(served(&rig, &headers, &json!({})).await, "hit", "back at the native policy");
    // A fault while it was computed.
    rig.engine.play([Play::Hold]);
    let mut leader = opened(&rig, &[], &json!({"prompt": "other"}));
    until(&mut [&mut leader], || n_computed(&rig) == 3).await;
    sampled_by(None, 3);
    tell(&rig, rig.engine.last_id(), says(&["x"]));
    assert_eq!(Answer::of(leader.await).await.status, 200);
    assert_eq!(served(&rig, &[], &json!({"prompt": "other"})).await, "miss", "it was told and not kept");
    // A router may refuse anybody, and chooses where there are several variants: then it sees who asks.
    let alias = json!({"model": "m"});
    for (generation, session, alias_is, variant_is) in [
        (None, "s", "miss", "hit"),
        (None, "t", "hit", "hit"),
        (Some(2), "s", "miss", "miss"),
        (Some(2), "t", "miss", "hit"),
        (Some(2), "s", "hit", "hit"),
    ] {
        rig.admin.authors.lock().expect("unpoisoned").router.generation = generation;
        let headers = [("x-session-id", session)];
        assert_eq!(served(&rig, &headers, &alias).await, alias_is, "{generation:?} {session}");
        assert_eq!(served(&rig, &headers, &json!({})).await, variant_is, "{generation:?} {session}, pinned");
    }
    rig.admin.authors.lock().expect("unpoisoned").router.is_trial = true;
    assert_eq!(served(&rig, &[], &json!({})).await, "bypass", "a rollout measures");
}

#[tokio::test]
async fn an_answer_of_another_variant_than_was_meant_is_not_kept() {
    let rig = rig();
    // The router picks a replica whose mailbox is full.
    rig.engine.play([Play::Refuse(SubmitError::Full)]);
    assert_eq!(served(&rig, &[], &json!({"model": "m"})).await, "miss");
    assert_eq!(served(&rig, &[], &json!({"model": "m"})).await, "miss");
    assert_eq!(served(&rig, &[], &json!({"model": "m"})).await, "hit");
}

#[tokio::test]
async fn weights_are_part_of_the_request_and_a_rollout_computes() {
    let rig = rig();
    let alias = json!({"model": "m"});
    let weights = |weights: &[(&str, u32)], rollout| {
        let weights = weights.iter().map(|(id, weight)| ((*id).to_owned(), *weight)).collect();
        *rig.admin.weights.lock().expect("unpoisoned") = wire::Weights { weights, rollout, ..wire::Weights::default() };
    };
    weights(&[("m:a", 1)], None);
    assert_eq!(served(&rig, &[], &alias).await, "miss");
    weights(&[("m:b", 1)], None);
    assert_eq!(served(&rig, &[], &alias).await, "miss");
    weights(&[("m:a", 1)], None);
    assert_eq!(served(&rig, &[], &alias).await, "hit");
    let trial = wire::Trial { id: "alias.m-1".into(), candidate: "m:b".into(), percent: 50 };
    weights(&[("m:a", 1)], Some(trial));
    assert_eq!(served(&rig, &[], &alias).await, "bypass");
}

#[tokio::test]
async fn the_door_comes_before_the_cache() {
    let rig = rig();
    rig.door.native.store(false, Ordering::Relaxed);
    let says = |verdict| *rig.door.verdict.lock().expect("unpoisoned") = Some(verdict);
    says(Verdict::Accept);
    assert_eq!(served(&rig, &[], &json!({})).await, "miss");
    assert_eq!(served(&rig, &[], &json!({})).await, "hit");
    let told: Vec<_> = {
        let endings = rig.door.endings.lock().expect("unpoisoned");
        endings.iter().map(|e| (e.outcome, e.prompt_tokens, e.cached_tokens, e.generated_tokens)).collect()
    };
    assert_eq!(told, [(Outcome::Finished, 3, 2, 6), (Outcome::Finished, 3, 3, 0)]);
    let reason = Refusal::Quota;
    says(Verdict::Reject(Rejection { reason, retry_after_ms: 1, message: String::new() }));
    assert_eq!(rig.send(asking(&[], &json!({}))).await.status, 429);
}

#[tokio::test]
async fn equal_requests_are_computed_once() {
    let rig = rig();
    rig.engine.play([Play::Hold]);
    let mut leader = opened(&rig, &[], &json!({}));
    let mut whole = opened(&rig, &[], &json!({}));
    let mut stream = opened(&rig, &[], &json!({"stream": true}));
    until(&mut [&mut leader, &mut whole, &mut stream], || rig.state.in_flight() == 3).await;
    tell(&rig, rig.engine.last_id(), says(&["hello"]));
    let leader = Answer::of(leader.await).await;
    assert_eq!(leader.header("x-pointsman-cache"), "miss");
    let whole = Answer::of(whole.await).await;
    assert_eq!((whole.header("x-pointsman-cache"), whole.header("x-pointsman-variant")), ("joined", "m:b"));
    assert_eq!(whole.json()["choices"], leader.json()["choices"]);
    let stream = Answer::of(stream.await).await;
    assert_eq!(stream.header("x-pointsman-cache"), "joined");
    assert_eq!(stream.events().len(), 5 + 2, "a chunk a token, the end, and `[DONE]`");
    assert_eq!(n_computed(&rig), 1);
    assert_eq!(served(&rig, &[], &json!({})).await, "hit");
    assert_eq!((stats(&rig)["in_flight"].clone(), rig.state.in_flight()), (json!(0), 0));
}

#[tokio::test]
async fn a_leader_that_goes_away_takes_nobody_with_it() {
    let rig = rig();
    rig.door.native.store(false, Ordering::Relaxed);
    *rig.door.verdict.lock().expect("unpoisoned") = Some(Verdict::Accept);
    rig.engine.play([Play::Hold]);
    let extra = json!({"stream": true});
    let (mut leader, mut one) = (opened(&rig, &[], &extra), opened(&rig, &[], &json!({})));
    let mut other = opened(&rig, &[], &extra);
    until(&mut [&mut leader, &mut one, &mut other], || rig.state.in_flight() == 3).await;
    // It has told a part by then.
    tell(&rig, rig.engine.last_id(), vec![token(bytes("h")[0])]);
    let leader = leader.await;
    until(&mut [&mut one, &mut other], || true).await;
    drop(leader);
    assert_eq!(rig.engine.cancels.lock().expect("unpoisoned").len(), 1, "nobody needs it any more");
    let (one, other) = (Answer::of(one.await).await, Answer::of(other.await).await);
    assert_eq!((one.header("x-pointsman-cache"), one.json()["choices"][0]["text"].clone()), ("miss", json!("hello")));
    assert_eq!((other.status, other.events().len()), (200, 5 + 2), "{}", other.body);
    assert_eq!(n_computed(&rig), 2, "one of them computes");
    assert_eq!(served(&rig, &[], &json!({})).await, "hit", "who took over leads");
    let endings: Vec<_> = rig.door.endings.lock().expect("unpoisoned").iter().map(|e| e.outcome).collect();
    assert_eq!(endings, [Outcome::Cancelled, Outcome::Finished, Outcome::Finished, Outcome::Finished]);
    let loads = rig.door.loads.lock().expect("unpoisoned").clone();
    assert_eq!(loads.last().map(|load| (load.tenant_in_flight, load.tenant_queued_tokens)), Some((0, 0)));
}

#[tokio::test]
async fn a_leader_that_is_refused_or_fails_takes_nobody_with_it() {
    for (stops, status) in [
        (vec![SinkEvent::Failed(Failure::Engine("lost".into()))], 500),
        (vec![SinkEvent::Cancelled(CancelCause::Deadline)], 504),
    ] {
        let rig = rig();
        rig.engine.play([Play::Hold]);
        let (mut leader, mut follower) = (opened(&rig, &[], &json!({})), opened(&rig, &[], &json!({})));
        until(&mut [&mut leader, &mut follower], || rig.state.in_flight() == 2).await;
        tell(&rig, rig.engine.last_id(), stops);
        assert_eq!(Answer::of(leader.await).await.status, status);
        let follower = Answer::of(follower.await).await;
        assert_eq!((follower.status, follower.json()["choices"][0]["text"].clone()), (200, json!("hello")));
    }
    let rig = rig();
    rig.engine.play([Play::Refuse(SubmitError::Full)]);
    assert_eq!(rig.send(asking(&[], &json!({}))).await.status, 429);
    assert_eq!(served(&rig, &[], &json!({})).await, "miss");
    // Its follower is refused for itself.
    rig.engine.play([Play::Hold, Play::Refuse(SubmitError::Full)]);
    let extra = json!({"prompt": "ho"});
    let (mut leader, mut follower) = (opened(&rig, &[], &extra), opened(&rig, &[], &extra));
    until(&mut [&mut leader, &mut follower], || rig.state.in_flight() == 2).await;
    drop(leader);
    assert_eq!(Answer::of(follower.await).await.status, 429);
    assert_eq!((stats(&rig)["in_flight"].clone(), rig.state.in_flight()), (json!(0), 0));
}

#[tokio::test]
async fn a_follower_ends_alone() {
    let rig = rig();
    rig.engine.play([Play::Hold]);
    let mut leader = opened(&rig, &[], &json!({}));
    let mut follower = opened(&rig, &[("x-request-id", "mine")], &json!({}));
    until(&mut [&mut leader, &mut follower], || rig.state.in_flight() == 2).await;
    let cancelled = rig.send(request("DELETE", "/v1/requests/mine", &[], "")).await;
    assert_eq!((cancelled.status, Answer::of(follower.await).await.status), (200, 499));
    let late = rig.send(asking(&[], &json!({"timeout_ms": 1}))).await;
    assert_eq!((late.status, late.json()["error"]["code"].clone()), (504, json!("deadline_exceeded")));
    let mut gone = opened(&rig, &[], &json!({}));
    until(&mut [&mut leader, &mut gone], || rig.state.in_flight() == 2).await;
    drop(gone);
    assert!(rig.engine.cancels.lock().expect("unpoisoned").is_empty(), "the leader goes on");
    // Whoever is more urgent does not wait.
    assert_eq!(served(&rig, &[], &json!({"priority": "critical"})).await, "miss");
    let first = rig.engine.taken.lock().expect("unpoisoned")[0].id;
    tell(&rig, first, says(&["hello"]));
    assert_eq!(Answer::of(leader.await).await.status, 200);
    assert_eq!((n_computed(&rig), rig.state.in_flight()), (2, 0));
}

#[tokio::test]
async fn room_is_bounded_and_the_least_recently_used_go() {
    let rig = Rig::with(ServerConfig { cache_bytes: 16 << 10, ..ServerConfig::default() });
    let prompt = |i: usize| json!({"prompt": format!("prompt {i}")});
    for i in 0..40 {
        assert_eq!(served(&rig, &[], &prompt(i)).await, "miss", "{i}");
        assert_eq!(served(&rig, &[], &prompt(0)).await, "hit", "it is in use");
    }
    let full = stats(&rig);
    let [entries, bytes, evicted] = ["entries", "bytes", "evicted"].map(|name| full[name].as_u64().expect("a number"));
    assert!((8..40).contains(&entries) && bytes <= 16 << 10 && entries + evicted == 40, "{full}");
    assert_eq!(served(&rig, &[], &prompt(39)).await, "hit");
    assert_eq!(served(&rig, &[], &prompt(1)).await, "miss");
    // An eighth of the room at most.
    let long = json!({"prompt": "long", "max_tokens": 50});
    for _ in 0..2 {
        rig.engine.play([Play::Now(says(&["x".repeat(49).as_str()]))]);
        assert_eq!(served(&rig, &[], &long).await, "miss");
    }
}

#[tokio::test]
async fn an_operator_looks_and_clears() {
    let rig = rig();
    assert_eq!(served(&rig, &[], &json!({})).await, "miss");
    let ask = |method: &str| rig.ask_admin(request(method, "/admin/v1/cache", &[("host", "localhost")], ""));
    let shown = ask("GET").await.json();
    assert_eq!(
        (&shown["enabled"], &shown["entries"], &shown["ttl_s"]),
        (&json!(true), &json!(1), &json!(10)),
        "{shown}"
    );
    // One on its way is not kept.
    rig.engine.play([Play::Hold]);
    let mut leader = opened(&rig, &[], &json!({"prompt": "ho"}));
    until(&mut [&mut leader], || n_computed(&rig) == 2).await;
    let cleared = ask("DELETE").await.json();
    assert_eq!((&cleared["entries"], &cleared["bytes"]), (&json!(1), &shown["bytes"]));
    tell(&rig, rig.engine.last_id(), says(&["x"]));
    assert_eq!(Answer::of(leader.await).await.status, 200);
    for (prompt, expect) in [("ho", "miss"), ("hi", "miss"), ("hi", "hit")] {
        assert_eq!(served(&rig, &[], &json!({"prompt": prompt})).await, expect, "{prompt}");
    }
    let now = ask("GET").await.json();
    assert_eq!((&now["entries"], &now["misses"], &now["hits"]), (&json!(2), &json!(4), &json!(1)), "{now}");
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    assert!(metrics.contains(r#"pointsman_response_cache_requests_total{outcome="hit"} 1"#), "{metrics}");
}
