//! `pointsman doctor`: what a start would find, for each part of a machine, without a start and without a trace of it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use pointsman_tests::{Host, root};
use serde_json::{Value, json};

use super::{drafts, host, loads};

/// Exit code and JSON.
pub(super) fn doctor(data_dir: &Path, args: &[&str]) -> (i32, Value) {
    let command = &mut Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
    // Any port, where the arguments name none.
    command.env("POINTSMAN_SERVER__LISTEN", "127.0.0.1:0").env("POINTSMAN_ADMIN__LISTEN", "127.0.0.1:0");
    let output = command
        .args(["doctor", "--json"])
        .arg("--data-dir")
        .arg(data_dir)
        .args(args)
        .output()
        .expect("the program runs");
    let report = serde_json::from_slice(&output.stdout);
    let report = report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().expect("an exit code"), report)
}

fn prebuilt(name: &str) -> std::path::PathBuf {
    root().join(format!("plugins/prebuilt/{name}.wasm"))
}

pub(super) fn finding<'a>(report: &'a Value, section: &str, name: &str) -> &'a Value {
    let findings = report["findings"].as_array().expect("findings");
    let found = findings.iter().find(|f| f["section"] == section && f["name"] == name);
    found.unwrap_or_else(|| panic!("nothing of {section}, {name}: {report:#}"))
}

#[test]
fn a_machine_that_can_serve_has_no_fault_and_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let data_dir = folder.path().join("data");
    let (code, report) = doctor(&data_dir, &[]);
    assert_eq!((code, &report["faults"]), (0, &json!(0)), "{report:#}");
    for (section, name, found) in [
        ("machine", "processor", "cores to use"),
        ("models", "demo", "part of the program"),
        ("policies", "router", "route-least-loaded@"),
        ("devices", "cpu", "CPU, "),
        ("ports", "data", "is free"),
    ] {
        let finding = finding(&report, section, name);
        assert!(finding["verdict"] == "ok" && finding["found"].as_str().unwrap().contains(found), "{finding}");
    }
    let config = folder.path().join("drafts.toml");
    fs::write(&config, "draft_models.demo = \"demo-mini\"\n").expect("a file");
    let (code, report) = doctor(&data_dir, &["--config", config.to_str().expect("a path")]);
    let finding = finding(&report, "draft models", "demo");
    assert_eq!((code, &finding["found"]), (0, &json!("`demo-mini` has the same tokenizer")), "{report:#}");
    assert!(!data_dir.exists(), "nothing is made");
}

#[test]
fn every_fault_is_told_with_its_remedy() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a path").to_owned();
    fs::create_dir(path("empty")).expect("a folder");
    fs::write(path("bad.toml"), "[server]\nlissten = 1\n").expect("a file");
    let no_key = "upstreams.east = { url = \"http://127.0.0.1:1\", model = \"m\", api_key_file = \"/nowhere/key\" }\n";
    fs::write(path("upstreams.toml"), no_key).expect("a file");
    fs::write(path("slots.toml"), format!("slots.router.component = {:?}\n", prebuilt("fixture-foreign")))
        .expect("a file");
    let certificate = |name: &str, mode: u32| {
        let pem = path(&format!("{name}-{mode:o}.pem"));
        fs::copy(root().join(format!("tests/e2e/{name}.pem")), &pem).expect("a certificate");
        fs::set_permissions(&pem, fs::Permissions::from_mode(mode)).expect("a file of ours");
        let config = path(&format!("{name}-{mode:o}.toml"));
        fs::write(&config, format!("[server.tls]\ncert_file = {pem:?}\nkey_file = {pem:?}\n")).expect("a file");
        config
    };
    let [expired, unborn] = ["expired", "unborn"].map(|name| certificate(name, 0o600));
    let open = certificate("registry", 0o644);
    let no_ca = "upstreams.east = { url = \"https://127.0.0.1:1\", model = \"m\", ca_file = \"/nowhere/ca\" }\n";
    fs::write(path("ca.toml"), no_ca).expect("a file");
    let ca = path("ca.toml");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = taken.local_addr().expect("an address").to_string();
    let (empty, bad, slots) = (format!("m={}", path("empty")), path("bad.toml"), path("slots.toml"));
    let (upstreams, on_demand) = (path("upstreams.toml"), path("on-demand.toml"));
    fs::write(&on_demand, format!("on_demand.lazy = {:?}\n", path("empty"))).expect("a file");
    let (file, store) = (path("bad.toml/below"), path("data"));
    let models = loads::folder();
    drafts::other_tokenizer(models.path());
    let drafted = |i: usize, name: &str, draft: &str, more: &str| {
        let (config, mini) = (path(&format!("drafts-{i}.toml")), models.path().join("other-tokens"));
        let own = format!("models.other = {mini:?}\ndraft_models.{name} = \"{draft}\"\n{more}");
        fs::write(&config, own).expect("a file");
        config
    };
    let lazy = format!("on_demand.lazy = {:?}\n", models.path().join("mini"));
    let refused = [("demo", "other", ""), ("demo", "none", ""), ("none", "demo-mini", ""), ("demo", "lazy", &lazy)];
    let [tokens, no_draft, no_model, lazy] = std::array::from_fn(|i| {
        let (name, draft, more) = refused[i];
        drafted(i, name, draft, more)
    });
    // Data directory, arguments, section and name of the finding, and what it says.
    type Case<'a> = (&'a str, &'a [&'a str], (&'a str, &'a str), &'a str);
    let cases: [Case<'_>; 17] = [
        (&store, &["--config", &tokens], ("draft models", "demo"), "`other` has another tokenizer"),
        (&store, &["--config", &no_draft], ("draft models", "demo"), "no model `none`"),
        (&store, &["--config", &no_model], ("draft models", "none"), "no model `none`"),
        (&store, &["--config", &lazy], ("draft models", "demo"), "is loaded on demand"),
        (&store, &["--config", &tokens, "--device", "null"], ("draft models", "devices"), "not among engine.devices"),
        (&store, &["--model", &empty], ("models", "m"), "cannot read config.json"),
        (&store, &["--config", &on_demand], ("models", "lazy"), "cannot read config.json"),
        (&store, &["--device", "cuda:7"], ("devices", "engine.devices"), "cuda:7"),
        (&store, &["--config", &bad], ("config", "file and environment"), "did you mean `server.listen`"),
        (&store, &["--config", &upstreams], ("upstreams", "east"), "api_key_file: /nowhere/key"),
        (&store, &["--config", &ca], ("upstreams", "east"), "ca_file: /nowhere/ca"),
        (&store, &["--config", &expired], ("tls", "data"), "has expired"),
        (&store, &["--config", &unborn], ("tls", "data"), "is not valid yet"),
        (&store, &["--config", &open], ("tls", "data"), "can be read by everybody"),
        (&store, &["--config", &slots], ("policies", "router"), "wasi:"),
        (&store, &["--listen", &at], ("ports", "data"), &at),
        (&file, &[], ("store", &file), "Not a directory"),
    ];
    for (data_dir, args, (section, name), says) in cases {
        let (code, report) = doctor(Path::new(data_dir), args);
        assert_eq!((code, &report["faults"]), (1, &json!(1)), "{args:?}: {report:#}");
        let finding = finding(&report, section, name);
        assert_eq!(finding["verdict"], "fault", "{finding}");
        let told = finding["found"].as_str().unwrap().contains(says) && finding["remedy"].as_str().unwrap().len() > 10;
        assert!(told, "{finding}");
    }
}

