//! Batches through the whole host with the stock client, and a kill in the middle of one.

use std::process::Command;

use pointsman_tests::{Host, root, skip};

use crate::host;

/// Runs the script; what it prints.
fn script(host: &Host, arguments: &[&str]) -> String {
    let script = root().join("tests/e2e/batch.py");
    let output = Command::new("python3").arg(script).arg(&host.data).args(arguments).output().expect("python3 runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn is_absent() -> bool {
    let present = Command::new("python3").args(["-c", "import openai"]).output();
    !present.is_ok_and(|output| output.status.success()) && skip("openai", "python3 has no package `openai`")
}

#[test]
fn a_batch_that_is_killed_goes_on_and_answers_every_line_once() {
    if is_absent() {
        return;
    }
    let host = host(&[("BATCH__MAX_IN_FLIGHT", "2")]);
    let id = script(&host, &["begin"]);
    let host = host.restart(&[]);
    script(&host, &["end", &id]);
}

#[test]
fn batches_fail_expire_and_are_cancelled_as_the_stock_client_knows_it() {
    if is_absent() {
        return;
    }
    let host = host(&[]);
    script(&host, &["whole"]);
}
