//! Bounded admission: how many requests may be inside the host, how many prompt tokens may wait for computation, and what
//! the admission policy says about whoever passes these bounds.
//!
//! Two counters and no queue: what does not fit is refused at once (429), because a request that waits outside the
//! scheduler is one that no policy can see, order or drop. A permit is held until the last byte of the response is sent.
//! What each tenant has inside is counted only while there is a policy to tell.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pointsman_sched::admit::{AdmitPolicy, AdmitRequest, Ending, Judged, Load, Outcome, Verdict};
use pointsman_sched::ids::Micros;
use tokio::sync::Notify;

use crate::error::ApiError;
use crate::ports::Lease;
use crate::registry::Known;
use crate::usage::Bill;

/// What may be inside at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) requests: u32,
    /// Prompt tokens that are still to be computed.
    pub(crate) queued_tokens: u32,
    /// For what answers say of their prompts.
    pub(crate) scores_mib: u32,
}

/// The bounds and what is inside them.
#[derive(Debug)]
pub(crate) struct Admission {
    bounds: Bounds,
    requests: AtomicU32,
    queued_tokens: AtomicU32,
    scores_kib: AtomicU32,
    draining: AtomicBool,
    left: Notify,
    policy: Arc<dyn AdmitPolicy>,
    /// By number; as many as have requests inside.
    tenants: Mutex<HashMap<u32, TenantLoad>>,
}

/// What a tenant has inside.
#[derive(Clone, Copy, Debug, Default)]
struct TenantLoad {
    requests: u32,
    queued_tokens: u64,
}

/// What becomes of a request that was let in while there was a policy.
#[derive(Debug)]
struct Ticket {
    ending: Ending,
    /// Whether the policy itself accepted it, or its shadow was asked: then they hear of its ending.
    settles: bool,
}

/// One request's place inside the host.
#[derive(Debug)]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    /// Prompt tokens that are still to be computed.
    tokens: u32,
    /// For what is said of its prompts.
    scores_kib: u32,
    ticket: Option<Ticket>,
    /// Where it is charged; none for what is nobody's.
    bill: Option<Bill>,
    /// Keeps its model where it is, if that might go.
    leases: Vec<Lease>,
    /// Of one that has waited for its model, until it is in flight.
    known: Option<Known>,
}

// === impl Admission ===

