//! The way in beneath HTTP: a request as a value, and out of it events as they come or the whole answer.
//!
//! Embedders and batches use it. It is the path of the routes themselves, from admission to the last token, and not a second
//! one: a route reads headers and a body, makes what `begin` makes, and writes it as a response. Bodies are those of the
//! routes, because a struct with every field of four shapes would be a second description of what docs/api.md describes.

use std::collections::HashMap;
use std::future::poll_fn;
use std::iter::{Enumerate, Fuse};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use pointsman_sched::ids::Priority;
use serde_json::Value;
use tokio::task::{Id, JoinSet};

use crate::error::ApiError;
use crate::identity::{ANONYMOUS, Caller, new_id, word_of};
use crate::keys::Holder;
use crate::openai::embeddings::{self, Vectors};
use crate::openai::fields::Fields;
use crate::openai::generate::{Answer, Arrival, Running};
use crate::openai::{chat, completions, responses};
use crate::state::ServerState;
use crate::stream::{Finish, Update};

/// What a request asks for; its body is that of the route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
    /// `/v1/responses`.
    Response,
    /// `/v1/embeddings`.
    Embedding,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    call: Call,
    body: Value,
    tenant: String,
    highest: Priority,
    timeout: Option<Duration>,
    /// Whose limits it counts against.
    holder: Option<Arc<Holder>>,
}

/// What comes of a request, in this order: for each choice `Started`, then `Prefilled`s, then `Scored` where that was asked, then `Delta`s, the last with `ended`; or `Embedded`;
/// then `Done`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A choice is being computed.
    Started {
        /// Which.
        choice: usize,
        /// How long it waited.
        queued: Duration,
        /// Tokens of its prompt that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// A step has computed a part of a long prompt.
    Prefilled {
        /// Whose.
        choice: usize,
        /// Of its prompt, computed or found in the prefix cache.
        tokens: u32,
    },
    /// How likely the prompt of a choice is.
    Scored {
        /// Whose.
        choice: usize,
        /// Log-probabilities of its tokens, from the second one on.
        logprobs: Vec<f32>,
    },
    /// A step of a choice.
    Delta {
        /// Which.
        choice: usize,
        /// Text that became visible; may lag behind the tokens.
        text: String,
        /// The token, where there is one.
        token: Option<u32>,
        /// Its log-probability, where the request asks for them.
        logprob: Option<f32>,
        /// Set at the end of the choice.
        ended: Option<Ended>,
    },
    /// One vector for each input.
    Embedded {
        /// In the order of the inputs.
        vectors: Vec<Vec<f32>>,
    },
    /// All is over.
    Done {
        /// Of all prompts or inputs together.
        prompt_tokens: u32,
        /// Of all choices together.
        completion_tokens: u32,
        /// Of the prompts, found in the prefix cache.
        cached_tokens: u32,
    },
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model, or a stop string, ended it.
    Stop,
    /// It has all the tokens that it may have.
    Length,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Whose fault it is.
    pub kind: FaultKind,
    /// What is wrong and what to change, in words.
    pub message: String,
    /// The field of the body at fault.
    pub param: Option<String>,
    /// After which time another try may succeed; none where it cannot.
    pub retry_after: Option<Duration>,
}

/// Classes of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The request is wrong.
    Invalid,
    /// There is no such model.
    Unknown,
    /// A policy does not allow it.
    Refused,
    /// The host, or the request's share of it, is full.
    Saturated,
    /// Its deadline has passed.
    Deadline,
    /// It was cancelled, or its events were not taken fast enough.
    Cancelled,
    /// The host drains, loads, or has lost a device.
    Unavailable,
    /// The host failed.
    Internal,
}

/// The events of one request. Dropping it cancels what still runs, and everything that it holds is free within one step.
#[derive(Debug)]
pub struct Events {
    id: Arc<str>,
    model: Arc<str>,
    source: Source,
}

/// Answers of many requests in the order in which they end, each with its place among the requests. Dropping it cancels what
/// runs and forgets the rest.
#[derive(Debug)]
pub struct Many<I: Iterator> {
    state: Arc<ServerState>,
    requests: Enumerate<Fuse<I>>,
    at_most: usize,
    running: JoinSet<Result<Value, Fault>>,
    places: HashMap<Id, usize>,
}

/// A request that passed admission.
#[derive(Debug)]
enum Begun {
    Generating(Box<Answer>),
    Embedded(Box<Vectors>),
}

#[derive(Debug)]
enum Source {
    Generating(Box<Running>),
    Embedded(Box<Vectors>),
    Over,
}

// === impl Call ===

impl Call {
    /// Every call.
    pub(crate) const ALL: [Self; 4] = [Self::Chat, Self::Completion, Self::Response, Self::Embedding];

    /// Its route.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completion => "/v1/completions",
            Self::Response => "/v1/responses",
            Self::Embedding => "/v1/embeddings",
        }
    }
}

// === impl Request ===

