//! A bounded ring of events between the serving threads and the observer thread.
//!
//! `ArrayQueue::force_push` keeps the newest events: at the bound the oldest is dropped and counted, so that recording
//! can never block a step or a request. A channel would make the producer choose between blocking and losing the newest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_queue::ArrayQueue;

use crate::Event;

/// A cheap handle for recording events; clones share one ring.
#[derive(Clone, Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ring: ArrayQueue<Event>,
    dropped: AtomicU64,
}

/// What one [`Recorder::drain`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Events moved into the buffer.
    pub taken: usize,
    /// Events lost to the bound since the previous drain.
    pub dropped: u64,
}

impl Recorder {
    /// A ring of `capacity` events (at least one).
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let ring = ArrayQueue::new(capacity.max(1));
        Self { shared: Arc::new(Shared { ring, dropped: AtomicU64::new(0) }) }
    }

    /// Records an event; drops and counts the oldest one when the ring is full. Never blocks, never allocates.
    pub fn record(&self, event: Event) {
        if self.shared.ring.force_push(event).is_some() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Moves up to `limit` events, oldest first, to the end of `into`.
    pub fn drain(&self, into: &mut Vec<Event>, limit: usize) -> Drained {
        let mut taken = 0;
        while taken < limit {
            let Some(event) = self.shared.ring.pop() else { break };
            into.push(event);
            taken += 1;
        }
        Drained { taken, dropped: self.shared.dropped.swap(0, Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EventKind;

    #[test]
    fn the_oldest_events_are_dropped_and_counted() {
        let recorder = Recorder::new(2);
        for at in 1..=5 {
            recorder.record(Event::new(at, EventKind::Step));
        }
        let mut seen = Vec::new();
        assert_eq!(recorder.drain(&mut seen, 10), Drained { taken: 2, dropped: 3 });
        assert_eq!(seen.iter().map(|e| e.at).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(recorder.drain(&mut seen, 10), Drained { taken: 0, dropped: 0 });
    }

    #[test]
    fn drain_honours_its_limit() {
        let recorder = Recorder::new(8);
        for at in 1..=5 {
            recorder.record(Event::new(at, EventKind::Step));
        }
        let mut seen = Vec::new();
        assert_eq!(recorder.drain(&mut seen, 3).taken, 3);
        assert_eq!(recorder.drain(&mut seen, 3).taken, 2);
    }
}
