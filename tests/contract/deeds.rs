//! What an active guest may do wrong, slot by slot, and what must come of it.

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::{fixture, frozen, host, journal, served, slot};

/// What must come of a deed.
#[derive(Clone, Copy, Debug)]
enum Comes {
    /// Faults of one of these kinds (whichever bound it meets first), in metrics, health and journal.
    Fault(&'static [&'static str]),
    /// Nothing: it is allowed, or its bound silently cuts it off.
    Nothing,
    /// As `Nothing`, but so much work that a slow machine may stop it at the deadline.
    NothingInTime,
}

/// What a guest of any world may do wrong.
const IN_EVERY_WORLD: [(&str, Comes); 9] = [
    ("trap", Comes::Fault(&["trap"])),
    ("spin", Comes::Fault(&["timeout"])),
    ("allocate", Comes::Fault(&["memory", "timeout"])),
    ("recurse", Comes::Fault(&["trap"])),
    ("slow", Comes::Nothing),
    ("leak", Comes::Nothing),
    ("log-flood", Comes::NothingInTime),
    ("metric-flood", Comes::NothingInTime),
    ("state-flood", Comes::NothingInTime),
];

/// Requests until a deed must have happened. A telemetry batch may hold many requests, hence so many.
const PATIENCE: usize = 4_000;

fn faults(state: &Value, kind: &str) -> u64 {
    state["counters"]["faults"][kind].as_u64().unwrap_or(0)
}

/// Calls in which a fixture behaves first: more than the host's probes of that slot.
fn after(slot: &str) -> u32 {
    match slot {
        "admission" | "router" => 40,
        "scheduler" | "sampler" => 12,
        _ => 6,
    }
}

/// Serves requests until `holds`; every one of them must be served.
fn until(host: &Host, why: &str, holds: impl Fn() -> bool) -> bool {
    (0..PATIENCE).any(|_| {
        served(host, why);
        holds()
    })
}

/// Activates a deed, drives it until it shows, and checks that no request paid.
fn drive(host: &Host, name: &str, digest: &str, (deed, comes): (&str, Comes)) {
    let why = format!("{name} does {deed}");
    let activated = host.activate(name, digest, json!({ "do": deed, "after": after(name) }));
    assert_eq!(activated.status, 200, "{why}: {activated:?}");
    let revision = activated.body["revision"].as_str().expect("a revision").to_owned();
    let kinds = match comes {
        Comes::Fault(kinds) => kinds,
        Comes::Nothing | Comes::NothingInTime => &[],
    };
    let stopped = |state: &Value| matches!(comes, Comes::NothingInTime) && faults(state, "timeout") > 0;
    let shown = || {
        let state = slot(host, name);
        let calls = state["counters"]["calls"].as_u64().unwrap_or(0);
        kinds.iter().any(|kind| faults(&state, kind) > 0)
            || stopped(&state)
            || (kinds.is_empty() && calls > u64::from(3 * after(name)))
    };
    assert!(until(host, &why, shown), "{why}: {comes:?} never showed: {}", slot(host, name));
    let state = slot(host, name);
    let Some(kind) = kinds.iter().find(|kind| faults(&state, kind) > 0) else {
        let all: u64 =
            state["counters"]["faults"].as_object().map_or(0, |f| f.values().filter_map(Value::as_u64).sum());
        let in_time = if stopped(&state) { faults(&state, "timeout") } else { 0 };
        assert_eq!(all, in_time, "{why}: {state}");
        return;
    };
    let reason = state["health"]["reason"].as_str().unwrap_or_default().to_owned();
    assert!(kinds.iter().any(|kind| reason.starts_with(kind)), "{why}: health says {state}");
    let series = format!("pointsman_policy_faults_total{{kind=\"{kind}\",revision=\"{revision}\",slot=\"{name}\"}}");
    let counted =
        |text: &Value| text.as_str().is_some_and(|t| t.lines().any(|l| l.starts_with(&series) && !l.ends_with(" 0")));
    assert!(until(host, &why, || counted(&host.get("/metrics").body)), "{why}: {series} is not counted");
    let tells = |line: &str| {
        let parts = ["\"event\":\"fault\"", revision.as_str(), &format!("\"kind\":\"{kind}\"")];
        parts.iter().all(|part| line.contains(part))
    };
    let journalled = until(host, &why, || journal(host).lines().any(tells));
    assert!(journalled, "{why}: not in the journal:\n{}", journal(host));
}

