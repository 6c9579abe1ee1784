//! TLS on both planes, with a certificate that is renewed while the host runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use pointsman_tests::{Host, looks, root, skip};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::trust::PROGRAM;

/// A client that trusts one certificate.
fn client(trusted: &Path) -> ureq::Agent {
    let pem = std::fs::read(trusted).expect("a certificate");
    let roots = RootCerts::new_with_certs(&[Certificate::from_pem(&pem).expect("PEM").to_owned()]);
    let tls = TlsConfig::builder().root_certs(roots).build();
    ureq::Agent::config_builder().http_status_as_error(false).tls_config(tls).build().into()
}

fn get(client: &ureq::Agent, url: &str) -> Option<String> {
    client.get(url).call().ok()?.body_mut().read_to_string().ok()
}

/// Whether a host is who a new connection of this client expects.
fn is_trusted(url: &str, trusted: &Path) -> bool {
    get(&client(trusted), url).is_some()
}

/// Files of one plane, as an operator puts them there.
fn place(from: &Path, to: &Path, mode: u32) {
    std::fs::copy(from, to).expect("a file");
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(mode)).expect("a file of ours");
}

fn config(path: &Path) -> String {
    let tls = |plane: &str| format!("[{plane}.tls]\ncert_file = {path:?}\nkey_file = {path:?}\n");
    tls("server") + &tls("admin")
}

#[test]
fn both_planes_speak_tls_and_take_a_renewed_certificate() {
    let folder = tempfile::tempdir().expect("a folder");
    let served = folder.path().join("host.pem");
    let [old, renewed] = ["registry", "renewed"].map(|name| root().join(format!("tests/e2e/{name}.pem")));
    place(&old, &served, 0o600);
    let host = Host::logged(PROGRAM, &config(&served));
    let (data, admin) = (format!("{}/v1/models", host.data), format!("{}/admin/v1/slots", host.admin));
    assert!(data.starts_with("https://") && admin.starts_with("https://"), "{data} {admin}");

    // Who shakes no hands holds up nobody; who speaks plainly is told.
    let at = host.data.trim_start_matches("https://");
    let silent = TcpStream::connect(at).expect("it listens");
    let mut plain = TcpStream::connect(at).expect("it listens");
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").expect("it listens");
    let mut said = String::new();
    plain.read_to_string(&mut said).expect("an answer and its end");
    assert!(said.starts_with("HTTP/1.1 400") && said.contains("tls_required"), "{said}");
    for url in [&data, &admin] {
        assert_eq!((is_trusted(url, &old), is_trusted(url, &renewed)), (true, false), "{url}");
    }
    drop(silent);
    let status = |trusted: &Path| {
        let mut command = Command::new(PROGRAM);
        command.args(["policy", "status", "--url", &host.admin, "--ca-file"]).arg(trusted);
        command.output().expect("it starts").status
    };
    assert_eq!((status(&old).code(), status(&renewed).code(), status(&root()).code()), (Some(0), Some(1), Some(2)));

    // A stream and an open connection go on through what follows.
    let open = client(&old);
    assert!(get(&open, &data).is_some());
    let body = r#"{"model": "demo:f16", "prompt": "a", "max_tokens": 400, "ignore_eos": true, "stream": true}"#;
    let stream = client(&old).post(format!("{}/v1/completions", host.data)).content_type("application/json").send(body);
    let mut stream = BufReader::new(stream.expect("a stream").into_body().into_reader());
    let mut first = String::new();
    stream.read_line(&mut first).expect("an event");
    assert!(first.starts_with("data: {"), "{first}");

    // Half a renewal, and a key for everybody, change nothing.
    let counted = || get(&open, &format!("{}/metrics", host.data)).expect("an open connection");
    for (n, (text, mode)) in [("no certificate", 0o600), ("", 0o644)].into_iter().enumerate() {
        std::fs::write(&served, text).expect("a file");
        std::fs::set_permissions(&served, std::fs::Permissions::from_mode(mode)).expect("a file of ours");
        host.signal("-HUP");
        let told = || host.log().matches("a certificate stays what it was").count() == 2 * (n + 1);
        assert!(looks().any(|_| get(&open, &data).is_some() && told()), "{}", host.log());
        assert!(is_trusted(&data, &old), "{text}");
        // 2120-01-01.
        assert!(counted().contains("pointsman_tls_not_after_timestamp_seconds{plane=\"data\"} 4733510400"), "{text}");
    }
    place(&renewed, &served, 0o640);
    host.signal("-HUP");
    for url in [&data, &admin] {
        assert!(looks().any(|_| is_trusted(url, &renewed)), "{}", host.log());
        assert!(!is_trusted(url, &old), "{url}");
    }
    for line in [
        "pointsman_tls_reloads_total{outcome=\"kept_old\",plane=\"data\"} 2",
        "pointsman_tls_reloads_total{outcome=\"used\",plane=\"admin\"} 1",
        "pointsman_tls_failures_total{reason=\"plain_http\"} 1",
        // 2110-01-01.
        "pointsman_tls_not_after_timestamp_seconds{plane=\"data\"} 4417977600",
        "pointsman_tls_not_after_timestamp_seconds{plane=\"admin\"} 4417977600",
    ] {
        // It is counted after it is used.
        assert!(looks().any(|_| counted().contains(line)), "{line}: {}", counted());
    }
    let rest = stream.lines().map(|line| line.expect("it is not cut off")).collect::<Vec<_>>();
    assert_eq!(rest.iter().rfind(|line| !line.is_empty()).map(String::as_str), Some("data: [DONE]"));
    assert!(!host.log().contains("PRIVATE KEY"), "keys are not for logs");
}

/// One connection with twenty streams on it.
#[test]
fn the_stock_client_speaks_http2() {
    let present = Command::new("python3").args(["-c", "import h2, openai"]).output();
    if !present.is_ok_and(|output| output.status.success())
        && skip("openai", "python3 has no packages `openai` and `h2`")
    {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (served, trusted) = (folder.path().join("host.pem"), root().join("tests/e2e/registry.pem"));
    place(&trusted, &served, 0o600);
    let host = Host::configured(PROGRAM, &config(&served));
    let script = root().join("tests/e2e/tls.py");
    let output = Command::new("python3").arg(script).args([host.data.as_ref(), trusted.as_os_str()]).output();
    let output = output.expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_key_that_everybody_can_read_keeps_the_host_from_starting() {
    let folder = tempfile::tempdir().expect("a folder");
    let served = folder.path().join("host.pem");
    place(&root().join("tests/e2e/registry.pem"), &served, 0o644);
    let file = folder.path().join("pointsman.toml");
    std::fs::write(&file, config(&served)).expect("a file");
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"]).arg(file);
    let ended = command.arg("--data-dir").arg(folder.path().join("data")).output().expect("it starts");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.code() == Some(1) && said.contains("can be read by everybody"), "{said}");
}
