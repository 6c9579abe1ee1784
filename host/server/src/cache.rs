//! Answers that need not be computed again: a request whose answer is a function of what it says gets the one that an equal
//! request got before, or is about to get.
//!
//! What is kept is what the encoders are fed with (`stream::Update`), and not bytes of a body: an answer that was computed for
//! one shape is told in any other, whole or as a stream, with an id of its own. It stands behind admission and its policy and
//! before the router: who is refused is refused, and what costs nothing is not routed. In memory and bounded in bytes; not on a
//! disk, which would have to be trusted with prompts. One map behind one lock: two short critical sections per request, and none
//! at all while it is off, as it is unless the operator gives it room.

mod feed;
mod flight;
mod key;
mod wish;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use pointsman_sched::ids::{Micros, Priority};
use pointsman_telemetry::CacheMetrics;
use serde::Serialize;

pub(crate) use self::feed::{Feed, Seat};
pub(crate) use self::flight::{Flight, Lead};
pub(crate) use self::key::{Key, KeyWriter, Subject};
pub(crate) use self::wish::Wish;

use crate::config::ServerConfig;
use crate::dispatch::Origin;

/// An answer may take this part of all the room: one that is larger would drive out too many others.
const LARGEST_PART: usize = 8;
/// What an entry takes beside its answer: key, places in the maps, the allocations' own.
const ENTRY_BYTES: usize = 256;

/// Answers that are kept, and answers on their way.
#[derive(Debug)]
pub(crate) struct ResponseCache {
    /// 0 for off.
    max_bytes: usize,
    ttl: Micros,
    inner: Mutex<Inner>,
    stored: AtomicU64,
    metrics: CacheMetrics,
}

#[derive(Debug)]
struct Inner {
    answers: LruCache<Key, Kept>,
    bytes: usize,
    flights: HashMap<Key, Arc<Flight>>,
    /// Another number after each clearing: what was on its way then is not kept.
    epoch: u64,
}

#[derive(Debug)]
struct Kept {
    /// One that has ended.
    flight: Arc<Flight>,
    at: Micros,
    bytes: usize,
}

/// What a request asks of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) now: Micros,
    /// A less urgent request is not waited for.
    pub(crate) priority: Priority,
    /// Oldest answer that will do; `None` for any that is kept.
    pub(crate) max_age: Option<Micros>,
    /// Whether neither what is kept nor what is on its way will do.
    pub(crate) refresh: bool,
}

/// What a request finds.
#[derive(Debug)]
pub(crate) enum Found {
    /// An answer, so old.
    Hit(Arc<Flight>, Micros),
    /// An equal request is being computed.
    Joined(Arc<Flight>),
    /// Nothing, or nothing new enough: this request computes, for others too. With the epoch in which it began.
    Lead(Arc<Flight>, u64, Served),
}

/// How the cache served a request, for its header and for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// From what is kept, so old in seconds.
    Hit { age_s: u64 },
    /// Computed.
    Miss,
    /// Computed, because what was kept is too old.
    Stale,
    /// From an equal request.
    Joined,
    /// Not looked up.
    Bypass,
}

/// `GET /admin/v1/cache`, on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Stats {
    enabled: bool,
    entries: usize,
    bytes: usize,
    max_bytes: usize,
    ttl_s: u64,
    /// Answers being computed that equal requests wait for, or may.
    in_flight: usize,
    hits: u64,
    misses: u64,
    joined: u64,
    bypassed: u64,
    /// Misses that found an answer which was too old.
    stale: u64,
    stored: u64,
    evicted: u64,
}

/// `DELETE /admin/v1/cache`, on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Cleared {
    pub(crate) entries: usize,
    pub(crate) bytes: usize,
}

// === impl ResponseCache ===

