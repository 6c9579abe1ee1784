//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, describe, mismatch};
use super::generate::{Arrival, Collected, Head, Job, Running, tokenizing};
use super::logprobs::{ChatLogprobs, ChatToken};
use super::params::Params;
use super::{Usage, read_fields};
use crate::dispatch::{Prompt, Target};
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;
use crate::stream::{Encode, Totals, Update};
use crate::text::{ChatMessage, TextModel};

/// Messages of one request; far beyond any context of today, and a bound all the same.
const MAX_MESSAGES: usize = 16_384;

/// A parsed body.
#[derive(Debug)]
pub(super) struct ChatRequest {
    params: Params,
    pub(super) conversation: Conversation,
}

/// What the chat template renders.
#[derive(Debug)]
pub(super) struct Conversation {
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    template_kwargs: Option<serde_json::Map<String, Value>>,
}

/// Handles the route.
pub(crate) async fn chat(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    let arrival = Arrival::new(&state, caller, tag, request.headers());
    let permit = arrival.admit()?;
    let mut fields = read_fields(&state, request).await?;
    let ChatRequest { mut params, conversation } = ChatRequest::parse(&mut fields, &state)?;
    let target = Target::find(&state.engine.catalog(), &params.model)?;
    let grammar = params.grammar(&state, &target).await?;
    let prompt = conversation.prompt(target.text(), state.clock.unix_seconds()).await?;
    let n_choices = params.n as usize;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let default_tokens = target.text().defaults().max_new_tokens;
    let job = Job { params, target, prompts: vec![prompt], grammar, default_tokens, prompt_param: "messages" };
    let running = arrival.start(&job, permit)?;
    drop(job);
    if stream || running.wants_events() {
        return running.stream(|running| Box::new(ChatSse::new(running, n_choices, include_usage))).await;
    }
    running.whole(n_choices, write_whole).await
}

// === impl ChatRequest ===

impl ChatRequest {
    fn parse(fields: &mut Fields, state: &ServerState) -> Result<Self, ApiError> {
        let logprobs = logprobs(fields)?;
        let conversation = Conversation::parse(fields)?;
        Ok(Self { params: Params::parse(fields, &state.config, logprobs)?, conversation })
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.u32("top_logprobs", 0..=20)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
    }
    Ok(wanted.then(|| u8::try_from(top.unwrap_or(0)).unwrap_or(20)))
}

// === impl Conversation ===

impl Conversation {
    pub(super) fn parse(fields: &mut Fields) -> Result<Self, ApiError> {
        let messages = match fields.require("messages")? {
            Value::Array(messages) if messages.is_empty() => {
                return Err(ApiError::invalid("messages", "`messages` must hold at least one message"));
            }
            Value::Array(messages) if messages.len() <= MAX_MESSAGES => messages,
            other => return Err(mismatch("messages", &format!("an array of at most {MAX_MESSAGES} messages"), &other)),
        };
        let messages = messages.into_iter().enumerate().map(|(i, m)| message(&format!("messages[{i}]"), m));
        let messages = messages.collect::<Result<_, _>>()?;
        let template_kwargs = match fields.take("chat_template_kwargs") {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => return Err(mismatch("chat_template_kwargs", "an object", &other)),
        };
        let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
        Ok(Self { messages, add_generation_prompt, template_kwargs })
    }

    /// Renders and tokenizes. `now` is in Unix seconds, for templates that tell the date.
    pub(super) async fn prompt(self, text: &Arc<TextModel>, now: u64) -> Result<Prompt, ApiError> {
        let bytes = self.messages.iter().map(|m| m.content.len() + m.role.len()).sum();
        let text = Arc::clone(text);
        tokenizing(bytes, move || {
            let invalid = |error: crate::text::EncodeError| ApiError::invalid("messages", error.to_string());
            let rendered = text.render(&self.messages, self.add_generation_prompt, self.template_kwargs.as_ref(), now);
            let rendered = rendered.map_err(invalid)?;
            let tokens = text.encode(&rendered, false).map_err(invalid)?;
            Ok(Prompt { tokens: tokens.into(), text: rendered })
        })
        .await
    }
}

fn message(path: &str, value: Value) -> Result<ChatMessage, ApiError> {
    let mut fields = Fields::of(path, value)?;
    let role = match fields.require("role")? {
        // Templates know the older name of what OpenAI now calls `developer`.
        Value::String(role) if role == "developer" => "system".to_owned(),
        Value::String(role) if matches!(&*role, "system" | "user" | "assistant") => role,
        Value::String(role) if matches!(&*role, "tool" | "function") => {
            return Err(ApiError::unsupported(fields.param("role"), format!("the role `{role}` (tool calling)")));
        }
        other => return Err(mismatch(&fields.param("role"), "system, developer, user or assistant", &other)),
    };
    if fields.take("tool_calls").is_some_and(|calls| calls != Value::Array(Vec::new())) {
        return Err(ApiError::unsupported(fields.param("tool_calls"), "`tool_calls` (tool calling)"));
    }
    let name = fields.string("name")?;
    let content = content(&fields.param("content"), fields.require("content")?)?;
    Ok(ChatMessage { role, content, name })
}

