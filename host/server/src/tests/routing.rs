//! What routers see, what their answers come to, and the routes beside generation.

use std::sync::atomic::Ordering;

use pointsman_sched::predict::Outlook;
use pointsman_sched::prefix::{chain_hashes, salted_hashes};
use pointsman_sched::route::{Choice, Refusal, Rejection};
use serde_json::{Value, json};

use crate::ServerConfig;
use crate::fakes::{Play, Rig, bytes, request};
use crate::identity::session_hash;
use crate::ports::SubmitError;

const COMPLETIONS: &str = "/v1/completions";

fn body(extra: &Value) -> String {
    let mut body = json!({"model": "m", "prompt": bytes("abcdefghi"), "max_tokens": 4});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

#[tokio::test]
async fn a_router_sees_load_cache_and_caller() {
    let rig = Rig::with(ServerConfig { route_headers: vec!["x-plan".into()], ..ServerConfig::default() });
    let catalog = rig.state.engine.catalog();
    let replica = &catalog.variants[0].replicas[1];
    // Those of the tenant, and of nobody else.
    for hash in salted_hashes(session_hash("t"), &bytes("abcdefgh"), 4) {
        replica.sketch.insert(hash);
    }
    replica.gauges.waiting.store(2, Ordering::Relaxed);
    replica.gauges.reserve(30);
    let headers = [("x-tenant-id", "t"), ("x-session-id", "s"), ("x-plan", "gold"), ("x-other", "no")];
    rig.send(request("POST", COMPLETIONS, &headers, &body(&json!({})))).await;
    rig.post(COMPLETIONS, &body(&json!({"model": "m:b", "cache_prompt": false, "user": "u", "prompt": "text"}))).await;
    let calls = rig.router.calls.lock().expect("unpoisoned");
    let (tenant, session, attributes, columns) = &calls[0];
    assert_eq!((tenant.as_str(), *session), ("t", session_hash("s")));
    assert_eq!(attributes, &[("header.x-plan".to_owned(), "gold".to_owned())]);
    assert_eq!(columns.id, [0, 1, 2]);
    assert_eq!(columns.cached_tokens, [0, 8, 0], "two of two full blocks");
    assert_eq!((&columns.waiting, &columns.queued_tokens), (&vec![0, 3, 0], &vec![0, 30, 0]));
    let (_, session, attributes, columns) = &calls[1];
    assert_eq!((*session, &columns.id), (session_hash("u"), &vec![2]), "a variant is pinned");
    assert_eq!(attributes, &[("prompt-head".to_owned(), "text".to_owned())]);
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!(taken.iter().map(|t| t.n_hashes).collect::<Vec<_>>(), [2, 0]);
}

#[tokio::test]
async fn a_router_sees_labels_age_and_a_prediction() {
    let rig = Rig::new();
    let gauges = &rig.state.engine.catalog().variants[0].replicas[1].gauges;
    gauges.look_ahead(Outlook { step_ns: 5_000_000, token_ns: 100_000, step_tokens: 32 });
    gauges.queued_tokens.store(31, Ordering::Relaxed);
    gauges.busy_ppm.store(250_000, Ordering::Relaxed);
    gauges.failed_ppm.store(1_000, Ordering::Relaxed);
    rig.clock.now.store(900, Ordering::Relaxed);
    let asked = json!({"n": 2, "temperature": 0.7, "stream": false, "min_tokens": 3, "cache_prompt": false});
    rig.post(COMPLETIONS, &body(&asked)).await;
    let columns = rig.router.calls.lock().expect("unpoisoned")[0].3.clone();
    assert_eq!((&columns.load, &columns.errors), (&vec![0, 250_000, 0], &vec![0, 1_000, 0]));
    assert_eq!(columns.age, [900, 900, 900]);
    assert_eq!(columns.predicted_ttft, [0, 14_000, 0], "40 tokens in two steps; the others have not computed yet");
    assert_eq!(columns.labels, [("price".into(), vec![3, 4, 5])]);
    let why = rig.ask_admin(request("GET", "/admin/v1/requests?limit=1", &[("host", "localhost")], "")).await.json();
    let id = why["data"][0]["id"].as_str().expect("an id").to_owned();
    let path = format!("/admin/v1/requests/{id}");
    let why = rig.ask_admin(request("GET", &path, &[("host", "localhost")], "")).await.json();
    let numbers =
        json!({"choices": 2, "temperature_ppm": 700_000, "stream": 0, "min_new_tokens": 3, "cache_prompt": 0});
    assert_eq!(why["decision"]["request"]["numbers"], numbers);
    assert_eq!(why["decision"]["replicas"]["labels"], json!([["price", [3, 4, 5]]]));
}

#[tokio::test]
async fn an_assigned_variant_is_all_that_a_router_is_offered_while_it_has_room() {
    let rig = Rig::new();
    let weights = [("m:a".to_owned(), 1), ("m:b".to_owned(), 1)].into();
    *rig.admin.weights.lock().expect("unpoisoned") = crate::admin::wire::Weights { weights, ..Default::default() };
    let catalog = rig.state.engine.catalog();
    for (tenant, model, full, variant, offered) in [
        ("even", "m", false, "m:a", &[0, 1][..]),
        ("odd", "m", false, "m:b", &[2]),
        ("odd", "m:a", false, "m:a", &[0, 1]),
        ("odd", "m", true, "m:a", &[0, 1, 2]),
    ] {
        let waiting = if full { 4 } else { 0 };
        catalog.variants[1].replicas[0].gauges.waiting.store(waiting, Ordering::Relaxed);
        let headers = [("x-tenant-id", tenant)];
        let answer = rig.send(request("POST", COMPLETIONS, &headers, &body(&json!({ "model": model })))).await;
        assert_eq!((answer.status, answer.header("x-pointsman-variant")), (200, variant), "{tenant} {model} {full}");
        let calls = rig.router.calls.lock().expect("unpoisoned");
        assert_eq!(calls.last().expect("a call").3.id, offered, "{tenant} {model} {full}");
    }
    // A variant whose pool is too small is no more use than one that is full.
    for (replica, blocks) in catalog.variants.iter().flat_map(|variant| &variant.replicas).zip([3, 3, 2]) {
        replica.gauges.total_blocks.store(blocks, Ordering::Relaxed);
    }
    catalog.variants[1].replicas[0].gauges.waiting.store(0, Ordering::Relaxed);
    rig.send(request("POST", COMPLETIONS, &[("x-tenant-id", "odd")], &body(&json!({})))).await;
    assert_eq!(rig.router.calls.lock().expect("unpoisoned").last().expect("a call").3.id, [0, 1]);
    // A weight of a variant that is not loaded keeps nobody from being served.
    let weights = [("m:gone".to_owned(), 1)].into();
    *rig.admin.weights.lock().expect("unpoisoned") = crate::admin::wire::Weights { weights, ..Default::default() };
    assert_eq!(rig.post(COMPLETIONS, &body(&json!({}))).await.status, 200);
}

#[tokio::test]
async fn the_last_prompt_token_is_never_cached() {
    let rig = Rig::new();
    let catalog = rig.state.engine.catalog();
    for hash in chain_hashes(&bytes("abcdefgh"), 4) {
        catalog.variants[0].replicas[0].sketch.insert(hash);
    }
    rig.post(COMPLETIONS, &body(&json!({"prompt": bytes("abcdefgh")}))).await;
    assert_eq!(rig.router.calls.lock().expect("unpoisoned")[0].3.cached_tokens, [7, 0, 0]);
}

#[tokio::test]
async fn choices_become_replicas() {
    let refuse = || Play::Refuse(SubmitError::Full);
    for (choice, refused, replica, generation) in [
        (Choice::Pick(2), 0, "m:b@x", 7),
        (Choice::Rank(vec![1, 0]), 0, "m:a@y", 7),
        (Choice::Rank(vec![1, 0]), 1, "m:a@x", 7),
        (Choice::Pick(2), 1, "m:a@y", 0),
        (Choice::Abstain, 0, "m:a@y", 0),
    ] {
        let rig = Rig::new();
        // Of equal replicas the seed decides: 1, the second number that the fake clock draws.
        *rig.router.choice.lock().expect("unpoisoned") = choice.clone();
        rig.engine.play(std::iter::repeat_with(refuse).take(refused));
        let answer = rig.send(request("POST", COMPLETIONS, &[("x-request-id", "r")], &body(&json!({})))).await;
        assert_eq!((answer.status, answer.header("x-pointsman-replica")), (200, replica), "{choice:?} {refused}");
        assert_eq!(answer.header("x-pointsman-router"), "r@1+0000;g=7");
        let taken = rig.engine.taken.lock().expect("unpoisoned");
        assert_eq!(taken[0].router_generation, generation, "{choice:?} {refused}");
        let reserved: u32 = (rig.state.engine.catalog().variants.iter().flat_map(|v| &v.replicas))
            .map(|r| r.gauges.reserved_requests.load(Ordering::Relaxed))
            .sum();
        assert_eq!(reserved, 1, "refused submissions give their reservation back; the driver releases the other");
    }
}

#[tokio::test]
async fn refusals_have_status_reason_and_advice() {
    let reject =
        |reason, retry_after_ms| Choice::Reject(Rejection { reason, retry_after_ms, message: "because".into() });
    for (choice, status, reason, retry_after) in [
        (reject(Refusal::Overloaded, 1_500), 429, "policy", "2"),
        (reject(Refusal::Quota, 0), 429, "quota", "1"),
        (reject(Refusal::CannotMeetDeadline, 0), 429, "deadline", "1"),
        (reject(Refusal::NotAllowed, 0), 403, "policy", ""),
    ] {
        let rig = Rig::new();
        *rig.router.choice.lock().expect("unpoisoned") = choice;
        let answer = rig.post(COMPLETIONS, &body(&json!({}))).await;
        assert_eq!(answer.status, status);
        assert_eq!((answer.header("x-pointsman-reason"), answer.header("retry-after")), (reason, retry_after));
        assert!(answer.body.contains("because"));
        let mut events = Vec::new();
        rig.state.recorder.drain(&mut events, 10);
        assert_eq!(events.iter().map(|e| e.kind.name()).collect::<Vec<_>>(), ["rejected"]);
    }
}

#[tokio::test]
async fn full_and_dead_replicas() {
    for (error, status, code) in [(SubmitError::Full, 429, "saturated"), (SubmitError::Stopped, 503, "no_replica")] {
        let rig = Rig::new();
        rig.engine.play((0..3).map(|_| Play::Refuse(error)));
        let answer = rig.post(COMPLETIONS, &body(&json!({}))).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)));
    }
    let rig = Rig::new();
    for variant in &rig.state.engine.catalog().variants {
        for replica in &variant.replicas {
            replica.gauges.waiting.store(replica.max_waiting, Ordering::Relaxed);
        }
    }
    let answer = rig.post(COMPLETIONS, &body(&json!({}))).await;
    assert_eq!((answer.status, answer.header("x-pointsman-reason")), (429, "queue"));
    assert!(rig.engine.taken.lock().expect("unpoisoned").is_empty(), "a queue that is full is not asked");
}

