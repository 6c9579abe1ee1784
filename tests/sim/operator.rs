//! A replica's scheduler guest with an operator behind its back, who swaps it and tends the runtime at any moment at which
//! another thread could: between steps, between the calls of one decision, while a step is in flight.
//!
//! The wrapper knows which generation was in force when the replica attended, and holds the runtime to it: that one alone
//! is asked until the next step boundary, it has the whole view first, an open circuit is not asked at all. The calls go
//! through real publishes and not through the `Slot` of `policies`, whose swaps are the simulation's own.

use std::sync::{Arc, Mutex};

use pointsman_policy::{Call, FaultKind, Health, SchedulerGuest, SchedulerSlot, Slot, SlotStatus};
use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, View};
use pointsman_sched::ids::Micros;

use crate::guests::{Cast, Host, INSTANCES, SLOT};
use crate::rng::Rng;
use crate::world::{Options, Report, run};

/// Chances in a million at each of the moments, of which a step has up to four. A history has one of the rates of swaps:
/// under the highest no guest stays for long enough to open its circuit and close it again.
const SWAP_PPM: [u64; 3] = [500, 2_000, 12_000];
const TEND_PPM: u64 = 60_000;

/// What became of the guests of a history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Publishes, native ones included.
    pub(crate) swaps: u64,
    /// Decisions during which a swap came.
    pub(crate) overtaken: u64,
    /// Activations that the host refused.
    pub(crate) refused: u64,
    /// Plans that guests gave.
    pub(crate) plans: u64,
    /// Steps for which the runtime chose the native policy in place of a guest.
    pub(crate) fallbacks: u64,
    pub(crate) faults: [u64; FaultKind::ALL.len()],
    /// Instances that maintenance started.
    pub(crate) respawns: u64,
    /// Circuits that opened, and that closed again.
    pub(crate) opened: u64,
    pub(crate) closed: u64,
}

/// Who activates and tends.
struct Operator {
    host: &'static Host,
    slot: Arc<SchedulerSlot>,
    cast: Cast,
    rng: Rng,
    swap_ppm: u64,
    generation: u64,
    tally: Arc<Mutex<Tally>>,
}

/// The guest of the one replica, and what it may do next.
struct Operated {
    guest: SchedulerGuest,
    operator: Operator,
    /// Generation in force since the replica attended last.
    decides: u64,
    /// Whether that generation has the view and every change since.
    follows: bool,
    /// Boundaries in a row at which it was asked nothing.
    busy: u64,
    /// Whether the view waits for the next question: no call is made but the one that is a half-open circuit's trial.
    waits: bool,
    /// Generation and health when last seen.
    health: (u64, Health),
}

/// Lives a history whose policies are real guests.
pub(crate) fn run_guests(seed: u64, cast: Cast, options: &Options) -> (Report, Tally) {
    let host = Host::get();
    let _turn = host.turn();
    let slot = host.runtime.scheduler_slot(SLOT);
    // Attached before the first generation is prepared, so that it has an instance from its first step.
    let guest = slot.attach("replica-0");
    let tally = Arc::new(Mutex::new(Tally::default()));
    let mut rng = Rng::new(seed ^ 0x6775_6573_7473_0000);
    let swap_ppm = rng.pick(&SWAP_PPM);
    let operator =
        Operator { host, slot: Arc::clone(&slot), cast, rng, swap_ppm, generation: 0, tally: Arc::clone(&tally) };
    let operated =
        Operated { guest, operator, decides: 0, follows: false, busy: 0, waits: false, health: (0, Health::Closed) };
    let report = run(seed, Box::new(operated), options);
    slot.publish_native(u64::MAX).expect("the newest generation");
    host.runtime.maintain();
    assert_eq!(slot.status().draining, 0, "seed {seed}: a generation outlives its last replica");
    let tally = tally.lock().expect("one thread").clone();
    (report, tally)
}

