//! A scheduling guest over its soft budget computes aside. The soft budget is nothing, so that every call is over it on every
//! machine, and maintenance is by hand: the test decides when the guest is done.

mod support;

use pointsman_policy::{
    Activation, Arm, BudgetChange, Component, FaultKind, Maintenance, SchedulerGuest, SchedulerSlot, Slot,
};
use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Changes, Plan, SequenceColumns, View};
use support::{Bench, arrivals, budgets, sequences};

const OVER: BudgetChange = BudgetChange { soft: Some(0), hard: None, memory_bytes: None };

fn publish(bench: &Bench, slot: &SchedulerSlot, component: &Component, config: &str) {
    let activation = Activation { budget: OVER, ..bench.activation("scheduler", config) };
    slot.publish(bench.runtime.prepare(component, activation).expect("a generation")).expect("a publish");
}

fn resync(guest: &mut SchedulerGuest, waiting: &[(u64, u32)]) {
    let (budgets, waiting, running) = (budgets(), sequences(waiting), SequenceColumns::default());
    guest.resync(&View { now: 1, seed: 7, budgets: &budgets, tenants: &[], waiting: &waiting, running: &running });
}

fn step(guest: &mut SchedulerGuest, changes: &Changes) -> (Answer, Vec<u64>) {
    let mut plan = Plan::default();
    let answer = guest.step(2, &budgets(), changes, &mut plan);
    (answer, plan.admit)
}

/// Two requests wait, and three calls were over the budget: the next one is made aside.
fn slow_guest(slot: &SchedulerSlot) -> SchedulerGuest {
    let mut guest = slot.attach("demo");
    assert_eq!(guest.attend(1), Attention::NeedsView);
    resync(&mut guest, &[(1, 900), (2, 100)]);
    for _ in 0..3 {
        assert_eq!(slot.status().aside, 0);
        assert_eq!(step(&mut guest, &Changes::default()), (Answer::Planned, vec![2, 1]));
        assert_eq!(guest.attend(2), Attention::Following);
    }
    assert_eq!(slot.status().aside, 1);
    guest
}

#[test]
fn a_plan_comes_a_step_late_and_the_device_does_not_wait() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    publish(&bench, &slot, &bench.admit("sched-shortest-first"), "{}");
    let mut guest = slow_guest(&slot);
    assert_eq!(step(&mut guest, &arrivals(&[(3, 500)])), (Answer::Native, vec![]), "handed over");
    for _ in 0..3 {
        assert_eq!((guest.attend(3), guest.generation()), (Attention::Busy, 1));
        guest.stood_in();
    }
    bench.runtime.maintain();
    assert_eq!(guest.attend(4), Attention::Following);
    assert_eq!(step(&mut guest, &arrivals(&[(4, 50)])), (Answer::Planned, vec![2, 3, 1]), "without the fourth");
    bench.runtime.maintain();
    assert_eq!(guest.attend(5), Attention::Following);
    assert_eq!(step(&mut guest, &Changes::default()), (Answer::Planned, vec![4, 2, 3, 1]));
    let status = slot.status();
    assert_eq!((status.late_plans, status.dropped_plans), (2, 0));
    assert_eq!((status.fallbacks, status.faults), (4, [0; 5]));
    assert!(bench.metrics.render().contains(r#"pointsman_policy_late_plans_total{slot="scheduler"} 2"#));
}

#[test]
fn a_late_plan_is_for_the_boundary_that_finds_it() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    publish(&bench, &slot, &bench.admit("sched-shortest-first"), "{}");
    let mut guest = slow_guest(&slot);
    step(&mut guest, &Changes::default());
    bench.runtime.maintain();
    assert_eq!(guest.attend(3), Attention::Following, "nothing to decide here");
    assert_eq!(guest.attend(4), Attention::Following);
    assert_eq!(step(&mut guest, &Changes::default()).0, Answer::Native, "it is too old");
    // A view starts everything anew, aside too.
    bench.runtime.maintain();
    assert_eq!(guest.attend(5), Attention::Following);
    resync(&mut guest, &[(8, 10), (9, 5)]);
    assert_eq!(step(&mut guest, &Changes::default()).0, Answer::Native, "the plan was for another view");
    bench.runtime.maintain();
    guest.attend(6);
    assert_eq!(step(&mut guest, &Changes::default()), (Answer::Planned, vec![9, 8]));
    let status = slot.status();
    assert_eq!((status.late_plans, status.dropped_plans), (1, 2));
}

