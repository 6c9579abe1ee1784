//! Guests of other versions of the package: those of 0.1 that were built long ago, and what semantic versions promise.

mod support;

use pointsman_policy::{Component, Slot, World};
use pointsman_sched::batch::{Answer, Attention, BatchPolicy, Plan, SequenceColumns, View};
use pointsman_sched::route::{Choice, RoutePolicy};
use pointsman_telemetry::{Event, EventKind, Names};
use support::{Bench, arrivals, budgets, counter, replicas, request, sequences};

/// A component of tests/contract/frozen, which is never built again.
fn frozen(bench: &Bench, name: &str) -> Component {
    let path = format!("../../tests/contract/frozen/0.1.0/{name}.wasm");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    bench.runtime.admit(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn patches_of_a_known_minor_version_work_and_others_are_refused_with_words() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let columns = replicas(4, 0);
    for (schema, (version, expect)) in (0..).zip([
        ("0.1.0", Ok(())),
        ("0.1.7", Ok(())),
        ("0.1.12", Ok(())),
        ("0.2.0", Ok(())),
        ("0.2.1", Ok(())),
        ("0.3.0", Err("built against pointsman:policy@0.3.0; this host binds 0.1.x and 0.2.x; rebuild it")),
        ("1.0.0", Err("built against pointsman:policy@1.0.0; this host binds 0.1.x and 0.2.x; rebuild it")),
    ]) {
        match (bench.runtime.admit(&counter(version, schema)), expect) {
            (Ok(component), Ok(())) => {
                assert_eq!(*component.package, *format!("pointsman:policy@{version}"));
                slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
                let picks = [1, 2].map(|now| slot.route(now, &request(now), &columns).choice);
                assert_eq!(picks, [Choice::Pick(0), Choice::Pick(1)], "{version}");
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{version}: {error}"),
            (got, _) => panic!("{version}: {:?}", got.map_err(|error| error.to_string())),
        }
    }
}

#[test]
fn an_old_router_routes_and_keeps_its_state_and_its_metrics() {
    // The rows with floods are not about the deadline of a slow machine.
    let bench = Bench::with(|config| config.budgets.route.hard = 2_000_000);
    let component = frozen(&bench, "route-least-loaded");
    assert_eq!((component.world, &*component.package), (World::Router, "pointsman:policy@0.1.0"));
    let slot = bench.runtime.router_slot("router");
    let prepared = bench.prepare(&component, "router", "{}");
    assert!(prepared.revision.starts_with("route-least-loaded@0.1.0+"), "{}", prepared.revision);
    assert_eq!(&*prepared.summary, "", "0.1 has none");
    slot.publish(prepared).expect("a publish");
    for idle in 0..3 {
        let routed = slot.route(1, &request(1), &replicas(3, idle));
        assert_eq!((routed.choice, routed.fallback), (Choice::Pick(idle), None));
    }
    let fixture = frozen(&bench, "fixture-router");
    for (deed, expect) in
        [("state-flood", "Pick(0)"), ("metric-flood", "pointsman_plugin_flood_0"), ("reject", "Quota")]
    {
        slot.publish(bench.prepare(&fixture, "router", &format!(r#"{{"do":"{deed}"}}"#))).expect("a publish");
        let routed = slot.route(1, &request(1), &replicas(3, 0));
        let shown = format!("{:?} {}", routed.choice, bench.metrics.render());
        assert!(routed.fallback.is_none() && shown.contains(expect), "{deed}: {shown}");
    }
    assert_eq!(slot.status().faults, [0; 5]);
}

#[test]
fn an_old_scheduler_plans() {
    let bench = Bench::new();
    let component = frozen(&bench, "sched-shortest-first");
    let slot = bench.runtime.scheduler_slot("scheduler");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    let mut guest = slot.attach("demo:f16@cpu");
    bench.runtime.maintain();
    assert_eq!(guest.attend(1), Attention::NeedsView);
    let (waiting, none) = (sequences(&[(1, 900), (2, 100)]), SequenceColumns::default());
    let view = View {
        now: 1,
        seed: 1,
        budgets: &budgets(),
        tenants: &[(1, "acme".into())],
        waiting: &waiting,
        running: &none,
    };
    guest.resync(&view);
    let mut plan = Plan::default();
    assert_eq!(guest.step(2, &budgets(), &arrivals(&[(3, 500)]), &mut plan), Answer::Planned);
    assert_eq!(plan.admit, [2, 3, 1]);
    assert_eq!(slot.status().faults, [0; 5]);
}

#[test]
fn an_old_telemetry_hook_watches() {
    let bench = Bench::new();
    let component = frozen(&bench, "hook-slo-log");
    let slot = bench.runtime.telemetry_slot("telemetry.slo-log");
    slot.publish(bench.prepare(&component, "telemetry.slo-log", "{}")).expect("a publish");
    let names = Names::default();
    let events: Vec<Event> =
        (1..=8).map(|i| Event { request: i, a: 60_000_000, b: 1, ..Event::new(i, EventKind::Finished) }).collect();
    slot.on_events(9, &events, &names, 0);
    let status = slot.status();
    assert_eq!((status.calls, status.faults), (1, [0; 5]));
    assert!(bench.metrics.render().contains("pointsman_plugin_"), "{}", bench.metrics.render());
}
