//! What an operator does to a running host: one switch to native and back, and a file that says what every slot runs.

use std::process::{Command, Output};

use pointsman_tests::Host;
use serde_json::{Value, json};

use crate::{host, refuse};

fn pointsman(host: &Host, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"))
        .args(arguments)
        .args(["--url", &host.admin])
        .output()
        .expect("it starts")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Who routed a request.
fn router(host: &Host) -> String {
    let answer = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 2 }));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

fn slot(host: &Host, name: &str) -> Value {
    host.admin("GET", &format!("/admin/v1/slots/{name}"), &Value::Null).body
}

#[test]
fn one_switch_makes_every_slot_native_and_back() {
    let host = host(&[]);
    assert!(router(&host).starts_with("route-least-loaded@"));
    let candidate = json!({ "component": host.builtin("sched-priority"), "mode": "canary" });
    let rollout = host.admin("POST", "/admin/v1/slots/scheduler/rollouts", &candidate);
    assert_eq!(rollout.status, 201, "{rollout:?}");
    let on = pointsman(&host, &["policy", "safe-mode", "on", "--reason", "it loops"]);
    assert!(on.status.success() && said(&on).contains("every slot is native"), "{on:?}");
    assert_eq!(router(&host), "native;g=0");
    let calls = slot(&host, "scheduler")["counters"]["calls"].clone();
    assert_eq!(router(&host), "native;g=0");
    for name in ["router", "scheduler", "telemetry.slo-log"] {
        let slot = slot(&host, name);
        let reason = slot["health"]["reason"].as_str().unwrap_or_default();
        assert!(slot["health"]["state"] == "native" && reason.contains("it loops"), "{slot}");
    }
    assert_eq!(slot(&host, "scheduler")["counters"]["calls"], calls, "the scheduler is not asked either");
    let rollouts = host.admin("GET", "/admin/v1/slots/scheduler/rollouts", &Value::Null).body.to_string();
    assert!(rollouts.contains("paused"), "nothing is measured meanwhile: {rollouts}");
    assert_eq!(host.admin("POST", "/admin/v1/slots/router/rollouts", &candidate).status, 409);
    for (path, status) in [("/ready", "ready"), ("/health", "ok")] {
        let answer = host.get(path);
        let slots: Vec<_> = answer.body["degraded"].as_array().into_iter().flatten().collect();
        assert_eq!((answer.status, &answer.body["status"]), (200, &json!(status)));
        assert!(slots.contains(&&json!("slot router")) && slots.contains(&&json!("slot scheduler")), "{slots:?}");
        assert!(!slots.contains(&&json!("slot sampler")), "it is to be native: {slots:?}");
    }
    assert!(host.get("/metrics").body.as_str().is_some_and(|m| m.contains("pointsman_safe_mode 1")));
    // What is activated meanwhile is kept, and answers when the switch is off.
    let digest = host.builtin("route-weighted");
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    assert_eq!(router(&host), "native;g=0");
    let host = host.restart(&[]);
    assert_eq!(router(&host), "native;g=0", "the switch survives a kill");
    let status = pointsman(&host, &["policy", "status"]);
    assert!(said(&status).contains("safe mode is on"), "{status:?}");
    let off = pointsman(&host, &["policy", "safe-mode", "off"]);
    assert!(off.status.success() && said(&off).contains("safe mode is off"), "{off:?}");
    assert_eq!(host.get("/ready").body, json!({ "status": "ready" }));
    assert!(router(&host).starts_with("route-weighted@"));
    let journal = host.admin("GET", "/admin/v1/journal", &Value::Null).body;
    let journal = journal.as_str().unwrap_or_default();
    let switches = journal.lines().filter(|line| line.contains("\"safe-mode\""));
    let switches: Vec<Value> = switches.map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(switches.len(), 2, "{journal}");
    assert_eq!((&switches[0]["on"], &switches[0]["reason"]), (&json!(true), &json!("it loops")));
    let host = host.restart(&[]);
    assert!(router(&host).starts_with("route-weighted@"), "off for good");
}

