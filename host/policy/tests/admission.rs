//! An admission guest through the trait: verdicts and their checks, faults, and what it hears of the end.

mod support;

use std::sync::Arc;

use pointsman_policy::{Activation, AdmissionSlot, Arm, Compared, FaultKind, Health, Role, Slot};
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
        shadow: 0,
    }
}

/// Asks, for an ending that can be told.
fn accepted(slot: &AdmissionSlot, now: u64) -> Accepted {
    slot.admit(now, &request(1), &Load::default()).accepted(now).expect("a policy accepts it")
}

fn settle(slot: &AdmissionSlot, now: u64, names: &Arc<Names>) {
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
    settle(&slot, 2, &Arc::default());
    assert_eq!(slot.status().calls, 0);
}

#[test]
fn a_quota_is_spent_refused_and_given_back() {
    let bench = Bench::new();
    let slot = slot(&bench, "admit-token-bucket", r#"{"tokens_per_second": 0, "burst_tokens": 250, "output_cost": 1}"#);
    assert!(!slot.is_native());
    let names = Arc::<Names>::default();
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
        settle(&slot, round, &Arc::default());
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
    settle(&slot, 1, &Arc::default());
    assert_eq!(slot.status().calls, 1 + 8, "the newest 8,192, a thousand at a time");
    settle(&slot, 2, &Arc::default());
    assert_eq!(slot.status().calls, 1 + 8, "nothing left to say");
}

// === a quota that counts what is inside ===

/// Room for one request of a tenant; one that the host failed gives all of it back, so the bucket counts what is inside.
const ONE: &str = r#"{"tokens_per_second": 0, "burst_tokens": 150, "output_cost": 1}"#;

/// A slot with the policy [`ONE`], and who heard of which ending.
struct Door {
    bench: Bench,
    slot: Arc<AdmissionSlot>,
    names: Arc<Names>,
}

impl Door {
    fn new() -> Self {
        Self::of(Bench::with(|config| config.router_instances = 1))
    }

    fn of(bench: Bench) -> Self {
        let slot = slot(&bench, "admit-token-bucket", ONE);
        let names = Arc::<Names>::default();
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
    let names = Arc::<Names>::default();
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
    let names = Arc::<Names>::default();
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

// === a shadow at the door ===

/// Everything.
const ALL: u32 = 1_000_000;

impl Door {
    fn shadow(&self, config: &str) {
        self.slot.stage(self.prepare(config, Role::Shadow)).expect("staged");
        self.slot.shadow(ALL).expect("a shadow");
    }

    /// As of a request that the shadow was asked about, too.
    fn end_of_both(&self, id: u64, accepted: Accepted) {
        let shadow = self.slot.candidate().expect("staged").generation;
        self.slot.ended(Ending { shadow, ..ending(id, Outcome::Failed, accepted) });
    }

    /// What the shadow's answers came to: those that agree, and the others by kind.
    fn tally(&self) -> (u64, Vec<(&'static str, u64)>) {
        self.bench.runtime.maintain();
        tally(&self.slot)
    }
}

fn tally(slot: &AdmissionSlot) -> (u64, Vec<(&'static str, u64)>) {
    let Compared { agreed, differed, unanswered, dropped, .. } = slot.compared().expect("a shadow");
    assert_eq!((unanswered, dropped), (0, 0));
    (agreed, differed.into_iter().filter(|(_, n)| *n > 0).collect())
}

#[test]
fn an_equal_quota_counts_the_same_as_a_shadow_and_what_it_counts_is_thrown_away() {
    for promoted in [false, true] {
        let door = Door::new();
        let before = door.let_in(1);
        door.shadow(ONE);
        assert!(door.is_full());
        door.end(1, before);
        assert_eq!(door.settle(), [(1, vec![1])], "the copy is told, and nobody is told of that");
        let both = door.let_in(2);
        assert!(door.is_full());
        assert_eq!(door.tally(), (3, vec![]));
        door.end_of_both(2, both);
        assert_eq!(door.settle(), [(1, vec![2])]);
        let last = door.let_in(3);
        assert_eq!(door.tally(), (4, vec![]), "it has heard of the end, too");
        let said = door.slot.shadow_said(RequestId(3)).expect("asked not long ago");
        assert_eq!((said.verdict, said.decided_by.generation), (Some(Verdict::Accept), 2));
        let ended = if promoted { door.slot.promote() } else { door.slot.unstage() };
        let heir = ended.expect("staged").generation;
        assert!(door.is_full(), "promoted {promoted}: as control has counted");
        door.end(3, last);
        assert_eq!(door.settle(), [(heir, vec![3])], "promoted {promoted}");
        assert!(door.enter(4).is_some() && door.is_full());
        assert_eq!((door.slot.compared(), door.slot.status().draining), (None, 0), "promoted {promoted}");
    }
}

#[test]
fn what_a_shadow_alone_would_let_in_ends_at_once() {
    let door = Door::new();
    door.shadow(r#"{"tokens_per_second": 0, "burst_tokens": 300, "output_cost": 1}"#);
    let first = door.let_in(1);
    for (what, would_serve) in [("it has room for one more", 1), ("that one has ended", 2), ("and that one", 3)] {
        assert!(door.is_full());
        assert_eq!(door.tally(), (1, vec![("would-serve", would_serve)]), "{what}");
        assert_eq!(door.settle(), [], "{what}: the active policy never let it in");
    }
    assert!(door.is_full() && door.is_full(), "between two rounds");
    assert_eq!(door.tally(), (2, vec![("would-serve", 4)]), "the second one is refused by both");
    door.end_of_both(1, first);
    assert_eq!(door.settle(), [(1, vec![1])]);
}

#[test]
fn a_shadow_hears_of_the_end_of_what_it_was_asked_about_and_of_nothing_else() {
    let door = Door::new();
    door.shadow(ONE);
    let asked = door.let_in(1);
    door.tally();
    door.slot.shadow(0).expect("staged");
    door.end_of_both(1, asked);
    door.settle();
    let unasked = door.let_in(2);
    assert_eq!(door.slot.compared().expect("a shadow").agreed, 1, "paused, it is asked nothing");
    door.slot.shadow(ALL).expect("staged");
    assert!(door.is_full());
    assert_eq!(
        door.tally(),
        (1, vec![("would-serve", 1)]),
        "it has heard of the end of the first, and not of the second"
    );
    door.end(2, unasked);
    door.settle();
    assert!(door.let_in(3).generation == 1 && door.is_full());
    assert_eq!(door.tally(), (3, vec![("would-serve", 1)]));
}

#[test]
fn a_shadow_beside_the_native_policy_is_asked_and_nobody_is_refused() {
    let bench = Bench::with(|config| config.router_instances = 1);
    let slot = bench.runtime.admission_slot("admission");
    let names = Arc::<Names>::default();
    names.intern(NameKind::Tenant, "acme");
    let activation = Activation { role: Role::Shadow, ..bench.activation("admission", ONE) };
    let prepared = bench.runtime.prepare(&bench.admit("admit-token-bucket"), activation).expect("a generation");
    slot.stage(prepared).expect("staged");
    assert!(slot.is_native(), "nothing is put to it yet");
    slot.shadow(ALL).expect("a shadow");
    assert!(!slot.is_native());
    let ask = |id| {
        let judged = slot.admit(bench.now(), &request(id), &Load::default());
        bench.advance(1);
        assert_eq!((judged.verdict, judged.fallback, judged.shadow), (None, None, 1));
    };
    (1..=3).for_each(ask);
    assert_eq!(tally(&slot), (1, vec![("would-refuse", 2)]));
    // Who entered without a policy is told of because the shadow was asked; it had let in the first one only.
    (1..=3).for_each(|id| slot.ended(Ending { shadow: 1, ..ending(id, Outcome::Failed, Accepted::default()) }));
    slot.settle(bench.now(), &names, &mut |_, _| panic!("no policy has taken in anything"));
    bench.advance(1);
    (4..=5).for_each(ask);
    assert_eq!(tally(&slot), (2, vec![("would-refuse", 3)]));
    slot.unstage().expect("staged");
    assert!(slot.is_native() && slot.compared().is_none());
}

#[test]
fn a_shadow_at_the_door_that_misbehaves_is_off_at_its_third_fault() {
    for deed in ["trap", "above-highest"] {
        // Three instances: none is replaced before its time.
        let door = Door::of(Bench::new());
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        let activation = Activation { role: Role::Shadow, ..door.bench.activation("admission", &config) };
        let component = door.bench.admit("fixture-admission");
        door.slot.stage(door.bench.runtime.prepare(&component, activation).expect("a generation")).expect("staged");
        door.slot.shadow(ALL).expect("a shadow");
        door.let_in(1);
        (0..4 * PROBED).for_each(|_| assert!(door.is_full(), "{deed}: the active policy decides"));
        let (active, shadow) = (door.slot.status(), door.slot.candidate().expect("staged"));
        assert_eq!((shadow.faults.iter().sum::<u64>(), shadow.fallbacks), (3, 0), "{deed}");
        assert!(matches!(shadow.health, Health::Open { .. }), "{deed}");
        assert_eq!((active.health, active.faults, active.fallbacks), (Health::Closed, [0; 5], 0), "{deed}");
        assert!(door.slot.compared().is_some_and(|compared| compared.unanswered > 0), "{deed}");
    }
}
