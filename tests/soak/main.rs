//! A host under mixed traffic for as long as it is told: streams, whole answers, choices, forms, clients that leave or cancel, and
//! some that ask for models which come and go, while an operator swaps policies, reweighs the alias, loads a model and unloads it.
//! At the end nothing is held, nothing was refused without a reason, no policy was at fault, and memory with the same models is what
//! it was after the warm-up. Times are printed, not asserted: they are the machine's.
//!
//! `SOAK_SECONDS` says how long, 20 s where it says nothing.

mod operator;
mod traffic;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pointsman_tests::{Host, raw, root};
use serde_json::{Value, json};
use tempfile::TempDir;

use traffic::Tally;

/// Models that requests bring.
const LAZY: [&str; 2] = ["lazy", "idle"];
/// Clients; about half of what two cores serve.
const CLIENTS: u64 = 4;
/// Share of the time after which memory counts, in percent.
const WARM_UP: u32 = 40;
/// Growth after the warm-up, in bytes, over runs long enough to tell: of an hour, and of minutes, in which pools and heaps of models
/// that come and go are still to come to their size.
const MAX_GROWTH: [(Duration, i64); 2] =
    [(Duration::from_secs(3_600), 10_000_000), (Duration::from_secs(60), 32_000_000)];

#[expect(clippy::disallowed_methods, reason = "how long it runs is told from outside")]
fn duration() -> Duration {
    let told = std::env::var("SOAK_SECONDS").ok();
    let seconds = told.map_or(20, |text| text.parse().unwrap_or_else(|_| panic!("SOAK_SECONDS = {text}: seconds")));
    Duration::from_secs(seconds)
}

#[expect(clippy::disallowed_methods, reason = "it runs for a time, and tells times")]
fn now() -> Instant {
    Instant::now()
}

/// Traffic and changes until the time is over; what the clients saw, how many changes there were, and by how many bytes memory
/// has grown since the warm-up.
fn run(host: &Host, folder: &Path, duration: Duration) -> (Tally, u64, i64) {
    let (ending, ended) = mpsc::channel();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|seed| {
                let (ending, is_over) = (ending.clone(), &is_over);
                scope.spawn(move || traffic::client(host, seed, is_over, &ending))
            })
            .collect();
        drop(ending);
        let started = now();
        let (mut changes, mut warm) = (operator::Changes::new(host, folder), None);
        // The operator's clock is the traffic: a change every so many requests. The clients end when nobody listens to them.
        for () in ended {
            let passed = started.elapsed();
            // On a slow machine the operator is behind; what it had left to do ends with the time.
            if passed <= duration {
                changes.after_a_request();
            }
            if warm.is_none() && passed > duration * WARM_UP / 100 {
                warm = Some(changes.resident_bytes());
            }
            is_over.store(passed > duration, Ordering::Relaxed);
        }
        let mut tally = Tally::new();
        clients.into_iter().for_each(|client| tally.add(client.join().expect("a client's thread")));
        raw::rests(host);
        let warm = warm.expect("it ran for longer than the warm-up");
        (tally, changes.made(), changes.resident_bytes().cast_signed() - warm.cast_signed())
    })
}

/// The small demo model, as a model of another name would lie on a disk.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let from = root().join("host/app/demo");
    let own =
        ["config.json", "generation_config.json", "model.safetensors"].map(|file| from.join("demo-mini").join(file));
    let shared = ["tokenizer.json", "tokenizer_config.json"].map(|file| from.join(file));
    for file in own.iter().chain(&shared) {
        let name = file.file_name().expect("a file");
        std::fs::copy(file, folder.path().join(name)).expect("a file of the demo");
    }
    folder
}

fn counters(host: &Host, name: &str) -> Vec<String> {
    let metrics = host.get("/metrics").body;
    let lines = metrics.as_str().unwrap_or_default().lines().filter(|line| line.starts_with(name));
    lines.filter(|line| !line.ends_with(" 0")).map(str::to_owned).collect()
}

fn total(host: &Host, name: &str) -> f64 {
    counters(host, name).iter().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Share of the steps for which an instance of the scheduler's policy was there in time.
#[expect(clippy::print_stdout, reason = "the figures are what a soak is for")]
fn plans_found(host: &Host) -> f64 {
    let steps = total(host, "pointsman_step_seconds_count");
    let share = 1.0 - total(host, "pointsman_policy_fallbacks_total{slot=\"scheduler\"}") / steps;
    println!("{steps} steps, {:.2} % of them with a plan of the policy's instance", share * 100.0);
    share
}

/// The share of requests for which the pool had an instance of the router's policy.
#[expect(clippy::print_stdout, reason = "the figures are what a soak is for")]
fn routes_found(host: &Host, requests: u64) -> f64 {
    let share = 1.0 - total(host, "pointsman_policy_fallbacks_total{slot=\"router\"}") / requests as f64;
    println!("{requests} requests, {:.2} % of them routed by an instance of the pool", share * 100.0);
    share
}

#[test]
fn a_host_lives_through_mixed_traffic_and_swaps() {
    let duration = duration();
    let folder = folder();
    // Small pools and caches: they are full before memory counts. Of three models that come and go there are two at a time.
    let config = format!(
        "[engine]\nkv_mib = 8\nmodel_dirs = [{0:?}]\nmax_loaded = 2\nload_wait_ms = 600000\n[server]\nresponse_cache_mib = 1\n\
         [policy]\nexplain_requests = 64\n[on_demand]\n{1} = {0:?}\n{2} = {0:?}\n",
        folder.path().display().to_string(),
        LAZY[0],
        LAZY[1]
    );
    let host = Host::shipped(env!("CARGO_BIN_EXE_pointsman-under-test"), &config, &[]);
    let (tally, changes, growth) = run(&host, folder.path(), duration);
    tally.print(changes, growth);
    let (found, routed) = (plans_found(&host), routes_found(&host, tally.done));
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    assert!(tally.done > 0 && tally.left > 0 && changes > 0, "{} requests, {} left", tally.done, tally.left);
    assert!(tally.cancelled > 0, "no DELETE has ended its request");
    for name in [
        "pointsman_policy_faults_total",
        "pointsman_rejected_total",
        "pointsman_models_loads_total{outcome=\"failed\"}",
    ] {
        assert_eq!(counters(&host, name), Vec::<String>::new(), "nothing of this was injected");
    }
    assert!(routed > 0.8, "of the requests only {routed} were routed by the policy");
    assert!(found > 0.8, "of the steps only {found} had their plan of the policy");
    assert_eq!(host.get("/ready").body, json!({ "status": "ready" }), "nothing is degraded");
    let limit = MAX_GROWTH.into_iter().find(|(least, _)| duration >= *least);
    assert!(limit.is_none_or(|(_, most)| growth < most), "memory grew by {growth} bytes after the warm-up");
    let drained = host.admin("POST", "/admin/v1/drain", &Value::Null).body;
    assert_eq!(drained, json!({ "drained": true, "in_flight": 0 }));
}
