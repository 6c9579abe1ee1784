//! The one way out: every sequence that leaves the scheduler leaves through `end`, so that exactly one last word reaches its
//! sink and everything it held goes back in the same call.

use pointsman_telemetry::{Event, EventKind};

use crate::ids::Micros;
use crate::observe::Observer;
use crate::request::{CancelCause, Failure, FinishReason, SinkEvent};
use crate::sequence::{Sequence, Slot, Stage};

use super::{Counters, Scheduler, event};

/// `a` of [`EventKind::Rejected`] for a policy's refusal.
const REJECTED_BY_POLICY: u64 = 4;

/// How a request ends.
#[derive(Clone, Debug)]
pub(super) enum Ending {
    Finished(FinishReason),
    Cancelled(CancelCause),
    Failed(Failure),
}

impl Scheduler {
    /// Ends a sequence in whatever state it is.
    pub(super) fn end(&mut self, slot: Slot, ending: Ending, now: Micros, observer: &mut dyn Observer) {
        let mut sequence = self.sequences.remove(slot);
        let stage = sequence.stage();
        if sequence.running {
            self.running.retain(|&other| other != slot);
        } else {
            self.waiting.remove(&sequence);
        }
        self.queued_tokens -= u64::from(sequence.prompt_remaining());
        self.n_closed -= u32::from(sequence.closed);
        self.kv.release_all(&mut sequence.table, now);
        self.told.gone(&sequence);
        if let Some(model) = &mut self.draft_model {
            model.forget(sequence.request.id);
        }
        ending.count(stage, &mut self.counters);
        observer.observe(ending.event(&sequence, self.generation, now));
        // Nothing follows the last word, so the sink's answer does not matter.
        let _ = sequence.request.sink.push(ending.into());
    }
}

// === impl Ending ===

impl Ending {
    fn count(&self, stage: Stage, counters: &mut Counters) {
        match self {
            Self::Finished(FinishReason::Stop(_)) | Self::Cancelled(CancelCause::StopString) => {
                counters.finished_stop += 1
            }
            Self::Finished(FinishReason::Length) => counters.finished_length += 1,
            Self::Cancelled(_) => counters.cancelled[stage as usize] += 1,
            Self::Failed(_) => counters.failed += 1,
        }
    }

    fn event(&self, sequence: &Sequence, scheduler_generation: u64, now: Micros) -> Event {
        let numbers = (now.saturating_sub(sequence.request.arrived), u64::from(sequence.generated()));
        match self {
            Self::Finished(_) | Self::Cancelled(CancelCause::StopString) => {
                event(sequence, now, EventKind::Finished, numbers)
            }
            Self::Cancelled(_) => event(sequence, now, EventKind::Cancelled, numbers),
            Self::Failed(Failure::DroppedByPolicy) => {
                let rejected = event(sequence, now, EventKind::Rejected, (REJECTED_BY_POLICY, 0));
                Event { generation: scheduler_generation, ..rejected }
            }
            // The client's grammar or the operator's policy: no fault of the replica.
            Self::Failed(Failure::Mask(_)) => event(sequence, now, EventKind::Cancelled, numbers),
            Self::Failed(_) => event(sequence, now, EventKind::Failed, numbers),
        }
    }
}

impl From<Ending> for SinkEvent {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Finished(reason) => Self::Finished(reason),
            Ending::Cancelled(cause) => Self::Cancelled(cause),
            Ending::Failed(failure) => Self::Failed(failure),
        }
    }
}