#[test]
fn a_file_is_planned_applied_and_then_nothing_is_left_to_do() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("slots.toml");
    let wasm = pointsman_tests::root().join("plugins/prebuilt/route-least-loaded.core.wasm");
    let text = format!(
        "[slots.router]\ncomponent = \"{}\"\n[slots.scheduler]\ncomponent = \"sched-priority\"\nconfig = {{ aging_ms = 500 }}\n\
         [slots.\"telemetry.slo-log\"]\ncomponent = \"hook-slo-log\"\n",
        wasm.display()
    );
    std::fs::write(&file, text).expect("it can be written");
    let file = file.display().to_string();
    let apply = |more: &[&str]| pointsman(&host, &[&["apply", "-f", &file], more].concat());
    let before = (slot(&host, "router")["active"].clone(), slot(&host, "scheduler")["active"].clone());
    let dry = apply(&["--dry-run"]);
    assert!(dry.status.success(), "{dry:?}");
    for part in [
        "~ router: route-least-loaded@",
        "config  {} -> {\"aging_ms\":500}",
        "  router;g=1 is by startup (start)",
        "2 to change, 1 as the file says",
    ] {
        assert!(said(&dry).contains(part), "{part}: {}", said(&dry));
    }
    assert_eq!((slot(&host, "router")["active"].clone(), slot(&host, "scheduler")["active"].clone()), before);
    let applied = apply(&[]);
    assert!(applied.status.success() && said(&applied).ends_with("applied\n"), "{applied:?}");
    assert_eq!(slot(&host, "scheduler")["active"]["config"], json!({ "aging_ms": 500 }));
    let again = apply(&[]);
    assert!(again.status.success() && said(&again) == "0 to change, 3 as the file says\n", "{}", said(&again));
}

#[test]
fn a_file_that_cannot_be_applied_changes_nothing() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("slots.json");
    let before = host.admin("GET", "/admin/v1/slots", &Value::Null).body["data"].clone();
    let generations = |slots: &Value| -> Vec<Value> {
        slots.as_array().expect("slots").iter().map(|s| s["active"]["generation"].clone()).collect()
    };
    for (scheduler, part) in [
        (json!({ "component": "sched-priority", "config": { "aging": 1 } }), "nothing was changed: `scheduler`"),
        (json!({ "component": "route-weighted" }), "does not work in the slot `scheduler`"),
        (json!({ "component": "no-such-policy" }), "slots.scheduler: no component `no-such-policy`"),
    ] {
        let wanted = json!({ "slots": { "router": { "component": "route-weighted" }, "scheduler": scheduler } });
        std::fs::write(&file, wanted.to_string()).expect("it can be written");
        let output = pointsman(&host, &["apply", "-f", &file.display().to_string()]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said(&output).contains(part), "{part}: {}", said(&output));
        let after = host.admin("GET", "/admin/v1/slots", &Value::Null).body["data"].clone();
        assert_eq!(generations(&after), generations(&before), "{part}");
    }
}

#[test]
fn the_command_line_removes_deletes_and_tells() {
    let host = host(&[]);
    let wasm = pointsman_tests::root().join("plugins/prebuilt/fixture-telemetry.wasm");
    let digest = host.upload(&std::fs::read(wasm).expect("a committed fixture"));
    for (arguments, code, expect) in [
        (&["activate", "telemetry.mine", &digest][..], 0, "telemetry.mine: fixture-telemetry@"),
        (&["delete", &digest], 1, "is active, previous or candidate in telemetry.mine"),
        (
            &["rollback", "telemetry.mine", "--if-generation", "7"],
            1,
            "the active generation of `telemetry.mine` is 1, not 7",
        ),
        (&["remove", "telemetry.mine", "--if-generation", "7"], 1, "is 1, not 7; read the slot again"),
        (&["remove", "telemetry.mine", "--if-generation", "1"], 0, "telemetry.mine: native;g=1"),
        (&["remove", "telemetry.mine"], 1, "nothing was ever activated in `telemetry.mine`"),
        (&["remove", "router"], 0, "router: native;g=2"),
        (&["delete", "route-weighted"], 1, "is built in and cannot be deleted"),
        (&["delete", &digest[..24]], 0, "deleted sha256:"),
        (&["delete", &digest], 1, "no component"),
    ] {
        let output = pointsman(&host, &[&["policy"], arguments].concat());
        let found = (output.status.code(), said(&output).contains(expect));
        assert_eq!(found, (Some(code), true), "{arguments:?}: {}", said(&output));
    }
    let told = said(&pointsman(&host, &["policy", "journal"]));
    let events: Vec<String> = told.lines().map(|line| event(&serde_json::from_str(line).expect("JSON"))).collect();
    let expect = ["uploaded", "published", "handed-over", "removed", "published", "deleted"];
    assert!(events.ends_with(&expect.map(str::to_owned)), "{told}");
    let last = told.lines().count().to_string();
    let before = (told.lines().count() - 1).to_string();
    assert_eq!(said(&pointsman(&host, &["policy", "journal", "--after", &last])), "");
    assert_eq!(said(&pointsman(&host, &["policy", "journal", "--after", &before])).lines().count(), 1);
}

