//! Handing over: what an instance that serves has learned, given to the one that will take its place.
//!
//! The instance that has seen the requests belongs to a thread that waits for nobody: a device's driver, a sampler's thread,
//! the observer. So it is not taken away from it. Whoever prepares the next generation leaves a question with the one that
//! serves; each owner answers at its next boundary (a driver comes to one every 100 ms at least, idle or not) by one call
//! within the hard limit of its decisions. What comes back is restored, on the preparer's thread, into instances that nobody
//! uses yet; they wait for their owners by name, and the swap stays a pointer swap.
//!
//! What is learned between the answer and the swap is lost: some milliseconds. A snapshot at the swap itself would lose
//! nothing, and could not refuse anything either: the new policy serves by then.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::engine::stopwatch_ns;
use crate::fault::Fault;
use crate::generation::MAX_INSTANCES;

/// Largest snapshot.
pub(crate) const MAX_SNAPSHOT_BYTES: usize = 1 << 20;
/// How long the owners may take to come to a boundary, after a long step or a batch of events.
const PATIENCE_NS: u64 = 2_000_000_000;
/// The same for a rollback: whoever goes back waits for the policy that is to go, and not for long.
const SHORT_PATIENCE_NS: u64 = 250_000_000;
/// How often it is looked meanwhile whether the owners are still there.
const LOOK: Duration = Duration::from_millis(20);

/// What a policy hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) schema: u32,
    pub(crate) bytes: Vec<u8>,
}

/// Whether a policy may start without what the one before it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Handover {
    /// It starts cold where nothing can be handed over.
    #[default]
    Cold,
    /// The same, and soon: it takes along what those hand over who come to a boundary within 250 ms.
    Soon,
    /// It is not activated then.
    Require,
}

/// What a generation was handed by the one before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inheritance {
    /// Instances that were handed something.
    pub restored: u32,
    /// How much that was, in bytes.
    pub bytes: u64,
    /// Whose instances start cold and why, a line each.
    pub cold: Vec<String>,
}

/// The answer of an owner.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) owner: Arc<str>,
    pub(crate) what: Result<Snapshot, NotHandedOver>,
}

/// Why there is nothing to restore.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotHandedOver {
    #[error("the native policy is active, which has nothing to hand over")]
    Native,
    #[error("the active policy does not export pointsman:policy/handover")]
    NotExported,
    #[error("the active policy has nothing to hand over")]
    Nothing,
    #[error("no instance of the active policy serves there: it has faulted or is being started")]
    NoInstance,
    #[error("{0} of those that the active policy serves came to no boundary in time; try again")]
    Late(u32),
    #[error("take-snapshot failed: {0}")]
    Snapshot(Fault),
    #[error("restore failed: {0}")]
    Restore(Fault),
    #[error("restore refused: {0}")]
    Refused(String),
}

/// Where a question is left for the owners of a generation's instances.
#[derive(Debug, Default)]
pub(crate) struct Questions {
    /// Number of the latest; 0 before the first.
    asked: AtomicU64,
    /// Where its answers go, while somebody waits for them.
    to: Mutex<Option<SyncSender<Handed>>>,
    /// Those who answer.
    owners: AtomicU32,
}

// === impl Questions ===

impl Questions {
    /// One more owner.
    pub(crate) fn join(&self) {
        self.owners.fetch_add(1, Ordering::Relaxed);
    }

    /// One fewer.
    pub(crate) fn part(&self) {
        self.owners.fetch_sub(1, Ordering::Relaxed);
    }

    /// Number of the latest question: one atomic read.
    #[inline]
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Acquire)
    }

    /// Where the answer of an owner goes that has answered those up to `answered`; none when it owes none.
    pub(crate) fn take(&self, answered: &mut u64) -> Option<SyncSender<Handed>> {
        let asked = self.asked();
        if std::mem::replace(answered, asked) == asked { None } else { self.to().clone() }
    }

    /// Asks all owners. Returns the answers, and how many did not answer in time.
    pub(crate) fn ask(&self, patience_ns: u64) -> (Vec<Handed>, u32) {
        let (send, receive) = sync_channel(MAX_INSTANCES);
        *self.to() = Some(send);
        self.asked.fetch_add(1, Ordering::Release);
        let started = stopwatch_ns();
        let mut handed = Vec::new();
        let missing =
            |n: usize| self.owners.load(Ordering::Relaxed).saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
        while missing(handed.len()) > 0 && stopwatch_ns() - started < patience_ns {
            receive.recv_timeout(LOOK).into_iter().for_each(|answer| take_in(&mut handed, answer));
        }
        *self.to() = None;
        let late = missing(handed.len());
        (handed, late)
    }

    fn to(&self) -> std::sync::MutexGuard<'_, Option<SyncSender<Handed>>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One answer for each owner: the latest, unless that had no instance to ask.
pub(crate) fn take_in(handed: &mut Vec<Handed>, answer: Handed) {
    match handed.iter_mut().find(|handed| handed.owner == answer.owner) {
        None => handed.push(answer),
        Some(_) if matches!(answer.what, Err(NotHandedOver::NoInstance)) => {}
        Some(earlier) => *earlier = answer,
    }
}

// === impl Handover ===

impl Handover {
    pub(crate) fn patience_ns(self) -> u64 {
        match self {
            Self::Cold | Self::Require => PATIENCE_NS,
            Self::Soon => SHORT_PATIENCE_NS,
        }
    }
}

// === impl NotHandedOver ===

impl NotHandedOver {
    /// Whether a policy that must not start cold may start all the same: nothing is lost.
    pub(crate) fn is_harmless(&self) -> bool {
        matches!(self, Self::Nothing | Self::Native)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed(owner: &str) -> Handed {
        Handed { owner: owner.into(), what: Err(NotHandedOver::Nothing) }
    }

    #[test]
    fn an_owner_has_one_answer() {
        let snapshot = |schema| Ok(Snapshot { schema, bytes: Vec::new() });
        let answers = [
            ("a", snapshot(1)),
            ("b", Err(NotHandedOver::NoInstance)),
            ("a", snapshot(2)),
            ("b", snapshot(3)),
            ("b", Err(NotHandedOver::NoInstance)),
        ];
        let mut found = Vec::new();
        answers.into_iter().for_each(|(owner, what)| take_in(&mut found, Handed { owner: owner.into(), what }));
        let found: Vec<_> = found.into_iter().map(|Handed { owner, what }| (owner.to_string(), what)).collect();
        assert_eq!(found, [("a".to_owned(), snapshot(2)), ("b".to_owned(), snapshot(3))]);
    }

    #[test]
    fn every_owner_answers_once_and_the_late_ones_are_counted() {
        let questions = Questions::default();
        assert_eq!(questions.ask(PATIENCE_NS).1, 0, "nobody to wait for");
        questions.join();
        questions.join();
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| {
                let mut answered = 1;
                let to = std::iter::repeat_with(|| questions.take(&mut answered)).flatten().next().expect("asked");
                to.try_send(handed("a")).expect("somebody waits");
                assert!(questions.take(&mut answered).is_none(), "once");
                questions.part();
            });
            let (answers, late) = questions.ask(u64::MAX);
            assert_eq!((answers.len(), &*answers[0].owner, late), (1, "a", 0), "the other one left");
            owner.join().expect("it answered");
        });
        assert_eq!(questions.ask(0).1, 1, "one is late");
        let mut answered = 0;
        assert!(questions.take(&mut answered).is_none() && answered == questions.asked(), "nobody waits any more");
    }
}
