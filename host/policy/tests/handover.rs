//! What an instance knows goes over to the one that takes its place, and whatever goes wrong on the way costs the operator a
//! sentence and nobody a decision. The owner of the instances is this thread, and another one prepares what comes.

mod support;

use pointsman_policy::{
    ActivateError, Activation, Arm, Component, Handover, Inheritance, Maintenance, Prepared, Role, SchedulerGuest,
    SchedulerSlot, Slot,
};
use pointsman_sched::batch::{Attention, BatchPolicy, Changes, Plan, SequenceColumns, View};
use support::{Bench, budgets};

/// Calls of a probe of a scheduler, so that a fixture with this `after` passes it.
const PROBED: u32 = 12;

/// Calls by which the host warms an instance, after it was handed something.
const WARM: u64 = 1;

/// A slot with a thread for maintenance, and limits that no machine is too slow for.
fn bench() -> Bench {
    limited(2_000_000)
}

fn limited(hard: u64) -> Bench {
    Bench::with(|config| {
        config.maintenance = Maintenance::Thread;
        (config.budgets.step.soft, config.budgets.step.hard) = (20_000, hard);
        config.budgets.init.hard = hard;
    })
}

fn activation(bench: &Bench, config: &str, handover: Handover) -> Activation {
    Activation { handover, ..bench.activation("scheduler", config) }
}

/// Comes to a boundary.
fn attend(guest: &mut SchedulerGuest) -> Attention {
    let attention = guest.attend(1);
    if attention == Attention::NeedsView {
        let (budgets, none) = (budgets(), SequenceColumns::default());
        guest.resync(&View { now: 1, seed: 7, budgets: &budgets, tenants: &[], waiting: &none, running: &none });
    }
    attention
}

/// One call of the guest, once it is there.
fn step(guest: &mut SchedulerGuest) {
    while !matches!(attend(guest), Attention::Following | Attention::NeedsView) {
        std::thread::yield_now();
    }
    guest.step(1, &budgets(), &Changes::default(), &mut Plan::default());
}

/// Prepares on another thread, while the owners come to their boundaries.
fn prepare(
    bench: &Bench,
    component: &Component,
    activation: Activation,
    owners: &mut [&mut SchedulerGuest],
) -> Result<Prepared, ActivateError> {
    std::thread::scope(|scope| {
        let preparing = scope.spawn(|| bench.runtime.prepare(component, activation));
        while !preparing.is_finished() {
            for guest in &mut *owners {
                attend(guest);
            }
            std::thread::yield_now();
        }
        preparing.join().expect("no panic")
    })
}

/// Swaps to the same component; what was handed over.
fn swap(bench: &Bench, slot: &SchedulerSlot, component: &Component, owners: &mut [&mut SchedulerGuest]) -> Inheritance {
    let prepared = prepare(bench, component, activation(bench, "{}", Handover::Cold), owners).expect("a generation");
    let inherited = prepared.inherited.clone().expect("it exports handover");
    slot.publish(prepared).expect("a publish");
    inherited
}

fn handed(restored: u32) -> Inheritance {
    Inheritance { restored, bytes: u64::from(restored) * 8, cold: Vec::new() }
}

/// Calls of their predecessors that the instances so far were told of, together.
fn inherited(bench: &Bench) -> u64 {
    let text = bench.metrics.render();
    let line = text.lines().find(|line| line.starts_with("pointsman_plugin_inherited{"));
    line.and_then(|line| line.rsplit(' ').next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[test]
fn what_each_replica_has_learned_goes_to_its_successor() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let (mut one, mut two) = (slot.attach("one"), slot.attach("two"));
    let first = swap(&bench, &slot, &component, &mut []);
    assert!(first.restored == 0 && first.cold[0].contains("the native policy is active"), "{first:?}");
    (0..3).for_each(|_| step(&mut one));
    step(&mut two);
    assert_eq!(swap(&bench, &slot, &component, &mut [&mut one, &mut two]), handed(2));
    step(&mut one);
    // Each got its own: what `one` hands over now are its four calls, whoever came first.
    drop(two);
    assert_eq!(swap(&bench, &slot, &component, &mut [&mut one]), handed(1));
    let (of_one, of_two) = (3 + WARM, 1 + WARM);
    assert_eq!(inherited(&bench), of_one + of_two + (of_one + WARM + 1));
    let counted = bench.metrics.render();
    let restored = r#"pointsman_policy_handovers_total{outcome="restored",slot="scheduler"} 3"#;
    assert!(counted.contains(restored), "{counted}");
    assert!(bench.faults.lock().expect("not poisoned").is_empty());
}

#[test]
fn a_swap_before_anybody_came_to_the_last_one_loses_nothing() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    swap(&bench, &slot, &component, &mut []);
    (0..5).for_each(|_| step(&mut guest));
    assert_eq!(swap(&bench, &slot, &component, &mut [&mut guest]), handed(1));
    // Nobody attends: what waits for its owner is asked where it is.
    for _ in 0..3 {
        assert_eq!(swap(&bench, &slot, &component, &mut []), handed(1));
    }
    let known = |n: u64| 5 + n * WARM;
    assert_eq!(inherited(&bench), (1..=4).map(known).sum::<u64>());
    // The same while the native policy decides everywhere.
    step(&mut guest);
    bench.runtime.bypass(true);
    assert_eq!(guest.attend(1), Attention::Native);
    assert_eq!(swap(&bench, &slot, &component, &mut []), handed(1));
    bench.runtime.bypass(false);
    assert_eq!(inherited(&bench), (1..=4).map(known).sum::<u64>() + known(5) + 1);
}

