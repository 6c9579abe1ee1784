//! What came of a run: counts, rates, and percentiles by HDR histograms (three digits, up to an hour).

use std::collections::BTreeMap;
use std::fmt::Write;

use hdrhistogram::Histogram;
use pointsman_sched::ids::Micros;
use serde_json::{Value, json};

use super::ask::{Outcome, Times};
use crate::cli::BenchArgs;
use crate::clock::seconds;

/// Longest time that is told apart.
const HOUR_US: u64 = 3_600_000_000;
/// Kinds of rejections and failures that are told apart.
const MAX_KINDS: usize = 20;

/// Everything counted so far.
#[derive(Debug)]
pub(super) struct Tally {
    started: Micros,
    took: Micros,
    sent: u64,
    done: u64,
    /// Answered within both objectives.
    good: u64,
    rejected: BTreeMap<String, u64>,
    failed: BTreeMap<String, u64>,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    /// In microseconds.
    times: [Histogram<u64>; 5],
}

/// Names of the histograms: time to first token, between two, per token after the first, whole request, a refusal.
const NAMES: [&str; 5] = ["ttft", "itl", "tpot", "e2e", "refusal"];
const TTFT: usize = 0;
const ITL: usize = 1;
const TPOT: usize = 2;
const E2E: usize = 3;
const REJECTED: usize = 4;
/// Percentiles of the table.
const PERCENTILES: [f64; 4] = [50.0, 90.0, 95.0, 99.0];

