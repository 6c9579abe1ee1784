//! What the app decides about guests: budgets, sizes, where compiled code is kept, how a compilation is started.
//!
//! A value, validated by its types and by [`crate::Runtime::new`]; nothing in this crate reads the environment.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use pointsman_telemetry::Micros;

use crate::fault::FaultListener;
use crate::upload::World;

/// Everything that [`crate::Runtime`] is told once.
#[derive(Clone)]
pub struct RuntimeConfig {
    /// Where compiled components are kept. The directory is created with mode 0700 and must belong to this user alone,
    /// because its contents are executed. `None` keeps nothing.
    pub cache_dir: Option<PathBuf>,
    /// Most files in that directory; the least recently written ones go first.
    pub cache_entries: usize,
    /// How components are compiled.
    pub compile: Compile,
    /// Largest upload, in bytes.
    pub max_upload_bytes: usize,
    /// CPU time that guests may use.
    pub budgets: Budgets,
    /// Linear memory that one instance may have, in bytes; at most [`RuntimeConfig::MAX_MEMORY_BYTES`].
    pub memory_bytes: usize,
    /// Instances that may exist at once, over all slots and generations; beyond, activations fail.
    pub max_instances: u32,
    /// Warm router instances per generation, and as many of admission; calls beyond it at the same moment are answered
    /// natively. One more is kept as a spare.
    pub router_instances: u32,
    /// Calls after which an instance is replaced by a fresh one, and growth of its memory since it was ready that has the
    /// same effect: a guest that leaks stays flat.
    pub recycle_calls: u64,
    /// See [`recycle_calls`](Self::recycle_calls).
    pub recycle_growth_bytes: usize,
    /// Whether a thread of the runtime replaces instances and drops drained generations, or the caller does by
    /// [`crate::Runtime::maintain`] (simulations).
    pub maintenance: Maintenance,
    /// Names of the operator's labels of replicas, in the order of [`pointsman_sched::route::ReplicaColumns::labels`]; at
    /// most 16.
    pub replica_labels: Vec<String>,
    /// Told of every fault.
    pub on_fault: Option<FaultListener>,
}

/// Budgets of one call, in microseconds of the guest's own CPU time. Soft ones are counted, hard ones are enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// `admission.admit`.
    pub admit: Budget,
    /// `admission.settle`.
    pub settle: Budget,
    /// `router.route`.
    pub route: Budget,
    /// `scheduler.step`.
    pub step: Budget,
    /// `scheduler.resync`.
    pub resync: Budget,
    /// `telemetry.on-events`.
    pub on_events: Budget,
    /// `kv-retention.rank`.
    pub rank: Budget,
    /// Each function of `sampler`. A step waits for an edit up to four times this hard limit, whatever a slot's own one is.
    pub edit: Budget,
    /// Instantiation and `lifecycle.init`, together.
    pub init: Budget,
}

/// What an activation changes of the memory of its instances and of the budget of its hook's decisions: `admit`, `route`,
/// `step`, `rank`, `on-events`, or each function of `sampler`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BudgetChange {
    /// Instead of the default soft limit.
    pub soft: Option<Micros>,
    /// Instead of the default hard limit. A soft limit that is not changed is lowered to it.
    pub hard: Option<Micros>,
    /// Instead of the default memory.
    pub memory_bytes: Option<usize>,
}

/// What becomes of a request of which a sampler says nothing, because it faults or its circuit is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFault {
    /// It goes on with the edit that it has, a new one with none.
    #[default]
    Open,
    /// It is ended with an error.
    Closed,
}

/// What a guest may take, after what its activation changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of its decisions.
    pub budget: Budget,
    /// Memory of one instance, in bytes.
    pub memory_bytes: usize,
}