/// Text, or parts of text; parts are joined by line breaks, as vLLM joins them.
fn content(param: &str, value: Value) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(mismatch(param, "a string or an array of text parts", &other)),
    };
    let part = |(i, value): (usize, Value)| {
        let mut fields = Fields::of(&format!("{param}[{i}]"), value)?;
        match fields.require("type")? {
            Value::String(kind) if kind == "text" => {}
            Value::String(kind) => {
                return Err(ApiError::unsupported(fields.param("type"), format!("content of type `{kind}`")));
            }
            other => return Err(mismatch(&fields.param("type"), "a string", &other)),
        }
        match fields.require("text")? {
            Value::String(text) => Ok(text),
            other => Err(ApiError::invalid(
                fields.param("text"),
                format!("`{}` must be a string, found {}", fields.param("text"), describe(&other)),
            )),
        }
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

// === On the wire ===

#[derive(Serialize)]
struct ChatCompletion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: DeltaMessage<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct DeltaMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

fn write_whole(head: &Head, text: &TextModel, choices: Vec<Collected>, usage: Usage) -> Vec<u8> {
    let choice = |(index, choice): (usize, &'_ Collected)| {
        let content: Vec<ChatToken> = choice.tokens.iter().filter_map(|token| ChatToken::of(text, token)).collect();
        (index, (!content.is_empty()).then(|| ChatLogprobs::of(content)))
    };
    let logprobs: Vec<_> = choices.iter().enumerate().map(choice).collect();
    let choices = choices.iter().zip(logprobs).map(|(choice, (index, logprobs))| WholeChoice {
        index,
        message: Message { role: "assistant", content: &choice.text, refusal: None },
        logprobs,
        finish_reason: choice.finish.map(|f| f.as_str()),
    });
    let Head { id, created, model } = head;
    let created = *created;
    let whole = ChatCompletion { id, object: "chat.completion", created, model, choices: choices.collect(), usage };
    serde_json::to_vec(&whole).unwrap_or_default()
}

/// Server-sent events of a chat completion.
#[derive(Debug)]
struct ChatSse {
    head: Head,
    text: Arc<TextModel>,
    include_usage: bool,
    /// Choices whose role has been sent.
    opened: Vec<bool>,
}

impl ChatSse {
    fn new(running: &Running, n_choices: usize, include_usage: bool) -> Self {
        let (head, text) = (running.head.clone(), Arc::clone(&running.text));
        Self { head, text, include_usage, opened: vec![false; n_choices] }
    }

    fn chunk(&self, out: &mut Vec<u8>, choices: &[ChunkChoice<'_>], usage: Option<Usage>) {
        let Head { id, created, model } = &self.head;
        let usage = self.include_usage.then_some(usage);
        let chunk = Chunk { id, object: "chat.completion.chunk", created: *created, model, choices, usage };
        super::sse(out, &chunk);
    }
}

impl Encode for ChatSse {
    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let Update::Delta(delta) = update else { return };
        let index = delta.choice;
        if let Some(opened) = self.opened.get_mut(index).filter(|opened| !**opened) {
            *opened = true;
            let delta = DeltaMessage { role: Some("assistant"), content: Some("") };
            self.chunk(out, &[ChunkChoice { index, delta, logprobs: None, finish_reason: None }], None);
        }
        let logprobs =
            delta.token.as_ref().and_then(|t| ChatToken::of(&self.text, t)).map(|token| ChatLogprobs::of(vec![token]));
        if !delta.text.is_empty() || logprobs.is_some() {
            let message = DeltaMessage { role: None, content: Some(&delta.text) };
            self.chunk(out, &[ChunkChoice { index, delta: message, logprobs, finish_reason: None }], None);
        }
        if let Some(finish) = delta.finish {
            let message = DeltaMessage { role: None, content: None };
            let finish_reason = Some(finish.as_str());
            self.chunk(out, &[ChunkChoice { index, delta: message, logprobs: None, finish_reason }], None);
        }
    }

    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        super::sse_error(out, error);
    }

    fn end(&mut self, out: &mut Vec<u8>, totals: Totals) {
        if self.include_usage {
            self.chunk(out, &[], Some(totals.into()));
        }
        super::sse_done(out);
    }
}
