//! `POST /v1/completions`: text or token ids in, text out, no template in between.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use pointsman_sched::request::TokenLogprobs;
use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, whole};
use super::generate::{Answer, Arrival, Collected, Head, Job, Running, Shape, serve};
use super::inputs::{Holder, Input, read_each, token_ids};
use super::logprobs::{CompletionLogprobs, PromptLogprobs};
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

/// Why nobody says how likely a prompt is.
const NO_SCORES: &str = "how likely a prompt is, of a model that upstreams alone serve and in a request that cannot be sent on as it is \
     (send one prompt, as text),";

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
    if fields.bool("add_special_tokens")? == Some(false) {
        let what = "`add_special_tokens` false, other than by a `prompt` of token ids,";
        return Err(ApiError::unsupported("add_special_tokens", what));
    }
    let logprobs = fields.u32("logprobs", 0..=20)?.and_then(|n| u8::try_from(n).ok());
    let is_prompt_alone = echo && fields.get("max_tokens").and_then(whole) == Some(0);
    if is_prompt_alone {
        fields.take("max_tokens");
    }
    let listed = fields.u32("prompt_logprobs", 0..=20)?.and_then(|n| u8::try_from(n).ok());
    let mut own = Own::openai(&mut fields, &state.config, logprobs)?;
    own.max_tokens = own.max_tokens.or(is_prompt_alone.then_some(0));
    let mut params = Params::parse(&mut fields, &state.config, own)?;
    if listed.is_some() && (params.stream || arrival.ndjson) {
        let problem = "`prompt_logprobs` are not told in a stream; ask for one answer, or use `echo` with `logprobs`";
        return Err(ApiError::invalid("prompt_logprobs", problem));
    }
    let echoed = logprobs.filter(|_| echo);
    params.prompt_logprobs = echoed.max(listed);
    let asking = arrival.asking(params.timeout_ms);
    let target = demand::find(state, &params.model, &mut permit, asking).await?;
    let grammar = params.grammar(state, &target).await?;
    // Token ids mean nothing to another tokenizer, and several prompts are several requests.
    let body = body.filter(|_| prompt.is_string() && target.has_upstreams() && params.cache_prompt);
    let default_tokens = Some(DEFAULT_TOKENS);
    let onward = body.map(|body| Onward::new("/v1/completions", body, params.n as usize).capped(default_tokens));
    if params.prompt_logprobs.is_some() && !target.scores_prompts(onward.is_some()) {
        return Err(ApiError::unsupported(if listed.is_some() { "prompt_logprobs" } else { "logprobs" }, NO_SCORES));
    }
    let prompts = prompts(prompt, target.text(), state.config.max_prompts as usize, echo).await?;
    let n_choices = prompts.len() * params.n as usize;
    check_rows(n_choices, state)?;
    let told = match echo || listed.is_some() {
        true => prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), params.n as usize)).collect(),
        false => Vec::new(),
    };
    let echo = Echo { prompts: told, is_text: echo, top: echoed, listed };
    let (stream, include_usage) = (params.stream, params.include_usage);
    let job = Job { params, target, prompts, grammar, default_tokens, prompt_param: "prompt", onward };
    let running = arrival.start(job, permit).await?;
    let streams = stream || running.wants_events();
    Ok(Answer { running, n_choices, streams, shape: Box::new(CompletionShape { echo, include_usage }) })
}

/// How completions are written.
#[derive(Debug)]
struct CompletionShape {
    echo: Echo,
    include_usage: bool,
}

/// The prompts that answers begin with.
#[derive(Debug)]
struct Echo {
    /// Of each choice; none where nothing is said of them.
    prompts: Vec<Prompt>,
    /// Whether they are repeated.
    is_text: bool,
    /// Whether it is said then how likely they are, with so many others; ...
    top: Option<u8>,
    /// ... and whether it is in a list of its own.
    listed: Option<u8>,
}

impl Echo {
    fn text(&self, choice: usize) -> &str {
        self.prompts.get(choice).filter(|_| self.is_text).map_or("", |prompt| &prompt.text)
    }

    fn list<'a>(&self, text: &'a TextModel, choice: usize, scores: &'a [TokenLogprobs]) -> Option<PromptLogprobs<'a>>
    where
        Self: 'a,
    {
        let (top, prompt) = (self.listed?.into(), self.prompts.get(choice)?);
        Some(PromptLogprobs { text, tokens: Arc::clone(&prompt.tokens), scores, top })
    }

