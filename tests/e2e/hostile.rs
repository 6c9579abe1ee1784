//! Sockets that do what no client should: heads and bodies that do not come, bytes that are no HTTP, lengths that contradict each
//! other, and connections that take every place. Each gets its answer and its end, and the host goes on.

use std::io::{Read, Write};
use std::net::TcpStream;

use pointsman_tests::{Host, looks, raw};

use super::host;

/// Places of the listeners below.
const PLACES: usize = 8;

/// The statuses of all answers on a connection.
fn statuses(said: &str) -> Vec<u16> {
    let heads = said.split("HTTP/1.1 ").skip(1);
    heads.map(|head| head.split(' ').next().and_then(|code| code.parse().ok()).unwrap_or(0)).collect()
}

fn get(host: &Host, path: &str) -> String {
    heard(host, &format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"))
}

/// What a host answers. A connection whose client is put aside before it has written is closed without a word, in its time.
fn heard(host: &Host, sent: &str) -> String {
    (0..3).map(|_| raw::heard(host, sent.as_bytes())).find(|said| !said.is_empty()).unwrap_or_default()
}

/// A metric of the data plane.
fn metric(host: &Host, name: &str) -> u64 {
    let (said, line) = (get(host, "/metrics"), format!("{name}{{plane=\"data\"}} "));
    let value = said.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_else(|| panic!("no {name}: {said}"));
    value.parse().expect("a number")
}

/// Waits until no request and no connection is left but the one that asks.
fn forgets_them(host: &Host) {
    raw::rests(host);
    assert!(looks().any(|_| metric(host, "pointsman_connections") == 1), "connections stay");
}

#[test]
fn who_speaks_no_http_gets_an_answer_and_an_end() {
    let host = host(&[
        ("SERVER__MAX_CONNECTIONS", "8"),
        ("SERVER__HEADER_TIMEOUT_MS", "400"),
        ("SERVER__BODY_TIMEOUT_MS", "400"),
    ]);
    let post = |headers: &str, body: &str| {
        format!("POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n{headers}\r\n{body}")
    };
    let body = r#"{"model": "demo", "prompt": "Rust", "max_tokens": 1}"#;
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let health = "GET /health HTTP/1.1\r\nhost: h\r\n\r\n";
    let long = format!("GET /health HTTP/1.1\r\nhost: h\r\nx-long: {}", "x".repeat(32 << 10));
    // The chunks count, and what follows them is not read: who stands before the host may have counted otherwise.
    let both = format!("{}{health}", post("transfer-encoding: chunked\r\ncontent-length: 5\r\n", &chunked));
    let both_turned = format!("{}{health}", post("content-length: 5\r\ntransfer-encoding: chunked\r\n", &chunked));
    let refused = format!("{}{health}", post("content-length: 7\r\n", "no JSON"));
    // What is sent, and the statuses of all answers before the end.
    let rows: [(&str, String, &[u16]); 14] = [
        ("nothing", String::new(), &[]),
        ("a head that does not end", "GET /health HTTP/1.1\r\nhost: h\r\nx-slow: ".to_owned(), &[]),
        ("a body that stops", post("content-length: 100\r\n", "{"), &[408]),
        ("chunks that stop", post("transfer-encoding: chunked\r\n", "5\r\n{"), &[408]),
        ("a head beyond its bound", long, &[431]),
        ("chunks and a length", both, &[200]),
        ("a length and chunks", both_turned, &[200]),
        ("two lengths", post("content-length: 7\r\ncontent-length: 8\r\n", "no JSON"), &[400]),
        ("a length that is no number", post("content-length: -1\r\n", "no JSON"), &[400]),
        ("garbage", "\u{1}\u{2}\u{3} garbage\r\n\r\n".to_owned(), &[400]),
        ("no version", "GET /health\r\n\r\n".to_owned(), &[400]),
        ("a header without a name", "GET /health HTTP/1.1\r\n: h\r\n\r\n".to_owned(), &[400]),
        ("a chunk whose size is no number", post("transfer-encoding: chunked\r\n", "zz\r\n{\r\n"), &[400]),
        ("a second request behind a refused one", refused, &[400, 200]),
    ];
    for (what, sent, expect) in rows {
        let said = if expect.is_empty() { raw::heard(&host, sent.as_bytes()) } else { heard(&host, &sent) };
        assert_eq!(statuses(&said), expect, "{what}: {said}");
        assert_eq!(statuses(&get(&host, "/health")), [200], "after {what}");
    }
    forgets_them(&host);
}

#[test]
fn silent_connections_on_every_place_give_way() {
    let host = host(&[("SERVER__MAX_CONNECTIONS", &PLACES.to_string())]);
    let at = host.data.trim_start_matches("http://");
    let silent: Vec<TcpStream> = (0..3 * PLACES).map(|_| TcpStream::connect(at).expect("it listens")).collect();
    for path in ["/health", "/v1/models"] {
        assert_eq!(statuses(&get(&host, path)), [200], "{path}");
    }
    assert!(metric(&host, "pointsman_connections") <= PLACES as u64);
    let n_evicted = metric(&host, "pointsman_connections_evicted_total");
    assert!((2 * PLACES as u64..=4 * PLACES as u64).contains(&n_evicted), "{n_evicted} were closed");
    drop(silent);
    forgets_them(&host);
}

#[test]
fn requests_on_every_place_let_probes_through_and_end_as_they_would_have() {
    let host = host(&[("SERVER__MAX_CONNECTIONS", &PLACES.to_string())]);
    let at = host.data.trim_start_matches("http://");
    let held = |_| {
        let mut socket = TcpStream::connect(at).expect("it listens");
        let head =
            "POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n";
        socket.write_all(head.as_bytes()).expect("room");
        socket
    };
    let mut busy: Vec<TcpStream> = (0..PLACES).map(held).collect();
    // More than may be beyond the bound at a time.
    for _ in 0..20 {
        assert_eq!(statuses(&get(&host, "/health")), [200]);
        let refused = get(&host, "/v1/models");
        assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
    }
    assert!(get(&host, "/metrics").contains("pointsman_rejected_total{reason=\"queue\"} 20"));
    assert_eq!(metric(&host, "pointsman_connections_evicted_total"), 0);
    for socket in &mut busy {
        socket.write_all(b"no JSON").expect("it is open");
        let mut said = [0; 12];
        socket.read_exact(&mut said).expect("an answer");
        assert_eq!(&said, b"HTTP/1.1 400", "its request went on");
    }
    drop(busy);
    forgets_them(&host);
}

#[test]
fn an_early_answer_reaches_a_client_that_is_still_sending() {
    // More than sockets hold: who does not read all of it ends the connection while the client sends.
    let large = 24 << 20;
    let host = host(&[("SERVER__MAX_BODY_BYTES", "8388608")]);
    let json = "content-type: application/json";
    for (at, head, status) in [
        (&host.data, "/v1/nothing HTTP/1.1".to_owned(), 404),
        (&host.data, "/v1/models HTTP/1.1".to_owned(), 405),
        (&host.data, "/v1/completions HTTP/1.1\r\ncontent-type: text/csv".to_owned(), 415),
        (&host.data, format!("/v1/completions HTTP/1.1\r\n{json}"), 413),
        (&host.data, format!("/v1/completions HTTP/1.1\r\n{json}\r\ntransfer-encoding: chunked"), 413),
        // By a name that is not this machine's.
        (&host.admin, "/admin/v1/slots HTTP/1.1".to_owned(), 403),
    ] {
        let said = raw::told(at, &head, large);
        assert_eq!(said.as_deref().map(statuses), Some(vec![status]), "{head}: {said:?}");
    }
    // Within limits: four times the larger of what a body and a component may have.
    assert_eq!(raw::told(&host.data, "/v1/nothing HTTP/1.1", 160 << 20), None);
    // Who asks first whether to send is told at once.
    let asks = "POST /v1/nothing HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n";
    assert_eq!(statuses(&heard(&host, asks)), [404]);
    // A connection goes on after what was read for nobody.
    let next =
        format!("POST /v1/nothing HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{}", 3 << 20, "x".repeat(3 << 20));
    let health = "GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    assert_eq!(statuses(&heard(&host, &format!("{next}{health}"))), [404, 200]);
    forgets_them(&host);
}

#[test]
fn who_is_refused_and_goes_on_sending_keeps_no_place() {
    let host = host(&[("SERVER__MAX_CONNECTIONS", "8")]);
    let owes = |_| {
        let mut socket = TcpStream::connect(host.data.trim_start_matches("http://")).expect("it listens");
        socket
            .write_all(b"POST /v1/nothing HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n")
            .expect("a head is taken");
        socket
    };
    let owing: Vec<TcpStream> = (0..PLACES).map(owes).collect();
    assert_eq!(statuses(&get(&host, "/v1/models")), [200]);
    drop(owing);
    forgets_them(&host);
}