/// A budget that no slot may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// Of time.
    #[error(
        "a budget of {soft} us soft and {hard} us hard is not possible: the hard one must lie between 1 and {} us, the soft \
         one not above it",
        Budget::MOST
    )]
    Time {
        /// The soft limit that was asked for.
        soft: Micros,
        /// The hard limit.
        hard: Micros,
    },
    /// Of memory.
    #[error(
        "a budget of {bytes} bytes of memory is not possible: it must lie between {} and {}",
        RuntimeConfig::MIN_MEMORY_BYTES,
        RuntimeConfig::MAX_MEMORY_BYTES
    )]
    Memory {
        /// The memory that was asked for.
        bytes: usize,
    },
}

/// A soft and a hard limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// A call above it is counted as an overrun.
    pub soft: Micros,
    /// A call above it is stopped: a `timeout` fault.
    pub hard: Micros,
}

/// How components are compiled.
#[derive(Clone, Debug)]
pub enum Compile {
    /// In a child process that can be killed, with its own limits. What a host uses.
    Child {
        /// How to start it.
        command: CompileCommand,
        /// Its limits.
        limits: CompileLimits,
    },
    /// In this process: cannot be cancelled. For tests and tools that compile what their own user gave them.
    InProcess,
}

/// Starts a process that does nothing but call [`crate::compile_child_main`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileCommand {
    /// The program, usually the running one.
    pub program: PathBuf,
    /// Its arguments, usually `__compile`.
    pub args: Vec<OsString>,
}

/// Limits of one compilation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// CPU time, after which the child is killed, as it is after four times that by the clock: it runs at the lowest priority.
    pub time: Duration,
    /// Address space of the child, in bytes.
    pub memory_bytes: u64,
    /// Largest compiled result, in bytes.
    pub max_output_bytes: usize,
    /// How long an upload waits for the one before it.
    pub queue: Duration,
}

/// Who calls [`crate::Runtime::maintain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maintenance {
    /// A thread of the runtime.
    Thread,
    /// The caller.
    Manual,
}

// === impl Budget ===

impl Budget {
    /// Bound of a slot's own hard limit: a request, a step or a batch of events waits for so long at most.
    pub const MOST: Micros = 1_000_000;

    fn changed(self, change: BudgetChange) -> Result<Self, BudgetError> {
        let hard = change.hard.unwrap_or(self.hard);
        let soft = change.soft.unwrap_or(self.soft.min(hard));
        let unchanged = (change.soft, change.hard) == (None, None);
        let good = unchanged || ((1..=Self::MOST).contains(&hard) && soft <= hard);
        if good { Ok(Self { soft, hard }) } else { Err(BudgetError::Time { soft, hard }) }
    }
}

impl Budgets {
    /// With another budget for the decisions of a world.
    pub(crate) fn changed(mut self, world: World, change: BudgetChange) -> Result<Self, BudgetError> {
        let budget = self.of_decisions(world);
        *budget = budget.changed(change)?;
        Ok(self)
    }

    /// The one of a world's decisions.
    pub(crate) fn decisions(mut self, world: World) -> Budget {
        *self.of_decisions(world)
    }

    fn of_decisions(&mut self, world: World) -> &mut Budget {
        match world {
            World::Admission => &mut self.admit,
            World::Router => &mut self.route,
            World::Scheduler => &mut self.step,
            World::Telemetry => &mut self.on_events,
            World::Retention => &mut self.rank,
            World::Sampler => &mut self.edit,
        }
    }
}

// === impl RuntimeConfig ===

impl RuntimeConfig {
    /// Bound of [`memory_bytes`](Self::memory_bytes): a single `memory.copy` cannot be interrupted, so this also bounds how
    /// late a deadline can be noticed.
    pub const MAX_MEMORY_BYTES: usize = 256 << 20;
    /// Least memory that an activation may ask for: a guest of the SDK has 1 MiB of stack.
    pub const MIN_MEMORY_BYTES: usize = 1 << 20;

    /// What a guest of `world` may take.
    ///
    /// # Errors
    /// The change is out of bounds.
    pub fn limits(&self, world: World, change: BudgetChange) -> Result<Limits, BudgetError> {
        let budget = self.budgets.changed(world, change)?.decisions(world);
        Ok(Limits { budget, memory_bytes: self.memory(change)? })
    }

