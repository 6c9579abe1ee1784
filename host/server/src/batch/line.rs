//! Lines: requests of an input file, and the answers that are written of them.
//!
//! The identity of an answer ends with the number of its line, so that what is answered can be read from the answers alone.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::job::{Batch, Cut, LineFault};
use crate::ports::Shelf;

/// Longest identity that a client gives a line.
const MAX_CUSTOM_ID: usize = 512;
/// Faults that are listed of a file; a person reads the first ones.
const MAX_FAULTS: usize = 50;
/// What is read of a file at once.
const CHUNK: usize = 64 << 10;

/// A request of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// From 1.
    pub(crate) number: u32,
    pub(crate) custom_id: String,
    /// As it stands in its file.
    body: Vec<u8>,
}

/// A line that is not blank.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) number: u32,
    /// Its beginning alone where it is too long.
    pub(crate) text: Vec<u8>,
    pub(crate) is_too_long: bool,
    /// Where the next line begins; none where nothing says that this one is whole.
    pub(crate) end: Option<u64>,
}

/// The lines of a file, one after the other. Reading blocks.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    shelf: Arc<dyn Shelf>,
    file: String,
    max_line: usize,
    /// Where the next chunk begins.
    at: u64,
    chunk: Vec<u8>,
    /// What of it has been taken.
    taken: usize,
    number: u32,
}

// === impl Lines ===

impl Lines {
    pub(crate) fn new(shelf: &Arc<dyn Shelf>, file: &str, max_line: usize) -> Self {
        let (shelf, file) = (Arc::clone(shelf), file.to_owned());
        Self { shelf, file, max_line, at: 0, chunk: Vec::new(), taken: 0, number: 0 }
    }

    /// The next line that is not blank; none after the last.
    pub(crate) fn next(&mut self) -> io::Result<Option<Raw>> {
        let (mut text, mut is_too_long) = (Vec::new(), false);
        loop {
            let rest = &self.chunk[self.taken..];
            let end = rest.iter().position(|byte| *byte == b'\n');
            let part = &rest[..end.unwrap_or(rest.len())];
            let room = self.max_line.saturating_sub(text.len());
            is_too_long |= part.len() > room;
            text.extend_from_slice(&part[..part.len().min(room)]);
            self.taken += part.len() + usize::from(end.is_some());
            let mut over = false;
            if end.is_none() {
                self.chunk = self.shelf.read(&self.file, self.at, CHUNK)?;
                (self.at, self.taken) = (self.at + self.chunk.len() as u64, 0);
                over = self.chunk.is_empty();
                if !over {
                    continue;
                }
            }
            self.number += 1;
            let is_blank = text.iter().all(u8::is_ascii_whitespace);
            if !is_blank {
                let end = end.map(|_| self.at - (self.chunk.len() - self.taken) as u64);
                return Ok(Some(Raw { number: self.number, text, is_too_long, end }));
            }
            if over {
                return Ok(None);
            }
            text.clear();
        }
    }
}

// === impl Line ===

