//! What an active guest may do wrong, slot by slot, and what must come of it.

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::{fixture, host, journal, served, slot};

/// What must come of a deed.
#[derive(Clone, Copy, Debug)]
enum Comes {
    /// Faults of this kind, in metrics, health and journal.
    Fault(&'static str),
    /// Nothing: it is allowed, or its bound silently cuts it off.
    Nothing,
}

/// Calls in which a fixture behaves first: more than the host's probes (32 for a router).
const AFTER: u32 = 40;
/// Requests until a deed must have happened. A telemetry batch may hold many requests, hence so many.
const PATIENCE: usize = 600;

fn faults(state: &Value, kind: &str) -> u64 {
    state["counters"]["faults"][kind].as_u64().unwrap_or(0)
}

/// Activates a deed, drives it until it shows, and checks that no request paid.
fn drive(host: &Host, name: &str, digest: &str, (deed, comes): (&str, Comes)) {
    let activated = host.activate(name, digest, json!({ "do": deed, "after": AFTER }));
    assert_eq!(activated.status, 200, "{name} {deed}: {activated:?}");
    let revision = activated.body["revision"].as_str().expect("a revision").to_owned();
    let calls = |state: &Value| state["counters"]["calls"].as_u64().unwrap_or(0);
    let shown = |state: &Value| match comes {
        Comes::Fault(kind) => faults(state, kind) > 0,
        Comes::Nothing => calls(state) > u64::from(AFTER) + 4,
    };
    let happened = (0..PATIENCE).find(|_| {
        served(host, &format!("{name} does {deed}"));
        shown(&slot(host, name))
    });
    let state = slot(host, name);
    assert!(happened.is_some(), "{name} {deed}: {comes:?} never showed: {state}");
    if let Comes::Fault(kind) = comes {
        let reason = state["health"]["reason"].as_str().unwrap_or_default().to_owned();
        assert!(reason.starts_with(kind), "{name} {deed}: health says {state}");
        let metrics = host.get("/metrics").body;
        let series =
            format!("pointsman_policy_faults_total{{kind=\"{kind}\",revision=\"{revision}\",slot=\"{name}\"}}");
        let text = metrics.as_str().unwrap_or_default();
        let counted = text.lines().find_map(|l| l.strip_prefix(&series)).and_then(|v| v.trim().parse::<f64>().ok());
        // The scrape may be as old as its cache; the next one is not.
        let counted = counted.filter(|n| *n > 0.0).is_some()
            || (0..PATIENCE).any(|_| {
                served(host, deed);
                host.get("/metrics")
                    .body
                    .as_str()
                    .is_some_and(|t| t.lines().any(|l| l.starts_with(&series) && !l.ends_with(" 0")))
            });
        assert!(counted, "{name} {deed}: {series} is not counted");
        let journalled = (0..PATIENCE).any(|_| {
            served(host, deed);
            journal(host).lines().any(|l| {
                l.contains("\"event\":\"fault\"")
                    && l.contains(&revision)
                    && l.contains(&format!("\"kind\":\"{kind}\""))
            })
        });
        assert!(journalled, "{name} {deed}: not in the journal:\n{}", journal(host));
    } else {
        let total: u64 =
            state["counters"]["faults"].as_object().map_or(0, |f| f.values().filter_map(Value::as_u64).sum());
        assert_eq!(total, 0, "{name} {deed}: {state}");
    }
}

fn drive_all(name: &str, world: &str, deeds: &[(&str, Comes)]) {
    let host = host();
    let digest = host.upload(&fixture(world));
    for deed in deeds {
        drive(&host, name, &digest, *deed);
        let reset = host.admin("DELETE", &format!("/admin/v1/slots/{name}"), &Value::Null);
        assert_eq!(reset.status, 200, "{reset:?}");
    }
}

#[test]
fn a_router_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("trap", Fault("trap")),
        ("spin", Fault("timeout")),
        ("allocate", Fault("memory")),
        ("recurse", Fault("trap")),
        ("bad-row", Fault("bad-answer")),
        ("empty-rank", Fault("bad-answer")),
        ("duplicate-row", Fault("bad-answer")),
        ("huge-list", Fault("bad-answer")),
        ("slow", Nothing),
        ("leak", Nothing),
        ("log-flood", Nothing),
        ("metric-flood", Nothing),
        ("state-flood", Nothing),
        ("abstain", Nothing),
    ];
    drive_all("router", "router", &deeds);
}

#[test]
fn a_scheduler_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("trap", Fault("trap")),
        ("spin", Fault("timeout")),
        ("allocate", Fault("memory")),
        ("recurse", Fault("trap")),
        ("unknown-id", Fault("bad-answer")),
        ("duplicate-id", Fault("bad-answer")),
        ("uneven-lists", Fault("bad-answer")),
        ("huge-list", Fault("bad-answer")),
        ("slow", Nothing),
        ("leak", Nothing),
        ("log-flood", Nothing),
        ("metric-flood", Nothing),
        ("state-flood", Nothing),
        ("no-plan", Nothing),
        ("starve", Nothing),
    ];
    drive_all("scheduler", "scheduler", &deeds);
}

#[test]
fn a_telemetry_hook_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("trap", Fault("trap")),
        ("spin", Fault("timeout")),
        ("allocate", Fault("memory")),
        ("recurse", Fault("trap")),
        ("huge-list", Fault("bad-answer")),
        ("leak", Nothing),
        ("log-flood", Nothing),
        ("metric-flood", Nothing),
        ("state-flood", Nothing),
    ];
    drive_all("telemetry.slo-log", "telemetry", &deeds);
}

#[test]
fn the_third_fault_opens_the_circuit_and_native_serves() {
    let host = host();
    let digest = host.upload(&fixture("router"));
    assert_eq!(host.activate("router", &digest, json!({ "do": "trap", "after": AFTER })).status, 200);
    let opened = (0..PATIENCE).any(|_| {
        served(&host, "a router that traps");
        slot(&host, "router")["health"]["state"] == "open"
    });
    let state = slot(&host, "router");
    assert!(opened, "{state}");
    assert!(faults(&state, "trap") >= 3, "{state}");
    served(&host, "an open circuit");
    assert!(state["counters"]["fallbacks"].as_u64().is_some_and(|n| n >= 3), "{state}");
    let journalled = (0..PATIENCE).any(|_| {
        served(&host, "an open circuit");
        journal(&host).contains("\"state\":\"open\"")
    });
    assert!(journalled, "{}", journal(&host));
}
