//! What every generation does around its parsed body: read it, find the model, tokenize, check lengths, take room, dispatch,
//! and answer whole or as a stream.

use std::sync::Arc;

use axum::body::Body;
use axum::http::header::{ACCEPT, AGE, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::Full;
use pointsman_sched::admit::{AdmitRequest, Verdict};
use pointsman_sched::ids::{Micros, RequestId};
use pointsman_sched::request::{Sampling, TokenLogprobs};
use serde_json::{Map, Value};
use tokio::sync::watch;

use super::errand::Errand;
use super::fields::Fields;
use super::ndjson::NdjsonEncoder;
use super::params::Params;
use super::progress::Progress;
use super::progressive::{self, Turns};
use super::{loading, read_json};
use crate::admin::wire::calls::DoorSeen;
use crate::admin::wire::decision::Line;
use crate::admission::Permit;
use crate::cache::{Feed, Served, Wish};
use crate::demand::{Asking, Loading};
use crate::dispatch::{Assignment, Placement, Prompt, Submission, Target, Terms, record_rejection};
use crate::error::ApiError;
use crate::grammar::Compiled;
use crate::identity::{Caller, session_hash};
use crate::ports::{Asker, Assigned};
use crate::state::ServerState;
use crate::stream::{ChoiceParts, Encode, EventBody, Finish, SinkMaker, Telling, Token, Totals, Update};
use crate::text::{Detokenizer, StopMatcher, TextModel};
use crate::trace::{Doored, Stage};
use crate::upstream::{Onward, fold};

/// How the response cache served a request.
const CACHE_STATUS: HeaderName = HeaderName::from_static("x-pointsman-cache");

/// Events of which each is a line.
pub(super) const NDJSON: &str = "application/x-ndjson";

/// Texts longer than this are tokenized on the blocking pool: a worker thread serves other requests in the meantime.
const INLINE_TEXT: usize = 8 << 10;

/// What a handler knows of a request before it reads the body.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) state: Arc<ServerState>,
    pub(crate) caller: Caller,
    pub(crate) tag: Arc<str>,
    pub(crate) arrived: Micros,
    pub(crate) ndjson: bool,
    /// Whether it hears how its prompt goes.
    pub(crate) shows_progress: bool,
    /// What it says of the response cache.
    pub(super) wish: Wish,
    /// What it and its draft wait for of one another; of a final answer.
    pub(super) turns: Option<Arc<Turns>>,
    /// Whose draft it is; of a draft.
    pub(super) drafts_for: Option<Arc<str>>,
    /// Hears how the load gets on for which it waits.
    pub(super) loading: Option<Arc<watch::Sender<Option<Loading>>>>,
}

/// A request whose body has been read and whose prompts are tokens.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) params: Params,
    pub(crate) target: Target,
    pub(crate) prompts: Vec<Prompt>,
    /// What its texts must be.
    pub(crate) grammar: Option<Arc<Compiled>>,
    /// Tokens to generate when the request does not say; `None` for what the context leaves.
    pub(crate) default_tokens: Option<u32>,
    /// The field that holds the prompt, for errors about its length.
    pub(crate) prompt_param: &'static str,
    /// How it is sent to an upstream; none where it cannot be, or none serves its model.
    pub(crate) onward: Option<Onward>,
}

/// A generation under way.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) feed: Feed,
    pub(crate) head: Head,
    /// The tokenizer that writes its tokens.
    pub(crate) text: Arc<TextModel>,
    /// Of those who asked for events instead of one object.
    progress: Option<Progress>,
    /// By the response cache, where it is on.
    served: Option<Served>,
}

/// The members that every object of a response repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: Arc<str>,
    pub(crate) created: u64,
    /// The variant that answers.
    pub(crate) model: Arc<str>,
}

/// How a route writes what was generated.
pub(crate) trait Shape: Send + std::fmt::Debug {
    /// As events of its own, while it is generated.
    fn events(self: Box<Self>, running: &Running) -> Box<dyn Encode>;
    /// As one object.
    fn whole(self: Box<Self>, names: (&Head, &TextModel), choices: Vec<Collected>, totals: Totals) -> Vec<u8>;
}

/// What a body asked for, under way.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) running: Running,
    pub(crate) n_choices: usize,
    /// Whether it is written as it comes.
    pub(crate) streams: bool,
    pub(crate) shape: Box<dyn Shape>,
}

