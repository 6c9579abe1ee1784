//! Whether an upstream is asked at all: open after too many faults, closed again by one request that went well.
//!
//! The rule is that of the circuits around policies: 3 faults within the last 50 requests open it, for 1, 2, 4 ... 60 s, and
//! then one request is its trial. Not the same type: that one counts guests of one slot with atomics on a path of a
//! microsecond; here a request costs milliseconds, and a lock with plain numbers behind it says the same in fewer words.
//! Time is an argument.

use pointsman_sched::ids::Micros;

/// Requests that are looked back at.
const WINDOW: u32 = 50;
/// Of those, faults that open the circuit.
const MAX_FAULTS: u32 = 3;
const FIRST_WAIT: Micros = 1_000_000;
const LONGEST_WAIT: Micros = 60_000_000;

/// What became of the last requests.
#[derive(Debug)]
pub(super) struct Circuit {
    /// A bit per request, the last one lowest; 1 for a fault.
    recent: u64,
    /// When it may be tried, while it is open.
    retry_at: Option<Micros>,
    /// How long it stays open the next time.
    wait: Micros,
    /// Whether its trial is under way.
    is_tried: bool,
}

/// How a circuit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Everybody may pass.
    Closed,
    /// One may, to see whether it works again.
    Trial,
    /// Nobody may.
    Open,
}

impl Default for Circuit {
    fn default() -> Self {
        Self { recent: 0, retry_at: None, wait: FIRST_WAIT, is_tried: false }
    }
}

impl Circuit {
    /// How it stands.
    pub(super) fn gate(&self, now: Micros) -> Gate {
        match self.retry_at {
            None => Gate::Closed,
            Some(at) if at <= now && !self.is_tried => Gate::Trial,
            Some(_) => Gate::Open,
        }
    }

    /// Takes the trial, if it stands open for one: whoever got it ends it by `went_well`, `failed` or `untried`.
    pub(super) fn pass(&mut self, now: Micros) -> Gate {
        let gate = self.gate(now);
        self.is_tried |= gate == Gate::Trial;
        gate
    }

    /// A request went well. While it is open, only its trial's word counts.
    pub(super) fn went_well(&mut self, is_trial: bool) {
        self.recent <<= 1;
        if is_trial {
            *self = Self::default();
        }
    }

    /// A request failed by a fault of the upstream; whether that opened the circuit.
    pub(super) fn failed(&mut self, now: Micros, is_trial: bool) -> bool {
        self.recent = (self.recent << 1) | 1;
        let faults = (self.recent & ((1 << WINDOW) - 1)).count_ones();
        // What was sent before it opened says nothing new.
        let opens = if self.retry_at.is_none() { faults >= MAX_FAULTS } else { is_trial };
        if opens {
            *self = Self {
                recent: 0,
                retry_at: Some(now.saturating_add(self.wait)),
                wait: self.wait.saturating_mul(2).min(LONGEST_WAIT),
                is_tried: false,
            };
        }
        opens
    }

    /// A trial ended and says nothing, as when its client went away.
    pub(super) fn untried(&mut self) {
        self.is_tried = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Micros = 1_000_000;

    #[test]
    fn three_faults_of_fifty_open_it_and_one_good_trial_closes_it() {
        let mut circuit = Circuit::default();
        for faults_apart in [20, 20] {
            assert!(!circuit.failed(0, false));
            (0..faults_apart).for_each(|_| circuit.went_well(false));
        }
        // Of the two before, both are within the last fifty.
        assert!(circuit.failed(0, false));
        assert_eq!((circuit.gate(S - 1), circuit.gate(S)), (Gate::Open, Gate::Trial));
        assert_eq!((circuit.pass(S), circuit.pass(S)), (Gate::Trial, Gate::Open), "one at a time");
        circuit.untried();
        assert_eq!(circuit.pass(S), Gate::Trial);
        circuit.went_well(false);
        assert!(!circuit.failed(S, false), "what was on its way says nothing");
        assert_eq!(circuit.gate(S), Gate::Open);
        circuit.went_well(true);
        assert_eq!(circuit.gate(S), Gate::Closed);
    }

    #[test]
    fn faults_that_lie_apart_do_not_open_it() {
        let mut circuit = Circuit::default();
        for _ in 0..10 {
            assert!(!circuit.failed(0, false));
            (0..25).for_each(|_| circuit.went_well(false));
        }
        assert_eq!(circuit.gate(0), Gate::Closed);
    }

    #[test]
    fn each_failed_trial_doubles_the_wait_up_to_a_minute() {
        let mut circuit = Circuit::default();
        let mut now = 0;
        assert_eq!([(); 3].map(|()| circuit.failed(now, false)), [false, false, true]);
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert!(!circuit.failed(now, false), "what was on its way when it opened");
            assert_eq!(circuit.pass(now + wait * S - 1), Gate::Open);
            now += wait * S;
            assert_eq!(circuit.pass(now), Gate::Trial, "{wait}");
            assert!(circuit.failed(now, true));
        }
    }
}
