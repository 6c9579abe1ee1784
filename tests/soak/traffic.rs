//! The clients: what they ask, when they leave, and what they saw.

use std::io::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use hdrhistogram::Histogram;
use pointsman_tests::Host;
use pointsman_tests::raw::{self, Raw};
use pointsman_tests::rng::Rng;
use serde_json::{Value, json};

use super::now;

/// What clients saw. Times in microseconds.
#[derive(Debug)]
pub(super) struct Tally {
    firsts: Histogram<u64>,
    gaps: Histogram<u64>,
    pub done: u64,
    /// Clients that went before the end.
    pub left: u64,
    /// Of those, requests that their clients ended by id.
    pub cancelled: u64,
    pub failures: Vec<String>,
}

impl Tally {
    pub(super) fn new() -> Self {
        // From a microsecond to a minute.
        let times = || Histogram::new_with_bounds(1, 60_000_000, 3).expect("bounds and digits");
        Self { firsts: times(), gaps: times(), done: 0, left: 0, cancelled: 0, failures: Vec::new() }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.firsts.add(other.firsts).expect("of one kind");
        self.gaps.add(other.gaps).expect("of one kind");
        (self.done, self.left) = (self.done + other.done, self.left + other.left);
        self.cancelled += other.cancelled;
        self.failures.extend(other.failures);
    }

    #[expect(clippy::print_stdout, reason = "the figures are what a soak is for")]
    pub(super) fn print(&self, changes: u64, growth: i64) {
        println!(
            "{} requests done, {} left before their end ({} cancelled by id), {changes} changes of policies, weights and models",
            self.done, self.left, self.cancelled
        );
        for (name, times) in [("first event", &self.firsts), ("between events", &self.gaps)] {
            let ms = |us: u64| us as f64 / 1_000.0;
            let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|q| ms(times.value_at_quantile(q)));
            println!("{name}: p50 {p50:.2} ms, p95 {p95:.2} ms, p99 {p99:.2} ms, max {:.2} ms", ms(times.max()));
        }
        println!("memory after the warm-up: {growth:+} bytes");
    }
}

/// Asks until it is over; tells of each request that has ended.
pub(super) fn client(host: &Host, seed: u64, is_over: &AtomicBool, ended: &Sender<()>) -> Tally {
    let (mut tally, mut rng) = (Tally::new(), Rng::new(seed));
    while !is_over.load(Ordering::Relaxed) {
        if let Err(error) = one(host, &mut rng, &mut tally) {
            tally.failures.push(error.to_string());
        }
        // Nobody listens any more where the operator has failed.
        if ended.send(()).is_err() {
            break;
        }
    }
    tally
}

fn one(host: &Host, rng: &mut Rng, tally: &mut Tally) -> Result<()> {
    let kind = rng.below(100);
    match kind {
        0..48 => stream(host, &completion(rng, true), None, tally)?,
        48..50 => {
            let mut body = completion(rng, true);
            body["model"] = json!(rng.pick(&super::LAZY));
            stream(host, &body, None, tally)?;
        }
        50..70 => whole(host, "/v1/completions", &completion(rng, false), tally),
        70..80 => {
            let message = json!([{ "role": "user", "content": "What is a borrow?" }]);
            let body = json!({ "model": "demo", "messages": message, "max_tokens": 1 + rng.below(40), "n": 2,
                "seed": rng.below(8) });
            whole(host, "/v1/chat/completions", &body, tally);
        }
        80..84 => {
            let body =
                json!({ "model": "demo", "prompt": "Yes or no? ", "max_tokens": 8, "guided_choice": ["yes", "no"] });
            whole(host, "/v1/completions", &body, tally);
        }
        84..93 => stream(host, &completion(rng, true), Some(rng.below(30)), tally)?,
        93..95 => cancelled(host, &completion(rng, true), tally)?,
        _ => {
            drop(raw::send(host, "/v1/completions", &completion(rng, true))?);
            tally.left += 1;
        }
    }
    Ok(())
}

/// Begins to read, and ends the request by its id: it is told so, or had ended.
fn cancelled(host: &Host, body: &Value, tally: &mut Tally) -> Result<()> {
    let mut answer = Raw::ask(host, "/v1/completions", body)?;
    if answer.status != 200 {
        tally.failures.push(format!("{} instead of a stream", answer.status));
        return Ok(());
    }
    let mut last: Value = serde_json::from_str(&answer.event()?.unwrap_or_default())?;
    let url = format!("{}/v1/requests/{}", host.data, last["id"].as_str().unwrap_or_default());
    let deleted = host.send("DELETE", &url, &[], b"").status;
    while let Some(event) = answer.event()? {
        last = serde_json::from_str(&event)?;
    }
    match (deleted, last["error"]["code"].as_str(), last["choices"][0]["finish_reason"].as_str()) {
        (200, Some("cancelled"), _) => (tally.left, tally.cancelled) = (tally.left + 1, tally.cancelled + 1),
        // It ended meanwhile.
        (200 | 404, None, Some("stop" | "length")) => tally.done += 1,
        _ => tally.failures.push(format!("{deleted} to its DELETE, and at last {last}")),
    }
    Ok(())
}

fn completion(rng: &mut Rng, stream: bool) -> Value {
    let starts = ["Ownership is ", "A trait is ", "The borrow checker ", "When you run cargo build, "];
    let prompt = rng.pick(&starts).repeat(1 + rng.below(16) as usize);
    json!({ "model": rng.pick(&["demo", "demo", "demo:f16", "demo-mini"]), "prompt": prompt, "stream": stream,
        "max_tokens": 1 + rng.below(100), "temperature": rng.below(2), "priority": rng.pick(&["low", "normal", "high"]),
        "user": rng.pick(&["a", "b", "c"]) })
}

fn whole(host: &Host, path: &str, body: &Value, tally: &mut Tally) {
    let answer = host.post(path, body);
    match answer.status {
        200 => tally.done += 1,
        status => tally.failures.push(format!("{status}: {}", answer.body)),
    }
}

/// Reads to the end, or leaves after some events.
fn stream(host: &Host, body: &Value, leaves: Option<u64>, tally: &mut Tally) -> Result<()> {
    let mut last = now();
    let mut answer = Raw::ask(host, "/v1/completions", body)?;
    // The operator has unloaded what it had found.
    if answer.status == 503 && super::LAZY.iter().any(|lazy| body["model"] == *lazy) {
        tally.left += 1;
        return Ok(());
    }
    if answer.status != 200 {
        tally.failures.push(format!("{} instead of a stream", answer.status));
        return Ok(());
    }
    let (mut read, mut is_finished) = (0, false);
    while leaves.is_none_or(|most| read < most) {
        let Some(event) = answer.event()? else {
            match is_finished {
                true => tally.done += 1,
                false => tally.failures.push(format!("a stream ended after {read} events without its reason")),
            }
            return Ok(());
        };
        let event: Value = serde_json::from_str(&event)?;
        if !event["error"].is_null() {
            tally.failures.push(event.to_string());
            return Ok(());
        }
        is_finished |= event["choices"][0]["finish_reason"].is_string();
        let times = if read == 0 { &mut tally.firsts } else { &mut tally.gaps };
        times.saturating_record(u64::try_from(last.elapsed().as_micros()).unwrap_or(u64::MAX));
        (read, last) = (read + 1, now());
    }
    tally.left += 1;
    Ok(())
}
