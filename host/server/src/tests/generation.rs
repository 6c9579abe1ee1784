//! Generations that go well, and how they end when they do not: shapes, streams, stop strings, cancels, slow clients.

use std::sync::Arc;

use axum::body::Body;
use pointsman_sched::request::{
    CancelCause, Drafted, Failure, FinishReason, ResourceExhausted, SinkEvent, SinkState, TokenLogprobs,
};
use serde_json::{Value, json};

use crate::ServerConfig;
use crate::fakes::{Answer, Play, Rig, bytes, request, says, token};
use crate::serve::{Listeners, serve};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(extra: &Value) -> String {
    merged(json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}), extra)
}

fn completion(extra: &Value) -> String {
    merged(json!({"model": "m", "prompt": "hi"}), extra)
}

fn merged(mut body: Value, extra: &Value) -> String {
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body.to_string()
}

/// The text that a stream of chat chunks adds up to, for one choice.
fn streamed_text(answer: &Answer, index: u64) -> String {
    let of_choice = |event: &Value| {
        let choice = event["choices"].as_array()?.iter().find(|c| c["index"] == index)?;
        choice["delta"]["content"].as_str().or(choice["text"].as_str()).map(str::to_owned)
    };
    answer.events().iter().filter_map(of_choice).collect()
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let rig = Rig::new();
    let answer = rig.post(CHAT, &chat(&json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let id = answer.header("x-request-id").to_owned();
    assert!(id.starts_with("chatcmpl-") && id.len() == 9 + 24, "{id}");
    assert_eq!(
        answer.json(),
        json!({
            "id": id, "object": "chat.completion", "created": 1_700_000_000, "model": "m:a",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello", "refusal": null},
                "logprobs": null, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26,
                "prompt_tokens_details": {"cached_tokens": 2}},
        })
    );
    assert_eq!(answer.header("x-pointsman-replica"), "m:a@x");
    assert_eq!(answer.header("x-pointsman-variant"), "m:a");
    assert_eq!(answer.header("x-pointsman-router"), "r@1+0000;g=7");
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(rig.state.in_flight(), 0);
    assert!(rig.engine.cancels.lock().expect("unpoisoned").is_empty(), "a request that ended is not cancelled");
}

#[tokio::test]
async fn a_chat_is_streamed_as_server_sent_events() {
    let rig = Rig::new();
    let body = chat(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let answer = rig.post(CHAT, &body).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"));
    assert_eq!(answer.header("x-pointsman-variant"), "m:a");
    let events = answer.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["usage"], Value::Null);
    assert_eq!(events[0]["id"], answer.header("x-request-id"));
    assert_eq!(streamed_text(&answer, 0), "hello");
    let n = events.len();
    assert_eq!(
        events[n - 3]["choices"][0],
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"})
    );
    assert_eq!(events[n - 2]["choices"], json!([]));
    assert_eq!(events[n - 2]["usage"]["completion_tokens"], 6);
    assert_eq!(events[n - 1], "[DONE]");
}

#[tokio::test]
async fn ndjson_tells_stages_and_progress() {
    let rig = Rig::new();
    let headers = [("content-type", "application/json"), ("accept", "application/x-ndjson")];
    let answer = rig.send(request("POST", CHAT, &headers, &chat(&json!({})))).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/x-ndjson"));
    let lines = answer.lines();
    let kinds: Vec<&str> = lines.iter().filter_map(|line| line["event"].as_str()).collect();
    assert_eq!(kinds, ["queued", "started", "token", "token", "token", "token", "token", "finished", "done"]);
    assert_eq!((&lines[0]["replica"], &lines[0]["prompt_tokens"]), (&json!("m:a@x"), &json!(20)));
    assert_eq!((&lines[1]["queued_us"], &lines[1]["cached_tokens"]), (&json!(5), &json!(2)));
    assert_eq!((&lines[2]["text"], &lines[2]["token"]), (&json!("h"), &json!(u32::from(b'h') + 3)));
    assert_eq!(lines[7]["finish_reason"], "stop");
    assert_eq!(lines[8]["usage"]["total_tokens"], 26);
    let told = |name: &str| lines.iter().map(|line| line[name].clone()).collect::<Vec<_>>();
    assert_eq!(
        told("stage"),
        ["queued", "prefill", "decode", "decode", "decode", "decode", "decode", "decode", "done"]
    );
    let progress: Vec<u64> = told("progress").iter().filter_map(Value::as_u64).collect();
    assert!(progress.len() == 9 && progress.is_sorted() && progress[0] == 0 && progress[8] == 100, "{progress:?}");
    assert_eq!((&lines[3]["tokens"], lines[3]["remaining_ms"].is_u64()), (&json!(2), true), "{}", lines[3]);
    rig.engine.play([Play::Now(vec![SinkEvent::Failed(Failure::DroppedByPolicy)])]);
    let answer = rig.send(request("POST", CHAT, &headers, &chat(&json!({})))).await;
    let last = answer.lines().pop().expect("a line");
    assert_eq!((&last["event"], &last["error"]["code"]), (&json!("error"), &json!("dropped_by_policy")));
}

#[tokio::test]
async fn stop_strings_end_the_text_before_them() {
    for (events, stop, expect, completion_tokens) in [
        (says(&["one\n", "\ntwo"]), json!("\n\n"), "one", 5),
        (says(&["one two"]), json!(["zzz"]), "one two", 8),
        (says(&["a\u{1f980}b"]), json!(["\u{1f980}"]), "a", 5),
        (says(&["ab"]), json!(["abc"]), "ab", 3),
    ] {
        let rig = Rig::new();
        for stream in [false, true] {
            rig.engine.play([Play::Now(events.clone())]);
            let options = if stream { json!({"include_usage": true}) } else { Value::Null };
            let body = chat(&json!({"stop": stop, "stream": stream, "stream_options": options}));
            let answer = rig.post(CHAT, &body).await;
            if stream {
                assert_eq!(streamed_text(&answer, 0), expect);
                let events = answer.events();
                assert_eq!(events[events.len() - 2]["usage"]["completion_tokens"], completion_tokens);
            } else {
                let json = answer.json();
                assert_eq!(json["choices"][0]["message"]["content"], expect);
                assert_eq!(json["choices"][0]["finish_reason"], "stop");
                assert_eq!(json["usage"]["completion_tokens"], completion_tokens);
            }
        }
    }
}

#[tokio::test]
async fn a_stop_string_cancels_the_engine() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(says(&["ab", "cd"]))]);
    rig.post(CHAT, &chat(&json!({"stop": "b"}))).await;
    let cancels = rig.engine.cancels.lock().expect("unpoisoned").clone();
    assert_eq!(cancels, [(pointsman_sched::ids::ReplicaId(0), rig.engine.last_id(), CancelCause::StopString)]);
}

