//! Signatures, tokens with roles, and what the journal says of both.

use std::path::{Path, PathBuf};
use std::process::Command;

use pointsman_tests::{Answer, Host, root};
use serde_json::{Value, json};

use crate::{host, journal};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_pointsman-under-test");

/// Runs the command line; what it printed, or the error.
pub(crate) fn pointsman(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(PROGRAM).args(arguments).output().expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A component in a folder of its own.
fn component(folder: &Path) -> PathBuf {
    let path = folder.join("router.wasm");
    std::fs::copy(root().join("plugins/prebuilt/route-least-loaded.core.wasm"), &path).expect("a component");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

fn message(answer: &Answer) -> &str {
    answer.body["error"]["message"].as_str().unwrap_or_default()
}

/// Makes a key; the line that a configuration needs.
pub(crate) fn keygen(path: &Path) -> String {
    let said = pointsman(&["policy", "keygen", text(path)]).expect("a key");
    said.lines().find(|line| line.contains(" = \"")).expect("a line for the ring").to_owned()
}

#[test]
fn where_signatures_are_required_nothing_else_works() {
    let folder = tempfile::tempdir().expect("a folder");
    let (release, stranger) = (folder.path().join("release.key"), folder.path().join("stranger.key"));
    let (known, unknown) = (keygen(&release), keygen(&stranger));
    let ring = |keys: &str, required: bool| format!("[trust]\nrequire_signature = {required}\n[trust.keys]\n{keys}\n");
    let host = Host::configured(PROGRAM, &ring(&known, true));
    let slot = |host: &Host| host.admin("GET", "/admin/v1/slots/router", &Value::Null).body;
    assert_eq!(slot(&host)["health"]["state"], "closed", "built-ins need no signature: {}", slot(&host));
    let file = component(folder.path());
    let upload = |host: &Host, extra: &[&str]| {
        let at = ["policy", "upload", text(&file), "--url", &host.admin];
        pointsman(&[&at[..], extra].concat())
    };
    let refused = upload(&host, &[]).expect_err("not signed");
    assert!(refused.contains("is not signed, and trust.require_signature is on"), "{refused}");
    pointsman(&["policy", "sign", text(&file), "--key", text(&stranger)]).expect("signed");
    let refused = upload(&host, &[]).expect_err("signed by a stranger");
    assert!(refused.contains("no key of trust.keys has signed"), "{refused}");
    assert!(journal(&host).iter().filter(|e| e["event"] == "upload-refused").count() == 2, "{:?}", journal(&host));
    pointsman(&["policy", "sign", text(&file), "--key", text(&release)]).expect("signed");
    let said = upload(&host, &["--signature", &format!("{}.sig", text(&file))]).expect("signed by a known key");
    assert!(said.contains("signed by release"), "{said}");
    let digest = said.split_whitespace().next().expect("a digest").to_owned();
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    let uploaded = journal(&host).into_iter().find(|e| e["event"] == "uploaded").expect("an entry");
    assert_eq!((&uploaded["signed_by"], &uploaded["actor"]), (&json!("release"), &json!("loopback@127.0.0.1")));
    let listed = pointsman(&["policy", "list", "--url", &host.admin]).expect("a table");
    assert!(listed.lines().any(|l| l.contains(&digest[..19]) && l.contains("release")), "{listed}");

    // A restart checks again: the same ring, one that lost the key, one that asks for nothing, a torn signature.
    let signature = host.folder().join(format!("components/{}.sig", &digest[7..]));
    let good = std::fs::read(&signature).expect("stored beside the component");
    let host = host.restart(&[]);
    assert_eq!(slot(&host)["health"]["state"], "closed", "{}", slot(&host));
    let host = host.reconfigure(&ring(&unknown, true));
    assert_eq!(slot(&host)["health"]["state"], "open", "{}", slot(&host));
    assert!(slot(&host)["health"]["reason"].as_str().is_some_and(|r| r.contains("no key of trust.keys")));
    let served = host.post("/v1/completions", &json!({ "model": "demo", "prompt": "Rust is", "max_tokens": 1 }));
    let router = served.headers.get("x-pointsman-router").and_then(|v| v.to_str().ok()).unwrap_or_default();
    assert_eq!((served.status, router), (200, "native;g=2"), "native serves");
    let refused = host.activate("router", &digest, json!({}));
    assert_eq!(refused.status, 422, "{refused:?}");
    let host = host.reconfigure(&ring(&unknown, false));
    assert_eq!(slot(&host)["health"]["state"], "closed", "{}", slot(&host));
    std::fs::remove_file(&signature).expect("one's own file");
    let host = host.reconfigure(&ring(&known, true));
    assert_eq!(slot(&host)["health"]["state"], "open", "{}", slot(&host));
    let put = |body: &[u8]| {
        let url = format!("{}/admin/v1/components/{digest}/signature", host.admin);
        host.send("PUT", &url, &[], body)
    };
    assert_eq!(put(b"nonsense").status, 400);
    assert_eq!(put(&[1; 64]).status, 422);
    assert_eq!(put(&good).status, 204);
    assert_eq!(host.activate("router", &digest, json!({})).status, 200);
    assert!(journal(&host).iter().any(|e| e["event"] == "signed" && e["signed_by"] == "release"));
}

#[test]
fn what_lies_under_a_digest_must_have_it() {
    let host = host(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = component(folder.path());
    let wrong = format!("{}@sha256:{}", text(&file), "0".repeat(64));
    let activate = |what: &str| pointsman(&["policy", "activate", "router", what, "--url", &host.admin]);
    let refused = activate(&wrong).expect_err("another digest");
    assert!(refused.contains("is pinned to"), "{refused}");
    let digest = host.upload(&std::fs::read(&file).expect("a component"));
    activate(&format!("{}@{digest}", text(&file))).expect("the right digest");
    assert_eq!(host.activate("router", "native", json!({})).status, 200);
    // Somebody replaces the stored file by another component.
    let other = std::fs::read(root().join("plugins/prebuilt/route-weighted.wasm")).expect("a component");
    std::fs::write(host.folder().join(format!("components/{}.wasm", &digest[7..])), other).expect("one's own file");
    std::fs::remove_dir_all(host.folder().join("compiled")).expect("a folder");
    let host = host.restart(&[]);
    let refused = host.activate("router", &digest, json!({}));
    assert!(matches!(refused.status, 400 | 404), "{refused:?}");
}

#[test]
fn a_name_in_the_configuration_may_be_pinned() {
    let name = "route-weighted";
    let digest = host(&[]).builtin(name);
    let config = |pin: &str| format!("[slots.router]\ncomponent = \"{name}@{pin}\"\n");
    let router = |host: &Host| host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    let pinned = Host::configured(PROGRAM, &config(&digest));
    assert_eq!(router(&pinned)["component"], json!(digest));
    let other = Host::configured(PROGRAM, &config(&format!("sha256:{}", "0".repeat(64))));
    assert_eq!(router(&other)["component"], "native", "{}", router(&other));
}

#[test]
fn a_role_is_what_a_token_may_do_and_its_name_stands_in_the_journal() {
    let tokens = "dashboard = { token = \"look\", role = \"read\" }\nci = { token = \"change\", role = \"operate\" }\n";
    let host = Host::configured(PROGRAM, &format!("[admin.tokens]\n{tokens}"));
    let ask = |method: &str, token: &str| {
        let url = format!("{}/admin/v1/slots/router", host.admin);
        let authorization = format!("Bearer {token}");
        let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
        host.send(method, &url, &headers, if method == "PUT" { br#"{"component": "native"}"# } else { b"" })
    };
    assert_eq!(host.admin("GET", "/admin/v1/slots/router", &Value::Null).status, 401);
    for (method, token, status) in
        [("GET", "look", 200), ("PUT", "look", 403), ("DELETE", "look", 403), ("PUT", "change", 200), ("GET", "x", 401)]
    {
        assert_eq!(ask(method, token).status, status, "{method} {token}");
    }
    let refused = ask("PUT", "look");
    assert!(message(&refused).contains("`dashboard` has the role `read`"), "{refused:?}");
    let lines = host.send("GET", &format!("{}/admin/v1/journal", host.admin), &[("authorization", "Bearer look")], b"");
    let text = lines.body.as_str().expect("lines");
    assert!(text.contains("\"actor\":\"ci@127.0.0.1\",\"event\":\"published\",\"slot\":\"router\""), "{text}");
}
