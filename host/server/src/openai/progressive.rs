//! Two answers to one request: a draft by a model that is quick, and the final one, which takes its place.
//!
//! A draft is a request of its own, of the same body but for the model: admitted, routed, measured, limited and charged like any
//! other, under the id `<id>.draft`. Only here do the two meet, as lines of one body. Not in the scheduler: another model is
//! another replica, with its own tokenizer and its own batch, so there is nothing that the two could share.
//!
//! The final answer is let in first, so that a draft never takes the room that it needs. On devices of their own both are computed
//! at once. A device that both need would take a step of either in turn, and the draft would be no quicker than what it is a
//! draft of; so the final answer leaves it the device until it has ended, for `server.draft_lead_ms` at most. Where nobody
//! else asks it loses little, because the same steps are computed in another order.
//!
//! What the final answer says before the draft has ended is held back, and once it has ended itself, the draft is given up.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use pointsman_sched::ids::Micros;
use serde_json::Value;
use tokio::sync::Notify;

use super::fields::Fields;
use super::generate::{Answer, Arrival, NDJSON, Running, streaming};
use super::loading::Loads;
use super::ndjson::{self, Both, DraftEnd, NdjsonEncoder, Times};
use crate::admission::Permit;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::registry::draft_of;
use crate::state::ServerState;
use crate::stream::{Encode, EventBody, FRAME_BYTES, Tell, Totals, Update};

/// Bytes of the final answer that are held back, some 1,500 tokens: with more of it there, no draft is worth the wait.
const HELD_BYTES: usize = 256 << 10;

/// What a final answer and its draft wait for of one another.
#[derive(Debug)]
pub(crate) struct Turns {
    /// The final answer has been let in: the draft may ask.
    pub(super) admitted: Notify,
    /// The draft is over.
    pub(super) drafted: Notify,
    /// How long the final answer waits for that.
    pub(super) lead: Duration,
}

/// The draft that a body asks for.
#[derive(Debug)]
pub(super) struct Draft {
    model: String,
    lead: Duration,
}

/// A request until it is under way.
pub(super) type Beginning = Pin<Box<dyn Future<Output = Result<Answer, ApiError>> + Send>>;

/// Tells a draft and the final answer.
struct Progressive {
    state: Arc<ServerState>,
    /// The id of the final answer.
    tag: Arc<str>,
    arrived: Micros,
    turns: Arc<Turns>,
    /// Of the models of both, and when the request came, in Unix seconds.
    loads: Loads,
    created: u64,
    draft: Side,
    /// How the draft ended; none until it has.
    outcome: Option<&'static str>,
    answer: Side,
    /// What the final answer said while the draft was being told, from `replace` on.
    held: Vec<u8>,
    /// Whether `replace` has been said, or held back.
    replaces: bool,
}

/// One of the two answers.
struct Side {
    is_draft: bool,
    state: State,
    /// When the first piece of its text was told.
    first: Option<Micros>,
    ended: Option<Micros>,
    totals: Option<Totals>,
}

enum State {
    Beginning(Beginning),
    Live(Box<Live>),
    /// It did not come under way.
    Refused(ApiError),
    Over,
}

/// An answer under way.
struct Live {
    running: Running,
    lines: NdjsonEncoder,
    /// Whether its first line has been told.
    is_told: bool,
}

/// What one of them has to tell.
enum Heard {
    Begun,
    Update(Update),
    Ended,
    Failed(ApiError),
}

/// The draft that a body asks for, where it does and events can tell the two apart.
pub(super) fn draft(arrival: &Arrival, fields: &mut Fields) -> Result<Option<Draft>, ApiError> {
    if !arrival.ndjson {
        return Ok(None);
    }
    let Some(name) = fields.string("draft")? else { return Ok(None) };
    let Arrival { state, .. } = arrival;
    let catalog = state.engine.catalog();
    let draft = match Target::find_as("draft", &catalog, &name) {
        // It is loaded when its answer begins.
        Err(ApiError::UnknownModel { .. }) if catalog.demanded(&name).is_some() => None,
        found => Some(found?),
    };
    // What is wrong with the model itself is for the final answer to say.
    let model = fields.get("model").and_then(Value::as_str);
    let named = model.and_then(|name| Target::find(&catalog, name).ok());
    let is_same = |named: &Target| draft.as_ref().is_some_and(|draft| named.is_same(draft));
    if model == Some(&*name) || named.as_ref().is_some_and(is_same) {
        let problem =
            format!("`draft` must be another model than `model`, found `{name}`: leave it out, or name a smaller one");
        return Err(ApiError::invalid("draft", problem));
    }
    let device = draft.and_then(|draft| draft.only_device());
    let shares = device.is_some() && named.is_some_and(|named| named.only_device() == device);
    let lead = Duration::from_millis(if shares { state.config.draft_lead_ms } else { 0 });
    Ok(Some(Draft { model: name, lead }))
}

