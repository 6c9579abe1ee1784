//! An answer on its way, and what was told of one that has ended.
//!
//! The request that computes it leads, and notes what it tells its own client. Those that equal it wait for the end and then
//! read all of it, each at its own pace, without a lock. A leader that goes away early says so, and who waits looks again:
//! nobody's answer hangs on somebody else's connection. Nobody follows a stream in its middle, because a leader that is lost
//! there would leave half an answer, which another one need not continue.

use std::sync::{Arc, OnceLock};

use pointsman_sched::ids::{Micros, Priority};
use pointsman_sched::request::TokenLogprobs;
use tokio::sync::watch;

use super::{Key, Told};
use crate::dispatch::Origin;
use crate::ports::Authors;
use crate::state::ServerState;
use crate::stream::{Delta, Finish, Token};

/// What was told of an answer, packed: a text, and where its pieces end.
#[derive(Debug, Default)]
pub(super) struct Log {
    steps: Vec<Step>,
    text: String,
    logprobs: Vec<TokenLogprobs>,
}

#[derive(Debug)]
struct Step {
    choice: u32,
    text_end: u32,
    token: Option<u32>,
    has_logprobs: bool,
    finish: Option<Finish>,
}

/// How far somebody has read a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    step: usize,
    text: usize,
    logprobs: usize,
}

/// An answer on its way, or one that has ended.
#[derive(Debug)]
pub(crate) struct Flight {
    priority: Priority,
    told: OnceLock<Told>,
    /// Whether it is over, well or not.
    over: watch::Sender<bool>,
}

/// The duty to end a flight. Dropping it lets go of those who wait.
#[derive(Debug)]
pub(crate) struct Lead {
    state: Arc<ServerState>,
    key: Key,
    flight: Arc<Flight>,
    epoch: u64,
    /// Who had a say when it began.
    authors: Authors,
    /// Whether the router chose among several variants.
    is_open: bool,
    log: Log,
    /// Whether what the key says of its author turned out to be true.
    is_true: bool,
    has_landed: bool,
}

// === impl Log ===

impl Log {
    fn push(&mut self, delta: &Delta) {
        // Answers of upstreams are not noted.
        let Delta { choice, text, token, finish, raw: _ } = delta;
        self.text.push_str(text);
        let logprobs = token.as_ref().and_then(|token| token.logprobs.as_deref());
        self.logprobs.extend(logprobs.cloned());
        self.steps.push(Step {
            choice: u32::try_from(*choice).unwrap_or(u32::MAX),
            text_end: u32::try_from(self.text.len()).unwrap_or(u32::MAX),
            token: token.as_ref().map(|token| token.id),
            has_logprobs: logprobs.is_some(),
            finish: *finish,
        });
    }

    /// The next piece; none at the end.
    pub(super) fn read(&self, cursor: &mut Cursor) -> Option<Delta> {
        let Step { choice, text_end, token, has_logprobs, finish } = self.steps.get(cursor.step)?;
        let (choice, end) = (*choice as usize, *text_end as usize);
        let logprobs = has_logprobs.then(|| self.logprobs.get(cursor.logprobs).cloned().map(Box::new)).flatten();
        let text = self.text.get(cursor.text..end).unwrap_or_default().to_owned();
        let logprobs_read = cursor.logprobs + usize::from(*has_logprobs);
        *cursor = Cursor { step: cursor.step + 1, text: end, logprobs: logprobs_read };
        Some(Delta { choice, text, token: token.map(|id| Token { id, logprobs }), finish: *finish, raw: None })
    }

    fn shrink(&mut self) {
        self.steps.shrink_to_fit();
        self.text.shrink_to_fit();
        self.logprobs.shrink_to_fit();
    }

    fn bytes(&self) -> usize {
        let logprobs = |one: &TokenLogprobs| size_of_val(one) + size_of_val(&*one.top);
        size_of_val(&*self.steps) + self.text.len() + self.logprobs.iter().map(logprobs).sum::<usize>()
    }
}

// === impl Flight ===

impl Flight {
    pub(super) fn new(priority: Priority) -> Self {
        Self { priority, told: OnceLock::new(), over: watch::Sender::new(false) }
    }

    pub(super) fn priority(&self) -> Priority {
        self.priority
    }

    /// Of one that has ended well.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.told().map_or(0, |told| told.log.bytes())
    }

    /// All of it; none where the leader has gone, or goes on.
    pub(super) fn told(&self) -> Option<&Told> {
        self.told.get()
    }

    /// Waits until it is over; whether all was told.
    pub(crate) async fn over(&self) -> bool {
        // The sender is here: it is not gone before this.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
        self.told().is_some()
    }
}

// === impl Lead ===

impl Lead {
    pub(crate) fn new(
        state: &Arc<ServerState>,
        key: Key,
        (flight, epoch): (Arc<Flight>, u64),
        (authors, is_open): (Authors, bool),
    ) -> Self {
        let (state, authors) = (Arc::clone(state), authors.counting(is_open));
        Self { state, key, flight, epoch, authors, is_open, log: Log::default(), is_true: true, has_landed: false }
    }

    /// Another variant computes it than its key says: it is told, and not kept.
    pub(crate) fn strays(&mut self) {
        self.is_true = false;
    }

    pub(super) fn tell(&mut self, delta: &Delta) {
        self.log.push(delta);
    }

    /// All was told. It is kept, unless somebody else had a say meanwhile: then it may be an answer of two policies, or of none.
    pub(super) fn end(mut self, origin: &Origin, completion: u32) {
        self.has_landed = true;
        let mut log = std::mem::take(&mut self.log);
        log.shrink();
        // Set once, by its only leader.
        let _ = self.flight.told.set(Told { log, origin: origin.clone(), completion });
        let now: Micros = self.state.clock.now();
        let keep = self.is_true && self.state.policies.authors().counting(self.is_open) == self.authors;
        self.state.cache.landed(self.key, &self.flight, Some((now, self.epoch)).filter(|_| keep));
        self.flight.over.send_replace(true);
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if !self.has_landed {
            // Forgotten before it is over: who looks for another leader must not find this one.
            self.state.cache.landed(self.key, &self.flight, None);
            self.flight.over.send_replace(true);
        }
    }
}
