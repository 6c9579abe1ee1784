//! The threads of a CPU device, shared by its replicas.
//!
//! Work is split by output panel, never along a sum, so the number of threads changes no result. A step enters the pool
//! once ([`ComputePool::run`]) and forks with `join` inside it: waking a thread costs microseconds, a fork between awake
//! ones much less; below [`FORK_WORK`] even that is more than it saves.

use std::sync::Arc;

use super::isa::Isa;

/// Multiply-adds that a part must have to be worth a fork: about five microseconds.
const FORK_WORK: usize = 1 << 18;

/// Threads and instruction set of a CPU device. Clones share the threads.
#[derive(Clone, Debug)]
pub struct ComputePool {
    threads: Option<Arc<rayon::ThreadPool>>,
    n_threads: usize,
    isa: Isa,
}

/// The system refused to start threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {n_threads} compute threads: {source}; ask for fewer")]
pub struct PoolError {
    n_threads: usize,
    source: rayon::ThreadPoolBuildError,
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
        let build =
            || rayon::ThreadPoolBuilder::new().num_threads(n_threads).thread_name(|i| format!("compute-{i}")).build();
        let threads = match n_threads {
            1 => None,
            _ => Some(Arc::new(build().map_err(|source| PoolError { n_threads, source })?)),
        };
        Ok(Self { threads, n_threads, isa })
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
            Some(threads) if work >= 2 * FORK_WORK => threads.install(step),
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
