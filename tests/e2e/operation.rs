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

/// Names of series that an expression asks for.
fn asked(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c| !is_part(c)).filter(|word| word.starts_with("vllm:") || word.starts_with("pointsman_"));
    words.map(str::to_owned).collect()
}

/// Names of the series that the host declares. What takes seconds is a histogram, which is three series.
fn declared() -> BTreeSet<String> {
    let sources = fs::read_dir(root().join("host/telemetry/src")).expect("a folder");
    let mut names = BTreeSet::new();
    for source in sources {
        let text = fs::read_to_string(source.expect("an entry").path()).expect("the source");
        for literal in text.split('"').filter(|literal| asked(literal).contains(*literal)) {
            match literal.ends_with("_seconds") && !literal.ends_with("_timestamp_seconds") {
                true => names.extend(["bucket", "sum", "count"].map(|part| format!("{literal}_{part}"))),
                false => names.extend([literal.to_owned()]),
            }
        }
    }
    names
}

#[test]
fn dashboards_and_alerts_ask_for_metrics_that_there_are() {
    let known = declared();
    // What a host shows is what is declared: by the source it is known also where nobody has asked for it yet.
    let scraped = host(&[]).get("/metrics").body;
    let lines = scraped.as_str().expect("text").lines().filter(|line| !line.starts_with('#'));
    let shown: BTreeSet<String> =
        lines.map(|line| line.split(['{', ' ']).next().unwrap_or_default().to_owned()).collect();
    let undeclared: Vec<_> = shown.difference(&known).filter(|name| !name.starts_with("pointsman_plugin_")).collect();
    assert!(shown.len() > 30 && undeclared.is_empty(), "{undeclared:?} of {shown:?}");
    for (file, least) in [("operation/dashboard.json", 50), ("operation/alerts.yaml", 17)] {
        let asked = asked(&document(file));
        assert!(asked.len() >= least, "{file}: {asked:?}");
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
    }
}

#[test]
fn gauges_of_devices_are_what_the_admin_api_says() {
    let host = host(&[("ENGINE__DEVICES", "[\"cpu\", \"null\"]")]);
    let listed = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
    let scraped = host.get("/metrics").body;
    let gauge = |series: &str| -> Option<f64> {
        let begins = format!("pointsman_device_{series}}} ");
        let mut lines = scraped.as_str().expect("text").lines();
        lines.find_map(|line| line.strip_prefix(begins.as_str())?.parse().ok())
    };
    for (device, name) in listed["data"].as_array().expect("a list").iter().zip(["cpu", "null"]) {
        assert_eq!((&device["name"], &device["state"]), (&json!(name), &json!("up")));
        assert_eq!(gauge(&format!("up{{device=\"{name}\"")), Some(1.0));
        let memory = &device["memory"];
        for owner in ["weights", "kv", "workspace", "drafts", "graphs"] {
            let held = gauge(&format!("memory_bytes{{device=\"{name}\",owner=\"{owner}\""));
            assert_eq!(held, memory[owner].as_f64(), "{name} {owner}: {scraped}");
        }
        assert_eq!(memory["weights"].as_u64() > Some(0), name == "cpu", "{device}");
        // Neither has a monitor; what they compute, the host knows itself.
        for family in ["memory_free_bytes", "memory_total_bytes", "temperature_celsius", "power_watts"] {
            assert_eq!(gauge(&format!("{family}{{device=\"{name}\"")), None, "{scraped}");
        }
        for missing in [&memory["free"], &memory["total"], &device["temperature"], &device["power_watts"]] {
            assert!(missing.is_null(), "{device}");
        }
        let share = gauge(&format!("utilization_ratio{{device=\"{name}\""));
        assert!(share.is_some_and(|share| (0.0..=1.0).contains(&share)), "{scraped}");
    }
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2));
}

