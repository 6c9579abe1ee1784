//! `pointsman plugin check`: everything that an upload and an activation would say, without a host.
//!
//! One line per stage, in the order in which the host takes them; the first stage that fails ends the check with its reason
//! and what to change. The words are the host's own.

use std::io::Write;
use std::path::Path;

use anyhow::Context;

use super::host::{Trial, read};
use crate::cli::TrialArgs;

/// Checks a component.
///
/// # Errors
/// The first thing that is wrong with it.
pub(crate) fn check(path: &Path, with: &TrialArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let bytes = read(path)?;
    let refused = || format!("{} is refused", path.display());
    let trial = Trial::new(&with.labels)?;
    let inspected = trial.runtime.inspect(&bytes).with_context(refused)?;
    let imports = if inspected.imports.is_empty() { "nothing".to_owned() } else { inspected.imports.join(", ") };
    writeln!(out, "  digest    {}, {} bytes", inspected.digest, bytes.len())?;
    writeln!(out, "  world     {} of {}", inspected.world, inspected.package)?;
    writeln!(out, "  imports   {imports}")?;
    let component = trial.runtime.admit(&bytes).with_context(refused)?;
    let cached = if component.cached { ", from the cache" } else { "" };
    writeln!(out, "  compiled  in {:.0} ms{cached}", component.compile_ms)?;
    let prepared = trial.prepare(&component, &with.config, 1).with_context(refused)?;
    writeln!(out, "  started   {}, init and probes in {:.1} ms", prepared.revision, prepared.warm_ms)?;
    writeln!(out, "good: the host will take {}", path.display())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn prebuilt(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../plugins/prebuilt/{name}.wasm"))
    }

    fn with(config: serde_json::Value) -> TrialArgs {
        TrialArgs { config, labels: Vec::new() }
    }

    #[test]
    fn good_ones_are_described() {
        for (name, config, parts) in [
            (
                "route-least-loaded",
                json!({}),
                ["router-policy of pointsman:policy@0.", "started   route-least-loaded@"],
            ),
            ("route-least-loaded.core", json!({ "sequence_tokens": 3 }), ["pointsman:policy/host-log@", "good: "]),
            ("sched-fcfs", json!({}), ["scheduler-policy of", "good: "]),
            ("hook-slo-log", json!({}), ["telemetry-hook of", "host-metrics@"]),
        ] {
            let mut said = Vec::new();
            check(&prebuilt(name), &with(config), &mut said).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            let said = String::from_utf8_lossy(&said).into_owned();
            assert!(parts.iter().all(|part| said.contains(part)), "{name}: {said}");
        }
    }

    #[test]
    fn every_misbuilt_kind_is_told_what_to_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let large = folder.path().join("large.wasm");
        std::fs::File::create(&large).and_then(|f| f.set_len((32 << 20) + 1)).expect("a file");
        let text = folder.path().join("text.wasm");
        std::fs::write(&text, "(module)").expect("a file");
        for (path, config, parts) in [
            (prebuilt("fixture-foreign"), json!({}), ["wasi:", "wasm32-unknown-unknown, or stub WASI out"]),
            (
                prebuilt("fixture-bare-core"),
                json!({}),
                ["core module without a component type", "build it with the SDK"],
            ),
            (prebuilt("fixture-wrong-version"), json!({}), ["was built against pointsman:policy@", "rebuild it"]),
            (prebuilt("fixture-wrong-world"), json!({}), ["none of the worlds", "it exports"]),
            (prebuilt("fixture-wrong-shape"), json!({}), ["does not fit this host", "wit/policy.wit"]),
            (text, json!({}), ["WebAssembly text", "assemble it"]),
            (large, json!({}), ["33554433 bytes", "the limit is 33554432"]),
            (folder.path().join("none.wasm"), json!({}), ["cannot read", "give a plugin folder or a .wasm file"]),
            (
                prebuilt("route-least-loaded"),
                json!({ "sequence": 1 }),
                ["refused its configuration", "unknown field `sequence`"],
            ),
            (prebuilt("fixture-router"), json!({ "do": "trap-in-init" }), ["failed in init", "trap"]),
            (prebuilt("fixture-router"), json!({ "do": "spin-in-init" }), ["failed in init", "timeout"]),
            (prebuilt("fixture-router"), json!({ "do": "allocate-in-init" }), ["failed in init", "memory"]),
            (
                prebuilt("fixture-router"),
                json!({ "do": "want-unknown" }),
                ["cannot pass to a router-policy", "known are: replica.device"],
            ),
            (prebuilt("fixture-scheduler"), json!({ "do": "trap" }), ["failed the probe", "trap"]),
        ] {
            let error = check(&path, &with(config), &mut Vec::new()).expect_err(&path.display().to_string());
            let error = format!("{error:#}");
            assert!(parts.iter().all(|part| error.contains(part)), "{}: {error}", path.display());
        }
    }
}
