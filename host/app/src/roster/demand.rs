//! Models that are loaded when somebody asks for them, and given up when another needs their room.
//!
//! The configuration names them (`[on_demand]`); nothing is opened before the first request. That one begins the load, whoever
//! comes meanwhile waits for the same one, and a load that failed is not tried again for a while, which doubles up to a minute, so that
//! clients who ask for a broken model cost the others nothing. What requests have loaded, a load may unload again: the one that was
//! asked for the longest time ago, of those that no request has; where all are in use it waits, as long as a request would. What
//! somebody loaded by name, in the configuration or at the admin plane, is never taken for that: so there is no key that pins a model.
//!
//! Who has a model is counted by leases, which requests hold from the first look to their last byte, and not by the gauges of its
//! replicas: a request that is being tokenized is in none of them. A lease is taken under the lock under which a model is chosen to go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_engine::give_back_freed;
use pointsman_sched::ids::Micros;
use pointsman_server::admin::wire::ModelSource;
use pointsman_server::ports::{Lease, LoadReport, Want};
use tokio::sync::watch;

use super::{Entry, Load, Parts, Roster, RosterParts, Served, State, beginning};
use crate::deploy::lock;

/// Between a failed load and the next.
const FIRST_WAIT: Micros = 1_000_000;
const LONGEST_WAIT: Micros = 60_000_000;

/// What one that is chosen to go may take: it is idle, so this is for a driver that is slow to answer.
const PATIENCE: Micros = 3_600_000_000;

/// What is known of a model that comes and goes.
#[derive(Debug, Default)]
pub(super) struct Demand {
    /// Its own reference, and one for each lease.
    counted: Arc<()>,
    /// Number of the last request for it, of all such requests.
    used: u64,
    pub(super) backoff: Backoff,
}

/// When a load that failed may be tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    failures: u32,
    until: Micros,
}

// === impl Demand ===

impl Demand {
    fn lease(&mut self, request: u64) -> Lease {
        self.used = request;
        Lease::of(&self.counted)
    }

    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.counted) == 1
    }
}

// === impl Backoff ===

impl Backoff {
    /// A load has failed. `may_change`: by what another request or an operator did, so that the next may soon go well.
    pub(super) fn failed(&mut self, now: Micros, may_change: bool) {
        let wait = if may_change { FIRST_WAIT } else { FIRST_WAIT << self.failures.min(6) };
        self.failures += u32::from(!may_change);
        self.until = now.saturating_add(wait.min(LONGEST_WAIT));
    }

    fn left(self, now: Micros) -> Micros {
        self.until.saturating_sub(now)
    }
}

// === requests ===

impl Roster {
    /// What a request for a model hears; begins its load where nobody has.
    pub(super) fn demand(&self, name: &str) -> Want {
        let parts = &self.parts;
        let (now, request) = (parts.parts.shared.clock.micros(), parts.requests.fetch_add(1, Ordering::Relaxed));
        let mut entries = lock(&parts.entries);
        let Some(entry) = entries.get_mut(name) else { return Want::Here(Lease::default()) };
        let lease = entry.demand.lease(request);
        let coming = Want::Coming(lease.clone(), parts.changes.subscribe());
        match &entry.state {
            State::Ready(_) => return Want::Here(lease),
            State::Loading { .. } | State::Draining(_) => return coming,
            State::Failed(why) if entry.demand.backoff.left(now) > 0 => {
                let left = entry.demand.backoff.left(now).div_ceil(1_000);
                return Want::Failed { why: why.clone(), retry_after_ms: u32::try_from(left).unwrap_or(u32::MAX) };
            }
            State::Failed(_) | State::Unloaded => {}
        }
        let (progress, reports) = watch::channel(LoadReport::Progress(beginning()));
        let stop = Arc::<AtomicBool>::default();
        entry.state = State::Loading { reports, stop: Arc::clone(&stop) };
        let load = Load { name: name.to_owned(), path: entry.path.clone().unwrap_or_default(), actor: None };
        drop(entries);
        // Where there is no thread for it, the one who asks again hears so.
        let _ = self.begin(load, (progress, stop));
        coming
    }
}

// === room ===

impl Parts {
    /// Unloads the model that requests have loaded and that was asked for the longest time ago, of those that no request has;
    /// whether there was one.
    pub(super) fn evict(&self) -> bool {
        let RosterParts { shared, engine, .. } = &self.parts;
        let Some((name, served)) = self.choose() else { return false };
        let left = engine.clear(&served.variants, PATIENCE);
        engine.forget(&served.variants, true, shared);
        // Its tokenizer goes with the last of these.
        drop(served);
        give_back_freed();
        self.gone(&name);
        shared.metrics.models().evicted.inc();
        tracing::info!("`{name}` was unloaded for another model: {} bytes are free", left.bytes);
        true
    }

    /// Whether there are models that requests have loaded, idle or not.
    pub(super) fn has_some_to_give(&self) -> bool {
        let is_one = |entry: &Entry| entry.source == ModelSource::OnDemand && matches!(entry.state, State::Ready(_));
        lock(&self.entries).values().any(is_one)
    }

    /// Takes that model out of the catalog.
    fn choose(&self) -> Option<(String, Served)> {
        // No rollout begins between the look and the end of the model.
        let _held = self.parts.aliases.hold();
        let mut entries = lock(&self.entries);
        let idle = entries.iter_mut().filter_map(|(name, entry)| match &entry.state {
            State::Ready(served) if entry.may_go() && self.check_rollouts(&served.variants).is_ok() => {
                Some((name.clone(), served.clone(), entry))
            }
            _ => None,
        });
        let (name, served, entry) = idle.min_by_key(|(_, _, entry)| entry.demand.used)?;
        entry.state = State::Draining(served.clone());
        self.parts.engine.close(&served.variants);
        Some((name, served))
    }
}

impl Entry {
    /// Whether it may be given up for another now.
    fn may_go(&self) -> bool {
        self.source == ModelSource::OnDemand && self.demand.is_idle()
    }

    /// It is there no more, and may come at once.
    pub(super) fn unloaded(&mut self) {
        self.state = State::Unloaded;
        self.demand.backoff = Backoff::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_loads_wait_longer_each_time_up_to_a_minute() {
        const SECOND: Micros = 1_000_000;
        let mut backoff = Backoff::default();
        assert_eq!(backoff.left(0), 0, "the first is tried at once");
        for (may_change, seconds) in [
            (false, 1),
            (false, 2),
            (true, 1),
            (false, 4),
            (false, 8),
            (false, 16),
            (false, 32),
            (false, 60),
            (false, 60),
            (true, 1),
        ] {
            backoff.failed(5 * SECOND, may_change);
            assert_eq!(backoff.left(5 * SECOND), seconds * SECOND, "{may_change}");
            assert_eq!(backoff.left((5 + seconds) * SECOND), 0);
        }
    }

    #[test]
    fn a_model_is_idle_when_the_last_lease_has_gone() {
        let mut demand = Demand::default();
        let (first, second) = (demand.lease(1), demand.lease(2));
        assert_eq!(demand.used, 2);
        drop(first);
        assert!(!demand.is_idle());
        drop(second);
        assert!(demand.is_idle());
    }
}
