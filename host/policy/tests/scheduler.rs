//! A scheduling guest through the trait: swaps at a step boundary, faults, refusals, respawns.

mod support;

use pointsman_policy::{FaultKind, Health, SchedulerGuest, Slot};
use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Changes, Plan, SequenceColumns, View};
use support::{Bench, MISDEEDS, SECOND, arrivals, budgets, sequences};

/// Steps that every probe makes, so that a fixture with this `after` passes the probe and the warm-up.
const PROBED: u64 = 20;

fn resync(guest: &mut SchedulerGuest, now: u64, waiting: &[(u64, u32)]) {
    let (budgets, waiting, running) = (budgets(), sequences(waiting), SequenceColumns::default());
    let tenants = [(1, "acme".into())];
    guest.resync(&View { now, seed: 7, budgets: &budgets, tenants: &tenants, waiting: &waiting, running: &running });
}

fn step(guest: &mut SchedulerGuest, now: u64, changes: &Changes) -> (Answer, Plan) {
    let mut plan = Plan::default();
    let answer = guest.step(now, &budgets(), changes, &mut plan);
    (answer, plan)
}

#[test]
fn a_guest_orders_the_queue_and_a_swap_needs_the_view_again() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo:f16@cpu");
    assert_eq!((guest.attend(1), guest.generation()), (Attention::Native, 0));

    let shortest = bench.admit("sched-shortest-first");
    slot.publish(bench.prepare(&shortest, "scheduler", "{}")).expect("a publish");
    assert_eq!(guest.attend(2), Attention::NeedsView);
    assert_eq!(guest.generation(), 1);
    assert_eq!(step(&mut guest, 2, &Changes::default()).0, Answer::Native, "no view, no answer");
    resync(&mut guest, 2, &[(1, 900), (2, 100)]);
    assert_eq!(guest.attend(3), Attention::Following);
    let (answer, plan) = step(&mut guest, 3, &arrivals(&[(3, 500)]));
    assert_eq!((answer, plan.admit), (Answer::Planned, vec![2, 3, 1]));

    let fcfs = bench.admit("sched-fcfs");
    slot.publish(bench.prepare(&fcfs, "scheduler", "{}")).expect("a publish");
    let before = slot.status();
    assert_eq!(before.draining, 1, "the driver is still inside the old generation");
    assert_eq!(guest.attend(4), Attention::NeedsView);
    assert_eq!(guest.generation(), 2);
    resync(&mut guest, 4, &[(1, 900), (2, 100), (3, 500)]);
    let (_, plan) = step(&mut guest, 5, &Changes::default());
    assert!(plan.admit.is_empty() || plan.admit == [1, 2, 3], "{plan:?}");
    bench.runtime.maintain();
    assert_eq!(slot.status().draining, 0, "dropped once the driver left it");

    slot.publish_native(3).expect("a publish");
    assert_eq!((guest.attend(6), guest.generation()), (Attention::Native, 0));
}

#[test]
fn each_replica_has_an_instance_and_one_is_spare() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("sched-fcfs");
    let mut first = slot.attach("a");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    assert_eq!(slot.status().instances, 2);
    assert_eq!(first.attend(1), Attention::NeedsView);
    let mut others: Vec<SchedulerGuest> = (0..3).map(|i| slot.attach(&format!("b{i}"))).collect();
    assert_eq!(others[0].attend(1), Attention::NeedsView, "the spare");
    assert_eq!(others[1].attend(1), Attention::Native, "none left until maintenance came by");
    bench.runtime.maintain();
    assert_eq!(others[1].attend(2), Attention::NeedsView);
    assert_eq!(others[2].attend(2), Attention::NeedsView);
    assert_eq!(slot.status().instances, 5);
    drop(others);
    assert_eq!(slot.status().instances, 2);
}

#[test]
fn misdeeds_become_faults_and_the_spare_takes_over() {
    for (deed, kind) in MISDEEDS.into_iter().chain([("huge-list", FaultKind::BadAnswer)]) {
        let bench = Bench::for_fault(kind, |budgets| &mut budgets.step);
        let component = bench.admit("fixture-scheduler");
        let slot = bench.runtime.scheduler_slot("scheduler");
        let mut guest = slot.attach("demo");
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        slot.publish(bench.prepare(&component, "scheduler", &config)).expect("a publish");
        assert_eq!(guest.attend(bench.now()), Attention::NeedsView);
        resync(&mut guest, bench.now(), &[(1, 10)]);
        let mut good = 0;
        while step(&mut guest, bench.now(), &Changes::default()).0 == Answer::Planned {
            good += 1;
            assert!(good <= PROBED, "{deed} never misbehaves");
        }
        let status = slot.status();
        assert_eq!((status.faults[kind as usize], status.instances), (1, 1), "{deed}: {status:?}");
        assert_eq!(guest.generation(), 0, "{deed}: nobody answers");
        assert_eq!(guest.attend(bench.now()), Attention::NeedsView, "{deed}: the spare");
        resync(&mut guest, bench.now(), &[(1, 10)]);
        assert_eq!(step(&mut guest, bench.now(), &Changes::default()).0, Answer::Planned, "{deed}");
        bench.advance(SECOND);
        assert_eq!(slot.status().instances, 2, "{deed}: replaced after a second");
    }
}

