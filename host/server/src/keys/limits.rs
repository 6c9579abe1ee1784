//! What a key's requests may use: at once, and per minute. And the headers that tell its holder what is left.
//!
//! A limit per minute is a bucket that fills at an even pace, kept as one number: the time at which it is full again (the
//! virtual scheduling form of the generic cell rate algorithm, ITU-T I.371). A request takes the most that it may use before it
//! is let in and gives back at its end what it did not use: over time no more is used than has flowed in. At once it may be
//! more than the limit, after requests that ran long and used little of what they took. The crate `governor` has such buckets,
//! but nothing can be given back to them, and their clock is not an argument.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::header::{HeaderMap, HeaderName, HeaderValue};
use pointsman_sched::ids::Micros;

use super::Holder;
use crate::error::ApiError;

/// In what a bucket counts: finer than the clock, so that rounding a cost favours nobody.
type Nanos = u128;

const MINUTE: Nanos = 60_000_000_000;

/// What the requests of a key may use; `None` is no limit but those of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in flight.
    pub concurrent: Option<NonZeroU32>,
    /// Requests, and as many at once.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and of what is generated, and as many at once.
    pub tokens_per_minute: Option<NonZeroU32>,
}

/// What the requests of a key use.
#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<Used>);

#[derive(Debug, Default)]
struct Used {
    in_flight: u32,
    requests: Bucket,
    tokens: Bucket,
}

/// Allowance that comes back evenly, as much in a minute as fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bucket {
    /// Past or present: it is full.
    full_at: Nanos,
}

/// One request's share of its key's limits, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    holder: Arc<Holder>,
    /// Taken from the bucket.
    taken: u64,
    /// What it has cost as far as is known.
    spent: u64,
}

fn nanos(at: Micros) -> Nanos {
    Nanos::from(at) * 1_000
}

/// What `n` cost in a bucket of `limit`.
fn cost(n: u64, limit: NonZeroU32) -> Nanos {
    Nanos::from(n) * MINUTE / Nanos::from(limit.get())
}

// === impl Bucket ===

impl Bucket {
    /// Takes `n`, which fit into it; the microseconds to wait where there are fewer.
    fn take(&mut self, n: u32, limit: NonZeroU32, now: Micros) -> Result<(), Micros> {
        let full_at = self.full_at.max(nanos(now)) + cost(n.into(), limit);
        let wait = full_at.saturating_sub(nanos(now) + MINUTE);
        if wait > 0 {
            return Err(Micros::try_from(wait.div_ceil(1_000)).unwrap_or(Micros::MAX));
        }
        self.full_at = full_at;
        Ok(())
    }

    /// Makes what was taken what it should have been.
    fn settle(&mut self, taken: u64, spent: u64, limit: NonZeroU32) {
        self.full_at = (self.full_at + cost(spent, limit)).saturating_sub(cost(taken, limit));
    }

    /// What is left, and the milliseconds until it is full.
    fn left(&self, limit: NonZeroU32, now: Micros) -> (u32, u64) {
        let missing = self.full_at.saturating_sub(nanos(now));
        let used = (missing * Nanos::from(limit.get())).div_ceil(MINUTE);
        let used = u32::try_from(used).unwrap_or(u32::MAX);
        (limit.get().saturating_sub(used), u64::try_from(missing.div_ceil(1_000_000)).unwrap_or(u64::MAX))
    }
}

// === impl Meter ===

impl Meter {
    fn used(&self) -> MutexGuard<'_, Used> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is left, under the names that OpenAI's clients know.
    pub(super) fn headers(&self, limits: &KeyLimits, now: Micros, headers: &mut HeaderMap) {
        let (requests, tokens) = {
            let used = self.used();
            (used.requests, used.tokens)
        };
        let mut write = |names: [&'static str; 3], bucket: Bucket, limit: Option<NonZeroU32>| {
            let Some(limit) = limit else { return };
            let (left, reset_ms) = bucket.left(limit, now);
            let values = [limit.get().to_string(), left.to_string(), duration(reset_ms)];
            for (name, value) in names.into_iter().zip(values) {
                headers.extend(HeaderValue::try_from(value).ok().map(|value| (HeaderName::from_static(name), value)));
            }
        };
        write(
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
            requests,
            limits.requests_per_minute,
        );
        write(
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
            tokens,
            limits.tokens_per_minute,
        );
    }
}

/// As OpenAI writes it: `850ms`, `12s`, `1m3s`.
fn duration(ms: u64) -> String {
    match ms {
        0 => "0s".to_owned(),
        1..1_000 => format!("{ms}ms"),
        1_000..=59_000 => format!("{}s", ms.div_ceil(1_000)),
        _ => {
            let seconds = ms.div_ceil(1_000);
            format!("{}m{}s", seconds / 60, seconds % 60)
        }
    }
}

// === impl Holder ===

impl Holder {
    /// Lets a request in; what it holds is free again when the place is dropped.
    pub(crate) fn enter(self: &Arc<Self>, now: Micros) -> Result<Place, ApiError> {
        let limits = &self.key.limits;
        let name = &self.key.name;
        let mut used = self.meter.used();
        if let Some(most) = limits.concurrent.filter(|most| used.in_flight >= most.get()) {
            let what =
                format!("the API key `{name}` has {most} requests in flight, the most at once: wait for one to end");
            return Err(ApiError::Quota { what, wait_us: 0 });
        }
        if let Some(limit) = limits.requests_per_minute {
            used.requests.take(1, limit, now).map_err(|wait_us| {
                let what = format!("the API key `{name}` has sent its {limit} requests per minute: wait for the next");
                ApiError::Quota { what, wait_us }
            })?;
        }
        used.in_flight += 1;
        Ok(Place { holder: Arc::clone(self), taken: 0, spent: 0 })
    }