#[test]
fn an_arm_finds_its_instance_again() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    swap(&bench, &slot, &component, &mut []);
    (0..2).for_each(|_| step(&mut guest));
    let candidate = activation(&bench, "{}", Handover::Require);
    let candidate = prepare(&bench, &component, candidate, &mut [&mut guest]).expect("a candidate");
    assert_eq!(candidate.inherited, Some(handed(1)));
    slot.stage(candidate).expect("staged");
    for arm in [Arm::Candidate, Arm::Control, Arm::Candidate] {
        slot.serve(arm).expect("staged");
        step(&mut guest);
    }
    slot.promote().expect("staged");
    assert_eq!(swap(&bench, &slot, &component, &mut [&mut guest]), handed(1));
    let of_control = 2 + WARM;
    assert_eq!(inherited(&bench), of_control + (of_control + WARM + 2), "the candidate's own two and those before it");
}

#[test]
fn an_instance_that_is_worn_hands_over_to_a_fresh_one() {
    let bench = Bench::with(|config| config.recycle_calls = 10);
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    let mut busy = 0;
    for _ in 0..100 {
        // The boundary at which one succeeds the other is asked nothing else.
        if guest.attend(1) == Attention::Busy {
            busy += 1;
            assert_eq!(guest.attend(1), Attention::NeedsView, "the fresh one is told everything at the next");
        }
        step(&mut guest);
        bench.runtime.maintain();
    }
    assert!(busy > 4, "{busy}");
    // About 10 + 20 + ... + 90; with nothing handed over it would be 10 each time at most.
    assert!(inherited(&bench) > 200, "{}", inherited(&bench));
}

