//! Requests for models that are loaded on demand: what they wait for, what they are told, and what they hold.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pointsman_sched::route::Choice;
use serde_json::json;
use tokio::sync::watch;

use super::progressive::next_lines;
use crate::ServerConfig;
use crate::admin::wire::{LoadProgress, LoadStage};
use crate::error::ApiError;
use crate::fakes::{Rig, request};
use crate::ports::{Lease, LoadReport, Want};

const COMPLETIONS: &str = "/v1/completions";

/// A rig whose model `m` is loaded on demand, as is `cold`, which is not there.
fn rig(load_wait_ms: u64) -> Rig {
    let rig = Rig::with(ServerConfig { load_wait_ms, max_requests: 8, ..ServerConfig::default() });
    rig.engine.know(&["m", "cold", "e"]);
    rig
}

#[tokio::test]
async fn a_request_waits_for_its_model_or_is_told_why_not() {
    const NEVER: u64 = 60_000;
    let (changed, never) = (watch::channel(()), watch::channel(()));
    changed.0.send_replace(());
    let want = |letter| match letter {
        'h' => Want::Here(Lease::default()),
        'c' => Want::Coming(Lease::default(), changed.1.clone()),
        'n' => Want::Coming(Lease::default(), never.1.clone()),
        _ => Want::Failed { why: "cannot read config.json".into(), retry_after_ms: 2_500 },
    };
    // Longest wait, requests that wait already, the request's own time, what it hears (here, coming and changed by then, coming
    // and never there, failed); status, code, what it is told, whether it was a hit.
    type Case = (u64, u32, u64, &'static str, u16, &'static str, &'static str, bool);
    let cases: [Case; 10] = [
        (NEVER, 0, NEVER, "h", 200, "", "", true),
        (0, 0, NEVER, "h", 200, "", "", true),
        (NEVER, 4, NEVER, "h", 200, "", "", true),
        (NEVER, 0, NEVER, "ch", 200, "", "", false),
        (NEVER, 0, NEVER, "cch", 200, "", "", false),
        (NEVER, 0, NEVER, "f", 503, "model_not_loaded", "cannot read config.json", false),
        (NEVER, 0, NEVER, "cf", 503, "model_not_loaded", "cannot read", false),
        (0, 0, NEVER, "n", 503, "loading", "0 ms (engine.load_wait_ms)", false),
        (NEVER, 0, 1, "n", 504, "deadline_exceeded", "1 ms", false),
        (NEVER, 4, NEVER, "c", 503, "loading", "4 requests wait for models", false),
    ];
    for (i, (load_wait_ms, waiting, timeout_ms, wants, status, code, told, is_hit)) in cases.into_iter().enumerate() {
        let rig = rig(load_wait_ms);
        rig.state.waiting_for_models.store(waiting, Ordering::Relaxed);
        rig.admin.wants.lock().expect("unpoisoned").extend(wants.chars().map(want));
        let body = json!({"model": "m:a", "prompt": "hello", "timeout_ms": timeout_ms}).to_string();
        let answer = rig.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, status, "{i}: {}", answer.body);
        if status != 200 {
            let error = &answer.json()["error"];
            assert_eq!(error["code"], code, "{i}: {error}");
            assert!(error["message"].as_str().expect("text").contains(told), "{i}: {error}");
        }
        assert_eq!(answer.header("retry-after").is_empty(), status != 503, "{i}");
        assert_eq!(rig.state.waiting_for_models.load(Ordering::Relaxed), waiting, "{i}: its place is free again");
        assert_eq!(rig.state.in_flight(), 0, "{i}");
        let metrics = rig.state.metrics.models();
        assert_eq!((metrics.hits.get(), metrics.misses.get()), (is_hit.into(), (!is_hit).into()), "{i}");
        assert_eq!(rig.admin.wants.lock().expect("unpoisoned").len(), 0, "{i}: it asked no less");
    }
}

