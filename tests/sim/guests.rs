//! The real guest runtime on the simulation's clock, and what an operator may activate there.
//!
//! One runtime per process: compiling a guest takes longer than a hundred histories. Histories with guests therefore take
//! turns, and each has its own slot. Budgets are so wide that no machine is too slow for them, because a timeout would make
//! a history depend on who else uses the processor; misdeeds that need time are in `tests/contract`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use pointsman_policy::{
    Activation, Budget, Budgets, Compile, Component, FaultReport, Maintenance, Runtime, RuntimeConfig,
};
use pointsman_sched::ids::Micros;
use pointsman_telemetry::{Metrics, Recorder};
use pointsman_tests::root;

use crate::rng::Rng;

/// The slot of every history.
pub(crate) const SLOT: &str = "scheduler";
/// Instances of a generation: the replica's and a spare.
pub(crate) const INSTANCES: u32 = 2;
/// The generation that decides, the published one and the one in preparation: a runtime that leaks a single instance
/// cannot prepare the next generation.
const MAX_INSTANCES: u32 = 3 * INSTANCES;
/// Calls that the host makes to a guest before it accepts it.
const PROBES: u32 = 8;

/// The runtime and its guests, compiled.
pub(crate) struct Host {
    pub(crate) runtime: Runtime,
    clock: Arc<AtomicU64>,
    faults: Arc<Mutex<Vec<FaultReport>>>,
    components: [Component; Guest::ALL.len()],
    turn: Mutex<()>,
}

/// The committed guests that schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    Fcfs,
    ShortestFirst,
    Priority,
    FairShare,
    Fixture,
}

/// Whom an operator activates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cast {
    /// The policies that come with Pointsman, and native.
    Good,
    /// Those, and guests that misbehave after a while or at once.
    Any,
}

/// One activation.
#[derive(Clone, Debug)]
pub(crate) struct Role {
    pub(crate) guest: Guest,
    pub(crate) config: String,
    /// Whether the host should accept it.
    pub(crate) starts: bool,
}

// === impl Host ===

impl Host {
    /// The one of this process.
    pub(crate) fn get() -> &'static Self {
        static HOST: LazyLock<Host> = LazyLock::new(Host::start);
        &HOST
    }

    fn start() -> Self {
        let (clock, faults) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (time, seen) = (Arc::clone(&clock), Arc::clone(&faults));
        let wide = Budget { soft: 60_000_000, hard: 60_000_000 };
        let config = RuntimeConfig {
            compile: Compile::InProcess,
            maintenance: Maintenance::Manual,
            budgets: Budgets {
                admit: wide,
                settle: wide,
                route: wide,
                step: wide,
                resync: wide,
                on_events: wide,
                rank: wide,
                edit: wide,
                init: wide,
            },
            max_instances: MAX_INSTANCES,
            // Instances wear out within a history.
            recycle_calls: 64,
            recycle_growth_bytes: 1 << 20,
            on_fault: Some(Arc::new(move |fault| seen.lock().expect("no panic in here").push(fault.clone()))),
            ..RuntimeConfig::default()
        };
        let now = Arc::new(move || time.load(Ordering::Relaxed));
        let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(64), now).expect("a runtime");
        let components = Guest::ALL.map(|guest| runtime.admit(&guest.bytes()).expect("a committed guest"));
        Self { runtime, clock, faults, components, turn: Mutex::new(()) }
    }

    /// Waits for this history's turn; a history that failed before leaves nothing behind that matters.
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.clock.store(0, Ordering::Relaxed);
        self.take_faults();
        turn
    }

    pub(crate) fn set_clock(&self, now: Micros) {
        self.clock.store(now, Ordering::Relaxed);
    }

    /// Faults since the last time.
    pub(crate) fn take_faults(&self) -> Vec<FaultReport> {
        std::mem::take(&mut self.faults.lock().expect("no panic in here"))
    }

    pub(crate) fn component(&self, guest: Guest) -> &Component {
        &self.components[guest as usize]
    }
}

// === impl Guest ===

impl Guest {
    const ALL: [Self; 5] = [Self::Fcfs, Self::ShortestFirst, Self::Priority, Self::FairShare, Self::Fixture];

    fn bytes(self) -> Vec<u8> {
        let name = match self {
            Self::Fcfs => "sched-fcfs",
            Self::ShortestFirst => "sched-shortest-first",
            Self::Priority => "sched-priority",
            Self::FairShare => "sched-fair-share",
            Self::Fixture => "fixture-scheduler",
        };
        let path = root().join(format!("plugins/prebuilt/{name}.wasm"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

// === impl Cast ===

/// Deeds that are faults, and those that a policy may do: `leak` only wears instances out.
const FAULTS: [&str; 6] = ["trap", "recurse", "unknown-id", "duplicate-id", "uneven-lists", "huge-list"];
const ALLOWED: [&str; 3] = ["starve", "no-plan", "leak"];

impl Cast {
    /// Who is next; `None` is the native policy.
    pub(crate) fn draw(self, rng: &mut Rng) -> Option<Role> {
        let good = |guest, config: String| Some(Role { guest, config, starts: true });
        match rng.below(if self == Self::Good { 10 } else { 22 }) {
            0 => None,
            1 | 2 => good(Guest::Fcfs, "{}".into()),
            3 | 4 => good(Guest::ShortestFirst, "{}".into()),
            5..=7 => {
                let (aging, preempt) = (rng.within(1, 20_000), rng.chance(500_000));
                good(Guest::Priority, format!(r#"{{"aging_ms": {aging}, "preempt": {preempt}}}"#))
            }
            8 | 9 => {
                let (spare, output) = (rng.within(0, 3), rng.within(0, 4));
                good(Guest::FairShare, format!(r#"{{"spare_places": {spare}, "output_cost": {output}}}"#))
            }
            10 => Some(Role::refused(rng)),
            11..=13 => good(Guest::Fixture, deed(rng.pick(&ALLOWED), rng.within(0, 20))),
            _ => good(Guest::Fixture, deed(rng.pick(&FAULTS), PROBES + rng.within(0, 16))),
        }
    }
}

impl Role {
    /// One that fails the host's probes, or does not even start.
    fn refused(rng: &mut Rng) -> Self {
        let config = match rng.below(4) {
            0 => deed("trap-in-init", 0),
            1 => deed("refuse-config", 0),
            _ => deed(rng.pick(&FAULTS), rng.within(0, PROBES)),
        };
        Self { guest: Guest::Fixture, config, starts: false }
    }

    pub(crate) fn activation(&self, generation: u64) -> Activation {
        Activation { slot: SLOT.into(), generation, config: self.config.clone(), ..Activation::default() }
    }
}

fn deed(deed: &str, after: u32) -> String {
    format!(r#"{{"do": "{deed}", "after": {after}}}"#)
}
