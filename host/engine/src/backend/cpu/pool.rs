//! The threads of a CPU device, shared by its replicas.
//!
//! Work is split by output panel, never along a sum, so the number of threads changes no result. A step enters the pool
//! once ([`ComputePool::run`]) and forks with `join` inside it: waking a thread costs microseconds, a fork between awake
//! ones much less; below [`FORK_WORK`] even that is more than it saves. Within a step all threads stay awake ([`Team`]); between
//! steps they sleep after a few looks around: an idle pool takes no time. Where the machine is its own, each thread may be kept on
//! one core ([`ComputePool::pinned`]); the system moves them otherwise, and knows better as soon as others compute as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::Yield;

use super::isa::Isa;

/// Multiply-adds that a part must have to be worth a fork: about five microseconds.
const FORK_WORK: usize = 1 << 18;

/// Looks around of a thread that waits for work within a step before each of the next ones offers its core to others: some
/// microseconds.
const SPINS: u32 = 100;

/// Threads and instruction set of a CPU device. Clones share the threads.
#[derive(Clone, Debug)]
pub struct ComputePool {
    threads: Option<Arc<rayon::ThreadPool>>,
    n_threads: usize,
    isa: Isa,
    /// The core of each thread, where they are pinned.
    cores: Arc<[usize]>,
}

/// There is no such pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The system refused to start threads.
    #[error("cannot start {n_threads} compute threads: {source}; ask for fewer")]
    Threads {
        /// As many as were asked for.
        n_threads: usize,
        /// Why.
        source: rayon::ThreadPoolBuildError,
    },
    /// There are fewer cores.
    #[error("cannot pin {n_threads} compute threads: this process may use {n_cores} cores; ask for no more threads")]
    Cores {
        /// As many as were asked for.
        n_threads: usize,
        /// Of the process's affinity mask.
        n_cores: usize,
    },
    /// The system does not pin threads, or not now.
    #[error("cannot pin compute threads: {0}")]
    Pins(std::io::Error),
}

impl ComputePool {
    /// A pool of `n_threads` (0 counts as 1) with the best instruction set of this CPU.
    ///
    /// # Errors
    /// The system refuses to start threads.
    pub fn start(n_threads: usize) -> Result<Self, PoolError> {
        Self::with_isa(n_threads, Isa::best())
    }

    /// A pool for a given instruction set, to compare them.
    ///
    /// # Errors
    /// The system refuses to start threads.
    pub fn with_isa(n_threads: usize, isa: Isa) -> Result<Self, PoolError> {
        let n_threads = n_threads.max(1);
        let cores = Arc::default();
        let build =
            || rayon::ThreadPoolBuilder::new().num_threads(n_threads).thread_name(|i| format!("compute-{i}")).build();
        let threads = match n_threads {
            1 => None,
            _ => Some(Arc::new(build().map_err(|source| PoolError::Threads { n_threads, source })?)),
        };
        Ok(Self { threads, n_threads, isa, cores })
    }

    /// A pool each of whose threads stays on a core of its own, the first ones of those that this process may use. A pool of one
    /// thread computes on its caller's, which is not pinned.
    ///
    /// # Errors
    /// The system refuses to start or pin threads, or there are fewer cores.
    pub fn pinned(n_threads: usize) -> Result<Self, PoolError> {
        let pool = Self::start(n_threads)?;
        let Some(threads) = &pool.threads else { return Ok(pool) };
        let mut cores = pins::usable().map_err(PoolError::Pins)?;
        if cores.len() < pool.n_threads {
            return Err(PoolError::Cores { n_threads: pool.n_threads, n_cores: cores.len() });
        }
        cores.truncate(pool.n_threads);
        let pinned = threads.broadcast(|thread| pins::pin(cores[thread.index()]));
        pinned.into_iter().collect::<Result<(), _>>().map_err(PoolError::Pins)?;
        Ok(Self { cores: cores.into(), ..pool })
    }

    /// The core of each thread; empty where they are not pinned.
    #[must_use]
    pub fn pinned_to(&self) -> &[usize] {
        &self.cores
    }

    /// Number of threads.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Instruction set of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs a step inside the pool when it is large enough to be split at all.
    pub(super) fn run<T: Send>(&self, work: usize, step: impl FnOnce() -> T + Send) -> T {
        match &self.threads {
            Some(threads) if work >= 2 * FORK_WORK => threads.install(|| Team::default().run(self.n_threads, step)),
            _ => step(),
        }
    }

    /// Calls `f(first unit, slice)` on parts of `items`, each a whole number of units, together covering all. `work` is
    /// what all of it costs, in multiply-adds.
    pub(super) fn split<T: Send>(&self, work: usize, items: &mut [T], unit: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let scratch: &mut [()] = &mut [];
        let both = Units { items, unit, scratch, scratch_unit: 0 };
        self.split_with(work, both, |first, items, _| f(first, items));
    }

    /// [`ComputePool::split`] with scratch memory for every unit.
    pub(super) fn split_with<T: Send, U: Send>(
        &self,
        work: usize,
        units: Units<'_, T, U>,
        f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let inside = self.threads.is_some() && rayon::current_thread_index().is_some();
        let parts = if inside { (work / FORK_WORK).clamp(1, self.n_threads) } else { 1 };
        units.fork(parts, 0, &f);
    }
}

/// The threads of a step: until it ends those beside the one that began it stay awake, and take what that one forks. Left to the
/// library they fall asleep between two products, and waking them again costs as much as a small product takes: 8 % of a step of one
/// row of a model with a billion parameters.
#[derive(Debug, Default)]
struct Team {
    has_ended: AtomicBool,
}

