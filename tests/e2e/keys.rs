//! API keys as an operator uses them: made, read again while the host runs, limited, accounted, and never logged.

use std::fmt::Write as _;
use std::path::Path;

use pointsman_tests::{Answer, Host, looks, raw};
use serde_json::{Value, json};

use crate::trust::{PROGRAM, pointsman};
use crate::wires::{Manner, Wire, server};

/// Makes a key: itself, and what the host is told of it.
fn make(arguments: &[&str]) -> (String, String) {
    let printed = pointsman(&[&["key", "new"][..], arguments].concat()).expect("a key");
    let secret = printed.lines().find(|line| line.starts_with("pm-")).expect("a key").to_owned();
    (secret, printed[printed.find("[keys").expect("lines for the file")..].to_owned())
}

fn ask(host: &Host, key: &str, prompt: &str) -> Answer {
    let headers = [("content-type", "application/json"), ("x-api-key", key), ("x-tenant-id", "forged")];
    let body = json!({"model": "demo", "prompt": prompt, "max_tokens": 2, "priority": "critical"}).to_string();
    host.send("POST", &format!("{}/v1/completions", host.data), &headers, body.as_bytes())
}

/// Asks until the answer has this status.
fn ask_until(host: &Host, key: &str, status: u16) -> bool {
    looks().any(|_| host.send("GET", &format!("{}/v1/models", host.data), &[("x-api-key", key)], b"").status == status)
}

fn config(keys: &Path) -> String {
    format!("[server]\napi_keys_file = {:?}\n", keys.to_str().expect("UTF-8"))
}

#[test]
fn keys_are_read_again_and_a_broken_file_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    let (first, first_lines) = make(&["first", "--tenant", "acme"]);
    let (second, second_lines) = make(&["second", "--tenant", "acme"]);
    std::fs::write(&file, &first_lines).expect("a file");
    let host = Host::logged(PROGRAM, &config(&file));
    let statuses = |keys: &[&str]| keys.iter().map(|key| ask(&host, key, "Rust is").status).collect::<Vec<_>>();
    assert_eq!(statuses(&[&first, &second, ""]), [200, 401, 401]);
    std::fs::write(&file, format!("{first_lines}\n{second_lines}")).expect("a file");
    host.signal("-HUP");
    assert!(ask_until(&host, &second, 200), "{}", host.log());
    for broken in ["[keys", "[keys]\n", &format!("[keys.x]\nhash = \"{first}\"\n")] {
        std::fs::write(&file, broken).expect("a file");
        let before = host.log().matches("stay what they were").count();
        host.signal("-HUP");
        let told = || host.log().matches("stay what they were").count() > before;
        assert!(looks().any(|_| ask_until(&host, &first, 200) && told()), "{broken}: {}", host.log());
        assert_eq!(statuses(&[&first, &second]), [200, 200], "{broken}");
    }
    std::fs::write(&file, &second_lines).expect("a file");
    host.signal("-HUP");
    assert!(ask_until(&host, &first, 401), "{}", host.log());
    assert_eq!(statuses(&[&first, &second]), [401, 200]);
    let log = host.log();
    assert!(!log.contains(&first) && !log.contains(&second), "{log}");
}

#[test]
fn a_key_is_limited_and_its_tenant_is_charged() {
    assert!(pointsman(&["key", "new", "no good"]).is_err_and(|said| said.contains("must match [a-z0-9-]{1,40}")));
    let (key, lines) = make(&["batch", "--tenant", "acme", "--priority", "low", "--requests-per-minute", "2"]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    std::fs::write(&file, lines).expect("a file");
    let host = Host::configured(PROGRAM, &config(&file));
    let answers: Vec<Answer> = (0..3).map(|_| ask(&host, &key, "Rust is")).collect();
    assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 200, 429], "{answers:?}");
    let header = |name: &str| answers[2].headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    assert_eq!(
        (header("x-ratelimit-limit-requests"), header("x-ratelimit-remaining-requests")),
        ("2".into(), "0".into())
    );
    assert!((1..=30).contains(&header("retry-after").parse().unwrap_or(0)), "{answers:?}");
    assert_eq!(header("x-pointsman-reason"), "quota");
    let sum =
        |field: &str| answers[..2].iter().map(|a| a.body["usage"][field].as_u64().expect("a number")).sum::<u64>();
    let (prompt, completion) = (sum("prompt_tokens"), sum("completion_tokens"));
    let account = || host.admin("GET", "/admin/v1/usage", &Value::Null).body["data"].clone();
    let told = |account: &Value| account[0]["requests"] == 2;
    // An answer is whole before its place is free.
    let account = looks().map(|_| account()).find(told).expect("two requests have ended");
    assert_eq!(account.as_array().map(Vec::len), Some(1), "{account}");
    let row = &account[0];
    assert_eq!((&row["tenant"], &row["prompt_tokens"]), (&json!("acme"), &json!(prompt)));
    assert_eq!(row["completion_tokens"], json!(completion));
    let cached = row["cached_tokens"].as_u64().expect("a number");
    let csv = host.admin("GET", "/admin/v1/usage?format=csv", &Value::Null).body;
    let expect = format!(
        "tenant,requests,prompt_tokens,cached_tokens,completion_tokens\r\n\"acme\",2,{prompt},{cached},{completion}\r\n"
    );
    assert_eq!(csv, json!(expect));
    assert_eq!(host.admin("GET", "/admin/v1/usage?format=xml", &Value::Null).status, 400);
    let metrics = host.get("/metrics").body;
    assert!(
        metrics.as_str().is_some_and(|text| !text.contains("acme")),
        "tenants hear nothing of one another: {metrics}"
    );
}

