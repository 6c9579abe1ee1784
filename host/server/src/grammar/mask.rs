//! The mask of one text: computed on a thread of the desk, kept until its request asks for it.
//!
//! The state machine travels: to the thread with the token that was chosen, back with the set of tokens that may follow. So
//! nobody holds a lock while a mask is computed, and a request that has ended leaves nothing behind but a job that answers
//! into the void.

use std::fmt;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use llguidance::TokenParser;
use llguidance::api::StopReason;
use pointsman_sched::mask::{MaskError, TokenMask, TokenSet};
use pointsman_sched::sampler::Edit;

use super::compile::brief;
use super::ledger::Share;

type Answer = Result<Arc<Edit>, MaskError>;

/// A mask to compute.
pub(super) struct Errand {
    state: Box<State>,
    /// None before the first.
    token: Option<u32>,
    returns: Return,
}

/// The state machine of one text, and the memory that it uses.
struct State {
    parser: TokenParser,
    share: Share,
}

/// Where the answer goes, and who waits for it. One that is lost is an error there.
struct Return(Option<(Arc<Place>, Thread)>);

/// What a request and the thread that works for it share.
#[derive(Default)]
struct Place {
    back: Mutex<Option<(Option<Box<State>>, Answer)>>,
    is_back: Condvar,
}

/// See the module's documentation.
pub(super) struct GrammarMask {
    errands: SyncSender<Errand>,
    place: Arc<Place>,
    /// At home while nothing is under way.
    state: Option<Box<State>>,
    known: Option<Answer>,
}

fn failed(why: &str) -> MaskError {
    MaskError::Grammar { why: brief(why).into() }
}

// === impl Errand ===

impl fmt::Debug for Errand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Errand").field("token", &self.token).finish_non_exhaustive()
    }
}

impl Errand {
    pub(super) fn run(self) {
        let Self { mut state, token, mut returns } = self;
        let answer = state.next(token);
        // What has failed stays failed, and uses nothing.
        returns.give(answer.is_ok().then_some(state), answer);
    }
}

impl State {
    fn next(&mut self, token: Option<u32>) -> Answer {
        let parser = &mut self.parser;
        let told =
            token.map_or(Ok(()), |token| parser.consume_token(token).and_then(|_| parser.check_stop()).map(drop));
        let set = told.and_then(|()| match parser.stop_reason() {
            StopReason::NotStopped => parser.compute_mask(),
            _ => Ok(parser.token_env.tok_trie().eos_token_set()),
        });
        let set = set.map_err(|error| failed(&parser.augment_err(error)))?;
        match self.share.set(bytes_of(parser)) {
            true => Ok(Arc::new(Edit::Only(TokenSet::from_words(set.as_slice().to_vec())))),
            false => Err(MaskError::NoMemory),
        }
    }
}

/// What the tables of a lexer use, roughly.
pub(super) fn bytes_of(parser: &TokenParser) -> usize {
    parser.parser.lexer_stats().num_bytes
}

impl Return {
    fn give(&mut self, state: Option<Box<State>>, answer: Answer) {
        if let Some((place, asker)) = self.0.take() {
            *place.lock() = Some((state, answer));
            place.is_back.notify_one();
            asker.unpark();
        }
    }
}

impl Drop for Return {
    fn drop(&mut self) {
        self.give(None, Err(failed("the work on it was lost")));
    }
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Option<(Option<Box<State>>, Answer)>> {
        self.back.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl GrammarMask ===

impl fmt::Debug for GrammarMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarMask").field("is_known", &self.known.is_some()).finish_non_exhaustive()
    }
}

impl GrammarMask {
    pub(super) fn new(parser: TokenParser, errands: SyncSender<Errand>, share: Share) -> Self {
        Self { errands, place: Arc::default(), state: Some(Box::new(State { parser, share })), known: None }
    }
}

impl TokenMask for GrammarMask {
    fn advance(&mut self, token: Option<u32>) {
        // Without it there was an error, which stays.
        let Some(state) = self.state.take() else { return };
        self.known = None;
        let returns = Return(Some((Arc::clone(&self.place), std::thread::current())));
        let why = match self.errands.try_send(Errand { state, token, returns }) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "too many requests with a format are in flight",
            Err(TrySendError::Disconnected(_)) => "the host is stopping",
        };
        self.known = Some(Err(failed(why)));
    }

    fn mask(&mut self, patience: Duration) -> Option<Result<Arc<Edit>, MaskError>> {
        if self.known.is_none() {
            let back = self.place.lock();
            let mut back = match patience.is_zero() {
                true => back,
                false => {
                    let waited = self.place.is_back.wait_timeout_while(back, patience, |back| back.is_none());
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            let (state, answer) = back.take()?;
            self.state = state;
            self.known = Some(answer);
        }
        self.known.clone()
    }
}
