//! Tokens on their way out: from the driver thread through a bounded channel to text, updates and bytes.
//!
//! One channel per HTTP request, shared by its choices. The driver never waits: a full channel answers `Closed`, which
//! cancels that request alone. No task stands in between: the handler or the response body polls [`Generation`] through its
//! [`Feed`], so a client that goes away drops it, and dropping it cancels. Latencies are observed here, on a worker thread, and
//! not in the sink, because the driver thread has every sequence's next token to compute; they include what the client itself
//! waits.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use pointsman_sched::admit::Outcome;
use pointsman_sched::ids::Micros;
use pointsman_sched::request::{CancelCause, Failure, FinishReason, SinkEvent, SinkState, TokenLogprobs, TokenSink};
use pointsman_telemetry::{Metrics, RequestMetrics};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use crate::cache::Feed;
use crate::error::ApiError;
use crate::ports::Clock;
use crate::registry::InFlight;
use crate::text::{Detokenizer, StopMatcher};
use crate::trace::{Stage, Trace};

/// Bytes that one frame of a body gathers before it is handed to the connection.
pub(crate) const FRAME_BYTES: usize = 16 << 10;

/// An event with the choice that it belongs to.
#[derive(Debug)]
struct Tagged {
    choice: usize,
    event: Heard,
}

#[derive(Debug)]
enum Heard {
    Event(SinkEvent),
    /// So many tokens of the prompt are computed.
    Prefilled(u32),
}

/// The driver's end of the channel.
#[derive(Debug)]
struct ChannelSink {
    choice: usize,
    sender: mpsc::Sender<Tagged>,
    overflowed: Arc<AtomicBool>,
    /// Whether anybody wants to hear how the prompt goes.
    shows_progress: bool,
}

/// Makes the sinks of one HTTP request. Drop it when all are made: the receiver then sees when the last sink is gone.
#[derive(Debug)]
pub(crate) struct SinkMaker {
    sender: mpsc::Sender<Tagged>,
    overflowed: Arc<AtomicBool>,
    shows_progress: bool,
}

/// The receiving end.
#[derive(Debug)]
pub(crate) struct Events {
    receiver: mpsc::Receiver<Tagged>,
    /// Whether an event was lost because the client had not taken the earlier ones.
    overflowed: Arc<AtomicBool>,
}

/// How one choice becomes text.
#[derive(Debug)]
pub(crate) struct ChoiceParts {
    pub(crate) detokenizer: Detokenizer,
    pub(crate) stops: StopMatcher,
    /// Stop strings do not count before this many tokens.
    pub(crate) min_tokens: u32,
    pub(crate) metrics: Arc<RequestMetrics>,
    /// When the first token is expected; 0 where nobody knows.
    pub(crate) expected: Micros,
    /// Prompt tokens to give back to admission at the first token; 0 for all but the first choice of a prompt.
    pub(crate) queued_tokens: u32,
    /// The choice of the same prompt whose scores are this one's too, until they have come.
    pub(crate) scored_by: Option<usize>,
}

/// What holds for all choices.
#[derive(Debug)]
pub(crate) struct GenerationParts {
    pub(crate) host: Arc<Metrics>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) arrived: Micros,
    pub(crate) timeout_ms: u64,
    pub(crate) prompt_tokens: u32,
    pub(crate) trace: Arc<Trace>,
}

/// The live end of one HTTP request's engine requests.
#[derive(Debug)]
pub(crate) struct Generation {
    parts: GenerationParts,
    events: Events,
    choices: Vec<Choice>,
    open: usize,
    updates: VecDeque<Update>,
    /// Of choices that are still without the scores of their prompt, which come first; no more than they generate.
    held: Vec<(usize, Update)>,
    deadline: Pin<Box<Sleep>>,
    /// How it ended, if it ended early.
    failed: Option<Outcome>,
    in_flight: InFlight,
}

#[derive(Debug)]
struct Choice {
    parts: ChoiceParts,
    generated: u32,
    cached: u32,
    /// Tokens that were drafts, and drafts that did not come true.
    accepted: u32,
    rejected: u32,
    last_token: Micros,
    done: bool,
}

