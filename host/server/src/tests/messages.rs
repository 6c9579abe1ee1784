//! Messages in Anthropic's shapes: whole, as events, with tools, counted, and refused in Anthropic's words.

use pointsman_sched::ids::Priority;
use pointsman_sched::request::{Failure, FinishReason, SinkEvent};
use serde_json::{Value, json};

use crate::ServerConfig;
use crate::fakes::{Answer, Play, Rig, bytes, key, request, says, token};

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn body(extra: &Value) -> String {
    let mut body = json!({"model": "m", "max_tokens": 30, "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

fn tools() -> Value {
    json!([{"name": "f", "description": "d", "input_schema": {"type": "object"}}, {"name": "g", "input_schema": {}}])
}

/// The named events of a stream; each name must be the type of its data.
fn events(answer: &Answer) -> Vec<Value> {
    let event = |event: &str| {
        let (name, data) = event.strip_prefix("event: ").and_then(|e| e.split_once("\ndata: ")).expect("a named event");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["type"], name);
        data
    };
    answer.body.split_terminator("\n\n").map(event).collect()
}

/// Token events of a text that ends as `reason` says.
fn ends(text: &str, reason: FinishReason) -> Vec<SinkEvent> {
    bytes(text).into_iter().map(token).chain([SinkEvent::Finished(reason)]).collect()
}

#[tokio::test]
async fn a_message_is_answered_whole() {
    let rig = Rig::new();
    let answer = rig.post(MESSAGES, &body(&json!({}))).await;
    let id = answer.header("x-request-id").to_owned();
    assert!(id.starts_with("msg_") && id == answer.header("request-id"), "{id}");
    assert_eq!(
        answer.json(),
        json!({"id": id, "type": "message", "role": "assistant", "model": "m:a",
            "content": [{"type": "text", "text": "hello"}], "stop_reason": "end_turn", "stop_sequence": null,
            "usage": {"input_tokens": 18, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
                "output_tokens": 6}})
    );
    assert_eq!((answer.status, answer.header("x-pointsman-variant")), (200, "m:a"));
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!(taken[0].max_new_tokens, 30);
}

#[tokio::test]
async fn a_message_is_streamed_as_named_events() {
    let rig = Rig::new();
    let answer = rig.post(MESSAGES, &body(&json!({"stream": true}))).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"));
    let events = events(&answer);
    let n = events.len();
    let usage = json!({"input_tokens": 18, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
        "output_tokens": 0});
    assert_eq!((&events[0]["type"], &events[0]["message"]["usage"]), (&json!("message_start"), &usage));
    assert_eq!((&events[0]["message"]["content"], &events[0]["message"]["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(events[1], json!({"type": "ping"}));
    let start = json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}});
    assert_eq!(events[2], start);
    let text: String = events[3..n - 3].iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, "hello");
    assert_eq!(events[n - 3], json!({"type": "content_block_stop", "index": 0}));
    assert_eq!(events[n - 2]["delta"], json!({"stop_reason": "end_turn", "stop_sequence": null}));
    assert_eq!(events[n - 2]["usage"]["output_tokens"], 6);
    assert_eq!(events[n - 1], json!({"type": "message_stop"}));
}

#[tokio::test]
async fn the_end_has_its_reason_whole_and_streamed() {
    let call = r#"[{"name": "f", "arguments": {"a": 1}}]"#;
    let any = json!({"tools": tools(), "tool_choice": {"type": "any"}});
    let cut = r#"[{"name": "f", "arguments": {"a": "#;
    for (extra, events_of, reason, sequence, content) in [
        (
            json!({}),
            ends("ab", FinishReason::Stop(1)),
            "end_turn",
            Value::Null,
            json!([{"type": "text", "text": "ab"}]),
        ),
        (
            json!({}),
            ends("ab", FinishReason::Length),
            "max_tokens",
            Value::Null,
            json!([{"type": "text", "text": "ab"}]),
        ),
        (
            json!({"stop_sequences": ["zz", "b"]}),
            ends("abc", FinishReason::Length),
            "stop_sequence",
            json!("b"),
            json!([{"type": "text", "text": "a"}]),
        ),
        (json!({"stop_sequences": ["a"]}), ends("ab", FinishReason::Length), "stop_sequence", json!("a"), json!([])),
        (
            any.clone(),
            ends(call, FinishReason::Stop(1)),
            "tool_use",
            Value::Null,
            json!([{"type": "tool_use", "id": "", "name": "f", "input": {"a": 1}}]),
        ),
        (
            any,
            ends(cut, FinishReason::Length),
            "max_tokens",
            Value::Null,
            json!([{"type": "tool_use", "id": "", "name": "f", "input": {"INVALID_JSON": "{\"a\": "}}]),
        ),
    ] {
        let rig = Rig::new();
        rig.engine.play([Play::Now(events_of.clone()), Play::Now(events_of)]);
        let mut whole = rig.post(MESSAGES, &body(&extra)).await.json();
        for block in whole["content"].as_array_mut().expect("a list").iter_mut().filter(|b| b["type"] == "tool_use") {
            assert!(block["id"].as_str().is_some_and(|id| !id.is_empty()), "{block}");
            block["id"] = "".into();
        }
        assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!(reason), &sequence), "{extra}: {whole}");
        assert_eq!(whole["content"], content, "{extra}");
        let mut streaming = extra.clone();
        streaming["stream"] = true.into();
        let events = events(&rig.post(MESSAGES, &body(&streaming)).await);
        let delta = &events[events.len() - 2]["delta"];
        assert_eq!((&delta["stop_reason"], &delta["stop_sequence"]), (&json!(reason), &sequence), "{extra}");
        let opened = events.iter().filter(|event| event["type"] == "content_block_start").count();
        let closed = events.iter().filter(|event| event["type"] == "content_block_stop").count();
        assert_eq!((opened, closed), (content.as_array().map_or(0, Vec::len), opened), "{extra}");
        let json: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
        let expect = match &content[0]["input"] {
            Value::Null => String::new(),
            input => input["INVALID_JSON"].as_str().map_or_else(|| r#"{"a": 1}"#.to_owned(), str::to_owned),
        };
        assert_eq!(json, expect, "{extra}");
    }
}

