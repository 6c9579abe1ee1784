//! Newline-delimited JSON events with stages and progress, for clients that want to show more than text.
//!
//! One object per line: `loading` while the model is loaded on demand, `queued`, `started`, `prefill`, `prompt`, `token`, `finished`, `done`, `error`; each but the last says its stage and
//! how far the request is. An upstream's pieces have no token ids and are `text`. The same for every route that generates. Where
//! a draft comes first, all its lines have the stage `draft`, it may have `failed`, and `replace` puts an end to what it said.

use std::sync::Arc;

use serde::Serialize;

use super::Usage;
use super::generate::Head;
use super::progress::{Decoded, Progress};
use crate::demand::Loading;
use crate::dispatch::Origin;
use crate::error::ApiError;
use crate::stream::{Encode, Totals, Update};

/// Writes one generation.
#[derive(Debug)]
pub(super) struct NdjsonEncoder {
    head: Head,
    replica: Arc<str>,
    prompt_tokens: u32,
    progress: Progress,
    is_draft: bool,
}

/// How two answers ended.
#[derive(Debug, Serialize)]
pub(super) struct Both {
    #[serde(flatten)]
    pub(super) times: Times,
    pub(super) draft: DraftEnd,
}

/// How a draft ended.
#[derive(Debug, Serialize)]
pub(super) struct DraftEnd {
    pub(super) outcome: &'static str,
    /// None of one that never began.
    pub(super) usage: Option<Usage>,
    #[serde(flatten)]
    pub(super) times: Times,
}

/// When an answer was told, in milliseconds since its request came.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Times {
    /// None where there was nothing to tell.
    pub(super) first_token_ms: Option<f64>,
    pub(super) ended_ms: f64,
}

/// An event, and how far the request is with it.
#[derive(Serialize)]
struct Staged<'a> {
    #[serde(flatten)]
    line: Line<'a>,
    stage: &'static str,
    progress: u8,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line<'a> {
    /// `percent` is of the load, where it has begun.
    Loading {
        id: &'a str,
        created: u64,
        model: &'a str,
        percent: Option<u8>,
    },
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
    Prefill {
        index: usize,
        computed_tokens: u32,
        percent: u8,
    },
    /// How likely its tokens are, from the second one on.
    Prompt {
        index: usize,
        logprobs: Vec<f32>,
    },
    Token {
        index: usize,
        token: u32,
        text: &'a str,
        logprob: Option<f32>,
        /// So far, and at most.
        tokens: u32,
        max_tokens: u32,
        remaining_ms: Option<u64>,
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
    /// What was said so far makes room for what follows.
    Replace {},
    Done {
        usage: Usage,
        #[serde(flatten)]
        both: Option<&'a Both>,
    },
}

impl NdjsonEncoder {
    pub(super) fn new(head: &Head, origin: &Origin, totals: Totals, progress: Progress) -> Self {
        let (head, replica, prompt_tokens) = (head.clone(), Arc::clone(&origin.replica), totals.prompt);
        Self { head, replica, prompt_tokens, progress, is_draft: false }
    }

    /// The same for a draft.
    pub(super) fn drafting(self) -> Self {
        Self { is_draft: true, ..self }
    }

    fn line(&self, out: &mut Vec<u8>, stage: &'static str, line: Line<'_>) {
        let stage = if self.is_draft { "draft" } else { stage };
        write(out, &Staged { line, stage, progress: self.progress.percent() });
    }

    /// Takes back what a draft said.
    pub(super) fn replace(&self, out: &mut Vec<u8>) {
        self.line(out, "decode", Line::Replace {});
    }
}

impl Encode for NdjsonEncoder {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let Head { id, created, model } = &self.head;
        let (created, prompt_tokens) = (*created, self.prompt_tokens);
        self.line(out, "queued", Line::Queued { id, created, model, replica: &self.replica, prompt_tokens });
    }

    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let delta = match update {
            Update::Started { choice: index, queued_us, cached_tokens } => {
                let (index, queued_us, cached_tokens) = (*index, *queued_us, *cached_tokens);
                self.progress.prefilled(index, cached_tokens);
                return self.line(out, "prefill", Line::Started { index, queued_us, cached_tokens });
            }
            Update::Prefilled { choice, tokens } => {
                let index = *choice;
                let (computed_tokens, percent) = self.progress.prefilled(index, *tokens);
                return self.line(out, "prefill", Line::Prefill { index, computed_tokens, percent });
            }
            Update::Scored { choice, scores } => {
                let logprobs = scores.iter().map(|score| score.chosen).collect();
                return self.line(out, "prefill", Line::Prompt { index: *choice, logprobs });
            }
            Update::Delta(delta) => delta,
        };
        let index = delta.choice;
        let mut text = delta.text.as_str();
        if let Some(token) = &delta.token {
            let logprob = token.logprobs.as_ref().map(|l| l.chosen).filter(|l| l.is_finite());
            let Decoded { tokens, max_tokens, remaining_ms } = self.progress.token(index);
            let token = token.id;
            let line = Line::Token { index, token, text, logprob, tokens, max_tokens, remaining_ms };
            self.line(out, "decode", line);
            text = "";
        } else if delta.raw.is_some() && !text.is_empty() {
            self.line(out, "decode", Line::Text { index, text: std::mem::take(&mut text) });
        }
        if let Some(finish) = delta.finish {
            self.progress.ended(index);
            self.line(out, "decode", Line::Finished { index, text, finish_reason: finish.as_str() });
        }
    }

    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        broken(out, error);
    }

    fn end(&mut self, out: &mut Vec<u8>, totals: Totals) {
        done(out, totals, None);
    }
}

/// A model is on its way for which the request waits.
pub(super) fn loading(out: &mut Vec<u8>, (id, created): (&str, u64), loading: &Loading) {
    let Loading { model, percent } = loading;
    let line = Line::Loading { id, created, model, percent: *percent };
    write(out, &Staged { line, stage: "loading", progress: 0 });
}

/// The last line of what went well.
pub(super) fn done(out: &mut Vec<u8>, totals: Totals, both: Option<&Both>) {
    write(out, &Staged { line: Line::Done { usage: totals.into(), both }, stage: "done", progress: 100 });
}

/// The last line of what did not.
pub(super) fn broken(out: &mut Vec<u8>, error: &ApiError) {
    write_error(out, br#"{"event":"error","#, error);
}

/// There is no more of the draft; the final answer goes on.
pub(super) fn draft_failed(out: &mut Vec<u8>, error: &ApiError) {
    write_error(out, br#"{"event":"failed","stage":"draft","#, error);
}

/// The error object with the tag in front, so that every line has one.
fn write_error(out: &mut Vec<u8>, tag: &[u8], error: &ApiError) {
    out.extend_from_slice(tag);
    out.extend_from_slice(error.json().as_bytes().get(1..).unwrap_or_default());
    out.push(b'\n');
}

fn write(out: &mut Vec<u8>, value: &Staged<'_>) {
    if let Err(error) = serde_json::to_writer(&mut *out, value) {
        tracing::error!(%error, "an event could not be written as JSON; this is a bug of the host");
    }
    out.push(b'\n');
}
