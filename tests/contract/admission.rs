//! Quotas on a live host: who is over one is refused with words, the others are served, and a rollback opens the door again.

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::{host, served, slot};

fn ask(host: &Host, tenant: &str) -> Answer {
    let body = json!({ "model": "demo", "prompt": "Rust is a", "max_tokens": 2, "ignore_eos": true });
    let headers = [("content-type", "application/json"), ("x-tenant-id", tenant)];
    host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.to_string().as_bytes())
}

#[test]
fn a_tenant_over_its_quota_is_refused_and_the_others_are_served() {
    let host = host();
    let bucket = host.builtin("admit-token-bucket");
    // Nothing comes back by time, so how fast the test runs does not matter: a request uses at least four of the tokens.
    let tenants = json!({ "small": { "tokens_per_second": 0, "burst_tokens": 100 } });
    let config = json!({ "tokens_per_second": 1_000_000, "burst_tokens": 1_000_000, "tenants": tenants });
    assert_eq!(host.activate("admission", &bucket, config).status, 200);
    assert_eq!(ask(&host, "small").status, 200, "a full bucket");
    let refused = (0..100).map(|_| ask(&host, "small")).find(|answer| answer.status != 200);
    let refused = refused.expect("a hundred tokens are used up");
    assert_eq!(refused.status, 429, "{refused:?}");
    assert_eq!(refused.headers["x-pointsman-reason"], "quota");
    let message = refused.body["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("tenant `small` has"), "{message}");
    assert_eq!(ask(&host, "large").status, 200);
    let state = slot(&host, "admission");
    assert_eq!(state["counters"]["faults"], json!({}), "{state}");
    let metrics = host.get("/metrics").body;
    let counted = |name: &str| metrics.as_str().is_some_and(|text| text.contains(name));
    assert!(counted("pointsman_rejected_total{reason=\"quota\"}"), "{metrics}");
    assert!(counted("pointsman_plugin_admit_refused_total{"), "{metrics}");
    let reset = host.admin("DELETE", "/admin/v1/slots/admission", &Value::Null);
    assert_eq!(reset.status, 200, "{reset:?}");
    assert_eq!(ask(&host, "small").status, 200, "the host's own limits only");
    served(&host, "native again");
}
