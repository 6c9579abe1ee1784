//! Bounded admission: how many requests may be inside the host, and how many prompt tokens may wait for computation.
//!
//! Two counters and no queue: what does not fit is refused at once (429), because a request that waits outside the
//! scheduler is one that no policy can see, order or drop. A permit is held until the last byte of the response is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::error::ApiError;

/// The bounds and what is inside them.
#[derive(Debug)]
pub(crate) struct Admission {
    max_requests: u32,
    max_queued_tokens: u32,
    requests: AtomicU32,
    queued_tokens: AtomicU32,
    draining: AtomicBool,
    left: Notify,
}

/// One request's place inside the host.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    /// Prompt tokens that are still to be computed.
    tokens: u32,
}

// === impl Admission ===

impl Admission {
    pub(crate) fn new(max_requests: u32, max_queued_tokens: u32) -> Self {
        Self {
            max_requests,
            max_queued_tokens,
            requests: AtomicU32::new(0),
            queued_tokens: AtomicU32::new(0),
            draining: AtomicBool::new(false),
            left: Notify::new(),
        }
    }

    /// Lets a request in.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Permit, ApiError> {
        if self.is_draining() {
            return Err(ApiError::Draining);
        }
        if !add_within(&self.requests, 1, self.max_requests) {
            let what = format!("{} requests are in flight", self.max_requests);
            return Err(ApiError::Saturated { what });
        }
        let permit = Permit { admission: Arc::clone(self), tokens: 0 };
        // A drain that began in between must not miss this request: it either sees the count or is seen here.
        if self.is_draining() { Err(ApiError::Draining) } else { Ok(permit) }
    }

    /// Requests inside.
    pub(crate) fn in_flight(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Lets nobody in any more. There is no way back: a host that drains is about to stop.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Waits until nobody is inside.
    pub(crate) async fn empty(&self) {
        loop {
            let left = self.left.notified();
            if self.in_flight() == 0 {
                return;
            }
            left.await;
        }
    }
}

// === impl Permit ===

impl Permit {
    /// Takes room for prompt tokens. A single request larger than the whole bound is let in when nothing else waits.
    pub(crate) fn queue_tokens(&mut self, tokens: u32) -> Result<(), ApiError> {
        let limit = self.admission.max_queued_tokens;
        if !add_within(&self.admission.queued_tokens, tokens, limit.max(tokens)) {
            let waiting = self.admission.queued_tokens.load(Ordering::Relaxed);
            let what = format!("{waiting} of {limit} prompt tokens wait and this request has {tokens}");
            return Err(ApiError::Saturated { what });
        }
        self.tokens += tokens;
        Ok(())
    }

    /// Gives the room of computed prompt tokens back.
    pub(crate) fn computed(&mut self, tokens: u32) {
        let tokens = tokens.min(self.tokens);
        self.tokens -= tokens;
        self.admission.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.computed(self.tokens);
        self.admission.requests.fetch_sub(1, Ordering::SeqCst);
        self.admission.left.notify_waiters();
    }
}

/// Adds `n` unless the sum exceeds `limit`.
fn add_within(counter: &AtomicU32, n: u32, limit: u32) -> bool {
    let add = |value: u32| value.checked_add(n).filter(|sum| *sum <= limit);
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_bounded_and_come_back() {
        let admission = Arc::new(Admission::new(2, 100));
        let mut first = admission.enter().expect("room");
        let mut second = admission.enter().expect("room");
        assert!(matches!(admission.enter(), Err(ApiError::Saturated { .. })));
        first.queue_tokens(70).expect("room");
        let refused = second.queue_tokens(40).expect_err("full").to_string();
        assert!(refused.contains("70 of 100 prompt tokens wait and this request has 40"), "{refused}");
        first.computed(70);
        second.queue_tokens(40).expect("room again");
        drop(second);
        first.queue_tokens(1_000).expect("alone, a request may exceed the bound");
        drop(first);
        assert_eq!((admission.in_flight(), admission.queued_tokens.load(Ordering::Relaxed)), (0, 0));
    }

    #[tokio::test]
    async fn a_drain_ends_when_the_last_one_leaves() {
        let admission = Arc::new(Admission::new(2, 100));
        let permit = admission.enter().expect("room");
        admission.drain();
        assert!(matches!(admission.enter(), Err(ApiError::Draining)));
        let mut empty = std::pin::pin!(admission.empty());
        tokio::select! {
            biased;
            () = &mut empty => panic!("one is still inside"),
            () = std::future::ready(()) => {}
        }
        drop(permit);
        empty.await;
    }
}
