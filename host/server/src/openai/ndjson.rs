//! Newline-delimited JSON events with stages and progress, for clients that want to show more than text.
//!
//! One object per line: `queued`, `started`, `token`, `finished`, `done`, `error`; an upstream's pieces have no token ids and
//! are `text`. The same for chat and completions.

use std::sync::Arc;

use serde::Serialize;

use super::Usage;
use super::generate::Head;
use crate::dispatch::Origin;
use crate::error::ApiError;
use crate::stream::{Encode, Totals, Update};

/// Writes one generation.
#[derive(Debug)]
pub(super) struct NdjsonEncoder {
    head: Head,
    replica: Arc<str>,
    prompt_tokens: u32,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line<'a> {
    Queued {
        id: &'a str,
        created: u64,
        model: &'a str,
        replica: &'a str,
        prompt_tokens: u32,
    },
    Started {
        index: usize,
        queued_us: u64,
        cached_tokens: u32,
    },
    Token {
        index: usize,
        token: u32,
        text: &'a str,
        logprob: Option<f32>,
    },
    /// A piece of which nobody here knows the tokens.
    Text {
        index: usize,
        text: &'a str,
    },
    /// `text` is what had been held back.
    Finished {
        index: usize,
        text: &'a str,
        finish_reason: &'static str,
    },
    Done {
        usage: Usage,
    },
}

impl NdjsonEncoder {
    pub(super) fn new(head: &Head, origin: &Origin, totals: Totals) -> Self {
        Self { head: head.clone(), replica: Arc::clone(&origin.replica), prompt_tokens: totals.prompt }
    }
}

impl Encode for NdjsonEncoder {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let Head { id, created, model } = &self.head;
        let (created, prompt_tokens) = (*created, self.prompt_tokens);
        line(out, &Line::Queued { id, created, model, replica: &self.replica, prompt_tokens });
    }

    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let delta = match update {
            Update::Started { choice: index, queued_us, cached_tokens } => {
                let (queued_us, cached_tokens) = (*queued_us, *cached_tokens);
                return line(out, &Line::Started { index: *index, queued_us, cached_tokens });
            }
            Update::Delta(delta) => delta,
        };
        let index = delta.choice;
        let mut text = delta.text.as_str();
        if let Some(token) = &delta.token {
            let logprob = token.logprobs.as_ref().map(|l| l.chosen).filter(|l| l.is_finite());
            line(out, &Line::Token { index, token: token.id, text, logprob });
            text = "";
        } else if delta.raw.is_some() && !text.is_empty() {
            line(out, &Line::Text { index, text: std::mem::take(&mut text) });
        }
        if let Some(finish) = delta.finish {
            line(out, &Line::Finished { index, text, finish_reason: finish.as_str() });
        }
    }

    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        // The error object with the tag in front, so that every line has one.
        out.extend_from_slice(br#"{"event":"error","#);
        out.extend_from_slice(error.json().as_bytes().get(1..).unwrap_or_default());
        out.push(b'\n');
    }

    fn end(&mut self, out: &mut Vec<u8>, totals: Totals) {
        line(out, &Line::Done { usage: totals.into() });
    }
}

fn line<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    if let Err(error) = serde_json::to_writer(&mut *out, value) {
        tracing::error!(%error, "an event could not be written as JSON; this is a bug of the host");
    }
    out.push(b'\n');
}
