//! `POST /v1/completions`: text or token ids in, text out, no template in between.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::fields::Fields;
use super::generate::{Answer, Arrival, Collected, Head, Job, Running, Shape, serve};
use super::inputs::{Holder, Input, read_each, token_ids};
use super::logprobs::CompletionLogprobs;
use super::params::{Own, Params};
use super::{Usage, relayed};
use crate::admission::Permit;
use crate::demand;
use crate::dispatch::Prompt;
use crate::error::ApiError;
use crate::identity::{Caller, RequestTag};
use crate::state::ServerState;
use crate::stream::{Encode, Totals, Update};
use crate::text::TextModel;
use crate::upstream::Onward;

/// Tokens that a completion has when the request does not say (`OpenAI`'s default).
const DEFAULT_TOKENS: u32 = 16;

/// Handles the route.
pub(crate) async fn completions(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Extension(RequestTag(tag)): Extension<RequestTag>,
    request: axum::extract::Request,
) -> Result<Response, ApiError> {
    serve(Arrival::new(&state, caller, tag, request.headers()), request, begin).await
}

/// From a body to what it asked for, under way.
pub(crate) async fn begin(arrival: Arrival, mut permit: Permit, mut fields: Fields) -> Result<Answer, ApiError> {
    let state = &arrival.state;
    let body = arrival.sent(&fields);
    let (echo, prompt) = (fields.bool("echo")?.unwrap_or(false), fields.require("prompt")?);
    let logprobs = logprobs(&mut fields, echo)?;
    let own = Own::openai(&mut fields, &state.config, logprobs)?;
    let mut params = Params::parse(&mut fields, &state.config, own)?;
    let asking = arrival.asking(params.timeout_ms);
    let target = demand::find(state, &params.model, &mut permit, asking).await?;
    let grammar = params.grammar(state, &target).await?;
    // Token ids mean nothing to another tokenizer, and several prompts are several requests.
    let body = body.filter(|_| prompt.is_string() && target.has_upstreams() && params.cache_prompt);
    let default_tokens = Some(DEFAULT_TOKENS);
    let onward = body.map(|body| Onward::new("/v1/completions", body, params.n as usize).capped(default_tokens));
    let prompts = prompts(prompt, target.text(), state.config.max_prompts as usize, echo).await?;
    let n_choices = prompts.len() * params.n as usize;
    check_rows(n_choices, state)?;
    let echoed: Vec<String> = match echo {
        true => prompts.iter().flat_map(|p| std::iter::repeat_n(p.text.clone(), params.n as usize)).collect(),
        false => vec![String::new(); n_choices],
    };
    let (stream, include_usage) = (params.stream, params.include_usage);
    let job = Job { params, target, prompts, grammar, default_tokens, prompt_param: "prompt", onward };
    let running = arrival.start(job, permit).await?;
    let streams = stream || running.wants_events();
    Ok(Answer { running, n_choices, streams, shape: Box::new(CompletionShape { echoed, include_usage }) })
}

/// How completions are written.
#[derive(Debug)]
struct CompletionShape {
    /// The prompt of each choice, where it is repeated.
    echoed: Vec<String>,
    include_usage: bool,
}

impl Shape for CompletionShape {
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode> {
        Box::new(CompletionSse::new(running, self.echoed, self.include_usage))
    }

    fn whole(
        self: Box<Self>,
        (head, text): (&Head, &TextModel),
        mut choices: Vec<Collected>,
        totals: Totals,
    ) -> Vec<u8> {
        let relayed = relayed::whole(head, "text_completion", &mut choices, totals);
        relayed.unwrap_or_else(|| write_whole(head, text, &choices, &self.echoed, totals.into()))
    }
}

/// Prompts times choices.
fn check_rows(n_choices: usize, state: &ServerState) -> Result<(), ApiError> {
    let limit = state.config.max_rows as usize;
    if n_choices <= limit {
        return Ok(());
    }
    let problem =
        format!("the prompts times `n` are {n_choices} texts, and one request may ask for {limit}; send several");
    Err(ApiError::invalid("n", problem))
}

fn logprobs(fields: &mut Fields, echo: bool) -> Result<Option<u8>, ApiError> {
    let wanted = fields.u32("logprobs", 0..=20)?.and_then(|n| u8::try_from(n).ok());
    if wanted.is_some() && echo {
        return Err(ApiError::unsupported("logprobs", "`logprobs` together with `echo`"));
    }
    Ok(wanted)
}