#[test]
fn a_refused_plan_is_a_fault_and_three_open_the_circuit() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    let component = bench.admit("sched-fcfs");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    for refusal in 0..3 {
        assert_eq!(guest.attend(bench.now()), Attention::NeedsView, "{refusal}");
        resync(&mut guest, bench.now(), &[(1, 10)]);
        step(&mut guest, bench.now(), &Changes::default());
        guest.refused(bench.now(), BadPlan::UnknownId(99));
        bench.now.fetch_add(8 * SECOND, std::sync::atomic::Ordering::Relaxed);
        bench.runtime.maintain();
    }
    let status = slot.status();
    assert_eq!(status.faults[FaultKind::BadAnswer as usize], 3);
    let last = status.last_fault.expect("a fault");
    assert!(last.message.contains("demo: request 99 was never shown"), "{}", last.message);
    assert!(matches!(status.health, Health::Open { .. }));
    let Health::Open { until } = status.health else { return };
    assert_eq!(guest.attend(until - 1), Attention::Native);
    assert_eq!(guest.attend(until), Attention::NeedsView, "half-open");
    resync(&mut guest, until, &[(1, 10)]);
    assert_eq!(guest.attend(until), Attention::Following);
    step(&mut guest, until, &Changes::default());
    guest.refused(until, BadPlan::UnknownId(99));
    let Health::Open { until: again } = slot.status().health else { panic!("{:?}", slot.status().health) };
    assert_eq!(again, until + 2 * SECOND, "a plan that is refused is no good trial");
    bench.now.store(again, std::sync::atomic::Ordering::Relaxed);
    bench.runtime.maintain();
    assert_eq!(guest.attend(again), Attention::NeedsView, "half-open again");
    resync(&mut guest, again, &[(1, 10)]);
    step(&mut guest, again, &Changes::default());
    assert_eq!(slot.status().health, Health::HalfOpen, "its plan is not checked yet");
    assert_eq!((guest.attend(again), slot.status().health), (Attention::Following, Health::Closed));
}

#[test]
fn the_trial_is_for_the_replica_that_has_something_to_decide() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let (mut idle, mut busy) = (slot.attach("idle"), slot.attach("busy"));
    let component = bench.admit("sched-fcfs");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    for _ in 0..3 {
        busy.attend(bench.now());
        resync(&mut busy, bench.now(), &[(1, 10)]);
        step(&mut busy, bench.now(), &Changes::default());
        busy.refused(bench.now(), BadPlan::UnknownId(99));
        bench.advance(8 * SECOND);
    }
    assert!(matches!(slot.status().health, Health::Open { .. }));
    let now = bench.now();
    for turn in 0..3 {
        let expect = if turn == 0 { Attention::NeedsView } else { Attention::Following };
        assert_eq!(idle.attend(now + turn), expect, "it could be asked");
        resync(&mut idle, now + turn, &[]);
    }
    assert_eq!(busy.attend(now + 3), Attention::NeedsView, "the trial is free");
    resync(&mut busy, now + 3, &[(1, 10)]);
    assert_eq!(step(&mut busy, now + 3, &Changes::default()).0, Answer::Planned);
    assert_eq!(step(&mut idle, now + 3, &Changes::default()).0, Answer::Native, "one at a time");
    assert_eq!((busy.attend(now + 4), slot.status().health), (Attention::Following, Health::Closed));
    assert_eq!(idle.attend(now + 4), Attention::NeedsView, "it missed its turn");
}

#[test]
fn only_boundaries_with_something_to_decide_count_as_fallbacks() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("sched-fcfs");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    let mut guests: Vec<SchedulerGuest> = (0..3).map(|i| slot.attach(&i.to_string())).collect();
    assert_eq!(guests[0].attend(1), Attention::NeedsView, "the spare");
    for turn in 0..10 {
        assert_eq!(guests[1].attend(turn), Attention::Native, "nobody is left");
    }
    assert_eq!(slot.status().fallbacks, 0);
    guests[1].stood_in();
    assert_eq!(slot.status().fallbacks, 1);
}

#[test]
fn wants_progress_comes_from_the_manifest() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    assert!(!guest.wants_progress());
    let component = bench.admit("fixture-scheduler");
    for (config, expect) in [("{}", false), (r#"{"wants": ["progress"]}"#, true), ("{}", false)] {
        slot.publish(bench.prepare(&component, "scheduler", config)).expect("a publish");
        guest.attend(1);
        assert_eq!(guest.wants_progress(), expect, "{config}");
    }
}

#[test]
fn named_columns_arrive_in_the_order_of_the_manifest() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    let component = bench.admit("fixture-scheduler");
    let mut changes = arrivals(&[(1, 10), (2, 10), (3, 10)]);
    (changes.arrived.session, changes.arrived.prefix) = (vec![7, 9, 8], vec![30, 10, 20]);
    for (wants, expect) in [
        (r#"["seq.session"]"#, [2, 3, 1]),
        (r#"["seq.prefix"]"#, [1, 3, 2]),
        (r#"["progress", "seq.prefix", "seq.session"]"#, [1, 3, 2]),
    ] {
        let config = format!(r#"{{"do": "largest-first", "wants": {wants}}}"#);
        slot.publish(bench.prepare(&component, "scheduler", &config)).expect("a publish");
        assert_eq!(guest.attend(1), Attention::NeedsView);
        let (budgets, none) = (budgets(), sequences(&[]));
        let view = View { now: 1, seed: 1, budgets: &budgets, tenants: &[], waiting: &none, running: &none };
        guest.resync(&view);
        let mut plan = Plan::default();
        assert_eq!(guest.step(2, &budgets, &changes, &mut plan), Answer::Planned, "{wants}");
        assert_eq!(plan.admit, expect, "{wants}");
    }
    let unknown = bench.activation("scheduler", r#"{"wants": ["seq.mood"]}"#);
    let error = bench.runtime.prepare(&component, unknown).expect_err("no such column").to_string();
    assert!(error.contains("seq.mood") && error.contains("seq.prefix"), "{error}");
}
