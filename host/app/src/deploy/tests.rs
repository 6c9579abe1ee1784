//! What holds while somebody else's change is under way (the test holds the lock that such a change holds), after a host that
//! died in the middle of something (the test leaves on the disk what it would have left), and on a disk that refuses a document
//! (a folder stands in its place: not even root can write over that).

use std::path::Path;
use std::sync::Arc;

use pointsman_control::Intent;
use pointsman_control::rollout::{Decision, Phase};
use pointsman_policy::{Digest, Runtime, RuntimeConfig, Slot as _};
use pointsman_server::admin::wire;
use pointsman_server::ports::{AdminError, AdminErrorKind, PolicyAdmin, Upload};
use pointsman_telemetry::{Metrics, Recorder};
use serde_json::value::RawValue;

use super::*;
use crate::config::TrustSection;
use crate::trust::SecretKey;

fn deploy(folder: &std::path::Path) -> Arc<Deploy> {
    deploy_trusting(folder, &Config::default().trust)
}

fn deploy_trusting(folder: &std::path::Path, trust: &TrustSection) -> Arc<Deploy> {
    let (clock, metrics) = (Arc::new(SystemClock::start()), Arc::new(Metrics::new()));
    let now = Arc::clone(&clock);
    let runtime =
        Runtime::new(RuntimeConfig::default(), Arc::clone(&metrics), Recorder::new(64), Arc::new(move || now.micros()));
    let trust = KeyRing::new(trust).expect("good keys");
    let parts = HostParts {
        clock,
        metrics,
        trust,
        registries: BTreeMap::new(),
        budgets: BTreeMap::new(),
        faults: fault_queue(),
    };
    let store = Arc::new(Store::open(folder).expect("an empty folder"));
    Deploy::new(runtime.expect("a runtime"), store, parts, false)
}

fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".into()).expect("JSON")
}

fn put(component: &str) -> wire::PutSlot {
    let component = component.to_owned();
    wire::PutSlot {
        component,
        config: empty(),
        if_generation: None,
        state_namespace: None,
        budget: wire::Budget::default(),
        handover: wire::Handover::default(),
        on_fault: wire::OnFault::default(),
        dry_run: false,
    }
}

fn start(component: &str, plan: &str) -> wire::StartRollout {
    wire::StartRollout {
        component: component.to_owned(),
        config: empty(),
        state_namespace: None,
        budget: wire::Budget::default(),
        handover: wire::Handover::default(),
        if_generation: None,
        on_fault: wire::OnFault::default(),
        dry_run: false,
        plan: plan.to_owned(),
    }
}

/// The rollout as the router's document has it.
fn stored(deploy: &Deploy) -> Phase {
    let documents = deploy.store.slot_documents();
    let document = documents.into_iter().find_map(|(_, document)| document.ok()).expect("a document");
    document.rollout.expect("a rollout").phase
}

/// A document that cannot be written until this is dropped.
struct Refused<'a>(&'a Path);

impl<'a> Refused<'a> {
    fn document(path: &'a Path) -> Self {
        if path.exists() {
            std::fs::rename(path, path.with_extension("aside")).expect("a document");
        }
        std::fs::create_dir(path).expect("a folder");
        Self(path)
    }
}

impl Drop for Refused<'_> {
    fn drop(&mut self) {
        std::fs::remove_dir(self.0).expect("the folder");
        let aside = self.0.with_extension("aside");
        if aside.exists() {
            std::fs::rename(aside, self.0).expect("the document");
        }
    }
}

/// What a refusal says.
fn says<T>(answer: Result<T, AdminError>, kind: AdminErrorKind, parts: &[&str]) {
    let error = answer.err().expect("a refusal");
    assert!(error.kind == kind && parts.iter().all(|part| error.message.contains(part)), "{parts:?}: {error:?}");
}

/// Lets other threads go on until it is so.
fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        std::thread::yield_now();
    }
}