#[tokio::test]
async fn stop_strings_wait_for_min_tokens() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(says(&["b1", "b2"]))]);
    let answer = rig.post(CHAT, &chat(&json!({"stop": "b", "min_tokens": 2}))).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "b1");
}

#[tokio::test]
async fn several_choices_are_several_requests_on_one_replica() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(says(&["one"])), Play::Now(says(&["two"]))]);
    let answer = rig.post(CHAT, &chat(&json!({"n": 2, "seed": 40}))).await;
    let json = answer.json();
    assert_eq!(json["choices"][0]["message"]["content"], "one");
    assert_eq!(json["choices"][1]["message"]["content"], "two");
    assert_eq!(
        json["usage"],
        json!({"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28,
        "prompt_tokens_details": {"cached_tokens": 2}})
    );
    let taken = rig.engine.taken.lock().expect("unpoisoned");
    assert_eq!(taken.iter().map(|t| (t.replica.0, t.seed)).collect::<Vec<_>>(), [(0, 40), (0, 41)]);
    assert_eq!(rig.router.calls.lock().expect("unpoisoned").len(), 1);
}

#[tokio::test]
async fn streams_of_several_choices_interleave() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(says(&["one"])), Play::Now(says(&["two"]))]);
    let answer = rig.post(CHAT, &chat(&json!({"n": 2, "stream": true}))).await;
    assert_eq!((streamed_text(&answer, 0), streamed_text(&answer, 1)), ("one".into(), "two".into()));
    assert_eq!(answer.events().last(), Some(&json!("[DONE]")));
}

