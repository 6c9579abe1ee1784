//! Log-probabilities in the two shapes that clients know: chat (an object per token) and completions (parallel lists).

use serde::Serialize;

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
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<serde_json::Map<String, serde_json::Value>>,
    text_offset: Vec<usize>,
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
    /// Adds a token that begins `offset` characters into the text; answers its length in characters.
    pub(super) fn push(&mut self, text: &TextModel, token: &Token, offset: usize) -> usize {
        let Some(logprobs) = &token.logprobs else { return 0 };
        let name = |id: u32| String::from_utf8_lossy(&text.token_bytes(id)).into_owned();
        let top = logprobs.top.iter().map(|&(id, logprob)| (name(id), finite(logprob).into())).collect();
        let token = name(token.id);
        let length = token.chars().count();
        self.tokens.push(token);
        self.token_logprobs.push(finite(logprobs.chosen));
        self.top_logprobs.push(top);
        self.text_offset.push(offset);
        length
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
