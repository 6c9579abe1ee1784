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

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pointsman_engine::cuda::PoolShare;
use pointsman_engine::give_back_freed;
use pointsman_sched::ids::Micros;
use pointsman_server::admin::wire::ModelSource;
use pointsman_server::ports::{Lease, LoadReport, Want};
use tokio::sync::watch;

use super::{Entry, Load, Parts, Roster, Served, State, beginning};
use crate::deploy::lock;

/// Between a failed load and the next.
const FIRST_WAIT: Micros = 1_000_000;
const LONGEST_WAIT: Micros = 60_000_000;

/// What one that is chosen to go may take: it is idle, so this is for a driver that is slow to answer.
const PATIENCE: Micros = 60_000_000;

/// What is known of a model that comes and goes.
#[derive(Debug, Default)]
pub(super) struct Demand {
    /// Its own reference, and one for each lease.
    counted: Arc<()>,
    /// Number of the last request for it, of all such requests.
    used: u64,
    /// A load waits until nobody has it: it takes no more requests.
    is_asked_back: bool,
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
    fn lease(&mut self, request: u64, is_first: bool) -> Lease {
        // In the order in which they came, and not that in which they hear of a change.
        if is_first {
            self.used = request;
        }
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
    pub(super) fn demand(&self, name: &str, is_first: bool) -> Want {
        let parts = &self.parts;
        let request = parts.requests.fetch_add(1, Ordering::Relaxed);
        let mut entries = lock(&parts.entries);
        // Not before the lock: a load that failed meanwhile would be later than now.
        let now = parts.parts.shared.clock.micros();
        let Some(entry) = entries.get_mut(name) else { return Want::Here(Lease::default()) };
        if is_first && entry.demand.is_asked_back {
            return Want::Coming(Lease::default(), parts.changes.subscribe());
        }
        let lease = entry.demand.lease(request, is_first);
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
        let load =
            Load { name: name.to_owned(), path: entry.path.clone().unwrap_or_default(), actor: None, asked: now };
        drop(entries);
        // Where there is no thread for it, the one who asks again hears so.
        let _ = self.begin(load, (progress, stop));
        coming
    }
}

impl Roster {
    /// Keeps a model that is there, for a request for its alias: that counts as one for it.
    pub(super) fn keep(&self, name: &str) -> Option<Lease> {
        let request = self.parts.requests.fetch_add(1, Ordering::Relaxed);
        let mut entries = lock(&self.parts.entries);
        let entry = entries.get_mut(name).filter(|entry| entry.lent().is_some() && !entry.demand.is_asked_back)?;
        Some(entry.demand.lease(request, true))
    }
}

// === room ===

impl Parts {
    /// Unloads the model that requests have loaded and that was asked for the longest time ago, of those that no request has and that
    /// hold something of this device, where one is named; whether there was one.
    pub(super) fn evict(&self, device: Option<&str>) -> bool {
        let Some((name, served)) = self.choose(device) else { return false };
        // Its name is free again whatever happens.
        let going = Going { parts: self, name: &name };
        let left = self.clear(&served, (PATIENCE, true));
        drop(going);
        // Its tokenizer goes with the last of these.
        drop(served);
        give_back_freed();
        self.parts.shared.metrics.models().evicted.inc();
        tracing::info!("`{name}` was unloaded for another model: {} bytes are free", left.bytes);
        true
    }

    /// What KV pools have and must keep of a device that are not lent to requests.
    pub(super) fn staying_pool_shares(&self, device: &str) -> Vec<PoolShare> {
        let entries = lock(&self.entries);
        let lent: Vec<Arc<str>> = entries
            .values()
            .filter_map(Entry::lent)
            .flat_map(|served| served.variants.iter().map(|v| v.id.clone()))
            .collect();
        drop(entries);
        let shares = self.parts.engine.pool_shares(device).into_iter();
        shares.filter(|(variant, _)| !lent.contains(variant)).map(|(_, share)| share).collect()
    }

    /// What models hold of a device that may be given up, though not now where they are in use.
    pub(super) fn could_give(&self, device: &str) -> u64 {
        self.lent_on(device).values().sum()
    }

