//! Upstreams of a running host: another Pointsman in a process of its own, and small servers that do what servers should not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::host;

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

const CHUNK: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"}}]}\n\n";

/// How a small server treats a request.
#[derive(Clone, Copy)]
enum Manner {
    /// Says nothing.
    Hangs,
    /// Half a head, and nothing more.
    SlowHead,
    /// Closes the connection once it has the request.
    Resets,
    /// Says this, and closes.
    Says(&'static str),
    /// Begins an answer and waits.
    Begins,
    /// Begins an answer and closes the connection.
    Dies,
    /// Answers one request, and closes the connection at the next one.
    Once,
}

/// A server of one manner; its URL, and word of each connection that the other side has closed.
fn server(manner: Manner) -> (String, Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let (closed, heard) = channel();
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let closed = closed.clone();
            std::thread::spawn(move || serve(connection, manner, &closed));
        }
    });
    (url, heard)
}

fn serve(mut connection: TcpStream, manner: Manner, closed: &Sender<()>) {
    let mut reader = BufReader::new(connection.try_clone().expect("a socket"));
    let mut length = 0;
    for line in reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a number");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let begin = || {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        format!("{head}{:x}\r\n{CHUNK}\r\n", CHUNK.len())
    };
    let text = match manner {
        Manner::Hangs => String::new(),
        Manner::SlowHead => "HTTP/1.1 200 OK\r\ncontent-type: text/ev".to_owned(),
        Manner::Resets => return,
        Manner::Says(answer) => answer.to_owned(),
        Manner::Begins | Manner::Dies => begin(),
        Manner::Once => full("200 OK", "text/event-stream", &format!("{CHUNK}data: [DONE]\n\n")),
    };
    // It may have heard enough.
    let _ = connection.write_all(text.as_bytes());
    if !matches!(manner, Manner::Says(_) | Manner::Dies) {
        // Until the other side closes, or asks again.
        let _ = reader.read(&mut [0]);
        let _ = closed.send(());
    }
}

fn full(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nretry-after: 7\r\n\r\n{body}")
}

/// A host of nothing but upstreams: name, URL and further lines of each. The first of a model is drained, so that the others
/// are asked before it.
fn near(upstreams: &[(&str, &str, String)]) -> Host {
    let mut config = "[engine]\ndemo = false\n[slots.router]\ncomponent = \"native\"\n".to_owned();
    for (name, url, lines) in upstreams {
        write!(config, "[upstreams.{name}]\nurl = \"{url}\"\n{lines}\n").expect("it grows");
    }
    Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config)
}

