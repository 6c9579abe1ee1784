//! A candidate beside the active policy: who answers, what a flip costs, what is left when it ends.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_policy::{Arm, FaultKind, Health, Maintenance, PublishError, Slot};
use pointsman_sched::batch::{Attention, BatchPolicy, SequenceColumns, View};
use pointsman_sched::route::RoutePolicy;
use pointsman_telemetry::{Event, EventKind};
use support::{Bench, SECOND, budgets, replicas, request, sequences};

/// Calls that every probe makes, so that a fixture with this `after` passes the probe.
const PROBED: u32 = 40;

fn generation(slot: &impl RoutePolicy, now: u64) -> u64 {
    slot.route(now, &request(now), &replicas(4, 2)).decided_by.generation
}

#[test]
fn a_candidate_answers_when_it_is_told_to_and_both_stay_warm() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let (control, candidate) = (bench.admit("route-least-loaded"), bench.admit("route-weighted"));
    slot.publish(bench.prepare(&control, "router", "{}")).expect("a publish");
    assert!(slot.candidate().is_none());
    slot.stage(bench.prepare(&candidate, "router", "{}")).expect("staged");
    assert_eq!(generation(&*slot, 1), 1, "it answers nothing yet");
    for (arm, expect) in [(Arm::Candidate, 2), (Arm::Candidate, 2), (Arm::Control, 1), (Arm::Candidate, 2)] {
        let served = slot.serve(arm).expect("staged");
        assert_eq!((served.generation, generation(&*slot, 2)), (expect, expect), "{arm:?}");
        let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((active.generation, candidate.generation), (1, 2), "{arm:?}");
        assert_eq!((active.serving, candidate.serving), (arm == Arm::Control, arm == Arm::Candidate));
        assert_eq!((active.instances, candidate.instances), (3, 3), "{arm:?}");
        assert_eq!((active.draining, candidate.draining), (0, 0), "nobody drains at a flip");
        let gauge = format!(r#"pointsman_policy_generation{{slot="router"}} {expect}"#);
        assert!(bench.metrics.render().contains(&gauge), "{arm:?}");
    }
    let mut events: Vec<Event> = Vec::new();
    bench.recorder.drain(&mut events, 100);
    let swaps: Vec<u64> = events.iter().filter(|e| e.kind == EventKind::Swap).map(|e| e.a).collect();
    assert_eq!(swaps, [1, 2, 1, 2], "one event a flip, none where nothing changes");
    let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
    assert_eq!((active.calls, candidate.calls), (2, 3));
    assert!(active.call_ns > 0 && candidate.call_ns > 0);
}

#[test]
fn what_ends_a_staging_and_what_may_not_come_between() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    let nothing = PublishError::NothingStaged { slot: "router".into() };
    for outcome in [slot.serve(Arm::Candidate), slot.promote(), slot.unstage()] {
        assert_eq!(outcome, Err(nothing.clone()));
    }
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    slot.stage(bench.prepare(&component, "router", "{}")).expect("staged");
    let staged = Err(PublishError::Staged { candidate: 2 });
    assert_eq!(slot.publish_native(9), staged);
    assert_eq!(slot.publish(bench.prepare(&component, "router", "{}")), staged);
    assert_eq!(slot.stage_native(9), Err(PublishError::Staged { candidate: 2 }));

    slot.serve(Arm::Candidate).expect("staged");
    let back = slot.unstage().expect("staged");
    assert_eq!((back.generation, generation(&*slot, 1)), (1, 1));
    bench.runtime.maintain();
    assert_eq!((slot.candidate().map(|c| c.generation), slot.status().draining), (None, 0));
    assert_eq!(slot.stage_native(2), Err(PublishError::Stale { generation: 2, newest: 2 }), "a number is given once");

    slot.stage_native(3).expect("staged");
    assert_eq!(slot.candidate().map(|c| c.revision), Some("native".into()));
    for arm in [Arm::Candidate, Arm::Control] {
        slot.serve(arm).expect("staged");
    }
    let promoted = slot.promote().expect("staged");
    assert_eq!((promoted.generation, generation(&*slot, 2)), (3, 3), "it did not serve at that moment, and does now");
    bench.runtime.maintain();
    let status = slot.status();
    assert_eq!((status.generation, status.draining, status.instances), (3, 0, 0));
}

#[test]
fn instances_of_an_ended_staging_are_free_again() {
    // Room for the active policy and one candidate: one that leaked an instance would let the next one fail.
    let bench = Bench::with(|config| config.max_instances = 7);
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    for turn in 0..40 {
        slot.stage(bench.prepare(&component, "router", "{}")).expect("staged");
        slot.serve(Arm::Candidate).expect("staged");
        assert!(slot.route(turn, &request(turn), &replicas(4, 2)).fallback.is_none());
        let ended = if turn % 2 == 0 { slot.promote() } else { slot.unstage() };
        ended.expect("staged");
        bench.runtime.maintain();
        assert_eq!(slot.status().draining, 0, "{turn}");
    }
}

