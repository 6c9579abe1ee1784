//! A candidate that is asked and never obeyed: what its answers come to, and that nobody else notices it. Maintenance is by
//! hand, so the test decides when the shadow works.

mod support;

use std::sync::Arc;

use pointsman_policy::{
    Activation, Compared, Component, FaultKind, Health, Prepared, PublishError, Role, RouterSlot, SchedulerGuest,
    SchedulerSlot, Slot,
};
use pointsman_sched::batch::{Answer, Attention, BatchPolicy, Changes, Plan, SequenceColumns, View};
use pointsman_sched::route::{Choice, RoutePolicy};
use support::{Bench, SECOND, arrivals, budgets, counter, replicas, request, sequences};

const ALL: u32 = 1_000_000;
/// Decisions that a shadow may be behind.
const QUEUE: u64 = 256;
/// Calls that every probe makes, so that a fixture with this `after` passes the probe.
const PROBED: u32 = 40;

fn prepare(bench: &Bench, component: &Component, config: &str) -> Prepared {
    let activation = Activation { role: Role::Shadow, ..bench.activation("router", config) };
    bench.runtime.prepare(component, activation).expect("a generation")
}

/// A slot with this policy and this shadow, which gets everything.
fn shadowed(bench: &Bench, active: &str, candidate: (&str, &str)) -> Arc<RouterSlot> {
    let slot = bench.runtime.router_slot("router");
    slot.publish(bench.prepare(&bench.admit(active), "router", "{}")).expect("a publish");
    slot.stage(prepare(bench, &bench.admit(candidate.0), candidate.1)).expect("staged");
    slot.shadow(ALL).expect("a shadow");
    slot
}

/// Routes so many requests; the shadow looks at them only afterwards. Every answer is the active policy's.
fn route(bench: &Bench, slot: &RouterSlot, requests: std::ops::Range<u64>) -> Vec<Choice> {
    let columns = replicas(4, 2);
    let one = |now| {
        let routed = slot.route(now, &request(now), &columns);
        assert_eq!((routed.decided_by.generation, routed.fallback), (1, None), "{now}");
        routed.choice
    };
    let choices = requests.map(one).collect();
    bench.runtime.maintain();
    choices
}

fn compared(slot: &RouterSlot) -> Compared {
    slot.compared().expect("a shadow")
}

fn n_compared(slot: &RouterSlot) -> u64 {
    let Compared { agreed, differed, .. } = compared(slot);
    agreed + differed.iter().map(|(_, n)| n).sum::<u64>()
}

