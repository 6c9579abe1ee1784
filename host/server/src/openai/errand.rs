//! A request that has been let in, with all that it takes to have it computed: now, or later where it first waits for the
//! answer to an equal one.

use std::sync::Arc;
use std::time::Duration;

use pointsman_sched::admit::Outcome;
use pointsman_sched::ids::{ReplicaId, RequestId};
use pointsman_sched::request::Sampling;
use pointsman_telemetry::{Event, EventKind};

use super::generate::{Arrival, Job};
use super::progress::Task;
use crate::cache::{self, Feed, Flight, Found, Key, Lead, Seat, Served, Subject};
use crate::dispatch::{Assignment, Dispatch, Placed, Placement, Prompt, Sent, Terms, record_rejection};
use crate::error::ApiError;
use crate::ports::{Authors, Clock};
use crate::registry::{InFlight, hedge_of};
use crate::stream::{ChoiceParts, Events, Generation, GenerationParts, channel};
use crate::trace::Trace;
use crate::upstream::{Begun, Blame, Mishap, Onward, Relay, RelayParts, Upstream};

/// What was let in.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) arrival: Arrival,
    pub(super) job: Job,
    pub(super) sampling: Vec<Arc<Sampling>>,
    /// Of each prompt.
    pub(super) terms: Vec<Terms>,
    /// Of its first choice.
    pub(super) id: RequestId,
    pub(super) assigned: Option<Assignment>,
    /// Whether a rollout between variants measures it.
    pub(super) is_trial: bool,
    pub(super) prompt_tokens: u32,
    /// Whether its prompt counts among those that wait for computation.
    pub(super) has_room: bool,
    pub(super) in_flight: InFlight,
    pub(super) trace: Arc<Trace>,
}

/// A client that may go away while its request waits for another.
struct Waiting<'a> {
    clock: &'a dyn Clock,
    in_flight: &'a InFlight,
    trace: &'a Trace,
    is_over: bool,
}

/// A request on its way.
enum Launched<T> {
    /// Submitted to replicas of this host.
    Here(Events, Vec<ChoiceParts>, Vec<Placement>),
    /// At an upstream, with how far it is there.
    There(T),
}

/// What came of asking an upstream, with the place there.
type Asked = (Sent, Result<Begun, Mishap>);

/// A client that may go away while an upstream is asked.
struct Asking<'a> {
    errand: &'a Errand,
    event: Event,
    is_over: bool,
}

impl Errand {
    /// Finds its answer or has it computed; with how the cache served it, where there is one.
    pub(super) async fn run(mut self) -> Result<(Feed, Option<Served>), ApiError> {
        let state = Arc::clone(&self.arrival.state);
        if !state.cache.is_on() {
            self.give_way().await?;
            return self.launch(None).await.map(|feed| (feed, None));
        }
        loop {
            let authors = state.policies.authors();
            if !self.is_cacheable(authors) {
                self.give_way().await?;
                state.cache.count(Served::Bypass);
                return self.launch(None).await.map(|feed| (feed, Some(Served::Bypass)));
            }
            let key = self.key(authors);
            if self.arrival.turns.is_some() && !state.cache.knows(&key) {
                // Before others may wait for it: they have no draft to wait for.
                self.give_way().await?;
                continue;
            }
            let (flight, served) = match state.cache.find(key, self.asks()) {
                Found::Lead(flight, epoch, served) => {
                    let lead = Lead::new(&state, key, (flight, epoch), (authors, self.is_open()));
                    state.cache.count(served);
                    return self.launch(Some(lead)).await.map(|feed| (feed, Some(served)));
                }
                Found::Hit(flight, age) => (flight, Served::Hit { age_s: age / 1_000_000 }),
                Found::Joined(flight) => {
                    if !self.wait(&flight).await? {
                        // Its leader has gone, or was refused: that need not be so for this one.
                        continue;
                    }
                    (flight, Served::Joined)
                }
            };
            state.cache.count(served);
            return self.replay(flight).map(|feed| (feed, Some(served)));
        }
    }

