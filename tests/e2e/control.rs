//! What a request may ask of its text, over HTTP: a form, several choices, and that nobody else notices.

use std::collections::BTreeSet;

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::host;

const MODEL: &str = "demo:f16";

fn complete(host: &Host, body: Value) -> Value {
    let mut whole = json!({ "model": MODEL, "prompt": "Ownership is", "max_tokens": 400 });
    let (to, from) = (whole.as_object_mut().expect("an object"), body.as_object().expect("an object"));
    to.extend(from.clone());
    let answer = host.post("/v1/completions", &whole);
    assert_eq!(answer.status, 200, "{whole}: {answer:?}");
    answer.body
}

fn texts(answer: &Value) -> Vec<&str> {
    let choices = answer["choices"].as_array().expect("choices");
    choices.iter().map(|choice| choice["text"].as_str().expect("a text")).collect()
}

/// A record with every kind of value, so small that any text of this form ends.
fn record() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["kind", "n", "ok", "words"],
        "properties": {
            "kind": { "enum": ["a", "b \"c\"", "\u{e9}"] },
            "n": { "type": "integer", "minimum": -5, "maximum": 500 },
            "ok": { "type": ["boolean", "null"] },
            "words": { "type": "array", "maxItems": 3, "items": { "type": "string", "maxLength": 6 } }
        }
    })
}

fn check_record(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let record = value.as_object().unwrap_or_else(|| panic!("{text}"));
    let keys: BTreeSet<&str> = record.keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["kind", "n", "ok", "words"]), "{text}");
    assert!(["a", "b \"c\"", "\u{e9}"].contains(&value["kind"].as_str().unwrap_or_default()), "{text}");
    assert!(value["n"].as_i64().is_some_and(|n| (-5..=500).contains(&n)), "{text}");
    assert!(value["ok"].is_boolean() || value["ok"].is_null(), "{text}");
    let words = value["words"].as_array().unwrap_or_else(|| panic!("{text}"));
    assert!(words.len() <= 3 && words.iter().all(|w| w.as_str().is_some_and(|w| w.chars().count() <= 6)), "{text}");
}

#[test]
fn a_text_has_the_form_that_was_asked_for() {
    let host = host(&[]);
    let schema =
        json!({ "type": "json_schema", "json_schema": { "name": "record", "strict": true, "schema": record() } });
    for seed in 0..6 {
        let answer = complete(&host, json!({ "response_format": schema, "seed": seed, "temperature": 1.5 }));
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        check_record(texts(&answer)[0]);
    }
    let greedy = |form: Value| {
        complete(
            &host,
            json!({ "temperature": 0 })
                .as_object_mut()
                .map(|body| {
                    body.extend(form.as_object().cloned().unwrap_or_default());
                    Value::Object(body.clone())
                })
                .expect("an object"),
        )
    };
    let said = greedy(json!({ "guided_regex": "[a-c]{2}-(x|y)[0-9]{3}" }));
    let said = texts(&said)[0];
    assert!(said.len() == 7 && said.as_bytes()[2] == b'-' && said[4..].bytes().all(|b| b.is_ascii_digit()), "{said}");
    let choice = greedy(json!({ "guided_choice": ["left", "right"] }));
    assert!(["left", "right"].contains(&texts(&choice)[0]), "{choice}");
    let lark = greedy(json!({ "structured_outputs": { "grammar": "start: \"<\" WORD \">\"\nWORD: /[a-z]{1,5}/" } }));
    let lark = texts(&lark)[0];
    assert!(lark.starts_with('<') && lark.ends_with('>') && (3..=7).contains(&lark.len()), "{lark}");
    // Any object, cut where its tokens end.
    let object = greedy(json!({ "response_format": { "type": "json_object" }, "max_tokens": 24 }));
    let (text, reason) = (texts(&object)[0], &object["choices"][0]["finish_reason"]);
    assert!(text.starts_with('{'), "{object}");
    assert!(reason == "length" || serde_json::from_str::<Value>(text).is_ok_and(|v| v.is_object()), "{object}");
}

#[test]
fn forms_that_cannot_be_are_refused_by_name_and_nothing_hangs() {
    let host = host(&[]);
    let nested = format!("{}{}", "(".repeat(300), ")".repeat(300));
    for (body, param, part) in [
        (json!({ "guided_regex": "(" }), "guided_regex", "unclosed"),
        (json!({ "guided_regex": nested }), "guided_regex", "nests deeper than 128"),
        (json!({ "guided_grammar": "start: nothing" }), "guided_grammar", "nothing"),
        (json!({ "guided_json": { "type": "strin" } }), "guided_json", "strin"),
        (json!({ "guided_json": { "enum": ["x".repeat(70_000)] } }), "guided_json", "may have 65536"),
        (json!({ "guided_regex": "a", "guided_json": {} }), "guided_regex", "send one"),
        (json!({ "guided_regex": "a", "ignore_eos": true }), "ignore_eos", "must be able to end"),
        (json!({ "best_of": 3 }), "best_of", "choose among them"),
        (json!({ "n": 9 }), "n", "from 1 to 8"),
        (json!({ "n": 8, "prompt": vec!["a"; 9] }), "n", "may ask for 64"),
    ] {
        let mut whole = json!({ "model": MODEL, "prompt": "x" });
        whole.as_object_mut().expect("an object").extend(body.as_object().cloned().unwrap_or_default());
        let answer = host.post("/v1/completions", &whole);
        assert_eq!((answer.status, &answer.body["error"]["param"]), (400, &json!(param)), "{answer:?}");
        assert!(answer.body["error"]["message"].as_str().is_some_and(|m| m.contains(part)), "{answer:?}");
    }
    let stuck = json!({ "guided_regex": "(a|aa|aaa)*b".repeat(200), "stream": true, "prompt": "x", "model": MODEL, "max_tokens": 8 });
    let answer = host.post("/v1/completions", &stuck);
    assert!(matches!(answer.status, 200 | 400), "{answer:?}");
    assert_eq!(texts(&complete(&host, json!({ "max_tokens": 4 }))).len(), 1, "it serves on");
}

