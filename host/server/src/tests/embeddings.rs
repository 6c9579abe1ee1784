//! Embeddings: shapes, inputs of every kind, refusals that say what to change, and how a request ends early.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use pointsman_sched::admit::{Outcome, Verdict};
use pointsman_sched::request::Failure;
use pointsman_sched::route::{Refusal, Rejection};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

use crate::fakes::{EmbedPlay, Rig, request};
use crate::ports::SubmitError;

const PATH: &str = "/v1/embeddings";

fn body(extra: &Value) -> String {
    let mut body = json!({"model": "e", "input": "hi"});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

#[tokio::test]
async fn texts_and_tokens_become_vectors() {
    let rig = Rig::new();
    let answer = rig.post(PATH, &body(&json!({}))).await;
    assert_eq!(
        answer.json(),
        json!({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 3.0, 0.1, -2.0]}],
            "model": "e", "usage": {"prompt_tokens": 3, "total_tokens": 3}}),
    );
    assert_eq!(
        (answer.status, answer.header("x-pointsman-replica"), answer.header("x-pointsman-variant")),
        (200, "e@x", "e")
    );
    // Texts get a bos token; ids are taken as they are.
    for (input, first_and_length) in [
        (json!(["hi", "", "hello"]), vec![(0, 3), (0, 1), (0, 2)]),
        (json!([7, 8, 9]), vec![(7, 3)]),
        (json!([[7, 8], [9]]), vec![(7, 2), (9, 1)]),
        (json!(["hi", [5]]), vec![(0, 3), (5, 1)]),
    ] {
        let answer = rig.post(PATH, &body(&json!({ "input": input }))).await.json();
        let found: Vec<(u64, u64)> = (answer["data"].as_array().expect("a list").iter())
            .map(|item| (&item["embedding"][0], &item["embedding"][1]))
            .map(|(first, n)| (first.as_f64().expect("a number") as u64, n.as_f64().expect("a number") as u64))
            .collect();
        assert_eq!(found, first_and_length, "{input}");
        assert_eq!(answer["usage"]["total_tokens"], found.iter().map(|(_, n)| n).sum::<u64>());
    }
    assert_eq!(rig.state.in_flight(), 0);
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    for line in [
        r#"vllm:request_success_total{finished_reason="stop",model_name="e"} 5"#,
        r#"vllm:e2e_request_latency_seconds_count{model_name="e"} 5"#,
        r#"vllm:request_queue_time_seconds_count{model_name="e"} 5"#,
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn vectors_come_in_base64_and_shortened() {
    let rig = Rig::new();
    let answer = rig.post(PATH, &body(&json!({"encoding_format": "base64"}))).await.json();
    let bytes = BASE64_STANDARD.decode(answer["data"][0]["embedding"].as_str().expect("a text")).expect("base64");
    let floats: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!(floats, [0.0, 3.0, 0.1, -2.0]);
    let answer = rig.post(PATH, &body(&json!({"input": [4, 5, 6], "dimensions": 2}))).await.json();
    assert_eq!(answer["data"][0]["embedding"], json!([0.8, 0.6]));
}

#[tokio::test]
async fn wrong_input_is_refused_by_name() {
    let rig = Rig::new();
    let long = "x".repeat(20);
    for (extra, param, expect) in [
        (json!({"model": "m"}), "model", "`m` generates text and makes no embeddings; of models that do there is `e`"),
        (json!({"model": "m:a"}), "model", "makes no embeddings"),
        (json!({"input": null}), "input", "`input` is required"),
        (json!({"input": 7}), "input", "found the number 7"),
        (json!({"input": []}), "input", "1 to 2048 inputs, found 0"),
        (json!({"input": vec!["x"; 2_049]}), "input", "1 to 2048 inputs, found 2049"),
        (json!({"input": ["x", true]}), "input[1]", "found true"),
        (json!({"input": ["x", []]}), "input[1]", "has no tokens"),
        (json!({"input": [3, 264]}), "input[1]", "a token id below 264"),
        (json!({"input": long}), "input", "has 21 tokens and this model takes 8: send less"),
        (json!({"input": ["x", long]}), "input[1]", "set `truncate_prompt_tokens` to -1"),
        (json!({"encoding_format": "int8"}), "encoding_format", "float or base64"),
        (json!({"dimensions": 5}), "dimensions", "from 1 to 4"),
        (json!({"truncate_prompt_tokens": 9}), "truncate_prompt_tokens", "from -1 to 8"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens", "must be -1 or at least 1"),
    ] {
        let answer = rig.post(PATH, &body(&extra)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{extra}: {error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(expect)), "{extra}: {error}");
    }
    let answer = rig.post(PATH, &body(&json!({"model": "nope"}))).await;
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert!(answer.body.contains("of models that make embeddings there is `e`"), "{}", answer.body);
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let generation = json!({"model": "e", "prompt": "x", "messages": [{"role": "user", "content": "x"}]});
        let answer = rig.post(path, &generation.to_string()).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("model")), "{}", answer.body);
        assert!(answer.body.contains("use it with /v1/embeddings"), "{}", answer.body);
    }
}

