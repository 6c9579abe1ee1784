//! What holds while somebody else's change is under way: the test holds the lock that such a change holds.

use std::sync::Arc;

use pointsman_control::rollout::Phase;
use pointsman_policy::{Runtime, RuntimeConfig, Slot as _};
use pointsman_server::admin::wire;
use pointsman_server::ports::PolicyAdmin;
use pointsman_telemetry::{Metrics, Recorder};
use serde_json::value::RawValue;

use super::*;

fn deploy(folder: &std::path::Path) -> Arc<Deploy> {
    let (clock, metrics) = (Arc::new(SystemClock::start()), Arc::new(Metrics::new()));
    let now = Arc::clone(&clock);
    let runtime =
        Runtime::new(RuntimeConfig::default(), Arc::clone(&metrics), Recorder::new(64), Arc::new(move || now.micros()));
    let trust = KeyRing::new(&Config::default().trust).expect("an empty ring");
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
