//! The one place where the host reads clocks and randomness. Everything else gets them as arguments.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use pointsman_sched::ids::Micros;

/// A duration for metrics and people.
#[must_use]
pub(crate) fn seconds(us: Micros) -> f64 {
    us as f64 * 1e-6
}

/// Monotonic microseconds since its creation, wall-clock seconds and random bits.
#[derive(Debug)]
pub(crate) struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock that starts at 1 now (0 means "none" everywhere).
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Microseconds since the start, plus one.
    #[must_use]
    pub(crate) fn micros(&self) -> Micros {
        Micros::try_from(self.start.elapsed().as_micros()).unwrap_or(Micros::MAX - 1) + 1
    }

    /// Nanoseconds since the start, for measurements.
    #[must_use]
    pub(crate) fn nanos(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Milliseconds since 1970.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn unix_millis(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

impl pointsman_server::ports::Clock for SystemClock {
    fn now(&self) -> Micros {
        self.micros()
    }

    fn unix_seconds(&self) -> u64 {
        self.unix_millis() / 1_000
    }

    fn random(&self) -> u64 {
        // Of the thread's generator: the system's costs a call, and a request takes four. Nothing secret is made from these.
        rand::random()
    }
}