impl Request {
    /// A request with the body that its route takes. `stream` and `stream_options` do not count: events and whole answers are
    /// asked for by different functions.
    #[must_use]
    pub fn new(call: Call, body: Value) -> Self {
        Self { call, body, tenant: ANONYMOUS.to_owned(), highest: Priority::Critical, timeout: None, holder: None }
    }

    /// Whose it is: 1 to 128 visible ASCII characters. Without one it is nobody's in particular.
    #[must_use]
    pub fn tenant(mut self, tenant: &str) -> Self {
        tenant.clone_into(&mut self.tenant);
        self
    }

    /// How urgent it is, instead of what its body says; nothing makes it more urgent than this.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        if let Value::Object(body) = &mut self.body {
            body.insert("priority".to_owned(), word_of(priority).into());
        }
        self.highest = priority;
        self
    }

    /// Counts it against the limits of an API key.
    pub(crate) fn holder(mut self, holder: Option<Arc<Holder>>) -> Self {
        self.holder = holder;
        self
    }

    /// After which time it ends with a fault, instead of what its body says: in whole milliseconds, at least one and at most
    /// an hour ([`ServerConfig::max_timeout_ms`](crate::ServerConfig::max_timeout_ms)).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

// === impl ServerState ===

impl ServerState {
    /// Admits, routes and submits a request. Call it within a tokio runtime, whose timers keep the deadline.
    ///
    /// # Errors
    /// It was refused; nothing of it runs.
    pub async fn submit(self: &Arc<Self>, request: Request) -> Result<Events, Fault> {
        let id = new_id(self, request.call.path());
        let begun = begin(self, request, &id, true).await?;
        let (model, source) = match begun {
            Begun::Generating(answer) => {
                (Arc::clone(&answer.running.head.model), Source::Generating(Box::new(answer.running)))
            }
            Begun::Embedded(vectors) => (Arc::clone(vectors.model()), Source::Embedded(vectors)),
        };
        Ok(Events { id, model, source })
    }

    /// The whole answer of a request: the object that its route answers with.
    ///
    /// # Errors
    /// It was refused, or it failed on its way.
    pub async fn answer(self: &Arc<Self>, request: Request) -> Result<Value, Fault> {
        let (_, answered) = answer(self, request).await;
        Ok(serde_json::from_slice(&answered?).map_err(|_| ApiError::Internal)?)
    }

    /// The whole answers of many requests as they end, at most `at_most` of them under way, and no more than the host admits at
    /// once. A request is taken from `requests` when there is room for it, so there may be any number of them; one that is
    /// refused because the host is full is asked again when that says so, until there is room or its timeout is over.
    pub fn submit_many<I>(self: &Arc<Self>, requests: I, at_most: usize) -> Many<I::IntoIter>
    where
        I: IntoIterator<Item = Request>,
    {
        Many {
            state: Arc::clone(self),
            requests: requests.into_iter().fuse().enumerate(),
            at_most: at_most.clamp(1, self.config.max_requests.max(1) as usize),
            running: JoinSet::new(),
            places: HashMap::new(),
        }
    }

    /// Stops admitting requests and waits until nobody is inside.
    pub async fn drained(&self) {
        self.drain();
        self.admission.empty().await;
    }
}

/// The id of a request and the text of its whole answer.
pub(crate) async fn answer(state: &Arc<ServerState>, request: Request) -> (Arc<str>, Result<Vec<u8>, ApiError>) {
    let id = new_id(state, request.call.path());
    let answered = match begin(state, request, &id, false).await {
        Ok(Begun::Generating(answer)) => answer.object().await,
        Ok(Begun::Embedded(vectors)) => vectors.object(),
        Err(error) => Err(error),
    };
    (id, answered)
}

/// From a request to what its route would begin to write.
async fn begin(
    state: &Arc<ServerState>,
    request: Request,
    id: &Arc<str>,
    shows_progress: bool,
) -> Result<Begun, ApiError> {
    let Request { call, mut body, tenant, highest, timeout, holder } = request;
    if let (Value::Object(body), Some(timeout)) = (&mut body, timeout) {
        let ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        body.insert("timeout_ms".to_owned(), ms.clamp(1, state.config.max_timeout_ms).into());
    }
    let key = holder.as_ref().map(|holder| holder.key.digest);
    let caller = Caller { key, holder, ..Caller::within(state, &tenant, highest)? };
    let mut arrival = Arrival::within(state, caller, Arc::clone(id));
    arrival.shows_progress = shows_progress;
    let permit = arrival.admit()?;
    let mut fields = Fields::of("", body)?;
    drop((fields.take("stream"), fields.take("stream_options")));
    let answer = match call {
        Call::Chat => chat::begin(arrival, permit, fields).await?,
        Call::Completion => completions::begin(arrival, permit, fields).await?,
        Call::Response => responses::begin(arrival, permit, fields).await?,
        Call::Embedding => {
            let vectors = embeddings::embed(&arrival, permit, fields).await?;
            return Ok(Begun::Embedded(Box::new(vectors)));
        }
    };
    Ok(Begun::Generating(Box::new(answer)))
}