#[tokio::test]
async fn completions_take_text_and_token_ids() {
    for (prompt, expect) in [
        (json!("hello"), vec![vec![0, 262]]),
        (json!(["hello", "x"]), vec![vec![0, 262], vec![0, 123]]),
        (json!([5, 6]), vec![vec![5, 6]]),
        (json!([[5], [6, 7]]), vec![vec![5], vec![6, 7]]),
    ] {
        let rig = Rig::new();
        let answer = rig.post(COMPLETIONS, &completion(&json!({"prompt": prompt}))).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let json = answer.json();
        assert_eq!((&json["object"], &json["choices"][0]["text"]), (&json!("text_completion"), &json!("hello")));
        assert_eq!(json["choices"].as_array().map(Vec::len), Some(expect.len()));
        assert!(answer.header("x-request-id").starts_with("cmpl-"));
        let taken = rig.engine.taken.lock().expect("unpoisoned");
        let prompts: Vec<Vec<u32>> = taken.iter().map(|t| t.prompt.to_vec()).collect();
        assert_eq!(prompts, expect);
        assert_eq!(taken[0].max_new_tokens, 16);
    }
}

#[tokio::test]
async fn completions_echo_their_prompt() {
    for (stream, prompt, expect) in
        [(false, json!("hi "), "hi hello"), (true, json!("hi "), "hi hello"), (true, json!(bytes("hey ")), "hey hello")]
    {
        let rig = Rig::new();
        let answer =
            rig.post(COMPLETIONS, &completion(&json!({"prompt": prompt, "echo": true, "stream": stream}))).await;
        let text = if stream {
            streamed_text(&answer, 0)
        } else {
            answer.json()["choices"][0]["text"].as_str().expect("text").to_owned()
        };
        assert_eq!(text, expect);
    }
}

/// What an engine says of a prompt of five tokens, and a word after it.
fn with_scores(says_more: bool) -> Vec<SinkEvent> {
    let score = |chosen: f32| TokenLogprobs { chosen, top: vec![(262, -0.125), (3 + 0xc3, chosen)] };
    let scores = [-1.0, -2.0, f32::NEG_INFINITY, -4.0].map(score).to_vec();
    let mut events = vec![SinkEvent::Started { queued_us: 5, cached_tokens: 0 }, SinkEvent::Scored(scores)];
    let logprobs = Some(Box::new(TokenLogprobs { chosen: -0.5, top: Vec::new() }));
    let word = SinkEvent::Token { token: 262, logprobs, drafted: Drafted::default() };
    events.extend(says_more.then_some(word));
    events.push(SinkEvent::Finished(FinishReason::Length));
    events
}

#[tokio::test]
async fn an_echo_says_how_likely_its_prompt_is() {
    let ids: Vec<u32> = [vec![0], bytes("h\u{e9}!")].concat();
    for (prompt, says_more) in [(json!("h\u{e9}!"), true), (json!(ids), true), (json!("h\u{e9}!"), false)] {
        let rig = Rig::new();
        rig.engine.play([Play::Now(with_scores(says_more)), Play::Now(with_scores(says_more))]);
        let max_tokens = usize::from(says_more);
        let mut body = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": max_tokens});
        let answer = rig.post(COMPLETIONS, &completion(&body)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let choice = &answer.json()["choices"][0];
        // The mark before the text is no part of it, and both halves of a character begin where it does.
        let n = 5 + max_tokens;
        let cut = |all: Value| Value::from(all.as_array().expect("a list")[..n].to_vec());
        let top = |first: f32| json!({"hello": -0.125, "\u{fffd}": first});
        let expect = json!({
            "tokens": cut(json!(["<|bos|>", "h", "\u{fffd}", "\u{fffd}", "!", "hello"])),
            "token_logprobs": cut(json!([null, -1.0, -2.0, -9_999.0, -4.0, -0.5])),
            // Each token is among those of its place.
            "top_logprobs": cut(json!([
                null,
                {"hello": -0.125, "\u{fffd}": -1.0, "h": -1.0},
                top(-2.0),
                top(-9_999.0),
                {"hello": -0.125, "\u{fffd}": -4.0, "!": -4.0},
                {"hello": -0.5},
            ])),
            "text_offset": cut(json!([0, 0, 1, 1, 2, 3])),
        });
        assert_eq!(choice["logprobs"], expect, "{prompt}");
        let text = ["h\u{e9}!", "h\u{e9}!hello"][max_tokens];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("length")));
        // In a stream the prompt comes first, with all that is said of it.
        body["stream"] = true.into();
        let answer = rig.post(COMPLETIONS, &completion(&body)).await;
        assert_eq!(streamed_text(&answer, 0), text);
        let events = answer.events();
        let first = &events[0]["choices"][0];
        assert_eq!(
            (&first["text"], first["logprobs"]["tokens"].as_array().map(Vec::len)),
            (&json!("h\u{e9}!"), Some(5))
        );
        let parts = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
        let whole = parts.map(|part| {
            let of = |event: &Value| event["choices"][0]["logprobs"][part].as_array().cloned().unwrap_or_default();
            (part.to_owned(), events.iter().flat_map(of).collect::<Value>())
        });
        assert_eq!(Value::Object(whole.into_iter().collect()), expect);
        let taken = rig.engine.taken.lock().expect("unpoisoned");
        assert!(taken.iter().all(|t| t.prompt_logprobs == Some(2) && t.max_new_tokens as usize == max_tokens));
        // The replica that cannot is not offered.
        let calls = rig.router.calls.lock().expect("unpoisoned");
        assert!(calls.iter().all(|(.., replicas)| replicas.id == [0, 1] && replicas.cached_tokens == [0, 0]));
    }
}