#[test]
fn a_swap_does_not_wait_for_a_guest_that_is_out() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("sched-shortest-first");
    publish(&bench, &slot, &component, "{}");
    let mut guest = slow_guest(&slot);
    step(&mut guest, &Changes::default());
    publish(&bench, &slot, &component, "{}");
    assert_eq!((guest.attend(3), guest.generation()), (Attention::NeedsView, 2));
    bench.runtime.maintain();
    let status = slot.status();
    assert_eq!((status.draining, status.aside, status.instances), (0, 0, 2), "the old generation drained");
    resync(&mut guest, &[(1, 10)]);
    assert_eq!(
        step(&mut guest, &Changes::default()).0,
        Answer::Planned,
        "a new generation begins on the driver's thread"
    );
    drop(guest);
    bench.runtime.maintain();
    assert_eq!(slot.status().instances, 1);
}

#[test]
fn a_fault_aside_is_a_fault() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let config = r#"{"do": "trap", "after": 20}"#;
    publish(&bench, &slot, &bench.admit("fixture-scheduler"), config);
    let mut guest = slot.attach("demo");
    let mut turns = 0;
    while slot.status().faults[FaultKind::Trap as usize] == 0 {
        if guest.attend(1) == Attention::NeedsView {
            resync(&mut guest, &[(1, 10)]);
        }
        step(&mut guest, &Changes::default());
        bench.runtime.maintain();
        turns += 1;
        assert!(turns < 100, "it never trapped");
    }
    assert!(slot.status().late_plans > 5, "it was aside by then");
    let attention = guest.attend(1);
    assert_eq!(attention, Attention::NeedsView, "the spare");
    assert_eq!((bench.faults.lock().expect("not poisoned").len(), slot.status().instances), (1, 1));
}

#[test]
fn a_refused_late_plan_costs_the_instance_that_is_out() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    publish(&bench, &slot, &bench.admit("sched-shortest-first"), "{}");
    let mut guest = slow_guest(&slot);
    step(&mut guest, &Changes::default());
    bench.runtime.maintain();
    guest.attend(3);
    assert_eq!(step(&mut guest, &Changes::default()).0, Answer::Planned);
    guest.refused(3, BadPlan::UnknownId(99));
    assert_eq!(slot.status().faults[FaultKind::BadAnswer as usize], 1);
    assert_eq!(guest.attend(4), Attention::Busy, "it still computes");
    assert_eq!(guest.generation(), 1);
    bench.runtime.maintain();
    assert_eq!(guest.attend(5), Attention::NeedsView, "a spare: the wrong one is not asked again");
}

#[test]
fn a_refused_late_plan_costs_the_instance_also_when_the_other_arm_serves_meanwhile() {
    let bench = Bench::new();
    let slot = bench.runtime.scheduler_slot("scheduler");
    let component = bench.admit("sched-shortest-first");
    publish(&bench, &slot, &component, "{}");
    let mut guest = slow_guest(&slot);
    slot.stage(bench.prepare(&component, "scheduler", "{}")).expect("a candidate");
    step(&mut guest, &Changes::default());
    bench.runtime.maintain();
    guest.attend(3);
    assert_eq!(step(&mut guest, &Changes::default()).0, Answer::Planned);
    guest.refused(3, BadPlan::UnknownId(99));
    slot.serve(Arm::Candidate).expect("a swap");
    guest.attend(4);
    bench.runtime.maintain();
    assert_eq!(slot.status().instances, 1, "the wrong one does not go back among the others");
}

#[test]
fn the_thread_answers_by_itself() {
    let bench = Bench::with(|config| config.maintenance = Maintenance::Thread);
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    publish(&bench, &slot, &bench.admit("sched-shortest-first"), "{}");
    for turn in 0_u64.. {
        match guest.attend(turn) {
            Attention::NeedsView => resync(&mut guest, &[(1, 900), (2, 100)]),
            Attention::Busy => std::thread::yield_now(),
            Attention::Native | Attention::Following => {}
        }
        let (answer, admit) = step(&mut guest, &Changes::default());
        assert!(answer == Answer::Native || admit == [2, 1]);
        if slot.status().late_plans >= 20 {
            break;
        }
    }
    let status = slot.status();
    assert_eq!((status.aside, status.faults), (1, [0; 5]));
    drop(guest);
    assert_eq!(slot.status().aside, 0);
}
