//! Telemetry guests: what they see, what they may raise, what they may keep.

mod support;

use pointsman_policy::{FaultKind, Slot};
use pointsman_telemetry::{Event, EventKind, Names};
use support::Bench;

fn finished(n: u64) -> Vec<Event> {
    (0..n)
        .map(|i| Event { request: i, replica: 1, a: 2_000_000, b: 10, ..Event::new(i, EventKind::Finished) })
        .collect()
}

#[test]
fn a_hook_sees_batches_and_a_native_slot_costs_nothing() {
    let bench = Bench::new();
    let slot = bench.runtime.telemetry_slot("telemetry.slo-log");
    let names = Names::default();
    assert!(slot.on_events(1, &finished(3), &names, 0).is_empty());
    let component = bench.admit("hook-slo-log");
    slot.publish(bench.prepare(&component, "telemetry.slo-log", "{}")).expect("a publish");
    slot.on_events(1, &[], &names, 0);
    assert_eq!(slot.status().calls, 0, "nothing to say: no call");
    slot.on_events(2, &finished(10), &names, 0);
    assert_eq!(slot.status().calls, 1);
    slot.on_events(3, &finished(10_000), &names, 5);
    let status = slot.status();
    assert_eq!((status.calls, status.faults), (4, [0; 5]), "long batches are cut");
}

#[test]
fn misdeeds_become_faults() {
    for (deed, kind) in [
        ("trap", FaultKind::Trap),
        ("spin", FaultKind::Timeout),
        ("allocate", FaultKind::Memory),
        ("huge-list", FaultKind::BadAnswer),
        ("huge-text", FaultKind::BadAnswer),
    ] {
        // A million alerts take more memory and time than a hook has by default; the row is about their number.
        let memory = if kind == FaultKind::Memory { 4 << 20 } else { 256 << 20 };
        let hard = if kind == FaultKind::Timeout { 50_000 } else { 20_000_000 };
        let bench = Bench::with(|config| (config.budgets.on_events.hard, config.memory_bytes) = (hard, memory));
        let component = bench.admit("fixture-telemetry");
        let slot = bench.runtime.telemetry_slot("telemetry.t");
        let config = format!(r#"{{"do": "{deed}", "after": 2}}"#);
        slot.publish(bench.prepare(&component, "telemetry.t", &config)).expect("a publish");
        let names = Names::default();
        // One instance serves every call, so what it remembers is in one place; the third one is its first misdeed.
        let alerts: usize = (0..3).map(|now| slot.on_events(now, &finished(1), &names, 0).len()).sum();
        let status = slot.status();
        assert_eq!((status.faults[kind as usize], alerts), (1, 0), "{deed}: {status:?}");
    }
}

#[test]
fn floods_are_bounded() {
    // The row is about bounds, not about the deadline of a slow machine.
    let bench = Bench::with(|config| config.budgets.on_events.hard = 2_000_000);
    let component = bench.admit("fixture-telemetry");
    for deed in ["log-flood", "metric-flood", "state-flood"] {
        let slot = bench.runtime.telemetry_slot("telemetry.t");
        slot.publish(bench.prepare(&component, "telemetry.t", &format!(r#"{{"do": "{deed}"}}"#))).expect("a publish");
        slot.on_events(1, &finished(1), &Names::default(), 0);
        assert_eq!(slot.status().faults, [0; 5], "{deed}");
    }
    let text = bench.metrics.render();
    let families = text.lines().filter(|line| line.starts_with("# TYPE pointsman_plugin_")).count();
    assert!((1..=64).contains(&families), "{families} families");
}
