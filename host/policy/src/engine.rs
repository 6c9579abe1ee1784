//! The one wasmtime engine: determinism, interruption, memory layout.
//!
//! Code generation is fixed here and nowhere else, because the compile child must generate exactly what the host loads.
//! Instances come from a pooling allocator; it reserves address space for all of them at once, so where that is limited
//! (containers with `ulimit -v`) the engine falls back to allocating on demand, which only makes instantiation slower.

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{
    Config, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig, UpdateDeadline, WasmBacktraceDetails,
};

use crate::config::RuntimeConfig;

/// Stack that a guest may use before it traps.
const STACK_BYTES: usize = 512 << 10;
/// Core instances, memories and tables that one component may consist of: a JavaScript guest has three memories, and a Python
/// guest is linked out of 38 instances at start.
const CORE_INSTANCES_PER_COMPONENT: u32 = 64;
const MEMORIES_PER_COMPONENT: u32 = 4;
const TABLES_PER_COMPONENT: u32 = 8;
/// Most entries of a table, also enforced by the store's limiter.
pub(crate) const TABLE_ELEMENTS: usize = 20_000;
/// Memory that a returned pool slot keeps mapped, so that its next instance need not fault it in again.
const KEEP_RESIDENT: usize = 64 << 10;

/// How instances get their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// From a pool reserved at start.
    Pooling,
    /// From the system, one by one: the machine limits address space.
    OnDemand,
}

/// Everything that decides what code is generated: equal in the host and in the compile child.
fn codegen_config() -> Config {
    let mut config = Config::new();
    config
        .concurrency_support(false)
        .epoch_interruption(true)
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .cranelift_opt_level(OptLevel::Speed)
        .wasm_memory64(false)
        // For wasmtime's own adapters between the parts of a composed component, such as a JavaScript engine and its
        // stubs of WASI; the store's limiter counts all memories of an instance together.
        .wasm_multi_memory(true)
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        .max_wasm_stack(STACK_BYTES)
        // A full 4 GiB reservation lets compiled code leave bounds checks to the guard pages.
        .memory_reservation(4 << 30)
        .memory_guard_size(32 << 20)
        .memory_may_move(false);
    config
}

/// An engine that only compiles: no pool, so that it runs within a small address space.
pub(crate) fn compiler() -> wasmtime::Result<Engine> {
    Engine::new(&codegen_config())
}

/// The host's engine, for at most `max_instances` instances. Address space is reserved for 4 GiB each whatever they may use, so
/// the pool takes the most that any slot may have; what one does have is the store's limiter's business.
pub(crate) fn host(max_instances: u32) -> wasmtime::Result<(Engine, Allocation)> {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(max_instances)
        .total_core_instances(max_instances.saturating_mul(CORE_INSTANCES_PER_COMPONENT))
        .total_memories(max_instances)
        .total_tables(max_instances.saturating_mul(2))
        .max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT)
        .max_memories_per_component(MEMORIES_PER_COMPONENT)
        .max_tables_per_component(TABLES_PER_COMPONENT)
        .table_elements(TABLE_ELEMENTS)
        .max_memory_size(RuntimeConfig::MAX_MEMORY_BYTES)
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(KEEP_RESIDENT)
        .max_unused_warm_slots(max_instances.min(16));
    let mut config = codegen_config();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    let error = match Engine::new(&config) {
        Ok(engine) => return Ok((engine, Allocation::Pooling)),
        Err(error) => error,
    };
    tracing::warn!(
        error = format!("{error:#}"),
        "no address space for a pool of wasm instances; allocating on demand (check `ulimit -v`)"
    );
    Ok((Engine::new(&codegen_config())?, Allocation::OnDemand))
}

/// Nanoseconds on the system's monotonic clock, for durations in metrics. Not a clock to decide by: decisions get their
/// time as an argument.
pub(crate) fn stopwatch_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

/// Nanoseconds of CPU time that this thread has used: for soft budgets by which the host changes its ways, because a guest
/// whose thread was descheduled is not to blame. A system call, so not for every router call.
pub(crate) fn cpu_ns() -> u64 {
    nanoseconds(ClockId::ThreadCPUTime)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// A hard budget, counted in CPU time of the thread that runs the guest.
///
/// Reading that clock is a system call, so it is first read at the first tick that finds the guest running: a call of
/// microseconds almost never meets one. The guest may therefore use up to a tick more than its budget, never less; and a
/// guest whose thread was descheduled is not charged for the wait.
#[derive(Debug, Default)]
pub(crate) struct Deadline {
    budget_ns: u64,
    first_seen_ns: Option<u64>,
}

impl Deadline {
    /// Starts a call; set the store's epoch deadline to one tick as well.
    pub(crate) fn start(&mut self, budget_us: u64) {
        self.budget_ns = budget_us.saturating_mul(1_000);
        self.first_seen_ns = None;
    }

    /// A tick found the guest running.
    pub(crate) fn tick(&mut self) -> UpdateDeadline {
        let now = nanoseconds(ClockId::ThreadCPUTime);
        let since = *self.first_seen_ns.get_or_insert(now);
        if now.saturating_sub(since) < self.budget_ns { UpdateDeadline::Continue(1) } else { UpdateDeadline::Interrupt }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{DefaultHasher, Hash, Hasher};

    use super::*;

    fn compatibility(engine: &Engine) -> u64 {
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        hasher.finish()
    }

    #[test]
    fn the_child_compiles_what_the_host_loads() {
        let (host, allocation) = host(4).expect("an engine");
        println!("allocation: {allocation:?}");
        assert_eq!(compatibility(&host), compatibility(&compiler().expect("an engine")));
    }

    #[test]
    fn too_large_a_pool_falls_back_to_allocating_on_demand() {
        // 2^47 bytes of user address space hold fewer than 2^15 reservations of 4 GiB.
        let (_, allocation) = host(1 << 17).expect("an engine");
        assert_eq!(allocation, Allocation::OnDemand);
    }

    #[test]
    fn a_deadline_counts_from_the_first_tick() {
        let mut deadline = Deadline::default();
        deadline.start(0);
        assert!(matches!(deadline.tick(), UpdateDeadline::Interrupt), "nothing left");
        deadline.start(60_000_000);
        assert!(matches!(deadline.tick(), UpdateDeadline::Continue(1)));
        assert!(matches!(deadline.tick(), UpdateDeadline::Continue(1)));
    }
}
