//! Variants of a model by weight: tenants stay where they are, also over a restart; and what becomes of their rollouts on a disk
//! that refuses to store them.

use std::collections::BTreeMap;

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::trust::pointsman;
use crate::{host, journal, refuse};

/// The variant that served a tenant.
fn variant(host: &Host, model: &str, tenant: &str) -> String {
    let body = json!({ "model": model, "prompt": "Rust is", "max_tokens": 1 }).to_string();
    let headers = [("content-type", "application/json"), ("x-tenant-id", tenant)];
    let answer = host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.headers.get("x-pointsman-variant").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn all(host: &Host) -> BTreeMap<String, String> {
    (0..48).map(|i| format!("tenant-{i}")).map(|tenant| (tenant.clone(), variant(host, "demo", &tenant))).collect()
}

#[test]
fn tenants_are_split_by_weight_and_stay() {
    let host = host(&[]);
    let put = |host: &Host, body: &Value| host.admin("PUT", "/admin/v1/aliases/demo", body);
    let weights = |f16: u32, q8: u32| json!({ "weights": { "demo:f16": f16, "demo:q8_0": q8 }, "sticky": "tenant" });
    for (body, status, part) in [
        (json!({ "weights": { "demo:f32": 1 } }), 400, "its variants are `demo:f16`, `demo:q8_0`"),
        (json!({ "weights": { "demo:f16": 0 } }), 400, "no weight is above 0"),
        (json!({ "weights": { "demo:f16": 20_000 } }), 400, "weights are 0 to 10000"),
        (json!({ "weights": {}, "if_generation": 3 }), 409, "the generation of `demo` is 0, not 3"),
    ] {
        let answer = put(&host, &body);
        let said = answer.body["error"]["message"].as_str().unwrap_or_default();
        assert!(answer.status == status && said.contains(part), "{body}: {answer:?}");
    }
    assert_eq!(put(&host, &weights(1, 1)).body["generation"], 1);
    let half = all(&host);
    let count = |split: &BTreeMap<String, String>| split.values().filter(|v| *v == "demo:f16").count();
    assert!((12..=36).contains(&count(&half)), "about half of 48: {half:?}");
    assert_eq!(all(&host), half, "tenants stay");
    let host = host.restart(&[]);
    assert_eq!(all(&host), half, "also over a restart");
    assert_eq!(variant(&host, "demo:q8_0", "tenant-0"), "demo:q8_0", "a pinned variant is what it says");
    // A larger share moves nobody back, a weight of nothing moves everybody.
    assert_eq!(put(&host, &weights(3, 1)).body["generation"], 2);
    let more = all(&host);
    assert!(half.iter().all(|(tenant, v)| v != "demo:f16" || more[tenant] == "demo:f16"), "{half:?} -> {more:?}");
    assert!(count(&more) > count(&half), "{more:?}");
    assert_eq!(put(&host, &weights(0, 1)).status, 200);
    assert_eq!(count(&all(&host)), 0);
    let cleared = put(&host, &json!({ "weights": {}, "if_generation": 3 }));
    assert_eq!((&cleared.body["generation"], &cleared.body["sticky"]), (&json!(4), &Value::Null), "{cleared:?}");
    let alias = |arguments: &[&str]| pointsman(&[&["alias"], arguments, &["--url", &host.admin]].concat());
    let said = alias(&["set", "demo", "demo:f16=1", "--sticky", "request"]).expect("a good weight");
    assert!(said.starts_with("demo;g=5  by weight, sticky by request"), "{said}");
    assert!(alias(&["set", "demo", "demo:f16"]).is_err_and(|e| e.contains("VARIANT=WEIGHT")));
    assert!(alias(&["set", "demo"]).is_err(), "neither weights nor --router");
    assert!(alias(&["set", "demo", "--router"]).is_ok());
    let listed = alias(&["list"]).expect("a list");
    assert!(listed.contains("demo;g=6  the router chooses") && listed.contains("demo:q8_0"), "{listed}");
    let changes: Vec<Value> = journal(&host).into_iter().filter(|e| e["event"] == "alias-changed").collect();
    assert_eq!(changes.iter().map(|e| e["generation"].as_u64()).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6].map(Some));
    assert_eq!(changes[1]["weights"], json!({ "demo:f16": 3, "demo:q8_0": 1 }));
}

#[test]
fn a_rollout_of_variants_on_a_disk_that_refuses_it_says_what_holds() {
    let host = host(&[]);
    let ask =
        |method: &str, path: &str, body: &Value| host.admin(method, &format!("/admin/v1/aliases/demo{path}"), body);
    assert_eq!(ask("PUT", "", &json!({ "weights": { "demo:f16": 1 } })).status, 200);
    let plan = json!({ "candidate": "demo:q8_0", "mode": "canary", "block_ms": 60_000 });
    let (document, id) = (host.folder().join("aliases/demo.json"), "alias.demo-1");
    let stored = || -> Value { serde_json::from_slice(&std::fs::read(&document).expect("a document")).expect("JSON") };
    let (nothing, at_once) =
        (["nothing was", "cannot be stored"], ["control serves, but a restart would", "make room"]);
    let dry = json!({ "candidate": "demo:q8_0", "mode": "canary", "dry_run": true });
    let would = ask("POST", "/rollouts", &dry);
    assert_eq!((would.status, &would.body["id"]), (200, &json!(id)), "{would:?}");
    assert_eq!(ask("GET", "", &Value::Null).body["rollout"], Value::Null, "a dry run starts nothing");
    // What is asked for, what is said where it cannot be stored, and where it leads once it can.
    for (verb, said, phase) in [
        ("", nothing, "running"),
        ("/promote", nothing, "running"),
        ("/pause", at_once, "paused"),
        ("/resume", nothing, "running"),
        ("/abort", at_once, "aborted"),
    ] {
        let body = match verb {
            "" => plan.clone(),
            "/promote" => json!({ "step": true }),
            _ => Value::Null,
        };
        let path = if verb.is_empty() { "/rollouts".to_owned() } else { format!("/rollouts/{id}{verb}") };
        let before = stored();
        let refused = refuse(&document);
        for _ in 0..2 {
            let answer = ask("POST", &path, &body);
            let message = answer.body["error"]["message"].as_str().unwrap_or_default();
            assert!(answer.status == 500 && said.iter().all(|part| message.contains(part)), "{verb}: {answer:?}");
        }
        let holds = ask("GET", &format!("/rollouts/{id}"), &Value::Null).body["phase"]["is"].clone();
        assert!(said == nothing || holds == phase, "{verb}: {holds}");
        refused.end();
        assert!(said == at_once || stored() == before, "{verb}: nothing was changed");
        let answer = ask("POST", &path, &body);
        assert!(matches!(answer.status, 200 | 201), "{verb}: {answer:?}");
        assert_eq!((&answer.body["phase"]["is"], &stored()["rollout"]["phase"]["is"]), (&json!(phase), &json!(phase)));
    }
    assert_eq!(ask("GET", "", &Value::Null).body["rollout"], Value::Null);
    let decided = journal(&host).into_iter().filter(|line| line["event"] == "rollout-decided");
    let decided: Vec<Value> = decided.map(|line| line["decision"].clone()).collect();
    assert_eq!(decided, ["step", "pause", "resume", "abort"], "each is told once");
}
