//! Tools as people use them: a chat template that shows them, calls that the model makes or must make, and the stock client.

use std::process::Command;

use pointsman_tests::{Host, root, skip};
use serde_json::{Value, json};

/// The demo model behind a template that shows tools as Hermes and Qwen do, so that calls are looked for in its texts.
const TEMPLATE: &str = "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}<tool_call>\
    {{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}<|assistant|>";

/// A call that the model has no choice but to make.
const CALL: &str = r#"So\. <tool_call>\n\{"name": "weather", "arguments": \{"city": "[A-Z][a-z]{2,6}", "days": [1-9]\}\}\n</tool_call>"#;

fn host() -> Host {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let demo = root().join("host/app/demo");
    for (from, to) in [
        ("demo/config.json", "config.json"),
        ("demo/generation_config.json", "generation_config.json"),
        ("demo/model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
    ] {
        std::fs::copy(demo.join(from), folder.path().join(to)).expect("a file of the demo");
    }
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).expect("a temporary file");
    let config = format!("[engine]\ndemo = false\n\n[models]\ntooled = \"{}\"\n", folder.path().display());
    Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config)
}

fn body(extra: &Value) -> Value {
    let weather = json!({ "type": "function", "function": { "name": "weather", "description": "Tells the weather.",
        "parameters": { "type": "object", "additionalProperties": false, "required": ["city", "days"], "properties": {
            "city": { "enum": ["Ulm", "Bonn"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } } } } });
    let time = json!({ "type": "function", "function": { "name": "time",
        "parameters": { "type": "object", "properties": {}, "additionalProperties": false } } });
    let mut body = json!({ "model": "tooled", "messages": [{ "role": "user", "content": "Weather?" }], "max_tokens": 300,
        "seed": 5, "tools": [weather, time] });
    body.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
    body
}

/// What the chunks of a stream add up to: content, calls as name and arguments, and the reason of the end.
fn streamed(host: &Host, mut body: Value) -> (String, Vec<(String, String)>, String) {
    body["stream"] = true.into();
    let answer = host.post("/v1/chat/completions", &body);
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<(String, String)>::new(), String::new());
    for line in answer.body.as_str().expect("events").lines().filter_map(|line| line.strip_prefix("data: ")) {
        let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
        let choice = &event["choices"][0];
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let index = usize::try_from(call["index"].as_u64().expect("an index")).expect("small");
            if call["id"].is_string() {
                assert_eq!((index, &call["type"]), (calls.len(), &json!("function")), "{call}");
                calls.push((text(&call["function"]["name"]), String::new()));
            }
            calls[index].1.push_str(&text(&call["function"]["arguments"]));
        }
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    (content, calls, reason)
}

/// The same of a whole answer.
fn whole(host: &Host, body: &Value) -> (String, Vec<(String, String)>, String) {
    let answer = host.post("/v1/chat/completions", body);
    assert_eq!(answer.status, 200, "{body}: {answer:?}");
    let (choice, text) = (&answer.body["choices"][0], |value: &Value| value.as_str().unwrap_or_default().to_owned());
    let calls = choice["message"]["tool_calls"].as_array().into_iter().flatten();
    let calls = calls.map(|call| (text(&call["function"]["name"]), text(&call["function"]["arguments"]))).collect();
    (text(&choice["message"]["content"]), calls, text(&choice["finish_reason"]))
}

#[test]
fn calls_are_made_forced_and_answered() {
    let host = host();
    let named = json!({ "tool_choice": { "type": "function", "function": { "name": "weather" } } });
    for (extra, content, names, reason) in [
        (json!({ "guided_regex": CALL }), "So. ", &["weather"][..], "tool_calls"),
        (json!({ "guided_regex": CALL, "tool_choice": "none" }), "", &[], "stop"),
        (json!({ "tool_choice": "required", "parallel_tool_calls": false }), "", &["*"], "tool_calls"),
        (named, "", &["weather"], "stop"),
    ] {
        let body = body(&extra);
        let (said, calls, end) = whole(&host, &body);
        assert_eq!((&*end, calls.len()), (reason, names.len()), "{extra}: {said}");
        assert!(names.is_empty() || said == content, "{extra}: {said}");
        assert_eq!(names.is_empty(), said.contains("<tool_call>"), "{extra}: {said}");
        for ((name, arguments), expect) in calls.iter().zip(names) {
            assert!(name == expect || *expect == "*", "{extra}: {name}");
            let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{arguments}: {e}"));
            assert!(
                name != "weather" || arguments["days"].as_u64().is_some_and(|n| (1..=9).contains(&n)),
                "{arguments}"
            );
        }
        assert_eq!(streamed(&host, body), (said, calls, end), "{extra}");
    }
    let turn = json!([{ "role": "user", "content": "Weather?" },
        { "role": "assistant", "content": null, "tool_calls": [{ "id": "a", "type": "function", "function": {
            "name": "weather", "arguments": "{\"city\": \"Ulm\"}" } }] },
        { "role": "tool", "tool_call_id": "a", "content": "rain" }]);
    let tokens = host.post("/tokenize", &json!({ "model": "tooled", "messages": turn })).body["tokens"].clone();
    let prompt = host.post("/detokenize", &json!({ "model": "tooled", "tokens": tokens })).body["prompt"].clone();
    let prompt = prompt.as_str().expect("a text");
    assert!(prompt.contains(r#"<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>"#), "{prompt}");
    assert!(prompt.contains("tool: rain"), "{prompt}");
}

/// Runs a script with a client that is a Python package; a skip where that is absent.
fn stock_client(package: &str, script: &str) {
    let present = Command::new("python3").args(["-c", &format!("import {package}")]).output();
    if !present.is_ok_and(|output| output.status.success())
        && skip(package, &format!("python3 has no package `{package}`"))
    {
        return;
    }
    let host = host();
    let script = root().join("tests/e2e").join(script);
    let output = Command::new("python3").arg(script).arg(&host.data).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_stock_openai_client_calls_tools_and_parses_forms() {
    stock_client("openai", "tools.py");
}

#[test]
fn the_stock_openai_client_gets_responses() {
    stock_client("openai", "responses.py");
}

#[test]
fn the_stock_anthropic_client_asks_streams_and_calls_tools() {
    stock_client("anthropic", "messages.py");
}
