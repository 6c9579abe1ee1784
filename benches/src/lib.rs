//! What the benchmarks share: a header that says machine and commit, percentiles of repeated calls, and plans for an engine.
//!
//! Plain programs (`harness = false`) instead of a statistics framework: most of them measure whole operations of
//! milliseconds against bars that are percentiles, and print them side by side in one run. Calls of a microsecond are timed
//! one by one; the cost of the clock itself is measured and printed, not subtracted.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

pub mod synthetic;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pointsman_sched::execute::{Row, Sample, StepPlan};
use pointsman_sched::ids::{BlockId, RequestId};
use pointsman_sched::request::Sampling;

/// Percentiles of one measurement, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Percentiles {
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Smallest.
    pub min: u64,
    /// Number of samples.
    pub n: u64,
}

/// Prints what is measured, where and on which commit.
pub fn header(title: &str) {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        cpu.lines().find(|l| l.starts_with(name)).and_then(|l| l.split_once(": ")).map_or("unknown", |(_, v)| v)
    };
    let flag = |name: &str| if cpu.contains(name) { format!(" {name}") } else { String::new() };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let commit = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=10"]).output();
    let commit = commit.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    println!("# {title}");
    println!(
        "machine: {} (model {}), {cores} cores,{}{}{}{}; commit {}",
        field("model name"),
        field("model\t"),
        flag("avx2"),
        flag("avx512f"),
        flag("avx512_vnni"),
        flag("amx_int8"),
        commit.trim()
    );
}

/// Now; the benchmarks are the one place besides the app that reads a clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Times `n` calls one by one, after `warm_up` calls.
pub fn each_call(warm_up: usize, n: usize, mut call: impl FnMut()) -> Percentiles {
    for _ in 0..warm_up {
        call();
    }
    let mut samples = Samples::default();
    for _ in 0..n {
        let start = now();
        call();
        samples.add(start.elapsed());
    }
    samples.percentiles()
}

/// `rows` sequences, each computing `n` tokens from `position` on.
#[must_use]
pub fn plan(rows: u32, position: u32, n: u32) -> StepPlan {
    let mut plan = StepPlan::default();
    let per_row = (position + n).div_ceil(16);
    for row in 0..rows {
        plan.tokens.extend((0..n).map(|i| (7 * row + 31 * i + 11) % 2_000));
        plan.blocks.extend((row * per_row..(row + 1) * per_row).map(BlockId));
        let sampling = Arc::new(Sampling::default());
        plan.rows.push(Row {
            request: RequestId(u64::from(row) + 1),
            tokens: row * n..(row + 1) * n,
            position,
            blocks: row * per_row..(row + 1) * per_row,
            sample: Some(Sample { sampling, index: 0, history: 0..0, history_prompt: 0, banned: None }),
            drafts: 0,
        });
    }
    plan
}

/// Longest duration that can be counted.
const HOUR_NS: u64 = 3_600_000_000_000;

/// Durations, counted by value.
#[derive(Debug)]
pub struct Samples {
    histogram: Histogram<u64>,
}

impl Default for Samples {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, HOUR_NS, 3).unwrap_or_else(|e| unreachable!("good bounds: {e}"));
        Self { histogram }
    }
}

impl Samples {
    /// Counts one duration.
    pub fn add(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.histogram.record(nanos).unwrap_or_else(|e| panic!("{took:?} is out of bounds: {e}"));
    }

    /// What was counted.
    #[must_use]
    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            p50: self.histogram.value_at_quantile(0.5),
            p99: self.histogram.value_at_quantile(0.99),
            min: self.histogram.min(),
            n: self.histogram.len(),
        }
    }
}

impl Percentiles {
    /// Prints one line: name, percentiles in a readable unit, and the bar where there is one.
    pub fn print(&self, name: &str, bar: Option<Duration>) {
        let verdict = bar.map_or(String::new(), |bar| {
            let met = u128::from(self.p50) <= bar.as_nanos();
            format!(
                "   bar {} {}",
                readable(u64::try_from(bar.as_nanos()).unwrap_or(u64::MAX)),
                if met { "met" } else { "MISSED" }
            )
        });
        println!(
            "{name:<58} p50 {:>9}   p99 {:>9}   min {:>9}   n {:>6}{verdict}",
            readable(self.p50),
            readable(self.p99),
            readable(self.min),
            self.n
        );
    }
}

/// Nanoseconds in the unit that people read.
#[must_use]
pub fn readable(nanos: u64) -> String {
    let value = nanos as f64;
    match nanos {
        0..=999 => format!("{nanos} ns"),
        1_000..=999_999 => format!("{:.2} us", value / 1e3),
        1_000_000..=999_999_999 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_samples() {
        let mut samples = Samples::default();
        for micros in 1..=1_000 {
            samples.add(Duration::from_micros(micros));
        }
        let Percentiles { p50, p99, min, n } = samples.percentiles();
        let near = |found: u64, expect: u64| found.abs_diff(expect) <= expect / 500;
        assert!(near(p50, 500_000) && near(p99, 990_000) && near(min, 1_000) && n == 1_000, "{p50} {p99} {min} {n}");
        assert_eq!([readable(17), readable(1_500), readable(2_500_000)], ["17 ns", "1.50 us", "2.50 ms"]);
    }
}
