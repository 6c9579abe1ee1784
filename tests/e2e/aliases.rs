//! Variants of a model by weight: tenants stay where they are, also over a restart.

use std::collections::BTreeMap;

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::trust::pointsman;
use crate::{host, journal};

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
