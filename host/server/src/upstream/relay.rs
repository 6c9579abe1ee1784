//! An upstream's answer on its way to the client: what a `Generation` is to tokens of a replica here.
//!
//! Whoever polls it is the response body or the handler; dropping it, a cancel or the deadline closes the connection to the
//! upstream, or resets its stream, in the same poll.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pointsman_sched::admit::Outcome;
use pointsman_sched::ids::Micros;
use pointsman_telemetry::{Event, EventKind, Recorder, RequestMetrics, UpstreamOutcome};
use tokio::time::Sleep;

use super::answer::{Answer, Said};
use super::mishap::Mishap;
use super::{Begun, Seat};
use crate::error::ApiError;
use crate::ports::Clock;
use crate::registry::InFlight;
use crate::stream::{Finish, Totals, Update};
use crate::trace::{Stage, Trace};

/// What its request brings along.
#[derive(Debug)]
pub(crate) struct RelayParts {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Arc<RequestMetrics>,
    pub(crate) recorder: Recorder,
    /// What its events have in common.
    pub(crate) event: Event,
    pub(crate) arrived: Micros,
    pub(crate) timeout_ms: u64,
    /// As counted here; the upstream's own count takes its place.
    pub(crate) prompt_tokens: u32,
    pub(crate) n_choices: usize,
    pub(crate) in_flight: InFlight,
    pub(crate) trace: Arc<Trace>,
}

/// The live end of a request that was sent to an upstream.
pub(crate) struct Relay {
    parts: RelayParts,
    seat: Seat,
    /// None once it is over, whatever ended it: the connection is closed or back in the pool.
    answer: Option<Answer>,
    updates: VecDeque<Update>,
    /// Which choices go on.
    open: Vec<bool>,
    /// How the last one ended.
    finish: Finish,
    totals: Totals,
    /// Whether `totals` are the upstream's.
    is_counted: bool,
    last_piece: Micros,
    deadline: Pin<Box<Sleep>>,
    cancel_asked: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: Option<Outcome>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("parts", &self.parts).field("seat", &self.seat).finish_non_exhaustive()
    }
}

impl Relay {
    pub(crate) fn new(mut parts: RelayParts, seat: Seat, Begun { answer, first }: Begun) -> Self {
        let elapsed = parts.clock.now().saturating_sub(parts.arrived);
        let left = Duration::from_micros(parts.timeout_ms.saturating_mul(1_000).saturating_sub(elapsed));
        parts.in_flight.permit.computed(parts.prompt_tokens);
        let mut relay = Self {
            seat,
            answer: Some(answer),
            updates: VecDeque::new(),
            open: vec![true; parts.n_choices],
            finish: Finish::Stop,
            totals: Totals { prompt: parts.prompt_tokens, completion: 0, cached: 0, accepted: 0, rejected: 0 },
            is_counted: false,
            last_piece: 0,
            deadline: Box::pin(tokio::time::sleep(left)),
            cancel_asked: Box::pin(parts.in_flight.told_to_cancel()),
            ended: None,
            parts,
        };
        relay.take(first);
        relay
    }

    /// Tokens so far: an estimate until the upstream has counted them.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// The next update; `None` after the last.
    pub(crate) fn poll_update(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Update, ApiError>>> {
        loop {
            if let Some(update) = self.updates.pop_front() {
                return Poll::Ready(Some(Ok(update)));
            }
            if self.answer.is_none() {
                return Poll::Ready(None);
            }
            // First, so that an upstream that never pauses cannot keep it from ending.
            if let Poll::Ready(error) = self.poll_end(cx) {
                return Poll::Ready(Some(Err(self.failed(error))));
            }
            let Some(answer) = &mut self.answer else { return Poll::Ready(None) };
            let said = match ready!(answer.poll_event(cx)) {
                Some(Ok(data)) => Said::read(&data, self.parts.n_choices),
                Some(Err(mishap)) => Err(mishap),
                None if !self.open.contains(&true) => {
                    self.finished();
                    return Poll::Ready(None);
                }
                None if answer.is_done() => Err(Mishap::Unfinished),
                None => Err(Mishap::Broken),
            };
            match said {
                Ok(said) => self.take(said),
                Err(mishap) => {
                    self.seat.ended(mishap.outcome());
                    let request = &**self.parts.in_flight.id();
                    let upstream = &**self.seat.upstream().name();
                    tracing::info!(request, upstream, mishap = mishap.logged(), "an upstream failed a request");
                    let upstream = Arc::clone(self.seat.upstream().name());
                    return Poll::Ready(Some(Err(self.failed(ApiError::Upstream { upstream, mishap }))));
                }
            }
        }
    }

    /// What ends it from this side.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<ApiError> {
        if self.cancel_asked.as_mut().poll(cx).is_ready() {
            return Poll::Ready(ApiError::Cancelled);
        }
        self.deadline.as_mut().poll(cx).map(|()| ApiError::Deadline { limit_ms: self.parts.timeout_ms })
    }

