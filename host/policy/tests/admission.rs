//! An admission guest through the trait: verdicts and their checks, faults, and what it hears of the end.

mod support;

use std::sync::Arc;

use pointsman_policy::{Activation, AdmissionSlot, Arm, FaultKind, Role, Slot};
use pointsman_sched::admit::{Accepted, AdmitPolicy, AdmitRequest, Ending, Judged, Load, Outcome, Verdict};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{Refusal, RequestNumbers};
use pointsman_telemetry::{NameKind, Names};
use support::{Bench, SECOND};

/// Calls that every probe makes, so that a fixture with this `after` passes the probe.
const PROBED: u64 = 40;

fn request(id: u64) -> AdmitRequest<'static> {
    AdmitRequest {
        id: RequestId(id),
        model: "demo",
        tenant: "acme",
        tenant_id: 1,
        session: 0,
        priority: Priority::Normal,
        highest: Priority::High,
        prompt_tokens: 100,
        max_new_tokens: 50,
        arrived: 1,
        deadline: 0,
        seed: id,
        numbers: RequestNumbers::default(),
        attributes: &[],
    }
}

fn ending(id: u64, outcome: Outcome, accepted: Accepted) -> Ending {
    Ending {
        id: RequestId(id),
        tenant: 1,
        outcome,
        prompt_tokens: 100,
        cached_tokens: 0,
        generated_tokens: 10,
        max_new_tokens: 50,
        accepted,
    }
}

/// Asks, for an ending that can be told.
fn accepted(slot: &AdmissionSlot, now: u64) -> Accepted {
    slot.admit(now, &request(1), &Load::default()).accepted(now).expect("a policy accepts it")
}

fn settle(slot: &AdmissionSlot, now: u64, names: &Names) {
    slot.settle(now, names, &mut |_, _| ());
}

fn slot(bench: &Bench, guest: &str, config: &str) -> Arc<AdmissionSlot> {
    let slot = bench.runtime.admission_slot("admission");
    let component = bench.admit(guest);
    slot.publish(bench.prepare(&component, "admission", config)).expect("a publish");
    slot
}

#[test]
fn a_native_slot_accepts_and_is_asked_nothing() {
    let bench = Bench::new();
    let slot = bench.runtime.admission_slot("admission");
    assert!(slot.is_native());
    let judged = slot.admit(1, &request(1), &Load::default());
    assert_eq!((judged.verdict.as_ref(), judged.fallback, judged.accepted(1)), (None, None, None));
    assert_eq!(&*judged.decided_by.revision, "native");
    slot.ended(ending(1, Outcome::Finished, Accepted::default()));
    settle(&slot, 2, &Names::default());
    assert_eq!(slot.status().calls, 0);
}