/// Answers with a draft and the final answer. What refuses the final one before the draft is under way has a status of its own.
pub(super) async fn respond<F>(
    mut arrival: Arrival,
    permit: Permit,
    (fields, draft, body): (Fields, Draft, Bytes),
    begin: impl Fn(Arrival, Permit, Fields) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = Result<Answer, ApiError>> + Send + 'static,
{
    let (state, tag, arrived) = (Arc::clone(&arrival.state), Arc::clone(&arrival.tag), arrival.arrived);
    let (loads, created) = (Loads::of(&mut arrival), state.clock.unix_seconds());
    let draft_arrival = Arrival { tag: draft_of(&tag).into(), drafts_for: Some(Arc::clone(&tag)), ..arrival.clone() };
    let turns = Arc::new(Turns { admitted: Notify::new(), drafted: Notify::new(), lead: draft.lead });
    arrival.turns = Some(Arc::clone(&turns));
    let answer = Side::new(false, Box::pin(begin(arrival, permit, fields)));
    let turn = Arc::clone(&turns);
    let drafting = async move {
        turn.admitted.notified().await;
        let permit = draft_arrival.admit()?;
        // The final answer has taken its own to pieces by now.
        let mut fields = Fields::parse(&body)?;
        drop(body);
        fields.take("draft");
        fields.put("model", draft.model.into());
        begin(draft_arrival, permit, fields).await
    };
    let draft = Side::new(true, Box::pin(drafting));
    let (outcome, held, replaces) = (None, Vec::new(), false);
    let mut told = Progressive { state, tag, arrived, turns, loads, created, draft, outcome, answer, held, replaces };
    let mut first = Vec::new();
    poll_fn(|cx| told.poll_begun(cx, &mut first)).await?;
    let mut response = streaming(NDJSON);
    // They are of whoever answers first.
    if let (State::Live(live), _) | (_, State::Live(live)) = (&told.draft.state, &told.answer.state) {
        live.running.feed.origin().headers(response.headers_mut());
    }
    *response.body_mut() = Body::new(EventBody::new(told).beginning_with(first));
    Ok(response)
}

// === impl Side ===

impl Side {
    fn new(is_draft: bool, beginning: Beginning) -> Self {
        Self { is_draft, state: State::Beginning(beginning), first: None, ended: None, totals: None }
    }

    /// Until it is known whether it comes under way.
    fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let State::Beginning(beginning) = &mut self.state {
            self.state = match ready!(beginning.as_mut().poll(cx)) {
                Ok(Answer { mut running, .. }) => match running.lines() {
                    Some(lines) => {
                        let lines = if self.is_draft { lines.drafting() } else { lines };
                        State::Live(Box::new(Live { running, lines, is_told: false }))
                    }
                    None => State::Refused(ApiError::Internal),
                },
                Err(error) => State::Refused(error),
            };
        }
        Poll::Ready(())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Heard> {
        ready!(self.poll_begun(cx));
        match &mut self.state {
            State::Live(live) if !live.is_told => {
                live.is_told = true;
                Poll::Ready(Heard::Begun)
            }
            State::Live(live) => Poll::Ready(match ready!(live.running.feed.poll_update(cx)) {
                Some(Ok(update)) => Heard::Update(update),
                Some(Err(error)) => Heard::Failed(error),
                None => Heard::Ended,
            }),
            _ => self.refusal().map_or(Poll::Pending, |error| Poll::Ready(Heard::Failed(error))),
        }
    }

    /// Why it did not come under way, once.
    fn refusal(&mut self) -> Option<ApiError> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Refused(error) => Some(error),
            other => {
                self.state = other;
                None
            }
        }
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if let State::Live(live) = &mut self.state {
            live.lines.begin(out);
        }
    }

    /// Notes what it came to.
    fn ended(&mut self, now: Micros) {
        self.ended = Some(now);
        if let State::Live(live) = &self.state {
            self.totals = Some(live.running.feed.totals());
        }
    }

    fn times(&self, arrived: Micros) -> Times {
        #[expect(clippy::cast_precision_loss, reason = "a request takes less than centuries")]
        let ms = |at: Micros| at.saturating_sub(arrived) as f64 / 1_000.0;
        Times { first_token_ms: self.first.map(ms), ended_ms: self.ended.map_or(0.0, ms) }
    }
}