#[test]
fn whatever_fails_is_a_cold_start_or_a_refusal_in_words() {
    let good = "{}".to_owned();
    let deed = |deed: &str| format!(r#"{{"hand-over": "{deed}"}}"#);
    for (old, new, part, is_fault) in [
        (deed("trap"), good.clone(), "one: take-snapshot failed: trap", true),
        (deed("spin"), good.clone(), "one: take-snapshot failed: timeout", true),
        (deed("huge"), good.clone(), "one: take-snapshot failed: bad-answer", true),
        (deed("garbage"), good.clone(), "one: restore refused: 3 bytes are no number of calls", false),
        (
            good.clone(),
            r#"{"schema": 2}"#.to_owned(),
            "restore refused: it has the layout 1, and this policy knows 2",
            false,
        ),
        (good.clone(), deed("trap-in-restore"), "one: restore failed: trap", false),
        (good.clone(), deed("spin-in-restore"), "one: restore failed: timeout", false),
        (good, deed("refuse-restore"), "one: restore refused: it refused, as configured", false),
    ] {
        let bench = if part.contains("timeout") { limited(20_000) } else { bench() };
        let slot = bench.runtime.scheduler_slot("scheduler");
        let component = bench.admit("fixture-scheduler");
        let mut guest = slot.attach("one");
        slot.publish(bench.prepare(&component, "scheduler", &old)).expect("a publish");
        step(&mut guest);
        let required = activation(&bench, &new, Handover::Require);
        let refused = prepare(&bench, &component, required, &mut [&mut guest]).expect_err(part).to_string();
        assert!(refused.contains(part) && refused.contains("`handover`: `cold`"), "{part}: {refused}");
        // The active one goes on, with another instance where the first one faulted.
        step(&mut guest);
        assert_eq!((slot.status().faults.iter().sum::<u64>() > 0, slot.status().generation), (is_fault, 1), "{part}");
        let cold = activation(&bench, &new, Handover::Cold);
        let prepared = prepare(&bench, &component, cold, &mut [&mut guest]).expect("it may start cold");
        let inherited = prepared.inherited.clone().expect("it exports handover");
        assert!(
            inherited.restored == 0 && inherited.cold.len() == 1 && inherited.cold[0].contains(part),
            "{inherited:?}"
        );
        slot.publish(prepared).expect("a publish");
        step(&mut guest);
        assert_eq!(guest.generation(), 3, "{part}");
    }
}

#[test]
fn who_has_nothing_to_hand_over_and_who_does_not_take_it() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let (fixture, plain) = (bench.admit("fixture-scheduler"), bench.admit("sched-fcfs"));
    let mut guest = slot.attach("one");
    let outcome = |component: &Component, guest: &mut SchedulerGuest| {
        let required = activation(&bench, "{}", Handover::Require);
        prepare(&bench, component, required, &mut [guest]).map(|p| p.inherited).map_err(|error| error.to_string())
    };
    let contains = |outcome: Result<Option<Inheritance>, String>, part: &str| {
        assert!(outcome.as_ref().is_err_and(|words| words.contains(part)), "{part}: {outcome:?}");
    };
    // A fresh host has nothing to lose.
    let inherited = outcome(&fixture, &mut guest).expect("nothing is lost").expect("it exports handover");
    assert_eq!(inherited.cold, ["the native policy is active, which has nothing to hand over"]);
    contains(outcome(&plain, &mut guest), "it does not export pointsman:policy/handover");
    let first = bench.prepare(&plain, "scheduler", "{}");
    assert_eq!(first.inherited, None);
    slot.publish(first).expect("a publish");
    contains(outcome(&fixture, &mut guest), "the active policy does not export pointsman:policy/handover");
    let nothing = bench.prepare(&fixture, "scheduler", r#"{"hand-over": "nothing"}"#);
    slot.publish(nothing).expect("a publish");
    step(&mut guest);
    let inherited = outcome(&fixture, &mut guest).expect("nothing is lost").expect("it exports handover");
    assert_eq!(inherited.cold, ["one: the active policy has nothing to hand over"]);
}

#[test]
fn a_trial_asks_nobody_who_serves() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    slot.publish(bench.prepare(&component, "scheduler", r#"{"hand-over": "trap"}"#)).expect("a publish");
    step(&mut guest);
    let trial = |component: &Component| {
        let trial = Activation { role: Role::Trial, ..activation(&bench, "{}", Handover::Require) };
        prepare(&bench, component, trial, &mut []).map(|prepared| prepared.inherited)
    };
    assert_eq!(trial(&component).expect("nobody refuses"), None);
    assert_eq!((slot.status().faults, guest.attend(1)), ([0; 5], Attention::Following));
    let plain = trial(&bench.admit("sched-fcfs")).expect_err("it could not take anything").to_string();
    assert!(plain.contains("it does not export"), "{plain}");
}

#[test]
fn a_rollback_takes_along_what_comes_soon() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    step(&mut guest);
    let back = prepare(&bench, &component, activation(&bench, "{}", Handover::Soon), &mut [&mut guest]);
    assert_eq!(back.expect("a generation").inherited, Some(handed(1)));
    let late = activation(&bench, "{}", Handover::Soon);
    let cold = bench.runtime.prepare(&component, late).expect("never refused").inherited.expect("it exports handover");
    assert!(cold.restored == 0 && cold.cold[0].contains("came to no boundary in time"), "{cold:?}");
}

#[test]
fn what_was_handed_over_for_an_owner_that_has_gone_is_let_go() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let (mut one, mut two) = (slot.attach("one"), slot.attach("two"));
    swap(&bench, &slot, &component, &mut []);
    step(&mut one);
    step(&mut two);
    let cold = activation(&bench, "{}", Handover::Cold);
    let prepared = prepare(&bench, &component, cold, &mut [&mut one, &mut two]).expect("a generation");
    assert_eq!(prepared.inherited, Some(handed(2)));
    drop(two);
    slot.publish(prepared).expect("a publish");
    bench.runtime.maintain();
    // What waited for `two` would be asked too.
    assert_eq!(swap(&bench, &slot, &component, &mut [&mut one]), handed(1));
}

#[test]
fn one_that_has_faulted_hands_nothing_over() {
    let bench = bench();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    let trap = format!(r#"{{"do": "trap", "after": {PROBED}}}"#);
    slot.publish(bench.prepare(&component, "scheduler", &trap)).expect("a publish");
    while slot.status().faults.iter().sum::<u64>() == 0 {
        step(&mut guest);
    }
    let handed = swap(&bench, &slot, &component, &mut [&mut guest]);
    // The spare answers, which knows of nothing but its own warming, and not the one that had all the calls.
    assert!(inherited(&bench) <= WARM, "{handed:?}");
}

#[test]
fn an_owner_that_does_not_come_is_not_waited_for_without_end() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("fixture-scheduler");
    let mut guest = slot.attach("one");
    slot.publish(bench.prepare(&component, "scheduler", "{}")).expect("a publish");
    step(&mut guest);
    // Where maintenance is by hand nobody waits at all.
    let prepared = bench.prepare(&component, "scheduler", "{}");
    let cold = prepared.inherited.expect("it exports handover").cold;
    assert!(cold.len() == 1 && cold[0].contains("came to no boundary"), "{cold:?}");
}