// === impl Tally ===

impl Tally {
    /// Adds another history's numbers.
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, number) in [
            (&mut self.swaps, other.swaps),
            (&mut self.overtaken, other.overtaken),
            (&mut self.refused, other.refused),
            (&mut self.plans, other.plans),
            (&mut self.fallbacks, other.fallbacks),
            (&mut self.respawns, other.respawns),
            (&mut self.opened, other.opened),
            (&mut self.closed, other.closed),
        ] {
            *sum += number;
        }
        for (sum, number) in self.faults.iter_mut().zip(other.faults) {
            *sum += number;
        }
    }
}

// === impl Operator ===

impl Operator {
    /// A moment at which another thread could come in between.
    fn moment(&mut self, now: Micros) {
        self.host.set_clock(now);
        if self.rng.chance(TEND_PPM) {
            self.tend();
        }
        if self.rng.chance(self.swap_ppm) || self.generation == 0 {
            self.swap();
        }
    }

    fn tend(&mut self) {
        let before = self.slot.status();
        self.host.runtime.maintain();
        let after = self.slot.status();
        assert!(after.instances <= INSTANCES, "{after:?}");
        self.count(|tally| tally.respawns += u64::from(after.instances - before.instances));
    }

    fn swap(&mut self) {
        let before = self.slot.status();
        let generation = self.generation + 1;
        let Some(role) = self.cast.draw(&mut self.rng) else {
            self.slot.publish_native(generation).expect("a newer generation");
            self.generation = generation;
            return self.count(|tally| tally.swaps += 1);
        };
        let prepared = self.host.runtime.prepare(self.host.component(role.guest), role.activation(generation));
        assert_eq!(prepared.is_ok(), role.starts, "{role:?}: {prepared:?}");
        match prepared {
            Ok(prepared) => {
                self.slot.publish(prepared).expect("a newer generation");
                self.generation = generation;
                self.count(|tally| tally.swaps += 1);
            }
            Err(_) => {
                let after = self.slot.status();
                assert_eq!((after.generation, after.calls), (before.generation, before.calls), "the slot is untouched");
                self.count(|tally| tally.refused += 1);
            }
        }
    }

    fn count(&self, count: impl FnOnce(&mut Tally)) {
        count(&mut self.tally.lock().expect("one thread"));
    }
}

// === impl Operated ===

impl Operated {
    /// What the runtime may answer to a replica that attends while `before` is published.
    fn check_attention(&mut self, now: Micros, before: &SlotStatus, attention: Attention) {
        let is_new = before.generation != self.decides;
        if attention != Attention::Busy {
            self.busy = 0;
        }
        let has_guest = &*before.revision != "native";
        let fell_back = self.operator.slot.status().fallbacks - before.fallbacks;
        self.decides = before.generation;
        // At a boundary at which it hands over or takes over it is asked nothing else; what it follows, it follows on.
        self.follows &= attention == Attention::Following || (attention == Attention::Busy && !is_new);
        match attention {
            Attention::Native => {
                assert!(!is_new || !has_guest, "a new generation does not serve its first step: {before:?}");
            }
            Attention::Busy => {
                // No call is over such a budget. It took over, or was asked for an activation, or a worn instance gave what it
                // knew to a fresh one.
                self.busy += 1;
                assert!(self.busy <= 2, "one boundary for the question, one for the renewal: {before:?}");
            }
            Attention::Following => assert!(self.follows && !is_new, "it follows without a view: {before:?}"),
            Attention::NeedsView => assert!(has_guest, "native asks for nothing"),
        }
        assert_eq!(fell_back, 0, "whether there is something to decide is not known yet");
        if attention != Attention::Native {
            assert_eq!(self.guest.generation(), self.decides);
            let is_open = matches!(before.health, Health::Open { until } if now < until);
            assert!(!is_open, "an open circuit is asked: {before:?}");
        }
        self.note_health();
    }