// === impl Events ===

impl Events {
    /// The request's id, as logs and `GET /admin/v1/requests/{id}` know it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The variant that answers.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The next event; none after [`Event::Done`] and after a fault.
    pub async fn next(&mut self) -> Option<Result<Event, Fault>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for Events {
    type Item = Result<Event, Fault>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let event = match &mut this.source {
            Source::Over => return Poll::Ready(None),
            Source::Embedded(vectors) => {
                let taken = std::mem::take(&mut vectors.vectors);
                if !taken.is_empty() {
                    return Poll::Ready(Some(Ok(Event::Embedded { vectors: taken })));
                }
                Ok(Event::Done { prompt_tokens: vectors.tokens, completion_tokens: 0, cached_tokens: 0 })
            }
            Source::Generating(running) => match ready!(running.feed.poll_update(cx)) {
                Some(Ok(update)) => return Poll::Ready(Some(Ok(update.into()))),
                Some(Err(error)) => Err(error.into()),
                None => {
                    let totals = running.feed.totals();
                    let (prompt_tokens, completion_tokens) = (totals.prompt, totals.completion);
                    Ok(Event::Done { prompt_tokens, completion_tokens, cached_tokens: totals.cached })
                }
            },
        };
        this.source = Source::Over;
        Poll::Ready(Some(event))
    }
}

impl From<Update> for Event {
    fn from(update: Update) -> Self {
        match update {
            Update::Started { choice, queued_us, cached_tokens } => {
                Self::Started { choice, queued: Duration::from_micros(queued_us), cached_tokens }
            }
            Update::Prefilled { choice, tokens } => Self::Prefilled { choice, tokens },
            Update::Scored { choice, scores } => {
                Self::Scored { choice, logprobs: scores.iter().map(|score| score.chosen).collect() }
            }
            Update::Delta(delta) => Self::Delta {
                choice: delta.choice,
                text: delta.text,
                token: delta.token.as_ref().map(|token| token.id),
                logprob: delta.token.and_then(|token| token.logprobs).map(|logprobs| logprobs.chosen),
                ended: delta.finish.map(Ended::from),
            },
        }
    }
}

impl From<Finish> for Ended {
    fn from(finish: Finish) -> Self {
        if finish.is_stop() { Self::Stop } else { Self::Length }
    }
}

// === impl Many ===

impl<I: Iterator<Item = Request> + Unpin> Many<I> {
    /// The next answer with the place of its request, from 0; none after the last.
    pub async fn next(&mut self) -> Option<(usize, Result<Value, Fault>)> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl<I: Iterator<Item = Request> + Unpin> Stream for Many<I> {
    type Item = (usize, Result<Value, Fault>);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while this.running.len() < this.at_most
            && let Some((place, request)) = this.requests.next()
        {
            let state = Arc::clone(&this.state);
            let task = this.running.spawn(async move { when_there_is_room(&state, request).await });
            this.places.insert(task.id(), place);
        }
        let Some(ended) = ready!(this.running.poll_join_next_with_id(cx)) else { return Poll::Ready(None) };
        let (task, answer) = match ended {
            Ok(ended) => ended,
            Err(error) => (error.id(), Err(ApiError::Internal.into())),
        };
        Poll::Ready(this.places.remove(&task).map(|place| (place, answer)))
    }
}

/// The answer to a request that is asked again for as long as the host is full: a refusal loses nothing.
/// Its timeout, where it has one, is that of all tries together.
async fn when_there_is_room(state: &Arc<ServerState>, request: Request) -> Result<Value, Fault> {
    let begun = state.clock.now();
    loop {
        let waited = Duration::from_micros(state.clock.now().saturating_sub(begun));
        let left = request.timeout.map(|timeout| timeout.saturating_sub(waited));
        match state.answer(Request { timeout: left, ..request.clone() }).await {
            Err(fault @ Fault { kind: FaultKind::Saturated, retry_after: Some(delay), .. }) => {
                if left.is_some_and(|left| left <= delay) {
                    return Err(fault);
                }
                tokio::time::sleep(delay).await;
            }
            answered => return answered,
        }
    }
}

// === impl Fault ===

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        let kind = match error.status().as_u16() {
            404 => FaultKind::Unknown,
            401 | 403 => FaultKind::Refused,
            429 => FaultKind::Saturated,
            408 | 504 => FaultKind::Deadline,
            499 => FaultKind::Cancelled,
            400..=428 => FaultKind::Invalid,
            502 | 503 => FaultKind::Unavailable,
            _ => FaultKind::Internal,
        };
        let retry_after = error.retryable().then(|| Duration::from_millis(error.retry_after_ms().into()));
        Self { kind, message: error.to_string(), param: error.param().map(str::to_owned), retry_after }
    }
}
