//! How long a call takes, end to end through the seams: `cargo run --release -p pointsman-policy --example timing`.
//!
//! Prints medians and 99th percentiles of single calls, timed one by one (the timer itself costs about 25 ns). The
//! benches proper live in benches/.
#![expect(clippy::print_stdout, reason = "a program for people")]
#![expect(clippy::disallowed_methods, reason = "it measures time")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use pointsman_policy::{Activation, Component, Runtime, RuntimeConfig, Slot};
use pointsman_sched::batch::{BatchPolicy, Budgets, Changes, Plan, SequenceColumns, View};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{ReplicaColumns, RoutePolicy, RouteRequest};
use pointsman_telemetry::{Metrics, Recorder};

const CALLS: usize = 20_000;

fn main() -> Result<(), Box<dyn Error>> {
    let origin = Instant::now();
    let clock = Arc::new(move || u64::try_from(origin.elapsed().as_micros()).unwrap_or(u64::MAX) + 1);
    let config = RuntimeConfig::default();
    let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(1_024), clock)?;
    println!("instances: {:?}", runtime.allocation());
    for name in ["route-least-loaded", "route-prefix-aware", "route-weighted"] {
        router(&runtime, name)?;
    }
    for name in ["sched-fcfs", "sched-shortest-first"] {
        scheduler(&runtime, name)?;
    }
    Ok(())
}

fn admit(runtime: &Runtime, name: &str) -> Result<Component, Box<dyn Error>> {
    let path = format!("{}/../../plugins/prebuilt/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    Ok(runtime.admit(&std::fs::read(path)?)?)
}

fn activation(slot: &str, generation: u64) -> Activation {
    Activation { slot: slot.to_owned(), generation, config: "{}".to_owned(), namespace: None }
}

/// Times `call` one by one and prints p50 and p99 in nanoseconds.
fn time(what: &str, mut call: impl FnMut(usize)) {
    (0..CALLS / 10).for_each(&mut call);
    let mut times: Vec<u128> = (0..CALLS)
        .map(|i| {
            let started = Instant::now();
            call(i);
            started.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    println!("  {what:32} p50 {:>7} ns  p99 {:>7} ns", times[CALLS / 2], times[CALLS * 99 / 100]);
}

fn router(runtime: &Runtime, name: &str) -> Result<(), Box<dyn Error>> {
    let slot = runtime.router_slot("router");
    let component = admit(runtime, name)?;
    let first = slot.publish(runtime.prepare(&component, activation("router", 1))?)?;
    let second = slot.publish(runtime.prepare(&component, activation("router", 2))?)?;
    println!(
        "{}: compile {:.1} ms, warm {:.1} ms, swap {:.2} us",
        first.revision, component.compile_ms, second.warm_ms, second.publish_us
    );
    for n in [1_u32, 8, 64, 512] {
        let columns = replicas(n);
        time(&format!("route, {n} replicas"), |i| {
            let routed = slot.route(1_000, &request(i as u64), &columns);
            assert!(!routed.fallback);
        });
    }
    Ok(())
}

fn scheduler(runtime: &Runtime, name: &str) -> Result<(), Box<dyn Error>> {
    let slot = runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    let component = admit(runtime, name)?;
    let published = slot.publish(runtime.prepare(&component, activation("scheduler", 1))?)?;
    println!("{}:", published.revision);
    let budgets =
        Budgets { step_tokens: 2_048, running: 64, free_blocks: 500, total_blocks: 1_000, ..Budgets::default() };
    for waiting in [128_u64, 1_024, 8_192] {
        slot.publish(runtime.prepare(&component, activation("scheduler", waiting * 2))?)?;
        guest.attend(1);
        let (queue, running) = (sequences(1, waiting), SequenceColumns::default());
        guest.resync(&View { now: 1, seed: 1, budgets: &budgets, tenants: &[], waiting: &queue, running: &running });
        let (mut plan, mut changes, mut next) = (Plan::default(), Changes::default(), waiting + 1);
        time(&format!("step, {waiting} wait, no change"), |_| {
            plan.clear();
            guest.step(2, &budgets, &changes, &mut plan);
        });
        time(&format!("step, {waiting} wait, 16 in, 16 out"), |_| {
            plan.clear();
            changes.clear();
            changes.arrived = sequences(next, 16);
            changes.gone.extend(next - 16..next);
            if next == waiting + 1 {
                changes.gone.clear();
            }
            next += 16;
            guest.step(2, &budgets, &changes, &mut plan);
        });
    }
    Ok(())
}

fn request(id: u64) -> RouteRequest<'static> {
    RouteRequest {
        id: RequestId(id + 1),
        model: "demo",
        tenant: "acme",
        tenant_id: 1,
        session: id,
        prefix: id,
        priority: Priority::Normal,
        prompt_tokens: 128,
        max_new_tokens: 64,
        arrived: 1_000,
        deadline: 0,
        seed: id.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        attributes: &[],
    }
}

fn replicas(n: u32) -> ReplicaColumns {
    let column = |value: fn(u32) -> u32| (0..n).map(value).collect::<Vec<u32>>();
    ReplicaColumns {
        id: column(|i| i + 1),
        key: (0..n).map(|i| u64::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect(),
        health: vec![0; n as usize],
        weight: column(|_| 1_000),
        waiting: column(|i| i % 5),
        running: column(|i| i % 7),
        running_limit: column(|_| 16),
        queued_tokens: column(|i| (i * 37) % 1_000),
        free_blocks: column(|_| 500),
        total_blocks: column(|_| 1_000),
        cached_tokens: column(|i| (i % 3) * 16),
        device: vec![0; n as usize],
        variant: vec![1; n as usize],
    }
}

fn sequences(first: u64, n: u64) -> SequenceColumns {
    let ids: Vec<u64> = (first..first + n).collect();
    let n = ids.len();
    SequenceColumns {
        prompt_tokens: ids.iter().map(|id| u32::try_from(id * 37 % 1_000).unwrap_or(0) + 1).collect(),
        arrived: ids.clone(),
        id: ids,
        cached_tokens: vec![0; n],
        computed_tokens: vec![0; n],
        generated_tokens: vec![0; n],
        max_new_tokens: vec![32; n],
        held_blocks: vec![0; n],
        priority: vec![2; n],
        tenant: vec![1; n],
        deadline: vec![0; n],
    }
}
