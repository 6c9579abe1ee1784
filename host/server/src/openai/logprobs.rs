//! Log-probabilities in the two shapes that clients know: chat (an object per token) and completions (parallel lists).

use std::collections::BTreeMap;
use std::sync::Arc;

use pointsman_sched::request::TokenLogprobs;
use serde::ser::SerializeSeq as _;
use serde::{Serialize, Serializer};

use crate::stream::Token;
use crate::text::TextModel;

/// JSON has no infinity; vLLM's stand-in for a token that was impossible.
const IMPOSSIBLE: f32 = -9_999.0;

/// `choices[].logprobs` of a chat completion.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

/// One token of it.
#[derive(Debug, Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    chosen: Entry,
    top_logprobs: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// `choices[].logprobs` of a completion.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Tops>>,
    text_offset: Vec<usize>,
    /// Characters of the text so far.
    #[serde(skip)]
    n_chars: usize,
}

/// Tokens and their log-probabilities, in this order, as an object. Not a map of values, which would make other numbers of them
/// (64 bits) than those in the list beside it.
#[derive(Debug)]
struct Tops(Vec<(String, f32)>);

/// `choices[].prompt_logprobs` of a completion, as vLLM has it: for each token an object of tokens by id, its own and the most likely.
/// Written from the numbers at once: as values it would take several times what the answer does.
#[derive(Debug)]
pub(super) struct PromptLogprobs<'a> {
    pub(super) text: &'a TextModel,
    pub(super) tokens: Arc<[u32]>,
    /// Of each token but the first.
    pub(super) scores: &'a [TokenLogprobs],
    pub(super) top: usize,
}

/// A token of it.
#[derive(Debug, Serialize)]
struct Ranked {
    logprob: f32,
    /// 1 for the most likely; none for one that is not among those that were asked for.
    rank: Option<usize>,
    decoded_token: String,
}

impl Serialize for Tops {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.tokens.len()))?;
        list.serialize_element(&None::<()>)?;
        for (&token, TokenLogprobs { chosen, top }) in self.tokens.iter().skip(1).zip(self.scores) {
            let ranked = |(i, &(id, logprob)): (usize, &(u32, f32))| (id, self.ranked(id, logprob, Some(i + 1)));
            let mut all: BTreeMap<u32, Ranked> = top.iter().take(self.top).enumerate().map(ranked).collect();
            let rank = || top.iter().position(|(id, _)| *id == token).map(|i| i + 1);
            all.entry(token).or_insert_with(|| self.ranked(token, *chosen, rank()));
            list.serialize_element(&all)?;
        }
        list.end()
    }
}

impl PromptLogprobs<'_> {
    fn ranked(&self, id: u32, logprob: f32, rank: Option<usize>) -> Ranked {
        let decoded_token = String::from_utf8_lossy(&self.text.token_bytes(id)).into_owned();
        Ranked { logprob: finite(logprob), rank, decoded_token }
    }
}

impl ChatToken {
    /// `None` when the engine sent no log-probabilities with the token.
    pub(super) fn of(text: &TextModel, token: &Token) -> Option<Self> {
        let logprobs = token.logprobs.as_ref()?;
        let top_logprobs = logprobs.top.iter().map(|&(id, logprob)| Entry::of(text, id, logprob)).collect();
        Some(Self { chosen: Entry::of(text, token.id, logprobs.chosen), top_logprobs })
    }
}

impl ChatLogprobs {
    pub(super) fn of(content: Vec<ChatToken>) -> Self {
        Self { content, refusal: None }
    }
}

impl Entry {
    fn of(text: &TextModel, id: u32, logprob: f32) -> Self {
        let bytes = text.token_bytes(id);
        Self { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
    }
}

impl CompletionLogprobs {
    /// Begins with the tokens of a prompt, whose text is `echo`. Nothing precedes the first: it has no log-probability.
    /// With `top` others for each of the rest.
    pub(super) fn prompt(
        text: &TextModel,
        (tokens, echo): (&[u32], &str),
        (scores, top): (&[TokenLogprobs], usize),
    ) -> Self {
        let mut logprobs = Self::default();
        let mut rest = echo.as_bytes();
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for (&token, score) in tokens.iter().zip(scores) {
            let bytes = text.token_bytes(token);
            let said = rest.len().min(written(&bytes, rest, text.is_special(token)));
            let (said, after) = rest.split_at(said);
            rest = after;
            logprobs.add(
                (text, &bytes),
                score.map(|score| (score.chosen, &score.top[..top.min(score.top.len())])),
                said,
            );
        }
        logprobs.n_chars = echo.chars().count();
        logprobs
    }

    /// Adds a generated token.
    pub(super) fn push(&mut self, text: &TextModel, token: &Token) {
        if let Some(logprobs) = &token.logprobs {
            let bytes = text.token_bytes(token.id);
            self.add((text, &bytes), Some((logprobs.chosen, &logprobs.top)), &bytes);
        }
    }

    /// Adds a token that stands in the text as `said`. It is among the most likely ones in any case, as the last of them at least.
    fn add(&mut self, (text, bytes): (&TextModel, &[u8]), score: Option<(f32, &[(u32, f32)])>, said: &[u8]) {
        let name = |id: u32| String::from_utf8_lossy(&text.token_bytes(id)).into_owned();
        let own = String::from_utf8_lossy(bytes).into_owned();
        let tops = |(chosen, top): (f32, &[(u32, f32)])| {
            let mut tops: Vec<(String, f32)> = Vec::with_capacity(top.len() + 1);
            let named = top.iter().map(|&(id, logprob)| (name(id), logprob));
            // Parts of characters may have one name: the object has it once, for the most likely.
            for (token, logprob) in named.chain([(own.clone(), chosen)]) {
                if !tops.iter().any(|(other, _)| *other == token) {
                    tops.push((token, finite(logprob)));
                }
            }
            Tops(tops)
        };
        self.top_logprobs.push(score.map(tops));
        self.token_logprobs.push(score.map(|(chosen, _)| finite(chosen)));
        self.tokens.push(own);
        // One that goes on with a character begins where that does.
        let is_inside = said.first().is_some_and(|byte| !begins_character(*byte));
        self.text_offset.push(self.n_chars.saturating_sub(is_inside.into()));
        self.n_chars += said.iter().filter(|byte| begins_character(**byte)).count();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// What has not been taken yet; the next one goes on where it ends.
    pub(super) fn take(&mut self) -> Option<Self> {
        let rest = Self { n_chars: self.n_chars, ..Self::default() };
        let taken = std::mem::replace(self, rest);
        (!taken.is_empty()).then_some(taken)
    }
}

/// How much of what is left of a text a token of it takes: its bytes, without a space where the tokenizer has put one before the
/// text, and nothing where it is a mark that is not written. A tokenizer that rewrites its text is taken at its lengths.
fn written(bytes: &[u8], rest: &[u8], is_special: bool) -> usize {
    let without_space = bytes.strip_prefix(b" ").filter(|_| !rest.starts_with(b" "));
    match without_space {
        _ if rest.starts_with(bytes) => bytes.len(),
        Some(bytes) if rest.starts_with(bytes) => bytes.len(),
        _ if is_special => 0,
        _ => bytes.len(),
    }
}

/// Whether a byte of UTF-8 begins a character.
fn begins_character(byte: u8) -> bool {
    byte & 0xc0 != 0x80
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