/// Something to tell the client.
#[derive(Debug, PartialEq)]
pub(crate) enum Update {
    /// A choice was scheduled for the first time.
    Started { choice: usize, queued_us: u64, cached_tokens: u32 },
    /// So many tokens of a choice's prompt are computed or were cached; only where progress is shown.
    Prefilled { choice: usize, tokens: u32 },
    /// How likely each token of a choice's prompt but the first is; only where that was asked.
    Scored { choice: usize, scores: Arc<[TokenLogprobs]> },
    /// Text, a token, an end, or several of these.
    Delta(Delta),
}

/// One step of a choice.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Delta {
    pub(crate) choice: usize,
    /// Text that became visible; may lag behind the tokens.
    pub(crate) text: String,
    pub(crate) token: Option<Token>,
    pub(crate) finish: Option<Finish>,
    /// As an upstream wrote it: a choice of one of its chunks, of which text and end are said above.
    pub(crate) raw: Option<Box<serde_json::Value>>,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) logprobs: Option<Box<TokenLogprobs>>,
}

/// Why a choice ended normally.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// The model ended it.
    Stop,
    /// The stop string at this place of the request's.
    StopString(usize),
    Length,
}

/// Tokens that a request cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) prompt: u32,
    pub(crate) completion: u32,
    pub(crate) cached: u32,
    /// Of the completion, drafts that came true; and drafts that did not.
    pub(crate) accepted: u32,
    pub(crate) rejected: u32,
}

/// Turns updates into the bytes of a response body.
pub(crate) trait Encode: Send + std::fmt::Debug {
    /// Before the first update.
    fn begin(&mut self, _out: &mut Vec<u8>) {}
    fn update(&mut self, out: &mut Vec<u8>, update: &Update);
    /// After an error nothing follows.
    fn error(&mut self, out: &mut Vec<u8>, error: &ApiError);
    fn end(&mut self, out: &mut Vec<u8>, totals: Totals);
}

/// Whoever writes a response body as there is something to write.
pub(crate) trait Tell: Unpin {
    /// Writes what there is, about [`FRAME_BYTES`] at most; true when the last byte is in `out`.
    fn tell(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> bool;
}

/// Tells one answer as it goes.
#[derive(Debug)]
pub(crate) struct Telling {
    feed: Feed,
    encoder: Box<dyn Encode>,
    has_begun: bool,
}

/// A response body that is told.
#[derive(Debug)]
pub(crate) struct EventBody<T> {
    teller: T,
    first: Vec<u8>,
    is_done: bool,
}

/// The channel of one HTTP request, with room for `capacity` events.
pub(crate) fn channel(capacity: usize, shows_progress: bool) -> (SinkMaker, Events) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let overflowed = Arc::new(AtomicBool::new(false));
    (SinkMaker { sender, overflowed: Arc::clone(&overflowed), shows_progress }, Events { receiver, overflowed })
}

// === impl SinkMaker ===

impl SinkMaker {
    pub(crate) fn sink(&self, choice: usize) -> Box<dyn TokenSink> {
        let (sender, overflowed) = (self.sender.clone(), Arc::clone(&self.overflowed));
        Box::new(ChannelSink { choice, sender, overflowed, shows_progress: self.shows_progress })
    }
}

// === impl ChannelSink ===

impl TokenSink for ChannelSink {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        match self.sender.try_send(Tagged { choice: self.choice, event: Heard::Event(event) }) {
            Ok(()) => SinkState::Open,
            Err(error) => {
                self.overflowed.fetch_or(matches!(error, mpsc::error::TrySendError::Full(_)), Ordering::Relaxed);
                SinkState::Closed
            }
        }
    }

    fn prefilled(&mut self, tokens: u32) {
        // The places are the answer's: progress takes an eighth of them at most, and is not missed.
        if self.shows_progress && self.sender.capacity() > self.sender.max_capacity() / 8 * 7 {
            let _ = self.sender.try_send(Tagged { choice: self.choice, event: Heard::Prefilled(tokens) });
        }
    }
}

