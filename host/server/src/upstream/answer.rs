//! An upstream's answer as it comes: bytes to lines to events, each bounded, and what an event says.
//!
//! The body is polled by whoever is told, so there is no task and no queue between the upstream and the client: a slow client
//! slows the upstream down by flow control, and dropping the answer closes its connection or resets its stream. After the last
//! event the body is read to its end, because a connection whose answer was not read up is not used again.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use serde_json::Value;
use tokio::time::{Instant, Sleep};

use super::mishap::{Mishap, words};
use super::pool::Body;
use crate::stream::{Delta, Finish, Totals};

/// Bytes of one event.
const MAX_EVENT_BYTES: usize = 1 << 20;
/// How long the end of the body may come after the last event; beyond, the connection is given up.
const LINGER: Duration = Duration::from_millis(200);

/// A body that is being read.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    /// What has come and is not a whole line yet.
    rest: BytesMut,
    /// Of `rest`, what has no end of a line.
    searched: usize,
    limit: usize,
    left: usize,
    idle: Duration,
    stalled: Pin<Box<Sleep>>,
    /// Whether it said that it is complete.
    is_done: bool,
    has_ended: bool,
}

/// What one event says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    pub(super) deltas: Vec<Delta>,
    pub(super) usage: Option<Totals>,
}

impl Answer {
    pub(super) fn new(body: Body, limit: usize, idle: Duration) -> Self {
        let stalled = Box::pin(tokio::time::sleep(idle));
        let (rest, searched) = (BytesMut::new(), 0);
        Self { body, rest, searched, limit, left: limit, idle, stalled, is_done: false, has_ended: false }
    }

    /// Whether it said that it is complete.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }

    /// The next event's data; none at the end.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Mishap>>> {
        loop {
            if let Some(data) = self.line() {
                if data != b"[DONE]"[..] {
                    return Poll::Ready(Some(Ok(data)));
                }
                self.is_done = true;
                (self.rest, self.searched) = (BytesMut::new(), 0);
                self.idle = self.idle.min(LINGER);
                self.wait();
            }
            if self.has_ended {
                return Poll::Ready(None);
            }
            match ready!(self.poll_bytes(cx)) {
                // After the last event only the end may come; else the connection is given up.
                Some(_) if self.is_done => self.has_ended = true,
                Some(Ok(bytes)) => self.take(&bytes)?,
                Some(Err(mishap)) => return Poll::Ready(Some(Err(mishap))),
                None => self.has_ended = true,
            }
        }
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Mishap>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                self.wait();
                let data = |frame: http_body::Frame<Bytes>| frame.into_data().unwrap_or_default();
                Poll::Ready(frame.map(|frame| frame.map(data).map_err(|_| Mishap::Broken)))
            }
            Poll::Pending => {
                ready!(self.stalled.as_mut().poll(cx));
                let limit_ms = u64::try_from(self.idle.as_millis()).unwrap_or(u64::MAX);
                Poll::Ready(Some(Err(Mishap::Stalled { limit_ms })))
            }
        }
    }

    /// From now on for the next bytes.
    fn wait(&mut self) {
        self.stalled.as_mut().reset(Instant::now() + self.idle);
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Mishap> {
        self.left =
            self.left.checked_sub(bytes.len()).ok_or(Mishap::TooLarge { limit: self.limit, is_event: false })?;
        self.rest.extend_from_slice(bytes);
        if self.rest.len() > MAX_EVENT_BYTES && !self.rest[self.searched..].contains(&b'\n') {
            return Err(Mishap::TooLarge { limit: MAX_EVENT_BYTES, is_event: true });
        }
        Ok(())
    }

    /// The data of the next whole line that has some.
    fn line(&mut self) -> Option<Bytes> {
        while let Some(at) = self.rest[self.searched..].iter().position(|byte| *byte == b'\n') {
            let line = self.rest.split_to(self.searched + at + 1).freeze();
            self.searched = 0;
            if let Some(data) = data(&line) {
                return Some(line.slice_ref(data));
            }
        }
        self.searched = self.rest.len();
        None
    }
}

/// What a line says; names, ids and comments say nothing here.
fn data(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(b"data:").map(<[u8]>::trim_ascii).filter(|data| !data.is_empty())
}

// === impl Said ===