    /// What there is to compute, choice by choice.
    pub(super) fn tasks(&self) -> Vec<Task> {
        let prompts = self.job.prompts.iter().zip(&self.terms);
        let task = |(prompt, terms): (&Prompt, &Terms)| Task::new(prompt.tokens.len(), terms.max_new_tokens);
        prompts.map(task).flat_map(|task| std::iter::repeat_n(task, self.sampling.len())).collect()
    }

    fn asks(&self) -> cache::Terms {
        cache::Terms {
            now: self.arrival.state.clock.now(),
            priority: self.terms.first().map_or_else(Default::default, |terms| terms.priority),
            max_age: self.arrival.wish.max_age,
            refresh: self.arrival.wish.no_cache,
        }
    }

    /// Whether its answer may be another's: the request must say all that it depends on, or its client must not mind, and
    /// nothing may be measured by it.
    fn is_cacheable(&self, authors: Authors) -> bool {
        let params = &self.job.params;
        let is_determined =
            params.key_seed().is_some() || self.sampling.first().is_some_and(|sampling| sampling.temperature == 0.0);
        let is_measured = self.is_trial || authors.sampler.is_trial || authors.router.is_trial;
        // What an upstream answers is not a function of what is known here.
        let is_ours = !self.job.target.has_upstreams();
        // It tells texts, and no prompts.
        let is_text = params.prompt_logprobs.is_none();
        is_ours
            && is_text
            && !self.arrival.wish.no_store
            && !is_measured
            && params.cache_response.unwrap_or(is_determined)
    }

    /// Whether it is left to the router which variant answers.
    fn is_open(&self) -> bool {
        self.assigned.is_none() && self.job.target.variants.len() > 1
    }

    fn key(&self, authors: Authors) -> Key {
        let Self { arrival, job, sampling, terms, assigned, .. } = self;
        let sampling = sampling.first().map(|first| &**first);
        Subject {
            caller: &arrival.caller,
            target: &job.target,
            params: &job.params,
            prompts: &job.prompts,
            terms,
            sampling: sampling.unwrap_or(&Sampling::default()),
            assigned: assigned.as_ref().map(|assigned| &assigned.variant),
            authors,
            is_open: self.is_open(),
        }
        .key()
    }

    /// Waits for the end of an equal request; whether it was a good one. What ends this one meanwhile is its own.
    async fn wait(&mut self, flight: &Flight) -> Result<bool, ApiError> {
        // It waits for nothing to be computed, and has cost nothing if it ends here.
        self.in_flight.permit.computed(self.prompt_tokens);
        self.in_flight.permit.ended(Outcome::Cancelled, self.prompt_tokens, 0);
        self.has_room = false;
        self.until(flight.over()).await
    }

    /// Leaves the device to the draft, where both need the same one: until that has ended, or for as long as it may take.
    async fn give_way(&mut self) -> Result<(), ApiError> {
        let Some(turns) = self.arrival.turns.take().filter(|turns| !turns.lead.is_zero()) else { return Ok(()) };
        let drafted = tokio::time::timeout(turns.lead, turns.drafted.notified());
        // Late or not, now it is on.
        self.until(drafted).await.map(drop)
    }

    /// Waits for something else, unless the request ends first.
    async fn until<T>(&self, over: impl Future<Output = T>) -> Result<T, ApiError> {
        let Self { arrival, job, terms, in_flight, trace, .. } = self;
        let limit_ms = job.params.timeout_ms;
        let deadline = terms.first().map_or(0, |terms| terms.deadline);
        let left = Duration::from_micros(deadline.saturating_sub(arrival.state.clock.now()));
        let mut waiting = Waiting { clock: &*arrival.state.clock, in_flight, trace, is_over: false };
        let waited = tokio::select! {
            biased;
            () = in_flight.cancel_asked() => Err(ApiError::Cancelled),
            over = over => Ok(over),
            () = tokio::time::sleep(left) => Err(ApiError::Deadline { limit_ms }),
        };
        waiting.is_over = true;
        drop(waiting);
        waited.inspect_err(|error| trace.failed(error, arrival.state.clock.now()))
    }

