//! Places of a listener: who holds one, who has waited longest for a request, and how room is made.
//!
//! Here and not in the loop that accepts, because streams of HTTP/2 take places too. A bound alone lets whoever opens sockets and
//! says nothing keep everybody out, probes included, for as long as a head may take, and then again. So a full listener closes
//! the connection that has waited longest without a request; where each has one, a few places more let probes through and tell
//! others to come back. A request costs two looks at the clock and two atomics; the list is locked when a connection comes
//! or goes, and looked through only while the listener is full.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use pointsman_telemetry::ConnectionMetrics;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::ApiError;
use crate::held::Held;

/// Connections beyond the bound, while every place is taken by a request: probes are answered, everybody else gets 429. The
/// next ones wait in the kernel's backlog.
const SPARE: usize = 16;
/// How long each of them may last: a probe and its answer.
const SPARE_LIFE: Duration = Duration::from_secs(2);
/// How long a connection is left alone that has no request: the first may be on its way, as may the next one of a busy client.
/// So also how long a new connection waits for a place, unless the one before has waited in vain.
const LEFT_ALONE: Duration = Duration::from_secs(1);
/// The log has a line about full places at most so often.
const NOTED: Duration = Duration::from_secs(60);
/// In the place of the number of requests, of a connection that was closed for room.
const ENDED: u32 = u32::MAX;

/// Put on a request that finds its listener full: it is refused where requests get their ids, and goes no further.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoPlace;

/// The places of a listener.
#[derive(Debug)]
pub(crate) struct Places {
    plane: &'static str,
    room: Arc<Semaphore>,
    spare: Arc<Semaphore>,
    /// Whether the last connection that had to wait for a place got one.
    is_patient: AtomicBool,
    list: Mutex<List>,
    since: Instant,
    metrics: ConnectionMetrics,
}

#[derive(Debug, Default)]
struct List {
    next_id: u64,
    /// At most as many as there are places.
    open: BTreeMap<u64, (Arc<Connection>, OwnedSemaphorePermit)>,
    noted: Option<Instant>,
    /// Since then.
    n_closed: u64,
    n_beyond: u64,
}

/// What is known of an open connection.
#[derive(Debug)]
pub(crate) struct Connection {
    places: Arc<Places>,
    is_spare: bool,
    n_under_way: AtomicU32,
    /// When it last had a request, or came, in microseconds of its listener's life.
    waits_since_us: AtomicU64,
    /// It is to end for somebody else.
    told: Notify,
    /// It has.
    gone: Notify,
}

/// A connection's hold on its place, which ends with it.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) connection: Arc<Connection>,
    id: u64,
    /// One beyond the bound; the others are in the list.
    _spare: Option<OwnedSemaphorePermit>,
}

/// A request on a connection, until its answer is sent or given up.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Connection>);

/// An answer whose connection is busy until it has been handed over; a refusal holds nothing.
pub(crate) type Counted = Held<Body, Option<UnderWay>>;

impl From<NoPlace> for ApiError {
    fn from(NoPlace: NoPlace) -> Self {
        let what = "as many requests and connections are open as this listener has places for (server.max_connections)";
        Self::Saturated { what: what.to_owned() }
    }
}

// === impl Places ===

impl Places {
    pub(crate) fn new(plane: &'static str, n_places: usize, metrics: ConnectionMetrics) -> Arc<Self> {
        Arc::new(Self {
            plane,
            room: Arc::new(Semaphore::new(n_places)),
            spare: Arc::new(Semaphore::new(SPARE)),
            is_patient: AtomicBool::new(true),
            list: Mutex::default(),
            since: Instant::now(),
            metrics,
        })
    }

    /// A place for a connection that has come; waits where even those beyond the bound are taken.
    pub(crate) async fn take(self: &Arc<Self>) -> Seat {
        let place = match self.taken().await {
            Some(place) => Some(place),
            None => self.waited_for().await,
        };
        self.is_patient.store(place.is_some(), Ordering::Relaxed);
        if let Some(place) = place {
            return self.seat(place, false);
        }
        self.note(|list| list.n_beyond += 1);
        let (room, spare) = (Arc::clone(&self.room), Arc::clone(&self.spare));
        let (place, is_spare) = tokio::select! {
            biased;
            place = room.acquire_owned() => (place, false),
            place = spare.acquire_owned() => (place, true),
        };
        let place = place.unwrap_or_else(|_| unreachable!("nobody closes the places"));
        self.seat(place, is_spare)
    }