impl Said {
    /// Reads an event of a stream of `n_choices`.
    pub(super) fn read(data: &[u8], n_choices: usize) -> Result<Self, Mishap> {
        let garbled = || Mishap::Garbled(format!("`{}`", &words(data)[..words(data).floor_char_boundary(80)]));
        let Ok(Value::Object(mut chunk)) = serde_json::from_slice(data) else { return Err(garbled()) };
        if chunk.get("error").is_some_and(|error| !error.is_null()) {
            return Err(Mishap::Said(words(data)));
        }
        let usage = chunk.get("usage").filter(|usage| usage.is_object()).map(totals);
        let choices = match chunk.remove("choices") {
            Some(Value::Array(choices)) => choices,
            None | Some(Value::Null) if usage.is_some() => Vec::new(),
            _ => return Err(garbled()),
        };
        let deltas: Option<Vec<Delta>> = choices.into_iter().map(|choice| delta(choice, n_choices)).collect();
        Ok(Self { deltas: deltas.ok_or_else(garbled)?, usage })
    }
}

/// A choice of a chunk, of a chat or of a completion.
fn delta(raw: Value, n_choices: usize) -> Option<Delta> {
    raw.as_object()?;
    let choice = usize::try_from(raw.get("index").map_or(Some(0), Value::as_u64)?).ok().filter(|i| *i < n_choices)?;
    let text = raw.get("delta").map_or_else(|| raw.get("text"), |delta| delta.get("content"));
    let text = text.and_then(Value::as_str).unwrap_or_default().to_owned();
    let finish = raw.get("finish_reason").and_then(Value::as_str).map(|reason| match reason {
        "length" => Finish::Length,
        _ => Finish::Stop,
    });
    Some(Delta { choice, text, token: None, finish, raw: Some(Box::new(raw)) })
}

fn totals(usage: &Value) -> Totals {
    let number = |value: &Value| value.as_u64().map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
    Totals {
        prompt: number(&usage["prompt_tokens"]),
        completion: number(&usage["completion_tokens"]),
        cached: number(&usage["prompt_tokens_details"]["cached_tokens"]),
        accepted: number(&usage["completion_tokens_details"]["accepted_prediction_tokens"]),
        rejected: number(&usage["completion_tokens_details"]["rejected_prediction_tokens"]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_with_data_count() {
        for (line, expect) in [
            (&b"data: {}\r\n"[..], Some(&b"{}"[..])),
            (b"data:[DONE]\n", Some(b"[DONE]")),
            (b"data: \n", None),
            (b"event: done\n", None),
            (b": ping\n", None),
            (b"\n", None),
        ] {
            assert_eq!(data(line), expect);
        }
    }

    #[test]
    fn events_are_read_as_servers_write_them() {
        let read = |text: &str| Said::read(text.as_bytes(), 2);
        let piece = |text: &str| {
            let said = read(text).expect(text);
            said.deltas.into_iter().map(|d| (d.choice, d.text, d.finish)).collect::<Vec<_>>()
        };
        for (event, expect) in [
            (r#"{"choices":[{"index":1,"delta":{"content":"a"}}]}"#, vec![(1, "a".to_owned(), None)]),
            (r#"{"choices":[{"delta":{"role":"assistant","content":null}}]}"#, vec![(0, String::new(), None)]),
            (r#"{"choices":[{"index":0,"text":"b","finish_reason":null}]}"#, vec![(0, "b".to_owned(), None)]),
            (
                r#"{"choices":[{"index":0,"text":"","finish_reason":"length"}],"error":null}"#,
                vec![(0, String::new(), Some(Finish::Length))],
            ),
            (
                r#"{"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}"#,
                vec![(0, String::new(), Some(Finish::Stop))],
            ),
            (r#"{"choices":[]}"#, vec![]),
        ] {
            assert_eq!(piece(event), expect, "{event}");
        }
        let usage =
            r#"{"usage":{"prompt_tokens":5,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}"#;
        let totals = Totals { prompt: 5, completion: 3, cached: 2, accepted: 0, rejected: 0 };
        assert_eq!(read(usage).expect("usage alone").usage, Some(totals));
    }

    #[test]
    fn what_is_no_chunk_is_told_from_an_error_of_the_upstream() {
        for event in [
            "hello",
            "[]",
            "{}",
            r#"{"choices":{}}"#,
            r#"{"choices":["x"]}"#,
            r#"{"choices":[{"index":2}]}"#,
            r#"{"choices":[{"index":"0"}]}"#,
        ] {
            let found = Said::read(event.as_bytes(), 2).expect_err(event);
            assert!(matches!(&found, Mishap::Garbled(said) if said.contains(event)), "{event}: {found:?}");
        }
        let failed = Said::read(br#"{"error":{"message":"out of memory"}}"#, 1);
        assert_eq!(failed, Err(Mishap::Said("out of memory".into())));
    }
}