/// A choice of a response that is sent whole.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) text: String,
    /// How likely each token of its prompt but the first is, where that was asked.
    pub(crate) scores: Arc<[TokenLogprobs]>,
    pub(crate) tokens: Vec<Token>,
    pub(crate) finish: Option<Finish>,
    /// What an upstream wrote of it.
    pub(crate) raw: Option<Value>,
}

/// Whether the client asks for newline-delimited JSON.
fn accepts_ndjson(headers: &HeaderMap) -> bool {
    let accepts = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accepts.split(',').any(|part| part.split(';').next().is_some_and(|kind| kind.trim() == NDJSON))
}

/// The head of a response that is written as tokens come.
pub(super) fn streaming(kind: &'static str) -> Response {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// Handles a route that generates: reads the body, and answers as it asks.
pub(crate) async fn serve<F>(
    arrival: Arrival,
    request: axum::extract::Request,
    begin: impl Fn(Arrival, Permit, Fields) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = Result<Answer, ApiError>> + Send + 'static,
{
    let permit = arrival.admit()?;
    let body = read_json(&arrival.state, request).await?;
    let mut fields = Fields::parse(&body)?;
    if let Some(draft) = progressive::draft(&arrival, &mut fields)? {
        return Box::pin(progressive::respond(arrival, permit, (fields, draft, body), begin)).await;
    }
    drop(body);
    match arrival.ndjson && names_demanded(&arrival.state, &fields) {
        true => Box::pin(loading::respond(arrival, permit, fields, begin)).await,
        false => begin(arrival, permit, fields).await?.respond().await,
    }
}

/// Whether the request may have to wait for its model.
fn names_demanded(state: &ServerState, fields: &Fields) -> bool {
    let model = fields.get("model").and_then(Value::as_str);
    model.is_some_and(|model| state.engine.catalog().demanded(model).is_some())
}

/// Runs CPU work that may take long off the workers; short work runs here.
pub(crate) async fn tokenizing<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_TEXT {
        return work();
    }
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(ApiError::Internal))
}

// === impl Arrival ===

impl Arrival {
    /// What a request brings beside its body.
    pub(crate) fn new(state: &Arc<ServerState>, caller: Caller, tag: Arc<str>, headers: &HeaderMap) -> Self {
        let (ndjson, wish) = (accepts_ndjson(headers), Wish::of(headers));
        Self { ndjson, shows_progress: ndjson, wish, ..Self::within(state, caller, tag) }
    }

    /// One that no transport brought.
    pub(crate) fn within(state: &Arc<ServerState>, caller: Caller, tag: Arc<str>) -> Self {
        let (state, arrived) = (Arc::clone(state), state.clock.now());
        let (ndjson, shows_progress, wish) = (false, false, Wish::default());
        Self { state, caller, tag, arrived, ndjson, shows_progress, wish, turns: None, drafts_for: None, loading: None }
    }

    /// Takes a place in admission, before the body is read: a refusal costs nothing.
    pub(crate) fn admit(&self) -> Result<Permit, ApiError> {
        self.state
            .enter(&self.caller)
            .inspect_err(|error| record_rejection(&self.state, &self.caller, error, (0, None)))
    }

