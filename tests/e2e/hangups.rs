//! Clients that go away: a thousand of them, at moments that a seed draws, and nothing of them is left.

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};

use pointsman_tests::raw::{self, Raw};
use pointsman_tests::rng::Rng;
use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use super::host;

const CLIENTS: u64 = 1_000;
const THREADS: u64 = 16;

/// When a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    /// Half-way through its request.
    Asking,
    /// At once after it.
    Asked,
    /// With this many events read.
    After(u64),
    /// By asking for the end from another connection.
    Cancelling,
    /// When the time is over that it has given.
    Late,
}

fn request(rng: &mut Rng, id: &str) -> Value {
    // Some share their beginning, and so blocks; some have several choices, which share more.
    let prompt = "Rust is a language. ".repeat(1 + rng.below(12) as usize);
    let (n, tokens) = (1 + rng.below(3), 1 + rng.below(200));
    // Some have a draft, which ends with them.
    let draft = if rng.below(4) == 0 { json!("demo-mini") } else { Value::Null };
    json!({ "model": rng.pick(&["demo:f16", "demo:q8_0", "demo"]), "prompt": prompt, "max_tokens": tokens, "n": n,
        "stream": true, "ignore_eos": true, "user": id, "temperature": 1, "draft": draft })
}

fn client((host, is_relay): (&Host, bool), rng: &mut Rng, id: &str) -> std::io::Result<()> {
    let leaves = match rng.below(8) {
        0 => Leaves::Asking,
        1 | 2 => Leaves::Asked,
        3 => Leaves::Cancelling,
        4 => Leaves::Late,
        _ => Leaves::After(rng.below(60)),
    };
    let mut body = request(rng, id);
    if is_relay {
        (body["model"], body["draft"]) = ("demo".into(), Value::Null);
    }
    match leaves {
        Leaves::Asking => {
            let mut socket = std::net::TcpStream::connect(host.data.trim_start_matches("http://"))?;
            let head = format!("POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n", 4_000);
            socket.write_all(&head.as_bytes()[..20 + rng.below(40) as usize])?;
        }
        Leaves::Asked => raw::send(host, "/v1/completions", &body)?.shutdown(Shutdown::Both)?,
        Leaves::Cancelling => {
            let headers = [
                ("content-type", "application/json"),
                ("x-request-id", id),
                ("accept", if body["draft"].is_null() { "*/*" } else { "application/x-ndjson" }),
            ];
            let url = format!("{}/v1/completions", host.data);
            std::thread::scope(|scope| {
                scope.spawn(|| host.send("POST", &url, &headers, body.to_string().as_bytes()));
                // Not there yet, there, or over: each is an answer.
                let answer = host.send("DELETE", &format!("{}/v1/requests/{id}", host.data), &[], b"");
                assert!(matches!(answer.status, 200 | 404), "{answer:?}");
            });
        }
        Leaves::Late => {
            body["timeout_ms"] = (1 + rng.below(30)).into();
            let mut answer = Raw::ask(host, "/v1/completions", &body)?;
            assert!(matches!(answer.status, 200 | 429 | 504), "{answer:?}");
            while answer.event()?.is_some() {}
        }
        Leaves::After(events) => {
            let mut answer = Raw::ask(host, "/v1/completions", &body)?;
            assert!(matches!(answer.status, 200 | 429), "{answer:?}");
            let mut read = 0;
            while read < events && answer.event()?.is_some() {
                read += 1;
            }
        }
    }
    Ok(())
}

/// Requests that ended because somebody said so or went away.
fn cancelled(host: &Host) -> u64 {
    let metrics = host.get("/metrics").body;
    let lines = metrics.as_str().unwrap_or_default().lines().filter(|l| l.starts_with("pointsman_cancelled_total{"));
    lines.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[test]
fn a_thousand_clients_leave_at_any_moment_and_nothing_of_them_stays() {
    // Small pools, so that there is preemption too, and steps that take a while.
    let host = host(&[("ENGINE__DEVICES", "[\"null:300\"]"), ("ENGINE__KV_MIB", "8"), ("SCHED__MAX_RUNNING", "16")]);
    // Another host, which sends on to it what a quarter of them ask.
    let relay = Host::configured(
        env!("CARGO_BIN_EXE_pointsman-under-test"),
        &format!(
            "[engine]\ndemo = false\n[upstreams.far]\nurl = \"{}\"\nmodel = \"demo\"\nupstream_model = \"demo:f16\"\n",
            host.data
        ),
    );
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (host, relay, next) = (&host, &relay, &next);
            scope.spawn(move || {
                let mut rng = Rng::new(0x5eed + thread);
                while next.fetch_add(1, Ordering::Relaxed) < CLIENTS as usize {
                    let id = format!("c{thread}-{}", rng.next());
                    // A connection that the host has closed is one of the moments.
                    let is_relay = rng.below(4) == 0;
                    let _ = client((if is_relay { relay } else { host }, is_relay), &mut rng, &id);
                }
            });
        }
    });
    // Nothing of them is left there either, nor has the one failed the other.
    let there = |name: &str| {
        let metrics = relay.get("/metrics").body;
        let lines = metrics.as_str().unwrap_or_default().lines().filter(|l| l.starts_with(name));
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    assert!(looks().any(|_| there("pointsman_upstream_in_flight{") == 0), "requests stay at the upstream");
    assert!(
        there("pointsman_upstream_requests_total{outcome=\"cancelled\"") >= CLIENTS / 40,
        "some left while it was asked"
    );
    let drained = relay.admin("POST", "/admin/v1/drain", &Value::Null).body;
    assert_eq!(drained, json!({ "drained": true, "in_flight": 0 }), "the relay");
    raw::rests(&host);
    let metrics = host.get("/metrics").body;
    let drafted = |line: &str| {
        line.starts_with("vllm:prompt_tokens_total{") && line.contains("\"demo-mini:") && !line.ends_with(" 0")
    };
    assert!(metrics.as_str().unwrap_or_default().lines().any(drafted), "drafts began");
    let cancelled = cancelled(&host);
    assert!(cancelled >= CLIENTS / 10, "{cancelled} were cut short");
    // Everybody's place is free: a host that is drained says so.
    let drained = host.admin("POST", "/admin/v1/drain", &Value::Null).body;
    assert_eq!(drained, json!({ "drained": true, "in_flight": 0 }));
}

#[test]
fn who_has_what_he_asked_for_has_not_gone_away() {
    let host = host(&[]);
    let ask = |extra: Value| {
        let mut body =
            json!({ "model": "demo:f16", "prompt": "The borrow checker", "max_tokens": 60, "temperature": 0 });
        let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) else { panic!("objects") };
        body.extend(extra);
        let answer = host.post("/v1/completions", &json!(body));
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    };
    let text = ask(json!({}))["choices"][0]["text"].as_str().map(str::to_owned).unwrap_or_default();
    let stop: String = text.chars().skip(text.chars().count() / 2).take(4).collect();
    for _ in 0..10 {
        let answer = ask(json!({ "stop": stop, "n": 2 }));
        assert!(
            answer["choices"].as_array().is_some_and(|c| c.iter().all(|c| c["finish_reason"] == "stop")),
            "{answer}"
        );
        ask(json!({ "stop": [stop], "stream": true }));
    }
    raw::rests(&host);
    assert_eq!(cancelled(&host), 0, "a stop string is no client that went away");
}
