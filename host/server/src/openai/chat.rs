//! `POST /v1/chat/completions`.
//!
//! Where tools may be called, what the model writes goes through a reader of calls on its way out, whole or in parts alike.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::blocks::parts;
use super::conversation::{Answering, Conversation, Talk, content, elements};
use super::fields::{Fields, mismatch};
use super::generate::{Answer, Arrival, Collected, Head, Running, Shape, serve};
use super::logprobs::{ChatLogprobs, ChatToken};
use super::params::{Own, Params};
use super::tools::{CallDelta, CallRules, CallStream, Part, Tools, whole};
use super::{Usage, relayed};
use crate::admission::Permit;
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;
use crate::stream::{Delta, Encode, Finish, Totals, Update};
use crate::text::{ChatMessage, TextModel};

/// Handles the route.
pub(crate) async fn chat(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    serve(Arrival::new(&state, caller, tag, request.headers()), request, begin).await
}

/// From a body to what it asked for, under way.
pub(crate) async fn begin(arrival: Arrival, permit: Permit, mut fields: Fields) -> Result<Answer, ApiError> {
    let body = arrival.sent(&fields);
    let talk = talk(&mut fields, &arrival.state.config)?.sent_as(body);
    let answering = talk.start(&arrival, permit).await?;
    let Answering { running, rules, n_choices, streams, include_usage, .. } = answering;
    Ok(Answer { running, n_choices, streams, shape: Box::new(ChatShape { rules, n_choices, include_usage }) })
}

fn talk(fields: &mut Fields, config: &ServerConfig) -> Result<Talk, ApiError> {
    let logprobs = logprobs(fields)?;
    let conversation = conversation(fields)?;
    let tools = Tools::parse(fields)?;
    let own = Own::openai(fields, config, logprobs)?;
    Talk::new(Params::parse(fields, config, own)?, tools, conversation)
}

fn logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.u32("top_logprobs", 0..=20)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
    }
    Ok(wanted.then(|| u8::try_from(top.unwrap_or(0)).unwrap_or(20)))
}

/// Reads the messages and what goes to the template beside them.
pub(super) fn conversation(fields: &mut Fields) -> Result<Conversation, ApiError> {
    let messages = elements("messages", "messages", fields.require("messages")?)?;
    let messages = messages.into_iter().enumerate().map(|(i, m)| message(&format!("messages[{i}]"), m));
    let mut conversation = Conversation::new("messages", messages.collect::<Result<_, _>>()?);
    conversation.template_kwargs = match fields.take("chat_template_kwargs") {
        None => None,
        Some(Value::Object(map)) => Some(map),
        Some(other) => return Err(mismatch("chat_template_kwargs", "an object", &other)),
    };
    conversation.add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
    Ok(conversation)
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
        "tool" => Some(fields.text("tool_call_id")?),
        _ => None,
    };
    let name = fields.string("name")?;
    let param = fields.param("content");
    let content = match fields.take("content") {
        None if !tool_calls.is_empty() => String::new(),
        None => return Err(ApiError::invalid(&*param, format!("`{param}` is required"))),
        Some(value) if role == "assistant" => content(&param, value, &["text", "refusal"])?,
        Some(value) => content(&param, value, &["text"])?,
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
        function.text("name")?;
        let written = function.string("arguments")?.unwrap_or_default();
        let arguments = serde_json::from_str(&written).unwrap_or(Value::String(written));
        call["function"]["arguments"] = arguments;
        Ok(call)
    };
    calls.into_iter().enumerate().map(read).collect()
}

/// How a chat is written.
#[derive(Debug)]
struct ChatShape {
    rules: Option<CallRules>,
    n_choices: usize,
    include_usage: bool,
}

impl Shape for ChatShape {
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode> {
        Box::new(ChatSse::new(running, self.n_choices, self.include_usage, self.rules.as_ref()))
    }

    fn whole(self: Box<Self>, names: (&Head, &TextModel), mut choices: Vec<Collected>, totals: Totals) -> Vec<u8> {
        let relayed = relayed::whole(names.0, "chat.completion", &mut choices, totals);
        relayed.unwrap_or_else(|| write_whole(names, &choices, self.rules.as_ref(), totals.into()))
    }
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
            Some(finish) if finish.is_stop() && !calls.is_empty() => Some(rules.finish_reason()),
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
        if let Some(raw) = &delta.raw {
            return relayed::chunk(out, &self.head, ("chat.completion.chunk", self.include_usage), raw);
        }
        let index = delta.choice;
        let Some(progress) = self.choices.get_mut(index) else { return };
        let opens = !std::mem::replace(&mut progress.is_open, true);
        let parts = parts(&mut progress.calls, delta);
        let n_calls = progress.calls.as_ref().map_or(0, CallStream::n_calls);
        if opens {
            self.say(out, index, DeltaMessage { role: Some("assistant"), content: Some(""), tool_calls: &[] });
        }
        self.parts(out, delta, &parts);
        if let Some(finish) = delta.finish {
            let finish_reason = match (&self.rules, finish) {
                (Some(rules), finish) if finish.is_stop() && n_calls > 0 => rules.finish_reason(),
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