#[tokio::test]
async fn prompts_are_listed_as_vllm_lists_them() {
    // Others asked for, beside those of an echo, and what is said of the tokens after the first.
    let entry =
        |logprob: f32, rank: Option<u32>, said: &str| json!({"logprob": logprob, "rank": rank, "decoded_token": said});
    let (hello, byte) = (|| entry(-0.125, Some(1), "hello"), |logprob: f32| entry(logprob, Some(2), "\u{fffd}"));
    let after = |top: usize, token: u32, said: &str, logprob: f32| {
        let all = [("262".to_owned(), hello()), ("198".to_owned(), byte(logprob))];
        let mut all: serde_json::Map<String, Value> = all.into_iter().take(top).collect();
        let rank = (token == 198).then_some(2);
        all.entry(token.to_string()).or_insert_with(|| entry(logprob, rank, said));
        Value::Object(all)
    };
    for (echo, top, others) in [(false, 2, 2), (false, 1, 1), (false, 0, 0), (true, 1, 1), (true, 2, 2)] {
        let rig = Rig::new();
        rig.engine.play([Play::Now(with_scores(true))]);
        let mut body = json!({"prompt": "h\u{e9}!", "prompt_logprobs": top, "max_tokens": 1});
        if echo {
            body["echo"] = true.into();
            body["logprobs"] = 1.into();
        }
        let answer = rig.post(COMPLETIONS, &completion(&body)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let choice = &answer.json()["choices"][0];
        let expect = json!([
            null,
            after(others, 3 + 0x68, "h", -1.0),
            after(others, 198, "\u{fffd}", -2.0),
            after(others, 3 + 0xa9, "\u{fffd}", -9_999.0),
            after(others, 3 + 0x21, "!", -4.0),
        ]);
        assert_eq!(choice["prompt_logprobs"], expect, "{body}");
        assert_eq!(choice["text"], if echo { "h\u{e9}!hello" } else { "hello" });
        let told = &choice["logprobs"]["top_logprobs"];
        assert_eq!(told[1].as_object().map(serde_json::Map::len), echo.then_some(2), "{told}");
        assert_eq!(rig.engine.taken.lock().expect("unpoisoned")[0].prompt_logprobs, Some(top.max(u8::from(echo))));
    }
}

#[tokio::test]
async fn choices_of_a_prompt_share_what_is_said_of_it() {
    let first = with_scores(true);
    let second = [vec![first[0].clone()], first[2..].to_vec()].concat();
    for stream in [false, true] {
        // The second choice of each prompt has ended before that is scored.
        let rig = Rig::new();
        rig.engine.play([Play::Hold, Play::Now(second.clone()), Play::Hold, Play::Now(second.clone())]);
        let body = json!({"prompt": ["h\u{e9}!", "h\u{e9}!"], "echo": true, "logprobs": 2, "max_tokens": 1, "n": 2,
            "stream": stream});
        let mut call = Box::pin(rig.open(request("POST", COMPLETIONS, &[], &completion(&body))));
        while rig.engine.taken.lock().expect("unpoisoned").len() < 4 {
            assert!(futures_pending(&mut call).await);
        }
        let asked: Vec<_> =
            rig.engine.taken.lock().expect("unpoisoned").iter().map(|t| (t.id, t.prompt_logprobs)).collect();
        assert_eq!(asked.iter().map(|(_, top)| *top).collect::<Vec<_>>(), [Some(2), None, Some(2), None]);
        for (id, event) in [asked[0].0, asked[2].0].iter().flat_map(|id| first.iter().map(move |event| (*id, event))) {
            assert_eq!(rig.engine.push(id, event.clone()), SinkState::Open);
        }
        let answer = Answer::of(call.await).await;
        let events = if stream { answer.events() } else { vec![answer.json()] };
        for index in 0..4 {
            let choices = events.iter().filter_map(|event| event["choices"].as_array()).flatten();
            let own: Vec<_> = choices.filter(|choice| choice["index"] == index).collect();
            let all = |part: &str| -> Vec<Value> {
                own.iter().filter_map(|choice| choice["logprobs"][part].as_array()).flatten().cloned().collect()
            };
            assert_eq!(Value::from(all("token_logprobs")), json!([null, -1.0, -2.0, -9_999.0, -4.0, -0.5]), "{index}");
            assert_eq!(Value::from(all("text_offset")), json!([0, 0, 1, 1, 2, 3]), "{index}");
            let text: String = own.iter().filter_map(|choice| choice["text"].as_str()).collect();
            assert_eq!(text, "h\u{e9}!hello", "{index}");
        }
    }
}

#[tokio::test]
async fn what_is_said_of_prompts_is_bounded() {
    // Of five tokens, with two others for each: 416 bytes a token and choice, of which a MiB holds 504 times five.
    let rig =
        Rig::with(ServerConfig { prompt_scores_mib: 1, max_choices: 600, max_rows: 600, ..ServerConfig::default() });
    let body =
        |n: u32| completion(&json!({"prompt": "h\u{e9}!", "echo": true, "logprobs": 2, "max_tokens": 1, "n": n}));
    let large = rig.post(COMPLETIONS, &body(505)).await;
    assert_eq!((large.status, &large.json()["error"]["param"]), (400, &json!("logprobs")), "{}", large.body);
    assert!(large.body.contains("send fewer prompts in a request"), "{}", large.body);
    rig.engine.takes.store(true, std::sync::atomic::Ordering::Relaxed);
    rig.engine.play((0..400).map(|_| Play::Hold));
    let mut call = Box::pin(rig.open(request("POST", COMPLETIONS, &[], &body(400))));
    while rig.engine.taken.lock().expect("unpoisoned").len() < 400 {
        assert!(futures_pending(&mut call).await);
    }
    let full = rig.post(COMPLETIONS, &body(200)).await;
    assert_eq!((full.status, full.header("retry-after")), (429, "1"), "{}", full.body);
    drop(call);
    rig.engine.play([Play::Now(with_scores(true))]);
    assert_eq!(rig.post(COMPLETIONS, &body(1)).await.status, 200);
}

#[tokio::test]
async fn a_prompt_of_one_token_has_nothing_to_say() {
    for stream in [false, true] {
        let rig = Rig::new();
        let started = SinkEvent::Started { queued_us: 5, cached_tokens: 0 };
        rig.engine.play([Play::Now(vec![started, SinkEvent::Finished(FinishReason::Length)])]);
        let body = json!({"prompt": bytes("x"), "echo": true, "logprobs": 0, "max_tokens": 0, "stream": stream});
        let answer = rig.post(COMPLETIONS, &completion(&body)).await;
        let first = if stream { answer.events()[0].clone() } else { answer.json() };
        let expect = json!({"tokens": ["x"], "token_logprobs": [null], "top_logprobs": [null], "text_offset": [0]});
        assert_eq!((&first["choices"][0]["text"], &first["choices"][0]["logprobs"]), (&json!("x"), &expect));
    }
}

#[tokio::test]
async fn ndjson_says_how_likely_a_prompt_is() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(with_scores(true))]);
    let headers = [("content-type", "application/json"), ("accept", "application/x-ndjson")];
    let body = completion(&json!({"prompt": "h\u{e9}!", "echo": true, "logprobs": 2, "max_tokens": 1}));
    let lines = rig.send(request("POST", COMPLETIONS, &headers, &body)).await.lines();
    let prompt = lines.iter().find(|line| line["event"] == "prompt").expect("a line");
    assert_eq!((&prompt["logprobs"], &prompt["stage"]), (&json!([-1.0, -2.0, null, -4.0]), &json!("prefill")));
    // A line has no place for all that this asks for.
    let body = completion(&json!({"prompt": "h\u{e9}!", "prompt_logprobs": 2}));
    let answer = rig.send(request("POST", COMPLETIONS, &headers, &body)).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("prompt_logprobs")));
}

