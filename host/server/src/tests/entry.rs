//! The way in beneath HTTP: what it answers is what the routes answer, and what is dropped is cancelled.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pointsman_sched::ids::Priority;
use pointsman_sched::request::CancelCause;
use serde_json::{Value, json};

use crate::ServerConfig;
use crate::entry::{Call, Ended, Event, FaultKind, Request};
use crate::fakes::{Play, Rig, bytes, says};

fn completion(extra: &Value) -> Request {
    let mut body = json!({"model": "m", "prompt": "hi"});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    Request::new(Call::Completion, body)
}

#[tokio::test]
async fn events_come_in_order_and_end() {
    let rig = Rig::new();
    let request = completion(&json!({"stream": true})).tenant("acme").priority(Priority::Low);
    let mut events = rig.state.submit(request.timeout(Duration::from_secs(9))).await.expect("admitted");
    assert_eq!((events.model(), events.id().starts_with("cmpl-")), ("m:a", true));
    let mut found = Vec::new();
    while let Some(event) = events.next().await {
        found.push(event.expect("no fault"));
    }
    assert_eq!(found[0], Event::Started { choice: 0, queued: Duration::from_micros(5), cached_tokens: 2 });
    let (mut said, mut tokens, mut ends) = (String::new(), Vec::new(), Vec::new());
    for event in &found {
        if let Event::Delta { choice: 0, text, token, ended, .. } = event {
            said.push_str(text);
            tokens.extend(*token);
            ends.extend(*ended);
        }
    }
    assert_eq!((&*said, tokens, ends), ("hello", bytes("hello"), vec![Ended::Stop]));
    assert_eq!(found.last(), Some(&Event::Done { prompt_tokens: 3, completion_tokens: 6, cached_tokens: 2 }));
    assert_eq!(rig.router.calls.lock().expect("unpoisoned")[0].0, "acme");
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!((taken[0].priority, taken[0].deadline), (Priority::Low as u8, 9_000_001));
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn whole_answers_are_those_of_the_routes() {
    let rig = Rig::new();
    rig.engine.takes.store(true, Ordering::Relaxed);
    for (call, body) in [
        (Call::Chat, json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]})),
        (Call::Completion, json!({"model": "m", "prompt": ["hi", "ho"], "echo": true})),
        (Call::Response, json!({"model": "m", "input": "hi"})),
        (Call::Embedding, json!({"model": "e", "input": ["hi"]})),
        (Call::Completion, json!({"model": "m"})),
        (Call::Embedding, json!({"model": "m", "input": "hi"})),
        (Call::Chat, json!([])),
    ] {
        let of_route = rig.post(call.path(), &body.to_string()).await;
        let (of_route, status) = (of_route.json(), of_route.status);
        match rig.state.answer(Request::new(call, body.clone())).await {
            Ok(mut answer) => {
                assert_eq!(status, 200, "{body}");
                if let Some(id) = answer.get_mut("id") {
                    *id = of_route["id"].clone();
                }
                // The items of a response are called by its id.
                if call == Call::Response {
                    answer["output"][0]["id"] = of_route["output"][0]["id"].clone();
                }
                assert_eq!(answer, of_route);
            }
            Err(fault) => {
                assert_eq!((fault.kind, status), (FaultKind::Invalid, 400), "{body}: {fault}");
                assert_eq!(Value::from(fault.message), of_route["error"]["message"]);
                assert_eq!(fault.param.map_or(Value::Null, Value::from), of_route["error"]["param"]);
                assert_eq!(fault.retry_after, None);
            }
        }
    }
}

#[tokio::test]
async fn vectors_are_an_event() {
    let rig = Rig::new();
    let request = Request::new(Call::Embedding, json!({"model": "e", "input": ["hi", "ho"]}));
    let mut events = rig.state.submit(request).await.expect("admitted");
    assert_eq!(rig.state.in_flight(), 1, "its place is held until its events are taken");
    let Some(Ok(Event::Embedded { vectors })) = events.next().await else { panic!("vectors come first") };
    assert_eq!(vectors.len(), 2);
    let Some(Ok(Event::Done { prompt_tokens, .. })) = events.next().await else { panic!("then the end") };
    assert_eq!((prompt_tokens, rig.state.in_flight()), (6, 0));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn what_is_dropped_is_cancelled() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold, Play::Hold, Play::Hold]);
    let one = rig.state.submit(completion(&json!({}))).await.expect("admitted");
    assert_eq!(rig.state.in_flight(), 1);
    drop(one);
    let mut many = rig.state.submit_many((0..9).map(|_| completion(&json!({}))), 2);
    tokio::select! {
        biased;
        _ = many.next() => panic!("both are held"),
        () = async { while rig.engine.taken.lock().expect("unpoisoned").len() < 3 { tokio::task::yield_now().await } } => {}
    }
    drop(many);
    rig.state.drained().await;
    let causes = rig.engine.cancels.lock().expect("unpoisoned").iter().map(|(.., cause)| *cause).collect::<Vec<_>>();
    assert_eq!(causes, [CancelCause::ClientGone; 3]);
    let refused = rig.state.submit(completion(&json!({}))).await.expect_err("it drains");
    assert_eq!((refused.kind, refused.retry_after), (FaultKind::Unavailable, Some(Duration::from_secs(1))));
}

