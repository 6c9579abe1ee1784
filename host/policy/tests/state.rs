//! `host-state` as a guest sees it: the guest counts in the store and picks the row of that number.

mod support;

use pointsman_policy::{Activation, Component, Slot};
use pointsman_sched::route::{Choice, RoutePolicy};
use support::{Bench, counter, replicas, request};

#[test]
fn state_outlives_swaps_and_belongs_to_a_namespace_and_a_layout() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let [first, second] = [1, 2].map(|schema| bench.runtime.admit(&counter("0.2.0", schema)).expect("a component"));
    let columns = replicas(100, 0);
    let mut generation = 0;
    let mut picks = |component: &Component, namespace: Option<&str>| {
        generation += 1;
        let activation = Activation {
            slot: "router".into(),
            generation,
            config: "{}".into(),
            namespace: namespace.map(str::to_owned),
            ..Activation::default()
        };
        let prepared = bench.runtime.prepare(component, activation).expect("a generation");
        slot.publish(prepared).expect("a publish");
        [1, 2, 3].map(|now| slot.route(now, &request(now), &columns).choice)
    };
    let rows = |first: u32| [first, first + 1, first + 2].map(Choice::Pick);
    assert_eq!(picks(&first, None), rows(0), "probes count elsewhere");
    assert_eq!(picks(&first, None), rows(3), "after a swap it goes on");
    assert_eq!(picks(&second, None), rows(0), "another layout");
    assert_eq!(picks(&first, Some("shared")), rows(0), "another namespace");
    assert_eq!(picks(&first, None), rows(6), "what was there is still there");
}
