//! An admission guest through the trait: verdicts and their checks, faults, and what it hears of the end.

mod support;

use std::sync::Arc;

use pointsman_policy::{AdmissionSlot, FaultKind, Slot};
use pointsman_sched::admit::{AdmitPolicy, AdmitRequest, Ending, Load, Outcome, Verdict};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{Refusal, RequestNumbers};
use pointsman_telemetry::{NameKind, Names};
use support::Bench;

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

fn ending(id: u64, outcome: Outcome) -> Ending {
    let (prompt_tokens, cached_tokens, generated_tokens, max_new_tokens) = (100, 0, 10, 50);
    Ending { id: RequestId(id), tenant: 1, outcome, prompt_tokens, cached_tokens, generated_tokens, max_new_tokens }
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
    assert_eq!(slot.admit(1, &request(1), &Load::default()), None);
    slot.ended(ending(1, Outcome::Finished));
    slot.settle(2, &Names::default());
    assert_eq!(slot.status().calls, 0);
}

#[test]
fn a_quota_is_spent_refused_and_given_back() {
    let bench = Bench::new();
    let slot = slot(&bench, "admit-token-bucket", r#"{"tokens_per_second": 0, "burst_tokens": 250, "output_cost": 1}"#);
    assert!(!slot.is_native());
    let names = Names::default();
    assert_eq!(names.intern(NameKind::Tenant, "acme"), 1);
    let ask = |id| slot.admit(id, &request(id), &Load::default());
    assert_eq!(ask(1), Some(Verdict::Accept));
    match ask(2) {
        Some(Verdict::Reject(rejection)) => {
            assert_eq!(rejection.reason, Refusal::Quota);
            assert!(rejection.message.contains("100 tokens of its quota left"), "{}", rejection.message);
        }
        other => panic!("{other:?}"),
    }
    // 40 tokens were not generated, and 100 + 40 are still too few; then everything of a failed one comes back.
    for (id, outcome, expect) in [(1, Outcome::Finished, false), (1, Outcome::Failed, true)] {
        slot.ended(ending(id, outcome));
        slot.settle(3, &names);
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
        assert!(answers.iter().all(|answer| matches!(answer, None | Some(Verdict::Accept))), "{deed}: {answers:?}");
        let status = slot.status();
        assert!(status.faults[kind as usize] > 0 && status.fallbacks > 0, "{deed}: {status:?}");
    }
    let bench = Bench::with(|config| config.router_instances = 1);
    let slot = slot(&bench, "fixture-admission", &format!(r#"{{"do": "trap", "after": {PROBED}}}"#));
    for round in 1..=3 * PROBED {
        slot.ended(ending(round, Outcome::Finished));
        slot.settle(round, &Names::default());
    }
    let status = slot.status();
    assert!(status.faults[FaultKind::Trap as usize] > 0, "in settle: {status:?}");
}

#[test]
fn endings_are_bounded_and_cut_into_batches() {
    let bench = Bench::new();
    let slot = slot(&bench, "fixture-admission", "{}");
    (0..20_000).for_each(|id| slot.ended(ending(id, Outcome::Finished)));
    slot.settle(1, &Names::default());
    assert_eq!(slot.status().calls, 8, "the newest 8,192, a thousand at a time");
    slot.settle(2, &Names::default());
    assert_eq!(slot.status().calls, 8, "nothing left to say");
}