#[test]
fn a_quota_is_spent_refused_and_given_back() {
    let bench = Bench::new();
    let slot = slot(&bench, "admit-token-bucket", r#"{"tokens_per_second": 0, "burst_tokens": 250, "output_cost": 1}"#);
    assert!(!slot.is_native());
    let names = Names::default();
    assert_eq!(names.intern(NameKind::Tenant, "acme"), 1);
    let ask = |id| slot.admit(id, &request(id), &Load::default()).verdict;
    let first = accepted(&slot, 1);
    match ask(2) {
        Some(Verdict::Reject(rejection)) => {
            assert_eq!(rejection.reason, Refusal::Quota);
            assert!(rejection.message.contains("100 tokens of its quota left"), "{}", rejection.message);
        }
        other => panic!("{other:?}"),
    }
    // 40 tokens were not generated, and 100 + 40 are still too few; then everything of a failed one comes back.
    for (id, outcome, expect) in [(1, Outcome::Finished, false), (1, Outcome::Failed, true)] {
        slot.ended(ending(id, outcome, first));
        settle(&slot, 3, &names);
        assert_eq!(ask(3) == Some(Verdict::Accept), expect, "{outcome:?}");
    }
    let status = slot.status();
    assert_eq!((status.faults, status.fallbacks), ([0; 5], 0));
    bench.runtime.bypass(true);
    assert!(slot.is_native() && ask(4).is_none(), "one switch for every slot");
    bench.runtime.bypass(false);
    assert!(matches!(ask(5), Some(Verdict::Reject(_))), "its quota is as it was");
}

#[test]
fn misdeeds_become_faults_and_the_request_enters() {
    for (deed, kind) in [
        ("trap", FaultKind::Trap),
        ("spin", FaultKind::Timeout),
        ("recurse", FaultKind::Trap),
        ("above-highest", FaultKind::BadAnswer),
        ("huge-text", FaultKind::BadAnswer),
    ] {
        let bench = Bench::with(|config| config.router_instances = 1);
        let slot = slot(&bench, "fixture-admission", &format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#));
        let answers: Vec<_> = (1..=100).map(|id| slot.admit(id, &request(id), &Load::default())).collect();
        let good = |answer: &Judged| match &answer.verdict {
            None => answer.fallback.is_some() && answer.accepted(1).is_none(),
            Some(verdict) => *verdict == Verdict::Accept && answer.fallback.is_none(),
        };
        assert!(answers.iter().all(good), "{deed}: {answers:?}");
        let status = slot.status();
        assert!(status.faults[kind as usize] > 0 && status.fallbacks > 0, "{deed}: {status:?}");
    }
    let bench = Bench::with(|config| config.router_instances = 1);
    let slot = slot(&bench, "fixture-admission", &format!(r#"{{"do": "trap", "after": {PROBED}}}"#));
    let by = accepted(&slot, 1);
    for round in 1..=3 * PROBED {
        slot.ended(ending(round, Outcome::Finished, by));
        settle(&slot, round, &Names::default());
    }
    let status = slot.status();
    assert!(status.faults[FaultKind::Trap as usize] > 0, "in settle: {status:?}");
}

#[test]
fn endings_are_bounded_and_cut_into_batches() {
    let bench = Bench::new();
    let slot = slot(&bench, "fixture-admission", "{}");
    let by = accepted(&slot, 1);
    (0..20_000).for_each(|id| slot.ended(ending(id, Outcome::Finished, by)));
    settle(&slot, 1, &Names::default());
    assert_eq!(slot.status().calls, 1 + 8, "the newest 8,192, a thousand at a time");
    settle(&slot, 2, &Names::default());
    assert_eq!(slot.status().calls, 1 + 8, "nothing left to say");
}

// === a quota that counts what is inside ===

/// Room for one request of a tenant; one that the host failed gives all of it back, so the bucket counts what is inside.
const ONE: &str = r#"{"tokens_per_second": 0, "burst_tokens": 150, "output_cost": 1}"#;

/// A slot with the policy [`ONE`], and who heard of which ending.
struct Door {
    bench: Bench,
    slot: Arc<AdmissionSlot>,
    names: Names,
}

impl Door {
    fn new() -> Self {
        let bench = Bench::with(|config| config.router_instances = 1);
        let slot = slot(&bench, "admit-token-bucket", ONE);
        let names = Names::default();
        assert_eq!(names.intern(NameKind::Tenant, "acme"), 1);
        Self { bench, slot, names }
    }

    /// Who let a request in, if anybody did.
    fn enter(&self, id: u64) -> Option<Accepted> {
        let now = self.bench.advance(1);
        self.slot.admit(now, &request(id), &Load::default()).accepted(now)
    }

    fn let_in(&self, id: u64) -> Accepted {
        self.enter(id).unwrap_or_else(|| panic!("request {id} finds room"))
    }

    fn is_full(&self) -> bool {
        self.enter(0).is_none()
    }

    fn end(&self, id: u64, accepted: Accepted) {
        self.slot.ended(ending(id, Outcome::Failed, accepted));
    }

    /// Generations and the ids of which they hear.
    fn settle(&self) -> Vec<(u64, Vec<u64>)> {
        let mut heard = Vec::new();
        let now = self.bench.advance(1);
        self.slot.settle(now, &self.names, &mut |by, endings| {
            heard.push((by.generation, endings.iter().map(|ending| ending.id.0).collect()));
        });
        self.bench.advance(1);
        heard
    }

    fn prepare(&self, config: &str, role: Role) -> pointsman_policy::Prepared {
        let component = self.bench.admit("admit-token-bucket");
        let activation = Activation { role, ..self.bench.activation("admission", config) };
        self.bench.runtime.prepare(&component, activation).expect("a generation")
    }
}

#[test]
fn endings_wait_while_nobody_can_be_asked() {
    type Away = fn(&Door);
    type Back = fn(&Door);
    let rows: [(&str, Away, Back, u64); 4] = [
        ("bypassed", |door| door.bench.runtime.bypass(true), |door| door.bench.runtime.bypass(false), 1),
        (
            "native",
            |door| drop(door.slot.publish_native(2).expect("a publish")),
            |door| drop(door.slot.publish(door.prepare(ONE, Role::Active)).expect("a publish")),
            3,
        ),
        ("swapped", |door| drop(door.slot.publish(door.prepare(ONE, Role::Active)).expect("a publish")), |_| {}, 2),
        ("between rounds", |_| {}, |_| {}, 1),
    ];
    for (what, away, back, heir) in rows {
        let door = Door::new();
        let inside = door.let_in(1);
        assert!(door.is_full(), "{what}");
        if what == "native" {
            // The bench numbers activations; native takes a number of its own.
            drop(door.bench.activation("admission", "{}"));
        }
        away(&door);
        door.end(1, inside);
        let early = door.settle();
        back(&door);
        let heard = [early, door.settle()].concat();
        assert_eq!(heard, [(heir, vec![1])], "{what}: once");
        assert!(door.enter(2).is_some() && door.is_full(), "{what}: the count is right again");
    }
}

#[test]
fn an_open_circuit_keeps_what_ends_for_later() {
    let bench = Bench::with(|config| config.router_instances = 1);
    let slot = slot(&bench, "fixture-admission", &format!(r#"{{"do": "trap", "after": {PROBED}}}"#));
    let by = accepted(&slot, bench.now());
    let names = Names::default();
    let mut heard = 0;
    // Whenever the circuit is closed again for a while, some endings are told, and some are lost in the call that traps.
    for id in 1..=600 {
        slot.ended(ending(id, Outcome::Finished, by));
        let calls = slot.status().calls;
        slot.settle(bench.now(), &names, &mut |_, endings| heard += endings.len());
        let asked = slot.status().calls > calls;
        if !asked {
            bench.advance(SECOND);
        }
    }
    bench.advance(60 * SECOND);
    slot.settle(bench.now(), &names, &mut |_, endings| heard += endings.len());
    let lost: u64 = slot.status().faults.iter().sum();
    assert!(lost > 3 && heard > 0, "the circuit was open: {heard} heard, {lost} faults");
}

#[test]
fn each_arm_hears_of_what_its_state_counts() {
    let door = Door::new();
    let before = door.let_in(1);
    door.slot.stage(door.prepare(ONE, Role::Candidate)).expect("staged");
    assert!(door.is_full());
    door.end(1, before);
    assert_eq!(door.settle(), [(1, vec![1]), (2, vec![1])], "the candidate's copy has it too");
    let of_control = door.let_in(2);
    door.slot.serve(Arm::Candidate).expect("staged");
    let of_candidate = door.let_in(3);
    assert!(door.is_full(), "its own state counts");
    door.end(2, of_control);
    door.end(3, of_candidate);
    assert_eq!(door.settle(), [(1, vec![2]), (2, vec![3])], "to each its own");
    let late = door.let_in(4);
    door.slot.unstage().expect("staged");
    door.end(4, late);
    assert_eq!(door.settle(), [], "nobody counts it any more");
    let last = door.let_in(5);
    assert!(door.is_full());
    door.end(5, last);
    assert_eq!(door.settle(), [(1, vec![5])]);
}

#[test]
fn what_ends_while_a_candidate_is_prepared_reaches_its_copy() {
    let door = Door::new();
    let before = door.let_in(1);
    let prepared = door.prepare(ONE, Role::Candidate);
    door.end(1, before);
    assert_eq!(door.settle(), [(1, vec![1])]);
    let between = door.let_in(2);
    door.slot.stage(prepared).expect("staged");
    door.slot.serve(Arm::Candidate).expect("staged");
    assert!(door.is_full(), "the copy has request 1 and not its end");
    assert_eq!(door.settle(), [(2, vec![1])], "told again, to the copy alone");
    let own = door.let_in(3);
    door.slot.promote().expect("staged");
    door.end(2, between);
    assert_eq!(door.settle(), [], "the promoted state never counted request 2");
    assert!(door.is_full());
    door.end(3, own);
    assert_eq!(door.settle(), [(2, vec![3])]);
    assert!(door.enter(4).is_some());
}

#[test]
fn arms_that_share_a_namespace_hear_of_an_ending_once() {
    let bench = Bench::with(|config| config.router_instances = 1);
    let slot = bench.runtime.admission_slot("admission");
    let names = Names::default();
    assert_eq!(names.intern(NameKind::Tenant, "acme"), 1);
    let door = Door { bench, slot, names };
    let component = door.bench.admit("admit-token-bucket");
    let prepare = |role| {
        let namespace = Some("quota".to_owned());
        let activation = Activation { role, namespace, ..door.bench.activation("admission", ONE) };
        door.bench.runtime.prepare(&component, activation).expect("a generation")
    };
    door.slot.publish(prepare(Role::Active)).expect("a publish");
    let of_control = door.let_in(1);
    door.slot.stage(prepare(Role::Candidate)).expect("staged");
    door.slot.serve(Arm::Candidate).expect("staged");
    assert!(door.is_full(), "one state");
    door.end(1, of_control);
    assert_eq!(door.settle(), [(1, vec![1])], "whoever accepted it");
    let of_candidate = door.let_in(2);
    door.slot.unstage().expect("staged");
    door.end(2, of_candidate);
    assert_eq!(door.settle(), [(1, vec![2])], "or who is left of those that share it");
    assert!(door.enter(3).is_some());
}
