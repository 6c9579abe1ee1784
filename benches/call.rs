//! One routing decision, end to end through `RoutePolicy::route`: taking a warm instance, lowering the columns, the guest's
//! decision, checking the answer, metrics. Bar: 1.5 us at 8 replicas (goal 1 us). And the boundary alone: 1,024 rows of 11
//! columns handed to a guest that reads none of them; bar 5 us. And what a shadow adds: a load while it is paused, a copy of
//! the inputs where it is asked about everything.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;
use std::time::Duration;

use pointsman::inputs::{replicas, request};
use pointsman_benches::{Percentiles, Samples, each_call, header, now};
use pointsman_policy::{Activation, Component, Maintenance, Role, Runtime, RuntimeConfig, Slot};
use pointsman_sched::route::{Choice, NativeRouter, ReplicaColumns, RoutePolicy};
use pointsman_telemetry::{Metrics, Recorder};

fn time(policy: &dyn RoutePolicy, replicas: &ReplicaColumns, expect_pick: bool) -> Percentiles {
    let mut seed = 0;
    each_call(20_000, 200_000, || {
        seed += 1;
        let routed = policy.route(seed, &request(seed), replicas);
        assert!(
            routed.fallback.is_none() && (matches!(routed.choice, Choice::Pick(_) | Choice::Rank(_)) || !expect_pick)
        );
    })
}

fn main() {
    header("call: one routing decision through the wasm boundary");
    let start = now();
    let clock = Arc::new(move || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) + 1);
    let config = RuntimeConfig { recycle_calls: u64::MAX, ..RuntimeConfig::default() };
    let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(1_024), clock);
    let runtime = runtime.unwrap_or_else(|e| panic!("{e}"));
    each_call(10_000, 100_000, || ()).print("the clock itself", None);
    time(&NativeRouter, &replicas(8, &[]), false).print("native, 8 replicas", None);
    let slot = runtime.router_slot("router");
    for (generation, name) in (1u64..).zip(["route-least-loaded", "route-prefix-aware", "route-weighted"]) {
        activate(&runtime, &*slot, generation, (name, "{}"));
        for n in [1, 8, 64, 512] {
            let bar = (n == 8).then_some(Duration::from_nanos(1_500));
            time(&*slot, &replicas(n, &[]), true).print(&format!("{name}, {n} replicas"), bar);
        }
    }
    activate(&runtime, &*slot, 4, ("fixture-router", r#"{"do": "abstain"}"#));
    let boundary = time(&*slot, &replicas(1_024, &[]), false);
    boundary.print("boundary alone, 1,024 rows of 11 columns", Some(Duration::from_micros(5)));
    shadow();
}

/// The same calls with a shadow beside them. Maintenance is by hand, so that its thread's work is between the calls.
fn shadow() {
    let config =
        RuntimeConfig { recycle_calls: u64::MAX, maintenance: Maintenance::Manual, ..RuntimeConfig::default() };
    let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(1_024), Arc::new(|| 1));
    let runtime = runtime.unwrap_or_else(|e| panic!("{e}"));
    let slot = runtime.router_slot("router");
    activate(&runtime, &*slot, 1, ("route-least-loaded", "{}"));
    let activation = Activation { slot: "router".into(), generation: 2, role: Role::Shadow, ..Activation::default() };
    let activation = Activation { config: "{}".into(), ..activation };
    let prepared = runtime.prepare(&admit(&runtime, "route-least-loaded"), activation);
    slot.stage(prepared.unwrap_or_else(|e| panic!("{e}"))).unwrap_or_else(|e| panic!("{e}"));
    for n in [8, 64] {
        for (share_ppm, what) in
            [(0, "a paused shadow"), (100_000, "a shadow of 10 %"), (1_000_000, "a shadow of everything")]
        {
            slot.shadow(share_ppm).unwrap_or_else(|e| panic!("{e}"));
            let (columns, mut samples) = (replicas(n, &[]), Samples::default());
            for seed in 1..=200_000 {
                let request = request(seed);
                let start = now();
                let routed = slot.route(seed, &request, &columns);
                samples.add(start.elapsed());
                assert!(routed.fallback.is_none());
                if seed % 128 == 0 {
                    runtime.maintain();
                }
            }
            samples.percentiles().print(&format!("route-least-loaded, {n} replicas, with {what}"), None);
        }
    }
    // Decisions back to back leave the shadow's thread behind now and then; what it drops was not copied.
    let dropped = slot.compared().map_or(0, |compared| compared.dropped);
    println!("decisions that a shadow dropped, of 440,000 that were sampled: {dropped}");
}

/// Makes a committed guest the active one.
fn activate(runtime: &Runtime, slot: &dyn Slot, generation: u64, (name, config): (&str, &str)) {
    let component = admit(runtime, name);
    let activation = Activation { slot: "router".into(), generation, config: config.into(), ..Activation::default() };
    let prepared = runtime.prepare(&component, activation).unwrap_or_else(|e| panic!("{name}: {e}"));
    slot.publish(prepared).unwrap_or_else(|e| panic!("{name}: {e}"));
}

fn admit(runtime: &Runtime, name: &str) -> Component {
    let path = pointsman_tests::root().join(format!("plugins/prebuilt/{name}.wasm"));
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{name}: {e}"));
    runtime.admit(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"))
}
