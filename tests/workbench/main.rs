//! The workbench as its users meet it: every command of docs/plugin-guide.md, and every template from `new` to `rollback`.
//!
//! One test per language, so that a language whose tools are absent is one skip that says so (`POINTSMAN_REQUIRE` makes it a
//! failure: `rust-guest`, `js-guest`, `python-guest`, `c-guest`). The guide's commands for installing tools are run where the
//! language is required, and left out where the tools are on the path already.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken workbench should stop the test where it is")]

mod guide;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pointsman_tests::{Host, required, skip};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The kinds of template beside the router, which the guide makes, and the slots that they go into.
const KINDS: [(&str, &str); 5] = [
    ("scheduler", "scheduler"),
    ("telemetry", "telemetry.slo-log"),
    ("admission", "admission"),
    ("kv-retention", "kv-retention"),
    ("sampler", "sampler"),
];

/// The plugin guide.
const GUIDE: &str = include_str!("../../docs/plugin-guide.md");

/// An author's desk: a folder, a running host, and the program on the path.
struct Desk {
    folder: TempDir,
    host: Host,
    path: Vec<PathBuf>,
    /// Whether the guide's commands for installing tools are run.
    installs: bool,
}

impl Desk {
    fn new(installs: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let bin = folder.path().join("bin");
        std::fs::create_dir(&bin).expect("a folder");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pointsman-under-test"), bin.join("pointsman")).expect("a link");
        // A Python guest takes ten seconds of compilation, and tests run side by side.
        let host = Host::start(env!("CARGO_BIN_EXE_pointsman-under-test"), &[("POLICY__COMPILE_TIMEOUT_MS", "300000")]);
        // What the guide installs into its router's folder also builds the other kinds.
        let tools = ["my-router/node_modules/.bin", "my-router/.venv/bin"].map(|tools| folder.path().join(tools));
        let path = [bin].into_iter().chain(tools).chain(search_path()).collect();
        Self { folder, host, path, installs }
    }

    /// Runs a line of shell.
    fn shell(&self, line: &str) -> Output {
        let line = line.replace("http://127.0.0.1:8080", &self.host.data);
        Command::new("bash")
            .args(["-c", &format!("set -eo pipefail; {line}")])
            .current_dir(self.folder.path())
            .env("PATH", std::env::join_paths(&self.path).expect("a path"))
            .env("POINTSMAN_ADMIN_URL", &self.host.admin)
            .env("XDG_CACHE_HOME", self.folder.path().join("cache"))
            // Shared by all tests and kept between runs: the standard library of the target is built once.
            .env("CARGO_TARGET_DIR", concat!(env!("CARGO_TARGET_TMPDIR"), "/rust-guests"))
            .output()
            .expect("bash runs")
    }

    /// Runs a line of shell that must succeed; what it printed.
    fn run(&self, line: &str) -> String {
        let output = self.shell(line);
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}\n{said}");
        said
    }

    fn active(&self, slot: &str) -> Value {
        self.host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null).body["active"].clone()
    }

    /// A template of another kind, from nothing to rolled back.
    fn template(&self, lang: &str, kind: &str, slot: &str) {
        let name = format!("my-{kind}");
        self.run(&format!("pointsman plugin new {name} --kind {kind} --lang {lang}"));
        let built = self.run(&format!("pointsman plugin build {name}"));
        assert!(built.contains(&format!("good: the host will take {name}/{name}.wasm")), "{built}");
        let timed = self.run(&format!("pointsman plugin bench {name} --calls 50"));
        assert_eq!(timed.lines().count(), 5, "{timed}");
        let before = self.active(slot);
        let digest = self.run(&format!("pointsman policy upload {name}/{name}.wasm"));
        let digest = digest.split_whitespace().next().expect("a digest");
        self.run(&format!("pointsman policy activate {slot} {digest}"));
        let revision = self.active(slot)["revision"].clone();
        assert!(revision.as_str().is_some_and(|r| r.starts_with(&format!("{name}@0.1.0+"))), "{revision}");
        let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 4 });
        assert_eq!(self.host.post("/v1/completions", &body).status, 200);
        let state = self.host.admin("GET", &format!("/admin/v1/slots/{slot}"), &Value::Null).body;
        let faults = state["counters"]["faults"].as_object().expect("faults by kind");
        assert!(faults.values().all(|n| *n == json!(0)), "{state}");
        // A slot that was native has nothing to roll back to.
        let native = before["revision"] == "native";
        let undo = if native { format!("activate {slot} native") } else { format!("rollback {slot}") };
        self.run(&format!("pointsman policy {undo}"));
        assert_eq!(self.active(slot)["revision"], before["revision"]);
    }
}

