//! Upstreams of a running host: another Pointsman in a process of its own, and small servers that do what servers should not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use pointsman_tests::{Answer, Host, looks, root};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::host;
use crate::wires::{Manner, Wire, server};

/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A host with no model to wait for, over one wire, and the folder of its certificate.
fn far(wire: Wire) -> (Host, TempDir) {
    let mut config = "[engine]\ndevices = [\"null\"]\n".to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    if wire == Wire::Tls {
        let pem = folder.path().join("host.pem");
        std::fs::copy(root().join("tests/e2e/registry.pem"), &pem).expect("a certificate");
        std::fs::set_permissions(&pem, std::fs::Permissions::from_mode(0o600)).expect("a file of ours");
        write!(config, "[server.tls]\ncert_file = {pem:?}\nkey_file = {pem:?}\n").expect("it grows");
    }
    (Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config), folder)
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
    for _ in looks() {
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
    let read = looks().any(|_| listed().contains(r#""kv_blocks":1000"#));
    assert!(read, "the other host's own load is shown: {}", listed());
    let devices = listed();
    assert!(devices.contains("demo:remote@east") && devices.contains("upstream at http://"), "{devices}");
    let models = near.get("/v1/models").body.to_string();
    assert!(models.contains(r#""id":"demo""#) && models.contains(r#""id":"demo:remote""#), "{models}");
}

#[test]
fn connections_are_opened_at_the_start_and_used_again() {
    for wire in Wire::ALL {
        let (far, _folder) = far(wire);
        let lines = "model = \"demo\"\nupstream_model = \"demo:f16\"\nconnections = 4\nprobe_interval_ms = 0\n";
        let near = near(&[("east", &far.data, format!("{lines}{}", wire.lines()))]);
        let opened = "connections_opened_total{upstream=\"east\"}";
        assert_eq!(metrics(&near, opened, 4.0)["connections{upstream=\"east\"}"], 4.0, "{wire:?}: before any request");
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
        let series = "requests_total{outcome=\"answered\",upstream=\"east\"}";
        let metrics = metrics(&near, series, f64::from(threads * each));
        let (reused, n_opened) = (metrics["connections_reused_total{upstream=\"east\"}"], metrics[opened]);
        let carried = f64::from(threads * each) + 4.0;
        println!("{wire:?}: {reused} of {carried} requests on a connection that had carried one, {n_opened} opened");
        // HTTP/2 has its four; a connection of HTTP/1.1 may be late back in the pool.
        let most = if wire == Wire::Http1 { 10.0 } else { 4.0 };
        assert!(n_opened <= most && reused / carried >= 0.95, "{wire:?}: {metrics:?}");
        assert_eq!(metrics["in_flight{upstream=\"east\"}"], 0.0);
        assert!(metrics["connections{upstream=\"east\"}"] <= n_opened);
    }
}

#[test]
fn who_fails_before_the_first_byte_is_followed_by_another() {
    let (far, _folder) = far(Wire::Http1);
    Wire::ALL.into_iter().for_each(|wire| follows(&far, wire));
}

fn follows(far: &Host, wire: Wire) {
    let error = Manner::Says(500, "application/json", r#"{"error":{"message":"out of memory"}}"#);
    let busy = Manner::Says(429, "application/json", r#"{"error":{"message":"busy"}}"#);
    let garbage = Manner::Says(200, "text/event-stream", "data: <html>\n\n");
    let page = Manner::Says(200, "text/html", "<html></html>");
    let own = Manner::Says(200, "text/event-stream", "data: {\"error\":{\"message\":\"no blocks\"}}\n\n");
    let huge = Manner::Says(200, "text/event-stream", "x".repeat(1_100_000).leak());
    let refused = Manner::Says(400, "application/json", r#"{"error":{"message":"too long for it"}}"#);
    let mut cases = vec![
        ("hangs", Manner::Hangs, "timeout", "did not begin to answer within 300 ms"),
        ("slow-head", Manner::SlowHead, "timeout", "did not begin to answer within 300 ms"),
        ("resets", Manner::Resets, "broken", "broke off before"),
        ("drops", Manner::Drops, "broken", "broke off before"),
        ("error", error, "failed", "answered 500: out of memory"),
        ("busy", busy, "saturated", "answered 429: busy"),
        ("garbage", garbage, "garbled", "answered with `<html>`"),
        ("page", page, "garbled", "answered with content of type `text/html`"),
        ("own", own, "failed", "failed: no blocks"),
        ("huge", huge, "garbled", "more than 1048576 bytes in one event"),
        ("refused", refused, "refused", "answered 400: too long for it"),
    ];
    let long_head = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1_000_000)).leak();
    let nonsense = Manner::Raw("250 smtp.example.com ready\r\n");
    cases.extend(match wire {
        Wire::Http1 => vec![
            ("long-head", Manner::Raw(long_head), "garbled", "a head that is too large"),
            ("nonsense", nonsense, "garbled", "something else than HTTP"),
        ],
        Wire::H2c | Wire::Tls => vec![("nonsense", nonsense, "garbled", "something else than HTTP/2")],
    });
    let bad = format!("connections = 0\nprobe_interval_ms = 0\n{}", wire.lines());
    let nobody = if wire == Wire::Tls { "https://127.0.0.1:1" } else { "http://127.0.0.1:1" };
    let mut upstreams = vec![("nobody".to_owned(), nobody.to_owned(), format!("model = \"nobody\"\n{bad}"))];
    for (name, manner, ..) in &cases {
        let limit = if matches!(manner, Manner::Hangs | Manner::SlowHead) { 300 } else { 30_000 };
        let lines = format!("model = \"{name}\"\nfirst_byte_timeout_ms = {limit}\n{bad}");
        upstreams.push(((*name).to_owned(), server(wire, *manner).0, lines));
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
        assert_eq!(first["replica"], format!("{name}:remote@{name}"), "{wire:?}: {why}");
        let told = first["outcome"].as_str().is_some_and(|said| said.contains(expect));
        assert!(told, "{wire:?}, {name}: {first}");
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
fn a_request_that_waits_is_sent_to_another_as_well() {
    on_each_wire(hedged);
}

fn hedged(wire: Wire) {
    let (far, _folder) = far(wire);
    let (slow, let_go) = server(wire, Manner::Hangs);
    let rest = format!("model = \"m\"\nconnections = 0\nprobe_interval_ms = 0\n{}", wire.lines());
    let quick = format!("{rest}upstream_model = \"demo:f16\"\n[replicas.\"m:remote@quick\"]\nweight = 0");
    let near = near(&[("slow", &slow, format!("{rest}hedge_after_ms = 50")), ("quick", &far.data, quick)]);
    let answer = post(&near, "hedged", &chat("m"));
    assert_eq!((answer.status, header(&answer, "x-pointsman-replica")), (200, "m:remote@quick"), "{answer:?}");
    let_go.recv_timeout(PATIENCE).expect("nobody waits for it");
    let why = near.admin("GET", "/admin/v1/requests/hedged", &Value::Null).body;
    let tried: Vec<_> = [0, 1].map(|n| &why["upstreams"][n]["outcome"]).to_vec();
    assert_eq!(tried, ["slower than another", "answered"], "{why}");
    assert_eq!(far.admin("GET", "/admin/v1/requests/hedged.hedge", &Value::Null).status, 200, "its id there");
    // One of ten is hedged; this one is the second.
    let mut body = chat("m");
    body["timeout_ms"] = 1_500.into();
    assert_eq!(post(&near, "not-hedged", &body).status, 504);
    let metrics = metrics(&near, "requests_total{outcome=\"cancelled\",upstream=\"slow\"}", 2.0);
    for (series, expect) in [
        ("hedges_total{upstream=\"slow\"}", 1.0),
        ("hedges_won_total{upstream=\"slow\"}", 1.0),
        ("retries_total{upstream=\"slow\"}", 0.0),
        ("requests_total{outcome=\"answered\",upstream=\"quick\"}", 1.0),
        ("in_flight{upstream=\"slow\"}", 0.0),
    ] {
        assert_eq!(metrics.get(series), Some(&expect), "{wire:?}: {series} {metrics:?}");
    }
}

#[test]
fn where_one_of_two_fails_the_other_goes_on_alone() {
    // A second for each sixteen tokens of a prompt.
    let config = "[engine]\ndevices = [\"null:1000000\"]\n[sched]\nmax_running = 16\nmax_batch_tokens = 16\nprefill_chunk_tokens = 16\n";
    let late = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), config);
    let refused =
        || server(Wire::Http1, Manner::Says(400, "application/json", r#"{"error":{"message":"too long"}}"#)).0;
    let hangs = || server(Wire::Http1, Manner::Hangs).0;
    let first = |model: &str, limit: u32| {
        format!(
            "model = \"{model}\"\nupstream_model = \"demo:f16\"\nconnections = 0\nprobe_interval_ms = 0\n\
             hedge_after_ms = 20\nfirst_byte_timeout_ms = {limit}"
        )
    };
    let second = |model: &str, name: &str| {
        format!(
            "model = \"{model}\"\nupstream_model = \"demo:f16\"\nconnections = 0\nprobe_interval_ms = 0\n\
             [replicas.\"{model}:remote@{name}\"]\nweight = 0"
        )
    };
    let near = near(&[
        ("a-late", &late.data, first("a", 30_000)),
        ("a-refuses", &refused(), second("a", "a-refuses")),
        ("b-hangs", &hangs(), first("b", 1_500)),
        ("b-late", &late.data, second("b", "b-late")),
        ("c-hangs", &hangs(), first("c", 1_500)),
        ("c-refuses", &refused(), second("c", "c-refuses")),
        ("d-hangs", &hangs(), first("d", 1_500)),
    ]);
    let silent = "did not begin to answer within 1500 ms";
    std::thread::scope(|scope| {
        for (model, status, hedges, expect) in [
            ("a", 200, 1.0, vec![("a-refuses", "answered 400"), ("a-late", "answered")]),
            ("b", 200, 1.0, vec![("b-hangs", silent), ("b-late", "answered")]),
            ("c", 504, 1.0, vec![("c-refuses", "answered 400"), ("c-hangs", silent)]),
            ("d", 504, 0.0, vec![("d-hangs", silent)]),
        ] {
            let near = &near;
            scope.spawn(move || {
                let messages = json!([{ "role": "user", "content": "What is ownership? ".repeat(12) }]);
                let body = json!({ "model": model, "messages": messages, "max_tokens": 1 });
                let answer = post(near, model, &body);
                let why = near.admin("GET", &format!("/admin/v1/requests/{model}"), &Value::Null).body;
                let tried = why["upstreams"].as_array().map(Vec::len);
                assert_eq!((answer.status, tried), (status, Some(expect.len())), "{why}");
                for (n, (name, outcome)) in expect.iter().enumerate() {
                    let tried = &why["upstreams"][n];
                    let is_told = tried["outcome"].as_str().is_some_and(|said| said.contains(outcome));
                    assert!(tried["replica"] == format!("{model}:remote@{name}") && is_told, "{why}");
                }
                let first = if model == "a" { "a-late".to_owned() } else { format!("{model}-hangs") };
                let metrics = metrics(near, &format!("hedges_total{{upstream=\"{first}\"}}"), hedges);
                let won = f64::from(u8::from(model == "b"));
                assert_eq!(metrics[&format!("hedges_won_total{{upstream=\"{first}\"}}")], won, "{metrics:?}");
            });
        }
    });
}

#[test]
fn a_hedge_stays_within_the_variant_and_away_from_the_replicas_of_this_host() {
    let far = host(&[]);
    let rest = "connections = 0\nprobe_interval_ms = 0\nupstream_model = \"demo:f16\"";
    let slow = format!(
        "url = \"{}\"\nhedge_after_ms = 10\nfirst_byte_timeout_ms = 500\n{rest}",
        server(Wire::Http1, Manner::Hangs).0
    );
    let config = format!(
        "[engine]\ndevices = [\"null\"]\n\
         [upstreams.slow]\nmodel = \"demo\"\n{slow}\n[upstreams.slow-m]\nmodel = \"m\"\n{slow}\n\
         [upstreams.other]\nmodel = \"m\"\nvariant = \"other\"\nurl = \"{}\"\n{rest}\n\
         [replicas.\"demo:f16@null\"]\nweight = 0\n[replicas.\"demo:q8_0@null\"]\nweight = 0\n",
        far.data,
    );
    let near = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config);
    let put = near.admin("PUT", "/admin/v1/aliases/m", &json!({ "weights": { "m:remote": 1 } }));
    assert_eq!(put.status, 200, "{put:?}");
    let calls = || {
        let slot = near.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
        slot["counters"]["calls"].as_u64().expect("a count")
    };
    for (model, first, then) in [("demo", "slow", "@null"), ("m", "slow-m", "m:other@other")] {
        let before = calls();
        let answer = post(&near, model, &chat(model));
        let why = near.admin("GET", &format!("/admin/v1/requests/{model}"), &Value::Null).body;
        let tried = &why["upstreams"][0];
        assert_eq!((answer.status, &tried["replica"]), (200, &json!(format!("{model}:remote@{first}"))), "{why}");
        assert!(tried["outcome"].as_str().is_some_and(|said| said.contains("within 500 ms")), "{why}");
        assert!(header(&answer, "x-pointsman-replica").ends_with(then), "{answer:?}");
        // A hedge had no row, so that the router was not asked for it.
        assert_eq!(calls() - before, 2, "{why}");
        let metrics = metrics(&near, &format!("retries_total{{upstream=\"{first}\"}}"), 1.0);
        assert_eq!(metrics[&format!("hedges_total{{upstream=\"{first}\"}}")], 0.0, "{metrics:?}");
    }
}

/// On a kept connection that ends, and on a stream that was not begun: the client sees nothing, and nothing counts as failed.
#[test]
fn what_was_not_begun_is_sent_again() {
    let cases = Wire::ALL.map(|wire| (wire, Manner::Once, 3.0));
    for (wire, manner, opened) in cases.into_iter().chain([(Wire::H2c, Manner::Refuses, 1.0)]) {
        let (url, _) = server(wire, manner);
        let lines = format!("model = \"once\"\nconnections = 0\nprobe_interval_ms = 0\n{}", wire.lines());
        let near = near(&[("once", &url, lines)]);
        for n in 0..3 {
            let answer = post(&near, &format!("{n}"), &chat("once"));
            let content = &answer.body["choices"][0]["message"]["content"];
            assert_eq!((answer.status, content), (200, &json!("half")), "{wire:?}, {manner:?}: {answer:?}");
        }
        let metrics = metrics(&near, "requests_total{outcome=\"answered\",upstream=\"once\"}", 3.0);
        assert_eq!(metrics["connections_opened_total{upstream=\"once\"}"], opened, "{wire:?}, {manner:?}: {metrics:?}");
        assert_eq!(metrics["retries_total{upstream=\"once\"}"], 0.0, "{metrics:?}");
    }
}

#[test]
fn an_upstream_that_leaves_answers_what_it_has_begun() {
    let (url, has_begun) = server(Wire::H2c, Manner::Leaves);
    let lines = format!("model = \"leaves\"\nconnections = 0\nprobe_interval_ms = 0\n{}", Wire::H2c.lines());
    let near = near(&[("leaves", &url, lines)]);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| post(&near, "first", &chat("leaves")));
        has_begun.recv_timeout(PATIENCE).expect("the first is there");
        let second = post(&near, "second", &chat("leaves"));
        for answer in [first.join().expect("no panic"), second] {
            assert_eq!(answer.body["choices"][0]["message"]["content"], "half", "{answer:?}");
        }
    });
    let metrics = metrics(&near, "requests_total{outcome=\"answered\",upstream=\"leaves\"}", 2.0);
    let of = |series: &str| metrics[&format!("{series}{{upstream=\"leaves\"}}")];
    assert_eq!((of("connections_opened_total"), of("retries_total"), of("in_flight")), (2.0, 0.0, 0.0), "{metrics:?}");
}

#[test]
fn what_fails_alone_is_told_and_then_left_alone() {
    for wire in Wire::ALL {
        let (dies, _) = server(wire, Manner::Dies);
        let (resets, _) = server(wire, Manner::Resets);
        let done = Manner::Says(
            200,
            "text/event-stream",
            concat!("data: {\"choices\":[{\"delta\":{}}]}\n\n", "data: [DONE]\n\n"),
        );
        let (unfinished, _) = server(wire, done);
        let line =
            |model: &str| format!("model = \"{model}\"\nconnections = 0\nprobe_interval_ms = 0\n{}", wire.lines());
        let near = near(&[
            ("dies", &dies, line("dies")),
            ("resets", &resets, line("resets")),
            ("done", &unfinished, line("done")),
        ]);
        let whole = post(&near, "whole", &chat("dies"));
        assert_eq!((whole.status, &whole.body["error"]["code"]), (502, &json!("upstream_failed")), "{whole:?}");
        let mut body = chat("dies");
        body["stream"] = true.into();
        let events = events(&post(&near, "streamed", &body));
        assert_eq!(events[0]["choices"][0]["delta"]["content"], "half", "{events:?}");
        let message = events[1]["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("the upstream `dies` broke off before") && events.len() == 2, "{events:?}");
        let done = post(&near, "done", &chat("done"));
        let message = done.body["error"]["message"].as_str().unwrap_or_default();
        assert!(done.status == 502 && message.contains("before each choice had a `finish_reason`"), "{done:?}");
        for n in 0..3 {
            let answer = post(&near, &format!("{n}"), &chat("resets"));
            assert_eq!((answer.status, &answer.body["error"]["code"]), (502, &json!("upstream_failed")), "{answer:?}");
        }
        // A second after that, a request would be its trial; one that fails doubles the wait.
        let is_left_alone = |n: usize| {
            let answer = post(&near, &format!("open-{n}"), &chat("resets"));
            (answer.status, &answer.body["error"]["code"]) == (503, &json!("no_replica"))
        };
        assert!((0..4).any(is_left_alone), "{wire:?}");
        let metrics = metrics(&near, "up{upstream=\"resets\"}", 0.0);
        assert_eq!(metrics["up{upstream=\"dies\"}"], 1.0, "{metrics:?}");
        assert_eq!(metrics["requests_total{outcome=\"broken\",upstream=\"done\"}"], 1.0, "{metrics:?}");
    }
}

/// What is left of a stream.
fn rest(mut reader: BufReader<TcpStream>) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("the rest");
    text
}

/// A process that is stopped keeps its sockets and says nothing; one that is killed in the middle of an answer resets them.
#[test]
fn another_process_hangs_comes_back_and_dies() {
    let config = "[engine]\ndevices = [\"null:5000\"]\n";
    let far = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), config);
    let lines = "model = \"demo\"\nupstream_model = \"demo:f16\"\nconnections = 2\nprobe_interval_ms = 100\n\
                 first_byte_timeout_ms = 5000\nidle_timeout_ms = 2000\n"
        .to_owned();
    let near = near(&[("far", &far.data, lines)]);
    let mut body = chat("demo");
    (body["max_tokens"], body["ignore_eos"], body["stream"]) = (900.into(), true.into(), true.into());
    let reader = begin(&near, "hangs", &body, "\"content\"");
    far.signal("-STOP");
    let text = rest(reader);
    assert!(text.contains("upstream_timeout") && !text.contains("[DONE]"), "{text}");
    metrics(&near, "up{upstream=\"far\"}", 0.0);
    let answer = post(&near, "down", &chat("demo"));
    assert_eq!((answer.status, &answer.body["error"]["code"]), (503, &json!("no_replica")), "{answer:?}");

    far.signal("-CONT");
    metrics(&near, "up{upstream=\"far\"}", 1.0);
    assert_eq!(post(&near, "again", &chat("demo")).status, 200);

    let reader = begin(&near, "dies", &body, "\"content\"");
    far.signal("-KILL");
    let text = rest(reader);
    assert!(text.contains("the upstream `far` broke off before") && !text.contains("[DONE]"), "{text}");
    let metrics = metrics(&near, "up{upstream=\"far\"}", 0.0);
    let of = |series: &str| metrics[&format!("{series}{{upstream=\"far\"}}")];
    assert_eq!((of("in_flight"), of("connections")), (0.0, 0.0), "{metrics:?}");
}

/// Begins a stream and returns when a first chunk with this in it is there.
fn begin(host: &Host, id: &str, body: &Value, first: &str) -> BufReader<TcpStream> {
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
    while !line.contains(first) {
        line.clear();
        assert!(reader.read_line(&mut line).expect("an answer") > 0, "it ended before its first chunk");
    }
    reader
}

#[test]
fn whoever_ends_it_here_ends_it_there() {
    on_each_wire(ends);
}

/// Side by side, because most of it is waiting.
fn on_each_wire(test: fn(Wire)) {
    std::thread::scope(|scope| Wire::ALL.into_iter().for_each(|wire| drop(scope.spawn(move || test(wire)))));
}

fn ends(wire: Wire) {
    let (url, closed) = server(wire, Manner::Begins);
    let (hangs, waiting) = server(wire, Manner::Hangs);
    let line = |model: &str| format!("model = \"{model}\"\nconnections = 0\nprobe_interval_ms = 0\n{}", wire.lines());
    let near = near(&[("begins", &url, line("begins")), ("hangs", &hangs, line("hangs"))]);
    let mut body = chat("begins");
    body["stream"] = true.into();
    drop(begin(&near, "gone", &body, "half"));
    closed.recv_timeout(PATIENCE).expect("the client went away");

    let reader = begin(&near, "cancelled", &body, "half");
    let url = format!("{}/v1/requests/cancelled", near.data);
    assert_eq!(near.send("DELETE", &url, &[], b"").status, 200);
    closed.recv_timeout(PATIENCE).expect("it was cancelled");
    assert!(rest(reader).contains("the request was cancelled"));

    body["timeout_ms"] = 1_500.into();
    let reader = begin(&near, "late", &body, "half");
    closed.recv_timeout(PATIENCE).expect("its deadline has passed");
    assert!(rest(reader).contains("the deadline of 1500 ms has passed"));

    let mut body = chat("hangs");
    body["timeout_ms"] = 1_500.into();
    assert_eq!(post(&near, "unanswered", &body).status, 504);
    waiting.recv_timeout(PATIENCE).expect("nobody waits for it");
    for (id, state) in
        [("gone", "cancelled"), ("cancelled", "cancelled"), ("late", "cancelled"), ("unanswered", "cancelled")]
    {
        let why = near.admin("GET", &format!("/admin/v1/requests/{id}"), &Value::Null).body;
        assert_eq!(why["state"], state, "{why}");
    }
    let metrics = metrics(&near, "requests_total{outcome=\"cancelled\",upstream=\"begins\"}", 3.0);
    // Of HTTP/2 the streams have ended, and their connection is the next one's.
    let kept = if wire == Wire::Http1 { (0.0, 3.0) } else { (1.0, 1.0) };
    let connections =
        (metrics["connections{upstream=\"begins\"}"], metrics["connections_opened_total{upstream=\"begins\"}"]);
    assert_eq!((metrics["in_flight{upstream=\"begins\"}"], connections), (0.0, kept), "{wire:?}");
}

#[test]
fn an_upstream_over_tls_is_who_it_says_or_is_sent_nothing() {
    let (far, _folder) = far(Wire::Tls);
    let folder = tempfile::tempdir().expect("a folder");
    let ca = folder.path().join("ca.pem");
    let trust = |name: &str| std::fs::copy(root().join(format!("tests/e2e/{name}.pem")), &ca).expect("a file");
    trust("renewed");
    let lines = |model: &str, ca: &Path| {
        format!(
            "model = \"{model}\"\nupstream_model = \"demo:f16\"\nconnections = 0\nprobe_interval_ms = 0\nca_file = {ca:?}"
        )
    };
    let elsewhere = far.data.replace("127.0.0.1", "localhost");
    let right = root().join("tests/e2e/registry.pem");
    let one = format!("{}\nprotocol = \"http1\"", lines("one", &right));
    let unknown = "model = \"unknown\"\nconnections = 0\nprobe_interval_ms = 0".to_owned();
    let near = near(&[
        ("other-ca", &far.data, lines("other-ca", &ca)),
        ("other-name", &elsewhere, lines("other-name", &right)),
        ("unknown", &far.data, unknown),
        ("one", &far.data, one),
    ]);
    for (model, says) in
        [("other-ca", "UnknownIssuer"), ("other-name", "not valid for name"), ("unknown", "certificate")]
    {
        let answer = post(&near, model, &chat(model));
        assert_eq!(answer.status, 502, "{answer:?}");
        let why = near.admin("GET", &format!("/admin/v1/requests/{model}"), &Value::Null).body;
        let outcome = why["upstreams"][0]["outcome"].as_str().unwrap_or_default();
        assert!(outcome.contains("cannot be reached") && outcome.contains(says), "{model}: {outcome}");
    }
    assert_eq!(post(&near, "one", &chat("one")).status, 200, "HTTP/1.1 is offered as well");

    // A text that is no PEM changes nothing; the right one counts for the next connection.
    let hang_up = |outcome: &str, n: u32| {
        near.signal("-HUP");
        let line = format!("pointsman_tls_reloads_total{{outcome=\"{outcome}\",plane=\"upstreams\"}} {n}\n");
        let seen = looks().any(|_| near.get("/metrics").body.as_str().is_some_and(|text| text.contains(&line)));
        assert!(seen, "{line}");
    };
    std::fs::write(&ca, "nothing").expect("a file");
    hang_up("kept_old", 1);
    trust("registry");
    // Three have a file, of which two could be used before.
    hang_up("used", 5);
    let answer = post(&near, "again", &chat("other-ca"));
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn embeddings_are_made_where_the_model_is() {
    let folder = crate::embeddings::tiny();
    let far = crate::embeddings::serving(folder.path(), false);
    let garbled = Manner::Says(200, "application/json", r#"{"data": [{"embedding": "no"}]}"#);
    let (bad, _) = server(Wire::H2c, garbled);
    let (hangs, ended) = server(Wire::H2c, Manner::Hangs);
    let (long, _) = server(Wire::H2c, Manner::Says(200, "application/json", r#"{"data": [{"embedding": [0, 4, 3]}]}"#));
    let lines = |model: &str| {
        format!(
            "model = \"{model}\"\nserves = \"embeddings\"\nupstream_model = \"encoder\"\nconnections = 0\nprobe_interval_ms = 0\nprotocol = \"http2\""
        )
    };
    let near = near(&[
        ("a-bad", &bad, lines("words")),
        ("east", &far.data, lines("words")),
        ("long", &long, lines("long")),
        ("slow", &hangs, lines("slow")),
    ]);
    let ask = |host: &Host, body: &Value| host.post("/v1/embeddings", body);
    for extra in [
        json!({"input": "w5 w6"}),
        json!({"input": ["w1", "w2 w3"], "encoding_format": "base64"}),
        json!({"input": [5, 6], "dimensions": 4}),
    ] {
        let with = |model: &str| {
            let mut body = extra.clone();
            body["model"] = model.into();
            body
        };
        let (there, here) = (ask(&far, &with("encoder")), ask(&near, &with("words")));
        assert_eq!((there.status, here.status), (200, 200), "{here:?}");
        assert_eq!(here.body["data"], there.body["data"], "{extra}");
        assert_eq!((&here.body["usage"], &here.body["model"]), (&there.body["usage"], &json!("words")));
        assert_eq!(header(&here, "x-pointsman-replica"), "words@east");
    }
    // A server that does not know the field sends all; here it holds.
    let shortened = ask(&near, &json!({"model": "long", "input": "w1", "dimensions": 2}));
    assert_eq!(shortened.body["data"][0]["embedding"], json!([0.0, 1.0]), "{shortened:?}");
    let more = ask(&near, &json!({"model": "long", "input": "w1", "dimensions": 4}));
    assert_eq!((more.status, &more.body["error"]["code"]), (502, &json!("upstream_failed")), "{more:?}");
    let long = ask(&near, &json!({"model": "words", "input": "w1 ".repeat(1_000)}));
    assert_eq!((long.status, &long.body["error"]["code"]), (400, &json!("refused_by_upstream")), "{long:?}");
    let late = ask(&near, &json!({"model": "slow", "input": "w1", "timeout_ms": 1_500}));
    assert_eq!(late.status, 504, "{late:?}");
    ended.recv_timeout(PATIENCE).expect("nobody waits for it");
    let metrics = metrics(&near, "requests_total{outcome=\"answered\",upstream=\"east\"}", 3.0);
    assert_eq!(metrics["requests_total{outcome=\"garbled\",upstream=\"a-bad\"}"], 3.0, "{metrics:?}");
    assert_eq!(metrics["up{upstream=\"a-bad\"}"], 0.0, "its circuit is open");
    let refused = post(&near, "chat", &chat("words"));
    assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("model")), "{refused:?}");
    let listed = near.get("/v1/models").body;
    assert_eq!(
        (&listed["data"][2]["id"], &listed["data"][2]["owned_by"]),
        (&json!("words"), &json!("upstream")),
        "{listed}"
    );
}

/// The example of docs/upstreams.md.
#[test]
fn a_router_keeps_requests_here_until_the_queues_are_long() {
    let (far, _folder) = far(Wire::Http1);
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

#[test]
fn a_host_whose_only_upstream_is_down_is_not_ready() {
    let (url, _) = server(Wire::Http1, Manner::Raw("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"));
    let lines = "model = \"m\"\nconnections = 0\nprobe_interval_ms = 10\nprobe_failures = 1".to_owned();
    let near = near(&[("east", &url, lines)]);
    metrics(&near, "up{upstream=\"east\"}", 0.0);
    assert_eq!(post(&near, "one", &chat("m")).status, 503);
    let ready = near.get("/ready");
    assert_eq!((ready.status, &ready.body["error"]["code"]), (503, &json!("no_replica")), "{ready:?}");
    assert!(ready.body["error"]["message"].as_str().is_some_and(|m| m.contains("upstream east")), "{ready:?}");
    let health = near.get("/health");
    assert_eq!((health.status, &health.body["degraded"]), (200, &json!(["upstream east"])));
}
