//! Taps: decisions of a slot on their way to whoever records them.
//!
//! Off costs one relaxed load. On, a decision is copied into a bounded queue by the thread that took it, and written as JSON
//! by the reader's task: a slow reader loses lines, which are counted, and never holds up a request or a step. One recording
//! per slot at a time, because each costs the serving threads a copy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::admin::wire::decision::Line;

/// Decisions that a reader may be behind.
const QUEUE: usize = 4_096;

/// The taps of a host.
#[derive(Clone, Debug, Default)]
pub struct Taps {
    /// Of the router; the dispatcher feeds it.
    pub router: Arc<Tap>,
    /// Of every replica's scheduler; the app feeds it.
    pub scheduler: Arc<Tap>,
    /// Of the admission policy; whoever asks it, and whoever tells it of endings.
    pub admission: Arc<Tap>,
    /// Of every replica's retention policy; the app feeds it.
    pub retention: Arc<Tap>,
    /// Of every replica's sampler; the app feeds it.
    pub sampler: Arc<Tap>,
}

/// Where decisions of a slot can be listened to.
#[derive(Debug, Default)]
pub struct Tap {
    /// Number of the recording under way, 0 for none.
    number: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Recordings so far.
    count: u64,
    session: Option<Arc<Session>>,
}

#[derive(Debug)]
struct Session {
    sender: mpsc::Sender<Line>,
    dropped: AtomicU64,
}

/// A recording under way; dropping it ends it.
#[derive(Debug)]
pub struct Recording {
    tap: Arc<Tap>,
    session: Arc<Session>,
    receiver: mpsc::Receiver<Line>,
}

// === impl Tap ===

impl Tap {
    /// Number of the recording under way, never the same twice; 0 when nobody records.
    #[inline]
    #[must_use]
    pub fn recording(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// Adds a line; false, and counted, when there is no room for it.
    pub fn push(&self, line: Line) -> bool {
        let Some(session) = self.session() else { return false };
        let taken = session.sender.try_send(line).is_ok();
        if !taken {
            session.dropped.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Counts a line that was not worth making.
    pub fn skip(&self) {
        if let Some(session) = self.session() {
            session.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether half of the queue is free: enough to begin again after a gap.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.session().is_some_and(|session| session.sender.capacity() >= QUEUE / 2)
    }

    /// Begins a recording; `None` while another one is under way.
    pub fn start(self: &Arc<Self>) -> Option<Recording> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.session.is_some() {
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        let session = Arc::new(Session { sender, dropped: AtomicU64::new(0) });
        state.session = Some(Arc::clone(&session));
        state.count += 1;
        self.number.store(state.count, Ordering::Relaxed);
        Some(Recording { tap: Arc::clone(self), session, receiver })
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).session.clone()
    }
}

// === impl Recording ===

impl Recording {
    /// Waits for lines and takes those that are there, at most `most`.
    pub(crate) async fn take(&mut self, lines: &mut Vec<Line>, most: usize) -> usize {
        self.receiver.recv_many(lines, most).await
    }

    /// Takes the lines that are there.
    pub fn take_now(&mut self, lines: &mut Vec<Line>) {
        lines.extend(std::iter::from_fn(|| self.receiver.try_recv().ok()));
    }

    /// Lines that were lost so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.session.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let mut state = self.tap.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.tap.number.store(0, Ordering::Relaxed);
        state.session = None;
    }
}

#[cfg(test)]
mod tests {
    use pointsman_sched::batch::{Budgets, Changes};

    use super::*;
    use crate::admin::wire::decision::{SchedulerCall, SchedulerLine};

    fn line(now: u64) -> Line {
        let call =
            SchedulerCall::Step { changes: Changes::default(), answer: None, revision: "r".into(), generation: 1 };
        Line::Scheduler(Box::new(SchedulerLine { replica: "m".into(), now, budgets: Budgets::default(), call }))
    }

    #[tokio::test]
    async fn a_slow_reader_loses_lines_and_knows_how_many() {
        let tap = Arc::new(Tap::default());
        assert_eq!((tap.recording(), tap.push(line(0)), tap.has_room()), (0, false, false));
        let mut recording = tap.start().expect("nobody records");
        assert!(tap.start().is_none(), "one at a time");
        assert_eq!((tap.recording(), tap.has_room()), (1, true));
        let taken = (0..QUEUE as u64 + 3).filter(|&now| tap.push(line(now))).count();
        assert_eq!((taken, tap.has_room()), (QUEUE, false));
        tap.skip();
        assert_eq!(recording.dropped(), 4);
        let mut lines = Vec::new();
        assert_eq!(recording.take(&mut lines, 2).await, 2);
        assert_eq!(lines, [line(0), line(1)], "the oldest are kept, so that what is kept has no hole");
        drop(recording);
        assert_eq!((tap.recording(), tap.push(line(0))), (0, false));
        assert_eq!(tap.start().map(|_| tap.recording()), Some(2), "numbers are never given twice");
    }
}