impl Team {
    /// Helpers are forks themselves, which need no memory.
    fn run<T: Send>(&self, n_threads: usize, step: impl FnOnce() -> T + Send) -> T {
        let first = rayon::current_thread_index();
        let step = || {
            let _ends = Ends(self);
            step()
        };
        rayon::join(step, || self.help(n_threads - 1, first)).0
    }

    fn help(&self, n_helpers: usize, first: Option<usize>) {
        match n_helpers {
            0 => {}
            1 => self.stay(first),
            _ => {
                rayon::join(|| self.stay(first), || self.help(n_helpers - 1, first));
            }
        }
    }

    /// Computes what others fork until the step ends; whoever began it has nobody to wait for.
    fn stay(&self, first: Option<usize>) {
        let mut n_idle = 0;
        while rayon::current_thread_index() != first && !self.has_ended.load(Ordering::Acquire) {
            n_idle = if rayon::yield_now() == Some(Yield::Executed) { 0 } else { n_idle + 1 };
            // Others may need the core.
            if n_idle < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// Ends the step of a team, also in a panic.
struct Ends<'a>(&'a Team);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
    }
}

/// Work items and scratch memory, both a whole number of units.
#[derive(Debug)]
pub(super) struct Units<'a, T, U> {
    pub(super) items: &'a mut [T],
    pub(super) unit: usize,
    pub(super) scratch: &'a mut [U],
    pub(super) scratch_unit: usize,
}

impl<T: Send, U: Send> Units<'_, T, U> {
    fn fork(self, parts: usize, first: usize, f: &(impl Fn(usize, &mut [T], &mut [U]) + Sync)) {
        let n_units = self.items.len() / self.unit.max(1);
        if parts <= 1 || n_units <= 1 {
            return f(first, self.items, self.scratch);
        }
        let n_left = n_units * (parts / 2) / parts;
        let (items, right_items) = self.items.split_at_mut(n_left * self.unit);
        let (scratch, right_scratch) = self.scratch.split_at_mut(n_left * self.scratch_unit);
        let left = Units { items, unit: self.unit, scratch, scratch_unit: self.scratch_unit };
        let right =
            Units { items: right_items, unit: self.unit, scratch: right_scratch, scratch_unit: self.scratch_unit };
        rayon::join(|| left.fork(parts / 2, first, f), || right.fork(parts - parts / 2, first + n_left, f));
    }
}

/// Affinity masks of threads.
#[cfg(target_os = "linux")]
mod pins {
    use std::io;

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    /// Cores that this thread may use, ascending.
    pub(super) fn usable() -> io::Result<Vec<usize>> {
        let mask = sched_getaffinity(None)?;
        Ok((0..CpuSet::MAX_CPU).filter(|core| mask.is_set(*core)).collect())
    }

    /// Keeps this thread on a core.
    pub(super) fn pin(core: usize) -> io::Result<()> {
        let mut mask = CpuSet::new();
        mask.set(core);
        Ok(sched_setaffinity(None, &mask)?)
    }
}

/// Nothing of the kind elsewhere.
#[cfg(not(target_os = "linux"))]
mod pins {
    use std::io;

    pub(super) fn usable() -> io::Result<Vec<usize>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn pin(_core: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Adds one to each of some numbers, in forks.
    fn add_one(pool: &ComputePool, numbers: &mut [u32]) {
        pool.split(usize::MAX, numbers, 1, |_, numbers| numbers.iter_mut().for_each(|n| *n += 1));
    }

    #[test]
    fn a_team_computes_every_fork_once_and_ends_with_its_step_also_in_a_panic() {
        for n_threads in [1, 2, 3, 5] {
            let pool = ComputePool::start(n_threads).unwrap();
            let mut numbers = [0; 64];
            // Steps of two drivers at once, as of models and of encoders.
            std::thread::scope(|scope| {
                scope.spawn(|| (0..50).for_each(|_| pool.run(usize::MAX, || add_one(&pool, &mut [0; 16]))));
                for _ in 0..50 {
                    pool.run(usize::MAX, || (0..20).for_each(|_| add_one(&pool, &mut numbers)));
                }
            });
            assert_eq!(numbers, [1_000; 64], "{n_threads} threads");
            let ended = catch_unwind(AssertUnwindSafe(|| pool.run(usize::MAX, || panic!("a step"))));
            assert!(ended.is_err());
            pool.run(usize::MAX, || add_one(&pool, &mut numbers));
            assert_eq!(numbers, [1_001; 64], "{n_threads} threads");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn each_pinned_thread_has_a_core_of_its_own() {
        let usable = pins::usable().unwrap();
        for n_threads in 1..=usable.len().min(4) {
            let pool = ComputePool::pinned(n_threads).unwrap();
            let Some(threads) = &pool.threads else {
                assert_eq!((n_threads, pool.pinned_to()), (1, &[][..]));
                continue;
            };
            assert_eq!(pool.pinned_to(), &usable[..n_threads]);
            let found = threads.broadcast(|_| pins::usable().unwrap());
            assert_eq!(found, pool.pinned_to().iter().map(|core| vec![*core]).collect::<Vec<_>>());
        }
        assert_eq!(pins::usable().unwrap(), usable, "who asks stays where it was");
        let error = ComputePool::pinned(usable.len() + 1).unwrap_err().to_string();
        let expect = format!("this process may use {} cores; ask for no more threads", usable.len());
        assert!(error.contains(&expect), "{error}");
    }
}