fn event(line: &Value) -> String {
    line["event"].as_str().expect("an event").to_owned()
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("slots.toml"), "[slots.router]\ncomponent = \"route-weighted\"\n").expect("it can be written");
    let wasm = pointsman_tests::root().join("plugins/prebuilt/route-weighted.wasm").display().to_string();
    let url = ["--url", &host.admin];
    for arguments in [
        [&["policy", "list"], &url[..]].concat(),
        [&["policy", "status"], &url[..]].concat(),
        [&["policy", "status", "--json"], &url[..]].concat(),
        [&["policy", "explain"], &url[..]].concat(),
        [&["policy", "rollout", "status"], &url[..]].concat(),
        [&["policy", "safe-mode"], &url[..]].concat(),
        [&["policy", "journal", "--follow"], &url[..]].concat(),
        [&["policy", "record", "router", "-o", &at("record.jsonl")], &url[..]].concat(),
        [&["policy", "activate", "router", "native"], &url[..]].concat(),
        [&["alias", "list"], &url[..]].concat(),
        [&["apply", "-f", &at("slots.toml")], &url[..]].concat(),
        vec!["policy", "keygen", &at("release.key")],
        vec!["plugin", "new", &at("mine"), "--kind", "router", "--lang", "c"],
        vec!["plugin", "check", &wasm],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
        let output = command.args(&arguments).stdout(writer).output().expect("it starts");
        assert_eq!((output.status.code(), said(&output)), (Some(141), String::new()), "{arguments:?}");
    }
    // What was asked for was done, or not begun: the plan comes before the first change.
    assert_eq!(slot(&host, "router")["active"]["revision"], "native");
    let broken = pointsman(&host, &["policy", "status"]);
    assert!(broken.status.success(), "{broken:?}");
}

/// What holds in a slot, and who says so.
fn limits(of: &Value) -> Value {
    let limit = |name: &str| json!([of["limits"][name]["value"], of["limits"][name]["from"]]);
    json!([limit("soft_us"), limit("hard_ms"), limit("memory_mib")])
}