#[test]
fn a_client_with_a_wrong_key_hears_so_however_much_it_sends() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    std::fs::write(&file, make(&["ci"]).1).expect("a file");
    let host = Host::logged(PROGRAM, &config(&file));
    let said = raw::told(&host.data, "/v1/completions HTTP/1.1\r\nx-api-key: pm-stolen", 24 << 20);
    assert!(said.as_deref().is_some_and(|said| said.starts_with("HTTP/1.1 401 ")), "{said:?}");
}

#[test]
fn no_key_and_no_prompt_is_logged() {
    let (key, lines) = make(&["ci"]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    std::fs::write(&file, lines).expect("a file");
    let (secret, guess) = ("marmalade", "pm-stolen");
    // Servers elsewhere, which may say again what they were asked.
    let mut config = config(&file);
    for (name, status, kind, said) in [
        ("refuses", 400, "application/json", r#"{"error":{"message":"marmalade is too long"}}"#),
        ("fails", 500, "application/json", r#"{"error":{"message":"marmalade is too much"}}"#),
        ("garbles", 200, "text/event-stream", "data: marmalade\n\n"),
        ("tells", 200, "text/event-stream", "data: {\"error\":{\"message\":\"no marmalade\"}}\n\n"),
    ] {
        let url = server(Wire::Http1, Manner::Says(status, kind, said)).0;
        let rest = "connections = 0\nprobe_interval_ms = 0";
        write!(config, "[upstreams.{name}]\nurl = \"{url}\"\nmodel = \"{name}\"\n{rest}\n").expect("it grows");
    }
    let host = Host::logged(PROGRAM, &config);
    let long = format!("{secret} ").repeat(2_000);
    let message = |text: &str| json!([{"role": "user", "content": text}]);
    let broken = format!("{{\"model\": \"demo\", \"prompt\": {secret}}}");
    let json = ("content-type", "application/json");
    for (path, body) in [
        ("/v1/completions", json!({"model": "demo", "prompt": secret, "max_tokens": 2}).to_string()),
        ("/v1/completions", json!({"model": "demo", "prompt": long, "max_tokens": 2}).to_string()),
        ("/v1/completions", json!({"model": "demo", "prompt": secret, "max_tokens": secret}).to_string()),
        ("/v1/completions", json!({"model": secret, "prompt": secret}).to_string()),
        ("/v1/completions", broken),
        ("/v1/chat/completions", json!({"model": "demo", "messages": message(secret), "max_tokens": 2}).to_string()),
        ("/v1/chat/completions", json!({"model": "demo", "messages": [{"role": secret}]}).to_string()),
        ("/v1/messages", json!({"model": "demo", "messages": message(secret), "max_tokens": 2}).to_string()),
        ("/v1/responses", json!({"model": "demo", "input": secret, "max_output_tokens": 2}).to_string()),
        ("/v1/embeddings", json!({"model": "demo", "input": secret}).to_string()),
        ("/v1/completions", json!({"model": "demo", "prompt": secret, "max_tokens": 400, "timeout_ms": 1}).to_string()),
        ("/tokenize", json!({"model": "demo", "prompt": secret}).to_string()),
        ("/v1/completions", json!({"model": "refuses", "prompt": secret}).to_string()),
        ("/v1/completions", json!({"model": "fails", "prompt": secret}).to_string()),
        ("/v1/completions", json!({"model": "garbles", "prompt": secret}).to_string()),
        ("/v1/completions", json!({"model": "tells", "prompt": secret}).to_string()),
    ] {
        let url = format!("{}{path}", host.data);
        let bearer = format!("Bearer {key}");
        let answer = host.send("POST", &url, &[json, ("authorization", bearer.as_str())], body.as_bytes());
        assert!(matches!(answer.status, 200 | 400 | 404 | 502 | 504), "{path} {answer:?}");
        let streamed = body.replacen('{', "{\"stream\": true, ", 1);
        drop(host.send("POST", &url, &[json, ("x-api-key", key.as_str())], streamed.as_bytes()));
        assert_eq!(host.send("POST", &url, &[json, ("x-api-key", guess)], body.as_bytes()).status, 401);
    }
    let log = host.log();
    assert!(log.contains("DEBUG") && log.contains("an upstream failed a request"), "it is told to log: {log}");
    for text in [&*key, &key[3..], secret, guess] {
        assert!(!log.contains(text), "`{text}` is in the log");
    }
}
