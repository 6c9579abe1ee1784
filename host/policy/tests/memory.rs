//! What swapping costs in memory. A test binary of its own: resident memory belongs to the process, and a neighbour test
//! would be measured with it.

mod support;

use pointsman_policy::Slot;
use pointsman_sched::route::RoutePolicy;
use pointsman_telemetry::Event;
use support::{Bench, replicas, request, resident_bytes};

/// Growth of resident memory that 1,000 swaps may cause.
const MAX_GROWTH: u64 = 10 << 20;

#[test]
fn a_thousand_swaps_leave_memory_flat() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let components = [bench.admit("route-least-loaded"), bench.admit("route-weighted")];
    let columns = replicas(8, 3);
    let mut events: Vec<Event> = Vec::with_capacity(2_000);
    let mut swap = |i: usize| {
        slot.publish(bench.prepare(&components[i % 2], "router", "{}")).expect("a publish");
        for now in 0..10 {
            assert!(slot.route(now, &request(now), &columns).fallback.is_none());
        }
        bench.runtime.maintain();
        assert_eq!(slot.status().draining, 0);
        events.clear();
        bench.recorder.drain(&mut events, 2_000);
    };
    (0..100).for_each(&mut swap);
    let before = resident_bytes();
    (100..1_100).for_each(&mut swap);
    let growth = resident_bytes().saturating_sub(before);
    println!("1,000 swaps: resident memory grew by {} KiB", growth >> 10);
    assert!(growth < MAX_GROWTH, "{growth} bytes");
    assert_eq!(slot.status().swaps, 1_100);
}
