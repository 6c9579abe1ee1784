//! The mask of one text: computed on a thread of the desk, kept until its request asks for it.
//!
//! The state machine travels: to the thread with the token that was chosen, back with the set of tokens that may follow. So
//! nobody holds a lock while a mask is computed, and a request that has ended leaves nothing behind but a job that answers
//! into the void.

use std::fmt;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llguidance::Matcher;
use pointsman_sched::mask::{MaskError, TokenMask, TokenSet};
use pointsman_sched::sampler::Edit;

use super::compile::brief;

type Answer = Result<Arc<Edit>, MaskError>;

/// A mask to compute.
pub(super) struct Errand {
    matcher: Box<Matcher>,
    /// None before the first.
    token: Option<u32>,
    returns: Return,
}

/// Where the answer goes. One that is lost is an error there.
struct Return(Option<Arc<Place>>);

/// What a request and the thread that works for it share.
#[derive(Default)]
struct Place {
    back: Mutex<Option<(Option<Box<Matcher>>, Answer)>>,
    is_back: Condvar,
}

/// See the module's documentation.
pub(super) struct GrammarMask {
    errands: SyncSender<Errand>,
    place: Arc<Place>,
    /// At home while nothing is under way.
    matcher: Option<Box<Matcher>>,
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
        let Self { mut matcher, token, mut returns } = self;
        let answer = next(&mut matcher, token);
        returns.give(Some(matcher), answer);
    }
}

fn next(matcher: &mut Matcher, token: Option<u32>) -> Answer {
    let told = token.map_or(Ok(()), |token| matcher.consume_token(token));
    let set = told.and_then(|()| matcher.compute_mask_or_eos()).map_err(|error| failed(&error.to_string()))?;
    Ok(Arc::new(Edit::Only(TokenSet::from_words(set.as_slice().to_vec()))))
}

impl Return {
    fn give(&mut self, matcher: Option<Box<Matcher>>, answer: Answer) {
        if let Some(place) = self.0.take() {
            *place.lock() = Some((matcher, answer));
            place.is_back.notify_one();
        }
    }
}

impl Drop for Return {
    fn drop(&mut self) {
        self.give(None, Err(failed("the work on it was lost")));
    }
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Option<(Option<Box<Matcher>>, Answer)>> {
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
    pub(super) fn new(matcher: Matcher, errands: SyncSender<Errand>) -> Self {
        Self { errands, place: Arc::default(), matcher: Some(Box::new(matcher)), known: None }
    }
}

impl TokenMask for GrammarMask {
    fn advance(&mut self, token: Option<u32>) {
        // Without it there was an error, which stays.
        let Some(matcher) = self.matcher.take() else { return };
        self.known = None;
        let returns = Return(Some(Arc::clone(&self.place)));
        let why = match self.errands.try_send(Errand { matcher, token, returns }) {
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
            let (matcher, answer) = back.take()?;
            self.matcher = matcher;
            self.known = Some(answer);
        }
        self.known.clone()
    }
}
