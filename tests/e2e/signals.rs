//! Signals at moments when nothing waits for them: a start that has not ended, a host with nothing to read again.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use pointsman_tests::{Host, looks, signal};

use crate::trust::PROGRAM;

/// The status of an answer, whether it says when to try again, and its body.
fn asked(url: &str) -> (u16, bool, Value) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = agent.get(url).call().expect("an answer");
    let may_retry = answer.headers().contains_key("retry-after");
    let text = answer.body_mut().read_to_string().expect("text");
    (answer.status().as_u16(), may_retry, serde_json::from_str(&text).expect("JSON"))
}

#[test]
fn a_hangup_with_nothing_to_read_again_leaves_streams_alone() {
    let host = Host::logged(PROGRAM, "");
    let body = json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 64, "ignore_eos": true });
    let mut n_events = 0;
    let streamed = host.stream_heard(&body, |_| {
        n_events += 1;
        if n_events == 3 {
            host.signal("-HUP");
        }
    });
    assert_eq!(streamed.map(|streamed| (streamed.tokens.len(), streamed.finish)), Ok((64, "length".into())));
    let is_told = || host.get("/health").status == 200 && host.log().contains("SIGHUP changes nothing");
    assert!(looks().any(|_| is_told()), "{}", host.log());
}

#[test]
fn a_signal_during_the_start_ends_it_in_order() {
    for name in ["-TERM", "-INT"] {
        let folder = tempfile::tempdir().expect("a folder");
        // Nobody ever writes to the list of models: who opens it waits.
        let made = Command::new("mkfifo").arg(folder.path().join("models.json")).status();
        assert!(made.is_ok_and(|status| status.success()), "mkfifo is there");
        let mut host = Command::new(PROGRAM)
            .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir"])
            .arg(folder.path())
            .env("POINTSMAN_LOG__LEVEL", "info")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the host starts");
        let mut log = BufReader::new(host.stderr.take().expect("it is piped")).lines().map_while(Result::ok);
        let line = log.find(|line| line.contains("when the models are loaded")).expect("it starts");
        let at = |plane: &str| {
            let rest = line.split_once(&format!("{plane}=")).expect("an address").1;
            format!("http://{}", rest.split(' ').next().unwrap_or_default())
        };
        assert_eq!(asked(&format!("{}/health", at("data"))), (200, false, json!({ "status": "ok" })));
        let (status, _, build) = asked(&format!("{}/version", at("data")));
        let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
        assert_eq!(
            (status, &build["version"], &build["target"]),
            (200, &json!(env!("CARGO_PKG_VERSION")), &json!(target))
        );
        assert_ne!(build["commit"], "", "it is told or not there");
        for url in [
            format!("{}/ready", at("data")),
            format!("{}/metrics", at("data")),
            format!("{}/v1/models", at("data")),
            format!("{}/admin/v1/slots", at("admin")),
        ] {
            let (status, may_retry, body) = asked(&url);
            assert_eq!((status, may_retry, &body["error"]["code"]), (503, true, &json!("loading")), "{url}: {body}");
        }
        signal(host.id(), name);
        assert!(log.any(|line| line.contains("stopped before it was ready")), "{name} is heard");
        assert_eq!(host.wait().expect("it ends").code(), Some(0), "{name}");
    }
}