    pub(crate) fn memory(&self, change: BudgetChange) -> Result<usize, BudgetError> {
        match change.memory_bytes {
            None => Ok(self.memory_bytes),
            Some(bytes) if (Self::MIN_MEMORY_BYTES..=Self::MAX_MEMORY_BYTES).contains(&bytes) => Ok(bytes),
            Some(bytes) => Err(BudgetError::Memory { bytes }),
        }
    }
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            cache_dir: None,
            cache_entries: 64,
            compile: Compile::InProcess,
            max_upload_bytes: 32 << 20,
            budgets: Budgets::default(),
            memory_bytes: 64 << 20,
            max_instances: 256,
            router_instances: 4,
            recycle_calls: 100_000,
            recycle_growth_bytes: 16 << 20,
            maintenance: Maintenance::Thread,
            replica_labels: Vec::new(),
            on_fault: None,
        }
    }
}

impl fmt::Debug for RuntimeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RuntimeConfig")
            .field("cache_dir", &self.cache_dir)
            .field("compile", &self.compile)
            .field("budgets", &self.budgets)
            .field("memory_bytes", &self.memory_bytes)
            .field("max_instances", &self.max_instances)
            .field("router_instances", &self.router_instances)
            .field("recycle_calls", &self.recycle_calls)
            .field("maintenance", &self.maintenance)
            .field("replica_labels", &self.replica_labels)
            .finish_non_exhaustive()
    }
}

impl Default for Budgets {
    fn default() -> Self {
        let ms = 1_000;
        Self {
            admit: Budget { soft: 100, hard: 10 * ms },
            settle: Budget { soft: 10 * ms, hard: 50 * ms },
            route: Budget { soft: 100, hard: 10 * ms },
            step: Budget { soft: 50, hard: 10 * ms },
            resync: Budget { soft: 5 * ms, hard: 20 * ms },
            on_events: Budget { soft: 10 * ms, hard: 50 * ms },
            rank: Budget { soft: 200, hard: 10 * ms },
            edit: Budget { soft: ms, hard: 10 * ms },
            init: Budget { soft: 100 * ms, hard: 1_000 * ms },
        }
    }
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30),
            memory_bytes: 2 << 30,
            max_output_bytes: 256 << 20,
            queue: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_may_change_its_budget_within_bounds() {
        let change = |soft, hard| BudgetChange { soft, hard, memory_bytes: None };
        let of = |soft, hard| Some((soft, hard));
        for (asked, expect) in [
            (change(None, None), of(50, 10_000)),
            (change(Some(20), None), of(20, 10_000)),
            (change(Some(0), None), of(0, 10_000)),
            (change(None, Some(40)), of(40, 40)),
            (change(Some(500), Some(2_000)), of(500, 2_000)),
            (change(None, Some(Budget::MOST)), of(50, Budget::MOST)),
            (change(None, Some(Budget::MOST + 1)), None),
            (change(None, Some(0)), None),
            (change(Some(11), Some(10)), None),
        ] {
            let changed = Budgets::default().changed(World::Scheduler, asked);
            assert_eq!(changed.ok().map(|b| (b.step.soft, b.step.hard)), expect, "{asked:?}");
        }
        let changed = Budgets::default().changed(World::Router, change(Some(1), None)).expect("good");
        assert_eq!((changed.route.soft, changed.step), (1, Budgets::default().step), "others stay as they are");
    }

    #[test]
    fn a_slot_may_change_its_memory_within_bounds() {
        let config = RuntimeConfig::default();
        for (asked, expect) in [
            (None, Some(config.memory_bytes)),
            (Some(1 << 20), Some(1 << 20)),
            (Some(256 << 20), Some(256 << 20)),
            (Some(0), None),
            (Some((256 << 20) + 1), None),
            (Some(usize::MAX), None),
        ] {
            let change = BudgetChange { memory_bytes: asked, ..BudgetChange::default() };
            let limits = config.limits(World::Router, change);
            assert_eq!(limits.ok().map(|limits| limits.memory_bytes), expect, "{asked:?}");
        }
    }
}