#[test]
fn an_equal_policy_agrees_always_and_another_where_it_does() {
    for (candidate, config, agreed, kind) in [
        ("route-least-loaded", "{}", 200, None),
        ("fixture-router", r#"{"do": "abstain"}"#, 200, None),
        ("fixture-router", "{}", 0, Some(("other-replica", 200))),
        ("fixture-router", r#"{"do": "reject"}"#, 0, Some(("would-refuse", 200))),
    ] {
        let bench = Bench::new();
        let slot = shadowed(&bench, "route-least-loaded", (candidate, config));
        route(&bench, &slot, 0..200);
        let found = compared(&slot);
        assert_eq!((found.agreed, found.unanswered, found.dropped), (agreed, 0, 0), "{candidate} {config}");
        let differed: Vec<(&str, u64)> = found.differed.into_iter().filter(|(_, n)| *n > 0).collect();
        assert_eq!(differed, Vec::from_iter(kind), "{candidate} {config}");
        assert!(0 < found.call_p50_ns && found.call_p50_ns <= found.call_p99_ns, "{candidate} {config}");
        let (active, shadow) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!((active.calls, shadow.calls, shadow.fallbacks), (200, 200, 0), "{candidate} {config}");
        assert_eq!((active.serving, shadow.serving), (true, false), "{candidate} {config}");
    }
}

#[test]
fn who_would_serve_what_the_active_policy_refuses_differs() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    slot.publish(bench.prepare(&bench.admit("fixture-router"), "router", r#"{"do": "reject"}"#)).expect("a publish");
    for (generation, candidate, expect) in [(2, None, ("would-serve", 1)), (3, Some("fixture-router"), ("", 0))] {
        match candidate {
            None => slot.stage_native(generation).expect("staged"),
            Some(name) => {
                let activation =
                    Activation { generation, role: Role::Shadow, ..bench.activation("router", r#"{"do": "reject"}"#) };
                let prepared = bench.runtime.prepare(&bench.admit(name), activation).expect("a generation");
                slot.stage(prepared).expect("staged");
            }
        }
        slot.shadow(ALL).expect("a shadow");
        slot.route(1, &request(1), &replicas(4, 2));
        bench.runtime.maintain();
        let found = compared(&slot);
        assert_eq!(found.agreed, u64::from(candidate.is_some()));
        assert_eq!(found.differed.into_iter().find(|(_, n)| *n > 0).unwrap_or_default(), expect);
        slot.unstage().expect("staged");
    }
}

#[test]
fn a_share_is_sampled_evenly_and_nothing_is_sampled_while_paused() {
    let bench = Bench::new();
    let slot = shadowed(&bench, "route-least-loaded", ("route-least-loaded", "{}"));
    for (share, first, expect) in
        [(100_000, 0, 10..=30), (0, 200, 0..=0), (500_000, 400, 90..=110), (ALL, 600, 200..=200)]
    {
        let before = n_compared(&slot);
        slot.shadow(share).expect("a shadow");
        route(&bench, &slot, first..first + 200);
        let n = n_compared(&slot) - before;
        assert!(expect.contains(&n), "{share}: {n}");
    }
    assert_eq!(compared(&slot).dropped, 0);
    let asked = slot.shadow_said(request(799).id).expect("one of the last");
    assert_eq!((asked.decided_by.generation, asked.choice), (2, Choice::Pick(2)));
    assert_eq!(slot.shadow_said(request(250).id), None, "it was not asked then");
}

#[test]
fn what_does_not_fit_is_dropped_and_counted() {
    let bench = Bench::new();
    let slot = shadowed(&bench, "route-least-loaded", ("route-least-loaded", "{}"));
    route(&bench, &slot, 0..QUEUE + 44);
    assert_eq!((n_compared(&slot), compared(&slot).dropped), (QUEUE, 44));
    route(&bench, &slot, 300..400);
    assert_eq!((n_compared(&slot), compared(&slot).dropped), (QUEUE + 100, 44), "there is room again");
    // What waits when it is paused is not asked any more.
    slot.route(1, &request(1), &replicas(4, 2));
    slot.shadow(0).expect("a shadow");
    bench.runtime.maintain();
    assert_eq!((n_compared(&slot), compared(&slot).dropped), (QUEUE + 100, 45));
}

#[test]
fn a_shadow_that_misbehaves_is_off_at_its_third_fault_and_nobody_notices() {
    for (deed, kind) in [("trap", FaultKind::Trap), ("spin", FaultKind::Timeout), ("bad-row", FaultKind::BadAnswer)] {
        let bench = Bench::new();
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        let slot = shadowed(&bench, "route-least-loaded", ("fixture-router", &config));
        let choices = route(&bench, &slot, 0..200);
        assert!(choices.iter().all(|choice| *choice == Choice::Pick(2)), "{deed}");
        let (active, shadow) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!(shadow.faults[kind as usize], 3, "{deed}");
        assert!(matches!(shadow.health, Health::Open { .. }), "{deed}");
        assert_eq!((active.health, active.faults, active.fallbacks), (Health::Closed, [0; 5], 0), "{deed}");
        let found = compared(&slot);
        assert_eq!(n_compared(&slot) + found.unanswered, 200, "{deed}");
        assert_eq!(shadow.fallbacks, 0, "{deed}: nobody fell back");
        let text = bench.metrics.render();
        assert!(text.contains(r#"pointsman_policy_fallbacks_total{slot="router"} 0"#), "{deed}: {text}");
        assert_eq!(bench.faults.lock().expect("not poisoned").len(), 3, "{deed}: each is told");
        slot.unstage().expect("staged");
        bench.advance(8 * SECOND);
        assert_eq!((slot.compared(), slot.status().draining), (None, 0), "{deed}: nothing is left");
    }
}

#[test]
fn a_shadow_counts_in_an_overlay_that_is_thrown_away() {
    for promoted in [false, true] {
        let bench = Bench::new();
        let slot = bench.runtime.router_slot("router");
        let component = bench.runtime.admit(&counter("0.2.0", 1)).expect("a component");
        slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
        let columns = replicas(100, 0);
        let pick = |now| slot.route(now, &request(now), &columns).choice;
        let rows = |rows: std::ops::Range<u32>| rows.map(Choice::Pick).collect::<Vec<_>>();
        assert_eq!((0..3).map(pick).collect::<Vec<_>>(), rows(0..3));
        slot.stage(prepare(&bench, &component, "{}")).expect("staged");
        slot.shadow(ALL).expect("a shadow");
        assert_eq!((3..6).map(pick).collect::<Vec<_>>(), rows(3..6), "the shadow does not count here");
        bench.runtime.maintain();
        let said = (3..6).map(|now| slot.shadow_said(request(now).id).expect("asked").choice).collect::<Vec<_>>();
        assert_eq!(said, rows(6..9), "it reads what the active policy wrote until then, and goes on by itself");
        let ended = if promoted { slot.promote() } else { slot.unstage() };
        assert_eq!(ended.expect("staged").generation, if promoted { 2 } else { 1 });
        assert_eq!(pick(9), Choice::Pick(6), "promoted {promoted}: from the namespace, not from the overlay");
        assert_eq!(slot.compared(), None);
    }
}

#[test]
fn instances_of_an_ended_shadow_are_free_again() {
    // Room for the active policy and one candidate: one that leaked an instance would let the next one fail.
    let bench = Bench::with(|config| config.max_instances = 7);
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    for turn in 0..20 {
        slot.stage(prepare(&bench, &component, "{}")).expect("staged");
        slot.shadow(ALL).expect("a shadow");
        (0..10).for_each(|now| assert!(slot.route(now, &request(now), &replicas(4, 2)).fallback.is_none()));
        let ended = if turn % 2 == 0 { slot.promote() } else { slot.unstage() };
        ended.expect("staged");
        bench.runtime.maintain();
        assert_eq!(slot.status().draining, 0, "{turn}");
    }
}

#[test]
fn a_slot_without_shadows_says_so() {
    let bench = Bench::new();
    let (router, hook) = (bench.runtime.router_slot("router"), bench.runtime.telemetry_slot("telemetry.a"));
    assert_eq!(router.shadow(ALL), Err(PublishError::NothingStaged { slot: "router".into() }));
    hook.stage_native(1).expect("staged");
    assert_eq!(hook.shadow(ALL), Err(PublishError::NoShadow { slot: "telemetry.a".into() }));
    assert_eq!(hook.compared(), None);
}

// === schedulers ===

/// A scheduler slot with this shadow of `sched-fcfs`, and the policy of a replica that has its view.
fn scheduled(bench: &Bench, share_ppm: u32, candidate: (&str, &str)) -> (Arc<SchedulerSlot>, SchedulerGuest) {
    let slot = bench.runtime.scheduler_slot("scheduler");
    let mut guest = slot.attach("demo");
    slot.publish(bench.prepare(&bench.admit("sched-fcfs"), "scheduler", "{}")).expect("a publish");
    let activation = Activation { role: Role::Shadow, ..bench.activation("scheduler", candidate.1) };
    slot.stage(bench.runtime.prepare(&bench.admit(candidate.0), activation).expect("a generation")).expect("staged");
    slot.shadow(share_ppm).expect("a shadow");
    assert_eq!(guest.attend(1), Attention::NeedsView);
    show(&[(1, 900), (2, 100)], |view| guest.resync(view));
    (slot, guest)
}

fn show(waiting: &[(u64, u32)], show: impl FnOnce(&View<'_>)) {
    let (budgets, waiting, running) = (budgets(), sequences(waiting), SequenceColumns::default());
    show(&View { now: 1, seed: 7, budgets: &budgets, tenants: &[], waiting: &waiting, running: &running });
}

/// A step boundary at which a request arrives; as the scheduler does, it shows whoever begins everything so far.
fn boundary(bench: &Bench, guest: &mut SchedulerGuest, queue: &mut Vec<(u64, u32)>) -> Vec<u64> {
    assert_eq!(guest.attend(2), Attention::Following);
    let arrived = (queue.len() as u64 + 1, 10 + 7 * queue.len() as u32 % 100);
    queue.push(arrived);
    let mut plan = Plan::default();
    assert_eq!(guest.step(2, &budgets(), &arrivals(&[arrived]), &mut plan), Answer::Planned);
    if guest.wants_view() {
        show(queue, |view| guest.show(view));
    }
    bench.runtime.maintain();
    plan.admit
}

fn tally(slot: &SchedulerSlot) -> (u64, u64, u64, u64) {
    let Compared { agreed, differed, unanswered, dropped, .. } = slot.compared().expect("a shadow");
    (agreed, differed.iter().map(|(_, n)| n).sum(), unanswered, dropped)
}

#[test]
fn the_shadow_of_a_scheduler_follows_its_replica() {
    for (candidate, agrees) in [("sched-fcfs", true), ("sched-shortest-first", false)] {
        let bench = Bench::new();
        let (slot, mut guest) = scheduled(&bench, ALL, (candidate, "{}"));
        let mut queue = vec![(1, 900), (2, 100)];
        let plans: Vec<_> = (0..40).map(|_| boundary(&bench, &mut guest, &mut queue)).collect();
        let (agreed, differed, unanswered, dropped) = tally(&slot);
        assert_eq!((agreed + differed, unanswered, dropped), (39, 0, 0), "{candidate}: it begins after the first step");
        assert_eq!(agreed == 39, agrees, "{candidate}");
        let arrivals: Vec<u64> = queue.iter().map(|(id, _)| *id).collect();
        assert_eq!(plans.last(), Some(&arrivals), "{candidate}: the active policy decides");
        assert_eq!((slot.status().calls, slot.status().fallbacks), (41, 0), "{candidate}: and hears nothing twice");
        let promoted = slot.promote().expect("staged");
        assert_eq!((guest.attend(3), guest.generation()), (Attention::NeedsView, promoted.generation));
        bench.runtime.maintain();
        assert_eq!((slot.status().draining, slot.status().instances), (0, 2), "{candidate}: no instance is lost");
    }
}

#[test]
fn a_shadow_that_fell_behind_begins_anew_and_counts_what_it_missed() {
    let bench = Bench::new();
    let (slot, mut guest) = scheduled(&bench, ALL, ("sched-fcfs", "{}"));
    let mut queue = vec![(1, 900), (2, 100)];
    boundary(&bench, &mut guest, &mut queue);
    // Nobody works at the shadow's desk: the queue fills.
    for _ in 0..QUEUE + 10 {
        guest.attend(2);
        let mut plan = Plan::default();
        guest.step(2, &budgets(), &Changes::default(), &mut plan);
        assert!(!guest.wants_view(), "it follows, or there is no room");
    }
    assert_eq!(tally(&slot), (0, 0, 0, 10));
    bench.runtime.maintain();
    (0..10).for_each(|_| drop(boundary(&bench, &mut guest, &mut queue)));
    assert_eq!(tally(&slot), (QUEUE + 9, 0, 0, 10));
}

#[test]
fn copies_of_a_long_queue_take_more_room() {
    let bench = Bench::new();
    let (slot, mut guest) = scheduled(&bench, ALL, ("sched-fcfs", "{}"));
    boundary(&bench, &mut guest, &mut vec![(1, 900), (2, 100)]);
    // News of 3,500 ids takes four places: what waits for the shadow is bounded in bytes too.
    let news = Changes { gone: (10_000..13_500).collect(), ..Changes::default() };
    for _ in 0..QUEUE {
        assert_eq!(guest.step(2, &budgets(), &news, &mut Plan::default()), Answer::Planned);
        assert!(!guest.wants_view(), "it follows, or there is no room");
    }
    bench.runtime.maintain();
    assert_eq!(tally(&slot), (QUEUE / 4, 0, 0, QUEUE - QUEUE / 4));
}

#[test]
fn a_pause_between_two_steps_makes_the_shadow_begin_anew() {
    let bench = Bench::new();
    let (slot, mut guest) = scheduled(&bench, ALL, ("sched-fcfs", "{}"));
    let mut queue = vec![(1, 900), (2, 100)];
    boundary(&bench, &mut guest, &mut queue);
    let mut plan = Plan::default();
    queue.push((3, 50));
    guest.step(2, &budgets(), &arrivals(&[(3, 50)]), &mut plan);
    // What waits is thrown away, and the driver knows of no pause.
    slot.shadow(0).expect("a shadow");
    bench.runtime.maintain();
    slot.shadow(ALL).expect("a shadow");
    (0..QUEUE).for_each(|_| drop(boundary(&bench, &mut guest, &mut queue)));
    let (agreed, differed, unanswered, dropped) = tally(&slot);
    assert_eq!((differed, unanswered, dropped), (0, 0, 1), "nothing is compared that was not heard");
    assert!(agreed > QUEUE / 2, "{agreed}");
    assert_eq!(slot.candidate().expect("staged").faults, [0; 5]);
}

#[test]
fn a_stretch_is_followed_and_the_rest_is_left_alone() {
    let bench = Bench::new();
    let (slot, mut guest) = scheduled(&bench, 500_000, ("sched-fcfs", "{}"));
    let mut queue = vec![(1, 900), (2, 100)];
    (0..512).for_each(|_| drop(boundary(&bench, &mut guest, &mut queue)));
    let (agreed, differed, unanswered, _) = tally(&slot);
    assert!((240..=260).contains(&agreed) && (differed, unanswered) == (0, 0), "{agreed}");
}

#[test]
fn a_scheduler_that_misbehaves_as_a_shadow_is_off_at_its_third_fault() {
    for (deed, kind) in [("trap", FaultKind::Trap), ("unknown-id", FaultKind::BadAnswer)] {
        let bench = Bench::new();
        let config = format!(r#"{{"do": "{deed}", "after": 12}}"#);
        let (slot, mut guest) = scheduled(&bench, ALL, ("fixture-scheduler", &config));
        let mut queue = vec![(1, 900), (2, 100)];
        for _ in 0..400 {
            boundary(&bench, &mut guest, &mut queue);
            bench.advance(SECOND / 10);
        }
        let (active, shadow) = (slot.status(), slot.candidate().expect("staged"));
        assert_eq!(shadow.faults[kind as usize], 3, "{deed}");
        assert!(matches!(shadow.health, Health::Open { .. }), "{deed}");
        assert_eq!((active.health, active.faults, active.fallbacks), (Health::Closed, [0; 5], 0), "{deed}");
        slot.unstage().expect("staged");
        bench.advance(8 * SECOND);
        assert_eq!((slot.status().draining, slot.compared()), (0, None), "{deed}");
    }
}