    /// After a call: whether it faulted, and that nobody but the deciding generation had to do with it.
    fn settle(&mut self, call: Call) -> bool {
        let faults = self.operator.host.take_faults();
        for fault in &faults {
            let is_this = fault.call == call || (self.waits && fault.call == Call::Resync);
            assert!(fault.generation == self.decides && is_this, "{fault:?}");
            self.operator.count(|tally| tally.faults[fault.kind as usize] += 1);
        }
        self.follows &= faults.is_empty();
        let status = self.operator.slot.status();
        if status.generation != self.decides {
            assert_eq!((status.calls, status.fallbacks), (0, 0), "it is asked before a step boundary: {status:?}");
        }
        let answers = self.guest.generation();
        assert!(answers == self.decides || (answers == 0 && !self.follows), "{answers} answers");
        self.note_health();
        !faults.is_empty()
    }

    /// Calls of the deciding generation, while it is still the published one.
    fn calls(&self) -> Option<u64> {
        let status = self.operator.slot.status();
        (status.generation == self.decides).then_some(status.calls)
    }

    fn note_health(&mut self) {
        let status = self.operator.slot.status();
        let (generation, was) = std::mem::replace(&mut self.health, (status.generation, status.health));
        if generation != status.generation {
            return;
        }
        let [was_open, is_open] = [was, status.health].map(|health| matches!(health, Health::Open { .. }));
        self.operator.count(|tally| {
            tally.opened += u64::from(is_open && !was_open);
            tally.closed += u64::from(was == Health::HalfOpen && status.health == Health::Closed);
        });
    }
}

impl BatchPolicy for Operated {
    fn attend(&mut self, now: Micros) -> Attention {
        self.operator.moment(now);
        let before = self.operator.slot.status();
        let attention = self.guest.attend(now);
        self.check_attention(now, &before, attention);
        self.operator.moment(now);
        attention
    }

    fn generation(&self) -> u64 {
        self.guest.generation()
    }

    fn wants_progress(&self) -> bool {
        self.guest.wants_progress()
    }

    fn resync(&mut self, view: &View<'_>) {
        let calls = self.calls();
        self.guest.resync(view);
        self.waits = self.calls() == calls;
        let is_closed = self.health.1 == Health::Closed;
        assert!(calls.is_none() || self.waits != is_closed, "the view reaches the guest: {:?}", self.health);
        self.follows = true;
        self.settle(Call::Resync);
        self.operator.moment(view.now);
    }

    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        let has_view = self.follows;
        let calls = self.calls();
        let answer = self.guest.step(now, budgets, changes, plan);
        let made = self.calls().zip(calls).map(|(after, before)| after - before);
        let faulted = self.settle(Call::Step);
        let expect = u64::from(has_view) + u64::from(has_view && self.waits);
        let is_told = made.is_none_or(|made| made == expect || (made == 1 && self.waits && faulted));
        assert!(is_told, "it is asked if it has the view: {made:?} calls, expected {expect}");
        self.waits = false;
        if answer == Answer::Planned {
            assert!(has_view && !faulted, "a plan without a view, or of a call that failed");
        }
        self.operator.count(|tally| {
            tally.plans += u64::from(answer == Answer::Planned);
            tally.overtaken += u64::from(calls.is_none());
        });
        self.operator.moment(now);
        answer
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        self.guest.refused(now, why);
        assert!(self.settle(Call::Step), "a refused plan is a fault");
    }

    fn stood_in(&mut self) {
        let before = self.operator.slot.status();
        self.guest.stood_in();
        let fell_back = self.operator.slot.status().fallbacks - before.fallbacks;
        let has_guest = before.generation == self.decides && &*before.revision != "native";
        assert_eq!(fell_back, u64::from(has_guest), "a fallback shows: {before:?}");
        self.operator.count(|tally| tally.fallbacks += fell_back);
    }
}