#[tokio::test]
async fn turns_become_what_the_template_knows() {
    // Of the test model's template: `role: text`, a line each.
    let turn = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"},
            {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "s"}], "is_error": true},
            {"type": "tool_result", "tool_use_id": "3"}, {"type": "text", "text": "d"}]},
        {"role": "user", "content": "e"}]);
    let expect = "system: S\nuser: a\nb\nassistant: c\ntool: r\ntool: s\ntool: \nuser: d\ne\nassistant:";
    let rig = Rig::new();
    let counted = rig.post(COUNT, &body(&json!({"messages": turn, "system": [{"type": "text", "text": "S"}]}))).await;
    let tokens = rig.post("/tokenize", &json!({"prompt": expect, "add_special_tokens": true}).to_string()).await;
    assert_eq!(counted.json(), json!({"input_tokens": tokens.json()["count"]}), "{}", tokens.body);
    let sent = rig.post(MESSAGES, &body(&json!({"system": "S", "messages": [{"role": "user", "content": "a"}]}))).await;
    assert_eq!(sent.status, 200, "{}", sent.body);
    let prompt = rig.engine.taken.lock().expect("unpoisoned")[0].prompt.to_vec();
    let text = rig.post("/detokenize", &json!({"tokens": prompt}).to_string()).await.json();
    assert!(text["prompt"].as_str().is_some_and(|text| text.ends_with("system: S\nuser: a\nassistant:")), "{text}");
}