#[tokio::test]
async fn many_are_answered_as_they_end_and_never_more_than_asked_at_once() {
    let rig = Rig::with(ServerConfig { max_requests: 3, ..ServerConfig::default() });
    rig.engine.takes.store(true, Ordering::Relaxed);
    rig.engine.play((0..20).map(|i| Play::Now(says(&[["a", "b"][i % 2]]))));
    let requests = (0..20).map(|i| if i == 7 { completion(&json!({"n": 99})) } else { completion(&json!({})) });
    let mut many = rig.state.submit_many(requests, 3);
    let mut places = Vec::new();
    while let Some((place, answer)) = many.next().await {
        match answer {
            Ok(answer) => assert_eq!(answer["object"], "text_completion"),
            Err(fault) => {
                assert_eq!((place, fault.kind), (7, FaultKind::Invalid), "the bound of 3 was never met: {fault}")
            }
        }
        places.push(place);
    }
    places.sort_unstable();
    assert_eq!(places, (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_full_host_loses_none_of_many() {
    let rig = Rig::with(ServerConfig { max_requests: 2, ..ServerConfig::default() });
    rig.engine.takes.store(true, Ordering::Relaxed);
    rig.engine.play([Play::Hold].into_iter().chain((0..6).map(|_| Play::Now(says(&["a"])))));
    // One place is somebody else's: of the two that are asked for at once, one is refused and asked again.
    let other = rig.state.submit(completion(&json!({}))).await.expect("admitted");
    let mut many = rig.state.submit_many((0..6).map(|_| completion(&json!({}))), 9);
    let mut places = Vec::new();
    while let Some((place, answer)) = many.next().await {
        assert_eq!(answer.expect("it waits for room")["object"], "text_completion");
        places.push(place);
    }
    drop(other);
    places.sort_unstable();
    assert_eq!(places, (0..6).collect::<Vec<_>>());
}

#[tokio::test]
async fn who_waits_for_room_waits_no_longer_than_his_timeout() {
    let rig = Rig::with(ServerConfig { max_requests: 1, ..ServerConfig::default() });
    rig.engine.play([Play::Hold]);
    let other = rig.state.submit(completion(&json!({}))).await.expect("admitted");
    let request = completion(&json!({})).timeout(Duration::from_millis(5));
    let mut many = rig.state.submit_many([request], 1);
    let (_, answer) = many.next().await.expect("one");
    assert_eq!(answer.expect_err("the host says to wait longer").kind, FaultKind::Saturated);
    drop(other);
}

#[tokio::test]
async fn timeouts_are_rounded_into_what_a_request_may_have() {
    let rig = Rig::new();
    for (timeout, ms) in
        [(Duration::from_micros(500), 1), (Duration::from_millis(1_500), 1_500), (Duration::MAX, 3_600_000)]
    {
        rig.engine.play([Play::Hold]);
        let events = rig.state.submit(completion(&json!({"timeout_ms": 7})).timeout(timeout)).await.expect("admitted");
        let deadline = rig.engine.taken.lock().expect("unpoisoned").last().expect("taken").deadline;
        assert_eq!(deadline, ms * 1_000 + 1, "{timeout:?}");
        drop(events);
    }
}

#[tokio::test]
async fn a_tenant_has_a_name() {
    let rig = Rig::new();
    for tenant in ["", "two words", &"x".repeat(129)] {
        let fault = rig.state.submit(completion(&json!({})).tenant(tenant)).await.expect_err(tenant);
        assert_eq!((fault.kind, fault.param.as_deref()), (FaultKind::Invalid, Some("tenant")), "{fault}");
    }
}