    /// It asks for a model, and may be cancelled meanwhile.
    pub(crate) fn asking(&self, timeout_ms: u64) -> Asking<'_> {
        Asking { arrived: self.arrived, timeout_ms, id: (&self.tag, self.caller.key), told: self.loading.as_deref() }
    }

    /// The body as it was sent, where an upstream may be sent it.
    pub(super) fn sent(&self, fields: &Fields) -> Option<Map<String, Value>> {
        let model = fields.get("model")?.as_str()?;
        self.state.engine.catalog().is_onward(model).then(|| fields.copied())
    }

    /// Lets a job in, and finds its answer or dispatches it.
    pub(crate) async fn start(&self, job: Job, permit: Permit) -> Result<Running, ApiError> {
        let prompt_tokens = total_tokens(&job.prompts);
        let text = Arc::clone(job.target.text());
        let errand = self.errand(job, permit, prompt_tokens);
        let errand =
            errand.inspect_err(|error| record_rejection(&self.state, &self.caller, error, (prompt_tokens, None)))?;
        self.turns.iter().for_each(|turns| turns.admitted.notify_one());
        let tasks = if self.ndjson { errand.tasks() } else { Vec::new() };
        // An errand is kilobytes large, and whoever waits for this has its future within its own.
        let (feed, served) = Box::pin(errand.run()).await?;
        let created = self.state.clock.unix_seconds();
        let head = Head { id: Arc::clone(&self.tag), created, model: Arc::clone(&feed.origin().variant) };
        Ok(Running { feed, head, text, progress: self.ndjson.then(|| Progress::new(&self.state.clock, tasks)), served })
    }

    /// Takes room, asks the admission policy and the weights of an alias.
    fn errand(&self, job: Job, mut permit: Permit, prompt_tokens: u32) -> Result<Errand, ApiError> {
        let Job { params, target, prompts, .. } = &job;
        let sampling = params.sampling(target.text(), self.state.clock.random())?;
        let mut terms: Vec<Terms> = prompts.iter().map(|prompt| self.terms(&job, prompt)).collect::<Result<_, _>>()?;
        permit.queue_tokens(prompt_tokens)?;
        permit.hold_scores(params.score_bytes(prompt_tokens))?;
        permit.charge(prompt_tokens, new_tokens_of(&terms, sampling.len()), self.state.clock.now())?;
        let id = self.state.next_request();
        let asks = !self.state.admission.is_native();
        let door = asks.then(|| self.ask_door(&mut permit, id, (&job, &mut terms, sampling.len()))).transpose()?;
        let (assigned, is_trial) = self.assign(target, terms.first().map_or(0, |terms| terms.session), id);
        let in_flight = self.state.registry.enter(&self.tag, self.caller.key, &self.state.engine, permit)?;
        self.drafts_for.iter().for_each(|id| in_flight.drafts_for(id));
        let trace = self.state.traces.enter(&self.tag, self.arrived, door);
        trace.reached(Stage::Admitted, self.state.clock.now());
        let (arrival, has_room) = (self.clone(), true);
        Ok(Errand { arrival, job, sampling, terms, id, assigned, is_trial, prompt_tokens, has_room, in_flight, trace })
    }

    /// What the request's fields come to for one prompt.
    fn terms(&self, job: &Job, prompt: &Prompt) -> Result<Terms, ApiError> {
        let Job { params, target, .. } = job;
        // What the final answer asks for is not its draft's: that is of another model.
        if self.drafts_for.is_none() {
            params.speculation.check(target)?;
        }
        let max_new_tokens = new_tokens(job, prompt)?;
        if params.min_tokens > max_new_tokens {
            let problem =
                format!("`min_tokens` ({}) exceeds the {max_new_tokens} tokens to generate", params.min_tokens);
            return Err(ApiError::invalid("min_tokens", problem));
        }
        let session = match (&params.session, self.caller.session) {
            (Some(session), 0) => session_hash(session),
            (_, session) => session,
        };
        Ok(Terms {
            priority: self.caller.priority(params.priority),
            session,
            arrived: self.arrived,
            deadline: self.arrived.saturating_add(params.timeout_ms.saturating_mul(1_000)),
            max_new_tokens,
            min_new_tokens: params.min_tokens,
            stop_tokens: params.stop_tokens(target.text())?,
            cache_prompt: params.cache_prompt,
            speculation: params.speculation.clone(),
            scores_prompt: params.prompt_logprobs.is_some(),
            numbers: params.numbers(target.text()),
        })
    }

    /// Asks the weights of the alias, once for all prompts and choices of the request, and whether a rollout measures it.
    fn assign(&self, target: &Target, session: u64, id: RequestId) -> (Option<Assignment>, bool) {
        let [_, _, ..] = &*target.variants else { return (None, false) };
        let asker = Asker { tenant: &self.caller.tenant, session, request: id.0 };
        let Some(assigned) = self.state.aliases.assign(&target.name, &asker) else { return (None, false) };
        let Assigned { variant, unit, is_trial } = assigned;
        let loaded = target.variants.iter().find(|loaded| loaded.id == variant);
        let number = loaded.and_then(|loaded| loaded.replicas.first()).map_or(0, |replica| replica.variant);
        (Some(Assignment { variant, number: u32::try_from(number).unwrap_or(0), unit }), is_trial)
    }

    /// Asks the admission policy; a request that it lets in may enter with another priority.
    fn ask_door(
        &self,
        permit: &mut Permit,
        id: RequestId,
        (job, terms, n_choices): (&Job, &mut [Terms], usize),
    ) -> Result<Doored, ApiError> {
        let Some(first) = terms.first() else { return Err(ApiError::Internal) };
        let attributes: Vec<(&str, &str)> =
            self.caller.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let request = AdmitRequest {
            id,
            model: &job.target.name,
            tenant: &self.caller.tenant,
            tenant_id: self.caller.tenant_id,
            session: first.session,
            priority: first.priority,
            highest: self.caller.max_priority,
            prompt_tokens: total_tokens(&job.prompts),
            max_new_tokens: new_tokens_of(terms, n_choices),
            arrived: self.arrived,
            deadline: first.deadline,
            seed: self.state.clock.random(),
            numbers: first.numbers,
            attributes: &attributes,
        };
        let doored = self.judge(permit, &request)?;
        if let Some(Verdict::AcceptAs(priority)) = doored.judged.verdict {
            terms.iter_mut().for_each(|terms| terms.priority = priority);
        }
        Ok(doored)
    }

    /// Puts a request to the admission policy and notes what it said.
    pub(crate) fn judge(&self, permit: &mut Permit, request: &AdmitRequest<'_>) -> Result<Doored, ApiError> {
        let now = self.state.clock.now();
        let (load, judged) = permit.ask(now, request);
        let call_us = self.state.clock.now().saturating_sub(now);
        let doored = Doored { now, request: DoorSeen::of(request), load, judged, call_us };
        self.note_door(&doored);
        let Some(Verdict::Reject(rejection)) = &doored.judged.verdict else { return Ok(doored) };
        let error = ApiError::Rejected(rejection.clone());
        self.state.traces.enter(&self.tag, self.arrived, Some(doored)).failed(&error, self.state.clock.now());
        Err(error)
    }

    /// Records what a policy was asked; a slot that went native meanwhile asked nobody.
    fn note_door(&self, doored: &Doored) {
        let (tap, judged) = (&self.state.taps.admission, &doored.judged);
        if tap.recording() != 0 && (judged.verdict.is_some() || judged.fallback.is_some()) {
            tap.push(Line::Admission(Box::new(doored.line())));
        }
    }

    pub(super) fn submissions(
        &self,
        (sampling, grammar): (&[Arc<Sampling>], Option<&Compiled>),
        sinks: &SinkMaker,
        first: usize,
        first_id: &mut Option<RequestId>,
    ) -> Vec<Submission> {
        let mut leader = None;
        let one = |(i, sampling): (usize, &Arc<Sampling>)| {
            let id = first_id.take().unwrap_or_else(|| self.state.next_request());
            let fork_of = leader;
            leader.get_or_insert(id);
            let (sampling, sink) = (Arc::clone(sampling), sinks.sink(first + i));
            Submission { id, sampling, fork_of, mask: grammar.map(Compiled::mask), sink }
        };
        sampling.iter().enumerate().map(one).collect()
    }

    pub(super) fn choice(&self, params: &Params, placement: &Placement, queued_tokens: u32) -> ChoiceParts {
        ChoiceParts {
            detokenizer: Detokenizer::new(Arc::clone(&placement.variant.text), params.skip_special),
            stops: StopMatcher::new(Arc::clone(&params.stop)),
            min_tokens: params.min_tokens,
            metrics: self.state.request_metrics(&placement.variant.id),
            expected: placement.expected,
            queued_tokens,
            scored_by: None,
        }
    }
}

