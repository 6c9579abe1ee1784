//! What operators copy: the commands of the runbook and the examples for clients are run as they stand in the documents, and the
//! files for systemd, Kubernetes, Prometheus and Grafana name what there is.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Output};

use pointsman_tests::{Host, root, skip};
use serde_json::{Value, json};

use super::host;

fn document(path: &str) -> String {
    fs::read_to_string(root().join("docs").join(path)).unwrap_or_else(|e| panic!("docs/{path}: {e}"))
}

/// The indented lines below a heading.
fn code(document: &str, heading: &str) -> String {
    let below = document.lines().skip_while(|line| *line != format!("## {heading}")).skip(1);
    let lines = below.take_while(|line| !line.starts_with("## ")).filter_map(|line| match line.is_empty() {
        true => Some(""),
        false => line.strip_prefix("    "),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn ask(host: &Host) -> u16 {
    host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 2 })).status
}

#[test]
fn every_command_of_the_runbook_works_in_its_order() {
    let host = host(&[]);
    assert_eq!(host.activate("router", &host.builtin("route-weighted"), json!({})).status, 200);
    assert_eq!(ask(&host), 200);
    let folder = tempfile::tempdir().expect("a folder");
    let runbook = document("runbook.md");
    let commands: Vec<&str> = runbook.lines().filter_map(|line| line.strip_prefix("    pointsman ")).collect();
    assert!(commands.len() >= 10, "{commands:?}");
    for command in commands {
        let program = env!("CARGO_BIN_EXE_pointsman-under-test");
        // A shell, because that is where they are typed.
        let output = Command::new("sh")
            .args(["-c", &format!("{program} {command}")])
            .current_dir(folder.path())
            .env("POINTSMAN_ADMIN_URL", &host.admin)
            .env("POINTSMAN_DATA_DIR", host.folder())
            .output()
            .expect("a shell runs");
        assert!(output.status.success(), "pointsman {command}: {}", said(&output));
        assert_eq!(ask(&host), 200, "after pointsman {command}");
    }
    let slots = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    assert!(slots["active"]["revision"].as_str().unwrap_or_default().starts_with("route-least-loaded@"), "{slots}");
}

#[test]
fn every_example_for_clients_works_as_it_stands() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let clients = document("clients.md").replace("http://127.0.0.1:8080", &host.data);
    let imports =
        |program: &str, args: &[&str]| Command::new(program).args(args).output().is_ok_and(|o| o.status.success());
    let has_python = || imports("python3", &["-c", "import openai"]);
    let has_node = || imports("node", &["-e", "require('openai')"]);
    type Row<'a> = (&'a str, &'a [&'a str], &'a str, &'a dyn Fn() -> bool, &'a str);
    let rows: [Row<'_>; 3] = [
        ("curl", &["bash", "-e"], "curl", &|| imports("curl", &["--version"]), "data: [DONE]"),
        ("Python", &["python3"], "openai", &has_python, "demo:"),
        ("JavaScript", &["node"], "openai-js", &has_node, "stable:"),
    ];
    for (heading, run, tool, is_there, says) in rows {
        if !is_there() && skip(tool, "it is not installed") {
            continue;
        }
        let script = folder.path().join(format!("{heading}.cjs"));
        fs::write(&script, code(&clients, heading)).expect("a file");
        let output = Command::new(run[0]).args(&run[1..]).arg(&script).output().expect("it starts");
        assert!(output.status.success() && said(&output).contains(says), "{heading}: {}", said(&output));
    }
}

/// Names of metrics in a text.
fn metrics(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c| !is_part(c)).filter(|word| word.starts_with("vllm:") || word.starts_with("pointsman_"));
    words.map(|word| word.trim_end_matches("_bucket").to_owned()).collect()
}

