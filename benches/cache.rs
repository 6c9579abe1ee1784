//! What the response cache saves: an answer of 256 tokens of the demo model computed and given again, whole and as a stream, over
//! HTTP on one connection. Bar: a hit is 150 times faster than the miss (medians of the same run).
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::process::ExitCode;
use std::time::Duration;

use pointsman_benches::{Samples, header, now};
use pointsman_tests::Host;
use serde_json::{Value, json};

const TOKENS: usize = 256;
/// Prompts, each computed once.
const PROMPTS: usize = 20;
/// Times that each is given again.
const HITS: usize = 50;
const BAR: f64 = 150.0;

fn request(prompt: usize, stream: bool) -> Vec<u8> {
    let body = json!({
        "model": "demo:f16", "prompt": format!("In chapter {prompt}, ownership is"), "temperature": 0,
        "max_tokens": TOKENS, "ignore_eos": true, "stream": stream,
    });
    body.to_string().into_bytes()
}

/// Sends a request and checks how it was served.
fn timed(host: &Host, body: &[u8], expect: &str) -> Duration {
    let url = format!("{}/v1/completions", host.data);
    let start = now();
    let answer = host.send("POST", &url, &[("content-type", "application/json")], body);
    let took = start.elapsed();
    let served = answer.headers.get("x-pointsman-cache").and_then(|value| value.to_str().ok());
    assert_eq!((answer.status, served), (200, Some(expect)), "{answer:?}");
    took
}

fn measure(host: &Host, stream: bool) -> f64 {
    let (mut misses, mut hits) = (Samples::default(), Samples::default());
    for prompt in 0..PROMPTS {
        let body = request(prompt, stream);
        misses.add(timed(host, &body, "miss"));
        (0..HITS).for_each(|_| hits.add(timed(host, &body, "hit")));
    }
    let (misses, hits) = (misses.percentiles(), hits.percentiles());
    let shape = if stream { "stream" } else { "whole" };
    misses.print(&format!("{shape}, {TOKENS} tokens, miss"), None);
    hits.print(&format!("{shape}, {TOKENS} tokens, hit"), None);
    misses.p50 as f64 / hits.p50 as f64
}

fn main() -> ExitCode {
    if matches!(std::env::args().nth(1).as_deref(), Some("serve" | "__compile")) {
        return pointsman::main();
    }
    header("cache: an answer computed and given again");
    let program = std::env::current_exe().unwrap_or_else(|e| panic!("{e}"));
    let host = Host::shipped(&program.to_string_lossy(), "", &[("SERVER__RESPONSE_CACHE_MIB", "64")]);
    for stream in [false, true] {
        let ratio = measure(&host, stream);
        let verdict = if ratio >= BAR { "met" } else { "MISSED" };
        println!("{}: a hit is {ratio:.0} times faster   bar {BAR} {verdict}", if stream { "stream" } else { "whole" });
        assert_eq!(host.admin("DELETE", "/admin/v1/cache", &Value::Null).status, 200, "it is cleared");
    }
    ExitCode::SUCCESS
}