fn chat(model: &str) -> Value {
    let messages = json!([{ "role": "user", "content": "What is ownership?" }]);
    json!({ "model": model, "messages": messages, "max_tokens": 12, "temperature": 0 })
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn post(host: &Host, id: &str, body: &Value) -> Answer {
    let headers = [("content-type", "application/json"), ("x-request-id", id)];
    host.send("POST", &format!("{}/v1/chat/completions", host.data), &headers, body.to_string().as_bytes())
}

/// The payloads of a stream.
fn events(answer: &Answer) -> Vec<Value> {
    let text = answer.body.as_str().unwrap_or_default();
    let payload =
        |line: &str| line.strip_prefix("data: ").map(|data| serde_json::from_str(data).unwrap_or(data.into()));
    text.lines().filter_map(payload).collect()
}

/// A member of an answer without what depends on who asked before.
fn uncached(member: &Value) -> Value {
    let mut member = member.clone();
    for details in ["prompt_tokens_details", "input_tokens_details"] {
        if let Some(details) = member.get_mut(details) {
            *details = Value::Null;
        }
    }
    member
}

/// Values of the upstreams' metrics by series, once one of them is what it must be: they are rendered now and then.
fn metrics(host: &Host, series: &str, expect: f64) -> BTreeMap<String, f64> {
    let mut metrics = BTreeMap::new();
    for _ in 0..10_000 {
        let text = host.get("/metrics").body;
        let lines = text.as_str().expect("text").lines().filter_map(|line| line.strip_prefix("pointsman_upstream_"));
        let values = lines.filter_map(|line| line.rsplit_once(' '));
        metrics = values.map(|(s, n)| (s.to_owned(), n.parse().expect("a number"))).collect();
        if metrics.get(series) == Some(&expect) {
            return metrics;
        }
    }
    panic!("{series} is not {expect}: {metrics:?}");
}

#[test]
fn another_host_answers_as_if_it_were_here() {
    let far = host(&[]);
    let lines = "model = \"demo\"\nupstream_model = \"demo:f16\"\nconnections = 3\nprobe_interval_ms = 20\nmetrics_path = \"/metrics\"".to_owned();
    let near = near(&[("east", &format!("{}/v1", far.data), lines)]);
    let (there, here) = (far.post("/v1/chat/completions", &chat("demo:f16")), post(&near, "one", &chat("demo")));
    assert_eq!((here.status, header(&here, "x-pointsman-replica")), (200, "demo:remote@east"), "{here:?}");
    assert_eq!(header(&here, "x-pointsman-variant"), "demo:remote");
    for member in ["choices", "usage", "object"] {
        assert_eq!(uncached(&here.body[member]), uncached(&there.body[member]), "{member}");
    }
    assert_eq!((&here.body["id"], &here.body["model"]), (&json!("one"), &json!("demo:remote")));

    let mut body = chat("demo");
    body["stream"] = true.into();
    let plain = events(&post(&near, "two", &body));
    assert!(plain.iter().rev().skip(1).all(|chunk| chunk["id"] == "two" && chunk["usage"].is_null()), "{plain:?}");
    let text: String = plain.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(
        (json!(text), plain.last()),
        (here.body["choices"][0]["message"]["content"].clone(), Some(&json!("[DONE]")))
    );
    body["stream_options"] = json!({ "include_usage": true });
    let counted = events(&post(&near, "three", &body));
    assert_eq!(counted[counted.len() - 2]["usage"]["completion_tokens"], here.body["usage"]["completion_tokens"]);

    let body = json!({ "model": "demo:remote", "prompt": "Rust is", "max_tokens": 8, "temperature": 0, "n": 2, "logprobs": 1 });
    let there = far.post(
        "/v1/completions",
        &json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 8, "temperature": 0, "n": 2, "logprobs": 1 }),
    );
    let here = near.post("/v1/completions", &body);
    assert_eq!((here.status, &here.body["choices"]), (200, &there.body["choices"]), "{here:?}");
    for (path, member, mut body) in [
        ("/v1/messages", "content", json!({ "max_tokens": 12, "messages": chat("")["messages"] })),
        ("/v1/responses", "usage", json!({ "max_output_tokens": 16, "input": "What is ownership?" })),
    ] {
        body["temperature"] = 0.into();
        body["model"] = "demo:f16".into();
        let there = far.post(path, &body);
        body["model"] = "demo:remote".into();
        let here = near.post(path, &body);
        assert_eq!((here.status, uncached(&here.body[member])), (200, uncached(&there.body[member])), "{here:?}");
    }
    let ids = near.post("/v1/completions", &json!({ "model": "demo", "prompt": [1, 2, 3] }));
    assert_eq!(ids.status, 400, "{ids:?}");
    assert!(ids.body["error"]["message"].as_str().is_some_and(|m| m.contains("served by upstreams alone")), "{ids:?}");

    let why = near.admin("GET", "/admin/v1/requests/one", &Value::Null).body;
    assert_eq!(why["decision"]["rows"], json!(["demo:remote@east"]), "{why}");
    assert_eq!(why["decision"]["replicas"]["kind"], json!([1]), "{why}");
    let tried = (&why["upstreams"][0]["replica"], &why["upstreams"][0]["outcome"], &why["state"]);
    assert_eq!(tried, (&json!("demo:remote@east"), &json!("answered"), &json!("finished")), "{why}");
    assert!(far.admin("GET", "/admin/v1/requests/one", &Value::Null).status == 200, "it has the same id there");
    let listed = || near.admin("GET", "/admin/v1/devices", &Value::Null).body.to_string();
    let read = (0..10_000).any(|_| listed().contains(r#""kv_blocks":1000"#));
    assert!(read, "the other host's own load is shown: {}", listed());
    let devices = listed();
    assert!(devices.contains("demo:remote@east") && devices.contains("upstream at http://"), "{devices}");
    let models = near.get("/v1/models").body.to_string();
    assert!(models.contains(r#""id":"demo""#) && models.contains(r#""id":"demo:remote""#), "{models}");
}

#[test]
fn connections_are_opened_at_the_start_and_used_again() {
    let far = Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), &[("ENGINE__DEVICES", "[\"null\"]")]);
    let lines = "model = \"demo\"\nupstream_model = \"demo:f16\"\nconnections = 4\nprobe_interval_ms = 0".to_owned();
    let near = near(&[("east", &far.data, lines)]);
    let (threads, each) = (4, 50);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let near = &near;
            scope.spawn(move || {
                for n in 0..each {
                    let mut body = chat("demo");
                    body["stream"] = (n % 2 == 0).into();
                    let answer = post(near, &format!("{thread}-{n}"), &body);
                    assert_eq!(answer.status, 200, "{answer:?}");
                }
            });
        }
    });
    let metrics = metrics(&near, "requests_total{outcome=\"answered\",upstream=\"east\"}", f64::from(threads * each));
    let of = |series: &str| metrics[series];
    let (opened, reused) =
        (of("connections_opened_total{upstream=\"east\"}"), of("connections_reused_total{upstream=\"east\"}"));
    let carried = f64::from(threads * each) + of("probes_total{outcome=\"good\",upstream=\"east\"}");
    assert!((4.0..=10.0).contains(&opened), "{metrics:?}");
    assert!(reused / carried >= 0.95, "{reused} of {carried}, {opened} opened");
    assert_eq!(of("in_flight{upstream=\"east\"}"), 0.0);
    assert!(of("connections{upstream=\"east\"}") <= opened);
}

