//! The seam to telemetry: where the scheduler's events go.
//!
//! A trait of one method instead of a recorder, because the scheduler does not know its replica or variant: the app hands
//! in a closure that fills those in and records. An observer must neither block nor allocate.

use pointsman_telemetry::Event;

/// Takes events as they happen, on the driver thread.
pub trait Observer {
    /// Takes one event; `replica` and `variant` are still empty.
    fn observe(&mut self, event: Event);
}

impl<F: FnMut(Event)> Observer for F {
    fn observe(&mut self, event: Event) {
        self(event);
    }
}