fn with_logprobs() -> Vec<SinkEvent> {
    let logprobs = TokenLogprobs { chosen: -0.5, top: vec![(262, -0.5), (9_000, f32::NEG_INFINITY)] };
    vec![
        SinkEvent::Token { token: 262, logprobs: Some(Box::new(logprobs.clone())), drafted: Drafted::default() },
        SinkEvent::Token { token: 262, logprobs: Some(Box::new(logprobs)), drafted: Drafted::default() },
        SinkEvent::Finished(FinishReason::Length),
    ]
}

#[tokio::test]
async fn logprobs_have_the_shape_of_their_route() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(with_logprobs()), Play::Now(with_logprobs()), Play::Now(with_logprobs())]);
    let answer = rig.post(CHAT, &chat(&json!({"logprobs": true, "top_logprobs": 2}))).await.json();
    let entry = json!({"token": "hello", "logprob": -0.5, "bytes": [104, 101, 108, 108, 111], "top_logprobs": [
        {"token": "hello", "logprob": -0.5, "bytes": [104, 101, 108, 108, 111]},
        {"token": "", "logprob": -9_999.0, "bytes": []}]});
    assert_eq!(answer["choices"][0]["logprobs"]["content"], json!([entry, entry]));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let answer = rig.post(CHAT, &chat(&json!({"logprobs": true, "top_logprobs": 2, "stream": true}))).await;
    assert_eq!(answer.events()[1]["choices"][0]["logprobs"]["content"], json!([entry]));
    let answer = rig.post(COMPLETIONS, &completion(&json!({"logprobs": 2}))).await.json();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!((&logprobs["tokens"], &logprobs["text_offset"]), (&json!(["hello", "hello"]), &json!([0, 5])));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5]));
}