/// Tokens to generate for a prompt, within the context.
fn new_tokens(job: &Job, prompt: &Prompt) -> Result<u32, ApiError> {
    let limit = job.target.context_tokens(job.onward.is_some());
    let n_prompt = prompt.tokens.len();
    if n_prompt == 0 {
        return Err(ApiError::invalid(job.prompt_param, format!("`{}` has no tokens", job.prompt_param)));
    }
    let left = u32::try_from(n_prompt).ok().and_then(|n| limit.checked_sub(n)).unwrap_or(0);
    let requested = job.params.max_tokens.unwrap_or(1);
    if left < requested {
        return Err(ApiError::Context { param: job.prompt_param, prompt: n_prompt, requested, limit });
    }
    let shortest = || job.target.tokens_left(u32::try_from(n_prompt).unwrap_or(u32::MAX));
    Ok(job.params.max_tokens.unwrap_or_else(|| job.default_tokens.unwrap_or_else(shortest).min(left)))
}

/// Tokens to generate for all prompts and choices of a request.
fn new_tokens_of(terms: &[Terms], n_choices: usize) -> u32 {
    let sum = terms.iter().map(|terms| u64::from(terms.max_new_tokens)).sum::<u64>() * n_choices as u64;
    u32::try_from(sum).unwrap_or(u32::MAX)
}

fn total_tokens(prompts: &[Prompt]) -> u32 {
    u32::try_from(prompts.iter().map(|p| p.tokens.len()).sum::<usize>()).unwrap_or(u32::MAX)
}