impl ResponseCache {
    pub(crate) fn new(config: &ServerConfig, metrics: CacheMetrics) -> Self {
        Self {
            max_bytes: config.cache_bytes,
            ttl: config.cache_ttl_ms.saturating_mul(1_000),
            inner: Mutex::new(Inner { answers: LruCache::unbounded(), bytes: 0, flights: HashMap::new(), epoch: 0 }),
            stored: AtomicU64::new(0),
            metrics,
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.max_bytes > 0
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an answer to an equal request was kept or is on its way, young enough or not.
    pub(crate) fn knows(&self, key: &Key) -> bool {
        let inner = self.inner();
        inner.answers.contains(key) || inner.flights.contains_key(key)
    }

    /// Looks a request up. Whoever is to lead must end its flight, or drop it, as [`Lead`] does.
    pub(crate) fn find(&self, key: Key, terms: Terms) -> Found {
        let Terms { now, priority, max_age, refresh } = terms;
        let mut inner = self.inner();
        let mut old = None;
        if !refresh && let Some(kept) = inner.answers.get(&key) {
            let age = now.saturating_sub(kept.at);
            if age < self.ttl && max_age.is_none_or(|most| age <= most) {
                return Found::Hit(Arc::clone(&kept.flight), age);
            }
            if age >= self.ttl {
                self.metrics.stale.inc();
                old = inner.remove(&key);
                self.show(&inner);
            }
        }
        // Whoever is more urgent computes on its own, and is followed from now on.
        let joined = inner.flights.get(&key).filter(|flight| !refresh && flight.priority() <= priority).cloned();
        let found = joined.map_or_else(
            || {
                let flight = Arc::new(Flight::new(priority));
                inner.flights.insert(key, Arc::clone(&flight));
                Found::Lead(flight, inner.epoch, if old.is_some() { Served::Stale } else { Served::Miss })
            },
            Found::Joined,
        );
        drop(inner);
        // Freed here and not under the lock.
        drop(old);
        found
    }

    /// A flight is over, and nobody may join it any more; `keep` holds when it ended, if it is to be kept, and its epoch.
    fn landed(&self, key: Key, flight: &Arc<Flight>, keep: Option<(Micros, u64)>) {
        let mut out = Vec::new();
        let mut inner = self.inner();
        if inner.flights.get(&key).is_some_and(|known| Arc::ptr_eq(known, flight)) {
            inner.flights.remove(&key);
        }
        let bytes = flight.bytes() + ENTRY_BYTES;
        if let Some((at, epoch)) = keep
            && epoch == inner.epoch
            && bytes <= self.max_bytes / LARGEST_PART
        {
            out.extend(inner.remove(&key));
            while let Some((&oldest, kept)) = inner.answers.peek_lru()
                && at.saturating_sub(kept.at) >= self.ttl
            {
                out.extend(inner.remove(&oldest));
            }
            while inner.bytes + bytes > self.max_bytes
                && let Some((_, oldest)) = inner.answers.pop_lru()
            {
                inner.bytes -= oldest.bytes;
                out.push(oldest);
                self.metrics.evicted.inc();
            }
            inner.bytes += bytes;
            inner.answers.put(key, Kept { flight: Arc::clone(flight), at, bytes });
            self.stored.fetch_add(1, Ordering::Relaxed);
            self.show(&inner);
        }
        drop(inner);
        drop(out);
    }

    /// Forgets every answer, and those on their way are not kept.
    pub(crate) fn clear(&self) -> Cleared {
        let mut inner = self.inner();
        inner.epoch += 1;
        inner.flights.clear();
        let answers = std::mem::replace(&mut inner.answers, LruCache::unbounded());
        let bytes = std::mem::take(&mut inner.bytes);
        self.show(&inner);
        drop(inner);
        Cleared { entries: answers.len(), bytes }
    }

    /// Counts how a request was served.
    pub(crate) fn count(&self, served: Served) {
        let CacheMetrics { hits, misses, joined, bypassed, .. } = &self.metrics;
        match served {
            Served::Hit { .. } => hits.inc(),
            Served::Miss | Served::Stale => misses.inc(),
            Served::Joined => joined.inc(),
            Served::Bypass => bypassed.inc(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let (entries, bytes, in_flight) = {
            let inner = self.inner();
            (inner.answers.len(), inner.bytes, inner.flights.len())
        };
        let CacheMetrics { hits, misses, joined, bypassed, stale, evicted, .. } = &self.metrics;
        Stats {
            enabled: self.is_on(),
            entries,
            bytes,
            max_bytes: self.max_bytes,
            ttl_s: self.ttl / 1_000_000,
            in_flight,
            hits: hits.get(),
            misses: misses.get(),
            joined: joined.get(),
            bypassed: bypassed.get(),
            stale: stale.get(),
            stored: self.stored.load(Ordering::Relaxed),
            evicted: evicted.get(),
        }
    }

    fn show(&self, inner: &Inner) {
        self.metrics.entries.set(i64::try_from(inner.answers.len()).unwrap_or(i64::MAX));
        self.metrics.bytes.set(i64::try_from(inner.bytes).unwrap_or(i64::MAX));
    }
}

// === impl Inner ===

impl Inner {
    fn remove(&mut self, key: &Key) -> Option<Kept> {
        let kept = self.answers.pop(key)?;
        self.bytes -= kept.bytes;
        Some(kept)
    }
}

// === impl Served ===

impl Served {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Hit { .. } => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
            Self::Joined => "joined",
            Self::Bypass => "bypass",
        }
    }
}

/// What an ended flight has told.
#[derive(Debug)]
pub(crate) struct Told {
    log: flight::Log,
    /// Who computed it.
    origin: Origin,
    /// Tokens that it took.
    completion: u32,
}