/// Free and formed texts in one batch: the free ones say what they say alone, the formed ones keep their form.
#[test]
fn thirty_two_mixed_streams_do_not_touch_each_other() {
    let host = host(&[]);
    let free = |i: usize| {
        json!({ "model": MODEL, "prompt": format!("A trait number {i} is"), "max_tokens": 24, "ignore_eos": true,
            "seed": i, "temperature": if i.is_multiple_of(4) { 0.0 } else { 0.9 } })
    };
    let formed = |i: usize| {
        json!({ "model": MODEL, "prompt": format!("Record {i}: "), "max_tokens": 400, "seed": i, "temperature": 1.0,
            "guided_json": record() })
    };
    let alone: Vec<_> = (0..32_usize)
        .map(|i| if i.is_multiple_of(2) { host.stream(&free(i)) } else { host.stream(&formed(i)) })
        .collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let (host, free, formed) = (&host, &free, &formed);
        let start = |i: usize| scope.spawn(move || host.stream(&if i.is_multiple_of(2) { free(i) } else { formed(i) }));
        let threads: Vec<_> = (0..32).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    for (i, (alone, together)) in alone.into_iter().zip(together).enumerate() {
        let (alone, together) = (alone.expect("served"), together.expect("served"));
        assert_eq!(alone, together, "stream {i}");
        if i % 2 == 1 {
            assert_eq!(together.finish, "stop", "{together:?}");
            check_record(&together.text);
        }
    }
}

#[test]
fn choices_share_their_prompt_and_are_each_reproducible() {
    let host = host(&[]);
    let long = "The borrow checker reads every line of it. ".repeat(12);
    let ask = |n: u32, seed: u32, extra: Value| {
        let mut body =
            json!({ "prompt": long, "n": n, "seed": seed, "temperature": 1, "max_tokens": 12, "ignore_eos": true });
        body.as_object_mut().expect("an object").extend(extra.as_object().cloned().unwrap_or_default());
        complete(&host, body)
    };
    let four = ask(4, 40, json!({ "cache_prompt": false }));
    assert_eq!(
        four["choices"].as_array().map(|c| c.iter().map(|c| c["index"].clone()).collect::<Vec<_>>()),
        Some(vec![json!(0), json!(1), json!(2), json!(3)])
    );
    let said = texts(&four);
    assert_eq!(said.iter().collect::<BTreeSet<_>>().len(), 4, "seeds differ: {said:?}");
    // Choice i of seed s is choice 0 of seed s + i, beside whomever.
    for (i, text) in (0..).zip(&said) {
        assert_eq!(texts(&ask(1, 40 + i, json!({})))[0], *text, "choice {i}");
    }
    assert_eq!(texts(&ask(4, 40, json!({}))), said, "the same again");
    let usage = &four["usage"];
    let prompt = usage["prompt_tokens"].as_u64().expect("a number");
    assert_eq!((usage["completion_tokens"].as_u64(), usage["total_tokens"].as_u64()), (Some(48), Some(prompt + 48)));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0, "what choices share is not news: {usage}");
    // One prefill: what the other three computed of the prompt is less than a block each.
    let metrics = host.get("/metrics").body.as_str().expect("text").to_owned();
    let value = |name: &str| -> f64 {
        let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(MODEL));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let (hits, queries) = (value("vllm:prefix_cache_hits_total"), value("vllm:prefix_cache_queries_total"));
    assert!(hits > 0.6 * queries, "{hits} of {queries}");
    let body = json!({ "model": MODEL, "prompt": long, "n": 4, "seed": 40, "temperature": 1, "max_tokens": 12,
        "ignore_eos": true, "stream": true });
    let streamed = host.post("/v1/completions", &body);
    let mut by_index = vec![String::new(); 4];
    for line in streamed.body.as_str().expect("events").lines().filter_map(|line| line.strip_prefix("data: {")) {
        let event: Value = serde_json::from_str(&format!("{{{line}")).expect("JSON");
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = usize::try_from(choice["index"].as_u64().expect("an index")).expect("small");
            by_index[index].push_str(choice["text"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(by_index, said);
}

#[test]
fn a_tenant_finds_its_own_prefixes_only() {
    let host = host(&[]);
    let long = "Lifetimes name regions of a program. ".repeat(12);
    let cached = |tenant: &str| {
        let body = json!({ "model": MODEL, "prompt": long, "max_tokens": 1 });
        let headers = [("content-type", "application/json"), ("x-tenant-id", tenant)];
        let url = format!("{}/v1/completions", host.data);
        let answer = host.send("POST", &url, &headers, body.to_string().as_bytes());
        answer.body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_else(|| panic!("{answer:?}"))
    };
    assert_eq!([cached("one"), cached("two")], [0, 0]);
    assert!([cached("one"), cached("two")].iter().all(|&cached| cached > 32));
}
