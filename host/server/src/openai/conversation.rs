//! A conversation, and the way that it goes in every shape: from what was parsed to a generation under way.
//!
//! Each shape reads its own messages, tools and names of fields and writes its own answer. What lies between is the same and
//! stands here once: the tools are shown to the template, the template is rendered, a forced call becomes a form.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::fields::{Fields, mismatch};
use super::generate::{Arrival, Job, Running, tokenizing};
use super::params::Params;
use super::tools::{CallRules, Tools};
use crate::admission::Permit;
use crate::demand;
use crate::dispatch::Prompt;
use crate::error::ApiError;
use crate::text::{ChatMessage, TextModel};
use crate::upstream::Onward;

/// Messages of one request, and parts of one message; far beyond any context of today, and a bound all the same.
pub(crate) const MAX_MESSAGES: usize = 16_384;

/// What the chat template renders.
#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<ChatMessage>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) template_kwargs: Option<serde_json::Map<String, Value>>,
    /// The field that holds the messages, for errors about them.
    pub(crate) param: &'static str,
}

/// A conversation with what is asked of its answer.
#[derive(Debug)]
pub(crate) struct Talk {
    params: Params,
    tools: Option<Tools>,
    conversation: Conversation,
    /// The body, where it is one of chat completions and an upstream may be sent it.
    body: Option<Map<String, Value>>,
}

/// The answer to a conversation, under way.
#[derive(Debug)]
pub(crate) struct Answering {
    pub(crate) running: Running,
    /// How calls are found in its texts; `None` where no tool may be called.
    pub(crate) rules: Option<CallRules>,
    pub(crate) n_choices: usize,
    /// Whether it is written as it comes.
    pub(crate) streams: bool,
    pub(crate) include_usage: bool,
    pub(crate) stop: Arc<[String]>,
}

// === impl Conversation ===

impl Conversation {
    /// Messages without anything that only some templates know.
    pub(crate) fn new(param: &'static str, messages: Vec<ChatMessage>) -> Self {
        Self { messages, add_generation_prompt: true, template_kwargs: None, param }
    }

    /// Renders and tokenizes. `now` is in Unix seconds, for templates that tell the date.
    pub(crate) async fn prompt(self, text: &Arc<TextModel>, now: u64) -> Result<Prompt, ApiError> {
        // Tools and calls may be long, and are not worth the counting.
        let is_long = self.template_kwargs.is_some() || self.messages.iter().any(|m| !m.tool_calls.is_empty());
        let texts = self.messages.iter().map(|m| m.content.len() + m.role.len()).sum();
        let bytes = if is_long { usize::MAX } else { texts };
        let text = Arc::clone(text);
        tokenizing(bytes, move || {
            let invalid = |error: crate::text::EncodeError| ApiError::invalid(self.param, error.to_string());
            let rendered = text.render(&self.messages, self.add_generation_prompt, self.template_kwargs.as_ref(), now);
            let rendered = rendered.map_err(invalid)?;
            let tokens = text.encode(&rendered, false).map_err(invalid)?;
            Ok(Prompt { tokens: tokens.into(), text: rendered })
        })
        .await
    }
}

/// A conversation of any shape as the body of a chat completion; none where it has no form there.
fn written(params: &Params, tools: Option<&Tools>, messages: &[ChatMessage]) -> Option<Map<String, Value>> {
    let mut body = Map::new();
    let messages = serde_json::to_value(messages).ok()?;
    body.insert("messages".to_owned(), with_written_arguments(messages));
    let has_form = params.write(&mut body);
    if let Some(tools) = tools {
        tools.write(&mut body);
        if tools.is_forced() {
            // The form is that of the calls.
            body.remove("response_format");
            return Some(body);
        }
    }
    has_form.then_some(body)
}

