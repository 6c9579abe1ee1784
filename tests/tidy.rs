//! Rules that only a document enforces rot, so the walls of ARCHITECTURE.md are tables here: a new arrow between crates, a
//! feature declared in a member, an unsafe block outside the backends or a file without a header fails this test.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken checkout should stop the test where it is")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Crates of ours that each crate may depend on.
const WALLS: [(&str, &[&str]); 9] = [
    ("pointsman-telemetry", &[]),
    ("pointsman-sched", &["pointsman-telemetry"]),
    ("pointsman-engine", &["pointsman-sched", "pointsman-telemetry"]),
    ("pointsman-policy", &["pointsman-sched", "pointsman-telemetry"]),
    ("pointsman-control", &["pointsman-telemetry"]),
    ("pointsman-server", &["pointsman-sched", "pointsman-telemetry"]),
    ("pointsman", &["*"]),
    ("pointsman-tests", &["*"]),
    ("pointsman-benches", &["*"]),
];

/// Third-party crates that only some of ours may name as a normal dependency.
const EXTERNAL_WALLS: [(&str, &[&str]); 13] = [
    ("wasmtime", &["pointsman-policy"]),
    ("wit-component", &["pointsman-policy"]),
    ("wit-bindgen-c", &["pointsman"]),
    ("candle-core", &["pointsman-engine"]),
    ("cudarc", &["pointsman-engine"]),
    ("hyper", &["pointsman-server", "pointsman"]),
    ("axum", &["pointsman-server", "pointsman"]),
    ("tokenizers", &["pointsman-server"]),
    ("minijinja", &["pointsman-server"]),
    ("llguidance", &["pointsman-server"]),
    ("tokio", &["pointsman-server", "pointsman", "pointsman-tests", "pointsman-benches"]),
    ("anyhow", &["pointsman", "pointsman-tests", "pointsman-benches"]),
    (
        "serde_json",
        &[
            "pointsman-server",
            "pointsman-engine",
            "pointsman-control",
            "pointsman-policy",
            "pointsman",
            "pointsman-tests",
            "pointsman-benches",
        ],
    ),
];

/// Largest guest, in thousands of bytes: what a policy drags in is compiled while an upload waits.
const MAX_GUEST_KB: u64 = 160;

/// Where `unsafe` may stand: the engine's backends, the mapping of weights, the compiled-component cache, the guests' ABI,
/// counting allocators in tests, and a test's own question to the library that it made.
const UNSAFE: [&str; 7] = [
    "host/engine/src/backend/",
    "host/engine/src/load.rs",
    "host/policy/src/compile.rs",
    "plugins/sdk/src/",
    "host/engine/tests/no_alloc.rs",
    "host/sched/tests/no_alloc.rs",
    "host/engine/tests/cuda_driver/main.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is inside the workspace").to_owned()
}

/// The packages of the workspace: name, and the names of their normal dependencies.
fn packages() -> BTreeMap<String, Vec<String>> {
    let arguments = ["metadata", "--offline", "--no-deps", "--format-version", "1"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(root()).output().expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let text = |value: &Value| value.as_str().expect("a name").to_owned();
    let normal = |package: &Value| {
        let dependencies = package["dependencies"].as_array().expect("a list");
        dependencies.iter().filter(|d| d["kind"].is_null()).map(|d| text(&d["name"])).collect()
    };
    metadata["packages"].as_array().expect("a list").iter().map(|p| (text(&p["name"]), normal(p))).collect()
}

/// Tracked files with one of the extensions, as paths relative to the root.
fn tracked(extensions: &[&str]) -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "-co", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    let text = String::from_utf8(listed.stdout).expect("paths are UTF-8");
    let wanted = |path: &&str| extensions.iter().any(|e| path.ends_with(e)) && root().join(path).is_file();
    let files: Vec<String> = text.lines().filter(wanted).map(str::to_owned).collect();
    assert!(!files.is_empty(), "no {extensions:?} files found: is this a git checkout?");
    files
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let packages = packages();
    let allowed: BTreeMap<&str, &[&str]> = WALLS.into_iter().collect();
    let ours: BTreeSet<&str> = packages.keys().map(String::as_str).collect();
    assert_eq!(ours, allowed.keys().copied().collect(), "the table names every crate");
    let mut faults = Vec::new();
    for (package, dependencies) in &packages {
        let allowed = allowed[package.as_str()];
        for name in dependencies.iter().map(String::as_str) {
            if ours.contains(name) && !allowed.contains(&"*") && !allowed.contains(&name) {
                faults.push(format!("{package} -> {name}"));
            }
            let wall = EXTERNAL_WALLS.iter().find(|(external, _)| *external == name);
            if wall.is_some_and(|(_, allowed)| !allowed.contains(&package.as_str())) {
                faults.push(format!("{package} -> {name} (external)"));
            }
        }
    }
    assert!(faults.is_empty(), "arrows through a wall: {faults:#?}");
}