#[expect(clippy::disallowed_methods, reason = "finding a tool as a shell would")]
fn search_path() -> Vec<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect()
}

fn on_path(name: &str) -> bool {
    search_path().iter().any(|folder| folder.join(name).is_file())
}

/// The guide's section of a language, then its other templates; unless its tools are absent.
fn language(lang: &str, title: &str, present: bool, why: &str) {
    let tool = format!("{lang}-guest");
    let installs = required(&tool);
    if !installs && !present && skip(&tool, why) {
        return;
    }
    let desk = Desk::new(installs);
    guide::follow(&desk, GUIDE, title);
    for (kind, slot) in KINDS {
        desk.template(lang, kind, slot);
    }
    guide::follow(&desk, GUIDE, "Try it on recorded traffic");
}

#[test]
fn the_pages_of_the_other_hooks() {
    let desk = Desk::new(false);
    for page in [
        include_str!("../../docs/admission.md"),
        include_str!("../../docs/kv-retention.md"),
        include_str!("../../docs/sampler.md"),
    ] {
        guide::follow(&desk, page, "Try it");
    }
}

#[test]
fn rust() {
    let target =
        Command::new("rustc").args(["--print", "target-libdir", "--target", "wasm32-unknown-unknown"]).output();
    let library = target.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let rustup = library.is_ok_and(|folder| !folder.is_empty() && Path::new(&folder).is_dir());
    let sources = Command::new("/usr/bin/rustc").args(["--print", "sysroot"]).output();
    let debian = sources.is_ok_and(|output| {
        let root = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Path::new(&root).join("lib/rustlib/src/rust/library").is_dir()
    });
    language("rust", "Rust", rustup || debian, "rustc has no standard library for wasm32-unknown-unknown");
}

#[test]
fn javascript() {
    language("js", "JavaScript", on_path("componentize-qjs"), "componentize-qjs is not on the path");
}

#[test]
fn python() {
    language("python", "Python", on_path("componentize-py"), "componentize-py is not on the path");
}

#[test]
fn c() {
    language("c", "C", on_path("python-zig") || on_path("zig"), "neither python-zig nor zig is on the path");
}

#[test]
fn a_missing_tool_is_named_with_what_installs_it() {
    let desk = Desk::new(false);
    for (lang, tool, install) in [
        ("js", "componentize-qjs", "npm install --prefix mine-js"),
        ("python", "componentize-py", "mine-python/.venv/bin/pip install -r mine-python/requirements.txt"),
        ("c", "python-zig", "mine-c/.venv/bin/pip install -r mine-c/requirements.txt"),
        ("rust", "cargo", "rustup target add wasm32-unknown-unknown"),
    ] {
        desk.run(&format!("pointsman plugin new mine-{lang} --kind router --lang {lang}"));
        let output = desk.shell(&format!("p=$(command -v pointsman); PATH=/nowhere $p plugin build mine-{lang}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{lang}: {said}");
        assert!(said.contains(&format!("`{tool}` is not installed")) && said.contains(install), "{lang}: {said}");
    }
}

#[test]
fn what_is_wrong_with_a_component_ends_with_exit_code_1_and_usage_with_2() {
    let desk = Desk::new(false);
    for (line, code, part) in [
        ("pointsman plugin check nothing.wasm", 1, "give a plugin folder or a .wasm file"),
        ("pointsman plugin build .", 1, "`pointsman plugin new` makes one"),
        ("pointsman plugin new Mine --kind router --lang c", 1, "lower-case letters"),
        ("pointsman plugin new mine --kind rooter --lang c", 2, "router"),
        ("pointsman policy record nowhere -o out", 2, "router"),
        ("pointsman policy record telemetry.slo-log -o out", 1, "scheduler, kv-retention and sampler can"),
    ] {
        let output = desk.shell(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{line}: {said}");
        assert!(said.contains(part), "{line}: {said}");
    }
}