#[tokio::test]
async fn replicas_that_are_gone_and_pools_that_are_too_small_are_not_offered() {
    let rig = Rig::new();
    let catalog = rig.state.engine.catalog();
    let replicas: Vec<_> = catalog.variants.iter().flat_map(|variant| &variant.replicas).collect();
    let offered = || rig.router.calls.lock().expect("unpoisoned").last().map(|call| call.3.id.clone());
    let total = |blocks: [u32; 3]| {
        replicas.iter().zip(blocks).for_each(|(replica, n)| replica.gauges.total_blocks.store(n, Ordering::Relaxed));
    };
    // 9 tokens and 4 to come, of which the last one needs no place: three blocks of 4.
    for (blocks, expect) in [([0, 0, 0], [0, 1, 2].as_slice()), ([2, 3, 2], &[1]), ([3, 2, 9], &[0, 2])] {
        total(blocks);
        rig.post(COMPLETIONS, &body(&json!({}))).await;
        assert_eq!(offered().as_deref(), Some(expect), "{blocks:?}");
    }
    total([9, 9, 2]);
    replicas[0].gauges.gone.store(true, Ordering::Relaxed);
    rig.post(COMPLETIONS, &body(&json!({}))).await;
    assert_eq!(offered(), Some(vec![1]));
    // Where those that live are too small, one of them says so.
    replicas[1].gauges.gone.store(true, Ordering::Relaxed);
    rig.post(COMPLETIONS, &body(&json!({}))).await;
    assert_eq!(offered(), Some(vec![2]));
    replicas[2].gauges.gone.store(true, Ordering::Relaxed);
    let answer = rig.post(COMPLETIONS, &body(&json!({}))).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("no_replica")));
}