#[test]
fn versions_and_features_are_declared_once() {
    for manifest in tracked(&["Cargo.toml"]).iter().filter(|m| m.contains('/') && !m.starts_with("plugins/")) {
        let table: toml::Table = read(manifest).parse().unwrap_or_else(|e| panic!("{manifest}: {e}"));
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(toml::Value::Table(dependencies)) = table.get(section) else { continue };
            for (name, spec) in dependencies {
                let keys: Vec<&str> = spec.as_table().map_or(vec![], |t| t.keys().map(String::as_str).collect());
                assert_eq!(
                    keys,
                    ["workspace"],
                    "{manifest}: `{name}` must be `{name}.workspace = true` and nothing else"
                );
            }
        }
    }
}

/// The feature sets of every package in a `cargo tree`.
fn features(arguments: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none", "--no-dedupe", "-f", "{p}|{f}"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo tree runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        let Some((package, features)) = line.split_once('|') else { continue };
        let package = package.trim_end_matches(" (proc-macro)").to_owned();
        found.entry(package).or_default().insert(features.trim_end_matches(" (*)").to_owned());
    }
    found
}

#[test]
fn run_and_test_compile_the_same_dependencies() {
    let run = features(&["-p", "pointsman", "-e", "normal,build"]);
    let test = features(&["--workspace", "-e", "normal,build,dev"]);
    assert!(run.keys().any(|p| p.starts_with("wasmtime ")), "the tree is read: {:?}", run.keys().next());
    let differ = run.iter().filter(|(package, features)| test.get(*package).is_some_and(|t| t != *features));
    let differ: Vec<String> = differ.map(|(p, f)| format!("{p}: run {f:?}, test {:?}", test[p])).collect();
    assert!(differ.is_empty(), "compiled twice; declare the features in the root Cargo.toml: {differ:#?}");
}

#[test]
fn every_file_opens_with_what_it_is() {
    let mut bare = Vec::new();
    for path in tracked(&[".rs"]) {
        let text = read(&path);
        let first = text.lines().find(|l| !l.trim().is_empty() && !l.starts_with("#!["));
        if !first.is_some_and(|l| l.starts_with("//!")) {
            bare.push(path);
        }
    }
    assert!(bare.is_empty(), "files without a `//!` header: {bare:#?}");
}

#[test]
fn unsafe_code_stays_where_it_is_allowed() {
    let mut faults = Vec::new();
    for path in tracked(&[".rs"]) {
        let words = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
        let uses = |line: &str| !line.trim_start().starts_with("//") && words.iter().any(|w| line.contains(w));
        if path != "tests/tidy.rs"
            && read(&path).lines().any(uses)
            && !UNSAFE.iter().any(|allowed| path.starts_with(allowed))
        {
            faults.push(path);
        }
    }
    assert!(faults.is_empty(), "unsafe outside the backends: {faults:#?}");
}

#[test]
fn no_marker_is_left_behind() {
    let banned = ["todo!(", "unimplemented!(", "#[ignore", "FIXME", "XXX", "dbg!(", "../shared"];
    let mut faults = Vec::new();
    for path in tracked(&[".rs", ".toml", ".md", ".sh", ".wit", ".py"]).iter().filter(|p| *p != "tests/tidy.rs") {
        for (number, line) in read(path).lines().enumerate() {
            if let Some(word) = banned.iter().find(|word| line.contains(**word)) {
                faults.push(format!("{path}:{}: {word}", number + 1));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_committed_guests_are_built_from_these_sources() {
    let manifest: Value = serde_json::from_str(&read("plugins/prebuilt/manifest.json")).expect("JSON");
    let is_source = |path: &String| {
        let guest = path.starts_with("plugins/") && !path.starts_with("plugins/prebuilt/");
        let wit = path.starts_with("wit/") && path.ends_with(".wit");
        wit || (guest && (path.ends_with("Cargo.lock") || [".rs", ".toml", ".wat"].iter().any(|e| path.ends_with(e))))
    };
    let sources: BTreeSet<String> =
        tracked(&[".rs", ".toml", ".wat", ".wit", "Cargo.lock"]).into_iter().filter(is_source).collect();
    let bytes = |path: &str| fs::read(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let lines: String = sources.iter().map(|path| format!("{}  {path}\n", sha256(&bytes(path)))).collect();
    assert_eq!(manifest["source_hash"], sha256(lines.as_bytes()), "guest sources changed: run plugins/build.sh");
    let files = manifest["files"].as_object().expect("a table of files");
    for (name, file) in files {
        let path = format!("plugins/prebuilt/{name}");
        assert_eq!(file["sha256"], sha256(&bytes(&path)), "{path} is not what the manifest says: run plugins/build.sh");
        let size = file["size"].as_u64().expect("a size");
        assert!(size <= MAX_GUEST_KB * 1_000, "{path} has {size} bytes: find out what it drags in");
    }
    assert!(read("plugins/README.md").contains(&format!("beyond {MAX_GUEST_KB} KB")), "it names the largest size");
    let committed = tracked(&[".wasm"]).into_iter().filter(|p| p.starts_with("plugins/prebuilt/")).count();
    assert_eq!(committed, files.len(), "the manifest lists every prebuilt component");
}

#[test]
fn the_documented_wit_hash_is_that_of_the_file() {
    let hash = sha256(&fs::read(root().join("wit/policy.wit")).expect("the WIT package exists"));
    assert!(
        read("ARCHITECTURE.md").contains(&hash),
        "wit/policy.wit changed: read it again and put {hash} into ARCHITECTURE.md"
    );
}
