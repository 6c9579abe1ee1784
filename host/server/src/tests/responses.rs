//! Responses: whole, as numbered events, with functions, and what is refused because nothing is stored.

use pointsman_sched::request::{Failure, FinishReason, SinkEvent};
use serde_json::{Value, json};

use crate::fakes::{Answer, Play, Rig, bytes, request, token};

const RESPONSES: &str = "/v1/responses";

fn body(extra: &Value) -> String {
    let mut body = json!({"model": "m", "input": "hi", "max_output_tokens": 30});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

/// The named and numbered events of a stream.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"), "{}", answer.body);
    let event = |(number, event): (usize, &str)| {
        let (name, data) = event.strip_prefix("event: ").and_then(|e| e.split_once("\ndata: ")).expect("a named event");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(number)));
        data
    };
    answer.body.split_terminator("\n\n").enumerate().map(event).collect()
}

fn ends(text: &str, reason: FinishReason) -> Vec<SinkEvent> {
    bytes(text).into_iter().map(token).chain([SinkEvent::Finished(reason)]).collect()
}

#[tokio::test]
async fn a_response_is_answered_whole() {
    let rig = Rig::new();
    let extra = json!({"instructions": "Be", "metadata": {"a": "b"}, "temperature": 0.5, "store": true});
    let answer = rig.post(RESPONSES, &body(&extra)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut found = answer.json();
    let id = answer.header("x-request-id").to_owned();
    assert!(id.starts_with("resp_"), "{id}");
    let item = found["output"][0]["id"].take();
    assert!(item.as_str().is_some_and(|id| id.starts_with("msg_")), "{item}");
    let text = json!({"type": "output_text", "text": "hello", "annotations": [], "logprobs": []});
    assert_eq!(
        found,
        json!({"id": id, "object": "response", "created_at": 1_700_000_000, "status": "completed", "error": null,
            "incomplete_details": null, "model": "m:a",
            "output": [{"id": null, "type": "message", "status": "completed", "role": "assistant", "content": [text]}],
            "usage": {"input_tokens": 31, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 6,
                "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 37},
            "background": false, "instructions": "Be", "max_output_tokens": 30, "metadata": {"a": "b"},
            "parallel_tool_calls": true, "previous_response_id": null, "store": false, "temperature": 0.5,
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": null,
            "truncation": "disabled"})
    );
}

#[tokio::test]
async fn the_events_add_up_to_the_whole() {
    let call = r#"[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]"#;
    let tools = json!([{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true},
        {"type": "function", "name": "g", "parameters": null}]);
    let required = json!({"tools": tools, "tool_choice": "required"});
    let named = json!({"tools": tools, "tool_choice": {"type": "function", "name": "f"}});
    let text = ["message:hello"];
    for (extra, text, reason, status, expect) in [
        (json!({}), "hello", FinishReason::Stop(1), "completed", &text[..]),
        (json!({}), "hello", FinishReason::Length, "incomplete", &text),
        (json!({"stop": "l"}), "hello", FinishReason::Length, "completed", &["message:he"]),
        (json!({"stop": "h"}), "hello", FinishReason::Length, "completed", &[]),
        (required, call, FinishReason::Stop(1), "completed", &[r#"f:{"a": 1}"#, "g:{}"]),
        (named, r#"{"b": "#, FinishReason::Length, "incomplete", &[r#"f:{"b": "#]),
    ] {
        let rig = Rig::new();
        rig.engine.play([Play::Now(ends(text, reason)), Play::Now(ends(text, reason))]);
        let whole = rig.post(RESPONSES, &body(&extra)).await.json();
        assert_eq!(whole["status"], status, "{extra}: {whole}");
        let why = if status == "completed" { Value::Null } else { json!({"reason": "max_output_tokens"}) };
        assert_eq!(whole["incomplete_details"], why, "{extra}");
        let said = |item: &Value| match item["type"].as_str() {
            Some("message") => format!("message:{}", item["content"][0]["text"].as_str().unwrap_or_default()),
            _ => format!(
                "{}:{}",
                item["name"].as_str().unwrap_or_default(),
                item["arguments"].as_str().unwrap_or_default()
            ),
        };
        let output = whole["output"].as_array().expect("a list");
        assert_eq!(output.iter().map(said).collect::<Vec<_>>(), expect, "{extra}");
        let mut streaming = extra.clone();
        streaming["stream"] = true.into();
        let events = events(&rig.post(RESPONSES, &body(&streaming)).await);
        let names: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
        assert_eq!(names[..2], ["response.created", "response.in_progress"], "{extra}");
        let last = events.last().expect("an event");
        assert_eq!(last["type"], format!("response.{status}"), "{extra}");
        assert_eq!(last["response"]["output"].as_array().expect("a list").iter().map(said).collect::<Vec<_>>(), expect);
        assert_eq!(last["response"]["usage"]["output_tokens"], whole["usage"]["output_tokens"], "{extra}");
        for (i, item) in last["response"]["output"].as_array().expect("a list").iter().enumerate() {
            let of_item: Vec<&Value> = events.iter().filter(|event| event["output_index"] == i).collect();
            let (first, done) = (of_item[0], of_item[of_item.len() - 1]);
            assert_eq!(
                (&first["type"], &first["item"]["status"]),
                (&json!("response.output_item.added"), &json!("in_progress"))
            );
            assert_eq!((&done["type"], &done["item"]), (&json!("response.output_item.done"), item), "{extra}");
            let deltas: String = of_item.iter().filter_map(|event| event["delta"].as_str()).collect();
            assert!(said(item).ends_with(&format!(":{deltas}")), "{extra}: {deltas}");
            let ids = of_item.iter().filter_map(|event| event["item_id"].as_str());
            assert!(ids.clone().count() > 0 && ids.into_iter().all(|id| item["id"] == id), "{extra}");
        }
    }
}

#[tokio::test]
async fn items_become_what_the_template_knows() {
    let input = json!([
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "s"}]}]);
    let rig = Rig::new();
    let answer =
        rig.post(RESPONSES, &body(&json!({"input": input, "max_output_tokens": 1, "instructions": "I"}))).await;
    assert_eq!(answer.status, 400, "longer than the context of the test's model: {}", answer.body);
    let expect = "system: I\nsystem: D\nuser: a\nassistant: b\ntool: r\ntool: s\nassistant:";
    let tokens = rig.post("/tokenize", &json!({"prompt": expect}).to_string()).await.json();
    let message = answer.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains(&format!("the prompt has {} and 1 more", tokens["count"])), "{message}");
    assert_eq!(answer.json()["error"]["param"], "input");
}

#[tokio::test]
async fn what_cannot_be_done_is_named() {
    for (extra, param, expect) in [
        (json!({"input": null}), "input", "is required"),
        (json!({"input": 1}), "input", "a string or an array of 1 to 16384 items"),
        (json!({"input": []}), "input", "found an array of 0"),
        (json!({"input": [{"type": "reasoning"}]}), "input[0].type", "an item of type `reasoning`"),
        (json!({"input": [{"role": "tool", "content": "x"}]}), "input[0].role", "user, assistant, system or developer"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
            "input[0].content[0].type",
            "content of type `input_image`",
        ),
        (json!({"input": [{"type": "function_call_output", "output": "x"}]}), "input[0].call_id", "is required"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id", "send the earlier items in `input`"),
        (json!({"background": true}), "background", "`background` is not supported"),
        (json!({"conversation": "c"}), "conversation", "not supported"),
        (json!({"store": "yes"}), "store", "a boolean"),
        (json!({"truncation": "auto"}), "truncation", "`truncation` auto is not supported"),
        (json!({"include": ["message.output_text.logprobs"]}), "include", "which chat completions have"),
        (json!({"top_logprobs": 2}), "top_logprobs", "which chat completions have"),
        (json!({"metadata": {"a": 1}}), "metadata", "an object of at most 16 texts"),
        (json!({"max_output_tokens": 0}), "max_output_tokens", "from 1"),
        (json!({"n": 2}), "n", "must be 1"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type", "a format of type `xml`"),
        (json!({"text": {"format": {"type": "json_schema", "schema": 1}}}), "text.format.schema", "a JSON schema"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "a tool of type `web_search`"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name", "is required"),
        (json!({"tool_choice": {"type": "allowed_tools"}}), "tool_choice.type", "a choice of type `allowed_tools`"),
        (json!({"tool_choice": {"type": "function", "name": "h"}}), "tool_choice.name", "`h`, which is not among"),
    ] {
        let rig = Rig::new();
        let answer = rig.post(RESPONSES, &body(&extra)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{extra}: {error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(expect)), "{extra}: {error}");
    }
}

#[tokio::test]
async fn a_fault_has_a_status_before_the_first_event_and_ends_the_response_after_it() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(vec![SinkEvent::Failed(Failure::Unanswered)])]);
    assert_eq!(rig.post(RESPONSES, &body(&json!({"stream": true}))).await.status, 503);
    for (failure, code) in [(Failure::Unanswered, "server_error"), (Failure::DroppedByPolicy, "rate_limit_exceeded")] {
        rig.engine.play([Play::Now(vec![token(262), SinkEvent::Failed(failure)])]);
        let events = events(&rig.post(RESPONSES, &body(&json!({"stream": true}))).await);
        let last = events.last().expect("an event");
        assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
        assert_eq!(last["response"]["error"]["code"], code);
        assert_eq!(last["response"]["output"][0]["content"][0]["text"], "hello");
    }
    let headers = [("accept", "application/x-ndjson")];
    let answer = rig.send(request("POST", RESPONSES, &headers, &body(&json!({})))).await;
    assert_eq!(answer.lines().last().expect("a line")["event"], "done");
}
