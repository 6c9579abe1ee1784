//! What holds while somebody else's change is under way (the test holds the lock that such a change holds), and after a host
//! that died in the middle of something (the test leaves on the disk what it would have left).

use std::sync::Arc;

use pointsman_control::Intent;
use pointsman_control::rollout::Phase;
use pointsman_policy::{Runtime, RuntimeConfig, Slot as _};
use pointsman_server::admin::wire;
use pointsman_server::ports::PolicyAdmin;
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
    let stored = || {
        let documents = deploy.store.slot_documents();
        let document = documents.into_iter().find_map(|(_, document)| document.ok()).expect("a document");
        document.rollout.expect("a rollout").phase
    };
    for (turn, steer) in [(0, wire::Steer::Pause), (1, wire::Steer::Abort)] {
        if turn == 0 {
            let plan = r#"{"mode": "canary"}"#.to_owned();
            let rollout = wire::StartRollout {
                component: "native".into(),
                config: empty(),
                state_namespace: None,
                budget: wire::Budget::default(),
                handover: wire::Handover::default(),
                if_generation: None,
                on_fault: wire::OnFault::default(),
                plan,
            };
            deploy.start_rollout("router", rollout, "t").expect("a rollout");
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
    let digest = format!("sha256:{}", "ab".repeat(32));
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
    let with_signature = |store: &Store| store.write_signature(&digest, signature).and_then(|()| component(store));
    let switch = |store: &Store| store.write_safe_mode(Some(&switched));
    let nothing = |_: &Store| Ok(());
    type Act<'a> = &'a dyn Fn(&Store) -> std::io::Result<()>;
    // What was to be done, how far it came, and its line.
    let rows: [(Happened, Act<'_>, Option<Happened>); 10] = [
        (uploaded(None), &nothing, None),
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