// === impl Finish ===

impl Finish {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) => "stop",
            Self::Length => "length",
        }
    }

    /// Whether the text is complete.
    pub(crate) fn is_stop(self) -> bool {
        self != Self::Length
    }
}

// === impl Generation ===

impl Generation {
    pub(crate) fn new(parts: GenerationParts, events: Events, choices: Vec<ChoiceParts>, in_flight: InFlight) -> Self {
        let elapsed = parts.clock.now().saturating_sub(parts.arrived);
        let left = Duration::from_micros((parts.timeout_ms.saturating_mul(1_000)).saturating_sub(elapsed));
        let choice =
            |parts| Choice { parts, generated: 0, cached: 0, accepted: 0, rejected: 0, last_token: 0, done: false };
        Self {
            open: choices.len(),
            choices: choices.into_iter().map(choice).collect(),
            updates: VecDeque::new(),
            held: Vec::new(),
            failed: None,
            deadline: Box::pin(tokio::time::sleep(left)),
            parts,
            events,
            in_flight,
        }
    }

    /// Ends what still runs.
    pub(crate) fn cancel_all(&self, cause: CancelCause) {
        self.in_flight.cancel_all(cause);
    }

    /// Tokens so far.
    pub(crate) fn totals(&self) -> Totals {
        let sum = |f: fn(&Choice) -> u32| self.choices.iter().map(f).sum();
        Totals {
            prompt: self.parts.prompt_tokens,
            completion: sum(|c| c.generated),
            cached: sum(|c| c.cached),
            accepted: sum(|c| c.accepted),
            rejected: sum(|c| c.rejected),
        }
    }