#[tokio::test]
async fn what_fails_before_the_first_token_has_a_status() {
    let failed = |failure: Failure| vec![SinkEvent::Failed(failure)];
    let started = |event| vec![SinkEvent::Started { queued_us: 1, cached_tokens: 0 }, event];
    for (events, status, code) in [
        (failed(ResourceExhausted::Queue { waiting: 4, limit: 4 }.into()), 429, "saturated"),
        (failed(ResourceExhausted::KvPool { needed: 9, total: 8 }.into()), 429, "resource_exhausted"),
        (failed(ResourceExhausted::Context { tokens: 99, limit: 64 }.into()), 400, "context_length_exceeded"),
        (failed(Failure::Engine("secret detail".into())), 500, "engine_fault"),
        (started(SinkEvent::Cancelled(CancelCause::Deadline)), 504, "deadline_exceeded"),
        (started(SinkEvent::Cancelled(CancelCause::Asked)), 499, "cancelled"),
        (started(SinkEvent::Cancelled(CancelCause::Shutdown)), 503, "draining"),
        (started(SinkEvent::Cancelled(CancelCause::Unloaded)), 503, "unloaded"),
        (vec![], 503, "no_replica"),
    ] {
        for stream in [false, true] {
            let rig = Rig::new();
            rig.engine.play([Play::Now(events.clone())]);
            let answer = rig.post(CHAT, &chat(&json!({"stream": stream}))).await;
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)), "{events:?}");
            assert!(!answer.body.contains("secret"), "{}", answer.body);
            assert_eq!(rig.state.in_flight(), 0);
        }
    }
}

