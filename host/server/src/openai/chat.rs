//! `POST /v1/chat/completions`.
//!
//! Where tools may be called, what the model writes goes through a reader of calls on its way out, whole or in parts alike.

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
use super::tools::{CallDelta, CallRules, CallStream, Part, Tools, whole};
use super::{Usage, read_fields};
use crate::dispatch::{Prompt, Target};
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;
use crate::stream::{Delta, Encode, Finish, Totals, Update};
use crate::text::{ChatMessage, TextModel};

/// Messages of one request; far beyond any context of today, and a bound all the same.
const MAX_MESSAGES: usize = 16_384;

/// A parsed body.
#[derive(Debug)]
pub(super) struct ChatRequest {
    params: Params,
    tools: Option<Tools>,
    conversation: Conversation,
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
    let ChatRequest { mut params, tools, conversation } = ChatRequest::parse(&mut fields, &state)?;
    let target = Target::find(&state.engine.catalog(), &params.model)?;
    let rules = tools.map(|tools| tools.rules(target.text())).transpose()?;
    params.skip_special &= !rules.as_ref().is_some_and(CallRules::wants_special_tokens);
    let grammar = params.grammar(&state, &target).await?;
    let prompt = conversation.prompt(target.text(), state.clock.unix_seconds()).await?;
    let n_choices = params.n as usize;
    let (stream, include_usage) = (params.stream, params.include_usage);
    let default_tokens = target.text().defaults().max_new_tokens;
    let job = Job { params, target, prompts: vec![prompt], grammar, default_tokens, prompt_param: "messages" };
    let running = arrival.start(&job, permit)?;
    drop(job);
    if stream || running.wants_events() {
        return running
            .stream(|running| Box::new(ChatSse::new(running, n_choices, include_usage, rules.as_ref())))
            .await;
    }
    running
        .whole(n_choices, |head, text, choices, usage| write_whole((head, text), &choices, rules.as_ref(), usage))
        .await
}

// === impl ChatRequest ===

impl ChatRequest {
    fn parse(fields: &mut Fields, state: &ServerState) -> Result<Self, ApiError> {
        let logprobs = logprobs(fields)?;
        let mut conversation = Conversation::parse(fields)?;
        let tools = Tools::parse(fields)?;
        let mut params = Params::parse(fields, &state.config, logprobs)?;
        if let Some(tools) = &tools {
            tools.show(&mut conversation.template_kwargs);
            params.force(tools.format()?)?;
        }
        Ok(Self { params, tools, conversation })
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
        // Tools and calls may be long, and are not worth the counting.
        let is_long = self.template_kwargs.is_some() || self.messages.iter().any(|m| !m.tool_calls.is_empty());
        let texts = self.messages.iter().map(|m| m.content.len() + m.role.len()).sum();
        let bytes = if is_long { usize::MAX } else { texts };
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
        Value::String(role) if matches!(&*role, "system" | "user" | "assistant" | "tool") => role,
        Value::String(role) if role == "function" => {
            return Err(ApiError::unsupported(fields.param("role"), "the role `function`, which `tool` replaces,"));
        }
        other => return Err(mismatch(&fields.param("role"), "system, developer, user, assistant or tool", &other)),
    };
    let tool_calls = match fields.take("tool_calls") {
        Some(calls) if role == "assistant" => past_calls(&fields.param("tool_calls"), calls)?,
        Some(calls) if calls != Value::Array(Vec::new()) => {
            let problem = format!("`{}` belongs to messages of the assistant", fields.param("tool_calls"));
            return Err(ApiError::invalid(fields.param("tool_calls"), problem));
        }
        _ => Vec::new(),
    };
    let tool_call_id = match &*role {
        "tool" => match fields.require("tool_call_id")? {
            Value::String(id) => Some(id),
            other => return Err(mismatch(&fields.param("tool_call_id"), "a string", &other)),
        },
        _ => None,
    };
    let name = fields.string("name")?;
    let param = fields.param("content");
    let content = match fields.take("content") {
        None if !tool_calls.is_empty() => String::new(),
        None => return Err(ApiError::invalid(&*param, format!("`{param}` is required"))),
        Some(value) => content(&param, value)?,
    };
    Ok(ChatMessage { role, content, name, tool_calls, tool_call_id })
}

/// Calls of an earlier turn, with their arguments as JSON where they are JSON: what a model once wrote may be anything.
fn past_calls(param: &str, value: Value) -> Result<Vec<Value>, ApiError> {
    let calls = match value {
        Value::Array(calls) => calls,
        other => return Err(mismatch(param, "an array of calls", &other)),
    };
    let read = |(i, mut call): (usize, Value)| {
        let mut fields = Fields::of(&format!("{param}[{i}]"), call.clone())?;
        let path = fields.param("function");
        let mut function = Fields::of(&path, fields.require("function")?)?;
        if function.string("name")?.is_none() {
            let name = function.param("name");
            return Err(ApiError::invalid(&*name, format!("`{name}` is required")));
        }
        let written = function.string("arguments")?.unwrap_or_default();
        let arguments = serde_json::from_str(&written).unwrap_or(Value::String(written));
        call["function"]["arguments"] = arguments;
        Ok(call)
    };
    calls.into_iter().enumerate().map(read).collect()
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
    /// None where all that was said are calls.
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [CallDelta],
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

#[derive(Default, Serialize)]
struct DeltaMessage<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [CallDelta],
}