#[test]
fn a_configuration_that_is_refused_says_what_to_change_and_each_cause_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let written = |i: usize, text: &str| {
        let file = folder.path().join(format!("{i}.toml"));
        fs::write(&file, text).expect("a file");
        file.to_str().expect("a path").to_owned()
    };
    let none = folder.path().join("none.toml").to_str().expect("a path").to_owned();
    let rows = [
        ("[server]\nlissten = 1\n", "write `server.listen` in place of `server.lissten`"),
        ("[server]\nzzzzzzzzzzzzzz = 1\n", "`server.zzzzzzzzzzzzzz`"),
        ("[server\n", "at the line that is shown"),
        ("[server]\napi_keys_file = \"/nowhere/keys.toml\"\n", "the file that server.api_keys_file names"),
        ("[admin]\nlisten = \"0.0.0.0:0\"\n", "set admin.token"),
        ("[sched]\nblock_tokens = 15\n", "change `sched.block_tokens` from 15"),
        ("[server.tls]\ncert_file = \"/nowhere/a\"\n", "cert_file and key_file"),
        ("[upstreams.cpu]\nurl = \"http://127.0.0.1:1\"\nmodel = \"m\"\n", "[upstreams]"),
    ];
    let files = rows.iter().enumerate().map(|(i, (text, remedy))| (written(i, text), *remedy));
    for (file, says) in files.chain([(none.clone(), &*none)]) {
        // In the environment it would come before the file.
        let command = &mut Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
        let output = command.args(["doctor", "--json", "--config", &file]).output().expect("the program runs");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let finding = finding(&report, "config", "file and environment");
        let text = |member: &str| finding[member].as_str().unwrap_or_default().to_owned();
        assert!(text("remedy").contains(says), "{says}: {finding}");
        assert!(text("found").matches("os error").count() <= 1, "{finding}");
    }
}

#[test]
fn the_stored_deployment_of_a_running_host_is_tried_and_not_touched() {
    let host = host(&[]);
    let digest = host.upload(&fs::read(prebuilt("fixture-router")).expect("a fixture"));
    let put = host.activate("router", &digest, json!({}));
    assert_eq!(put.status, 200, "{}", put.body);
    let before = state_of(&host);
    let address = |url: &str| url.trim_start_matches("http://").to_owned();
    let (data, admin) = (address(&host.data), address(&host.admin));
    let (code, report) = doctor(host.folder(), &["--listen", &data, "--admin", &admin]);
    assert_eq!(code, 0, "{report:#}");
    let found = |section, name| finding(&report, section, name)["found"].as_str().unwrap().to_owned();
    assert!(found("policies", "router").starts_with("fixture-router@"), "{report:#}");
    assert!(found("ports", "data").contains("a host runs"), "{report:#}");
    assert_eq!(state_of(&host), before);
}

/// Names, sizes and times of change in the data directory.
fn state_of(host: &Host) -> Vec<(String, u64, std::time::SystemTime)> {
    let folders = ["", "slots", "aliases", "components", "compiled"].map(|folder| host.folder().join(folder));
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    let mut files: Vec<_> = entries
        .map(|entry| (entry.path(), entry.metadata().expect("it is there")))
        .map(|(path, found)| (path.display().to_string(), found.len(), found.modified().expect("a time")))
        .collect();
    files.sort();
    files
}