    fn take(&mut self, Said { deltas, usage }: Said) {
        for delta in deltas {
            if !delta.text.is_empty() || delta.raw.as_ref().is_some_and(|raw| raw["delta"]["tool_calls"].is_array()) {
                self.piece();
            }
            if let Some(finish) = delta.finish {
                (self.open[delta.choice], self.finish) = (false, finish);
            }
            self.updates.push_back(Update::Delta(delta));
        }
        if let Some(usage) = usage {
            // Some count as they go, from nothing on.
            let completion = usage.completion.max(self.totals.completion);
            (self.totals, self.is_counted) = (Totals { completion, ..usage }, usage.completion > 0);
        }
    }

    /// Something of the text has come; until the upstream counts, each counts for a token.
    fn piece(&mut self) {
        let now = self.parts.clock.now();
        let since_arrival = now.saturating_sub(self.parts.arrived);
        if self.last_piece == 0 {
            self.parts.metrics.ttft.observe(seconds(since_arrival));
            self.record(Event { a: since_arrival, ..Event::new(now, EventKind::FirstToken) });
        } else {
            self.parts.metrics.itl.observe(seconds(now.saturating_sub(self.last_piece)));
        }
        self.last_piece = now;
        self.parts.trace.reached(Stage::FirstToken, now);
        if !self.is_counted {
            self.totals.completion += 1;
        }
    }

    fn finished(&mut self) {
        self.seat.ended(UpstreamOutcome::Answered);
        let now = self.end(Outcome::Finished, EventKind::Finished);
        self.parts.metrics.e2e.observe(seconds(now.saturating_sub(self.parts.arrived)));
        match self.finish {
            Finish::Length => self.parts.metrics.finished_length.inc(),
            Finish::Stop | Finish::StopString(_) => self.parts.metrics.finished_stop.inc(),
        }
        self.parts.trace.finished(self.finish.as_str(), now);
    }

    fn failed(&mut self, error: ApiError) -> ApiError {
        let is_ours = matches!(error, ApiError::Cancelled | ApiError::Deadline { .. });
        let (outcome, kind) = match is_ours {
            true => (Outcome::Cancelled, EventKind::Cancelled),
            false => (Outcome::Failed, EventKind::Failed),
        };
        let now = self.end(outcome, kind);
        self.parts.metrics.finished_abort.inc();
        self.parts.trace.failed(&error, now);
        tracing::debug!(request = &**self.parts.in_flight.id(), %error, "a request at an upstream ended early");
        error
    }

    /// Lets go of the connection, and says so where it counts.
    fn end(&mut self, outcome: Outcome, kind: EventKind) -> Micros {
        self.answer = None;
        self.updates.clear();
        self.ended = Some(outcome);
        let (now, Totals { completion, cached, .. }) = (self.parts.clock.now(), self.totals);
        self.parts.trace.counted(cached, completion);
        let (a, b) = (now.saturating_sub(self.parts.arrived), completion.into());
        self.record(Event { a, b, ..Event::new(now, kind) });
        now
    }

    fn record(&self, Event { at, kind, a, b, .. }: Event) {
        let cached_tokens = self.totals.cached;
        self.parts.recorder.record(Event { at, kind, a, b, cached_tokens, ..self.parts.event });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let now = self.end(Outcome::Cancelled, EventKind::Cancelled);
            self.parts.metrics.finished_abort.inc();
            self.parts.in_flight.abandoned(&self.parts.trace, now);
        }
        let Totals { completion, cached, .. } = self.totals;
        // The account has the prompt as it was counted here.
        let cached = cached.min(self.parts.prompt_tokens);
        self.parts.in_flight.permit.ended(self.ended.unwrap_or(Outcome::Cancelled), cached, completion);
    }
}

fn seconds(micros: Micros) -> f64 {
    Duration::from_micros(micros).as_secs_f64()
}