    /// Whether half of what its requests may use is free.
    pub(crate) fn is_half_free(&self, now: Micros) -> bool {
        let KeyLimits { concurrent, requests_per_minute, tokens_per_minute } = self.key.limits;
        let half = |limit: NonZeroU32| limit.get().div_ceil(2);
        let used = self.meter.used();
        let has_half = |bucket: Bucket, limit: Option<NonZeroU32>| {
            limit.is_none_or(|limit| bucket.left(limit, now).0 >= half(limit))
        };
        concurrent.is_none_or(|most| used.in_flight < half(most))
            && has_half(used.requests, requests_per_minute)
            && has_half(used.tokens, tokens_per_minute)
    }
}

// === impl Place ===

impl Place {
    /// Takes what the request may use at most. One that may use more than a minute's tokens takes all of them: it is let in
    /// while nothing else has been used, and what it uses beyond is waited for by those after it.
    pub(crate) fn take(&mut self, prompt_tokens: u32, new_tokens: u32, now: Micros) -> Result<(), ApiError> {
        let Some(limit) = self.holder.key.limits.tokens_per_minute else { return Ok(()) };
        let wanted = prompt_tokens.saturating_add(new_tokens).min(limit.get());
        let mut used = self.holder.meter.used();
        used.tokens.take(wanted, limit, now).map_err(|wait_us| {
            let (left, _) = used.tokens.left(limit, now);
            let what = format!(
                "the API key `{}` has {left} of its {limit} tokens per minute left, and this request may use \
                 {prompt_tokens} and generate {new_tokens}: wait, or generate fewer",
                self.holder.key.name
            );
            ApiError::Quota { what, wait_us }
        })?;
        self.taken = wanted.into();
        Ok(())
    }

    /// Says what the request has used. What is not said to be used comes back.
    pub(crate) fn spent(&mut self, tokens: u64) {
        self.spent = tokens;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut used = self.holder.meter.used();
        used.in_flight -= 1;
        if let Some(limit) = self.holder.key.limits.tokens_per_minute {
            used.tokens.settle(self.taken, self.spent, limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Micros = 1_000_000;

    fn limit(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).expect("not 0")
    }

    #[test]
    fn a_bucket_gives_its_limit_at_once_and_then_at_an_even_pace() {
        for n in [1, 3, 7, 60, 600, 1_000_003] {
            let mut bucket = Bucket::default();
            let now = 5 * SECOND;
            assert_eq!(bucket.left(limit(n), now), (n, 0));
            for _ in 0..n.min(600) {
                assert_eq!(bucket.take(1, limit(n), now), Ok(()), "{n}");
            }
            let rest = n - n.min(600);
            assert_eq!(bucket.left(limit(n), now).0, rest, "{n}");
            assert_eq!(bucket.take(rest, limit(n), now), Ok(()), "{n}");
            let wait = bucket.take(1, limit(n), now).expect_err("empty");
            assert!(wait <= (60 * SECOND).div_ceil(n.into()), "{n}: {wait}");
            assert!(wait == 0 || bucket.take(1, limit(n), now + wait - 1).is_err(), "{n}");
            assert_eq!(bucket.take(1, limit(n), now + wait), Ok(()), "{n}");
        }
    }

    #[test]
    fn what_was_not_used_comes_back_and_what_was_used_beyond_is_owed() {
        let minute = limit(600);
        let mut bucket = Bucket::default();
        bucket.take(600, minute, 1).expect("full");
        bucket.settle(600, 50, minute);
        assert_eq!(bucket.left(minute, 1), (550, 5_000));
        bucket.settle(0, 650, minute);
        assert_eq!(bucket.left(minute, 1), (0, 70_000), "100 more than there were");
        assert_eq!(bucket.take(1, minute, 1), Err(10 * SECOND + SECOND / 10));
        let mut idle = Bucket::default();
        idle.take(10, minute, 1).expect("full");
        idle.settle(10, 0, minute);
        assert_eq!(idle.left(minute, 90 * SECOND), (600, 0), "never more than full");
    }

    #[test]
    fn no_more_is_used_over_time_than_has_flowed_in() {
        // Seeded: requests of random sizes that use a random part of what they take.
        let mut seed = 7_u64;
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let minute = limit(1_000);
        let (mut bucket, mut now, mut used) = (Bucket::default(), 1, 0);
        let mut open: Vec<(u64, u64)> = Vec::new();
        for _ in 0..20_000 {
            now += random(SECOND);
            let n = 1 + u32::try_from(random(1_000)).expect("small");
            if bucket.take(n, minute, now).is_ok() {
                open.push((n.into(), random(u64::from(n) + 1)));
            }
            if open.len() > 3 {
                let (taken, spent) = open.remove(usize::try_from(random(3)).expect("small"));
                bucket.settle(taken, spent, minute);
                used += spent;
            }
            let flowed = 1_000 + now / 60_000;
            assert!(used <= flowed, "{used} of {flowed} at {now}");
        }
        assert!(used > 1_000 + now / 60_000 / 2, "and not much less: {used} at {now}");
    }

    #[test]
    fn durations_are_written_as_clients_read_them() {
        for (ms, expect) in
            [(0, "0s"), (1, "1ms"), (999, "999ms"), (1_000, "1s"), (1_001, "2s"), (59_001, "1m0s"), (61_500, "1m2s")]
        {
            assert_eq!(duration(ms), expect);
        }
    }
}
