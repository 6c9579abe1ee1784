//! A sampler policy over HTTP: what a request may say is the list that is active, through swaps and a rollback under load.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_tests::{Host, looks};
use serde_json::{Value, json};

use crate::{host, journal};

/// Concurrent streams.
const STREAMS: usize = 8;
/// Swaps while they run.
const SWAPS: usize = 12;

/// Ids of the tokens of a text.
fn tokens(host: &Host, text: &str) -> BTreeSet<u64> {
    let answer = host.post("/tokenize", &json!({ "model": "demo:f16", "prompt": text, "add_special_tokens": false }));
    let ids = answer.body["tokens"].as_array().unwrap_or_else(|| panic!("{answer:?}")).iter();
    ids.map(|id| id.as_u64().expect("a token id")).collect()
}

/// What a stream generated.
fn said(host: &Host, prompt: &str) -> Vec<u64> {
    let body = json!({ "model": "demo:f16", "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": true });
    host.stream(&body).expect("it is served").tokens
}

/// Every one of them is in the list.
fn check(said: &[u64], list: &BTreeSet<u64>) {
    let stray = said.iter().find(|token| !list.contains(token));
    assert_eq!(stray, None, "of {said:?} is not in {list:?}");
}

#[test]
fn an_allowlist_limits_what_is_said_until_it_is_rolled_back() {
    let host = host(&[]);
    let free = said(&host, "Ownership is");
    let (one, other) = (tokens(&host, " the value of a"), tokens(&host, "let x = 1;"));
    let component = host.builtin("sampler-allowlist");
    let activate = |list: &BTreeSet<u64>| {
        let activated = host.activate("sampler", &component, json!({ "allow": list }));
        assert_eq!(activated.status, 200, "{activated:?}");
    };
    activate(&one);
    let limited = said(&host, "Ownership is");
    assert_ne!(limited, free);
    check(&limited, &one);
    activate(&other);
    check(&said(&host, "Ownership is"), &other);
    let rolled_back = host.admin("POST", "/admin/v1/slots/sampler/rollback", &Value::Null);
    assert_eq!(rolled_back.status, 200, "{rolled_back:?}");
    let again = said(&host, "Ownership is");
    check(&again, &one);
    let removed = host.admin("DELETE", "/admin/v1/slots/sampler", &Value::Null);
    assert_eq!(removed.status, 200, "{removed:?}");
    assert_eq!(said(&host, "Ownership is"), free, "native: nobody is limited");
}

#[test]
fn a_running_request_is_limited_from_the_activation_on() {
    let host = host(&[]);
    let component = host.builtin("sampler-allowlist");
    let list = BTreeSet::from([40, 41]);
    let body = json!({
        "model": "demo:f16", "prompt": "Ownership is", "temperature": 0, "max_tokens": 400, "ignore_eos": true
    });
    // An activation may come too late for a stream, or too early.
    let cut = (0..50).find_map(|_| {
        assert_eq!(host.admin("DELETE", "/admin/v1/slots/sampler", &Value::Null).status, 200);
        let said = std::thread::scope(|scope| {
            let stream = scope.spawn(|| host.stream(&body).expect("it is served").tokens);
            assert_eq!(host.activate("sampler", &component, json!({ "allow": list })).status, 200);
            stream.join().expect("no panic")
        });
        assert_eq!(said.len(), 400);
        let free = said.iter().rposition(|token| !list.contains(token)).map_or(0, |last| last + 1);
        ((1..=390).contains(&free)).then_some(free)
    });
    assert!(cut.is_some(), "no stream was limited half-way");
    assert_eq!(said(&host, "Ownership is").iter().find(|token| !list.contains(token)), None);
}