#[tokio::test]
async fn what_is_wrong_is_told_in_anthropics_words() {
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (extra, status, kind, expect) in [
        (json!({"max_tokens": null}), 400, "invalid_request_error", "`max_tokens` is required"),
        (json!({"max_tokens": 0}), 400, "invalid_request_error", "`max_tokens` must be an integer from 1"),
        (json!({"max_tokens": 60}), 400, "invalid_request_error", "context of this model is 64 tokens"),
        (json!({"model": "gpt"}), 404, "not_found_error", "known models"),
        (json!({"n": 2}), 400, "invalid_request_error", "`n` must be 1"),
        (json!({"messages": []}), 400, "invalid_request_error", "`messages` must be an array of 1 to 16384 messages"),
        (json!({"messages": [{"role": "tool"}]}), 400, "invalid_request_error", "user, assistant or system"),
        (
            json!({"messages": [{"role": "assistant", "content": "x"}]}),
            400,
            "invalid_request_error",
            "must not end with a message of the assistant",
        ),
        (user(json!([])), 400, "invalid_request_error", "`messages[0].content` must be an array of 1 to"),
        (user(json!([{"type": "image"}])), 400, "invalid_request_error", "content of type `image` is not supported"),
        (user(json!([{"type": "tool_use"}])), 400, "invalid_request_error", "does not belong to a message of the role"),
        (user(json!([{"type": "tool_result"}])), 400, "invalid_request_error", "[0].tool_use_id` is required"),
        (json!({"thinking": {"type": "enabled"}}), 400, "invalid_request_error", "`thinking` of type `enabled`"),
        (json!({"mcp_servers": [1]}), 400, "invalid_request_error", "`mcp_servers` is not supported"),
        (json!({"stop_sequences": [""]}), 400, "invalid_request_error", "`stop_sequences[0]` must be"),
        (json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}), 400, "invalid_request_error", "a tool of type"),
        (json!({"tools": [{"name": "a b"}]}), 400, "invalid_request_error", "`tools[0].name` must be"),
        (json!({"tools": [{"name": "a", "input_schema": 1}]}), 400, "invalid_request_error", "tools[0].input_schema"),
        (json!({"tool_choice": {"type": "any"}}), 400, "invalid_request_error", "there are no `tools`"),
        (json!({"tool_choice": {"type": "all"}}), 400, "invalid_request_error", "auto, any, tool or none"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "h"}}),
            400,
            "invalid_request_error",
            "`h`, which is not among",
        ),
        (json!({"output_config": {"format": {"type": "xml"}}}), 400, "invalid_request_error", "a format of type `xml`"),
    ] {
        let rig = Rig::new();
        let answer = rig.post(MESSAGES, &body(&extra)).await;
        let found = answer.json();
        assert_eq!((answer.status, &found["type"], &found["error"]["type"]), (status, &json!("error"), &json!(kind)));
        assert!(found["error"]["message"].as_str().is_some_and(|m| m.contains(expect)), "{extra}: {found}");
        assert_eq!(answer.header("x-should-retry"), "false", "{extra}");
        assert_eq!(rig.state.in_flight(), 0);
    }
}

#[tokio::test]
async fn faults_of_the_host_have_anthropics_types() {
    let rig = Rig::new();
    let answer = rig.send(request("GET", MESSAGES, &[], "")).await;
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (405, &json!("invalid_request_error")));
    let answer = rig.send(request("POST", MESSAGES, &[("x-request-id", "")], "")).await;
    assert_eq!((answer.status, &answer.json()["type"]), (400, &json!("error")));
    for (failure, status, kind) in [
        (Failure::Engine("secret".into()), 500, "api_error"),
        (Failure::DroppedByPolicy, 429, "rate_limit_error"),
        (Failure::Unanswered, 529, "overloaded_error"),
    ] {
        rig.engine.play([Play::Now(vec![SinkEvent::Failed(failure)])]);
        let answer = rig.post(MESSAGES, &body(&json!({"stream": true}))).await;
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (status, &json!(kind)));
        assert_eq!(answer.header("retry-after"), if status == 500 { "" } else { "1" });
    }
    rig.engine.play([Play::Now(vec![token(262), SinkEvent::Failed(Failure::Unanswered)])]);
    let events = events(&rig.post(MESSAGES, &body(&json!({"stream": true}))).await);
    let last = events.last().expect("an event");
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("overloaded_error")));
    rig.state.drain();
    assert_eq!(rig.post(MESSAGES, &body(&json!({}))).await.status, 529);
}

#[tokio::test]
async fn a_key_may_come_as_anthropics_clients_send_it() {
    let rig = Rig::with(ServerConfig { api_keys: vec![key("k1", Priority::Normal)], ..ServerConfig::default() });
    for (headers, status) in [
        (vec![], 401),
        (vec![("x-api-key", "nope")], 401),
        (vec![("x-api-key", "k1")], 200),
        (vec![("authorization", "Bearer k1")], 200),
        (vec![("authorization", "Bearer nope"), ("x-api-key", "k1")], 401),
    ] {
        let answer = rig.send(request("POST", MESSAGES, &headers, &body(&json!({})))).await;
        assert_eq!(answer.status, status, "{headers:?}");
        let kind = &answer.json()["error"]["type"];
        assert_eq!(kind, &if status == 401 { json!("authentication_error") } else { Value::Null });
    }
}

#[tokio::test]
async fn events_of_stages_are_for_messages_too() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(says(&["a"]))]);
    let answer = rig.send(request("POST", MESSAGES, &[("accept", "application/x-ndjson")], &body(&json!({})))).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"));
    assert_eq!(answer.lines().last().expect("a line")["event"], "done");
}