#[tokio::test]
async fn an_error_after_the_first_byte_is_one_frame() {
    let rig = Rig::new();
    rig.engine.play([Play::Now(vec![token(262), SinkEvent::Failed(Failure::Engine("boom".into()))])]);
    let answer = rig.post(CHAT, &chat(&json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(streamed_text(&answer, 0), "hello");
    assert_eq!(events.last().expect("a frame")["error"]["code"], "engine_fault");
    assert!(!answer.body.contains("[DONE]"));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_at_once() {
    for stream in [false, true] {
        let rig = Rig::new();
        rig.engine.play([Play::Hold]);
        let call = rig.open(request("POST", CHAT, &[], &chat(&json!({"stream": stream}))));
        let mut call = Box::pin(call);
        assert!(futures_pending(&mut call).await, "the engine has said nothing yet");
        assert_eq!(rig.state.in_flight(), 1);
        drop(call);
        assert_eq!(rig.engine.cancels.lock().expect("unpoisoned")[0].2, CancelCause::ClientGone);
        assert_eq!(rig.state.in_flight(), 0);
        assert_eq!(rig.engine.push(rig.engine.last_id(), token(5)), SinkState::Closed);
    }
}

#[tokio::test]
async fn a_stream_that_is_dropped_half_way_cancels_at_once() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold]);
    let mut call = Box::pin(rig.open(request("POST", CHAT, &[], &chat(&json!({"stream": true})))));
    assert!(futures_pending(&mut call).await);
    assert_eq!(rig.engine.push(rig.engine.last_id(), token(262)), SinkState::Open);
    let response = call.await;
    assert_eq!((response.status().as_u16(), rig.state.in_flight()), (200, 1));
    drop(response);
    assert_eq!(rig.engine.cancels.lock().expect("unpoisoned")[0].2, CancelCause::ClientGone);
    assert_eq!(rig.state.in_flight(), 0);
    assert!(rig.state.scrape().windows(20).any(|w| w == b"finished_reason=\"abo"), "counted as aborted");
}

#[tokio::test]
async fn a_slow_client_costs_its_own_request() {
    let rig = Rig::with(ServerConfig { sink_events: 3, ..ServerConfig::default() });
    rig.engine.play([Play::Hold]);
    let mut call = Box::pin(rig.open(request("POST", CHAT, &[], &chat(&json!({"stream": true})))));
    assert!(futures_pending(&mut call).await);
    let id = rig.engine.last_id();
    assert_eq!(rig.engine.push(id, token(262)), SinkState::Open);
    let response = call.await;
    // The first token left the channel; three more fit, the next does not.
    let states: Vec<SinkState> = (0..4).map(|_| rig.engine.push(id, token(262))).collect();
    assert_eq!(states, [SinkState::Open, SinkState::Open, SinkState::Open, SinkState::Closed]);
    rig.engine.forget(id);
    let answer = Answer::of(response).await;
    assert_eq!(streamed_text(&answer, 0), "hello".repeat(4));
    assert_eq!(answer.events().last().expect("a frame")["error"]["code"], "client_too_slow");
}

#[tokio::test]
async fn a_client_that_stops_reading_gives_its_place_back() {
    // More than the socket buffers of both sides hold, so that the connection must wait for the client.
    const TOKENS: usize = 200_000;
    let rig = Rig::with(ServerConfig { sink_events: TOKENS + 2, write_timeout_ms: 100, ..ServerConfig::default() });
    rig.engine.play([Play::Now(says(&["x".repeat(TOKENS).as_str()]))]);
    let bound = || tokio::net::TcpListener::bind("127.0.0.1:0");
    let listeners =
        Listeners { data: bound().await.expect("a port").into(), admin: bound().await.expect("a port").into() };
    let at = listeners.data.socket.local_addr().expect("bound");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let body = chat(&json!({"stream": true}));
    let client = async {
        let client = tokio::net::TcpStream::connect(at).await.expect("it listens");
        let length = body.len();
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}");
        client.writable().await.expect("a connection");
        client.try_write(format!("{head}\r\n\r\n{body}").as_bytes()).expect("room for a small request");
        client.readable().await.expect("an answer");
        let mut first = [0; 12];
        client.try_read(&mut first).expect("an answer");
        assert_eq!(&first, b"HTTP/1.1 200");
        rig.state.admission.empty().await;
        stop.send(()).expect("it serves");
        client
    };
    let serving = serve(listeners, Arc::clone(&rig.state), async { drop(stopped.await) });
    let (served, _client) = tokio::join!(serving, client);
    served.expect("a good end");
}

#[tokio::test]
async fn a_request_can_be_cancelled_by_its_id() {
    let rig = Rig::new();
    rig.engine.play([Play::Hold]);
    let tagged = [("x-request-id", "mine")];
    let mut call = Box::pin(rig.open(request("POST", CHAT, &tagged, &chat(&json!({})))));
    assert!(futures_pending(&mut call).await);
    let again = rig.send(request("POST", CHAT, &tagged, &chat(&json!({})))).await;
    assert_eq!((again.status, again.header("x-should-retry")), (409, "false"));
    for (method, path, status) in [
        ("POST", "/v1/requests/other/cancel", 404),
        ("POST", "/v1/requests/mine/cancel", 200),
        ("DELETE", "/v1/requests/mine", 200),
    ] {
        assert_eq!(rig.send(request(method, path, &[], "")).await.status, status, "{method} {path}");
    }
    assert_eq!(rig.engine.cancels.lock().expect("unpoisoned").len(), 2);
    rig.engine.push(rig.engine.last_id(), SinkEvent::Cancelled(CancelCause::Asked));
    let answer = Answer::of(call.await).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (499, "mine"));
    assert_eq!(rig.send(request("DELETE", "/v1/requests/mine", &[], "")).await.status, 404, "it is over");
}

