//! A draft by a small model and the answer of a larger one in its place, on the real engine: each is what its model says alone,
//! they come in their order, and nothing of them stays.

use pointsman_tests::Host;
use pointsman_tests::raw::{self, Raw};
use serde_json::{Value, json};

use crate::host;
use crate::wires::{Manner, Wire, server};

const MODEL: &str = "demo:f16";
const DRAFT: &str = "demo-mini";

/// The lines of an answer.
fn lines(host: &Host, path: &str, body: &Value) -> Vec<Value> {
    let headers = [("content-type", "application/json"), ("accept", "application/x-ndjson")];
    let answer = host.send("POST", &format!("{}{path}", host.data), &headers, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    let text = answer.body.as_str().expect("several lines");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// What the lines of an answer say, choice by choice.
fn texts(lines: &[Value], n: u64, is_own: impl Fn(&Value) -> bool) -> Vec<String> {
    let of = |index: u64| lines.iter().filter(|line| is_own(line) && line["index"] == index).collect::<Vec<_>>();
    (0..n).map(|index| of(index).iter().filter_map(|line| line["text"].as_str()).collect()).collect()
}

fn alone(host: &Host, path: &str, body: &Value, model: &str) -> Vec<String> {
    let mut body = body.clone();
    body["model"] = model.into();
    texts(&lines(host, path, &body), body["n"].as_u64().unwrap_or(1), |_| true)
}

/// Bodies without their models.
fn asked() -> Vec<(&'static str, Value)> {
    let (chat, completions) = ("/v1/chat/completions", "/v1/completions");
    let messages = json!([{ "role": "user", "content": "What is ownership?" }]);
    let tool = json!({ "type": "function", "function": { "name": "weather", "parameters": { "type": "object",
        "properties": { "days": { "enum": [1, 2] } }, "required": ["days"], "additionalProperties": false } } });
    vec![
        (completions, json!({ "prompt": "Rust is", "max_tokens": 48, "ignore_eos": true, "temperature": 0 })),
        (completions, json!({ "prompt": "Ownership is", "max_tokens": 24, "n": 3, "temperature": 1, "seed": 7 })),
        (completions, json!({ "prompt": "A trait is", "max_tokens": 40, "stop": ["the", ","], "temperature": 0 })),
        (completions, json!({ "prompt": "A trait is", "max_tokens": 1, "temperature": 0 })),
        (chat, json!({ "messages": messages, "max_tokens": 32, "temperature": 0 })),
        // Rendered aside, because there are tools: the two come under way one after the other.
        (
            chat,
            json!({ "messages": messages, "max_tokens": 60, "tools": [tool], "tool_choice": "required", "temperature": 0 }),
        ),
        ("/v1/responses", json!({ "input": "What is a slice?", "max_output_tokens": 16, "temperature": 0 })),
        (
            "/v1/messages",
            json!({ "messages": messages, "max_tokens": 16, "stop_sequences": ["the"], "temperature": 0 }),
        ),
    ]
}

/// Whether a draft had its time, or both were computed at once and the final answer may have been the quicker.
fn check(host: &Host, path: &str, mut asked: Value, has_time: bool) {
    let n = asked["n"].as_u64().unwrap_or(1);
    let (small, large) = (alone(host, path, &asked, DRAFT), alone(host, path, &asked, MODEL));
    (asked["model"], asked["draft"]) = (MODEL.into(), DRAFT.into());
    let lines = lines(host, path, &asked);
    let is_draft = |line: &Value| line["stage"] == "draft";
    assert_eq!(texts(&lines, n, |line| !is_draft(line)), large, "{asked}");
    let done = lines.last().expect("a line");
    assert_eq!((&done["event"], &done["progress"]), (&json!("done"), &json!(100)), "{asked}");
    let (drafted, outcome) = (texts(&lines, n, is_draft), done["draft"]["outcome"].as_str().expect("it has one"));
    if has_time || outcome == "finished" {
        assert_eq!((outcome, &drafted), ("finished", &small), "{asked}");
        assert_eq!(done["draft"]["usage"]["prompt_tokens"], done["usage"]["prompt_tokens"], "one tokenizer: {done}");
    } else {
        assert_eq!(outcome, "replaced", "{asked}");
        assert!(small.iter().zip(&drafted).all(|(whole, part)| whole.starts_with(part)), "{drafted:?} {asked}");
    }
    let place = |event: &str| lines.iter().position(|line| line["event"] == event && !is_draft(line));
    let (replace, token) = (place("replace").expect("one"), place("token").expect("one"));
    assert_eq!(token, replace + 1, "{asked}");
    assert!(lines[replace..].iter().all(|line| !is_draft(line)), "{asked}");
    let times = [&done["draft"], done].map(|end| [&end["first_token_ms"], &end["ended_ms"]].map(Value::as_f64));
    let told: Vec<f64> = times.as_flattened().iter().copied().flatten().collect();
    assert!(told.is_sorted() && told[0] > 0.0 && (!has_time || told.len() == 4), "{done}");
}

#[test]
fn each_answer_is_the_one_of_its_model_and_they_come_in_order() {
    for (lead_ms, has_time) in [("60000", true), ("0", false)] {
        let host = host(&[("SERVER__DRAFT_LEAD_MS", lead_ms)]);
        asked().into_iter().for_each(|(path, asked)| check(&host, path, asked, has_time));
        raw::rests(&host);
    }
}

#[test]
fn a_draft_that_is_cancelled_or_left_half_way_leaves_nothing() {
    // Steps that take a while, and both at once.
    let host = host(&[("ENGINE__DEVICES", "[\"null:20000\"]"), ("SERVER__DRAFT_LEAD_MS", "0")]);
    let body = json!({ "model": MODEL, "draft": DRAFT, "prompt": "Rust is", "max_tokens": 400, "ignore_eos": true });
    for cancels in [false, true] {
        let mut answer = Raw::ask(&host, "/v1/completions", &body).expect("an answer");
        let mut next = || answer.event().expect("open").map(|line| serde_json::from_str::<Value>(&line).expect("JSON"));
        let mut id = String::new();
        loop {
            let line = next().expect("it goes on");
            if line["stage"] == "queued" {
                line["id"].as_str().expect("an id").clone_into(&mut id);
            }
            if line["stage"] == "draft" && line["event"] == "token" && !id.is_empty() {
                break;
            }
        }
        if cancels {
            let url = format!("{}/v1/requests/{id}", host.data);
            assert_eq!(host.send("DELETE", &url, &[], b"").status, 200);
            let last = std::iter::from_fn(&mut next).last().expect("a line");
            assert_eq!((&last["event"], &last["error"]["code"]), (&json!("error"), &json!("cancelled")));
        }
        drop(answer);
        raw::rests(&host);
    }
    let drained = host.admin("POST", "/admin/v1/drain", &Value::Null).body;
    assert_eq!(drained, json!({ "drained": true, "in_flight": 0 }));
}

#[test]
fn either_may_be_an_upstreams() {
    let far = host(&[]);
    let (hangs, _heard) = server(Wire::Http1, Manner::Hangs);
    let lines_of = |name: &str, url: &str| {
        let rest = "upstream_model = \"demo:f16\"\nconnections = 0\nprobe_interval_ms = 0";
        format!("[upstreams.{name}]\nurl = \"{url}\"\nmodel = \"{name}\"\n{rest}\n")
    };
    let config = lines_of("far", &far.data) + &lines_of("hangs", &hangs);
    let near = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config);
    let asked = json!({ "prompt": "A trait is", "max_tokens": 24, "temperature": 0 });
    let [small, large] = [DRAFT, MODEL].map(|model| alone(&far, "/v1/completions", &asked, model).concat());
    for (model, draft, first) in [("far", DRAFT, &small), (MODEL, "far", &large), (MODEL, "hangs", &String::new())] {
        let mut asked = asked.clone();
        (asked["model"], asked["draft"]) = (model.into(), draft.into());
        let lines = lines(&near, "/v1/completions", &asked);
        let is_draft = |line: &Value| line["stage"] == "draft";
        assert_eq!(texts(&lines, 1, |line| !is_draft(line)).concat(), large, "{model} after {draft}");
        let drafted = texts(&lines, 1, is_draft).concat();
        let done = lines.last().expect("a line");
        match done["draft"]["outcome"].as_str() {
            Some("finished") => assert_eq!(&drafted, first, "{model} after {draft}"),
            outcome => assert!(outcome == Some("replaced") && first.starts_with(&drafted), "{lines:?}"),
        }
        if draft == "hangs" {
            assert!(done["draft"]["usage"].is_null(), "{done}");
            let listed = near.admin("GET", "/admin/v1/requests?limit=2", &Value::Null).body;
            let given_up = listed["data"].as_array().into_iter().flatten();
            let ends: Vec<&Value> = given_up.map(|request| &request["finish"]).collect();
            assert!(ends.contains(&&json!("the final answer ended first")), "{listed}");
        }
    }
}
