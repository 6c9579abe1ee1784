//! What instances hand over when a slot is swapped, in every world that may, and what comes of a snapshot or a restore that goes
//! wrong: the slot always goes on, and the answer and the journal say why something starts cold.

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::{fixture, frozen, host, journal, served, slot};

/// Requests until a guest must have been called.
const PATIENCE: usize = 2_000;

fn put(host: &Host, name: &str, digest: &str, config: Value, handover: &str) -> Answer {
    let body = json!({ "component": digest, "config": config, "handover": handover });
    host.admin("PUT", &format!("/admin/v1/slots/{name}"), &body)
}

/// Serves until the guest of a slot has been called.
fn work(host: &Host, name: &str) {
    let calls = || slot(host, name)["counters"]["calls"].as_u64().unwrap_or(0);
    let before = calls();
    let called = (0..PATIENCE).any(|_| {
        served(host, name);
        calls() > before + 3
    });
    assert!(called, "{name} was never called: {}", slot(host, name));
}

/// Activates, and says why something starts cold.
fn cold(host: &Host, name: &str, digest: &str, config: Value) -> String {
    let answer = put(host, name, digest, config, "cold");
    assert_eq!(answer.status, 200, "{name}: {answer:?}");
    answer.body["handover"]["cold"].to_string()
}

/// Replicas of the host.
fn replicas(host: &Host) -> usize {
    let devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
    let devices = devices["data"].as_array().expect("devices");
    devices.iter().map(|device| device["replicas"].as_array().map_or(0, Vec::len)).sum()
}

/// What is handed over in a slot, and everything that can go wrong with it.
fn drive(name: &str, world: &str) {
    let host = host();
    let owners = if world == "telemetry" { 1 } else { replicas(&host) };
    let digest = host.upload(&fixture(world));
    let begins_native = slot(&host, name)["active"]["revision"] == "native";
    let first = put(&host, name, &digest, json!({}), "require");
    if begins_native {
        let why = first.body["handover"]["cold"].to_string();
        assert!(first.status == 200 && why.contains("nothing to hand over"), "{name}: {first:?}");
    } else {
        assert_eq!((first.status, &first.body["error"]["param"]), (422, &json!("handover")), "{name}: {first:?}");
        assert!(cold(&host, name, &digest, json!({})).contains("the "), "{name}");
    }
    work(&host, name);
    let warm = put(&host, name, &digest, json!({}), "require");
    assert_eq!(warm.status, 200, "{name}: {warm:?}");
    assert_eq!(warm.body["handover"], json!({ "restored": owners, "bytes": owners * 8, "cold": [] }), "{name}");
    assert_eq!(slot(&host, name)["active"]["handover"], "require", "{name}: it is stored");
    let line = format!("\"event\":\"handed-over\",\"slot\":\"{name}\"");
    assert!(journal(&host).contains(&line), "{name}: {}", journal(&host));
    let series = format!("pointsman_policy_handovers_total{{outcome=\"restored\",slot=\"{name}\"}} {owners}");
    let metrics = host.get("/metrics").body;
    assert!(metrics.as_str().is_some_and(|text| text.contains(&series)), "{name}: {series}");
    let deed = |deed: &str| json!({ "hand-over": deed });
    for (old, new, parts) in [
        (deed("trap"), json!({}), &["take-snapshot failed: trap"][..]),
        (deed("spin"), json!({}), &["take-snapshot failed: timeout"]),
        // Two MiB that are refused, or that a busy machine does not copy within the limit.
        (deed("huge"), json!({}), &["take-snapshot failed: bad-answer", "take-snapshot failed: timeout"]),
        (deed("garbage"), json!({}), &["restore refused: 3 bytes are no number of calls"]),
        (json!({}), json!({ "schema": 2 }), &["restore refused: it has the layout 1, and this policy knows 2"]),
        (json!({}), deed("trap-in-restore"), &["restore failed: trap"]),
        (json!({}), deed("spin-in-restore"), &["restore failed: timeout"]),
        (json!({}), deed("refuse-restore"), &["restore refused: it refused, as configured"]),
    ] {
        let says = |text: &str| parts.iter().any(|part| text.contains(part));
        let why = format!("{name}: {old} to {new}");
        cold(&host, name, &digest, old);
        work(&host, name);
        let before = slot(&host, name)["active"].clone();
        let refused = put(&host, name, &digest, new.clone(), "require");
        assert_eq!(refused.status, 422, "{why}: {refused:?}");
        let message = refused.body["error"]["message"].as_str().unwrap_or_default();
        // What a snapshot has cost its instance may be all that is known of the next one.
        assert!(says(message), "{why}: {message}");
        assert_eq!(slot(&host, name)["active"], before, "{why}");
        assert_eq!(slot(&host, name)["health"]["state"], "closed", "{why}: {}", slot(&host, name));
        work(&host, name);
        let told = cold(&host, name, &digest, new);
        assert!(says(&told) || told.contains("no instance of the active policy serves"), "{why}: {told}");
        served(&host, &why);
    }
    // A rollback is never refused: what it takes back has no say.
    cold(&host, name, &digest, deed("trap"));
    work(&host, name);
    let back = host.admin("POST", &format!("/admin/v1/slots/{name}/rollback"), &Value::Null);
    assert_eq!(back.status, 200, "{name}: {back:?}");
}

#[test]
fn a_scheduler_hands_over_for_each_replica() {
    drive("scheduler", "scheduler");
}

#[test]
fn a_retention_policy_hands_over_for_each_replica() {
    drive("kv-retention", "retention");
}

#[test]
fn a_sampler_hands_over_for_each_replica() {
    drive("sampler", "sampler");
}

#[test]
fn a_telemetry_hook_hands_over() {
    drive("telemetry.slo-log", "telemetry");
}

#[test]
fn guests_of_0_1_hand_nothing_over_and_are_swapped_as_ever() {
    let host = host();
    for (name, world) in [("scheduler", "scheduler"), ("telemetry.slo-log", "telemetry")] {
        let (old, new) = (host.upload(&frozen(&format!("fixture-{world}"))), host.upload(&fixture(world)));
        let answer = put(&host, name, &old, json!({}), "cold");
        assert_eq!((answer.status, &answer.body["handover"]), (200, &Value::Null), "{answer:?}");
        work(&host, name);
        let told = cold(&host, name, &new, json!({}));
        assert!(told.contains("the active policy does not export pointsman:policy/handover"), "{told}");
        let refused = put(&host, name, &old, json!({}), "require");
        let message = refused.body["error"]["message"].as_str().unwrap_or_default();
        assert!(refused.status == 422 && message.contains("it does not export"), "{refused:?}");
    }
}