#[test]
fn faults_belong_to_the_arm_that_made_them() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let (good, bad) = (bench.admit("route-least-loaded"), bench.admit("fixture-router"));
    slot.publish(bench.prepare(&good, "router", "{}")).expect("a publish");
    let config = format!(r#"{{"do": "trap", "after": {PROBED}}}"#);
    slot.stage(bench.prepare(&bad, "router", &config)).expect("staged");
    slot.serve(Arm::Candidate).expect("staged");
    for now in 0..3 * u64::from(PROBED) + 10 {
        slot.route(now, &request(now), &replicas(4, 2));
    }
    let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
    assert_eq!((active.health, active.faults, active.fallbacks), (Health::Closed, [0; 5], 0));
    assert_eq!(candidate.faults[FaultKind::Trap as usize], 3);
    assert!(matches!(candidate.health, Health::Open { .. }), "{candidate:?}");
    slot.serve(Arm::Control).expect("staged");
    assert!(slot.route(1, &request(1), &replicas(4, 2)).fallback.is_none(), "control never noticed");
    bench.advance(8 * SECOND);
    let candidate = slot.candidate().expect("staged");
    assert_eq!(candidate.instances, 3, "the arm that does not serve is tended too");
}

#[test]
fn a_driver_follows_a_flip_at_its_next_boundary_and_keeps_the_instances() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    let (fcfs, shortest) = (bench.admit("sched-fcfs"), bench.admit("sched-shortest-first"));
    slot.publish(bench.prepare(&fcfs, "scheduler", "{}")).expect("a publish");
    slot.stage(bench.prepare(&shortest, "scheduler", "{}")).expect("staged");
    for turn in 0..20 {
        let arm = if turn % 2 == 0 { Arm::Candidate } else { Arm::Control };
        let served = slot.serve(arm).expect("staged");
        assert_eq!((guest.attend(turn), guest.generation()), (Attention::NeedsView, served.generation), "{turn}");
        let (budgets, waiting, running) = (budgets(), sequences(&[(1, 10)]), SequenceColumns::default());
        guest.resync(&View {
            now: turn,
            seed: 7,
            budgets: &budgets,
            tenants: &[],
            waiting: &waiting,
            running: &running,
        });
        assert_eq!(guest.attend(turn), Attention::Following, "{turn}");
        let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((active.instances, candidate.instances), (2, 2), "{turn}: nothing was started or lost");
    }
    slot.promote().expect("staged");
    assert_eq!((guest.attend(30), guest.generation()), (Attention::NeedsView, 2));
    bench.runtime.maintain();
    assert_eq!(slot.status().draining, 0);
    drop(guest);
    bench.runtime.maintain();
    assert_eq!(slot.status().instances, 1, "the spare");
}

#[test]
fn a_replica_that_leaves_frees_its_instance_in_both_arms() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let guests = [slot.attach("a"), slot.attach("b")];
    let component = bench.admit("sched-fcfs");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    slot.stage(bench.prepare(&component, "scheduler", "{}")).expect("staged");
    assert_eq!(slot.candidate().map(|c| c.instances), Some(3));
    drop(guests);
    bench.runtime.maintain();
    assert_eq!((slot.status().instances, slot.candidate().map(|c| c.instances)), (1, Some(1)));
}

#[test]
fn flips_under_load_lose_no_call() {
    const FLIPS: u64 = 400;
    let bench = Bench::with(|config| {
        config.maintenance = Maintenance::Thread;
        config.router_instances = 4;
        // None wears out while the maintenance thread is put aside.
        config.recycle_calls = u64::MAX;
    });
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    slot.stage(bench.prepare(&component, "router", "{}")).expect("staged");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let columns = replicas(8, 3);
                    let mut calls = [0_u64; 3];
                    while !stop.load(Ordering::Relaxed) {
                        let routed = slot.route(1, &request(calls[1]), &columns);
                        assert!(routed.fallback.is_none());
                        calls[usize::try_from(routed.decided_by.generation).expect("small")] += 1;
                    }
                    calls
                })
            })
            .collect();
        for flip in 0..FLIPS {
            slot.serve(if flip % 2 == 0 { Arm::Candidate } else { Arm::Control }).expect("staged");
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        let calls: Vec<[u64; 3]> = readers.into_iter().map(|reader| reader.join().expect("no panic")).collect();
        let sum = |generation: usize| calls.iter().map(|calls| calls[generation]).sum::<u64>();
        println!("{} and {} calls during {FLIPS} flips", sum(1), sum(2));
        let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((sum(0), sum(1), sum(2)), (0, active.calls, candidate.calls), "every call has one generation");
    });
    let (active, candidate) = (slot.status(), slot.candidate().expect("staged"));
    assert_eq!((active.swaps, active.draining), (FLIPS + 1, 0));
    assert_eq!((active.fallbacks, candidate.fallbacks), (0, 0));
}