#[test]
fn an_abort_takes_the_candidate_off_at_once_and_answers_when_it_is_stored() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    deploy.put_slot("router", put("native"), "t").expect("native is always there");
    let stored = || stored(&deploy);
    for (turn, steer) in [(0, wire::Steer::Pause), (1, wire::Steer::Abort)] {
        if turn == 0 {
            deploy.start_rollout("router", start("native", r#"{"mode": "canary"}"#), "t").expect("a rollout");
        }
        let before = stored();
        let answer = std::thread::scope(|scope| {
            let held = lock(&deploy.operations);
            let asked = scope.spawn(|| deploy.steer_rollout("router", "router-2", steer, "t"));
            let phase = || lock(&deploy.rollouts)[&SlotName::Router].rollout.document().phase.clone();
            until(|| phase() != before);
            assert_eq!(stored(), before, "{steer:?}: the document waits for the lock");
            drop(held);
            asked.join().expect("no panic").expect("an answer")
        });
        assert_ne!(stored(), before, "{steer:?}: stored when it is answered");
        let word = if turn == 0 { "paused" } else { "aborted" };
        assert!(answer.get().contains(word), "{answer}");
    }
    assert!(matches!(stored(), Phase::Aborted { .. }));
    assert!(lock(&deploy.rollouts).is_empty());
    assert_eq!(deploy.router.candidate().map(|candidate| candidate.generation), None);
}

#[test]
fn what_takes_a_candidate_off_holds_on_a_full_disk_and_is_stored_later() {
    // Whether the observer thread is faster than the request, and whether it stores it in the end.
    for (steer, is_observed) in [
        (wire::Steer::Pause, false),
        (wire::Steer::Abort, false),
        (wire::Steer::Pause, true),
        (wire::Steer::Abort, true),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let deploy = deploy(folder.path());
        deploy.put_slot("router", put("native"), "t").expect("native is always there");
        deploy.start_rollout("router", start("native", r#"{"mode": "canary"}"#), "t").expect("a rollout");
        let document = folder.path().join("slots/router.json");
        let refused = Refused::document(&document);
        let ask = || deploy.steer_rollout("router", "router-2", steer, "t");
        let phase = || lock(&deploy.rollouts)[&SlotName::Router].rollout.document().phase.clone();
        let answer = std::thread::scope(|scope| {
            let held = lock(&deploy.operations);
            let asked = scope.spawn(ask);
            until(|| phase() != Phase::Running);
            if is_observed {
                let mut rollouts = lock(&deploy.rollouts);
                deploy.settle(&SlotName::Router, rollouts.get_mut(&SlotName::Router).expect("a rollout"));
            }
            drop(held);
            asked.join().expect("no panic")
        });
        let parts = ["control serves", "a restart would take it up again", "make room in the data directory"];
        says(answer, AdminErrorKind::Internal, &parts);
        says(ask(), AdminErrorKind::Internal, &parts);
        assert_eq!(
            deploy.router.candidate().is_some(),
            matches!(steer, wire::Steer::Pause),
            "an end is one in this life"
        );
        drop(refused);
        assert_eq!(stored(&deploy), Phase::Running);
        if is_observed {
            lock(&deploy.rollouts)
                .get_mut(&SlotName::Router)
                .expect("it waits")
                .unsaved
                .as_mut()
                .expect("for this")
                .again = 0;
            deploy.tick_rollouts();
        } else {
            ask().expect("asked again");
        }
        assert_eq!(
            stored(&deploy),
            lock(&deploy.state).slot(&SlotName::Router).expect("a slot").rollout.clone().expect("one").phase
        );
        assert_ne!(stored(&deploy), Phase::Running);
        assert_eq!(lock(&deploy.rollouts).is_empty(), matches!(steer, wire::Steer::Abort));
        let decided =
            lock(&deploy.journal).after(0, 99).filter(|e| matches!(e.what, Happened::RolloutDecided { .. })).count();
        assert_eq!(decided, 1, "{steer:?}: told once");
    }
}

#[test]
fn what_gives_a_candidate_more_is_not_done_where_it_cannot_be_stored() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    let document = folder.path().join("slots/router.json");
    let rollout = || start("native", r#"{"mode": "canary"}"#);
    let steer = |steer| deploy.steer_rollout("router", "router-2", steer, "t");
    let step = |step| wire::Steer::Promote { step };
    let state = || {
        let rollouts = lock(&deploy.rollouts);
        let rollout = rollouts.get(&SlotName::Router).map(|live| live.rollout.document());
        let rollout = rollout.map(|document| (document.phase.as_str(), document.percent()));
        (rollout, lock(&deploy.state).slot(&SlotName::Router).map(|state| state.active.generation))
    };
    // What is asked for on a disk that refuses, and once it takes documents again; where that leads.
    type Ask<'a> = &'a dyn Fn() -> Result<(), AdminError>;
    type Stand = (Option<(&'static str, u8)>, Option<u64>);
    let rows: [(&str, Ask<'_>, Stand); 7] = [
        ("nothing was activated", &|| deploy.put_slot("router", put("native"), "t").map(drop), (None, Some(1))),
        (
            "nothing was started",
            &|| deploy.start_rollout("router", rollout(), "t").map(drop),
            (Some(("running", 1)), Some(1)),
        ),
        ("nothing was changed", &|| steer(step(true)).map(drop), (Some(("running", 5)), Some(1))),
        ("control serves", &|| steer(wire::Steer::Pause).map(drop), (Some(("paused", 5)), Some(1))),
        ("nothing was changed", &|| steer(wire::Steer::Resume).map(drop), (Some(("running", 5)), Some(1))),
        ("nothing was changed", &|| steer(step(false)).map(drop), (None, Some(2))),
        ("nothing was activated", &|| deploy.rollback("router", None, "t").map(drop), (None, Some(3))),
    ];
    for (refusal, ask, expect) in rows {
        let before = (state(), deploy.last_line());
        let refused = Refused::document(&document);
        says(ask(), AdminErrorKind::Internal, &[refusal, "cannot be stored"]);
        if refusal != "control serves" {
            assert_eq!((state(), deploy.last_line()), before, "{refusal}, {expect:?}");
        }
        drop(refused);
        ask().expect("the disk takes it");
        assert_eq!(state(), expect, "{refusal}");
    }
}

#[test]
fn a_promotion_by_its_own_rules_that_cannot_be_stored_is_a_pause() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    deploy.put_slot("router", put("native"), "t").expect("native is always there");
    deploy.start_rollout("router", start("native", r#"{"mode": "canary"}"#), "t").expect("a rollout");
    let document = folder.path().join("slots/router.json");
    let refused = Refused::document(&document);
    {
        let (_one, mut rollouts) = (lock(&deploy.operations), lock(&deploy.rollouts));
        let live = rollouts.get_mut(&SlotName::Router).expect("a rollout");
        let commands = live.rollout.decide(Decision::Promote, 1);
        assert!(live.keep("rollout", commands).is_empty(), "an end moves the pointer by itself");
        deploy.settle(&SlotName::Router, live);
        live.unsaved.as_mut().expect("the disk refused it").again = 0;
    }
    assert_eq!(deploy.router.status().generation, 1);
    drop(refused);
    deploy.tick_rollouts();
    assert!(matches!(stored(&deploy), Phase::Paused { why } if why.contains("was not promoted")));
    let promotions = || {
        let lines = deploy.store.journal_tail().into_iter().map(|entry| entry.what);
        lines.filter(|what| matches!(what, Happened::RolloutDecided { decision: Decision::Promote, .. })).count()
    };
    assert_eq!(promotions(), 0, "what was not stored has no line");
    deploy.steer_rollout("router", "router-2", wire::Steer::Promote { step: false }, "t").expect("stored");
    assert_eq!((deploy.router.status().generation, stored(&deploy)), (2, Phase::Promoted));
    assert_eq!(promotions(), 1);
}

#[test]
fn a_dry_run_of_a_rollout_asks_what_a_start_asks_and_starts_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    deploy.find_components();
    let digest = |name: &str| deploy.resolve(name).expect("built in").to_string();
    let (fcfs, unknown) = (digest("sched-fcfs"), format!("sha256:{}", "ab".repeat(32)));
    let dry = |slot: &str, component: &str, mode: &str| {
        let rollout = wire::StartRollout { dry_run: true, ..start(component, &format!(r#"{{"mode": "{mode}"}}"#)) };
        deploy.start_rollout(slot, rollout, "t")
    };
    deploy.put_slot("scheduler", put("native"), "t").expect("native is always there");
    let before = deploy.last_line();
    for (slot, component, mode, kind, part) in [
        ("scheduler", &*fcfs, "shadow", AdminErrorKind::Invalid, "the native scheduler writes no plans"),
        ("scheduler", &*fcfs, "ab", AdminErrorKind::Invalid, "use `switchback`"),
        ("scheduler", &*unknown, "canary", AdminErrorKind::NotFound, "upload it first"),
        ("router", "native", "canary", AdminErrorKind::NotFound, "nothing was ever activated"),
        ("router", &*fcfs, "canary", AdminErrorKind::Invalid, "does not work in the slot `router`"),
    ] {
        says(dry(slot, component, mode), kind, &[part]);
    }
    let report = dry("scheduler", &fcfs, "canary").expect("it would start");
    assert!(report.get().contains("\"scheduler-2\""), "{report}");
    assert_eq!((deploy.last_line(), lock(&deploy.rollouts).len()), (before, 0), "nothing was started or told");
    assert!(deploy.scheduler.candidate().is_none());
    deploy.start_rollout("scheduler", start(&fcfs, r#"{"mode": "canary"}"#), "t").expect("as was said");
    says(dry("scheduler", &fcfs, "canary"), AdminErrorKind::Conflict, &["scheduler-2 is under way"]);
}

#[test]
fn what_helps_works_on_a_full_disk() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    let builtin = BUILTINS.iter().find(|b| b.name == "route-weighted").expect("built in");
    // The same policy with a custom section of its own is another component.
    let upload = || {
        let upload = Upload { bytes: [builtin.bytes, &[0, 2, 1, b'n']].concat(), signature: None };
        deploy.upload(upload, "t").map(|uploaded| uploaded.component.digest)
    };
    let (intent, switch) = (folder.path().join("intent.json"), folder.path().join("safe-mode.json"));
    let safe_mode = |on| deploy.set_safe_mode(wire::PutSafeMode { on, reason: None }, "t").map(|now| now.on);
    let refused = Refused::document(&intent);
    says(upload(), AdminErrorKind::Internal, &["cannot be stored"]);
    assert_eq!((deploy.store.component_digests(), deploy.last_line()), (Vec::new(), 0));
    drop(refused);
    let digest = upload().expect("the disk takes it");
    let _refused = Refused::document(&intent);
    deploy.delete_component(&digest, "t").expect("it makes room");
    assert_eq!(deploy.store.component_digests(), Vec::<String>::new());
    for on in [true, false] {
        assert_eq!(safe_mode(on).expect("a rescue"), on);
        assert_eq!(deploy.store.read_safe_mode().is_some(), on);
    }
    // Not even its document can be stored: it is on in this life, and asking again stores it.
    let refused = Refused::document(&switch);
    for _ in 0..2 {
        says(safe_mode(true), AdminErrorKind::Internal, &["safe mode is on, and a restart would end it", "make room"]);
        assert!(deploy.safe_mode_view().on);
    }
    drop(refused);
    assert!(safe_mode(true).expect("stored now") && deploy.store.read_safe_mode().is_some_and(|found| found.is_ok()));
    let lines = lock(&deploy.journal).after(0, 99).map(|entry| entry.what.clone()).collect::<Vec<_>>();
    let switched = |on| Happened::SafeMode { on, reason: None };
    let expect = [Happened::Deleted { digest }, switched(true), switched(false), switched(true)];
    assert_eq!(lines[1..], expect, "each is told once");
}

#[test]
fn a_component_is_compiled_while_somebody_else_changes_something() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy(folder.path());
    deploy.find_components();
    let digest = deploy.resolve("route-least-loaded").expect("built in").to_string();
    std::thread::scope(|scope| {
        let held = lock(&deploy.operations);
        let asked = scope.spawn(|| deploy.put_slot("router", put(&digest), "t"));
        until(|| lock(&deploy.components)[&digest].component.is_some());
        drop(held);
        asked.join().expect("no panic").expect("activated");
    });
    assert_eq!(deploy.router.status().generation, 1);
}

#[test]
fn a_file_that_the_configuration_names_is_compared_and_not_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    deploy(folder.path()).put_slot("router", put("native"), "t").expect("native is always there");
    let file = folder.path().join("router.wasm");
    let builtin = BUILTINS.iter().find(|b| b.name == "route-weighted").expect("built in");
    // The same policy with a custom section of its own is another component.
    std::fs::write(&file, [builtin.bytes, &[0, 2, 1, b'n']].concat()).expect("a file");
    let component = file.to_str().expect("UTF-8").to_owned();
    let section = SlotSection { component: component.clone(), ..SlotSection::default() };
    let config = Config { slots: [("router".to_owned(), section)].into(), ..Config::default() };
    let deploy = deploy(folder.path());
    deploy.start(&config);
    assert_eq!(deploy.store.component_digests(), Vec::<String>::new());
    let lines = deploy.journal(0, 9);
    let last = lines.last().expect("a line").json.to_string();
    assert!(last.contains("\"differs\"") && last.contains(&component), "{last}");
}

#[test]
fn what_was_done_without_its_line_is_told_at_the_next_start() {
    let key = SecretKey::generate().expect("randomness");
    let trust = TrustSection { keys: [("release".to_owned(), key.public_text())].into(), ..TrustSection::default() };
    let digest = Digest::of(b"wasm").to_string();
    let signature = key.sign(&digest);
    let uploaded = |signed_by: Option<&str>| {
        let (digest, world, signed_by) = (digest.clone(), "router".to_owned(), signed_by.map(str::to_owned));
        Happened::Uploaded { digest, world, size: 4, signed_by, source: None }
    };
    let signed = || Happened::Signed { digest: digest.clone(), signed_by: "release".into() };
    let deleted = || Happened::Deleted { digest: digest.clone() };
    let safe_mode = |on| Happened::SafeMode { on, reason: Some("it loops".into()) };
    let switched = SafeModeDocument { format: 1, reason: None, actor: "ci".into(), since_unix_ms: 7 };
    let component = |store: &Store| store.write_component(&digest, b"wasm");
    let damaged = |store: &Store| store.write_component(&digest, b"wa");
    let with_signature = |store: &Store| store.write_signature(&digest, signature).and_then(|()| component(store));
    let switch = |store: &Store| store.write_safe_mode(Some(&switched));
    let nothing = |_: &Store| Ok(());
    type Act<'a> = &'a dyn Fn(&Store) -> std::io::Result<()>;
    // What was to be done, how far it came, and its line.
    let rows: [(Happened, Act<'_>, Option<Happened>); 11] = [
        (uploaded(None), &nothing, None),
        (uploaded(None), &damaged, None),
        (uploaded(None), &component, Some(uploaded(None))),
        (uploaded(Some("release")), &component, Some(uploaded(None))),
        (uploaded(Some("release")), &with_signature, Some(uploaded(Some("release")))),
        (signed(), &component, None),
        (signed(), &with_signature, Some(signed())),
        (deleted(), &component, None),
        (deleted(), &nothing, Some(deleted())),
        (safe_mode(true), &switch, Some(safe_mode(true))),
        (safe_mode(false), &switch, None),
    ];
    for (what, act, expect) in rows {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("an empty folder");
        let intent = Intent { format: 1, journal_before: 0, actor: "ci@10.0.0.7".into(), what: what.clone() };
        store.write_intent(&intent).and_then(|()| act(&store)).expect("a writable folder");
        drop(store);
        for start in 0..2 {
            let deploy = deploy_trusting(folder.path(), &trust);
            deploy.start(&Config { slots: BTreeMap::new(), ..Config::default() });
            let told: Vec<(String, Happened)> =
                lock(&deploy.journal).after(0, 9).map(|entry| (entry.actor.clone(), entry.what.clone())).collect();
            let expect = expect.clone().map(|what| ("ci@10.0.0.7".to_owned(), what));
            assert_eq!(told, expect.into_iter().collect::<Vec<_>>(), "{what:?}, start {start}");
            assert_eq!(deploy.store.read_intent(), None);
        }
    }
}

#[test]
fn an_upload_that_fails_leaves_a_known_component_with_its_signature() {
    let [old, new] = [(); 2].map(|()| SecretKey::generate().expect("randomness"));
    let keys = [("old", &old), ("new", &new)].map(|(name, key)| (name.to_owned(), key.public_text()));
    let trust = TrustSection { keys: keys.into(), ..TrustSection::default() };
    let folder = tempfile::tempdir().expect("a folder");
    let deploy = deploy_trusting(folder.path(), &trust);
    let builtin = BUILTINS.iter().find(|b| b.name == "route-weighted").expect("built in");
    // The same policy with a custom section of its own is another component.
    let bytes = [builtin.bytes, &[0, 2, 1, b'n']].concat();
    let digest = Digest::of(&bytes).to_string();
    let upload = |key: &SecretKey| {
        let signature = Some(key.sign(&digest).to_text());
        deploy.upload(Upload { bytes: bytes.clone(), signature }, "t")
    };
    upload(&old).expect("a good component");
    let signer = || lock(&deploy.components)[&digest].signed_by.clone();
    let file = folder.path().join("components").join(digest.replace("sha256:", "")).with_extension("wasm");
    let refused = Refused::document(&file);
    says(upload(&new), AdminErrorKind::Internal, &["cannot be stored"]);
    drop(refused);
    assert_eq!((signer().as_deref(), deploy.store.read_signature(&digest)), (Some("old"), Some(old.sign(&digest))));
    upload(&new).expect("the disk takes it");
    assert_eq!((signer().as_deref(), deploy.store.read_signature(&digest)), (Some("new"), Some(new.sign(&digest))));
}

#[test]
fn documents_of_removed_slots_are_few_and_no_generation_is_given_twice() {
    let folder = tempfile::tempdir().expect("a folder");
    let deploy_once = || {
        let deploy = deploy(folder.path());
        deploy.start(&Config { slots: BTreeMap::new(), ..Config::default() });
        deploy
    };
    let slot = |n: usize| format!("telemetry.t{n}");
    let deploy = deploy_once();
    for n in 0..70 {
        deploy.put_slot(&slot(n), put("native"), "t").expect("native is always there");
        let generation = lock(&deploy.state).slot(&slot(n).parse().expect("a slot")).map(|s| s.active.generation);
        let stale = deploy.delete_slot(&slot(n), Some(99), "t").expect_err("another generation");
        assert!(stale.message.contains("not 99"), "{stale}");
        deploy.delete_slot(&slot(n), generation, "t").expect("it is there");
    }
    assert_eq!(deploy.store.slot_documents().len(), 64);
    drop(deploy);
    let deploy = deploy_once();
    for n in [0, 69] {
        let again = deploy.put_slot(&slot(n), put("native"), "t").expect("native is always there");
        assert!(again.generation > 1, "{n}: {}", again.generation);
    }
}
