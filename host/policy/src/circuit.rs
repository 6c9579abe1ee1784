//! When a faulty guest stops being asked: a pure state machine over call numbers and times given as arguments.
//!
//! Faults are compared by call number and not by time, so that a guest behind a quiet slot is judged like one behind a
//! busy one, and so that a success costs the caller one counter and not this state. A sliding window of outcomes would
//! need a write per call under a lock.

use pointsman_telemetry::Micros;

/// Faults that open the circuit ...
const FAULTS: usize = 3;
/// ... when they lie within this many calls.
const WINDOW: u64 = 50;
/// Failed respawns in a row that open it.
const FAILED_RESPAWNS: u32 = 2;
/// First wait; it doubles up to [`MAX_WAIT_S`].
const SECOND: Micros = 1_000_000;
/// Longest wait, in seconds.
const MAX_WAIT_S: u64 = 60;
/// A trial whose outcome nobody has told for this long (its caller went away) may be repeated.
const TRIAL_TIMEOUT: Micros = 5 * SECOND;

/// Whether a slot's guest is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Every call goes to the guest.
    Closed,
    /// No call does, until this time.
    Open {
        /// When a trial is allowed.
        until: Micros,
    },
    /// One call at a time does; its outcome decides.
    HalfOpen,
}

/// Answer to "may I call?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admit {
    /// Yes.
    Yes,
    /// Yes, and the outcome decides whether the circuit closes: report it with `trial_passed` or `fault`.
    Trial,
    /// No.
    No,
}

/// The state for one generation of one slot.
#[derive(Debug)]
pub(crate) struct Circuit {
    state: State,
    /// Call numbers of the latest faults since the circuit last closed, oldest first.
    faults: [Option<u64>; FAULTS],
    failed_respawns: u32,
    /// Openings in a row, and the call number at which the last one ended.
    openings: u32,
    closed_at_call: u64,
    /// Faults and failed respawns in a row: the back-off of respawns.
    streak: u32,
    last_fault_call: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Closed,
    Open { until: Micros },
    HalfOpen { trial_since: Option<Micros> },
}

/// 1, 2, 4 ... 60 seconds.
fn wait(attempt: u32) -> Micros {
    (1_u64 << attempt.min(6)).min(MAX_WAIT_S) * SECOND
}

impl Circuit {
    pub(crate) fn new() -> Self {
        Self {
            state: State::Closed,
            faults: [None; FAULTS],
            failed_respawns: 0,
            openings: 0,
            closed_at_call: 0,
            streak: 0,
            last_fault_call: 0,
        }
    }

    pub(crate) fn health(&self) -> Health {
        match self.state {
            State::Closed => Health::Closed,
            State::Open { until } => Health::Open { until },
            State::HalfOpen { .. } => Health::HalfOpen,
        }
    }

    /// What [`admit`](Self::admit) would say.
    pub(crate) fn would_admit(&self, now: Micros) -> Admit {
        match self.state {
            State::Closed => Admit::Yes,
            State::Open { until } if now < until => Admit::No,
            State::HalfOpen { trial_since: Some(since) } if now < since + TRIAL_TIMEOUT => Admit::No,
            State::Open { .. } | State::HalfOpen { .. } => Admit::Trial,
        }
    }

    /// Whether a call may be made now, for a caller who then makes it. Turns an open circuit whose time has come into a
    /// half-open one.
    pub(crate) fn admit(&mut self, now: Micros) -> Admit {
        let admit = self.would_admit(now);
        if admit == Admit::Trial {
            self.state = State::HalfOpen { trial_since: Some(now) };
        }
        admit
    }

    /// A trial ended well: the circuit closes.
    pub(crate) fn trial_passed(&mut self, call: u64) {
        if matches!(self.state, State::HalfOpen { .. }) {
            self.state = State::Closed;
            self.faults = [None; FAULTS];
            self.closed_at_call = call;
            self.failed_respawns = 0;
        }
    }

    /// A trial could not be made after all (no instance was free): the next caller may try.
    pub(crate) fn trial_withdrawn(&mut self) {
        if let State::HalfOpen { trial_since } = &mut self.state {
            *trial_since = None;
        }
    }

    /// Call number `call` was a fault. Returns when the poisoned instance may be replaced.
    pub(crate) fn fault(&mut self, call: u64, now: Micros) -> Micros {
        if call.saturating_sub(self.last_fault_call) > WINDOW {
            self.streak = 0;
        }
        self.last_fault_call = call;
        self.faults.rotate_left(1);
        self.faults[FAULTS - 1] = Some(call);
        let within = self.faults[0].is_some_and(|oldest| call - oldest.min(call) < WINDOW);
        match self.state {
            State::Closed if within => self.open(call, now),
            State::HalfOpen { .. } => self.open(call, now),
            State::Closed | State::Open { .. } => {}
        }
        self.respawn_at(now)
    }

