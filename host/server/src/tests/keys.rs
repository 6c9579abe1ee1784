//! What the holder of an API key sees of its limits, and that pages on the web see nothing.

use std::num::NonZeroU32;
use std::sync::atomic::Ordering;

use pointsman_sched::ids::Priority;
use pointsman_sched::request::{Failure, FinishReason, SinkEvent};
use serde_json::{Value, json};

use crate::fakes::{Answer, Play, Rig, bytes, key, request, says};
use crate::ports::SubmitError;
use crate::{ApiKey, KeyLimits, ServerConfig};

const COMPLETIONS: &str = "/v1/completions";
const HEADERS: [(&str, &str); 2] = [("content-type", "application/json"), ("authorization", "Bearer k1")];
const SECOND: u64 = 1_000_000;

/// Requests at once, requests and tokens per minute; 0 for no limit.
fn rig(concurrent: u32, requests: u32, tokens: u32) -> Rig {
    let limits = KeyLimits {
        concurrent: NonZeroU32::new(concurrent),
        requests_per_minute: NonZeroU32::new(requests),
        tokens_per_minute: NonZeroU32::new(tokens),
    };
    let limited = ApiKey { limits, ..key("k1", Priority::Normal) };
    Rig::with(ServerConfig { api_keys: vec![limited, key("k2", Priority::Normal)], ..ServerConfig::default() })
}

/// Three tokens of prompt.
fn body(max_tokens: u32) -> String {
    json!({"model": "m", "prompt": bytes("abc"), "max_tokens": max_tokens}).to_string()
}

async fn ask(rig: &Rig, path: &str, body: &str) -> Answer {
    rig.send(request("POST", path, &HEADERS, body)).await
}

fn limits(answer: &Answer, of: &str) -> [String; 3] {
    ["limit", "remaining", "reset"].map(|what| answer.header(&format!("x-ratelimit-{what}-{of}")).to_owned())
}

#[tokio::test]
async fn requests_come_back_at_an_even_pace() {
    let rig = rig(0, 2, 0);
    for left in ["1", "0"] {
        let answer = ask(&rig, COMPLETIONS, &body(8)).await;
        assert_eq!((answer.status, limits(&answer, "requests")[1].as_str()), (200, left));
        assert_eq!(limits(&answer, "tokens"), ["", "", ""], "no limit, no header");
    }
    for (path, tokenizes) in [(COMPLETIONS, false), ("/v1/chat/completions", false), ("/tokenize", true)] {
        let answer = ask(&rig, path, &body(8)).await;
        assert_eq!((answer.status, answer.header("retry-after")), (429, "30"), "{path}: {}", answer.body);
        assert_eq!((answer.header("x-pointsman-reason"), answer.header("x-should-retry")), ("quota", ""));
        assert_eq!(limits(&answer, "requests"), ["2", "0", "1m0s"]);
        let error = &answer.json()["error"];
        assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
        assert!(error["message"].as_str().is_some_and(|m| m.contains("`k1` has sent its 2 requests per minute")));
        let counted = rig.send(request("GET", "/metrics", &[], "")).await.body;
        assert!(tokenizes || counted.contains("pointsman_rejected_total{reason=\"quota\"}"), "{counted}");
    }
    let other = [HEADERS[0], ("x-api-key", "k2")];
    let answer = rig.send(request("POST", COMPLETIONS, &other, &body(8))).await;
    assert_eq!((answer.status, limits(&answer, "requests")), (200, ["", "", ""].map(str::to_owned)));
    rig.clock.now.fetch_add(30 * SECOND, Ordering::Relaxed);
    assert_eq!(ask(&rig, COMPLETIONS, &body(8)).await.status, 200);
    let answer = ask(&rig, "/v1/messages", &body(8)).await;
    let message = r#""type":"rate_limit_error""#;
    assert!(answer.status == 429 && answer.body.contains(message), "in Anthropic's words: {}", answer.body);
}

