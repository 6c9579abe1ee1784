//! `pointsman bench` against a host: what it counts is what was asked, and a server that refuses is told from one that fails.

use std::process::{Command, Output};

use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use super::host;

fn bench(host: &Host, args: &[&str]) -> Output {
    let command = &mut Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
    command.env("POINTSMAN_URL", &host.data).args(["bench", "--warm-up", "0", "--seconds", "60"]).args(args);
    command.output().expect("the program runs")
}

fn measured(host: &Host, args: &[&str]) -> Value {
    let output = bench(host, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn counts_what_it_asked_for() {
    let host = host(&[("ENGINE__DEVICES", "[\"null\"]")]);
    let closed: &[&str] = &["--requests", "64", "--concurrency", "16", "--shape", "20-40:5-9", "--seed", "7"];
    let first = measured(&host, closed);
    assert_eq!((&first["sent"], &first["answered"]), (&64.into(), &64.into()), "{first}");
    let output = first["output_tokens"].as_u64().expect("a number");
    assert!((5 * 64..=9 * 64).contains(&output), "{output}");
    assert_eq!(first["latency"]["itl_ms"]["count"], output - 64, "one time between two tokens: {first}");
    assert_eq!(first["latency"]["ttft_ms"]["count"], 64);
    // The same seed asks the same, in whatever loop, streamed or not, and whoever answers.
    let same: [&[&str]; 3] = [
        &["--rate", "2000", "--requests", "64", "--shape", "20-40:5-9", "--seed", "7"],
        &[closed, &["--no-stream"]].concat(),
        &[closed, &["--model", "demo:q8_0"]].concat(),
    ];
    for args in same {
        let again = measured(&host, args);
        for key in ["answered", "prompt_tokens", "output_tokens"] {
            assert_eq!(again[key], first[key], "{key} of {args:?}");
        }
    }
    let other = measured(&host, &["--requests", "64", "--shape", "20-40:5-9", "--seed", "8", "--chat"]);
    assert_ne!(other["prompt_tokens"], first["prompt_tokens"]);
}

#[test]
fn a_step_takes_as_long_as_it_is_told() {
    let host = host(&[("ENGINE__DEVICES", "[\"null:5000\"]")]);
    let report = measured(&host, &["--requests", "4", "--concurrency", "1", "--shape", "8:20"]);
    // Whole requests: a client that is put aside reads tokens together, and none of them early.
    let fastest = report["latency"]["e2e_ms"]["p50"].as_f64().expect("a number");
    assert!(fastest >= 19.0 * 4.9, "{report}");
}

#[test]
fn a_device_says_how_busy_it_is_and_forgets() {
    let host = host(&[("ENGINE__DEVICES", "[\"null:5000\"]")]);
    let share = || {
        let devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
        devices["data"][0]["utilization"].as_f64().expect("a number")
    };
    assert!(share() < 0.01, "nobody has asked yet");
    measured(&host, &["--requests", "4", "--concurrency", "1", "--shape", "8:20"]);
    let busy = share();
    assert!(busy > 0.01, "{busy}");
    assert!(looks().any(|_| share() < busy), "it fades");
}

#[test]
fn goodput_is_what_keeps_its_promise() {
    let host = host(&[("ENGINE__DEVICES", "[\"null:5000\"]")]);
    let run = ["--requests", "4", "--concurrency", "1", "--shape", "8:4"];
    for (ttft, tpot, is_kept) in [("60000", "60000", true), ("60000", "1", false), ("1", "60000", false)] {
        let report = measured(&host, &[&run[..], &["--slo-ttft-ms", ttft, "--slo-tpot-ms", tpot]].concat());
        let expect = if is_kept { report["requests_per_second"].clone() } else { json!(0.0) };
        assert_eq!(report["goodput_per_second"], expect, "{report}");
    }
}

#[test]
fn rejections_are_told_from_failures() {
    let host = host(&[("ENGINE__DEVICES", "[\"null:20000\"]"), ("SERVER__MAX_IN_FLIGHT", "2")]);
    let report = measured(&host, &["--requests", "40", "--concurrency", "20", "--shape", "8:4"]);
    let rejected = report["rejected"]["queue"].as_u64().expect("some are rejected");
    assert_eq!(report["answered"].as_u64().expect("a number") + rejected, 40, "{report}");
    assert_eq!(report["failed"], json!({}));
    // Refusals have times of their own.
    let refusals = &report["latency"]["refusal_ms"];
    assert_eq!(refusals["count"], rejected, "{report}");
    assert!(
        refusals["p50"].as_f64() > Some(0.0) && report["latency"]["e2e_ms"]["count"] == report["answered"],
        "{report}"
    );
}

#[test]
fn wrong_uses_are_said_in_words() {
    let host = host(&[("ENGINE__DEVICES", "[\"null\"]")]);
    for (args, expect) in [
        (&["--model", "nobody"][..], "--model nobody: the server has demo"),
        (&["--shape", "12"], "`12` is no shape: use IN:OUT in tokens"),
        (&["--rate", "0"], "expected requests a second"),
        (&["--url", "https://localhost"], "it must begin with http://"),
        (&["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1: "),
        (&["--shape", "100000:1", "--requests", "1"], "no request was answered: 4"),
    ] {
        let output = bench(&host, args);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains(expect), "{args:?}: {told}");
    }
}