// === impl Answer ===

impl Answer {
    /// The response, as the body asked for it.
    pub(crate) async fn respond(self) -> Result<Response, ApiError> {
        let Self { running, n_choices, streams, shape } = self;
        if streams {
            return running.stream(|running| shape.events(running)).await;
        }
        let write = |head: &Head, text: &TextModel, choices, totals| shape.whole((head, text), choices, totals);
        running.whole(n_choices, write).await
    }

    /// The object of a whole response, without what HTTP puts around it.
    pub(crate) async fn object(mut self) -> Result<Vec<u8>, ApiError> {
        let choices = self.running.collect(self.n_choices).await?;
        let Running { feed, head, text, .. } = &self.running;
        Ok(self.shape.whole((head, text), choices, feed.totals()))
    }
}

// === impl Running ===

impl Running {
    /// A response that is written as tokens come: NDJSON at once, SSE when there is a first token, so that what goes
    /// wrong before it has a status of its own.
    async fn stream(mut self, sse: impl FnOnce(&Self) -> Box<dyn Encode>) -> Result<Response, ApiError> {
        let (encoder, kind): (Box<dyn Encode>, _) = if let Some(lines) = self.lines() {
            (Box::new(lines), NDJSON)
        } else {
            let encoder = sse(&self);
            self.feed.first().await?;
            (encoder, "text/event-stream")
        };
        let mut response = streaming(kind);
        self.headers(response.headers_mut());
        *response.body_mut() = Body::new(EventBody::new(Telling::new(self.feed, encoder)));
        Ok(response)
    }

    /// What writes it as NDJSON, for those who asked for that; once.
    pub(super) fn lines(&mut self) -> Option<NdjsonEncoder> {
        let progress = self.progress.take()?;
        Some(NdjsonEncoder::new(&self.head, self.feed.origin(), self.feed.totals(), progress))
    }

    /// A response that is sent whole; its place in admission is held until it has been written.
    async fn whole(
        mut self,
        n_choices: usize,
        write: impl FnOnce(&Head, &TextModel, Vec<Collected>, Totals) -> Vec<u8>,
    ) -> Result<Response, ApiError> {
        let choices = self.collect(n_choices).await?;
        let body = write(&self.head, &self.text, choices, self.feed.totals());
        let mut response = Response::new(Body::empty());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.headers(response.headers_mut());
        *response.body_mut() = Body::new(Held::new(body, self.feed));
        Ok(response)
    }

    /// Waits for all that is generated.
    async fn collect(&mut self, n_choices: usize) -> Result<Vec<Collected>, ApiError> {
        let mut choices: Vec<Collected> = std::iter::repeat_with(Collected::default).take(n_choices).collect();
        while let Some(update) = self.feed.next().await {
            let delta = match update? {
                Update::Delta(delta) => delta,
                Update::Scored { choice, scores } => {
                    choices.get_mut(choice).into_iter().for_each(|choice| choice.scores = Arc::clone(&scores));
                    continue;
                }
                Update::Started { .. } | Update::Prefilled { .. } => continue,
            };
            let Some(choice) = choices.get_mut(delta.choice) else { continue };
            choice.text.push_str(&delta.text);
            choice.tokens.extend(delta.token);
            choice.finish = delta.finish.or(choice.finish);
            if let Some(raw) = delta.raw {
                fold(choice.raw.get_or_insert(Value::Null), *raw);
            }
        }
        Ok(choices)
    }

    fn headers(&self, headers: &mut HeaderMap) {
        self.feed.origin().headers(headers);
        let Some(served) = self.served else { return };
        headers.insert(CACHE_STATUS, HeaderValue::from_static(served.as_str()));
        if let Served::Hit { age_s } = served {
            headers.insert(AGE, HeaderValue::from(age_s));
        }
    }

    /// Whether the client asked for events instead of one object.
    pub(crate) fn wants_events(&self) -> bool {
        self.progress.is_some()
    }
}

/// A body that keeps what it is the end of, and with it the permit, until it has been sent.
#[derive(Debug)]
pub(crate) struct Held<T> {
    body: Full<Bytes>,
    _kept: T,
}

impl<T> Held<T> {
    pub(crate) fn new(body: Vec<u8>, kept: T) -> Self {
        Self { body: Full::new(Bytes::from(body)), _kept: kept }
    }
}

impl<T: Unpin> http_body::Body for Held<T> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        http_body::Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::Body::size_hint(&self.body)
    }
}