// === impl Progressive ===

impl Progressive {
    /// Until one of them is under way or waits for its model, or the final one is refused.
    fn poll_begun(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<Result<(), ApiError>> {
        let answer = self.answer.poll_begun(cx);
        if let Some(error) = self.answer.refusal() {
            return Poll::Ready(Err(error));
        }
        if self.draft.poll_begun(cx).is_ready() {
            match self.draft.state {
                State::Live(_) => return Poll::Ready(Ok(())),
                // The final answer need not wait for it; it is woken by this.
                _ => self.turns.drafted.notify_one(),
            }
        }
        if answer.is_pending() && self.tell_loads(cx, out) {
            return Poll::Ready(Ok(()));
        }
        answer.map(Ok)
    }

    fn tell_loads(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> bool {
        self.loads.tell(cx, &(Arc::clone(&self.tag), self.created), out)
    }

    fn draft_heard(&mut self, heard: Heard, out: &mut Vec<u8>) {
        match heard {
            Heard::Begun => self.draft.begin(out),
            Heard::Update(update) => {
                let State::Live(live) = &mut self.draft.state else { return };
                if matches!(update, Update::Delta(_)) {
                    self.draft.first.get_or_insert_with(|| self.state.clock.now());
                }
                live.lines.update(out, &update);
            }
            Heard::Ended => self.draft_over("finished", out),
            Heard::Failed(error) => {
                ndjson::draft_failed(out, &error);
                self.draft_over("failed", out);
            }
        }
    }

    /// Lets go of the draft, and tells what was held back for it.
    fn draft_over(&mut self, outcome: &'static str, out: &mut Vec<u8>) {
        let now = self.state.clock.now();
        self.draft.ended(now);
        self.state.registry.give_up_draft(&self.tag);
        self.draft.state = State::Over;
        self.outcome = Some(outcome);
        self.turns.drafted.notify_one();
        if !self.held.is_empty() {
            out.append(&mut self.held);
            self.answer.first = Some(now);
        }
    }

    fn give_up_draft(&mut self, out: &mut Vec<u8>) {
        if self.outcome.is_none() {
            self.draft_over("replaced", out);
        }
    }

    /// True when all is told.
    fn answer_heard(&mut self, heard: Heard, out: &mut Vec<u8>) -> bool {
        match heard {
            Heard::Begun => self.answer.begin(out),
            Heard::Update(update) => self.answer_update(&update, out),
            Heard::Ended => {
                self.give_up_draft(out);
                self.done(out);
                return true;
            }
            Heard::Failed(error) => {
                // What the draft said stands: there is nothing to put in its place.
                self.held.clear();
                self.give_up_draft(out);
                ndjson::broken(out, &error);
                if let State::Live(live) = &self.answer.state {
                    live.running.feed.cancel();
                }
                return true;
            }
        }
        false
    }

    fn answer_update(&mut self, update: &Update, out: &mut Vec<u8>) {
        let State::Live(live) = &mut self.answer.state else { return };
        let is_text = matches!(update, Update::Delta(_));
        let holds = self.outcome.is_none() && (is_text || self.replaces);
        let to = if holds { &mut self.held } else { &mut *out };
        if is_text && !std::mem::replace(&mut self.replaces, true) {
            live.lines.replace(to);
            self.answer.first = (!holds).then(|| self.state.clock.now());
        }
        live.lines.update(to, update);
        if self.held.len() > HELD_BYTES {
            self.give_up_draft(out);
        }
    }

    fn done(&mut self, out: &mut Vec<u8>) {
        self.answer.ended(self.state.clock.now());
        let (Some(totals), Some(outcome)) = (self.answer.totals, self.outcome) else { return };
        let usage = self.draft.totals.map(Into::into);
        let draft = DraftEnd { outcome, usage, times: self.draft.times(self.arrived) };
        ndjson::done(out, totals, Some(&Both { times: self.answer.times(self.arrived), draft }));
    }
}

impl Tell for Progressive {
    fn tell(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> bool {
        self.tell_loads(cx, out);
        // The draft first: what it has said by now is told before what takes its place.
        while self.outcome.is_none() && out.len() < FRAME_BYTES {
            let Poll::Ready(heard) = self.draft.poll(cx) else { break };
            self.draft_heard(heard, out);
        }
        while out.len() < FRAME_BYTES {
            let Poll::Ready(heard) = self.answer.poll(cx) else { return false };
            if self.answer_heard(heard, out) {
                return true;
            }
        }
        cx.waker().wake_by_ref();
        false
    }
}