    /// The same of each of those that hold something there, by name.
    fn lent_on(&self, device: &str) -> HashMap<String, u64> {
        let entries = lock(&self.entries);
        let lent = |(name, entry): (&String, &Entry)| Some((name.clone(), entry.lent()?.clone()));
        let lent: Vec<(String, Served)> = entries.iter().filter_map(lent).collect();
        drop(entries);
        let held = |served: &Served| {
            let (replicas, _) = self.parts.engine.replicas_of(&served.variants);
            let replicas = replicas.iter().filter(|replica| replica.device == device);
            let encoder = served.encoder.as_ref().filter(|_| device == "cpu").map_or(0, |(_, memory)| memory.held());
            replicas.map(|replica| replica.memory.held()).sum::<u64>() + encoder
        };
        lent.into_iter().map(|(name, served)| (name, held(&served))).filter(|(_, held)| *held > 0).collect()
    }

    /// Lets the model that is the next to go, of those that hold something of this device, where one is named, take no more requests;
    /// false where there is none.
    pub(super) fn ask_back(&self, device: Option<&str>) -> bool {
        let on_device = device.map(|device| self.lent_on(device));
        let mut entries = lock(&self.entries);
        if entries.values().any(|entry| entry.demand.is_asked_back) {
            return true;
        }
        let holds = |name: &str| on_device.as_ref().is_none_or(|names| names.contains_key(name));
        let lent = entries.iter_mut().filter(|(name, entry)| entry.lent().is_some() && holds(name));
        let next = lent.min_by_key(|(_, entry)| entry.demand.used);
        next.map(|(_, entry)| entry.demand.is_asked_back = true).is_some()
    }

    /// Ends that.
    pub(super) fn ask_no_more(&self) {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.values_mut().find(|entry| entry.demand.is_asked_back) {
            entry.demand.is_asked_back = false;
            self.changes.send_replace(());
        }
    }

    /// Whether no request waits for a model.
    pub(super) fn is_unwanted(&self, name: &str) -> bool {
        lock(&self.entries).get(name).is_some_and(|entry| entry.demand.is_idle())
    }

    /// Takes that model out of the catalog.
    fn choose(&self, device: Option<&str>) -> Option<(String, Served)> {
        let on_device = device.map(|device| self.lent_on(device));
        let holds = |name: &str| on_device.as_ref().is_none_or(|names| names.contains_key(name));
        // No rollout begins between the look and the end of the model.
        let _held = self.parts.aliases.hold();
        let mut entries = lock(&self.entries);
        let idle = entries.iter_mut().filter_map(|(name, entry)| {
            let served = entry.lent().filter(|served| self.check_rollouts(&served.variants).is_ok())?.clone();
            (entry.demand.is_idle() && holds(name)).then(|| (name.clone(), served, entry))
        });
        let (name, served, entry) = idle.min_by_key(|(_, _, entry)| entry.demand.used)?;
        entry.state = State::Draining(served.clone());
        drop(entries);
        self.shut(&served);
        Some((name, served))
    }
}

/// A model on its way out.
struct Going<'a> {
    parts: &'a Parts,
    name: &'a str,
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.parts.gone(self.name);
    }
}

impl Entry {
    /// What it is served as, if requests have loaded it: then it may be given up for another.
    fn lent(&self) -> Option<&Served> {
        match &self.state {
            State::Ready(served) if self.source == ModelSource::OnDemand => Some(served),
            _ => None,
        }
    }

    /// It is there no more, and may come at once; how it was.
    pub(super) fn unloaded(&mut self) -> State {
        (self.demand.backoff, self.demand.is_asked_back) = (Backoff::default(), false);
        std::mem::replace(&mut self.state, State::Unloaded)
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
        let (first, second) = (demand.lease(1, true), demand.lease(2, true));
        drop(demand.lease(3, false));
        assert_eq!(demand.used, 2, "asking again is no other request");
        drop(first);
        assert!(!demand.is_idle());
        drop(second);
        assert!(demand.is_idle());
    }
}
