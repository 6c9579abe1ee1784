//! What never becomes active: uploads that are no policies of this host, and policies that fail before they are published.

use pointsman_tests::root;
use serde_json::{Value, json};

use crate::{fixture, host, journal, served, slot};

#[test]
fn uploads_that_are_no_policies_are_refused_with_what_to_change() {
    let host = host();
    let url = format!("{}/admin/v1/components", host.admin);
    let wat = std::fs::read(root().join("plugins/fixtures/wrong-world.wat")).expect("a text file");
    for (name, bytes, part) in [
        ("foreign", fixture("foreign"), "wasi:"),
        ("wrong-world", fixture("wrong-world"), "implements none of the worlds"),
        ("wrong-version", fixture("wrong-version"), "this host binds 0.1.x and 0.2.x"),
        ("wrong-shape", fixture("wrong-shape"), "rebuild it"),
        ("bare-core", fixture("bare-core"), "component type"),
        ("text", wat, "text"),
        ("empty", Vec::new(), "empty"),
        ("cut short", fixture("router")[..5_000].to_vec(), "malformed"),
    ] {
        let answer = host.send("POST", &url, &[("content-type", "application/wasm")], &bytes);
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
        let message = answer.body["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "{name}: {message}");
        served(&host, name);
    }
    let oversized = vec![0; (32 << 20) + 1];
    assert_eq!(host.send("POST", &url, &[("content-type", "application/wasm")], &oversized).status, 413);
}

#[test]
fn policies_that_fail_before_they_are_published_leave_the_old_one_serving() {
    let host = host();
    for (name, world) in [
        ("admission", "admission"),
        ("router", "router"),
        ("scheduler", "scheduler"),
        ("telemetry.slo-log", "telemetry"),
    ] {
        let digest = host.upload(&fixture(world));
        let before = slot(&host, name)["active"].clone();
        for (deed, part) in [
            ("spin-in-init", "timeout"),
            ("trap-in-init", "trap"),
            ("allocate-in-init", "memory"),
            ("refuse-config", "refused its configuration"),
            ("want-unknown", "known"),
            ("nameless", "name"),
            ("trap", "probe"),
            ("spin", "probe"),
            ("no-such-deed", "refused its configuration"),
        ] {
            let answer = host.activate(name, &digest, json!({ "do": deed }));
            assert_eq!(answer.status, 422, "{name} {deed}: {answer:?}");
            let message = answer.body["error"]["message"].as_str().unwrap_or_default();
            assert!(message.contains(part), "{name} {deed}: {message}");
            assert_eq!(slot(&host, name)["active"], before, "{name} {deed}");
            served(&host, deed);
        }
        assert!(journal(&host).contains("\"event\":\"refused\""), "{}", journal(&host));
        let other = if world == "router" { "scheduler" } else { "router" };
        let answer = host.activate(other, &digest, Value::Null);
        assert_eq!(answer.status, 400, "a {world} in the slot {other}: {answer:?}");
    }
}