impl Line {
    /// What it asks.
    pub(crate) fn body(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

// === reading ===

impl Raw {
    /// The request, or what is wrong with it.
    pub(crate) fn parse(&self, endpoint: &str) -> Result<Line, LineFault> {
        let fault = |code: &str, param: Option<&str>, message: String| LineFault {
            code: code.to_owned(),
            message,
            param: param.map(str::to_owned),
            line: Some(self.number),
        };
        if self.is_too_long {
            let message = format!("this line has more than {} bytes, the most of a request", self.text.len());
            return Err(fault("line_too_long", None, message));
        }
        let read = serde_json::from_slice::<HashMap<String, &RawValue>>(&self.text);
        let map = read.map_err(|error| {
            fault(
                "invalid_json_line",
                None,
                format!("this line is not a JSON object: {error}; send one request a line"),
            )
        })?;
        let text = |name: &str| serde_json::from_str::<String>(map.get(name)?.get()).ok();
        let custom_id = match text("custom_id") {
            Some(id) if (1..=MAX_CUSTOM_ID).contains(&id.len()) => id,
            _ => {
                let message = format!("`custom_id` must be a text of 1 to {MAX_CUSTOM_ID} bytes");
                return Err(fault("invalid_custom_id", Some("custom_id"), message));
            }
        };
        if text("method").as_deref() != Some("POST") {
            return Err(fault("invalid_method", Some("method"), "`method` must be POST".to_owned()));
        }
        if text("url").as_deref() != Some(endpoint) {
            let message = format!("`url` must be the endpoint of the batch, {endpoint}");
            return Err(fault("mismatched_endpoint", Some("url"), message));
        }
        let Some(body) = map.get("body").map(|body| body.get()).filter(|body| body.starts_with('{')) else {
            let message = "`body` must be an object: that of the endpoint".to_owned();
            return Err(fault("invalid_body", Some("body"), message));
        };
        // A raw value is looked at for its form only: numbers, escapes and depth show when it is read.
        match serde_json::from_str::<Map<String, Value>>(body) {
            Ok(_) => Ok(Line { number: self.number, custom_id, body: body.into() }),
            Err(error) => Err(fault("invalid_json_line", Some("body"), format!("`body` cannot be read: {error}"))),
        }
    }
}

/// Reads a whole file: how many requests it has, or what is wrong with it.
pub(crate) fn check(mut lines: Lines, endpoint: &str, max_lines: u32) -> io::Result<Result<u32, Vec<LineFault>>> {
    let (mut faults, mut seen, mut total) = (Vec::new(), HashSet::new(), 0_u32);
    let file = |code: &str, message: String| LineFault { code: code.to_owned(), message, param: None, line: None };
    while let Some(raw) = lines.next()? {
        total += 1;
        if total > max_lines {
            let message = format!("the file has more than {max_lines} requests, the most of a batch; send several");
            return Ok(Err(vec![file("too_many_lines", message)]));
        }
        match raw.parse(endpoint) {
            Ok(line) if seen.contains(&line.custom_id) => faults.push(LineFault {
                code: "duplicate_custom_id".to_owned(),
                message: format!("`custom_id` \"{}\" is that of an earlier line too", line.custom_id),
                param: Some("custom_id".to_owned()),
                line: Some(line.number),
            }),
            Ok(line) => drop(seen.insert(line.custom_id)),
            Err(fault) => faults.push(fault),
        }
        if faults.len() == MAX_FAULTS {
            break;
        }
    }
    if total == 0 {
        faults.push(file("empty_file", "the file has no requests: send one JSON object a line".to_owned()));
    }
    Ok(if faults.is_empty() { Ok(total) } else { Err(faults) })
}

// === writing ===

#[derive(Serialize)]
struct Written<'a> {
    id: String,
    custom_id: &'a str,
    response: Option<Response<'a>>,
    error: Option<Unanswered>,
}

#[derive(Serialize)]
struct Response<'a> {
    status_code: u16,
    request_id: &'a str,
    body: &'a RawValue,
}

#[derive(Serialize)]
struct Unanswered {
    code: &'static str,
    message: &'static str,
}

fn identity(batch: &str, number: u32) -> String {
    format!("{}_{number}", batch.replacen("batch_", "batch_req_", 1))
}

fn written(line: &Written<'_>) -> Vec<u8> {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text
}

/// The line of an answer: its request's id, status and body.
pub(crate) fn answered(batch: &str, line: &Line, (request_id, status_code): (&str, u16), body: &[u8]) -> Vec<u8> {
    let Ok(body) = serde_json::from_slice::<&RawValue>(body) else { return Vec::new() };
    let response = Some(Response { status_code, request_id, body });
    written(&Written { id: identity(batch, line.number), custom_id: &line.custom_id, response, error: None })
}

/// The line of a request that gets no answer any more.
pub(crate) fn unanswered(batch: &Batch, line: &Line, cut: Cut) -> Vec<u8> {
    let (code, message) = match cut {
        Cut::Expired => ("batch_expired", "The completion window was over before this request could be answered."),
        Cut::Cancelled => ("batch_cancelled", "The batch was cancelled before this request could be answered."),
    };
    let error = Some(Unanswered { code, message });
    written(&Written { id: identity(&batch.id, line.number), custom_id: &line.custom_id, response: None, error })
}

/// The number of the request that a written line answers; none where it is not as it was written.
pub(crate) fn number_of(raw: &Raw) -> Option<u32> {
    // One that is too long to be looked at is told by its beginning.
    let is_json = raw.is_too_long || serde_json::from_slice::<IgnoredAny>(&raw.text).is_ok();
    let rest = raw.text.strip_prefix(br#"{"id":""#).filter(|_| is_json && raw.end.is_some())?;
    let id = std::str::from_utf8(rest.split(|byte| *byte == b'"').next()?).ok()?;
    id.rsplit('_').next()?.parse().ok()
}