    /// Tells what an equal request was told.
    fn replay(mut self, flight: Arc<Flight>) -> Result<Feed, ApiError> {
        let clock = Arc::clone(&self.arrival.state.clock);
        let waited = clock.now().saturating_sub(self.arrival.arrived);
        let tokens = self.job.prompts.iter().map(|prompt| u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX));
        let choices: Vec<u32> = tokens.flat_map(|tokens| std::iter::repeat_n(tokens, self.sampling.len())).collect();
        self.in_flight.permit.computed(self.prompt_tokens);
        let Self { prompt_tokens, in_flight, trace, .. } = self;
        Feed::kept(flight, Seat { prompt_tokens, clock, in_flight, trace }, waited, &choices).ok_or(ApiError::Internal)
    }

    /// Has it computed, perhaps for others too.
    async fn launch(mut self, mut lead: Option<Lead>) -> Result<Feed, ApiError> {
        let launched = self.place().await.inspect_err(|error| {
            self.trace.failed(error, self.arrival.state.clock.now());
            let about = (self.prompt_tokens, self.assigned.as_ref());
            record_rejection(&self.arrival.state, &self.arrival.caller, error, about);
        })?;
        let (events, choices, placements) = match launched {
            Launched::Here(events, choices, placements) => (events, choices, placements),
            Launched::There((sent, begun)) => return Ok(self.relayed(sent, begun)),
        };
        let origin = placements.first().ok_or(ApiError::Internal)?.origin();
        if placements.iter().any(|placement| placement.strays) {
            lead.iter_mut().for_each(Lead::strays);
        }
        let parts = GenerationParts {
            host: Arc::clone(&self.arrival.state.metrics),
            clock: Arc::clone(&self.arrival.state.clock),
            arrived: self.arrival.arrived,
            timeout_ms: self.job.params.timeout_ms,
            prompt_tokens: self.prompt_tokens,
            trace: self.trace,
        };
        Ok(Feed::own(Generation::new(parts, events, choices, self.in_flight), origin, lead))
    }

    /// What tells the client what an upstream answers.
    fn relayed(self, Sent { placement, seat, event }: Sent, begun: Begun) -> Feed {
        let Self { arrival: Arrival { state, arrived, .. }, job, sampling, prompt_tokens, in_flight, trace, .. } = self;
        let parts = RelayParts {
            clock: Arc::clone(&state.clock),
            metrics: state.request_metrics(&placement.variant.id),
            recorder: state.recorder.clone(),
            event,
            arrived,
            timeout_ms: job.params.timeout_ms,
            prompt_tokens,
            n_choices: sampling.len(),
            in_flight,
            trace,
        };
        Feed::relayed(Relay::new(parts, seat, begun), placement.origin())
    }

    /// Finds who serves it. An upstream has then begun to answer.
    async fn place(&mut self) -> Result<Launched<(Sent, Begun)>, ApiError> {
        match self.submit(&[])? {
            Launched::Here(events, choices, placements) => Ok(Launched::Here(events, choices, placements)),
            // Most of what waits for this is served here, and has no room for what it takes elsewhere.
            Launched::There(sent) => Box::pin(self.elsewhere(sent)).await,
        }
    }

    /// Waits until an upstream begins to answer. Where one fails before that, whoever the router chooses among the others is
    /// asked, and nothing has been told to the client.
    async fn elsewhere(&mut self, mut sent: Sent) -> Result<Launched<(Sent, Begun)>, ApiError> {
        let mut failed = Vec::new();
        loop {
            // Who goes away from here on pays for the prompt that is being worked on.
            self.in_flight.permit.ended(Outcome::Cancelled, 0, 0);
            let event = sent.event;
            let asked = self.ask(sent, &mut failed).await.map_err(|error| self.unserved(error, event))?;
            let mishap = match asked {
                (by, Ok(begun)) => {
                    self.note_tried(&by, "answered".to_owned());
                    return Ok(Launched::There((by, begun)));
                }
                (by, Err(mishap)) => {
                    self.note_failed(&by, &mishap);
                    sent = by;
                    mishap
                }
            };
            let blame = mishap.blame();
            self.in_flight.permit.ended(
                if blame == Blame::Upstream { Outcome::Failed } else { Outcome::Rejected },
                0,
                0,
            );
            let upstream = Arc::clone(sent.seat.upstream());
            let error = ApiError::Upstream { upstream: Arc::clone(upstream.name()), mishap };
            failed.push(sent.placement.replica.id);
            let next = if blame == Blame::Client { None } else { self.submit(&failed).ok() };
            let Some(next) = next else { return Err(self.unserved(error, sent.event)) };
            upstream.retried();
            match next {
                Launched::There(next) => sent = next,
                Launched::Here(events, choices, placements) => return Ok(Launched::Here(events, choices, placements)),
            }
        }
    }

    /// Sends it to an upstream and waits until that, or another, begins to answer. What ends it from this side is the outer error.
    async fn ask(&self, sent: Sent, without: &mut Vec<ReplicaId>) -> Result<Asked, ApiError> {
        let Self { arrival: Arrival { state, .. }, job, terms, in_flight, .. } = self;
        let Some(onward) = &job.onward else { return Err(ApiError::Internal) };
        let limit_ms = job.params.timeout_ms;
        let deadline = terms.first().map_or(0, |terms| terms.deadline);
        let left = Duration::from_micros(deadline.saturating_sub(state.clock.now()));
        let mut asking = Asking { errand: self, event: sent.event, is_over: false };
        let asked = tokio::select! {
            biased;
            () = in_flight.cancel_asked() => Err(ApiError::Cancelled),
            () = tokio::time::sleep(left) => Err(ApiError::Deadline { limit_ms }),
            asked = self.race(onward, sent, without) => Ok(asked),
        };
        asking.is_over = true;
        drop(asking);
        asked
    }

    /// Asks an upstream, and another beside it where that takes its time: who begins to answer first is kept, and the other let
    /// go. Where one of the two fails, the other goes on alone, unless the first finds the request itself at fault.
    async fn race(&self, onward: &Onward, sent: Sent, without: &mut Vec<ReplicaId>) -> Asked {
        let (tag, clock) = (&*self.arrival.tag, &self.arrival.state.clock);
        let upstream = Arc::clone(sent.seat.upstream());
        // A request has one hedge, and a trial is to show how it ends.
        let patience = upstream.hedge_after().filter(|_| without.is_empty() && !sent.seat.is_trial());
        let Some(patience) = patience else { return sent.ask(onward, tag).await };
        let (slow, hedge_tag, began) = (Arc::clone(&sent.placement.replica), hedge_of(tag), clock.now());
        let mut first = Box::pin(sent.ask(onward, tag));
        if let Ok(asked) = tokio::time::timeout(patience, &mut first).await {
            return asked;
        }
        let Some(hedge) = self.hedge(slow.id, &upstream) else { return first.await };
        let other = Arc::clone(&hedge.placement.replica);
        let mut second = Box::pin(hedge.ask(onward, &hedge_tag));
        let ((by, begun), left, behind) = tokio::select! {
            biased;
            asked = &mut first => (asked, second, other),
            asked = &mut second => (asked, first, Arc::clone(&slow)),
        };
        let is_first = by.placement.replica.id == slow.id;
        match &begun {
            Err(mishap) if !is_first || mishap.blame() != Blame::Client => {
                self.note_failed(&by, mishap);
                without.push(by.placement.replica.id);
                if !is_first {
                    return left.await;
                }
                upstream.retried();
                let asked = left.await;
                if asked.1.is_ok() {
                    upstream.hedge_won();
                }
                asked
            }
            _ => {
                if !is_first {
                    upstream.hedge_won();
                    upstream.outrun(clock.now().saturating_sub(began));
                }
                self.trace.tried(&behind.name, "slower than another".to_owned(), clock.now());
                (by, begun)
            }
        }
    }

    /// Another upstream for a request that one is slow to begin, where there is one that the router chooses.
    fn hedge(&self, slow: ReplicaId, upstream: &Upstream) -> Option<Sent> {
        upstream.hedged(|| match self.submit_to_all_but(&[slow], true) {
            Ok(Launched::There(sent)) => Some(sent),
            _ => None,
        })
    }

    fn note_failed(&self, sent: &Sent, mishap: &Mishap) {
        let upstream = &**sent.seat.upstream().name();
        tracing::info!(
            request = &*self.arrival.tag,
            upstream,
            mishap = mishap.logged(),
            "an upstream failed a request"
        );
        self.note_tried(sent, mishap.to_string());
    }

    /// Keeps what came of asking an upstream for whoever asks why.
    fn note_tried(&self, sent: &Sent, outcome: String) {
        self.trace.tried(&sent.placement.replica.name, outcome, self.arrival.state.clock.now());
    }

    /// Notes that no upstream has served it; a refusal is noted elsewhere.
    fn unserved(&self, error: ApiError, event: Event) -> ApiError {
        match &error {
            ApiError::Cancelled | ApiError::Deadline { .. } => self.tell(EventKind::Cancelled, event),
            refused if refused.reason().is_some() => {}
            _ => self.tell(EventKind::Failed, event),
        }
        error
    }

    fn tell(&self, kind: EventKind, event: Event) {
        let at = self.arrival.state.clock.now();
        self.arrival.state.recorder.record(Event {
            at,
            kind,
            a: at.saturating_sub(self.arrival.arrived),
            b: 0,
            ..event
        });
    }

    /// Submits every choice of every prompt, but to those that have failed it.
    fn submit(&mut self, failed: &[ReplicaId]) -> Result<Launched<Sent>, ApiError> {
        if !std::mem::replace(&mut self.has_room, true) {
            self.in_flight.permit.queue_tokens(self.prompt_tokens)?;
        }
        self.submit_to_all_but(failed, false)
    }

    /// Submits it to whomever the router chooses among all others; as a hedge, to upstreams alone.
    fn submit_to_all_but(&self, without: &[ReplicaId], is_hedge: bool) -> Result<Launched<Sent>, ApiError> {
        let is_onward = self.job.onward.is_some();
        let Self { arrival, job, sampling, terms, assigned, in_flight, trace, .. } = self;
        let Arrival { state, caller, .. } = arrival;
        let Job { params, target, prompts, .. } = job;
        let mut first_id = Some(self.id);
        let capacity = state.config.sink_events.saturating_mul(prompts.len() * sampling.len());
        let (sinks, events) = channel(capacity, arrival.shows_progress);
        let (mut choices, mut placements) = (Vec::new(), Vec::new());
        for (prompt, terms) in prompts.iter().zip(terms) {
            let assigned = assigned.as_ref();
            let dispatch =
                Dispatch { state, caller, target, prompt, terms, trace, assigned, is_onward, without, is_hedge };
            let submissions =
                arrival.submissions((sampling, job.grammar.as_deref()), &sinks, choices.len(), &mut first_id);
            let placed = match dispatch.run(submissions, |to, id| in_flight.submitted(to.replica.id, id))? {
                Placed::There(sent) => return Ok(Launched::There(sent)),
                Placed::Here(placed) => placed,
            };
            for (i, placement) in placed.into_iter().enumerate() {
                let queued_tokens = if i == 0 { prompt.tokens.len() } else { 0 };
                let mut choice = arrival.choice(params, &placement, u32::try_from(queued_tokens).unwrap_or(u32::MAX));
                let is_scored = params.prompt_logprobs.is_some() && prompt.tokens.len() > 1;
                choice.scored_by = (i > 0 && is_scored).then(|| choices.len() - i);
                choices.push(choice);
                placements.push(placement);
            }
        }
        Ok(Launched::Here(events, choices, placements))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.in_flight.abandoned(self.trace, self.clock.now());
        }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            let Self { errand, event, .. } = self;
            errand.tell(EventKind::Cancelled, *event);
            errand.in_flight.abandoned(&errand.trace, errand.arrival.state.clock.now());
        }
    }
}
