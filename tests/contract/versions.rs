//! Policies built against older versions of the package keep working on a live host, beside those of the latest.

use serde_json::{Value, json};

use crate::{frozen, host, served, slot};

#[test]
fn old_policies_are_uploaded_activated_swapped_and_rolled_back() {
    let host = host();
    for (name, old, latest) in [
        ("router", "route-least-loaded", "route-weighted"),
        ("scheduler", "sched-shortest-first", "sched-priority"),
        ("telemetry.slo-log", "hook-slo-log", "hook-slo-log"),
    ] {
        let digest = host.upload(&frozen(old));
        for (component, package, summary) in
            [(&digest, "pointsman:policy@0.1.0", false), (&host.builtin(latest), "pointsman:policy@0.2.0", true)]
        {
            let activated = host.activate(name, component, json!({}));
            assert_eq!(activated.status, 200, "{name}: {activated:?}");
            served(&host, name);
            let listed = host.admin("GET", "/admin/v1/components", &Value::Null).body;
            let row = listed["data"].as_array().and_then(|rows| rows.iter().find(|row| row["digest"] == **component));
            let row = row.unwrap_or_else(|| panic!("{component} is listed: {listed}"));
            assert_eq!(row["package"], package, "{name}: {row}");
            assert_eq!(row["summary"].is_string(), summary, "{name}: {row}");
        }
        let back = host.admin("POST", &format!("/admin/v1/slots/{name}/rollback"), &Value::Null);
        assert_eq!(back.status, 200, "{name}: {back:?}");
        served(&host, name);
        let state = slot(&host, name);
        assert_eq!(
            (&state["active"]["component"], &state["counters"]["faults"]),
            (&json!(digest), &json!({})),
            "{state}"
        );
    }
}