#[tokio::test]
async fn who_waits_for_a_model_is_cancelled_by_its_id() {
    let rig = rig(60_000);
    let (changed, _seen) = watch::channel(());
    let json = ("content-type", "application/json");
    let body = r#"{"model": "m", "prompt": "hello"}"#;
    let chat = r#"{"model": "m", "messages": [{"role": "user", "content": "hello"}]}"#;
    let routes = [
        (COMPLETIONS, body),
        ("/v1/chat/completions", chat),
        ("/tokenize", body),
        ("/detokenize", r#"{"model": "m", "tokens": [7]}"#),
        ("/v1/messages/count_tokens", chat),
        ("/v1/embeddings", r#"{"model": "e", "input": "hello"}"#),
    ];
    for (path, body) in routes.repeat(8) {
        rig.admin
            .wants
            .lock()
            .expect("unpoisoned")
            .extend([Want::Coming(Lease::default(), changed.subscribe()), Want::Here(Lease::default())]);
        let mut waiting = Box::pin(rig.send(request("POST", path, &[json, ("x-request-id", "r")], body)));
        assert!(tokio::time::timeout(Duration::ZERO, &mut waiting).await.is_err(), "{path}: it waits");
        let again = rig.send(request("POST", "/v1/requests/other/cancel", &[], "")).await;
        assert_eq!(again.status, 404, "{path}");
        assert_eq!(rig.send(request("DELETE", "/v1/requests/r", &[], "")).await.status, 200, "{path}");
        // The model comes at the same moment.
        changed.send_replace(());
        let answer = waiting.await;
        rig.admin.wants.lock().expect("unpoisoned").clear();
        assert_eq!(answer.status, 499, "{path}: {}", answer.body);
        assert!(answer.body.contains("cancelled"), "{path}: {}", answer.body);
        assert_eq!((rig.state.waiting_for_models.load(Ordering::Relaxed), rig.state.in_flight()), (0, 0), "{path}");
        let gone = rig.send(request("DELETE", "/v1/requests/r", &[], "")).await;
        assert_eq!(gone.status, 404, "{path}: its id is free");
    }
}

#[tokio::test]
async fn a_model_is_held_until_the_last_byte() {
    let rig = rig(0);
    let counted = Arc::new(());
    let stream = json!({"model": "m", "prompt": "hello", "stream": true}).to_string();
    for (path, body) in [
        (COMPLETIONS, stream.as_str()),
        (COMPLETIONS, r#"{"model": "m", "prompt": "hello"}"#),
        ("/v1/chat/completions", r#"{"model": "m", "messages": [{"role": "user", "content": "hello"}]}"#),
        ("/v1/messages", r#"{"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}"#),
        ("/v1/messages/count_tokens", r#"{"model": "m", "messages": [{"role": "user", "content": "hello"}]}"#),
        ("/tokenize", r#"{"model": "m", "prompt": "hello"}"#),
        ("/detokenize", r#"{"model": "m", "tokens": [7]}"#),
        ("/v1/embeddings", r#"{"model": "e", "input": "hello"}"#),
        ("/tokenize", r#"{"model": "e", "prompt": "hello"}"#),
    ] {
        rig.admin.wants.lock().expect("unpoisoned").push_back(Want::Here(Lease::of(&counted)));
        assert_eq!(rig.post(path, body).await.status, 200, "{path}");
        assert_eq!(Arc::strong_count(&counted), 1, "{path}");
    }
    rig.admin.wants.lock().expect("unpoisoned").push_back(Want::Here(Lease::of(&counted)));
    rig.engine.play([crate::fakes::Play::Hold]);
    let request = request("POST", COMPLETIONS, &[("content-type", "application/json")], &stream);
    let mut running = Box::pin(rig.open(request));
    // One look is enough: nothing on its way waits but for the first token.
    assert!(tokio::time::timeout(Duration::ZERO, &mut running).await.is_err());
    assert_eq!(Arc::strong_count(&counted), 2, "it has not ended");
    drop(running);
    assert_eq!(Arc::strong_count(&counted), 1, "nobody has it");
}

#[tokio::test]
async fn models_that_are_not_there_are_listed_with_their_state() {
    let rig = rig(0);
    let list = rig.send(request("GET", "/v1/models", &[], "")).await.json();
    let ids: Vec<&str> = list["data"].as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(ids, ["m", "m:a", "m:b", "e", "cold"]);
    let cold = rig.send(request("GET", "/v1/models/cold", &[], "")).await.json();
    assert_eq!((&cold["state"], &cold["max_model_len"]), (&json!("unloaded"), &json!(null)), "{cold}");
    assert_eq!(Some(&cold), list["data"].as_array().expect("a list").last());
    let unknown = rig.post(COMPLETIONS, r#"{"model": "other", "prompt": "x"}"#).await;
    assert!(unknown.status == 404 && unknown.body.contains("`cold`"), "{}", unknown.body);
    rig.admin.wants.lock().expect("unpoisoned").push_back(Want::Here(Lease::default()));
    let embedded = rig.post("/v1/embeddings", r#"{"model": "m", "input": "x"}"#).await;
    assert!(embedded.status == 400 && embedded.body.contains("generates text"), "{}", embedded.body);
    rig.engine.unload();
    rig.engine.know(&["cold"]);
    assert_eq!(rig.send(request("GET", "/ready", &[], "")).await.status, 200, "a request would bring it");
}

#[tokio::test]
async fn a_variant_that_comes_by_itself_is_held_by_requests_for_its_alias() {
    let counted = Arc::new(());
    // What is loaded on demand, whether `m:b` may be held, what is asked for, whether that asks for a model first; who answers,
    // and how many had `m:b` meanwhile.
    type Case = (&'static [&'static str], bool, &'static str, bool, &'static str, usize);
    let cases: [Case; 6] = [
        (&["m:b"], true, "m", false, "m:b", 1),
        (&["m:b"], false, "m", false, "m:a", 0),
        (&["m:b"], false, "m:b", true, "m:b", 0),
        (&["m:b"], false, "m:a", false, "m:a", 0),
        (&["m", "m:b"], true, "m", true, "m:b", 1),
        (&["m", "m:b"], false, "m:a", true, "m:a", 0),
    ];
    for (i, (known, is_there, model, asks, variant, n_held)) in cases.into_iter().enumerate() {
        let rig = || {
            let rig = Rig::new();
            rig.engine.know(known);
            // `m:b` has the third replica.
            *rig.router.choice.lock().expect("unpoisoned") = Choice::Pick(if n_held > 0 { 2 } else { 0 });
            let held = is_there.then(|| ("m:b".to_owned(), Arc::clone(&counted)));
            rig.admin.held.lock().expect("unpoisoned").extend(held);
            rig.admin.wants.lock().expect("unpoisoned").extend(asks.then(|| Want::Here(Lease::default())));
            rig
        };
        let answering = rig();
        let rig = rig();
        rig.engine.play([crate::fakes::Play::Hold]);
        let body = json!({"model": model, "prompt": "hello"}).to_string();
        let json = ("content-type", "application/json");
        let before = Arc::strong_count(&counted);
        let mut running = Box::pin(rig.send(request("POST", COMPLETIONS, &[json], &body)));
        assert!(tokio::time::timeout(Duration::ZERO, &mut running).await.is_err(), "{i}: it runs");
        assert_eq!(Arc::strong_count(&counted) - before, n_held, "{i}");
        drop(running);
        assert_eq!(Arc::strong_count(&counted), before, "{i}: nobody has it");
        drop(rig);
        let answer = answering.post(COMPLETIONS, &body).await;
        assert_eq!((answer.status, answer.header("x-pointsman-variant")), (200, variant), "{i}: {}", answer.body);
        assert!(answering.admin.wants.lock().expect("unpoisoned").is_empty(), "{i}: it asked no less");
    }
    let rig = Rig::new();
    rig.engine.know(&["m:c"]);
    let cold = rig.send(request("GET", "/v1/models/m:c", &[], "")).await.json();
    assert_eq!((&cold["state"], &cold["root"]), (&json!("unloaded"), &json!("m")), "{cold}");
}

#[tokio::test]
async fn an_id_is_in_use_from_the_wait_until_the_end() {
    let rig = rig(60_000);
    let (registry, engine) = (&rig.state.registry, &rig.state.engine);
    let id: Arc<str> = "r".into();
    for is_cancelled in [false, true] {
        // It has its model, and its prompt is made into tokens.
        let mut permit = rig.state.admission.enter().expect("room");
        permit.known_by(|| registry.know(&id, None)).expect("its id is free");
        assert!(registry.know(&id, None).is_err(), "nobody else may have its id");
        assert!(permit.check_cancelled().is_ok());
        if is_cancelled {
            assert!(registry.cancel(&id, None, &**engine), "a cancel finds it");
        }
        let entered = registry.enter(&id, None, engine, permit);
        match is_cancelled {
            true => assert!(matches!(entered, Err(ApiError::Cancelled))),
            false => {
                let in_flight = entered.expect("it is known by its own id");
                assert!(registry.know(&id, None).is_err() && registry.cancel(&id, None, &**engine));
                drop(in_flight);
            }
        }
        assert!(!registry.cancel(&id, None, &**engine), "its id is free");
    }
}

#[tokio::test]
async fn events_tell_of_the_wait_for_a_model() {
    let ndjson = [("content-type", "application/json"), ("accept", "application/x-ndjson"), ("x-request-id", "r")];
    let percent = |percent| {
        let (stage, bytes, total_bytes) = (LoadStage::Packing, 7, 9);
        LoadReport::Progress(LoadProgress { stage, bytes, total_bytes, percent })
    };
    // What is asked for, and how the wait ends; what is told then.
    for (extra, ends_well) in [(json!({}), true), (json!({}), false), (json!({"draft": "m:b"}), true)] {
        let rig = rig(60_000);
        let ((changed, _seen), (load, reports)) = (watch::channel(()), watch::channel(percent(3)));
        *rig.admin.loads.lock().expect("unpoisoned") = Some(reports);
        let end = match ends_well {
            true => Want::Here(Lease::default()),
            false => Want::Failed { why: "cannot read config.json".into(), retry_after_ms: 2_500 },
        };
        let wants = [Want::Coming(Lease::default(), changed.subscribe()), end, Want::Here(Lease::default())];
        rig.admin.wants.lock().expect("unpoisoned").extend(wants);
        let mut body = json!({"model": "m:a", "prompt": "hello", "max_tokens": 8});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let mut response = rig.open(request("POST", COMPLETIONS, &ndjson, &body.to_string())).await;
        assert!(response.status() == 200 && response.headers()["content-type"] == "application/x-ndjson", "{extra}");
        let line = |percent: u8| {
            json!({"event": "loading", "stage": "loading", "progress": 0, "id": "r", "created": 1_700_000_000,
                "model": "m", "percent": percent})
        };
        assert_eq!(next_lines(&mut response).await, [line(3)], "{extra}: before anything of it is there");
        load.send_replace(percent(40));
        assert_eq!(next_lines(&mut response).await, [line(40)], "{extra}");
        changed.send_replace(());
        let rest = crate::fakes::Answer::of(response).await.lines();
        let events: Vec<&str> = rest.iter().filter_map(|line| line["event"].as_str()).collect();
        match ends_well {
            true => assert!(events.starts_with(&["queued"]) && events.ends_with(&["done"]), "{extra}: {events:?}"),
            false => assert_eq!((events, &rest[0]["error"]["code"]), (vec!["error"], &json!("model_not_loaded"))),
        }
        assert_eq!(rig.state.in_flight(), 0, "{extra}");
    }
    // Who need not wait has a status and headers of its own.
    let rig = rig(60_000);
    for (want, status) in [
        (Want::Here(Lease::default()), 200),
        (Want::Failed { why: "cannot read config.json".into(), retry_after_ms: 2_500 }, 503),
    ] {
        rig.admin.wants.lock().expect("unpoisoned").push_back(want);
        let answer = rig.send(request("POST", COMPLETIONS, &ndjson, r#"{"model": "m:a", "prompt": "hello"}"#)).await;
        assert_eq!((answer.status, answer.header("x-pointsman-variant").is_empty()), (status, status != 200));
    }
}