/// Arguments of past calls are objects here, for templates, and texts on the wire.
fn with_written_arguments(mut messages: Value) -> Value {
    let calls = |message: &mut Value| message.get_mut("tool_calls").and_then(Value::as_array_mut).map(std::mem::take);
    for message in messages.as_array_mut().into_iter().flatten() {
        let Some(mut calls) = calls(message) else { continue };
        for call in &mut calls {
            let arguments = &mut call["function"]["arguments"];
            if !arguments.is_string() {
                *arguments = arguments.to_string().into();
            }
        }
        message["tool_calls"] = calls.into();
    }
    messages
}

/// The elements of a field that holds one to `most` of something.
pub(crate) fn elements(param: &str, noun: &str, value: Value) -> Result<Vec<Value>, ApiError> {
    match value {
        Value::Array(elements) if (1..=MAX_MESSAGES).contains(&elements.len()) => Ok(elements),
        other => Err(mismatch(param, &format!("an array of 1 to {MAX_MESSAGES} {noun}"), &other)),
    }
}

/// Text, or parts of text whose type is one of `kinds`; parts are joined by line breaks, as vLLM joins them.
pub(crate) fn content(param: &str, value: Value, kinds: &[&str]) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if parts.len() <= MAX_MESSAGES => parts,
        other => {
            return Err(mismatch(param, &format!("a string or an array of at most {MAX_MESSAGES} text parts"), &other));
        }
    };
    let part = |(i, value): (usize, Value)| {
        let mut fields = Fields::of(&format!("{param}[{i}]"), value)?;
        let kind = fields.text("type")?;
        if kinds.contains(&&*kind) {
            return fields.text(if kind == "refusal" { "refusal" } else { "text" });
        }
        Err(ApiError::unsupported(fields.param("type"), format!("content of type `{kind}`")))
    };
    let texts: Vec<String> = parts.into_iter().enumerate().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

// === impl Talk ===

impl Talk {
    /// Puts together what was parsed: the tools are shown to the template, and a forced call is the form of the text.
    pub(crate) fn new(
        mut params: Params,
        tools: Option<Tools>,
        mut conversation: Conversation,
    ) -> Result<Self, ApiError> {
        if let Some(tools) = &tools {
            tools.show(&mut conversation.template_kwargs);
            params.force(tools.format()?)?;
        }
        Ok(Self { params, tools, conversation, body: None })
    }

    /// As it was sent, for upstreams.
    pub(crate) fn sent_as(self, body: Option<Map<String, Value>>) -> Self {
        Self { body, ..self }
    }

    /// Finds the model, renders, tokenizes and dispatches.
    pub(crate) async fn start(self, arrival: &Arrival, mut permit: Permit) -> Result<Answering, ApiError> {
        let Self { mut params, tools, conversation, body } = self;
        let state = &arrival.state;
        let asking = arrival.asking(params.timeout_ms);
        let target = demand::find(state, &params.model, &mut permit, asking).await?;
        let written = || written(&params, tools.as_ref(), &conversation.messages);
        let is_onward = target.has_upstreams() && params.cache_prompt;
        let body = if is_onward { body.or_else(written) } else { None };
        let default_tokens = target.text().defaults().max_new_tokens;
        let onward =
            body.map(|body| Onward::new("/v1/chat/completions", body, params.n as usize).capped(default_tokens));
        // An upstream finds the calls in its texts itself.
        let tools = tools.filter(|_| !target.is_elsewhere());
        let rules = tools.map(|tools| tools.rules(target.text())).transpose()?;
        params.skip_special &= !rules.as_ref().is_some_and(CallRules::wants_special_tokens);
        let grammar = params.grammar(state, &target).await?;
        let prompt_param = conversation.param;
        let prompt = conversation.prompt(target.text(), state.clock.unix_seconds()).await?;
        let job = Job { params, target, prompts: vec![prompt], grammar, default_tokens, prompt_param, onward };
        let Params { n, stream, include_usage, ref stop, .. } = job.params;
        let stop = Arc::clone(stop);
        let running = arrival.start(job, permit).await?;
        let streams = stream || running.wants_events();
        Ok(Answering { running, rules, n_choices: n as usize, streams, include_usage, stop })
    }
}
