//! Where the updates of a request come from: from its own generation, which notes them for others, from an answer that an
//! equal request got, or from an upstream.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pointsman_sched::admit::Outcome;
use pointsman_sched::ids::Micros;
use pointsman_sched::request::CancelCause;

use super::flight::Cursor;
use super::{Flight, Lead};
use crate::dispatch::Origin;
use crate::error::ApiError;
use crate::ports::Clock;
use crate::registry::InFlight;
use crate::stream::{Generation, Totals, Update};
use crate::trace::Trace;
use crate::upstream::Relay;

/// One HTTP request's answer, on its way.
#[derive(Debug)]
pub(crate) struct Feed {
    source: Source,
    /// Heard and not told yet.
    ahead: VecDeque<Update>,
    origin: Origin,
}

#[derive(Debug)]
enum Source {
    /// With the duty to note it for others, where there may be any.
    Own(Box<Generation>, Option<Box<Lead>>),
    Kept(Box<Replay>),
    Relayed(Box<Relay>),
}

/// A request that gets the answer to an equal one.
#[derive(Debug)]
struct Replay {
    flight: Arc<Flight>,
    seat: Seat,
    cursor: Cursor,
    completion: u32,
    has_ended: bool,
}

/// What a request holds while its answer is told.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) prompt_tokens: u32,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) in_flight: InFlight,
    pub(crate) trace: Arc<Trace>,
}

// === impl Feed ===

impl Feed {
    /// Computed for this request.
    pub(crate) fn own(generation: Generation, origin: Origin, lead: Option<Lead>) -> Self {
        Self { source: Source::Own(Box::new(generation), lead.map(Box::new)), ahead: VecDeque::new(), origin }
    }

    /// Computed elsewhere for this request.
    pub(crate) fn relayed(relay: Relay, origin: Origin) -> Self {
        Self { source: Source::Relayed(Box::new(relay)), ahead: VecDeque::new(), origin }
    }

    /// From a flight that has ended well; none from any other. `choices` has the prompt tokens of each: none of them needed
    /// computation.
    pub(crate) fn kept(flight: Arc<Flight>, seat: Seat, queued_us: Micros, choices: &[u32]) -> Option<Self> {
        let origin = flight.told()?.origin.clone();
        let started = choices.iter().enumerate();
        let started = started.map(|(choice, &cached_tokens)| Update::Started { choice, queued_us, cached_tokens });
        let ahead = started.collect();
        let replay = Replay { flight, seat, cursor: Cursor::default(), completion: 0, has_ended: false };
        Some(Self { source: Source::Kept(Box::new(replay)), ahead, origin })
    }

    /// Who computes it, or did.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Waits until there is text to send, or all is over: an error up to here still has a status of its own.
    pub(crate) async fn first(&mut self) -> Result<(), ApiError> {
        poll_fn(|cx| {
            while !self.ahead.iter().any(|update| matches!(update, Update::Delta(_))) {
                match ready!(self.source.poll(cx, &self.origin)) {
                    Some(update) => self.ahead.push_back(update?),
                    None => break,
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// The next update; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        poll_fn(|cx| self.poll_update(cx)).await
    }

    pub(crate) fn poll_update(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Update, ApiError>>> {
        match self.ahead.pop_front() {
            Some(update) => Poll::Ready(Some(Ok(update))),
            None => self.source.poll(cx, &self.origin),
        }
    }

    /// Tokens so far. Of an answer to an equal request nothing was computed: its whole prompt counts as cached.
    pub(crate) fn totals(&self) -> Totals {
        match &self.source {
            Source::Own(generation, _) => generation.totals(),
            Source::Relayed(relay) => relay.totals(),
            Source::Kept(replay) => {
                let prompt = replay.seat.prompt_tokens;
                Totals { prompt, completion: replay.completion, cached: prompt, accepted: 0, rejected: 0 }
            }
        }
    }

    /// Ends what is being computed.
    pub(crate) fn cancel(&self) {
        if let Source::Own(generation, _) = &self.source {
            generation.cancel_all(CancelCause::ClientGone);
        }
    }
}

// === impl Source ===

impl Source {
    fn poll(&mut self, cx: &mut Context<'_>, origin: &Origin) -> Poll<Option<Result<Update, ApiError>>> {
        let (generation, lead) = match self {
            Self::Own(generation, lead) => (generation, lead),
            Self::Kept(replay) => return Poll::Ready(replay.next().map(Ok)),
            Self::Relayed(relay) => return relay.poll_update(cx),
        };
        let next = ready!(generation.poll_update(cx));
        match &next {
            Some(Ok(Update::Delta(delta))) => lead.iter_mut().for_each(|lead| lead.tell(delta)),
            Some(Ok(Update::Started { .. } | Update::Prefilled { .. } | Update::Scored { .. })) => {}
            Some(Err(_)) => *lead = None,
            None => {
                if let Some(lead) = lead.take() {
                    lead.end(origin, generation.totals().completion);
                }
            }
        }
        Poll::Ready(next)
    }
}

// === impl Replay ===

impl Replay {
    fn next(&mut self) -> Option<Update> {
        let told = self.flight.told()?;
        if let Some(delta) = told.log.read(&mut self.cursor) {
            return Some(Update::Delta(delta));
        }
        if !std::mem::replace(&mut self.has_ended, true) {
            self.completion = told.completion;
            self.seat.trace.cached(self.seat.prompt_tokens);
            self.seat.trace.finished("cached", self.seat.clock.now());
        }
        None
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        let Self { seat: Seat { prompt_tokens, clock, in_flight, trace }, has_ended, .. } = self;
        // The admission policy hears of an answer that cost nothing.
        let outcome = if *has_ended { Outcome::Finished } else { Outcome::Cancelled };
        in_flight.permit.ended(outcome, *prompt_tokens, 0);
        if !*has_ended {
            in_flight.abandoned(trace, clock.now());
        }
    }
}