    /// A replacement could not be started. Returns when to try again.
    pub(crate) fn respawn_failed(&mut self, call: u64, now: Micros) -> Micros {
        self.failed_respawns += 1;
        if self.failed_respawns >= FAILED_RESPAWNS && !matches!(self.state, State::Open { .. }) {
            self.open(call, now);
        }
        self.respawn_at(now)
    }

    /// A replacement was started.
    pub(crate) fn respawned(&mut self) {
        self.failed_respawns = 0;
    }

    fn respawn_at(&mut self, now: Micros) -> Micros {
        let at = now + wait(self.streak);
        self.streak = self.streak.saturating_add(1);
        at
    }

    fn open(&mut self, call: u64, now: Micros) {
        if matches!(self.state, State::Closed) && call.saturating_sub(self.closed_at_call) > WINDOW {
            self.openings = 0;
        }
        self.state = State::Open { until: now + wait(self.openings) };
        self.openings = self.openings.saturating_add(1);
        self.faults = [None; FAULTS];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Micros = SECOND;

    /// Three faults in a row, after call number `after`.
    fn fault_three(circuit: &mut Circuit, after: u64) {
        for call in 1..=3 {
            circuit.fault(after + call, 0);
        }
    }

    #[test]
    fn three_faults_within_fifty_calls_open() {
        for (calls, expect) in [
            (&[1, 2][..], Health::Closed),
            (&[1, 2, 3], Health::Open { until: S }),
            (&[1, 25, 50], Health::Open { until: S }),
            (&[1, 25, 51], Health::Closed),
            (&[1, 60, 61, 100], Health::Open { until: S }),
        ] {
            let mut circuit = Circuit::new();
            for &call in calls {
                circuit.fault(call, 0);
            }
            assert_eq!(circuit.health(), expect, "{calls:?}");
        }
    }

    #[test]
    fn two_failed_respawns_in_a_row_open() {
        let mut circuit = Circuit::new();
        circuit.respawn_failed(0, 0);
        circuit.respawned();
        circuit.respawn_failed(0, 0);
        assert_eq!(circuit.health(), Health::Closed);
        circuit.respawn_failed(0, 7);
        assert_eq!(circuit.health(), Health::Open { until: S + 7 });
    }

    #[test]
    fn waits_double_up_to_a_minute_and_a_pass_closes() {
        let mut circuit = Circuit::new();
        fault_three(&mut circuit, 0);
        let mut now = 0;
        let mut waits = Vec::new();
        for call in 4..12 {
            let Health::Open { until } = circuit.health() else { panic!("{circuit:?}") };
            waits.push((until - now) / S);
            assert_eq!((circuit.would_admit(until - 1), circuit.admit(until - 1)), (Admit::No, Admit::No));
            assert_eq!((circuit.would_admit(until), circuit.would_admit(until)), (Admit::Trial, Admit::Trial));
            assert_eq!(circuit.admit(until), Admit::Trial);
            assert_eq!(circuit.admit(until), Admit::No, "one trial at a time");
            now = until;
            circuit.fault(call, now);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        let Health::Open { until } = circuit.health() else { panic!("{circuit:?}") };
        assert_eq!(circuit.admit(until), Admit::Trial);
        circuit.trial_passed(12);
        assert_eq!((circuit.health(), circuit.admit(until)), (Health::Closed, Admit::Yes));
    }

    #[test]
    fn a_long_good_time_forgives() {
        for (gap, expect) in [(10, 2 * S), (WINDOW + 10, S)] {
            let mut circuit = Circuit::new();
            fault_three(&mut circuit, 0);
            circuit.admit(S);
            circuit.trial_passed(4);
            fault_three(&mut circuit, 4 + gap);
            assert_eq!(circuit.health(), Health::Open { until: expect }, "{gap}");
        }
    }

    #[test]
    fn respawns_back_off() {
        let mut circuit = Circuit::new();
        assert_eq!(circuit.fault(1, 0), S);
        assert_eq!(circuit.fault(40, 0), 2 * S);
        assert_eq!(circuit.respawn_failed(40, 0), 4 * S);
        assert_eq!(circuit.fault(400, 0), S, "after a good time it starts again");
    }

    #[test]
    fn a_lost_trial_is_repeated() {
        let mut circuit = Circuit::new();
        fault_three(&mut circuit, 0);
        assert_eq!(circuit.admit(S), Admit::Trial);
        assert_eq!(circuit.admit(S + TRIAL_TIMEOUT - 1), Admit::No);
        assert_eq!(circuit.admit(S + TRIAL_TIMEOUT), Admit::Trial);
        circuit.trial_withdrawn();
        assert_eq!(circuit.admit(S + TRIAL_TIMEOUT), Admit::Trial);
    }
}