    /// A place that is free, or that of whoever has waited longest, once its socket is closed.
    async fn taken(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.room).try_acquire_owned() {
            return Some(place);
        }
        let (closed, place) = self.make_room()?;
        closed.gone.notified().await;
        Some(place)
    }

    /// The next place that is given back, or that of whoever has waited too long by then.
    async fn waited_for(&self) -> Option<OwnedSemaphorePermit> {
        let patience = if self.is_patient.load(Ordering::Relaxed) { LEFT_ALONE } else { Duration::ZERO };
        match tokio::time::timeout(patience, Arc::clone(&self.room).acquire_owned()).await {
            Ok(place) => place.ok(),
            Err(_) => self.taken().await,
        }
    }

    /// Tells the connection to end that has waited longest for a request, and takes its place.
    fn make_room(&self) -> Option<(Arc<Connection>, OwnedSemaphorePermit)> {
        let mut list = self.list();
        let alone_us = self.now_us().checked_sub(us(LEFT_ALONE))?;
        let id = loop {
            let idle = list.open.iter().filter(|(_, (c, _))| c.n_under_way.load(Ordering::Acquire) == 0);
            let since = idle.map(|(id, (c, _))| (c.waits_since_us.load(Ordering::Relaxed), *id));
            let (_, id) = since.min().filter(|(since_us, _)| *since_us <= alone_us)?;
            // Another look where it has got a request in between.
            let n_under_way = &list.open[&id].0.n_under_way;
            if n_under_way.compare_exchange(0, ENDED, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                break id;
            }
        };
        let closed = list.open.remove(&id)?;
        closed.0.told.notify_one();
        self.metrics.evicted.inc();
        drop(list);
        self.note(|list| list.n_closed += 1);
        Some(closed)
    }

    fn seat(self: &Arc<Self>, place: OwnedSemaphorePermit, is_spare: bool) -> Seat {
        let connection = Arc::new(Connection {
            places: Arc::clone(self),
            is_spare,
            n_under_way: AtomicU32::new(0),
            waits_since_us: AtomicU64::new(self.now_us()),
            told: Notify::new(),
            gone: Notify::new(),
        });
        self.metrics.open.inc();
        let mut list = self.list();
        let id = list.next_id;
        list.next_id += 1;
        let spare = match is_spare {
            true => Some(place),
            false => {
                list.open.insert(id, (Arc::clone(&connection), place));
                None
            }
        };
        Seat { connection, id, _spare: spare }
    }

    /// Counts something, and tells of it where it is time for that.
    fn note(&self, count: impl FnOnce(&mut List)) {
        let (mut list, now) = (self.list(), Instant::now());
        count(&mut list);
        if list.noted.is_some_and(|at| now.duration_since(at) < NOTED) {
            return;
        }
        tracing::warn!(
            plane = self.plane,
            closed_idle = list.n_closed,
            beyond = list.n_beyond,
            "as many connections are open as server.max_connections allows: those that have waited longest for a request are \
             closed for new ones, and while all have one, new ones get 429"
        );
        (list.noted, list.n_closed, list.n_beyond) = (Some(now), 0, 0);
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        us(self.since.elapsed())
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

// === impl Connection ===

impl Connection {
    /// Whether it is beyond the bound.
    pub(crate) fn is_spare(&self) -> bool {
        self.is_spare
    }

    /// A request has come. None where it is to be refused: on a connection beyond the bound, or on one that has been closed.
    pub(crate) fn begin(self: &Arc<Self>) -> Option<UnderWay> {
        let more = |n: u32| (n != ENDED && !self.is_spare).then(|| n.saturating_add(1));
        let begun = self.n_under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        begun.is_ok().then(|| UnderWay(Arc::clone(self)))
    }

    /// A place for a request beside the connection's own.
    pub(crate) fn another_place(&self) -> Option<OwnedSemaphorePermit> {
        let free = Arc::clone(&self.places.room).try_acquire_owned().ok();
        free.or_else(|| self.places.make_room().map(|(_closed, place)| place))
    }

    /// Completes when it is to be given up.
    pub(crate) async fn is_told(&self) {
        match self.is_spare {
            true => tokio::time::sleep(SPARE_LIFE).await,
            false => self.told.notified().await,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.waits_since_us.store(self.0.places.now_us(), Ordering::Relaxed);
        // Whoever sees the number sees since when it is so.
        self.0.n_under_way.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let places = &self.connection.places;
        let place = places.list().open.remove(&self.id);
        places.metrics.open.dec();
        self.connection.gone.notify_one();
        drop(place);
    }
}