/// Reads and tokenizes the prompts.
async fn prompts(value: Value, text: &Arc<TextModel>, limit: usize, echo: bool) -> Result<Vec<Prompt>, ApiError> {
    let text = Arc::clone(text);
    let read = move |param: String, input: Input| match input {
        Input::Text(prompt) => text_prompt(&text, &param, prompt),
        Input::Ids(ids) => id_prompt(&text, &param, &ids, echo),
    };
    read_each(value, Holder { param: "prompt", noun: "prompts", limit }, read).await
}

fn text_prompt(text: &TextModel, param: &str, prompt: String) -> Result<Prompt, ApiError> {
    let tokens = text.encode(&prompt, true).map_err(|error| ApiError::invalid(param, error.to_string()))?;
    Ok(Prompt { tokens: tokens.into(), text: prompt })
}

fn id_prompt(text: &TextModel, param: &str, ids: &[Value], echo: bool) -> Result<Prompt, ApiError> {
    let tokens: Arc<[u32]> = token_ids(param, ids, text.vocabulary())?;
    let text = if echo { text.decode(&tokens, true) } else { String::new() };
    Ok(Prompt { tokens, text })
}

// === On the wire ===

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

fn write_whole(head: &Head, text: &TextModel, choices: &[Collected], echoed: &[String], usage: Usage) -> Vec<u8> {
    let texts: Vec<String> =
        choices.iter().zip(echoed).map(|(choice, echo)| format!("{echo}{}", choice.text)).collect();
    let choice = |(index, (choice, whole))| {
        let choice: &Collected = choice;
        let mut logprobs = CompletionLogprobs::default();
        choice.tokens.iter().fold(0, |offset, token| offset + logprobs.push(text, token, offset));
        let logprobs = (!logprobs.is_empty()).then_some(logprobs);
        let text: &String = whole;
        Choice { index, text, logprobs, finish_reason: choice.finish.map(|f| f.as_str()) }
    };
    let choices: Vec<Choice<'_>> = choices.iter().zip(&texts).enumerate().map(choice).collect();
    let Head { id, created, model } = head;
    let (created, usage) = (*created, Some(Some(usage)));
    let whole = Completion { id, object: "text_completion", created, model, choices: &choices, usage };
    serde_json::to_vec(&whole).unwrap_or_default()
}

/// Server-sent events of a completion.
#[derive(Debug)]
struct CompletionSse {
    head: Head,
    text: Arc<TextModel>,
    include_usage: bool,
    choices: Vec<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// The prompt, until it has been sent.
    echo: Option<String>,
    /// Characters of the tokens so far.
    offset: usize,
}

impl CompletionSse {
    fn new(running: &Running, echoed: Vec<String>, include_usage: bool) -> Self {
        let choice = |echo: String| Progress { echo: (!echo.is_empty()).then_some(echo), offset: 0 };
        Self {
            head: running.head.clone(),
            text: Arc::clone(&running.text),
            include_usage,
            choices: echoed.into_iter().map(choice).collect(),
        }
    }

    fn chunk(&self, out: &mut Vec<u8>, choices: &[Choice<'_>], usage: Option<Usage>) {
        let Head { id, created, model } = &self.head;
        let usage = self.include_usage.then_some(usage);
        super::sse(out, &Completion { id, object: "text_completion", created: *created, model, choices, usage });
    }
}

impl Encode for CompletionSse {
    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let Update::Delta(delta) = update else { return };
        if let Some(raw) = &delta.raw {
            return relayed::chunk(out, &self.head, ("text_completion", self.include_usage), raw);
        }
        let index = delta.choice;
        let Some(progress) = self.choices.get_mut(index) else { return };
        let echo = progress.echo.take();
        let mut logprobs = CompletionLogprobs::default();
        if let Some(token) = &delta.token {
            progress.offset += logprobs.push(&self.text, token, progress.offset);
        }
        if let Some(echo) = echo {
            self.chunk(out, &[Choice { index, text: &echo, logprobs: None, finish_reason: None }], None);
        }
        let logprobs = (!logprobs.is_empty()).then_some(logprobs);
        if !delta.text.is_empty() || logprobs.is_some() || delta.finish.is_some() {
            let finish_reason = delta.finish.map(|f| f.as_str());
            self.chunk(out, &[Choice { index, text: &delta.text, logprobs, finish_reason }], None);
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