#[tokio::test]
async fn a_deadline_holds_even_when_the_engine_is_silent() {
    for stream in [false, true] {
        let rig = Rig::new();
        rig.engine.play([Play::Hold]);
        let answer = rig.post(CHAT, &chat(&json!({"timeout_ms": 2, "stream": stream}))).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("deadline_exceeded")));
        assert_eq!(rig.engine.cancels.lock().expect("unpoisoned")[0].2, CancelCause::Deadline);
        assert_eq!(rig.engine.taken.lock().expect("unpoisoned")[0].deadline, 2_001);
    }
}

#[tokio::test]
async fn latencies_are_observed() {
    let rig = Rig::new();
    rig.post(CHAT, &chat(&json!({}))).await;
    let text = String::from_utf8(rig.state.scrape().to_vec()).expect("UTF-8");
    for line in [
        "vllm:time_to_first_token_seconds_count{model_name=\"m:a\"} 1",
        "vllm:inter_token_latency_seconds_count{model_name=\"m:a\"} 4",
        "vllm:e2e_request_latency_seconds_count{model_name=\"m:a\"} 1",
        "vllm:request_queue_time_seconds_count{model_name=\"m:a\"} 1",
        "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m:a\"} 1",
        "vllm:request_success_total{finished_reason=\"abort\",model_name=\"m:a\"} 0",
    ] {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
}

/// Polls once; whether it is still pending.
async fn futures_pending<F: Future<Output = axum::http::Response<Body>> + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
}

#[tokio::test]
async fn forced_calls_are_answered_whole_and_in_parts() {
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object",
        "properties": {"city": {"type": "string"}}}}}]);
    let arguments = r#"{"city": "Ulm"}"#;
    let list = format!(r#"[{{"name": "weather", "arguments": {arguments}}}]"#);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, said, reason) in [(json!("required"), &*list, "tool_calls"), (named, arguments, "stop")] {
        let rig = Rig::new();
        rig.engine.play([Play::Now(says(&[said])), Play::Now(says(&[said]))]);
        let body = json!({"tools": tools, "tool_choice": choice});
        let answer = rig.post(CHAT, &chat(&body)).await;
        let whole = &answer.json()["choices"][0];
        let call = &whole["message"]["tool_calls"][0];
        let function = json!({"name": "weather", "arguments": arguments});
        assert_eq!(
            (&whole["finish_reason"], &whole["message"]["content"]),
            (&json!(reason), &Value::Null),
            "{answer:?}"
        );
        assert_eq!((&call["type"], &call["function"]), (&json!("function"), &function));
        let id = call["id"].as_str().expect("an identity");
        assert!(id.starts_with("call_") && call.get("index").is_none(), "{call}");

        let answer = rig
            .post(
                CHAT,
                &merged(
                    body,
                    &json!({"model": "m", "stream": true,
            "messages": [{"role": "user", "content": "hi"}]}),
                ),
            )
            .await;
        let deltas: Vec<Value> = answer.events().iter().map(|event| event["choices"][0].clone()).collect();
        assert_eq!(deltas[0]["delta"], json!({"role": "assistant", "content": ""}));
        let calls: Vec<&Value> = deltas.iter().filter_map(|delta| delta["delta"]["tool_calls"].get(0)).collect();
        assert_eq!((&calls[0]["index"], &calls[0]["type"]), (&json!(0), &json!("function")));
        assert_eq!(calls[0]["function"], json!({"name": "weather", "arguments": ""}));
        assert!(calls[1..].iter().all(|call| call.get("id").is_none() && call["index"] == 0), "{calls:?}");
        let streamed: String = calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
        assert_eq!((&*streamed, streamed_text(&answer, 0).as_str()), (arguments, ""));
        let reasons: Vec<&str> = deltas.iter().filter_map(|delta| delta["finish_reason"].as_str()).collect();
        assert_eq!(reasons, [reason]);
    }
}
