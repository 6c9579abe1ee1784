//! Policies are swapped while requests flow: no request fails, no token changes, no memory is lost.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pointsman_tests::{Host, Streamed};
use serde_json::{Value, json};

use crate::host;

/// Concurrent streams.
const STREAMS: usize = 64;
/// Swaps of each slot while they run.
const SWAPS: usize = 100;

fn request(stream: usize) -> Value {
    let starts = [
        "Ownership is",
        "A trait is",
        "The borrow checker",
        "When you run cargo build,",
        "Iterators are",
        "A lifetime",
    ];
    let prompt = format!("{} {}", starts[stream % starts.len()], "the ".repeat(stream % 7));
    json!({ "model": "demo:f16", "prompt": prompt, "temperature": 0, "max_tokens": 24 + stream % 40, "ignore_eos": true })
}

/// Runs every stream once, each on a thread of its own.
fn run_all(host: &Host) -> Vec<Streamed> {
    std::thread::scope(|scope| {
        let spawn = |stream| scope.spawn(move || host.stream(&request(stream)));
        let running: Vec<_> = (0..STREAMS).map(spawn).collect();
        let join = |(stream, thread): (usize, std::thread::ScopedJoinHandle<'_, Result<Streamed, String>>)| {
            thread.join().expect("no panic").unwrap_or_else(|e| panic!("stream {stream} failed: {e}"))
        };
        running.into_iter().enumerate().map(join).collect()
    })
}

/// Swaps a slot between two built-ins `SWAPS` times; the highest generation it reached.
fn swap_back_and_forth(host: &Host, slot: &str, components: [&str; 2]) -> u64 {
    let digests = components.map(|name| host.builtin(name));
    let mut generation = 0;
    for swap in 0..SWAPS {
        let answer = host.activate(slot, &digests[swap % 2], json!({}));
        assert_eq!(answer.status, 200, "swap {swap} of {slot}: {answer:?}");
        let now = answer.body["generation"].as_u64().expect("a generation");
        assert!(now > generation, "generations grow: {generation} -> {now}");
        generation = now;
    }
    generation
}

#[test]
fn streams_are_the_same_while_router_and_scheduler_are_swapped_a_hundred_times() {
    let host = host(&[]);
    let alone: Vec<Streamed> =
        (0..STREAMS).map(|stream| host.stream(&request(stream)).expect("it is served")).collect();
    let swapping = AtomicBool::new(true);
    let rounds = AtomicU64::new(0);
    let seen = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            // Until the swaps are done, and once more at least, so that every swap meets requests in flight.
            while rounds.load(Ordering::Acquire) == 0 || swapping.load(Ordering::Acquire) {
                for (stream, (beside, alone)) in run_all(&host).iter().zip(&alone).enumerate() {
                    assert_eq!((&beside.tokens, &beside.text), (&alone.tokens, &alone.text), "stream {stream}");
                    let (revision, generation) = beside.router.split_once(";g=").expect("<revision>;g=<generation>");
                    assert!(revision.starts_with("route-"), "{revision}");
                    let generation = generation.parse::<u64>().expect("a number");
                    seen.lock().expect("no panic").insert(generation);
                }
                rounds.fetch_add(1, Ordering::AcqRel);
            }
        });
        let router = scope.spawn(|| swap_back_and_forth(&host, "router", ["route-weighted", "route-least-loaded"]));
        let scheduler =
            scope.spawn(|| swap_back_and_forth(&host, "scheduler", ["sched-priority", "sched-shortest-first"]));
        let generations = [router.join(), scheduler.join()];
        // Also when a swap was refused: the load must end, or nobody hears of it.
        swapping.store(false, Ordering::Release);
        let generations = generations.map(|generation| generation.expect("no panic"));
        load.join().expect("every stream equals its unswapped run");
        assert!(generations.iter().all(|g| *g > SWAPS as u64), "{generations:?}");
        let seen = seen.lock().expect("no panic").len();
        assert!(seen > 1, "requests met more than one generation of the router: {seen}");
    });
    let metrics = host.get("/metrics").body;
    let text = metrics.as_str().expect("text");
    for slot in ["router", "scheduler"] {
        let swaps = format!("pointsman_swap_seconds_count{{slot=\"{slot}\"}} {}", SWAPS + 1);
        assert!(text.lines().any(|l| l == swaps), "every publish is counted once: {swaps}");
        let state = host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null).body;
        let faults: u64 =
            state["counters"]["faults"].as_object().map_or(0, |f| f.values().filter_map(Value::as_u64).sum());
        assert_eq!(faults, 0, "{state}");
    }
}

#[test]
fn a_thousand_swaps_leave_memory_flat() {
    let host = host(&[]);
    let digests = ["route-weighted", "route-least-loaded"].map(|name| host.builtin(name));
    let swap = |n: usize| {
        for i in 0..n {
            assert_eq!(host.activate("router", &digests[i % 2], json!({})).status, 200);
            if i % 50 == 0 {
                host.stream(&request(i)).expect("it is served");
            }
        }
    };
    // The allocator, the instance pool and the journal's memory reach their size first.
    swap(200);
    let before = host.resident_bytes();
    swap(1_000);
    let grown = host.resident_bytes().saturating_sub(before);
    assert!(grown < 10_000_000, "1,000 swaps grew resident memory by {grown} bytes");
}

#[test]
fn a_router_is_uploaded_obeyed_and_rolled_back() {
    let host = host(&[]);
    let before = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    // A core module that carries its component type is as good as a component.
    let core_module = pointsman_tests::root().join("plugins/prebuilt/route-least-loaded.core.wasm");
    let bytes = std::fs::read(core_module).expect("a core module");
    let first = host.send(
        "POST",
        &format!("{}/admin/v1/components", host.admin),
        &[("content-type", "application/wasm")],
        &bytes,
    );
    assert_eq!(first.status, 201, "{first:?}");
    // 0: it encodes to the built-in component, which is compiled already.
    assert_eq!(first.body["compile_ms"], json!(0.0), "{first:?}");
    let uploaded = host.upload(&bytes);
    assert_eq!(first.body["digest"], json!(uploaded), "uploads are idempotent");
    assert_eq!(host.activate("router", &uploaded, json!({})).status, 200);
    // Sticky by session: a session keeps its replica.
    let activated = host.activate("router", &host.builtin("route-weighted"), json!({}));
    assert_eq!(activated.status, 200, "{activated:?}");
    let revision = activated.body["revision"].as_str().expect("a revision").to_owned();
    let send = |session: &str| {
        let url = format!("{}/v1/completions", host.data);
        let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }).to_string();
        let headers = [("content-type", "application/json"), ("x-session-id", session)];
        let answer = host.send("POST", &url, &headers, body.as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        let header = |name: &str| answer.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        assert!(header("x-pointsman-router").starts_with(&format!("{revision};g=")), "{answer:?}");
        header("x-pointsman-replica")
    };
    let mut seen = BTreeSet::new();
    for session in 0..16 {
        let name = format!("session-{session}");
        let replica = send(&name);
        assert_eq!(send(&name), replica, "{name} moved");
        seen.insert(replica);
    }
    assert_eq!(seen.len(), 2, "sessions spread over both variants: {seen:?}");
    let rolled_back = host.admin("POST", "/admin/v1/slots/router/rollback", &Value::Null);
    assert_eq!(rolled_back.status, 200, "{rolled_back:?}");
    let active = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    assert_eq!((&active["component"], &active["generation"]), (&json!(uploaded), &rolled_back.body["generation"]));
    assert_ne!(before["active"]["component"], active["component"]);
}