#[tokio::test]
async fn a_long_input_is_cut_when_asked() {
    let rig = Rig::new();
    for (cut, input, length) in
        [(-1, json!("x".repeat(20)), 8.0), (3, json!("xyz"), 3.0), (3, json!([4, 5, 6, 7]), 3.0), (8, json!("x"), 2.0)]
    {
        let answer = rig.post(PATH, &body(&json!({"input": input, "truncate_prompt_tokens": cut}))).await.json();
        assert_eq!(answer["data"][0]["embedding"][1], length, "{cut}: {answer}");
    }
}

#[tokio::test]
async fn encoders_are_listed_and_tokenize() {
    let rig = Rig::new();
    let list = rig.send(request("GET", "/v1/models", &[], "")).await.json();
    let entry = json!({"id": "e", "object": "model", "created": 1_699_999_998, "owned_by": "pointsman", "root": "e",
        "max_model_len": 8, "embedding_dimensions": 4});
    assert_eq!(list["data"].as_array().and_then(|all| all.last()), Some(&entry));
    assert_eq!(rig.send(request("GET", "/v1/models/e", &[], "")).await.json(), entry);
    let tokens = rig.post("/tokenize", r#"{"model": "e", "prompt": "hello"}"#).await.json();
    assert_eq!(tokens, json!({"count": 2, "max_model_len": 8, "tokens": [0, 262]}));
}

#[tokio::test]
async fn faults_and_refusals_have_their_status() {
    let rig = Rig::new();
    for (play, status, code) in [
        (EmbedPlay::Refuse(SubmitError::Full), 429, "saturated"),
        (EmbedPlay::Refuse(SubmitError::Stopped), 503, "no_replica"),
        (EmbedPlay::Fail(Failure::Engine("boom".into())), 500, "engine_fault"),
    ] {
        rig.engine.embeds.lock().expect("unpoisoned").push_back(play);
        let answer = rig.post(PATH, &body(&json!({}))).await;
        assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (status, Some(code)), "{}", answer.body);
    }
    rig.engine.embeds.lock().expect("unpoisoned").push_back(EmbedPlay::Hold);
    let answer = rig.post(PATH, &body(&json!({"timeout_ms": 1}))).await;
    assert_eq!(answer.status, 504, "{}", answer.body);
    let job = rig.engine.jobs.lock().expect("unpoisoned").pop().expect("it was held");
    assert!(job.reply.is_closed(), "the driver sees that nobody waits");
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn a_cancelled_or_abandoned_request_ends_its_job() {
    let rig = Rig::new();
    let held = async |id: &str| {
        rig.engine.embeds.lock().expect("unpoisoned").push_back(EmbedPlay::Hold);
        let headers = [("content-type", "application/json"), ("x-request-id", id)];
        let mut asked = Box::pin(rig.send(request("POST", PATH, &headers, &body(&json!({})))));
        // Polled until it waits for its answer.
        while rig.engine.jobs.lock().expect("unpoisoned").is_empty() {
            tokio::select! {
                biased;
                answer = &mut asked => panic!("{answer:?}"),
                () = tokio::task::yield_now() => {}
            }
        }
        let job = rig.engine.jobs.lock().expect("unpoisoned").pop().expect("one");
        (asked, job)
    };
    let (asked, job) = held("a").await;
    let cancel = rig.send(request("DELETE", "/v1/requests/a", &[], "")).await;
    assert_eq!((cancel.status, asked.await.status), (200, 499));
    assert!(job.reply.is_closed());
    let (asked, job) = held("b").await;
    drop(asked);
    assert!(job.reply.is_closed());
    assert_eq!(rig.state.in_flight(), 0);
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    let aborted = r#"vllm:request_success_total{finished_reason="abort",model_name="e"} 2"#;
    assert!(metrics.contains(aborted), "{metrics}");
}

#[tokio::test]
async fn the_admission_policy_is_asked() {
    let rig = Rig::new();
    rig.door.native.store(false, Ordering::Relaxed);
    *rig.door.verdict.lock().expect("unpoisoned") = Some(Verdict::Accept);
    assert_eq!(rig.post(PATH, &body(&json!({}))).await.status, 200);
    let rejection = Rejection { reason: Refusal::Quota, retry_after_ms: 2_000, message: "used up".into() };
    *rig.door.verdict.lock().expect("unpoisoned") = Some(Verdict::Reject(rejection));
    let answer = rig.post(PATH, &body(&json!({}))).await;
    assert_eq!((answer.status, answer.header("x-pointsman-reason")), (429, "quota"), "{}", answer.body);
    let asked = rig.door.asked.lock().expect("unpoisoned");
    assert_eq!(asked.iter().map(|(_, _, _, prompt, new)| (*prompt, *new)).collect::<Vec<_>>(), [(3, 0); 2]);
    let endings = rig.door.endings.lock().expect("unpoisoned");
    assert_eq!(endings.iter().map(|ending| ending.outcome).collect::<Vec<_>>(), [Outcome::Finished]);
}