#[test]
fn panels_of_the_dashboard_are_whole() {
    let dashboard: Value = serde_json::from_str(&document("operation/dashboard.json")).expect("JSON");
    assert_eq!(dashboard["title"], "Pointsman");
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().expect("a list") {
        let title = panel["title"].as_str().expect("a title");
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}: the id is another's");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().expect("a number"));
        let is_free = (y..y + h).all(|y| (x..x + w).all(|x| x < 24 && places.insert((x, y))));
        assert!(is_free, "{title} lies on another panel or beyond the edge");
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
        let targets = panel["targets"].as_array().expect("a list");
        assert!(!targets.is_empty(), "{title} shows nothing");
        for target in targets {
            let [asks, legend] = ["expr", "legendFormat"].map(|key| target[key].as_str().expect("a text"));
            // Every series is of the jobs that were chosen, and a label that is gone by the sum is in no legend.
            assert_eq!(
                asks.matches("{job=~\"$job\"").count(),
                asks.matches("pointsman_").count() + asks.matches("vllm:").count(),
                "{title}: {asks}"
            );
            let kept = asks.split_once("sum by (").and_then(|(_, rest)| rest.split_once(')'));
            for label in legend.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()) {
                assert!(kept.is_none_or(|(by, _)| by.split(", ").any(|word| word == label)), "{title}: {label}");
            }
        }
    }
}

#[test]
fn alerts_say_what_how_long_how_bad_and_where_to_read_on() {
    let (alerts, runbook) = (document("operation/alerts.yaml"), document("runbook.md"));
    let mut names = BTreeSet::new();
    for rule in alerts.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap_or_default();
        assert!(names.insert(name), "{name} is there twice");
        let field = |key: &str| -> &str {
            let found = rule.lines().find_map(|line| line.trim_start().strip_prefix(key));
            found.unwrap_or_else(|| panic!("{name} has no {key}")).trim()
        };
        let asks = rule.split_once("expr: ").and_then(|(_, rest)| rest.split_once("for: ")).map(|(asks, _)| asks);
        let asks = asks.unwrap_or_else(|| panic!("{name} has no expr before its for"));
        let outside: String =
            asks.trim_start_matches(">-").split('{').map(|part| part.rsplit('}').next().unwrap_or(part)).collect();
        assert!([" > ", " < ", " == "].iter().any(|sign| outside.contains(sign)), "{name} has no threshold: {asks}");
        for (opens, closes) in [('(', ')'), ('{', '}'), ('[', ']')] {
            assert_eq!(asks.matches(opens).count(), asks.matches(closes).count(), "{name}: {opens}{closes} in {asks}");
        }
        let (number, unit) = field("for:").split_at(field("for:").len() - 1);
        assert!(number.parse::<u32>().is_ok() && ["m", "h"].contains(&unit), "{name} waits for {number}{unit}");
        let severities =
            ["{ severity: warning }", "{ severity: critical }", "{ severity: \"{{ $labels.severity }}\" }"];
        assert!(severities.contains(&field("labels:")), "{name}: {}", field("labels:"));
        assert!(field("summary:").len() > 10, "{name} says too little");
        let heading = field("runbook: docs/runbook.md, ").trim_matches('"');
        let section = runbook.split_once(&format!("\n## {heading}\n")).map(|(_, rest)| rest.split("\n## ").next());
        let section = section.flatten().unwrap_or_else(|| panic!("the runbook has no {heading}"));
        // Of what the alert looks at, it speaks.
        let series = |name: &str| name.trim_end_matches("_bucket").trim_end_matches("_count").to_owned();
        let about = asked(asks);
        assert!(
            about.is_empty() || about.iter().any(|name| section.contains(&series(name))),
            "{name}: {heading} does not name it"
        );
    }
    if Command::new("promtool").arg("--version").output().is_err() && skip("promtool", "no promtool") {
        return;
    }
    let file = root().join("docs/operation/alerts.yaml");
    let checked = Command::new("promtool").args(["check", "rules"]).arg(file).output().expect("it runs");
    assert!(checked.status.success(), "{}", said(&checked));
}

/// What stands behind the beginning of a line, of which a file has one.
fn line<'a>(document: &'a str, begins: &str) -> &'a str {
    let mut found = document.lines().filter_map(|line| line.trim_start().strip_prefix(begins));
    let first = found.next().unwrap_or_else(|| panic!("no line begins with {begins}"));
    assert_eq!(found.next(), None, "a second line begins with {begins}");
    first
}

