//! A scheduler is swapped under load and knows afterwards what it knew before; where it could not, `require` refuses.

use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use crate::host;

/// Swaps, and calls of the policy before each of them.
const SWAPS: usize = 10;
const CALLS: u64 = 20;

fn serve(host: &Host) {
    let body = json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 3, "temperature": 0 });
    let answer = host.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "a swap costs no request: {answer:?}");
}

fn put(host: &Host, component: &str, handover: &str) -> pointsman_tests::Answer {
    let body = json!({ "component": component, "handover": handover });
    host.admin("PUT", "/admin/v1/slots/scheduler", &body)
}

/// The most calls of its predecessors that an instance was told of.
fn inherited(host: &Host) -> u64 {
    let text = host.get("/metrics").body;
    let lines = text.as_str().unwrap_or_default().lines();
    let values = lines.filter(|line| line.starts_with("pointsman_plugin_inherited{"));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).max().unwrap_or(0)
}

#[test]
fn a_count_survives_swaps_under_load_and_nothing_is_swapped_that_must_not_start_cold() {
    let host = host(&[]);
    let wasm = pointsman_tests::root().join("plugins/prebuilt/fixture-scheduler.wasm");
    let counter = host.upload(&std::fs::read(wasm).expect("a committed fixture"));
    assert_eq!(put(&host, &counter, "require").status, 422, "the built-in one does not hand over");
    assert_eq!(host.activate("scheduler", "native", json!({})).status, 200);
    assert_eq!(put(&host, &counter, "require").status, 200, "over native nothing is lost");
    let dry = json!({ "component": &counter, "handover": "require", "dry_run": true });
    let dry = host.admin("PUT", "/admin/v1/slots/scheduler", &dry);
    assert!(dry.status == 200 && dry.body.get("handover").is_none(), "a dry run asks nobody: {dry:?}");
    assert_eq!(put(&host, &counter, "cold").status, 200);
    let done = AtomicBool::new(false);
    let calls: u64 = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    serve(&host);
                }
            });
        }
        let calls = (0..SWAPS).map(|_| {
            let n_calls = || {
                let state = host.admin("GET", "/admin/v1/slots/scheduler", &Value::Null).body;
                state["counters"]["calls"].as_u64()
            };
            let calls = looks().filter_map(|_| n_calls()).find(|calls| *calls >= CALLS).expect("it is called");
            let swapped = put(&host, &counter, "require");
            assert_eq!((swapped.status, &swapped.body["handover"]["cold"]), (200, &json!([])), "{swapped:?}");
            calls
        });
        let calls = calls.sum();
        done.store(true, Ordering::Relaxed);
        calls
    });
    // The last was told of all calls before it. If what was handed over were lost at the next swap, each would be told of those of
    // one predecessor. The text of the metrics may be that of a moment ago.
    let told = looks().find_map(|_| {
        serve(&host);
        Some(inherited(&host)).filter(|told| *told >= calls)
    });
    assert!(calls >= SWAPS as u64 * CALLS && told.is_some(), "{} told of {calls} calls", inherited(&host));
    println!("{SWAPS} swaps under load, {calls} calls in all, told of {}", inherited(&host));
    // The built-in that hands over does not take what another policy knows.
    let fair = host.builtin("sched-fair-share");
    let refused = put(&host, &fair, "require");
    assert!(
        refused.status == 422 && refused.body.to_string().contains("it has the layout 1, and this policy knows"),
        "{refused:?}"
    );
    assert_eq!(put(&host, &fair, "cold").status, 200);
    (0..5).for_each(|_| serve(&host));
    let swapped = put(&host, &fair, "require");
    let restored = swapped.body["handover"]["restored"].as_u64();
    assert!(swapped.status == 200 && restored > Some(1), "{swapped:?}");
    let journal = host.admin("GET", "/admin/v1/journal", &Value::Null).body.to_string();
    assert!(journal.contains("handed-over"), "{journal}");
    // A restart has nobody to hand over: it starts cold whatever the document says.
    let host = host.restart(&[]);
    let state = host.admin("GET", "/admin/v1/slots/scheduler", &Value::Null).body;
    assert_eq!(
        (&state["active"]["handover"], &state["health"]["state"]),
        (&json!("require"), &json!("closed")),
        "{state}"
    );
}
