//! Every bad input has its status, its field and its sentence.

use axum::body::Body;
use pointsman_sched::ids::Priority;
use serde_json::json;

use crate::ServerConfig;
use crate::fakes::{Answer, Play, Rig, key, request};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const JSON: (&str, &str) = ("content-type", "application/json");

fn code(answer: &Answer) -> String {
    answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

/// Route and body; status, field and a part of the message.
const BAD_BODIES: &[(&str, &str, u16, &str, &str)] = &[
    (CHAT, "{", 400, "", "not valid JSON: EOF while parsing an object at line 1 column 1"),
    (CHAT, "", 400, "", "not valid JSON: EOF"),
    (CHAT, "[]", 400, "", "the body must be a JSON object, found an array of 0"),
    (CHAT, r#"{"model": "m"}"#, 400, "messages", "`messages` is required"),
    (CHAT, r#"{"model": "m", "messages": []}"#, 400, "messages", "an array of 1 to 16384 messages"),
    (CHAT, r#"{"model": "m", "messages": "hi"}"#, 400, "messages", "found the string \"hi\""),
    (CHAT, r#"{"model": "m", "messages": [7]}"#, 400, "messages[0]", "must be an object, found the number 7"),
    (CHAT, r#"{"model": "m", "messages": [{"role": "user"}]}"#, 400, "messages[0].content", "is required"),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "alien", "content": "x"}]}"#,
        400,
        "messages[0].role",
        "found the string \"alien\"",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "tool", "content": "x"}]}"#,
        400,
        "messages[0].tool_call_id",
        "is required",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "function", "content": "x"}]}"#,
        400,
        "messages[0].role",
        "which `tool` replaces",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}"#,
        400,
        "messages[0].tool_calls",
        "belongs to messages of the assistant",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}"#,
        400,
        "messages[0].tool_calls[0].function.name",
        "is required",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
        400,
        "messages[0].content[0].type",
        "content of type `image_url`",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}"#,
        400,
        "messages[0].content[0].text",
        "a string",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}"#,
        400,
        "temperature",
        "found the string \"hot\"",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}"#,
        400,
        "top_logprobs",
        "needs `logprobs`",
    ),
    (CHAT, r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 9}"#, 400, "n", "from 1 to 8"),
    (
        CHAT,
        r#"{"model": "gpt", "messages": [{"role": "user", "content": "x"}]}"#,
        404,
        "model",
        "known models: `m`, `m:a`, `m:b`",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60}"#,
        400,
        "messages",
        "context of this model is 64 tokens; the prompt has 19 and 60 more",
    ),
    (
        CHAT,
        r#"{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "min_tokens": 3}"#,
        400,
        "min_tokens",
        "exceeds the 2 tokens",
    ),
    (COMPLETIONS, r#"{"model": "m"}"#, 400, "prompt", "is required"),
    (COMPLETIONS, r#"{"model": "m", "prompt": []}"#, 400, "prompt", "1 to 16 prompts, found 0"),
    (
        COMPLETIONS,
        r#"{"model": "m", "prompt": [1, 264]}"#,
        400,
        "prompt[1]",
        "a token id below 264, found the number 264",
    ),
    (COMPLETIONS, r#"{"model": "m", "prompt": ["a", 1]}"#, 400, "prompt[1]", "a string, an array"),
    (COMPLETIONS, r#"{"model": "m", "prompt": [[]]}"#, 400, "prompt", "has no tokens"),
    (
        COMPLETIONS,
        r#"{"model": "m:b", "prompt": "x", "echo": true, "logprobs": 1}"#,
        400,
        "logprobs",
        "of a model that upstreams alone serve",
    ),
    (
        COMPLETIONS,
        r#"{"model": "m:b", "prompt": "x", "prompt_logprobs": 1}"#,
        400,
        "prompt_logprobs",
        "of a model that upstreams alone serve",
    ),
    (COMPLETIONS, r#"{"model": "m", "prompt": "x", "max_tokens": 0}"#, 400, "max_tokens", "from 1 to"),
    (
        COMPLETIONS,
        r#"{"model": "m", "prompt": "x", "echo": true, "max_tokens": 0, "min_tokens": 1}"#,
        400,
        "min_tokens",
        "exceeds the 0 tokens",
    ),
    (COMPLETIONS, r#"{"model": "m", "prompt": "x", "suffix": "y"}"#, 400, "suffix", "not supported"),
    (
        COMPLETIONS,
        r#"{"model": "m", "prompt": "x", "prompt_logprobs": 1, "stream": true}"#,
        400,
        "prompt_logprobs",
        "not told in a stream",
    ),
    ("/detokenize", r#"{"tokens": ["a"]}"#, 400, "tokens[0]", "a token id"),
    ("/tokenize", r#"{"model": "nope", "prompt": "x"}"#, 404, "model", "does not exist"),
];

#[tokio::test]
async fn bad_bodies() {
    let long = format!(r#"{{"model": "m", "prompt": "{}"}}"#, "x".repeat(80));
    let long = (COMPLETIONS, long.as_str(), 400, "prompt", "the prompt has 81");
    for (path, body, status, param, message) in BAD_BODIES.iter().copied().chain([long]) {
        let rig = Rig::new();
        let answer = rig.post(path, body).await;
        let error = &answer.json()["error"];
        assert_eq!(answer.status, status, "{body}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{body}: {error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(message)), "{body}: {error}");
        assert_eq!(answer.header("x-should-retry"), "false");
        assert!(!answer.header("x-request-id").is_empty());
        assert!(rig.engine.taken.lock().expect("unpoisoned").is_empty(), "nothing reached the engine");
        assert_eq!(rig.state.in_flight(), 0);
    }
}

#[tokio::test]
async fn bad_requests() {
    let rig = Rig::with(ServerConfig { max_body_bytes: 100, ..ServerConfig::default() });
    let big = " ".repeat(200);
    let too_long = "i".repeat(129);
    for (request, status, expect) in [
        (request("POST", CHAT, &[("content-type", "text/plain")], "{}"), 415, "unsupported_media_type"),
        (request("POST", CHAT, &[JSON, ("content-encoding", "gzip")], "{}"), 415, "unsupported_media_type"),
        (request("GET", "/v1/models/%ff", &[], ""), 400, "invalid_value"),
        (request("DELETE", "/v1/requests/%ff", &[], ""), 400, "invalid_value"),
        (request("POST", CHAT, &[JSON, ("content-length", "200")], &big), 413, "body_too_large"),
        (request("POST", CHAT, &[JSON], &big), 413, "body_too_large"),
        (request("GET", CHAT, &[], ""), 405, "method_not_allowed"),
        (request("GET", "/nope", &[], ""), 404, "unknown_url"),
        (request("GET", "/v1/models/org/nope", &[], ""), 404, "model_not_found"),
        (request("POST", CHAT, &[JSON, ("x-request-id", &too_long)], "{}"), 400, "invalid_value"),
        (request("POST", CHAT, &[JSON, ("x-request-id", "a b")], "{}"), 400, "invalid_value"),
        (request("POST", CHAT, &[JSON, ("x-pointsman-priority", "soon")], "{}"), 400, "invalid_value"),
        (request("POST", CHAT, &[JSON, ("x-tenant-id", "a b")], "{}"), 400, "invalid_value"),
        (request("DELETE", "/v1/requests/none", &[], ""), 404, "request_not_found"),
    ] {
        let what = format!("{} {}", request.method(), request.uri());
        let answer = rig.send(request).await;
        assert_eq!((answer.status, code(&answer).as_str()), (status, expect), "{what}");
        assert!(!answer.header("x-request-id").is_empty(), "{what}");
    }
    let answer = rig.send(request("GET", CHAT, &[], "")).await;
    assert_eq!(answer.header("allow"), "POST");
    let invalid_utf8 =
        axum::http::Request::post(CHAT).body(Body::from(&b"{\"model\": \"\xff\"}"[..])).expect("a request");
    assert_eq!(code(&rig.send(invalid_utf8).await), "invalid_json");
}

#[tokio::test]
async fn requests_beyond_the_bounds_are_refused_with_a_reason() {
    let body = json!({"model": "m", "prompt": "hello"}).to_string();
    let rig = Rig::with(ServerConfig { max_requests: 1, max_queued_tokens: 3, ..ServerConfig::default() });
    rig.engine.play([Play::Hold]);
    let mut held = Box::pin(rig.open(request("POST", COMPLETIONS, &[JSON], &body)));
    std::future::poll_fn(|cx| std::task::Poll::Ready(held.as_mut().poll(cx).is_pending())).await;
    let answer = rig.post(COMPLETIONS, &body).await;
    assert_eq!((answer.status, answer.header("retry-after"), answer.header("x-pointsman-reason")), (429, "1", "queue"));
    assert_eq!(answer.header("x-should-retry"), "");
    drop(held);
    assert_eq!(rig.post(COMPLETIONS, &body).await.status, 200);
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    assert!(metrics.contains("pointsman_rejected_total{reason=\"queue\"} 1"), "{metrics}");
}

#[tokio::test]
async fn keys_name_the_tenant_and_bound_the_priority() {
    let api_keys = vec![key("k1", Priority::Normal), key("k2", Priority::Critical)];
    let rig = Rig::with(ServerConfig { api_keys, ..ServerConfig::default() });
    let body = json!({"model": "m", "prompt": "x", "priority": "critical"}).to_string();
    for (headers, status) in [
        (vec![JSON], 401),
        (vec![JSON, ("authorization", "Bearer nope")], 401),
        (vec![JSON, ("authorization", "Basic k1")], 401),
        (vec![JSON, ("authorization", "Bearer k1"), ("x-tenant-id", "forged")], 200),
        (vec![JSON, ("authorization", "Bearer k2")], 200),
    ] {
        let answer = rig.send(request("POST", COMPLETIONS, &headers, &body)).await;
        assert_eq!(answer.status, status, "{headers:?}");
        assert_eq!(answer.header("www-authenticate"), if status == 401 { "Bearer" } else { "" });
    }
    let tenants: Vec<String> = rig.router.calls.lock().expect("unpoisoned").iter().map(|call| call.0.clone()).collect();
    assert_eq!(tenants, ["t-k1", "t-k2"]);
    let priorities: Vec<u8> = rig.engine.taken.lock().expect("unpoisoned").iter().map(|t| t.priority).collect();
    assert_eq!(priorities, [Priority::Normal as u8, Priority::Critical as u8]);
    assert_eq!(rig.send(request("GET", "/v1/models", &[], "")).await.status, 401);
    for open in ["/health", "/ready", "/version", "/metrics", "/openapi.json"] {
        assert_eq!(rig.send(request("GET", open, &[], "")).await.status, 200, "{open}");
    }
}

#[tokio::test]
async fn a_key_cancels_its_own_requests_only() {
    let api_keys = vec![key("k1", Priority::High), key("k2", Priority::High)];
    let rig = Rig::with(ServerConfig { api_keys, ..ServerConfig::default() });
    rig.engine.play([Play::Hold]);
    let headers = [JSON, ("authorization", "Bearer k1"), ("x-request-id", "mine")];
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    let mut held = Box::pin(rig.open(request("POST", COMPLETIONS, &headers, &body)));
    std::future::poll_fn(|cx| std::task::Poll::Ready(held.as_mut().poll(cx).is_pending())).await;
    for (key, status) in [("Bearer k2", 404), ("Bearer k1", 200)] {
        let answer = rig.send(request("DELETE", "/v1/requests/mine", &[("authorization", key)], "")).await;
        assert_eq!(answer.status, status, "{key}");
    }
}

#[tokio::test]
async fn a_host_that_loads_or_drains_says_so() {
    let rig = Rig::new();
    assert_eq!(rig.send(request("GET", "/ready", &[], "")).await.status, 200);
    rig.state.drain();
    let body = json!({"model": "m", "prompt": "x"}).to_string();
    for (method, path) in [("GET", "/ready"), ("POST", COMPLETIONS)] {
        let answer = rig.send(request(method, path, &[], &body)).await;
        assert_eq!((answer.status, code(&answer).as_str(), answer.header("retry-after")), (503, "draining", "1"));
    }
    let rig = Rig::new();
    rig.engine.unload();
    for (method, path) in [("GET", "/ready"), ("POST", COMPLETIONS)] {
        let answer = rig.send(request(method, path, &[], &body)).await;
        assert_eq!((answer.status, code(&answer).as_str()), (503, "loading"));
    }
    assert_eq!(rig.send(request("GET", "/health", &[], "")).await.status, 200);
    let rig = Rig::new();
    rig.admin.refuses_all.store(true, std::sync::atomic::Ordering::Relaxed);
    let answer = rig.send(request("GET", "/ready", &[], "")).await;
    assert_eq!((answer.status, code(&answer).as_str(), answer.header("retry-after")), (503, "sampler_failed", "1"));
    assert_eq!(rig.send(request("GET", "/health", &[], "")).await.status, 200);
    let rig = Rig::new();
    rig.engine.is_gone.store(true, std::sync::atomic::Ordering::Relaxed);
    for path in ["/ready", "/health"] {
        assert_eq!(rig.send(request("GET", path, &[], "")).await.status, 503, "{path}: only a new start helps");
    }
    // The only device with replicas is gone, and another without them is not: alive, and nothing to send it.
    let rig = Rig::new();
    rig.admin.is_degraded.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(rig.send(request("GET", "/ready", &[], "")).await.status, 200, "embeddings are made on");
    rig.engine.forget_encoders();
    let health = rig.send(request("GET", "/health", &[], "")).await;
    let degraded = &serde_json::from_str::<serde_json::Value>(&health.body).expect("JSON")["degraded"];
    assert_eq!((health.status, degraded), (200, &json!(["device cpu", "model org/m"])));
    let ready = rig.send(request("GET", "/ready", &[], "")).await;
    assert_eq!((ready.status, code(&ready).as_str()), (503, "no_replica"));
    assert!(ready.body.contains("device cpu, model org/m"), "{}", ready.body);
    let n_reports = || rig.admin.n_reports.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(n_reports(), 0, "anybody may probe: it adds nothing up");
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    assert_eq!(n_reports(), 1);
    assert!(metrics.contains("pointsman_device_up{device=\"cpu\"} 0\n"), "{metrics}");
    assert!(metrics.contains("pointsman_device_memory_bytes{device=\"cpu\",owner=\"weights\"} 0\n"), "{metrics}");
    for unknown in ["\"graphs\"", "_free_bytes", "_total_bytes", "_utilization_", "_temperature_", "_power_watts"] {
        let is_device = |line: &str| line.starts_with("pointsman_device_") && line.contains(unknown);
        assert!(!metrics.lines().any(is_device), "{unknown}: {metrics}");
    }
    rig.engine.know(&["lazy"]);
    assert_eq!(rig.send(request("GET", "/ready", &[], "")).await.status, 200, "a request would bring one");
}