impl Admission {
    pub(crate) fn new(bounds: Bounds, policy: Arc<dyn AdmitPolicy>) -> Self {
        Self {
            policy,
            tenants: Mutex::default(),
            bounds,
            scores_kib: AtomicU32::new(0),
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
        if !add_within(&self.requests, 1, self.bounds.requests) {
            let what = format!("{} requests are in flight", self.bounds.requests);
            return Err(ApiError::Saturated { what });
        }
        let admission = Arc::clone(self);
        let leases = Vec::new();
        let permit = Permit { admission, tokens: 0, scores_kib: 0, ticket: None, bill: None, leases, known: None };
        // A drain that began in between must not miss this request: it either sees the count or is seen here.
        if self.is_draining() { Err(ApiError::Draining) } else { Ok(permit) }
    }

    /// Requests inside.
    pub(crate) fn in_flight(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Whether there is no policy to ask.
    pub(crate) fn is_native(&self) -> bool {
        self.policy.is_native()
    }

    /// Changes what a tenant has inside, and returns what it had.
    fn tenant(&self, number: u32, change: impl FnOnce(&mut TenantLoad)) -> TenantLoad {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let load = tenants.entry(number).or_default();
        let before = *load;
        change(load);
        if load.requests == 0 {
            tenants.remove(&number);
        }
        before
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
        let limit = self.admission.bounds.queued_tokens;
        if !add_within(&self.admission.queued_tokens, tokens, limit.max(tokens)) {
            let waiting = self.admission.queued_tokens.load(Ordering::Relaxed);
            let what = format!("{waiting} of {limit} prompt tokens wait and this request has {tokens}");
            return Err(ApiError::Saturated { what });
        }
        self.tokens += tokens;
        if let Some(Ticket { ending, .. }) = &self.ticket {
            self.admission.tenant(ending.tenant, |tenant| tenant.queued_tokens += u64::from(tokens));
        }
        Ok(())
    }

    /// Takes room for what is said of its prompts. What is larger than all the room is the client's to change.
    pub(crate) fn hold_scores(&mut self, bytes: u64) -> Result<(), ApiError> {
        let (admission, kib) = (&self.admission, u32::try_from(bytes.div_ceil(1 << 10)).unwrap_or(u32::MAX));
        let (limit_mib, asked_mib) = (admission.bounds.scores_mib, kib.div_ceil(1 << 10));
        let limit_kib = limit_mib.saturating_mul(1 << 10);
        if kib > limit_kib {
            let problem = format!(
                "what is to be said of the prompts takes about {asked_mib} MiB, and all answers together have \
                 {limit_mib} (server.prompt_scores_mib); send fewer prompts in a request, or ask for fewer \
                 `logprobs`, `prompt_logprobs` or choices"
            );
            return Err(ApiError::invalid("logprobs", problem));
        }
        if !add_within(&admission.scores_kib, kib, limit_kib) {
            let held_mib = admission.scores_kib.load(Ordering::Relaxed) >> 10;
            let what = format!(
                "other answers hold {held_mib} of {limit_mib} MiB for what they say of their prompts, and this one needs \
                 about {asked_mib}"
            );
            return Err(ApiError::Saturated { what });
        }
        self.scores_kib += kib;
        Ok(())
    }

    /// Says where the request is charged.
    pub(crate) fn bill(&mut self, bill: Bill) {
        self.bill = Some(bill);
    }

    /// The place by which it is known before it is in flight, taken where it has none.
    pub(crate) fn known_by(&mut self, take: impl FnOnce() -> Result<Known, ApiError>) -> Result<&Known, ApiError> {
        match &mut self.known {
            Some(known) => Ok(known),
            known => Ok(known.insert(take()?)),
        }
    }

    pub(crate) fn take_known(&mut self) -> Option<Known> {
        self.known.take()
    }

    /// Whether it has been cancelled by its id since it waited for its model.
    pub(crate) fn check_cancelled(&self) -> Result<(), ApiError> {
        match self.known.as_ref().is_some_and(Known::is_cancelled) {
            true => Err(ApiError::Cancelled),
            false => Ok(()),
        }
    }

    /// Keeps a model for as long as the request is inside.
    pub(crate) fn keep(&mut self, lease: Lease) {
        self.leases.push(lease);
    }

    /// Takes the tokens that the request may use from those of its API key.
    pub(crate) fn charge(&mut self, prompt_tokens: u32, new_tokens: u32, now: Micros) -> Result<(), ApiError> {
        self.bill.as_mut().map_or(Ok(()), |bill| bill.charge(prompt_tokens, new_tokens, now))
    }

    /// Asks the policy about a request that has its room. Unless it is refused, what it carries is counted from now on.
    pub(crate) fn ask(&mut self, now: Micros, request: &AdmitRequest<'_>) -> (Load, Judged) {
        let admission = &self.admission;
        let tenant = admission.tenant(request.tenant_id, |_| {});
        let load = Load {
            in_flight: admission.in_flight().saturating_sub(1),
            in_flight_limit: admission.bounds.requests,
            queued_tokens: admission.queued_tokens.load(Ordering::Relaxed).saturating_sub(self.tokens).into(),
            queued_tokens_limit: admission.bounds.queued_tokens.into(),
            tenant_in_flight: tenant.requests,
            tenant_queued_tokens: tenant.queued_tokens,
        };
        let judged = admission.policy.admit(now, request, &load);
        if matches!(judged.verdict, Some(Verdict::Reject(_))) {
            return (load, judged);
        }
        admission.tenant(request.tenant_id, |tenant| {
            tenant.requests += 1;
            tenant.queued_tokens += u64::from(self.tokens);
        });
        let accepted = judged.accepted(now);
        let ending = Ending {
            id: request.id,
            tenant: request.tenant_id,
            // Whatever refuses it before it is under way.
            outcome: Outcome::Rejected,
            prompt_tokens: request.prompt_tokens,
            cached_tokens: 0,
            generated_tokens: 0,
            max_new_tokens: request.max_new_tokens,
            accepted: accepted.unwrap_or_default(),
            shadow: judged.shadow,
        };
        self.ticket = Some(Ticket { ending, settles: accepted.is_some() || judged.shadow != 0 });
        (load, judged)
    }

    /// Notes what the request came to.
    pub(crate) fn ended(&mut self, outcome: Outcome, cached_tokens: u32, generated_tokens: u32) {
        if let Some(bill) = &mut self.bill {
            bill.ended(outcome, cached_tokens, generated_tokens);
        }
        if let Some(Ticket { ending, .. }) = &mut self.ticket {
            *ending = Ending { outcome, cached_tokens, generated_tokens, ..*ending };
        }
    }

    /// Gives the room of computed prompt tokens back.
    pub(crate) fn computed(&mut self, tokens: u32) {
        let tokens = tokens.min(self.tokens);
        self.tokens -= tokens;
        self.admission.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
        if let Some(Ticket { ending, .. }) = self.ticket.as_ref().filter(|_| tokens > 0) {
            self.admission.tenant(ending.tenant, |tenant| tenant.queued_tokens -= u64::from(tokens));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.computed(self.tokens);
        self.admission.scores_kib.fetch_sub(self.scores_kib, Ordering::SeqCst);
        if let Some(Ticket { ending, settles }) = self.ticket.take() {
            self.admission.tenant(ending.tenant, |tenant| tenant.requests -= 1);
            if settles {
                self.admission.policy.ended(ending);
            }
        }
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
    use pointsman_sched::admit::{Accepted, AdmitAll};
    use pointsman_sched::ids::{Priority, RequestId};
    use pointsman_sched::route::RequestNumbers;

    use super::*;
    use crate::fakes::FakeDoor;

    fn request(id: u64, tenant_id: u32) -> AdmitRequest<'static> {
        AdmitRequest {
            id: RequestId(id),
            model: "demo",
            tenant: "acme",
            tenant_id,
            session: 0,
            priority: Priority::Normal,
            highest: Priority::High,
            prompt_tokens: 30,
            max_new_tokens: 8,
            arrived: 1,
            deadline: 0,
            seed: 0,
            numbers: RequestNumbers::default(),
            attributes: &[],
        }
    }

    fn bounds(requests: u32, queued_tokens: u32) -> Bounds {
        Bounds { requests, queued_tokens, scores_mib: 3 }
    }

    #[test]
    fn a_policy_sees_what_a_tenant_carries_and_hears_what_it_accepted() {
        let door = Arc::new(FakeDoor::default());
        let admission = Arc::new(Admission::new(bounds(8, 1_000), Arc::clone(&door) as _));
        let enter = |id: u64, tenant: u32, verdict: Option<Verdict>| {
            let asked = verdict.is_some();
            *door.verdict.lock().expect("unpoisoned") = verdict;
            let mut permit = admission.enter().expect("room");
            permit.queue_tokens(30).expect("room");
            let (load, judged) = permit.ask(1, &request(id, tenant));
            assert_eq!((judged.decided_by.generation, judged.verdict.is_some()), (9, asked));
            let tenant = (load.tenant_in_flight, load.tenant_queued_tokens);
            (permit, (load.in_flight, load.queued_tokens), tenant)
        };
        let (mut first, all, tenant) = enter(1, 5, Some(Verdict::Accept));
        assert_eq!((all, tenant), ((0, 0), (0, 0)));
        let (second, all, tenant) = enter(2, 5, Some(Verdict::AcceptAs(Priority::Low)));
        assert_eq!((all, tenant), ((1, 30), (1, 30)));
        first.computed(30);
        let (third, all, tenant) = enter(3, 5, None);
        assert_eq!((all, tenant), ((2, 30), (2, 30)), "the first one is computed");
        let rejection = pointsman_sched::route::Rejection {
            reason: pointsman_sched::route::Refusal::Quota,
            retry_after_ms: 5,
            message: "no".into(),
        };
        let (fourth, _, tenant) = enter(4, 6, Some(Verdict::Reject(rejection)));
        assert_eq!(tenant, (0, 0));
        door.shadow.store(7, Ordering::Relaxed);
        let (fifth, ..) = enter(5, 6, None);
        first.ended(Outcome::Finished, 16, 4);
        drop((first, second, third, fourth, fifth));
        let endings = door.endings.lock().expect("unpoisoned");
        let told: Vec<_> = endings.iter().map(|e| (e.id.0, e.outcome, e.cached_tokens, e.generated_tokens)).collect();
        let expect = [(1, Outcome::Finished, 16, 4), (2, Outcome::Rejected, 0, 0), (5, Outcome::Rejected, 0, 0)];
        assert_eq!(told, expect, "only those that it accepted, or of which its shadow was asked");
        let by = Accepted { generation: 9, state: 4, at: 1 };
        assert_eq!(endings[..2].iter().map(|e| (e.accepted, e.shadow)).collect::<Vec<_>>(), [(by, 0), (by, 0)]);
        assert_eq!((endings[2].accepted, endings[2].shadow), (Accepted::default(), 7));
        assert!(admission.tenants.lock().expect("unpoisoned").is_empty());
    }

    #[test]
    fn scores_are_bounded_and_come_back() {
        let admission = Arc::new(Admission::new(bounds(4, 100), Arc::new(AdmitAll)));
        let [mut first, mut second] = [(); 2].map(|()| admission.enter().expect("room"));
        let told = |error: ApiError| (matches!(error, ApiError::Saturated { .. }), error.to_string());
        let (may_come, why) = told(first.hold_scores((3 << 20) + 1).expect_err("more than there is"));
        assert!(!may_come && why.contains("about 4 MiB") && why.contains("have 3 (server.prompt"), "{why}");
        assert!(!told(first.hold_scores(u64::MAX).expect_err("more than can be counted")).0);
        first.hold_scores(2 << 20).expect("room");
        second.hold_scores(1 << 20).expect("all of it");
        let (may_come, why) = told(second.hold_scores(1).expect_err("full"));
        assert!(may_come && why.contains("hold 3 of 3 MiB") && why.contains("needs about 1"), "{why}");
        drop(first);
        second.hold_scores(2 << 20).expect("room again");
        drop(second);
        assert_eq!(admission.scores_kib.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn permits_are_bounded_and_come_back() {
        let admission = Arc::new(Admission::new(bounds(2, 100), Arc::new(AdmitAll)));
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
        let admission = Arc::new(Admission::new(bounds(2, 100), Arc::new(AdmitAll)));
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
