//! The description of the host, put to the test by schemathesis: what it says may be sent is sent, right and wrong, and no
//! answer is a fault of the server. Skipped where the tool is absent.
//!
//! Deterministic, so that a failure comes again. What would only cost time is narrowed before: one model, few tokens.

use std::path::Path;
use std::process::Command;

use pointsman_tests::{Host, skip};
use serde_json::{Value, json};

use crate::host;

/// Cases of each operation.
const CASES: &str = "12";

/// Bodies that make tokens, as the description names them.
const GENERATIONS: [&str; 5] =
    ["ChatRequest", "CompletionRequest", "ResponseRequest", "MessageRequest", "CountRequest"];

/// The description with names that exist, one model and few tokens, without what waits for the journal to grow, and without
/// deadlines: one that has passed is a 504 by right.
fn narrowed(host: &Host) -> Value {
    let mut document = host.get("/openapi.json").body;
    for name in GENERATIONS {
        let schema = &mut document["components"]["schemas"][name];
        let required = schema["required"].as_array_mut().expect("a list");
        let fields = [
            ("max_tokens", "ChatRequest"),
            ("max_tokens", "CompletionRequest"),
            ("max_output_tokens", "ResponseRequest"),
        ];
        required.extend(fields.iter().filter(|(_, of)| *of == name).map(|(field, _)| json!(field)));
        let properties = schema["properties"].as_object_mut().expect("an object");
        properties.insert("model".into(), json!({"enum": ["demo:f16"]}));
        properties.remove("timeout_ms");
        for field in ["max_tokens", "max_completion_tokens", "max_output_tokens"] {
            if properties.contains_key(field) {
                properties.insert(field.into(), json!({"type": "integer", "minimum": 1, "maximum": 3}));
            }
        }
    }
    let parameters = &mut document["paths"]["/admin/v1/journal"]["get"]["parameters"];
    parameters.as_array_mut().expect("a list").retain(|parameter| parameter["name"] != "follow");
    let paths = document["paths"].as_object_mut().expect("an object").values_mut();
    let calls = paths.flat_map(|path| path.as_object_mut().expect("an object").values_mut());
    for parameter in calls.filter_map(|call| call.get_mut("parameters")?.as_array_mut()).flatten() {
        match parameter["name"].as_str() {
            Some("slot") => parameter["schema"] = json!({"enum": ["router", "scheduler", "telemetry.slo-log"]}),
            Some("name") => parameter["schema"] = json!({"enum": ["demo"]}),
            _ => {}
        }
    }
    document
}

/// Runs schemathesis against one plane; what it says where it found something.
fn attack(document: &Path, url: &str, arguments: &[&str]) {
    let mut command = Command::new("schemathesis");
    command.arg("run").arg(document).args(["--url", url, "--checks", "not_a_server_error", "--phases", "fuzzing"]);
    command.args(["--max-examples", CASES, "--generation-deterministic", "--no-shrink", "--no-color"]);
    let output = command.args(arguments).current_dir(document.parent().expect("a folder")).output();
    let output = output.expect("schemathesis runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{url}: {said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("passed"), "nothing was tested: {said}");
}

#[test]
fn nothing_that_the_description_allows_or_forbids_is_a_fault_of_the_server() {
    let present = Command::new("schemathesis").arg("--version").output();
    if !present.is_ok_and(|output| output.status.success()) && skip("schemathesis", "schemathesis is not installed") {
        return;
    }
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let document = folder.path().join("openapi.json");
    std::fs::write(&document, narrowed(&host).to_string()).expect("a temporary file");
    attack(&document, &host.data, &["--include-tag", "data"]);
    // A host that drains says 503 to everything after, a model that is unloaded is missed, and a recording takes its time.
    let left = "^/admin/v1/(drain|models/.*|slots/.*/record)$";
    attack(&document, &host.admin, &["--include-tag", "admin", "--exclude-path-regex", left]);
    let served = host.post("/v1/completions", &json!({"model": "demo:f16", "prompt": "Rust", "max_tokens": 1}));
    assert_eq!(served.status, 200, "it serves as before: {served:?}");
}
