//! The response cache of a real host: the answer that was computed is the one that is given again, in every shape, until it is
//! cleared or a policy that has a say in it changes.

use std::process::Command;

use pointsman_tests::{Answer, Host};
use serde_json::{Value, json};

use crate::host;

fn body(extra: &Value) -> Value {
    let mut body = json!({
        "model": "demo:f16", "prompt": "Ownership is", "temperature": 0, "max_tokens": 24, "ignore_eos": true
    });
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

/// How the cache served it, and its text.
fn ask(host: &Host, extra: &Value) -> (String, String) {
    let answer = host.post("/v1/completions", &body(extra));
    assert_eq!(answer.status, 200, "{answer:?}");
    (served(&answer), answer.body["choices"][0]["text"].as_str().expect("a text").to_owned())
}

fn served(answer: &Answer) -> String {
    answer.headers.get("x-pointsman-cache").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

fn pointsman(host: &Host, what: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman-under-test"));
    let output = command.args(["cache", what, "--url", &host.admin]).output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_answer_is_given_again_until_it_is_cleared_or_its_sampler_changes() {
    let host = host(&[("SERVER__RESPONSE_CACHE_MIB", "16")]);
    let (first, text) = ask(&host, &json!({}));
    assert_eq!(first, "miss");
    assert_eq!(ask(&host, &json!({})), ("hit".into(), text.clone()));
    let streamed = host.stream(&body(&json!({}))).expect("it is served");
    assert_eq!((streamed.text.as_str(), streamed.tokens.len()), (text.as_str(), 24));
    assert_eq!(
        ask(&host, &json!({ "cache_response": false })),
        ("bypass".into(), text.clone()),
        "computed, and the same"
    );
    let (drawn, _) = ask(&host, &json!({ "temperature": 1 }));
    assert_eq!(drawn, "bypass");

    let component = host.builtin("sampler-allowlist");
    assert_eq!(host.activate("sampler", &component, json!({ "allow": [40, 41] })).status, 200);
    let (limited, other) = ask(&host, &json!({}));
    assert!(limited == "miss" && other != text, "{other}");
    assert_eq!(ask(&host, &json!({})), ("hit".into(), other.clone()));
    assert_eq!(host.activate("sampler", &component, json!({ "allow": [42] })).status, 200);
    assert_eq!(ask(&host, &json!({})).0, "miss", "another config is another policy");
    assert_eq!(host.admin("DELETE", "/admin/v1/slots/sampler", &Value::Null).status, 200);
    assert_eq!(ask(&host, &json!({})), ("hit".into(), text.clone()), "native again");

    let status = pointsman(&host, "status");
    assert!(status.contains("3 answers") && status.contains("hits 4"), "{status}");
    assert!(pointsman(&host, "clear").starts_with("forgot 3 answers"));
    assert_eq!(ask(&host, &json!({})), ("miss".into(), text));
    let metrics = host.get("/metrics").body;
    let metrics = metrics.as_str().expect("text");
    assert!(metrics.contains(r#"pointsman_response_cache_requests_total{outcome="miss"} 4"#), "{metrics}");
}

#[test]
fn equal_requests_at_once_are_computed_once() {
    let host = host(&[("SERVER__RESPONSE_CACHE_MIB", "16")]);
    let many = json!({ "max_tokens": 200 });
    let answers: Vec<(String, String)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(|| ask(&host, &many))).collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).collect()
    });
    let computed = answers.iter().filter(|(served, _)| served == "miss").count();
    assert_eq!(computed, 1, "{answers:?}");
    assert!(answers.iter().all(|(_, text)| *text == answers[0].1));
    let stats = host.admin("GET", "/admin/v1/cache", &Value::Null).body;
    assert_eq!((&stats["entries"], &stats["in_flight"]), (&json!(1), &json!(0)), "{stats}");
}

#[test]
fn without_room_there_is_no_cache() {
    let host = host(&[]);
    assert_eq!(ask(&host, &json!({})).0, "");
    assert_eq!(host.admin("GET", "/admin/v1/cache", &Value::Null).body["enabled"], false);
    assert!(pointsman(&host, "status").contains("server.response_cache_mib"));
}