/// What a choice has said: content, calls, and how it ended.
struct Spoken {
    content: String,
    calls: Vec<CallDelta>,
    finish_reason: Option<&'static str>,
}

impl Spoken {
    fn of(choice: &Collected, calls: Option<(CallStream, &CallRules)>) -> Self {
        let ended = choice.finish.map(Finish::as_str);
        let Some((mut stream, rules)) = calls else {
            return Self { content: choice.text.clone(), calls: Vec::new(), finish_reason: ended };
        };
        let (content, calls) = whole(stream.push(&choice.text, true));
        let finish_reason = match choice.finish {
            Some(Finish::Stop) if !calls.is_empty() => Some(rules.finish_reason()),
            _ => ended,
        };
        Self { content, calls, finish_reason }
    }
}

fn write_whole(
    (head, text): (&Head, &TextModel),
    choices: &[Collected],
    rules: Option<&CallRules>,
    usage: Usage,
) -> Vec<u8> {
    let stream = |index| rules.map(|rules| (rules.stream(&head.id, index), rules));
    let spoken: Vec<Spoken> = choices.iter().enumerate().map(|(i, choice)| Spoken::of(choice, stream(i))).collect();
    let logprobs = |choice: &Collected| {
        let content: Vec<ChatToken> = choice.tokens.iter().filter_map(|token| ChatToken::of(text, token)).collect();
        (!content.is_empty()).then(|| ChatLogprobs::of(content))
    };
    let choices = choices.iter().zip(&spoken).enumerate().map(|(index, (choice, said))| {
        let content = (said.calls.is_empty() || !said.content.is_empty()).then_some(&*said.content);
        let message = Message { role: "assistant", content, refusal: None, tool_calls: &said.calls };
        WholeChoice { index, message, logprobs: logprobs(choice), finish_reason: said.finish_reason }
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
    choices: Vec<Progress>,
    rules: Option<CallRules>,
}

/// How far a choice has come.
#[derive(Debug)]
struct Progress {
    /// Whether its role has been sent.
    is_open: bool,
    calls: Option<CallStream>,
}

impl ChatSse {
    fn new(running: &Running, n_choices: usize, include_usage: bool, rules: Option<&CallRules>) -> Self {
        let (head, text) = (running.head.clone(), Arc::clone(&running.text));
        let calls = |choice| rules.map(|rules| rules.stream(&head.id, choice));
        let choices = (0..n_choices).map(|choice| Progress { is_open: false, calls: calls(choice) }).collect();
        Self { head, text, include_usage, choices, rules: rules.cloned() }
    }

    fn chunk(&self, out: &mut Vec<u8>, choices: &[ChunkChoice<'_>], usage: Option<Usage>) {
        let Head { id, created, model } = &self.head;
        let usage = self.include_usage.then_some(usage);
        let chunk = Chunk { id, object: "chat.completion.chunk", created: *created, model, choices, usage };
        super::sse(out, &chunk);
    }

    fn say(&self, out: &mut Vec<u8>, index: usize, delta: DeltaMessage<'_>) {
        self.chunk(out, &[ChunkChoice { index, delta, logprobs: None, finish_reason: None }], None);
    }

    /// What a delta says; its log-probabilities go with the first part, or alone.
    fn parts(&self, out: &mut Vec<u8>, delta: &Delta, parts: &[Part]) {
        let index = delta.choice;
        let token = delta.token.as_ref().and_then(|t| ChatToken::of(&self.text, t));
        let mut logprobs = token.map(|token| ChatLogprobs::of(vec![token]));
        let empty = [Part::Content(String::new())];
        for part in if parts.is_empty() && logprobs.is_some() { &empty[..] } else { parts } {
            let delta = match part {
                Part::Content(text) => DeltaMessage { content: Some(text), ..DeltaMessage::default() },
                Part::Call(call) => DeltaMessage { tool_calls: std::slice::from_ref(call), ..DeltaMessage::default() },
            };
            let logprobs = logprobs.take();
            self.chunk(out, &[ChunkChoice { index, delta, logprobs, finish_reason: None }], None);
        }
    }
}

impl Encode for ChatSse {
    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let Update::Delta(delta) = update else { return };
        let index = delta.choice;
        let Some(progress) = self.choices.get_mut(index) else { return };
        let opens = !std::mem::replace(&mut progress.is_open, true);
        let parts = match &mut progress.calls {
            Some(calls) => calls.push(&delta.text, delta.finish.is_some()),
            None if delta.text.is_empty() => Vec::new(),
            None => vec![Part::Content(delta.text.clone())],
        };
        let n_calls = progress.calls.as_ref().map_or(0, CallStream::n_calls);
        if opens {
            self.say(out, index, DeltaMessage { role: Some("assistant"), content: Some(""), tool_calls: &[] });
        }
        self.parts(out, delta, &parts);
        if let Some(finish) = delta.finish {
            let finish_reason = match (&self.rules, finish) {
                (Some(rules), Finish::Stop) if n_calls > 0 => rules.finish_reason(),
                _ => finish.as_str(),
            };
            let delta = DeltaMessage::default();
            self.chunk(out, &[ChunkChoice { index, delta, logprobs: None, finish_reason: Some(finish_reason) }], None);
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