    /// The next update; `None` after the last.
    pub(crate) fn poll_update(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Update, ApiError>>> {
        loop {
            if let Some(update) = self.updates.pop_front() {
                return Poll::Ready(Some(Ok(update)));
            }
            if self.open == 0 {
                return Poll::Ready(None);
            }
            if let Err(error) = ready!(self.poll_event(cx)) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    /// Takes one event from the channel into `updates`.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ApiError>> {
        let result = match self.events.receiver.poll_recv(cx) {
            Poll::Ready(Some(tagged)) => self.apply(tagged),
            // Every sink is gone and not every choice has ended.
            Poll::Ready(None) if self.events.overflowed.load(Ordering::Relaxed) => Err(ApiError::SlowClient),
            Poll::Ready(None) => Err(ApiError::DriverGone),
            Poll::Pending => {
                ready!(self.deadline.as_mut().poll(cx));
                self.in_flight.cancel_all(CancelCause::Deadline);
                Err(ApiError::Deadline { limit_ms: self.parts.timeout_ms })
            }
        };
        if let Err(error) = &result {
            // The scheduler has recorded the event; the counter of refusals is kept where clients see them.
            if let Some(reason) = error.reason() {
                self.parts.host.rejected(reason);
            }
            self.failed = Some(outcome(error));
            self.parts.trace.failed(error, self.parts.clock.now());
            self.log_failure(error);
        }
        Poll::Ready(result)
    }

    fn apply(&mut self, Tagged { choice: index, event }: Tagged) -> Result<(), ApiError> {
        let Some(choice) = self.choices.get_mut(index).filter(|c| !c.done) else { return Ok(()) };
        let event = match event {
            Heard::Event(event) => event,
            Heard::Prefilled(tokens) => {
                self.tell(index, Update::Prefilled { choice: index, tokens });
                return Ok(());
            }
        };
        match event {
            SinkEvent::Started { queued_us, cached_tokens } => {
                choice.parts.metrics.queue_time.observe(seconds(queued_us));
                // The other choices of a prompt share its blocks; what they find cached is not news.
                choice.cached = if choice.parts.queued_tokens > 0 { cached_tokens } else { 0 };
                self.parts.trace.cached(choice.cached);
                self.parts.trace.reached(Stage::Scheduled, self.parts.arrived.saturating_add(queued_us));
                self.tell(index, Update::Started { choice: index, queued_us, cached_tokens });
            }
            SinkEvent::Scored(scores) => self.scored(index, &Arc::from(scores)),
            SinkEvent::Token { token, logprobs, drafted } => {
                choice.accepted += u32::from(drafted.is_draft);
                choice.rejected += drafted.rejected;
                self.token(index, Token { id: token, logprobs });
            }
            SinkEvent::Finished(reason) => {
                self.in_flight.ended(index);
                self.finished(index, reason);
            }
            SinkEvent::Cancelled(cause) => {
                self.in_flight.ended(index);
                return Err(ApiError::cancelled(cause, self.parts.timeout_ms));
            }
            SinkEvent::Failed(failure) => {
                self.in_flight.ended(index);
                return Err(ApiError::Failed(failure));
            }
        }
        Ok(())
    }

    /// Tells what comes of a choice, but not before what is said of its prompt.
    fn tell(&mut self, index: usize, update: Update) {
        match self.choices[index].parts.scored_by {
            Some(first) => self.held.push((first, update)),
            None => self.updates.push_back(update),
        }
    }

    /// How likely a prompt is: for the choice that was asked, and for those that wait for it.
    fn scored(&mut self, index: usize, scores: &Arc<[TokenLogprobs]>) {
        let is_of = |choice: &Choice| choice.parts.scored_by == Some(index);
        let others = (0..self.choices.len()).filter(|&other| is_of(&self.choices[other]));
        let told = std::iter::once(index).chain(others);
        self.updates.extend(told.map(|choice| Update::Scored { choice, scores: Arc::clone(scores) }));
        let waited = self.choices.iter_mut().filter(|choice| choice.parts.scored_by == Some(index));
        waited.for_each(|choice| choice.parts.scored_by = None);
        self.updates.extend(self.held.extract_if(.., |(first, _)| *first == index).map(|(_, update)| update));
    }

    fn token(&mut self, index: usize, token: Token) {
        let now = self.parts.clock.now();
        let choice = &mut self.choices[index];
        if choice.generated == 0 {
            choice.parts.metrics.ttft.observe(seconds(now.saturating_sub(self.parts.arrived)));
            let expected = choice.parts.expected;
            if expected > 0 {
                choice.parts.metrics.ttft_predicted.observe(seconds(expected.saturating_sub(self.parts.arrived)));
                choice.parts.metrics.ttft_error.observe(seconds(expected.abs_diff(now)));
            }
            self.in_flight.permit.computed(choice.parts.queued_tokens);
        } else {
            choice.parts.metrics.itl.observe(seconds(now.saturating_sub(choice.last_token)));
        }
        choice.last_token = now;
        choice.generated += 1;
        self.parts.trace.reached(Stage::FirstToken, now);
        self.parts.trace.generated();
        let piece = choice.parts.detokenizer.push(token.id);
        let (text, stopped) = if choice.generated > choice.parts.min_tokens {
            let matched = choice.parts.stops.push(piece);
            (matched.text, matched.stopped)
        } else {
            (piece, None)
        };
        let finish = stopped.map(Finish::StopString);
        self.tell(index, Update::Delta(Delta { choice: index, text, token: Some(token), finish, raw: None }));
        if let Some(finish) = finish {
            self.in_flight.cancel(index, CancelCause::StopString);
            self.close(index, finish);
        }
    }

    fn finished(&mut self, index: usize, reason: FinishReason) {
        let choice = &mut self.choices[index];
        let rest = choice.parts.detokenizer.finish();
        let matched = choice.parts.stops.push(rest);
        let mut text = matched.text;
        let ended = match reason {
            // The stop token was computed as well: usage counts it.
            FinishReason::Stop(_) => {
                choice.generated += 1;
                self.parts.trace.generated();
                Finish::Stop
            }
            FinishReason::Length => Finish::Length,
        };
        let finish = matched.stopped.map_or(ended, Finish::StopString);
        if matched.stopped.is_none() {
            text.push_str(&choice.parts.stops.finish());
        }
        self.tell(index, Update::Delta(Delta { choice: index, text, token: None, finish: Some(finish), raw: None }));
        self.close(index, finish);
    }

    fn close(&mut self, index: usize, finish: Finish) {
        let now = self.parts.clock.now();
        let choice = &mut self.choices[index];
        choice.done = true;
        self.open -= 1;
        choice.parts.metrics.e2e.observe(seconds(now.saturating_sub(self.parts.arrived)));
        match finish {
            Finish::Stop | Finish::StopString(_) => choice.parts.metrics.finished_stop.inc(),
            Finish::Length => choice.parts.metrics.finished_length.inc(),
        }
        if self.open == 0 {
            self.parts.trace.finished(finish.as_str(), now);
        }
    }

    fn log_failure(&self, error: &ApiError) {
        let request = &**self.in_flight.id();
        match error {
            ApiError::Failed(Failure::Engine(what)) => tracing::error!(request, %what, "the engine failed a request"),
            other => tracing::debug!(request, error = %other, "a request ended early"),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // What a client did not read was computed all the same.
        while let Ok(Tagged { choice, event }) = self.events.receiver.try_recv() {
            let Some(choice) = self.choices.get_mut(choice).filter(|c| !c.done) else { continue };
            if let Heard::Event(SinkEvent::Token { .. } | SinkEvent::Finished(FinishReason::Stop(_))) = event {
                choice.generated += 1;
            }
        }
        for choice in self.choices.iter().filter(|c| !c.done) {
            choice.parts.metrics.finished_abort.inc();
        }
        let Totals { completion, cached, .. } = self.totals();
        let over = if self.open == 0 { Outcome::Finished } else { Outcome::Cancelled };
        self.in_flight.permit.ended(self.failed.unwrap_or(over), cached, completion);
        if self.open > 0 && self.failed.is_none() {
            self.in_flight.abandoned(&self.parts.trace, self.parts.clock.now());
        }
    }
}

/// What an error of the stream means to the admission policy.
fn outcome(error: &ApiError) -> Outcome {
    match error {
        ApiError::DriverGone => Outcome::Failed,
        ApiError::Failed(Failure::Mask(_)) => Outcome::Cancelled,
        ApiError::Failed(_) if error.reason().is_none() => Outcome::Failed,
        ApiError::Failed(_) => Outcome::Rejected,
        _ => Outcome::Cancelled,
    }
}

fn seconds(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64()
}

// === impl Telling ===

impl Telling {
    pub(crate) fn new(feed: Feed, encoder: Box<dyn Encode>) -> Self {
        Self { feed, encoder, has_begun: false }
    }
}

impl Tell for Telling {
    fn tell(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> bool {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.encoder.begin(out);
        }
        while out.len() < FRAME_BYTES {
            match self.feed.poll_update(cx) {
                Poll::Ready(Some(Ok(update))) => self.encoder.update(out, &update),
                Poll::Ready(Some(Err(error))) => {
                    self.encoder.error(out, &error);
                    self.feed.cancel();
                    return true;
                }
                Poll::Ready(None) => {
                    self.encoder.end(out, self.feed.totals());
                    return true;
                }
                Poll::Pending => return false,
            }
        }
        cx.waker().wake_by_ref();
        false
    }
}

// === impl EventBody ===

impl<T> EventBody<T> {
    pub(crate) fn new(teller: T) -> Self {
        Self { teller, first: Vec::new(), is_done: false }
    }

    /// What has been told by now comes first.
    pub(crate) fn beginning_with(self, first: Vec<u8>) -> Self {
        Self { first, ..self }
    }
}

impl<T: Tell> Body for EventBody<T> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if this.is_done {
            return Poll::Ready(None);
        }
        let mut out = std::mem::take(&mut this.first);
        this.is_done = this.teller.tell(cx, &mut out);
        match (out.is_empty(), this.is_done) {
            (true, false) => Poll::Pending,
            (true, true) => Poll::Ready(None),
            (false, _) => Poll::Ready(Some(Ok(Frame::data(out.into())))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_done
    }
}