#[test]
fn dashboards_and_alerts_ask_for_metrics_that_there_are() {
    let source = |file: &str| fs::read_to_string(root().join("host/telemetry/src").join(file)).expect("the source");
    let known = metrics(&(source("metrics.rs") + &source("models.rs") + &source("upstreams.rs")));
    for (file, least) in [("operation/dashboard.json", 24), ("operation/alerts.yaml", 7)] {
        let asked = metrics(&document(file));
        assert!(asked.len() >= least, "{file}: {asked:?}");
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
    }
    let dashboard: Value = serde_json::from_str(&document("operation/dashboard.json")).expect("JSON");
    assert_eq!(dashboard["title"], "Pointsman");
    // Each alert says where to read on.
    let (alerts, runbook) = (document("operation/alerts.yaml"), document("runbook.md"));
    let headings: Vec<&str> =
        alerts.lines().filter_map(|line| line.trim().strip_prefix("runbook: docs/runbook.md, ")).collect();
    assert_eq!(headings.len(), alerts.matches("- alert:").count());
    for heading in headings {
        assert!(runbook.contains(&format!("\n## {}", heading.trim_matches('"'))), "the runbook has no {heading}");
    }
}

#[test]
fn unit_and_manifest_fit_the_program() {
    let folder = tempfile::tempdir().expect("a folder");
    let host = host(&[]);
    let manifest = document("operation/kubernetes.yaml");
    let probes: Vec<&str> =
        manifest.lines().filter_map(|l| l.trim().strip_prefix("httpGet: { path: ")?.split(',').next()).collect();
    assert_eq!(probes, ["/metrics", "/health", "/ready"]);
    probes.iter().for_each(|path| assert_eq!(host.get(path).status, 200, "{path}"));
    // The configuration and the keys in it are taken as they are, but for the place of the keys and a port that is free here.
    let block = |name: &str| -> String {
        let below = manifest.lines().skip_while(|line| *line != format!("  {name}: |")).skip(1);
        below.take_while(|line| line.starts_with("    ")).map(|line| format!("{}\n", line.trim_start())).collect()
    };
    let keys = folder.path().join("keys.toml");
    fs::write(&keys, block("keys.toml")).expect("a file");
    let config = block("pointsman.toml").replace("/etc/pointsman/keys/keys.toml", &keys.display().to_string());
    let file = folder.path().join("pointsman.toml");
    fs::write(&file, config.replace("0.0.0.0:8080", "0.0.0.0:0")).expect("a file");
    let doctor = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"))
        .args(["doctor", "--admin", "127.0.0.1:0", "--config"])
        .arg(&file)
        .arg("--data-dir")
        .arg(folder.path().join("data"))
        .output()
        .expect("the program runs");
    assert!(doctor.status.success() && said(&doctor).contains("0 faults and 0 warnings"), "{}", said(&doctor));
    // Pause and grace fit in what Kubernetes gives, and the unit's user is one that can be given a file.
    let number = |after: &str| -> u32 {
        let rest = manifest.split_once(after).unwrap_or_else(|| panic!("no {after}")).1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().expect("a number")
    };
    let taken = number("[\"sleep\", \"") + number("shutdown_grace_ms = ") / 1_000;
    assert!(taken < number("terminationGracePeriodSeconds: "), "{taken} s");
    let user = document("operation/sysusers.conf").contains("\nu pointsman ");
    assert!(user && document("operation/pointsman.service").contains("\nUser=pointsman\n"), "made by sysusers.conf");
    if Command::new("systemd-analyze").arg("--version").output().is_err() && skip("systemd", "no systemd-analyze") {
        return;
    }
    let unit = folder.path().join("pointsman.service");
    let text = document("operation/pointsman.service");
    fs::write(&unit, text.replace("/usr/local/bin/pointsman", env!("CARGO_BIN_EXE_pointsman-under-test")))
        .expect("a file");
    let verified = Command::new("systemd-analyze").arg("verify").arg(&unit).output().expect("it runs");
    assert!(verified.status.success() && said(&verified).is_empty(), "{}", said(&verified));
}