#[test]
fn lists_are_swapped_under_load_and_no_request_pays() {
    let host = host(&[]);
    let lists = [tokens(&host, " the value of a"), tokens(&host, "let x = 1;")];
    let either: BTreeSet<u64> = lists.iter().flatten().copied().collect();
    let component = host.builtin("sampler-allowlist");
    let swap = |i: usize| host.activate("sampler", &component, json!({ "allow": lists[i % 2] })).status;
    assert_eq!(swap(0), 200);
    let swapping = AtomicBool::new(true);
    let everything = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for stream in 0..STREAMS {
            let (host, swapping, everything) = (&host, &swapping, &everything);
            scope.spawn(move || {
                let prompt = format!("A trait is {}", "so ".repeat(stream));
                while swapping.load(Ordering::Acquire) {
                    let said = said(host, &prompt);
                    assert_eq!(said.len(), 12, "it is served to its end");
                    everything.lock().expect("no panic").extend(said);
                }
            });
        }
        for i in 1..=SWAPS {
            assert_eq!(swap(i), 200, "swap {i}");
        }
        swapping.store(false, Ordering::Release);
    });
    let everything = everything.into_inner().expect("no panic");
    check(&everything, &either);
    assert!(everything.len() >= 12 * STREAMS);
    let rolled_back = host.admin("POST", "/admin/v1/slots/sampler/rollback", &Value::Null);
    assert_eq!(rolled_back.status, 200, "{rolled_back:?}");
    check(&said(&host, "A trait is"), &lists[(SWAPS + 1) % 2]);
    let state = host.admin("GET", "/admin/v1/slots/sampler", &Value::Null).body;
    let faults = state["counters"]["faults"].as_object().map_or(0, |f| f.values().filter_map(Value::as_u64).sum());
    assert_eq!(faults, 0, "{state}");
}

#[test]
fn a_request_without_its_sampler_goes_on_or_ends_as_the_slot_says() {
    let host = host(&[]);
    let wasm = pointsman_tests::root().join("plugins/prebuilt/fixture-sampler.wasm");
    let fixture = host.upload(&std::fs::read(wasm).expect("a committed fixture"));
    let put = |slot: &str, component: &str, on_fault: &str| {
        let config = json!({ "do": "trap", "after": 12 });
        let body = json!({ "component": component, "config": config, "on_fault": on_fault });
        host.admin("PUT", &format!("/admin/v1/slots/{slot}"), &body)
    };
    let refused = put("sampler", "native", "closed");
    assert!(refused.status == 400 && refused.body.to_string().contains("leave `on_fault` out"), "{refused:?}");
    // More tokens than an instance lives: the first one traps, and the spare that is told of all of them.
    let body =
        json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 40, "temperature": 0, "ignore_eos": true });
    for (on_fault, status, code) in [("open", 200, Value::Null), ("closed", 503, json!("sampler_failed"))] {
        assert_eq!(put("sampler", &fixture, on_fault).status, 200);
        let answer = host.post("/v1/completions", &body);
        assert_eq!((answer.status, &answer.body["error"]["code"]), (status, &code), "{on_fault}: {answer:?}");
    }
    let state = host.admin("GET", "/admin/v1/slots/sampler", &Value::Null).body;
    assert_eq!((&state["active"]["on_fault"], state["previous"].get("on_fault")), (&json!("closed"), None), "{state}");
    // It is stored: a restart fails closed too.
    let host = host.restart(&[]);
    assert_eq!(host.post("/v1/completions", &body).status, 503);
    assert_eq!(host.admin("DELETE", "/admin/v1/slots/sampler", &Value::Null).status, 200);
    assert_eq!(host.post("/v1/completions", &body).status, 200, "native: nobody is missing");
}