#[test]
fn who_fails_before_the_first_byte_is_followed_by_another() {
    let far = Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), &[("ENGINE__DEVICES", "[\"null\"]")]);
    let said = |status: &str, kind: &str, body: &str| -> &'static str { full(status, kind, body).leak() };
    let error = said("500 Oh", "application/json", r#"{"error":{"message":"out of memory"}}"#);
    let busy = said("429 Busy", "application/json", r#"{"error":{"message":"busy"}}"#);
    let garbage = said("200 OK", "text/event-stream", "data: <html>\n\n");
    let page = said("200 OK", "text/html", "<html></html>");
    let own = said("200 OK", "text/event-stream", "data: {\"error\":{\"message\":\"no blocks\"}}\n\n");
    let huge = full("200 OK", "text/event-stream", &"x".repeat(1_100_000)).leak();
    let long_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1_000_000)).leak();
    let nonsense = "250 smtp.example.com ready\r\n";
    let refused = said("400 No", "application/json", r#"{"error":{"message":"too long for it"}}"#);
    let cases = [
        ("hangs", Manner::Hangs, "timeout", "did not begin to answer within 300 ms"),
        ("slow-head", Manner::SlowHead, "timeout", "did not begin to answer within 300 ms"),
        ("resets", Manner::Resets, "broken", "closed the connection before"),
        ("error", Manner::Says(error), "failed", "answered 500: out of memory"),
        ("busy", Manner::Says(busy), "saturated", "answered 429: busy"),
        ("garbage", Manner::Says(garbage), "garbled", "answered with `<html>`"),
        ("page", Manner::Says(page), "garbled", "answered with content of type `text/html`"),
        ("own", Manner::Says(own), "failed", "failed: no blocks"),
        ("huge", Manner::Says(huge), "garbled", "more than 1048576 bytes in one event"),
        ("long-head", Manner::Says(long_head), "garbled", "a head that is too large"),
        ("nonsense", Manner::Says(nonsense), "garbled", "something else than HTTP"),
        ("refused", Manner::Says(refused), "refused", "answered 400: too long for it"),
    ];
    let bad = "first_byte_timeout_ms = 300\nconnections = 0\nprobe_interval_ms = 0";
    let mut upstreams =
        vec![("nobody".to_owned(), "http://127.0.0.1:1".to_owned(), format!("model = \"nobody\"\n{bad}"))];
    for (name, manner, ..) in cases {
        upstreams.push((name.to_owned(), server(manner).0, format!("model = \"{name}\"\n{bad}")));
    }
    for name in cases.iter().map(|(name, ..)| *name).chain(["nobody"]) {
        let lines =
            format!("model = \"{name}\"\nupstream_model = \"demo:f16\"\nconnections = 0\nprobe_interval_ms = 0");
        let drained = format!("{lines}\n[replicas.\"{name}:remote@good-{name}\"]\nweight = 0");
        upstreams.push((format!("good-{name}"), far.data.clone(), drained));
    }
    let upstreams: Vec<_> = upstreams.iter().map(|(name, url, lines)| (&**name, &**url, lines.clone())).collect();
    let near = near(&upstreams);
    let nobody = ("nobody", Manner::Hangs, "unreachable", "cannot be reached");
    for (name, _, outcome, expect) in cases.into_iter().chain([nobody]) {
        let answer = post(&near, name, &chat(name));
        let why = near.admin("GET", &format!("/admin/v1/requests/{name}"), &Value::Null).body;
        let first = &why["upstreams"][0];
        assert_eq!(first["replica"], format!("{name}:remote@{name}"), "{why}");
        assert!(first["outcome"].as_str().is_some_and(|said| said.contains(expect)), "{name}: {first}");
        let counted = metrics(&near, &format!("requests_total{{outcome=\"{outcome}\",upstream=\"{name}\"}}"), 1.0);
        if name == "refused" {
            assert_eq!((answer.status, why["upstreams"].as_array().map(Vec::len)), (400, Some(1)), "{answer:?}");
            assert_eq!(answer.body["error"]["code"], "refused_by_upstream", "{answer:?}");
            continue;
        }
        assert_eq!(header(&answer, "x-pointsman-replica"), format!("{name}:remote@good-{name}"), "{answer:?}");
        assert_eq!((answer.status, &why["upstreams"][1]["outcome"]), (200, &json!("answered")), "{why}");
        assert_eq!(counted.get(&format!("retries_total{{upstream=\"{name}\"}}")), Some(&1.0), "{counted:?}");
    }
    let pinned = post(&near, "pinned", &chat("busy:remote"));
    assert_eq!(pinned.status, 200, "a variant has all of its replicas: {pinned:?}");
}