/// What every guest may do, and what only one of this world may, by today's fixture and by that of 0.1 where there is one.
fn drive_all(name: &str, world: &str, own: &[(&str, Comes)]) {
    let host = host();
    let is_old = matches!(world, "router" | "scheduler" | "telemetry");
    let old = is_old.then(|| frozen(&format!("fixture-{world}")));
    for bytes in [fixture(world)].into_iter().chain(old) {
        let digest = host.upload(&bytes);
        for deed in IN_EVERY_WORLD.iter().chain(own) {
            drive(&host, name, &digest, *deed);
            let reset = host.admin("DELETE", &format!("/admin/v1/slots/{name}"), &Value::Null);
            assert_eq!(reset.status, 200, "{reset:?}");
        }
    }
}

#[test]
fn an_admission_policy_may_do_anything() {
    drive_all("admission", "admission", &[]);
}

#[test]
fn a_router_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("bad-row", Fault(&["bad-answer"])),
        ("empty-rank", Fault(&["bad-answer"])),
        ("duplicate-row", Fault(&["bad-answer"])),
        ("huge-list", Fault(&["bad-answer", "timeout"])),
        ("abstain", Nothing),
    ];
    drive_all("router", "router", &deeds);
}

#[test]
fn a_scheduler_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("unknown-id", Fault(&["bad-answer"])),
        ("duplicate-id", Fault(&["bad-answer"])),
        ("uneven-lists", Fault(&["bad-answer"])),
        ("huge-list", Fault(&["bad-answer", "timeout"])),
        ("no-plan", Nothing),
        ("starve", Nothing),
    ];
    drive_all("scheduler", "scheduler", &deeds);
}

#[test]
fn a_telemetry_hook_may_do_anything() {
    use Comes::Fault;
    let deeds = [
        ("huge-list", Fault(&["bad-answer", "memory", "timeout"])),
        ("huge-text", Fault(&["bad-answer", "memory", "timeout"])),
    ];
    drive_all("telemetry.slo-log", "telemetry", &deeds);
}

#[test]
fn a_retention_policy_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("bad-row", Fault(&["bad-answer"])),
        ("duplicate-row", Fault(&["bad-answer"])),
        ("huge-list", Fault(&["bad-answer", "timeout"])),
        ("abstain", Nothing),
    ];
    drive_all("kv-retention", "retention", &deeds);
}

#[test]
fn a_sampler_may_do_anything() {
    use Comes::{Fault, Nothing};
    let deeds = [
        ("uneven-lists", Fault(&["bad-answer"])),
        ("unknown-token", Fault(&["bad-answer"])),
        ("allow-nothing", Fault(&["bad-answer"])),
        ("infinite-bias", Fault(&["bad-answer"])),
        ("huge-list", Fault(&["bad-answer", "memory", "timeout"])),
        ("abstain", Nothing),
    ];
    drive_all("sampler", "sampler", &deeds);
}

#[test]
fn the_third_fault_opens_the_circuit_and_native_serves() {
    let host = host();
    let digest = host.upload(&fixture("scheduler"));
    let config = json!({ "do": "trap", "after": after("scheduler") });
    assert_eq!(host.activate("scheduler", &digest, config).status, 200);
    let opened = until(&host, "a scheduler that traps", || slot(&host, "scheduler")["health"]["state"] == "open");
    let state = slot(&host, "scheduler");
    assert!(opened, "{state}");
    assert!(faults(&state, "trap") >= 3, "{state}");
    served(&host, "an open circuit");
    let fallbacks = slot(&host, "scheduler")["counters"]["fallbacks"].as_u64();
    assert!(fallbacks.is_some_and(|n| n >= 3), "{state}");
    let journalled = until(&host, "an open circuit", || journal(&host).contains("\"state\":\"open\""));
    assert!(journalled, "{}", journal(&host));
}