#[test]
fn a_closed_sampler_that_cannot_be_brought_back_lets_nobody_go_on() {
    let host = host(&[]);
    let wasm = pointsman_tests::root().join("plugins/prebuilt/fixture-sampler.wasm");
    let wasm = std::fs::read(wasm).expect("a committed fixture");
    let completion = json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 2 });
    let served = |host: &Host| [host.post("/v1/completions", &completion).status, host.get("/ready").status];
    // The text of the metrics may be that of a moment ago.
    let missing = |host: &Host, instead: Option<&str>| {
        let line = |instead| format!("pointsman_policy_missing{{instead=\"{instead}\",slot=\"sampler\"}} 1");
        let expect: Vec<String> = instead.map(line).into_iter().collect();
        looks().any(|_| {
            let text = host.get("/metrics").body;
            text.as_str().is_some_and(|t| t.lines().filter(|l| l.starts_with("pointsman_policy_missing{")).eq(&expect))
        })
    };
    let activate = |host: &Host, on_fault: &str| {
        let digest = host.upload(&wasm);
        let body = json!({ "component": digest, "config": {}, "on_fault": on_fault });
        assert_eq!(host.admin("PUT", "/admin/v1/slots/sampler", &body).status, 200, "{on_fault}");
        assert_eq!((served(host), missing(host, None)), ([200, 200], true));
        host.folder().join(format!("components/{}.wasm", digest.trim_start_matches("sha256:")))
    };
    let file = activate(&host, "open");
    std::fs::remove_file(file).expect("a stored component");
    let host = host.restart(&[]);
    assert_eq!((served(&host), missing(&host, Some("native"))), ([200, 200], true), "open: it serves without");
    let file = activate(&host, "closed");
    std::fs::write(file, b"damaged").expect("a stored component");
    let host = host.restart(&[]);
    assert_eq!((served(&host), missing(&host, Some("nobody"))), ([503, 503], true));
    let answer = host.post("/v1/completions", &completion);
    let reason = answer.headers.get("x-pointsman-reason").and_then(|v| v.to_str().ok());
    assert_eq!((&answer.body["error"]["code"], reason), (&json!("sampler_failed"), Some("policy")), "{answer:?}");
    assert_eq!(host.get("/health").status, 200);
    let health = host.admin("GET", "/admin/v1/slots/sampler", &Value::Null).body["health"].clone();
    let says = |text: &Value| text.as_str().is_some_and(|text| text.contains("every request is refused"));
    assert!(health["state"] == "open" && says(&health["reason"]), "{health}");
    let is_told = |entry: &Value| entry["event"] == "refused" && entry["slot"] == "sampler" && says(&entry["error"]);
    assert!(journal(&host).iter().any(is_told));
    // The operator may say that it goes on without, for a while or for this life.
    let switch = |on: bool| host.admin("POST", "/admin/v1/safe-mode", &json!({ "on": on })).status;
    assert_eq!((switch(true), served(&host)), (200, [200, 200]));
    assert_eq!((switch(false), served(&host)), (200, [503, 503]));
    let host = host.restart(&[("SAFE_MODE", "true")]);
    assert_eq!(served(&host), [200, 200]);
    let host = host.restart(&[]);
    assert_eq!(served(&host), [503, 503]);
    activate(&host, "closed");
    // A document that cannot be read and that says `closed` is of such a policy.
    let text = std::fs::read_to_string(document_of(&host)).expect("a document");
    std::fs::write(document_of(&host), text.replacen("\"format\"", "\"fromat\"", 1)).expect("a document");
    let host = host.restart(&[]);
    assert_eq!((served(&host), missing(&host, Some("nobody"))), ([503, 503], true));
    std::fs::write(document_of(&host), text).expect("a document");
    let host = host.restart(&[]);
    assert_eq!(served(&host), [200, 200]);
    assert_eq!(host.admin("DELETE", "/admin/v1/slots/sampler", &Value::Null).status, 200);
}

fn document_of(host: &Host) -> std::path::PathBuf {
    host.folder().join("slots/sampler.json")
}

#[test]
fn a_closed_sampler_of_the_configuration_that_cannot_start_lets_nobody_go_on() {
    let config = |allow: &str| {
        format!(
            "[slots.sampler]\ncomponent = \"sampler-allowlist\"\non_fault = \"closed\"\nconfig = {{ allow = {allow} }}\n"
        )
    };
    let completion = json!({ "model": "demo:f16", "prompt": "Rust is", "max_tokens": 2 });
    for (allow, status) in [("\"all\"", 503), ("[40]", 200)] {
        let host = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config(allow));
        assert_eq!(host.post("/v1/completions", &completion).status, status, "{allow}");
        let put = json!({ "component": host.builtin("sampler-allowlist"), "config": { "allow": [41] } });
        assert_eq!(host.admin("PUT", "/admin/v1/slots/sampler", &put).status, 200, "{allow}");
        assert_eq!(host.post("/v1/completions", &completion).status, 200, "{allow}");
    }
}