#[tokio::test]
async fn what_was_asked_for_and_not_used_comes_back() {
    let rig = rig(0, 0, 30);
    let speaks = |n: usize| {
        let end = if n == 8 { FinishReason::Length } else { FinishReason::Stop(1) };
        let mut events = says(&[&"x".repeat(n)]);
        events.pop();
        events.push(SinkEvent::Finished(end));
        Play::Now(events)
    };
    let refuses = || Play::Refuse(SubmitError::Full);
    for (plays, max_tokens, status, left) in [
        // A stop token is computed too.
        (vec![speaks(4)], 20, 200, "22"),
        (Vec::new(), 20, 429, "22"),
        (vec![speaks(8)], 8, 200, "11"),
        // What the host breaks off costs nothing.
        (vec![Play::Now(vec![SinkEvent::Failed(Failure::Engine("boom".into()))])], 8, 500, "11"),
        (vec![refuses(), refuses(), refuses()], 8, 429, "11"),
        (vec![refuses(), speaks(4)], 8, 200, "3"),
    ] {
        rig.engine.play(plays);
        let answer = ask(&rig, COMPLETIONS, &body(max_tokens)).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        if max_tokens == 20 && status == 429 {
            let part = "22 of its 30 tokens per minute left, and this request may use 3 and generate 20";
            assert!(answer.body.contains(part), "{}", answer.body);
            assert_eq!(answer.header("retry-after"), "2", "one token is missing");
        }
        let models = rig.send(request("GET", "/v1/models", &HEADERS, "")).await;
        assert_eq!(limits(&models, "tokens")[1], left, "after {max_tokens}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_request_beyond_a_whole_minute_is_let_in_alone_and_waited_for() {
    let rig = rig(0, 0, 10);
    rig.engine.play([Play::Hold]);
    let mut held = Box::pin(rig.open(request("POST", COMPLETIONS, &HEADERS, &body(40))));
    std::future::poll_fn(|cx| std::task::Poll::Ready(held.as_mut().poll(cx).is_pending())).await;
    let id = rig.engine.last_id();
    let answer = ask(&rig, COMPLETIONS, &body(1)).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, "24"), "4 tokens at 10 a minute: {}", answer.body);
    for event in says(&["twelve bytes"]) {
        rig.engine.push(id, event);
    }
    assert_eq!(Answer::of(held.await).await.status, 200);
    let answer = ask(&rig, COMPLETIONS, &body(1)).await;
    assert_eq!(limits(&answer, "tokens"), ["10", "0", "1m36s"], "16 were used: 6 more than there were");
}

#[tokio::test]
async fn a_key_has_so_many_requests_in_flight() {
    let rig = rig(1, 0, 0);
    rig.engine.play([Play::Hold]);
    let mut held = Box::pin(rig.open(request("POST", COMPLETIONS, &HEADERS, &body(8))));
    std::future::poll_fn(|cx| std::task::Poll::Ready(held.as_mut().poll(cx).is_pending())).await;
    let answer = ask(&rig, COMPLETIONS, &body(8)).await;
    assert_eq!((answer.status, answer.header("retry-after")), (429, "1"));
    assert!(answer.body.contains("has 1 requests in flight, the most at once"), "{}", answer.body);
    rig.state.replace_keys(vec![ApiKey { limits: KeyLimits::default(), ..key("k1", Priority::Low) }]).expect("keys");
    assert_eq!(ask(&rig, COMPLETIONS, &body(8)).await.status, 200, "limits change at once");
    let gone = rig.send(request("GET", "/v1/models", &[("x-api-key", "k2")], "")).await;
    assert_eq!(gone.status, 401, "and so do keys");
    drop(held);
    assert_eq!(rig.state.in_flight(), 0);
}

#[tokio::test]
async fn a_refusal_says_what_to_send_in_the_words_of_each_surface() {
    let rig = rig(0, 0, 0);
    for (path, is_anthropic) in [(COMPLETIONS, false), ("/v1/responses", false), ("/v1/messages", true)] {
        for (headers, part) in [
            (&[][..], "an API key is required: send `Authorization: Bearer <key>` or `x-api-key: <key>`"),
            (&[("x-api-key", "k")], "the API key is not known: send"),
            (&[("authorization", "k1")], "the API key is not known: send"),
        ] {
            let answer = rig.send(request("POST", path, headers, &body(1))).await;
            let object = answer.json();
            assert_eq!((answer.status, &object["error"]["type"]), (401, &json!("authentication_error")));
            assert_eq!(object["type"], if is_anthropic { json!("error") } else { Value::Null });
            assert!(object["error"]["message"].as_str().is_some_and(|m| m.contains(part)), "{}", answer.body);
        }
    }
}