#[test]
fn a_budget_belongs_to_its_activation_and_the_file_sets_what_it_leaves_out() {
    let config = "[slots.scheduler.budget]\nhard_ms = 30\n[slots.router.budget]\nmemory_mib = 32\n";
    let host = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), config);
    let digest = host.builtin("sched-priority");
    let put = |host: &Host, budget: Value| {
        let body = json!({ "component": digest, "budget": budget });
        host.admin("PUT", "/admin/v1/slots/scheduler", &body)
    };
    let found = limits(&slot(&host, "router")["active"]);
    assert_eq!(found, json!([[100, "default"], [10, "default"], [32, "config"]]));
    assert_eq!(limits(&slot(&host, "scheduler")["active"]), json!([[50, "default"], [30, "config"], [64, "default"]]));
    for (budget, part) in [
        (json!({ "hard_ms": 0 }), "the hard one must lie between 1 and 1000000 us"),
        (json!({ "soft_us": 40_000 }), "a budget of 40000 us soft and 30000 us hard is not possible"),
        (json!({ "memory_mib": 300 }), "a budget of 314572800 bytes of memory is not possible"),
    ] {
        let refused = put(&host, budget);
        assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("budget")), "{refused:?}");
        assert!(refused.body["error"]["message"].as_str().is_some_and(|m| m.contains(part)), "{refused:?}");
    }
    let refused =
        host.admin("PUT", "/admin/v1/slots/scheduler", &json!({ "component": "native", "budget": { "soft_us": 1 } }));
    assert_eq!(refused.status, 400, "{refused:?}");
    let own = json!([[0, "slot"], [30, "config"], [8, "slot"]]);
    assert_eq!(put(&host, json!({ "soft_us": 0, "memory_mib": 8 })).status, 200);
    assert_eq!(limits(&slot(&host, "scheduler")["active"]), own);
    assert_eq!(put(&host, Value::Null).status, 200);
    assert_eq!(limits(&slot(&host, "scheduler")["active"]), json!([[50, "default"], [30, "config"], [64, "default"]]));
    assert_eq!(host.admin("POST", "/admin/v1/slots/scheduler/rollback", &Value::Null).status, 200);
    let host = host.restart(&[]);
    let found = slot(&host, "scheduler");
    assert_eq!(found["active"]["budget"], json!({ "soft_us": 0, "memory_mib": 8 }), "rollback and restart keep it");
    assert_eq!(
        (limits(&found["active"]), limits(&found["previous"])),
        (own, json!([[50, "default"], [30, "config"], [64, "default"]]))
    );
    // Every call is over a budget of nothing, so that it moves aside.
    let plans = |aside: &Value| aside["plans_used"].as_u64().zip(aside["plans_dropped"].as_u64()).map(|(a, b)| a + b);
    let counters = (0..400).find_map(|_| {
        router(&host);
        Some(slot(&host, "scheduler")["counters"].clone()).filter(|c| plans(&c["aside"]) > Some(0))
    });
    let counters = counters.expect("a slow scheduler computes aside");
    assert!(counters["over_soft"].as_u64() > Some(2) && counters["call_mean_us"].as_f64() > Some(0.0), "{counters}");
    assert!(counters["aside"]["replicas"].as_u64() > Some(0), "{counters}");
    assert_eq!(counters["state_limit_bytes"], 4 << 20, "{counters}");
    let candidate = json!({ "component": digest, "mode": "canary", "budget": { "hard_ms": 5 } });
    let started = host.admin("POST", "/admin/v1/slots/scheduler/rollouts", &candidate);
    assert_eq!(started.status, 201, "{started:?}");
    let candidate = slot(&host, "scheduler")["candidate"].clone();
    assert_eq!(limits(&candidate), json!([[50, "default"], [5, "slot"], [64, "default"]]));
}

#[test]
fn what_is_taken_back_is_what_it_was() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("slots.toml");
    let apply = |text: &str| {
        std::fs::write(&file, text).expect("it can be written");
        pointsman(&host, &["apply", "-f", &file.display().to_string()])
    };
    let wasm = pointsman_tests::root().join("plugins/prebuilt/fixture-scheduler.wasm");
    let counter = host.upload(&std::fs::read(wasm).expect("a committed fixture"));
    for handover in ["cold", "require"] {
        let body = json!({ "component": counter, "handover": handover, "budget": { "soft_us": 77 }, "config": { "after": 3 } });
        let put = host.admin("PUT", "/admin/v1/slots/scheduler", &body);
        assert_eq!(put.status, 200, "{put:?}");
    }
    let without_generation = |name: &str| {
        let mut active = slot(&host, name)["active"].clone();
        active["generation"].take();
        active
    };
    let before = ["scheduler", "sampler"].map(without_generation);
    assert_eq!(before[0]["handover"], "require", "{before:?}");
    // A rollout that cannot be stored is not started: everything is taken back, whatever has to start cold.
    assert_eq!(host.activate("kv-retention", "native", json!({})).status, 200);
    let refused = refuse(&host.folder().join("slots/kv-retention.json"));
    let text = "[slots.scheduler]\ncomponent = \"sched-fcfs\"\n[slots.sampler]\ncomponent = \"sampler-allowlist\"\nconfig = { allow = [] }\n\
                [slots.\"telemetry.new\"]\ncomponent = \"hook-outcomes\"\n[rollouts.kv-retention]\ncomponent = \"native\"\nmode = \"canary\"\n";
    let failed = apply(text);
    refused.end();
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    for name in ["scheduler", "sampler", "telemetry.new"] {
        assert!(said(&failed).contains(&format!("`{name}` was taken back")), "{}", said(&failed));
    }
    assert_eq!(["scheduler", "sampler"].map(without_generation), before);
    assert_eq!(host.admin("GET", "/admin/v1/slots/telemetry.new", &Value::Null).status, 404);
    let journal = crate::journal(&host);
    let last = journal.iter().rev().find(|e| e["event"] == "published" && e["slot"] == "scheduler").expect("a line");
    assert_eq!((&last["why"], &last["target"]["handover"]), (&json!("rollback"), &json!("require")), "{last}");
    // A rollout of a slot that the same file changes is started from there.
    let both = "[slots.scheduler]\ncomponent = \"sched-fcfs\"\n[rollouts.scheduler]\ncomponent = \"sched-priority\"\nmode = \"canary\"\n";
    let applied = apply(both);
    assert!(applied.status.success(), "{applied:?}");
    assert!(
        slot(&host, "scheduler")["candidate"]["revision"].as_str().is_some_and(|r| r.starts_with("sched-priority@"))
    );
}

