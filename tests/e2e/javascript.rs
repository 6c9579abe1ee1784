//! The stock OpenAI client for JavaScript, as people use it; skipped where Node or the package is absent.

use std::process::Command;

use pointsman_tests::{root, skip};

use crate::embeddings::{serving, tiny};

#[test]
fn the_stock_javascript_client_chats_completes_and_embeds() {
    let present = Command::new("node").args(["-e", "require('openai')"]).output();
    if !present.is_ok_and(|output| output.status.success()) && skip("openai-js", "node has no package `openai`") {
        return;
    }
    let folder = tiny();
    let host = serving(folder.path(), true);
    let script = root().join("tests/e2e/client.cjs");
    let output = Command::new("node").arg(script).arg(&host.data).output().expect("node runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
