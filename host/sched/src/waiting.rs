//! The waiting queue in the host's order: priority, then arrival.
//!
//! One sorted vector, not a heap or a queue per priority: requests leave from the middle (cancel, deadline, a policy's
//! choice), preempted ones come back to their old place, and policies are shown the whole order. At the bound of the queue
//! an insertion moves a few tens of KiB, about a microsecond.

use crate::ids::{Micros, Priority};
use crate::sequence::{Sequence, Slot};

/// A waiting sequence with what ordering needs, so that a scan does not touch the slab.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    pub(crate) priority: Priority,
    pub(crate) order: u64,
    pub(crate) slot: Slot,
    /// After this moment it goes before everything; fixed while it waits.
    pub(crate) due: Micros,
}

#[derive(Debug)]
pub(crate) struct WaitingQueue {
    tickets: Vec<Ticket>,
    starvation_us: Micros,
}

impl WaitingQueue {
    pub(crate) fn new(capacity: usize, starvation_us: Micros) -> Self {
        Self { tickets: Vec::with_capacity(capacity), starvation_us }
    }

    pub(crate) fn insert(&mut self, slot: Slot, sequence: &Sequence) {
        let due = sequence.due(self.starvation_us).unwrap_or(Micros::MAX);
        let (priority, order) = (sequence.request.priority, sequence.order);
        let Err(place) = self.place(priority, order) else { return };
        self.tickets.insert(place, Ticket { priority, order, slot, due });
    }

    pub(crate) fn remove(&mut self, sequence: &Sequence) {
        let place = self.place(sequence.request.priority, sequence.order);
        assert!(place.is_ok(), "{:?} waits and is not in the queue", sequence.request.id);
        if let Ok(place) = place {
            self.tickets.remove(place);
        }
    }

    /// First one first.
    pub(crate) fn tickets(&self) -> &[Ticket] {
        &self.tickets
    }

    pub(crate) fn len(&self) -> usize {
        self.tickets.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }

    fn place(&self, priority: Priority, order: u64) -> Result<usize, usize> {
        self.tickets.binary_search_by_key(&(priority, order), |ticket| (ticket.priority, ticket.order))
    }
}