#[test]
fn a_dry_run_honours_a_pin() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("slots.toml");
    let wasm = pointsman_tests::root().join("plugins/prebuilt/route-least-loaded.core.wasm");
    let pin = "0".repeat(64);
    std::fs::write(&file, format!("[slots.router]\ncomponent = \"{}@sha256:{pin}\"\n", wasm.display()))
        .expect("a file");
    for more in [&["--dry-run"][..], &[]] {
        let output = pointsman(&host, &[&["apply", "-f", &file.display().to_string()], more].concat());
        assert!(output.status.code() == Some(1) && said(&output).contains("is pinned to sha256:0000"), "{output:?}");
    }
}

#[test]
fn what_a_rollout_needs_is_asked_before_anything_changes() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("all.toml");
    let trial = |of: &str, tried: &str, mode: &str| format!("[rollouts.\"{of}\"]\n{tried}\nmode = \"{mode}\"\n");
    let fcfs = trial("scheduler", "component = \"sched-fcfs\"", "shadow");
    let slot_with = |component: &str| format!("[slots.scheduler]\ncomponent = \"{component}\"\n{fcfs}");
    let before = slot(&host, "scheduler")["active"].clone();
    for (text, fault) in [
        (trial("kv-retention", "component = \"native\"", "canary"), "nothing was ever activated in `kv-retention`"),
        (trial("scheduler", "component = \"native\"", "shadow"), "the native scheduler writes no plans"),
        (slot_with("native"), "the native scheduler writes no plans"),
        (trial("alias.demo", "candidate = \"demo:q8_0\"", "ab"), "a rollout needs one variant as control"),
        (slot_with("sched-priority"), ""),
        (fcfs.clone(), ""),
    ] {
        std::fs::write(&file, &text).expect("it can be written");
        for more in [&["--dry-run"][..], &[]].into_iter().take(if fault.is_empty() { 1 } else { 2 }) {
            let output = pointsman(&host, &[&["apply", "-f", &file.display().to_string()], more].concat());
            assert_eq!(output.status.success(), fault.is_empty(), "{text}: {}", said(&output));
            assert!(fault.is_empty() || said(&output).contains("nothing was changed: "), "{}", said(&output));
            assert!(said(&output).contains(fault), "{text}: {}", said(&output));
        }
    }
    assert_eq!(slot(&host, "scheduler")["active"], before);
    assert_eq!(slot(&host, "scheduler")["candidate"], Value::Null);
}