#[tokio::test]
async fn half_submitted_requests_are_taken_back() {
    let rig = Rig::new();
    rig.engine.play([
        Play::Hold,
        Play::Refuse(SubmitError::Full),
        Play::Refuse(SubmitError::Full),
        Play::Refuse(SubmitError::Full),
    ]);
    let answer = rig.post(COMPLETIONS, &body(&json!({"n": 2}))).await;
    assert_eq!(answer.status, 429);
    assert_eq!(rig.engine.cancels.lock().expect("unpoisoned").len(), 1, "the first choice was already running");
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn events_tell_admission_and_route() {
    let rig = Rig::new();
    rig.send(request("POST", COMPLETIONS, &[("x-tenant-id", "t")], &body(&json!({})))).await;
    let mut events = Vec::new();
    rig.state.recorder.drain(&mut events, 10);
    assert_eq!(events.iter().map(|e| e.kind.name()).collect::<Vec<_>>(), ["admitted", "routed"]);
    assert_eq!((events[0].a, events[0].b), (9, 4));
    assert_eq!((events[1].generation, events[1].b, events[1].tenant, events[1].replica), (7, 0, 1, 0));
}

#[tokio::test]
async fn stop_tokens_and_defaults_reach_the_engine() {
    let rig = Rig::new();
    rig.post(COMPLETIONS, &body(&json!({"stop_token_ids": [9]}))).await;
    rig.post(COMPLETIONS, &body(&json!({"ignore_eos": true}))).await;
    let chat = json!({"model": "m", "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]});
    rig.post("/v1/chat/completions", &chat.to_string()).await;
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!(*taken[0].stop_tokens, [1, 9]);
    assert!(taken[1].stop_tokens.is_empty());
    assert_eq!(taken[2].prompt.len() + taken[2].max_new_tokens as usize, 64, "a chat may fill the context");
}

#[tokio::test]
async fn models_are_listed_aliases_first() {
    let rig = Rig::new();
    let list = rig.send(request("GET", "/v1/models", &[], "")).await.json();
    let ids: Vec<&str> = list["data"].as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
    assert_eq!(ids, ["m", "m:a", "m:b", "e"]);
    let one = rig.send(request("GET", "/v1/models/m:b", &[], "")).await.json();
    assert_eq!(
        one,
        json!({"id": "m:b", "object": "model", "created": 1_699_999_999, "owned_by": "pointsman", "root": "m", "max_model_len": 64})
    );
}

#[tokio::test]
async fn texts_are_tokenized_and_back() {
    let rig = Rig::new();
    for (body, expect) in [
        (json!({"prompt": "hello"}), json!({"count": 2, "max_model_len": 64, "tokens": [0, 262]})),
        (
            json!({"model": "m:b", "prompt": "hello", "add_special_tokens": false, "return_token_strs": true}),
            json!({"count": 1, "max_model_len": 64, "tokens": [262], "token_strs": ["hello"]}),
        ),
    ] {
        assert_eq!(rig.post("/tokenize", &body.to_string()).await.json(), expect);
    }
    let chat = json!({"messages": [{"role": "user", "content": "hello"}], "add_generation_prompt": false});
    let tokens = rig.post("/tokenize", &chat.to_string()).await.json()["tokens"].clone();
    let text = rig.post("/detokenize", &json!({"tokens": tokens}).to_string()).await.json();
    assert_eq!(text, json!({"prompt": "<|bos|>user: hello\n"}));
}

#[tokio::test]
async fn metrics_are_rendered_once_per_interval() {
    let rig = Rig::new();
    let scrape = || async { rig.send(request("GET", "/metrics", &[], "")).await };
    let first = scrape().await;
    assert_eq!(first.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    rig.state.metrics.rejected("queue");
    assert_eq!(scrape().await.body, first.body);
    rig.clock.now.store(60_000, Ordering::Relaxed);
    assert!(scrape().await.body.contains("pointsman_rejected_total{reason=\"queue\"} 1"));
}
