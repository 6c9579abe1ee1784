//! From an upload to a router's answer, across swaps and faults.

mod support;

use pointsman_policy::{ActivateError, Call, FaultKind, Health, PublishError, RouterQuestion, Slot};
use pointsman_sched::route::{Choice, Fallback, Refusal, RequestNumbers, RoutePolicy, RouteRequest, Routed};
use pointsman_telemetry::{Event, EventKind};
use support::{Bench, MISDEEDS, SECOND, replicas, request};

fn route(slot: &impl RoutePolicy, now: u64) -> Routed {
    slot.route(now, &request(now), &replicas(4, 2))
}

/// Calls that every probe makes, so that a fixture with this `after` passes the probe.
const PROBED: u32 = 40;

#[test]
fn upload_route_swap_and_back_to_native() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let native = route(&*slot, 1);
    assert_eq!((&*native.decided_by.revision, native.decided_by.generation), ("native", 0));
    assert_eq!((native.choice, native.fallback), (Choice::Abstain, None));

    let component = bench.admit("route-least-loaded");
    let first = slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    assert!(first.revision.starts_with("route-least-loaded@") || first.revision.contains('@'), "{first:?}");
    assert!(first.revision.ends_with(component.digest.short()));
    let routed = route(&*slot, 2);
    assert_eq!((routed.choice, routed.fallback), (Choice::Pick(2), None));
    assert_eq!((&routed.decided_by.revision, routed.decided_by.generation), (&first.revision, 1));

    let other = bench.admit("fixture-router");
    let second = slot.publish(bench.prepare(&other, "router", "{}")).expect("a publish");
    let routed = route(&*slot, 3);
    assert_eq!((routed.choice, routed.decided_by.generation), (Choice::Pick(0), 2));
    assert_ne!(second.revision, first.revision);
    bench.runtime.maintain();
    assert_eq!(slot.status().draining, 0, "the first generation was dropped");

    slot.publish_native(9).expect("a publish");
    let routed = route(&*slot, 4);
    assert_eq!((&*routed.decided_by.revision, routed.decided_by.generation), ("native", 9));
    assert_eq!(slot.publish_native(9), Err(PublishError::Stale { generation: 9, newest: 9 }));
    let mut events = Vec::new();
    bench.recorder.drain(&mut events, 100);
    let swaps: Vec<u64> = events.iter().filter(|e| e.kind == EventKind::Swap).map(|e| e.a).collect();
    assert_eq!(swaps, [1, 2, 9]);
    assert!(bench.metrics.render().contains(r#"pointsman_policy_generation{slot="router"} 9"#));
}

#[test]
fn a_policy_can_be_asked_without_being_published() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    let (columns, request) = (replicas(4, 2), request(1));
    let ask = |name: &str, config: &str| {
        let question = RouterQuestion { now: 1, request: &request, replicas: &columns };
        bench.runtime.ask_router(&bench.admit(name), &bench.activation("router", config), question)
    };
    assert_eq!(ask("route-least-loaded", "{}").expect("it answers"), Choice::Pick(2));
    assert_eq!(ask("fixture-router", "{}").expect("it answers"), Choice::Pick(0));
    for (name, config, part) in [
        ("fixture-router", r#"{"do": "bad-row"}"#, "failed in route: bad-answer"),
        ("fixture-router", r#"{"do": "refuse-config"}"#, "refused its configuration"),
        ("sched-fcfs", "{}", "there is no slot"),
    ] {
        let error = ask(name, config).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    let status = slot.status();
    assert_eq!((status.generation, status.calls, status.faults), (1, 0, [0; 5]), "what serves was not touched");
    assert!(bench.faults.lock().expect("not poisoned").is_empty());
}

#[test]
fn named_inputs_reach_the_guest() {
    let bench = Bench::with(|config| config.replica_labels = vec!["price".to_owned(), "region".to_owned()]);
    let component = bench.admit("fixture-router");
    let mut columns = replicas(3, 0);
    columns.device = vec![5, 1, 2];
    columns.variant = vec![1, 5, 2];
    columns.load = vec![1, 2, 5];
    columns.errors = vec![5, 1, 2];
    columns.age = vec![1, 5, 2];
    columns.predicted_ttft = vec![1, 2, 5];
    columns.kind = vec![0, 1, 0];
    columns.labels = vec![("price".into(), vec![5, 1, 2]), ("region".into(), vec![1, 2, u64::MAX])];
    let numbers = RequestNumbers { choices: 2, stream: 1, ..RequestNumbers::default() };
    let request = RouteRequest { numbers, ..request(1) };
    for (wants, expect) in [
        ("replica.device", 0),
        ("replica.variant", 1),
        ("replica.load", 2),
        ("replica.errors", 0),
        ("replica.age", 1),
        ("replica.predicted-ttft", 2),
        ("replica.kind", 1),
        ("replica.label.price", 0),
        ("replica.label.region", 2),
        ("request.choices", 2),
        ("request.stream", 1),
        ("request.temperature-ppm", 0),
    ] {
        let config = format!(r#"{{"do": "largest-first", "after": {PROBED}, "wants": ["{wants}", "prompt-head"]}}"#);
        let slot = bench.runtime.router_slot("router");
        slot.publish(bench.prepare(&component, "router", &config)).expect("a publish");
        let picks: Vec<Choice> = (0..4 * PROBED).map(|now| slot.route(now.into(), &request, &columns).choice).collect();
        assert_eq!(picks.last(), Some(&Choice::Pick(expect)), "{wants}");
    }
    let unknown = bench.activation("router", r#"{"wants": ["replica.label.colour"]}"#);
    let error = bench.runtime.prepare(&component, unknown).expect_err("no such label").to_string();
    assert!(error.contains("replica.label.region, request.choices"), "{error}");
}

#[test]
fn a_core_module_with_its_type_is_a_component() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("route-least-loaded.core");
    slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
    assert_eq!(route(&*slot, 1).choice, Choice::Pick(2));
    assert!(bench.admit("route-least-loaded.core").cached, "admitted twice: compiled once");
}

#[test]
fn misdeeds_in_a_call_become_faults_and_the_native_policy_answers() {
    let answers = ["bad-row", "empty-rank", "duplicate-row", "huge-list"];
    for (deed, kind) in MISDEEDS.into_iter().chain(answers.map(|deed| (deed, FaultKind::BadAnswer))) {
        let bench = Bench::for_fault(kind, |budgets| &mut budgets.route);
        let component = bench.admit("fixture-router");
        let slot = bench.runtime.router_slot("router");
        let config = format!(r#"{{"do": "{deed}", "after": {PROBED}}}"#);
        let published = slot.publish(bench.prepare(&component, "router", &config)).expect("a publish");
        // Three instances behave for `PROBED` calls each; then each faults once.
        let routed: Vec<Routed> = (0..3 * u64::from(PROBED) + 3).map(|_| route(&*slot, bench.now())).collect();
        let (good, bad) = routed.split_at(3 * PROBED as usize);
        assert!(good.iter().all(|r| r.fallback.is_none() && r.choice == Choice::Pick(0)), "{deed}");
        let why = Some(Fallback::Fault(kind.as_str()));
        assert!(bad.iter().all(|r| r.fallback == why && r.choice == Choice::Abstain), "{deed}: {bad:?}");
        assert_eq!(route(&*slot, bench.now()).fallback, Some(Fallback::CircuitOpen), "{deed}");
        assert!(bad.iter().all(|r| r.decided_by.revision == published.revision), "{deed}");
        let status = slot.status();
        let mut expect = [0; 5];
        expect[kind as usize] = 3;
        assert_eq!((status.faults, status.instances, status.fallbacks), (expect, 0, 4), "{deed}: {status:?}");
        assert_eq!(status.health, Health::Open { until: bench.now() + SECOND }, "{deed}");
        let told = bench.faults.lock().expect("not poisoned");
        assert_eq!(told.len(), 3, "{deed}");
        assert!(told.iter().all(|f| f.kind == kind && f.call == Call::Route && f.revision == published.revision));
        assert_eq!(status.last_fault.as_ref(), told.last());
        assert!(told[0].message.len() < 3_000, "{}", told[0].message);
        let mut events: Vec<Event> = Vec::new();
        bench.recorder.drain(&mut events, 1_000);
        let faults = events.iter().filter(|e| e.kind == EventKind::PolicyFault && e.a == kind as u64).count();
        assert_eq!(faults, 3, "{deed}");
    }
}

#[test]
fn misdeeds_before_a_publish_keep_the_old_policy() {
    let short = Bench::with(|config| (config.budgets.init.hard, config.budgets.route.hard) = (200_000, 5_000));
    let spins = [
        (r#"{"do": "spin-in-init"}"#, "failed in init: timeout"),
        (r#"{"do": "spin"}"#, "probe `one replica` in route: timeout"),
    ];
    refuses(&short, &spins);
    // The others are to do what they do, however slow the machine is.
    let bench = Bench::with(|config| (config.budgets.init.hard, config.budgets.route.hard) = (20_000_000, 20_000_000));
    let rows = [
        (r#"{"do": "trap-in-init"}"#, "failed in init: trap"),
        (r#"{"do": "allocate-in-init"}"#, "failed in init: memory"),
        (r#"{"do": "refuse-config"}"#, "refused its configuration"),
        (r#"{"do": "no-such-thing"}"#, "refused its configuration"),
        ("no JSON", "refused its configuration"),
        (r#"{"do": "want-unknown"}"#, "known are: replica.device"),
        (r#"{"do": "nameless"}"#, "the manifest's name"),
        (r#"{"do": "trap"}"#, "probe `one replica` in route: trap"),
        (r#"{"do": "bad-row"}"#, "in route: bad-answer"),
        (r#"{"do": "huge-list"}"#, "in route: bad-answer"),
    ];
    refuses(&bench, &rows);
    let component = bench.admit("fixture-router");
    for (slot, expect) in [
        ("scheduler", "runs a scheduler-policy, and the component is a router-policy"),
        ("oracle", "there is no slot `oracle`"),
    ] {
        let error = bench.runtime.prepare(&component, bench.activation(slot, "{}")).expect_err(slot);
        assert!(error.to_string().contains(expect), "{slot}: {error}");
    }
    let error = bench.runtime.prepare(&component, bench.activation("router", &" ".repeat(300 << 10)));
    assert!(matches!(error, Err(ActivateError::ConfigTooLarge { .. })), "{error:?}");
}

/// None of these configurations of the fixture takes the place of the policy that is there.
fn refuses(bench: &Bench, rows: &[(&str, &str)]) {
    let slot = bench.runtime.router_slot("router");
    let good = bench.admit("route-least-loaded");
    slot.publish(bench.prepare(&good, "router", "{}")).expect("a publish");
    let component = bench.admit("fixture-router");
    for (config, expect) in rows {
        let error = bench.runtime.prepare(&component, bench.activation("router", config)).expect_err(config);
        assert!(error.to_string().contains(expect), "{config}: {error}");
        let routed = route(&*slot, bench.now());
        assert_eq!((routed.choice, routed.decided_by.generation), (Choice::Pick(2), 1), "{config}");
    }
    assert!(bench.faults.lock().expect("not poisoned").is_empty(), "nothing of this is the slot's fault");
}

#[test]
fn a_rejection_reaches_the_caller() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("fixture-router");
    slot.publish(bench.prepare(&component, "router", r#"{"do": "reject"}"#)).expect("a publish");
    match route(&*slot, 1).choice {
        Choice::Reject(rejection) => {
            assert_eq!((rejection.reason, rejection.retry_after_ms), (Refusal::Quota, 2_000));
            assert_eq!(rejection.message, "rejected, as configured");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_open_circuit_tries_again_and_closes_when_the_guest_behaves() {
    let bench = Bench::new();
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("fixture-router");
    let config = format!(r#"{{"do": "trap", "after": {PROBED}}}"#);
    slot.publish(bench.prepare(&component, "router", &config)).expect("a publish");
    let calls = |n: u32| (0..n).filter(|_| route(&*slot, bench.now()).fallback.is_some()).count();
    assert_eq!(calls(3 * PROBED), 0);
    assert_eq!(calls(3), 3);
    assert_eq!(calls(5), 5, "open: not asked");
    assert_eq!(slot.status().calls, u64::from(3 * PROBED) + 3);
    // The wait is over, but the poisoned instances come back only after their own back-off (1 + 2 + 4 s at the third).
    bench.advance(SECOND);
    assert_eq!(calls(1), 1, "half-open without an instance: still native");
    bench.advance(4 * SECOND);
    assert_eq!(slot.status().instances, 3);
    assert_eq!(calls(1), 0, "the trial passes");
    assert_eq!(slot.status().health, Health::Closed);
    assert_eq!(calls(10), 0);
}

#[test]
fn a_slow_guest_is_counted_and_not_stopped() {
    let bench = Bench::with(|config| config.budgets.route.hard = 20_000_000);
    let slot = bench.runtime.router_slot("router");
    let component = bench.admit("fixture-router");
    slot.publish(bench.prepare(&component, "router", r#"{"do": "slow"}"#)).expect("a publish");
    assert!((1..=3).all(|now| route(&*slot, now).fallback.is_none()));
    let status = slot.status();
    assert_eq!((status.overruns, status.faults), (3, [0; 5]));
}

#[test]
fn the_same_inputs_give_the_same_answers() {
    let bench = Bench::new();
    for name in ["route-least-loaded", "route-prefix-aware", "route-weighted"] {
        let component = bench.admit(name);
        let answers = || {
            let slot = bench.runtime.router_slot("router");
            slot.publish(bench.prepare(&component, "router", "{}")).expect("a publish");
            (0..200).map(|i| slot.route(i, &request(i), &replicas(8, (i % 8) as u32)).choice).collect::<Vec<_>>()
        };
        assert_eq!(answers(), answers(), "{name}");
    }
}
