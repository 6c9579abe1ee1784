//! A client as careless as clients are: plain bytes on a socket of its own, dropped whenever the caller likes. And whether a
//! host has forgotten all of them.

use std::io::{BufRead, BufReader, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::{Host, looks};

/// A request whose answer is read line by line. Dropping it closes the connection.
#[derive(Debug)]
pub struct Raw {
    answer: BufReader<TcpStream>,
    /// HTTP status.
    pub status: u16,
}

impl Raw {
    /// Sends a request for a stream and reads the head of the answer.
    ///
    /// # Errors
    /// The connection broke.
    pub fn ask(host: &Host, path: &str, body: &Value) -> Result<Self> {
        let mut answer = BufReader::new(send(host, path, body)?);
        let mut head = String::new();
        answer.read_line(&mut head)?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        Ok(Self { answer, status })
    }

    /// The next event of the stream, of either kind; nothing after the last.
    ///
    /// # Errors
    /// The connection broke.
    pub fn event(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        while self.answer.read_line(&mut line)? > 0 {
            let line_or_data = line.trim_end();
            if line_or_data.starts_with('{') {
                return Ok(Some(line_or_data.to_owned()));
            }
            if let Some(event) = line_or_data.strip_prefix("data: ") {
                return Ok((event != "[DONE]").then(|| event.to_owned()));
            }
            line.clear();
        }
        Ok(None)
    }
}

/// Sends a request and waits for nothing. One with a draft asks for the events that can tell it.
///
/// # Errors
/// The connection broke.
pub fn send(host: &Host, path: &str, body: &Value) -> Result<TcpStream> {
    let address = host.data.trim_start_matches("http://");
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let accept = if body["draft"].is_null() { "*/*" } else { "application/x-ndjson" };
    let body = body.to_string();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\naccept: {accept}\r\n");
    socket.write_all(format!("{head}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()).as_bytes())?;
    Ok(socket)
}

/// Sends these bytes on a connection of its own; all that is said until the host closes it, a reset included.
///
/// # Panics
/// The host does not close it.
#[must_use]
pub fn heard(host: &Host, sent: &[u8]) -> String {
    let mut socket = TcpStream::connect(host.data.trim_start_matches("http://")).expect("it listens");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    // It may have heard enough.
    let _ = socket.write_all(sent);
    let mut said = Vec::new();
    let ended = socket.read_to_end(&mut said).map_err(|error| error.kind());
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(!matches!(ended, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "the connection stays: {said}");
    said
}

/// Sends a head and a body of so many bytes, in chunks where the head says so; what is said until the connection ends, once all of that
/// was taken.
///
/// # Panics
/// Nobody listens.
#[must_use]
pub fn told(address: &str, head: &str, n: usize) -> Option<String> {
    let mut socket = TcpStream::connect(address.trim_start_matches("http://")).expect("it listens");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    let is_chunked = head.contains("chunked");
    let length = if is_chunked { String::new() } else { format!("content-length: {n}\r\n") };
    let head = format!("POST {head}\r\nhost: h\r\nconnection: close\r\n{length}\r\n");
    let (before, after) = if is_chunked { (format!("{n:x}\r\n"), "\r\n0\r\n\r\n") } else { (String::new(), "") };
    let body = vec![b'x'; n];
    let mut said = String::new();
    let sent = [head.as_bytes(), before.as_bytes(), &body, after.as_bytes()]
        .into_iter()
        .try_for_each(|part| socket.write_all(part));
    sent.and_then(|()| socket.read_to_string(&mut said)).ok().map(|_| said)
}

/// Waits until no replica has a request or holds a block.
///
/// # Panics
/// It does not come to that.
pub fn rests(host: &Host) {
    let mut devices = Value::Null;
    for _ in looks() {
        devices = host.admin("GET", "/admin/v1/devices", &Value::Null).body;
        let replicas = devices["data"].as_array().into_iter().flatten().flat_map(|d| d["replicas"].as_array());
        let idle = |r: &Value| r["running"] == 0 && r["waiting"] == 0 && r["kv_free_blocks"] == r["kv_blocks"];
        let mut replicas = replicas.flatten().peekable();
        if replicas.peek().is_some() && replicas.all(idle) {
            return;
        }
        std::thread::yield_now();
    }
    panic!("something is held that nobody asks for any more: {devices:#}");
}
