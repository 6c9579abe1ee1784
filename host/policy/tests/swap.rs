//! Swapping under load: nobody sees a dropped generation; a guest that leaks or grows old is replaced.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pointsman_policy::{Maintenance, Slot};
use pointsman_sched::route::{Choice, RoutePolicy};
use support::{Bench, replicas, request};

#[test]
#[expect(clippy::disallowed_methods, reason = "a wait for another thread, with a bound")]
fn readers_never_see_a_dropped_generation() {
    const SWAPS: u64 = 200;
    let bench = Bench::with(|config| {
        config.maintenance = Maintenance::Thread;
        config.router_instances = 4;
        config.max_instances = 256;
        // None wears out while the maintenance thread is put aside.
        config.recycle_calls = u64::MAX;
    });
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let columns = replicas(8, 3);
                    let (mut last, mut calls) = (0, 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        let routed = slot.route(1, &request(calls), &columns);
                        assert_eq!(routed.choice, Choice::Pick(3));
                        assert!(routed.decided_by.generation >= last, "time does not run backwards");
                        last = routed.decided_by.generation;
                        calls += 1;
                    }
                    calls
                })
            })
            .collect();
        for _ in 0..SWAPS {
            slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
        }
        stop.store(true, Ordering::Relaxed);
        let calls: u64 = readers.into_iter().map(|reader| reader.join().expect("no panic")).sum();
        println!("{calls} calls during {SWAPS} swaps");
    });
    let status = slot.status();
    assert_eq!((status.swaps, status.generation), (SWAPS + 1, SWAPS + 1));
    assert_eq!((status.fallbacks, status.faults), (0, [0; 5]));
    // The maintenance thread may hold several that it has taken and not dropped yet.
    let since = Instant::now();
    while slot.status().draining > 0 {
        assert!(since.elapsed() < Duration::from_secs(120), "every replaced generation is freed");
        bench.runtime.maintain();
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_that_leaks_is_recycled() {
    let bench = Bench::with(|config| {
        config.recycle_growth_bytes = 1 << 20;
        config.memory_bytes = 8 << 20;
    });
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("fixture-router");
    slot.publish(bench.prepare(&component, "router", r#"{"do": "leak"}"#)).expect("a publish");
    let columns = replicas(2, 0);
    for now in 0..2_000 {
        assert!(slot.route(now, &request(now), &columns).fallback.is_none(), "call {now}");
        bench.runtime.maintain();
    }
    let status = slot.status();
    assert_eq!((status.faults, status.instances), ([0; 5], 3), "64 KiB a call would have met the cap of 8 MiB");
}

#[test]
fn instances_are_recycled_by_age() {
    let bench = Bench::with(|config| config.recycle_calls = 16);
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    let columns = replicas(2, 0);
    for now in 0..1_000 {
        assert!(slot.route(now, &request(now), &columns).fallback.is_none(), "call {now}");
        bench.runtime.maintain();
    }
    assert_eq!(slot.status().instances, 3);
}