impl Tally {
    pub(super) fn start(now: Micros) -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, HOUR_US, 3).unwrap_or_else(|e| unreachable!("good bounds: {e}"));
        Self {
            started: now,
            took: 0,
            sent: 0,
            done: 0,
            good: 0,
            rejected: BTreeMap::new(),
            failed: BTreeMap::new(),
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            times: std::array::from_fn(|_| histogram()),
        }
    }

    /// Counts a request.
    pub(super) fn add(&mut self, outcome: Outcome, args: &BenchArgs) {
        match outcome {
            Outcome::Done(times) => self.add_done(&times, args),
            Outcome::Rejected(reason, time) => {
                count(&mut self.rejected, reason);
                self.times[REJECTED].saturating_record(time);
            }
            Outcome::Failed(why) => count(&mut self.failed, why),
        }
    }

    fn add_done(&mut self, times: &Times, args: &BenchArgs) {
        let usage = times.usage;
        self.done += 1;
        self.prompt_tokens += usage.prompt_tokens;
        self.cached_tokens += usage.prompt_tokens_details.unwrap_or_default().cached_tokens;
        self.output_tokens += usage.completion_tokens;
        self.times[E2E].saturating_record(times.whole);
        times.gaps.iter().for_each(|&gap| self.times[ITL].saturating_record(gap));
        // Without a stream the whole answer is the first thing that a client sees.
        let first = times.first.unwrap_or(times.whole);
        self.times[TTFT].saturating_record(first);
        let after = usage.completion_tokens.saturating_sub(1);
        let per_token = (times.whole - first).checked_div(after);
        if let Some(per_token) = per_token.filter(|_| times.first.is_some()) {
            self.times[TPOT].saturating_record(per_token);
        }
        let is_good = first <= args.slo_ttft_ms * 1_000 && per_token.unwrap_or(0) <= args.slo_tpot_ms * 1_000;
        self.good += u64::from(is_good);
    }

    /// No more will come.
    pub(super) fn end(&mut self, sent: u64, now: Micros) {
        (self.sent, self.took) = (sent, now - self.started);
    }

    /// Why not one request was answered, if so.
    pub(super) fn nothing_done(&self) -> Option<String> {
        let told = self.failed.keys().next().cloned();
        let told = told.or_else(|| self.rejected.keys().next().map(|reason| format!("rejected ({reason})")));
        (self.done == 0).then(|| told.unwrap_or_else(|| "none ended in time".to_owned()))
    }

    /// The progress, in a line.
    pub(super) fn line(&self, requests: u64, now: Micros) -> String {
        let (rejected, failed) = (sum(&self.rejected), sum(&self.failed));
        let ended = self.done + rejected + failed;
        let left = if self.took > 0 { "\n" } else { "" };
        let time = seconds(now - self.started);
        format!("{ended} of {requests} requests, {rejected} rejected, {failed} failed, {time:.0} s{left}")
    }

    fn per_second(&self, n: u64) -> f64 {
        n as f64 / seconds(self.took.max(1))
    }

    fn unfinished(&self) -> u64 {
        self.sent - (self.done + sum(&self.rejected) + sum(&self.failed)).min(self.sent)
    }

    /// For a person.
    pub(super) fn table(&self, args: &BenchArgs) -> String {
        let mut text = String::new();
        let load = match args.rate {
            Some(rate) => format!("open loop, {rate} requests/s"),
            None => format!("closed loop, {} clients", args.concurrency),
        };
        let mut row = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:<22} {value}");
        };
        row("load", format!("{load}, shape {}, seed {}", args.shape, args.seed));
        row("time", format!("{:.2} s", seconds(self.took)));
        row("requests", format!("{} sent, {} answered, {} unfinished", self.sent, self.done, self.unfinished()));
        for (what, kinds) in [("rejected", &self.rejected), ("failed", &self.failed)] {
            kinds.iter().for_each(|(why, n)| row(what, format!("{n}  {why}")));
        }
        row(
            "tokens",
            format!("{} prompt ({} cached), {} output", self.prompt_tokens, self.cached_tokens, self.output_tokens),
        );
        row("requests/s", format!("{:.2}", self.per_second(self.done)));
        let within = format!("(ttft <= {} ms, per token <= {} ms)", args.slo_ttft_ms, args.slo_tpot_ms);
        row("goodput, requests/s", format!("{:.2}  {within}", self.per_second(self.good)));
        row("output tokens/s", format!("{:.1}", self.per_second(self.output_tokens)));
        let heads = ["mean", "p50", "p90", "p95", "p99", "max"];
        row("milliseconds", heads.map(|head| format!("{head:>10}")).concat());
        for (name, times) in NAMES.iter().zip(&self.times).filter(|(_, times)| !times.is_empty()) {
            let mut values = vec![times.mean()];
            values.extend(PERCENTILES.iter().map(|&p| times.value_at_percentile(p) as f64));
            values.push(times.max() as f64);
            row(name, values.iter().map(|us| format!("{:>10.3}", us / 1e3)).collect());
        }
        text
    }

    /// For a script.
    pub(super) fn json(&self, args: &BenchArgs) -> Value {
        let times = |times: &Histogram<u64>| {
            let p = |p: f64| times.value_at_percentile(p) as f64 / 1e3;
            json!({
                "count": times.len(), "mean": times.mean() / 1e3, "p50": p(50.0), "p90": p(90.0), "p95": p(95.0), "p99": p(99.0),
                "max": times.max() as f64 / 1e3,
            })
        };
        let ms: serde_json::Map<String, Value> =
            NAMES.iter().zip(&self.times).map(|(name, t)| (format!("{name}_ms"), times(t))).collect();
        json!({
            "url": args.url, "rate": args.rate, "concurrency": args.rate.is_none().then_some(args.concurrency),
            "shape": args.shape.to_string(), "seed": args.seed, "seconds": seconds(self.took), "sent": self.sent,
            "answered": self.done, "unfinished": self.unfinished(), "rejected": self.rejected, "failed": self.failed,
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "output_tokens": self.output_tokens,
            "requests_per_second": self.per_second(self.done), "goodput_per_second": self.per_second(self.good),
            "output_tokens_per_second": self.per_second(self.output_tokens),
            "slo": { "ttft_ms": args.slo_ttft_ms, "tpot_ms": args.slo_tpot_ms }, "latency": ms,
        })
    }
}

fn sum(kinds: &BTreeMap<String, u64>) -> u64 {
    kinds.values().sum()
}

/// Counts by kind; beyond so many kinds, as `others`.
fn count(kinds: &mut BTreeMap<String, u64>, kind: String) {
    let kind = if kinds.len() < MAX_KINDS || kinds.contains_key(&kind) { kind } else { "others".to_owned() };
    *kinds.entry(kind).or_default() += 1;
}