#[test]
fn a_file_sets_aliases_and_starts_rollouts_once() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("all.toml");
    let apply = |text: &str, more: &[&str], code: i32, parts: &[&str]| {
        std::fs::write(&file, text).expect("it can be written");
        let output = pointsman(&host, &[&["apply", "-f", &file.display().to_string()], more].concat());
        assert_eq!(output.status.code(), Some(code), "{text}: {output:?}");
        assert!(parts.iter().all(|part| said(&output).contains(part)), "{parts:?}: {}", said(&output));
    };
    let steer = |id: &str, verb: &str| {
        let steered = host.admin("POST", &format!("/admin/v1/aliases/demo/rollouts/{id}/{verb}"), &Value::Null);
        assert_eq!(steered.status, 200, "{steered:?}");
    };
    let alias = || host.admin("GET", "/admin/v1/aliases/demo", &Value::Null).body;
    let trial = "[rollouts.\"alias.demo\"]\ncandidate = \"demo:q8_0\"\nmode = \"ab\"\nblock_ms = 400\nburn_in_ms = 0\n";
    let text = format!(
        "[aliases.demo]\nweights = {{ \"demo:f16\" = 10 }}\nsticky = \"tenant\"\n{trial}\
         [rollouts.scheduler]\ncomponent = \"sched-priority\"\nmode = \"canary\"\n"
    );
    let plan = [
        "~ alias demo;g=0\n    weights  {} -> {\"demo:f16\":10}",
        "+ rollout of alias.demo: demo:q8_0, ab",
        "+ rollout of scheduler: sched-priority with {}, canary",
        "3 to change, 0 as the file says",
    ];
    apply(&text, &["--dry-run"], 0, &plan);
    assert_eq!((&alias()["generation"], &alias()["rollout"]), (&json!(0), &Value::Null), "nothing was changed");
    // The last one cannot be stored: what was done by then is taken back.
    let taken_back = ["the rollout of `alias.demo` was taken back", "the alias `demo` was taken back"];
    let refused = refuse(&host.folder().join("slots/scheduler.json"));
    apply(
        &text,
        &[],
        1,
        &[&["the rollout of `scheduler` was not changed", "cannot be stored"], &taken_back[..]].concat(),
    );
    refused.end();
    assert_eq!((&alias()["generation"], &alias()["sticky"]), (&json!(2), &Value::Null), "{}", alias());
    assert_eq!(alias()["rollout"], Value::Null);
    let text = text.replace("block_ms = 400", "block_ms = 410");
    apply(&text, &[], 0, &["applied"]);
    assert_eq!(alias()["rollout"]["id"], "alias.demo-2");
    let running = ["= rollout of alias.demo: alias.demo-2 is running", "0 to change, 3 as the file says"];
    for more in [&["--dry-run"][..], &[]] {
        apply(&text, more, 0, &running);
    }
    let longer = text.replace("block_ms = 410", "block_ms = 500");
    apply(&longer, &["--dry-run"], 1, &["block_ms  410 -> 500", "alias.demo-2 is under way with another"]);
    steer("alias.demo-2", "abort");
    apply(&text, &[], 0, &["alias.demo-2 is aborted; it is not started again", "0 to change"]);
    apply(&longer, &[], 0, &["+ rollout of alias.demo", "1 to change, 2 as the file says", "applied"]);
    steer("alias.demo-3", "promote");
    apply(&longer, &[], 0, &["alias.demo-3 is promoted", "0 to change, 3 as the file says"]);
    let by_hand = json!({ "weights": { "demo:f16": 1, "demo:q8_0": 1 } });
    assert_eq!(host.admin("PUT", "/admin/v1/aliases/demo", &by_hand).status, 200);
    apply(
        &longer,
        &["--dry-run"],
        0,
        &["weights  {\"demo:f16\":1,\"demo:q8_0\":1} -> {\"demo:f16\":10}", "1 to change"],
    );
    let nobody = text.replace("demo:q8_0", "demo:f32");
    apply(&nobody, &["--dry-run"], 1, &["`demo:f32` is not one of its variants"]);
}

#[test]
fn a_context_may_be_shorter_than_the_model_can() {
    let host = host(&[("ENGINE__MAX_CONTEXT", "48")]);
    let listed = host.get("/v1/models/demo").body;
    assert_eq!(listed["max_model_len"], json!(48), "{listed}");
    let ask = |tokens: u32| {
        let prompt = vec![5; 40];
        host.post("/v1/completions", &json!({"model": "demo", "prompt": prompt, "max_tokens": tokens}))
    };
    assert_eq!(ask(8).status, 200);
    let refused = ask(9);
    assert_eq!((refused.status, &refused.body["error"]["code"]), (400, &json!("context_length_exceeded")));
}