#[tokio::test]
async fn pages_on_the_web_may_read_nothing() {
    let rig = Rig::new();
    let page = [("origin", "https://evil.example"), ("access-control-request-method", "POST")];
    for (method, path) in [("OPTIONS", COMPLETIONS), ("POST", COMPLETIONS), ("GET", "/v1/models")] {
        let answer = rig.send(request(method, path, &page, &body(1))).await;
        let allowed = answer.headers.keys().find(|name| name.as_str().starts_with("access-control-"));
        assert_eq!(allowed, None, "{method} {path}");
        assert_eq!(answer.status == 405, method == "OPTIONS", "{method} {path}");
    }
}

#[tokio::test]
async fn pages_of_listed_origins_may_ask_and_read() {
    let listed = ["https://chat.example".to_owned(), "http://localhost:3000".to_owned()];
    for (origins, origin, allowed) in [
        (listed.to_vec(), "https://chat.example", Some("https://chat.example")),
        (listed.to_vec(), "https://evil.example", None),
        (vec!["*".to_owned()], "https://evil.example", Some("*")),
    ] {
        let config = ServerConfig {
            cors_origins: origins,
            api_keys: vec![key("k", Priority::Normal)],
            ..ServerConfig::default()
        };
        let rig = Rig::with(config);
        let asks = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type"),
        ];
        // Browsers ask without a key, and read refusals too.
        for (method, status) in [("OPTIONS", 200), ("POST", 401)] {
            let answer = rig.send(request(method, COMPLETIONS, &asks, &body(1))).await;
            assert_eq!(answer.status, status, "{method} from {origin}");
            let found = answer.headers.get("access-control-allow-origin").and_then(|value| value.to_str().ok());
            assert_eq!(found, allowed, "{method} from {origin}");
            assert!(!answer.headers.contains_key("access-control-allow-credentials"));
            if method == "OPTIONS" {
                assert_eq!(answer.header("access-control-allow-headers"), "authorization,content-type");
            }
        }
    }
}

#[tokio::test]
async fn tenants_are_charged_for_what_they_were_served() {
    let rig = Rig::new();
    let fails = || Play::Now(vec![SinkEvent::Failed(Failure::Engine("boom".into()))]);
    let embed = json!({"model": "e", "input": [bytes("abcd"), bytes("ef")]}).to_string();
    for (tenant, path, plays, body, status) in [
        ("a,\"b", COMPLETIONS, vec![Play::Now(says(&["hello"]))], body(8), 200),
        ("a,\"b", COMPLETIONS, vec![Play::Now(says(&["hi"]))], body(8), 200),
        ("a,\"b", COMPLETIONS, vec![fails()], body(8), 500),
        ("c", "/v1/embeddings", vec![], embed, 200),
        ("d", COMPLETIONS, vec![], "{".to_owned(), 400),
        ("d", "/tokenize", vec![], json!({"prompt": "x"}).to_string(), 200),
    ] {
        rig.engine.play(plays);
        let answer = rig.send(request("POST", path, &[HEADERS[0], ("x-tenant-id", tenant)], &body)).await;
        assert_eq!(answer.status, status, "{tenant} {path}: {}", answer.body);
    }
    let usage = async |format: &str| {
        let path = format!("/admin/v1/usage{format}");
        rig.ask_admin(request("GET", &path, &[("host", "localhost")], "")).await
    };
    let account = |tenant: &str, [requests, prompt, cached, completion]: [u32; 4]| {
        json!({"tenant": tenant, "requests": requests, "prompt_tokens": prompt, "cached_tokens": cached,
            "completion_tokens": completion})
    };
    let data = [account("a,\"b", [2, 6, 4, 9]), account("c", [1, 6, 0, 0]), account("d", [0; 4])];
    let expect = json!({"object": "list", "since": 1_700_000_000, "data": data});
    assert_eq!(usage("").await.json(), expect, "a stop token is computed too");
    let csv = usage("?format=csv").await;
    assert_eq!(csv.header("content-type"), "text/csv; charset=utf-8");
    let lines: Vec<&str> = csv.body.split("\r\n").collect();
    let head = "tenant,requests,prompt_tokens,cached_tokens,completion_tokens";
    assert_eq!(lines, [head, "\"a,\"\"b\",2,6,4,9", "\"c\",1,6,0,0", "\"d\",0,0,0,0", ""]);
    assert_eq!(usage("?format=xml").await.status, 400);
    let metrics = rig.send(request("GET", "/metrics", &[], "")).await.body;
    assert!(metrics.contains("pointsman_tenant_tokens_total{kind=\"cached\",tenant=\"a,\\\"b\"} 4"), "{metrics}");
}