/// Runs the program with the words of a command that names it first, and some more.
fn run(words: &[String], more: &[&str]) -> Output {
    assert!(words[0] == "pointsman" || words[0] == "/usr/local/bin/pointsman", "{words:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
    command.args(&words[1..]).args(more).output().expect("the program runs")
}

#[test]
fn container_fits_the_program_and_the_workspace() {
    let (file, manifest) = (document("operation/Containerfile"), document("operation/kubernetes.yaml"));
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let workspace: toml::Table = read("Cargo.toml").parse().expect("TOML");
    // It is built by the compiler of the workspace, on the system that it runs on.
    let image = line(&file, "FROM rust:").strip_suffix(" AS build").expect("a stage");
    let (version, system) = image.split_once("-slim-").expect("a version and a system");
    assert_eq!(Some(version), workspace["workspace"]["package"]["rust-version"].as_str());
    assert_eq!(line(&file, "FROM debian:"), format!("{system}-slim"));
    assert!(line(&file, "RUN POINTSMAN_COMMIT=$COMMIT cargo build ").ends_with(" -p pointsman"));
    for copied in file.lines().filter_map(|line| line.strip_prefix("COPY ")) {
        let source = copied.split(' ').find(|word| !word.starts_with("--")).expect("a source");
        let is_there = match copied.starts_with("--from=build ") {
            true => source == "/src/target/release/pointsman",
            false => root().join(source).exists(),
        };
        assert!(is_there, "COPY {copied}");
    }
    let (left_out, ignored) = (document("operation/Containerfile.dockerignore"), read(".gitignore"));
    for pattern in ignored.lines().chain(["/.git"]).map(|pattern| pattern.trim_end_matches('/')) {
        let anywhere = format!("**/{pattern}");
        assert!(left_out.lines().any(|line| line == pattern || line == anywhere), "{pattern} is sent to the builder");
    }
    // Its command, with what the manifest puts behind it, and its user and port.
    let words = |text: &str| -> Vec<String> { serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}")) };
    let entry = words(line(&file, "ENTRYPOINT "));
    for more in [vec![], words(line(&manifest, "args: "))] {
        let output = run(&[entry.clone(), more].concat(), &["--help"]);
        assert!(output.status.success(), "{}", said(&output));
    }
    let (user, port) = (line(&file, "USER "), line(&file, "EXPOSE "));
    assert!(file.contains(&format!("--uid {user} ")) && line(&manifest, "runAsUser: ") == user);
    assert!(entry.contains(&format!("0.0.0.0:{port}")) && manifest.contains(&format!("containerPort: {port} ")));
    assert_eq!(line(&file, "STOPSIGNAL "), "SIGTERM");
    // Its probe takes 200 for well, and nothing else.
    let host = host(&[]);
    let own = host.data.rsplit(':').next().expect("a port");
    let probe = line(&file, "HEALTHCHECK ").split_once("CMD ").expect("a command").1.replace(port, own);
    for (path, is_well) in [("/health", true), ("/nothing", false)] {
        let words = words(&probe.replace("/health", path));
        let status = Command::new(&words[0]).args(&words[1..]).status().expect("it runs");
        assert_eq!(status.success(), is_well, "{path}");
    }
}

#[test]
fn commands_of_the_unit_are_taken() {
    let (unit, folder) = (document("operation/pointsman.service"), tempfile::tempdir().expect("a folder"));
    let config = folder.path().join("pointsman.toml");
    fs::copy(root().join("pointsman.example.toml"), &config).expect("a file");
    let places = [("/etc/pointsman/pointsman.toml", config), ("%S/pointsman", folder.path().join("data"))];
    let free = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
    for (begins, more) in [("ExecStartPre=-", &free[..]), ("ExecStart=", &["--help"][..])] {
        let words = line(&unit, begins).split(' ').map(|word| {
            let place = places.iter().find(|(name, _)| *name == word);
            place.map_or(word.to_owned(), |(_, path)| path.display().to_string())
        });
        let output = run(&words.collect::<Vec<_>>(), more);
        assert!(output.status.success(), "{begins}: {}", said(&output));
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