    /// What the log-probabilities of a choice begin with.
    fn logprobs(&self, text: &TextModel, choice: usize, scores: &[TokenLogprobs]) -> CompletionLogprobs {
        let (Some(prompt), Some(top)) = (self.prompts.get(choice), self.top) else {
            return CompletionLogprobs::default();
        };
        CompletionLogprobs::prompt(text, (&prompt.tokens, &prompt.text), (scores, top.into()))
    }
}

impl Shape for CompletionShape {
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode> {
        Box::new(CompletionSse::new(running, *self))
    }

    fn whole(
        self: Box<Self>,
        (head, text): (&Head, &TextModel),
        mut choices: Vec<Collected>,
        totals: Totals,
    ) -> Vec<u8> {
        let relayed = relayed::whole(head, "text_completion", &mut choices, totals);
        relayed.unwrap_or_else(|| write_whole((head, text), &choices, &self.echo, totals.into()))
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
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

fn write_whole((head, model): (&Head, &TextModel), choices: &[Collected], echo: &Echo, usage: Usage) -> Vec<u8> {
    let texts: Vec<String> =
        choices.iter().enumerate().map(|(i, choice)| format!("{}{}", echo.text(i), choice.text)).collect();
    let choice = |(index, (choice, whole))| {
        let choice: &Collected = choice;
        let mut logprobs = echo.logprobs(model, index, &choice.scores);
        choice.tokens.iter().for_each(|token| logprobs.push(model, token));
        let text: &String = whole;
        let prompt_logprobs = echo.list(model, index, &choice.scores);
        let finish_reason = choice.finish.map(|f| f.as_str());
        Choice { index, text, logprobs: logprobs.take(), prompt_logprobs, finish_reason }
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
    echo: Echo,
    choices: Vec<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// Whether the prompt has been sent, where it is repeated.
    has_begun: bool,
    logprobs: CompletionLogprobs,
}

impl CompletionSse {
    fn new(running: &Running, CompletionShape { echo, include_usage }: CompletionShape) -> Self {
        let (head, text) = (running.head.clone(), Arc::clone(&running.text));
        Self { head, text, include_usage, echo, choices: Vec::new() }
    }

    /// The place of a choice, after what comes first has been written: its prompt, and how likely that is.
    fn begin(&mut self, out: &mut Vec<u8>, index: usize, scores: &[TokenLogprobs]) -> &mut Progress {
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, Progress::default);
        }
        if !std::mem::replace(&mut self.choices[index].has_begun, true) {
            let mut logprobs = self.echo.logprobs(&self.text, index, scores);
            let (text, first) = (self.echo.text(index), logprobs.take());
            if !text.is_empty() || first.is_some() {
                self.chunk(
                    out,
                    &[Choice { index, text, logprobs: first, prompt_logprobs: None, finish_reason: None }],
                    None,
                );
            }
            self.choices[index].logprobs = logprobs;
        }
        &mut self.choices[index]
    }

    fn chunk(&self, out: &mut Vec<u8>, choices: &[Choice<'_>], usage: Option<Usage>) {
        let Head { id, created, model } = &self.head;
        let usage = self.include_usage.then_some(usage);
        super::sse(out, &Completion { id, object: "text_completion", created: *created, model, choices, usage });
    }
}

impl Encode for CompletionSse {
    fn update(&mut self, out: &mut Vec<u8>, update: &Update) {
        let delta = match update {
            Update::Delta(delta) => delta,
            Update::Scored { choice, scores } => {
                self.begin(out, *choice, scores);
                return;
            }
            Update::Started { .. } | Update::Prefilled { .. } => return,
        };
        if let Some(raw) = &delta.raw {
            return relayed::chunk(out, &self.head, ("text_completion", self.include_usage), raw);
        }
        let index = delta.choice;
        let text = Arc::clone(&self.text);
        let progress = self.begin(out, index, &[]);
        if let Some(token) = &delta.token {
            progress.logprobs.push(&text, token);
        }
        let logprobs = progress.logprobs.take();
        if !delta.text.is_empty() || logprobs.is_some() || delta.finish.is_some() {
            let finish_reason = delta.finish.map(|f| f.as_str());
            self.chunk(
                out,
                &[Choice { index, text: &delta.text, logprobs, prompt_logprobs: None, finish_reason }],
                None,
            );
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