#[test]
fn a_kept_connection_that_was_closed_is_replaced() {
    let (url, closed) = server(Manner::Once);
    let near = near(&[("once", &url, "model = \"once\"\nconnections = 0\nprobe_interval_ms = 0".to_owned())]);
    for n in 0..3 {
        let answer = post(&near, &format!("{n}"), &chat("once"));
        assert_eq!(
            (answer.status, &answer.body["choices"][0]["message"]["content"]),
            (200, &json!("half")),
            "{answer:?}"
        );
    }
    for _ in 0..2 {
        closed.recv_timeout(PATIENCE).expect("it closed the kept ones itself");
    }
    let metrics = metrics(&near, "requests_total{outcome=\"answered\",upstream=\"once\"}", 3.0);
    assert_eq!(metrics["connections_opened_total{upstream=\"once\"}"], 3.0, "{metrics:?}");
    assert_eq!(metrics["retries_total{upstream=\"once\"}"], 0.0, "{metrics:?}");
}

#[test]
fn what_fails_alone_is_told_and_then_left_alone() {
    let (dies, _) = server(Manner::Dies);
    let (resets, _) = server(Manner::Resets);
    let line = |model: &str| format!("model = \"{model}\"\nconnections = 0\nprobe_interval_ms = 0");
    let near = near(&[("dies", &dies, line("dies")), ("resets", &resets, line("resets"))]);
    let whole = post(&near, "whole", &chat("dies"));
    assert_eq!((whole.status, &whole.body["error"]["code"]), (502, &json!("upstream_failed")), "{whole:?}");
    let mut body = chat("dies");
    body["stream"] = true.into();
    let events = events(&post(&near, "streamed", &body));
    assert_eq!(events[0]["choices"][0]["delta"]["content"], "half", "{events:?}");
    let message = events[1]["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("the upstream `dies` closed the connection before") && events.len() == 2, "{events:?}");
    for n in 0..3 {
        let answer = post(&near, &format!("{n}"), &chat("resets"));
        assert_eq!((answer.status, &answer.body["error"]["code"]), (502, &json!("upstream_failed")), "{answer:?}");
    }
    let answer = post(&near, "open", &chat("resets"));
    assert_eq!((answer.status, &answer.body["error"]["code"]), (503, &json!("no_replica")), "{answer:?}");
    let metrics = metrics(&near, "up{upstream=\"resets\"}", 0.0);
    assert_eq!(metrics["up{upstream=\"dies\"}"], 1.0, "{metrics:?}");
}

/// Begins a stream and returns when its first chunk is there.
fn begin(host: &Host, id: &str, body: &Value) -> BufReader<TcpStream> {
    let address = host.data.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("the host listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let body = body.to_string();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\nx-request-id: {id}\r\n");
    let request = format!("{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).expect("it is taken");
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.contains("half") {
        line.clear();
        assert!(reader.read_line(&mut line).expect("an answer") > 0, "it ended before its first chunk");
    }
    reader
}

#[test]
fn whoever_ends_it_here_ends_it_there() {
    let (url, closed) = server(Manner::Begins);
    let (hangs, waiting) = server(Manner::Hangs);
    let line = |model: &str| format!("model = \"{model}\"\nconnections = 0\nprobe_interval_ms = 0");
    let near = near(&[("begins", &url, line("begins")), ("hangs", &hangs, line("hangs"))]);
    let mut body = chat("begins");
    body["stream"] = true.into();
    let rest = |mut reader: BufReader<TcpStream>| {
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("the rest");
        text
    };

    drop(begin(&near, "gone", &body));
    closed.recv_timeout(PATIENCE).expect("the client went away");

    let reader = begin(&near, "cancelled", &body);
    let url = format!("{}/v1/requests/cancelled", near.data);
    assert_eq!(near.send("DELETE", &url, &[], b"").status, 200);
    closed.recv_timeout(PATIENCE).expect("it was cancelled");
    assert!(rest(reader).contains("the request was cancelled"));

    body["timeout_ms"] = 200.into();
    let reader = begin(&near, "late", &body);
    closed.recv_timeout(PATIENCE).expect("its deadline has passed");
    assert!(rest(reader).contains("the deadline of 200 ms has passed"));

    let mut body = chat("hangs");
    body["timeout_ms"] = 200.into();
    assert_eq!(post(&near, "unanswered", &body).status, 504);
    waiting.recv_timeout(PATIENCE).expect("nobody waits for it");
    for (id, state) in
        [("gone", "cancelled"), ("cancelled", "cancelled"), ("late", "cancelled"), ("unanswered", "cancelled")]
    {
        let why = near.admin("GET", &format!("/admin/v1/requests/{id}"), &Value::Null).body;
        assert_eq!(why["state"], state, "{why}");
    }
    let metrics = metrics(&near, "requests_total{outcome=\"cancelled\",upstream=\"begins\"}", 3.0);
    assert_eq!((metrics["in_flight{upstream=\"begins\"}"], metrics["connections{upstream=\"begins\"}"]), (0.0, 0.0));
}

/// The example of docs/upstreams.md.
#[test]
fn a_router_keeps_requests_here_until_the_queues_are_long() {
    let far = Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), &[("ENGINE__DEVICES", "[\"null\"]")]);
    let config = format!(
        "[engine]\ndevices = [\"null:50000\"]\n[sched]\nmax_running = 1\n\
         [upstreams.east]\nurl = \"{}\"\nmodel = \"demo\"\n\
         [slots.router]\ncomponent = \"route-device-affinity\"\nconfig = {{ prefer = [\"null\"], max_waiting = 1 }}\n",
        far.data
    );
    let near = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config);
    let ask = |id: &str| {
        let mut body = chat("demo");
        body["max_tokens"] = 1.into();
        header(&post(&near, id, &body), "x-pointsman-replica").to_owned()
    };
    let first = ask("first");
    assert!(first.ends_with("@null"), "{first}");
    let variants = ["demo:f16", "demo:q8_0"];
    std::thread::scope(|scope| {
        for (variant, n) in variants.into_iter().flat_map(|variant| [(variant, 1), (variant, 2)]) {
            let near = &near;
            let mut body = chat(variant);
            body["max_tokens"] = 1_000.into();
            scope.spawn(move || post(near, &format!("{variant}-{n}"), &body));
        }
        // Each replica runs one and has one waiting.
        let busy = || {
            let devices = near.admin("GET", "/admin/v1/devices", &Value::Null).body;
            let replicas = devices["data"][0]["replicas"].as_array().cloned().unwrap_or_default();
            let of_demo = replicas.iter().filter(|r| variants.iter().any(|variant| r["variant"] == *variant));
            of_demo.filter(|r| r["running"] == 1 && r["waiting"] == 1).count() == 2
        };
        let is_busy = (0..100_000).any(|_| busy());
        let then = is_busy.then(|| ask("then"));
        for (variant, n) in variants.into_iter().flat_map(|variant| [(variant, 1), (variant, 2)]) {
            let url = format!("{}/v1/requests/{variant}-{n}", near.data);
            assert_eq!(near.send("DELETE", &url, &[], b"").status, 200);
        }
        assert_eq!(then.as_deref(), Some("demo:remote@east"));
    });
}
