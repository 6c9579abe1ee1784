//! The seam of admission: what a policy at the door is asked about a request, what it may answer, and what it is told when
//! the request has ended.
//!
//! Here and not in the server, because the guest behind it lives in a crate that the server does not know. The host's own
//! limits come first; a policy can only refuse more, or change the priority within what the caller may claim.

use std::fmt::Debug;

use crate::ids::{Micros, Priority, RequestId};
use crate::route::{DecidedBy, Fallback, Rejection, RequestNumbers};

/// One request that wants to enter.
#[derive(Clone, Copy, Debug)]
pub struct AdmitRequest<'a> {
    /// Of its first engine request.
    pub id: RequestId,
    /// The model or alias that the client named.
    pub model: &'a str,
    /// From the API key, `default` without keys.
    pub tenant: &'a str,
    /// The same as a number.
    pub tenant_id: u32,
    /// Hash of the session id, 0 without one.
    pub session: u64,
    /// What it asks for.
    pub priority: Priority,
    /// The highest that it may be given.
    pub highest: Priority,
    /// Tokens of all its prompts.
    pub prompt_tokens: u32,
    /// Most tokens that all its choices may generate.
    pub max_new_tokens: u32,
    /// When the host had read it.
    pub arrived: Micros,
    /// When the client stops caring, 0 for never.
    pub deadline: Micros,
    /// Random bits for this decision.
    pub seed: u64,
    /// Numbers that a policy can ask for, as for routers.
    pub numbers: RequestNumbers,
    /// Texts by name, as for routers.
    pub attributes: &'a [(&'a str, &'a str)],
}

/// What the host carries, the request itself not included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests inside.
    pub in_flight: u32,
    /// Most of them.
    pub in_flight_limit: u32,
    /// Prompt tokens of those that have no first token yet.
    pub queued_tokens: u64,
    /// Most of them.
    pub queued_tokens_limit: u64,
    /// Requests of the tenant inside, those from before the policy came not counted.
    pub tenant_in_flight: u32,
    /// Their queued tokens.
    pub tenant_queued_tokens: u64,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It enters as it is.
    Accept,
    /// It enters with this priority, which its caller may claim.
    AcceptAs(Priority),
    /// It does not enter.
    Reject(Rejection),
}

/// A verdict with its author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The answer, already checked; `None` when no policy answered, and the request enters as it is.
    pub verdict: Option<Verdict>,
    /// Who was asked.
    pub decided_by: DecidedBy,
    /// Number of the host-state in which the policy may have counted the request; the policy's own business.
    pub state: u64,
    /// Why no policy answered; `None` when it did, or the slot has none.
    pub fallback: Option<Fallback>,
    /// Generation of the shadow that is asked too, and so is to be told of the end; 0 for none.
    pub shadow: u64,
}

/// Which policy accepted a request, and when: what became of it is told to whoever carries on its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Generation of the policy.
    pub generation: u64,
    /// As in [`Judged::state`].
    pub state: u64,
    /// When it was asked.
    pub at: Micros,
}

/// How an accepted request ended; numbers as guests see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// With all that it asked for.
    Finished = 0,
    /// By a fault of the host.
    Failed = 1,
    /// By its client or its deadline.
    Cancelled = 2,
    /// Refused after all: no room, or another policy.
    Rejected = 3,
}

/// What an accepted request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// As in the request.
    pub id: RequestId,
    /// Number of the tenant.
    pub tenant: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Tokens of all its prompts.
    pub prompt_tokens: u32,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub generated_tokens: u32,
    /// As in the request.
    pub max_new_tokens: u32,
    /// Who let it in; the default where no policy did.
    pub accepted: Accepted,
    /// As in [`Judged::shadow`].
    pub shadow: u64,
}

/// Lets requests in. Called on any worker thread, several at once; must not block.
pub trait AdmitPolicy: Send + Sync + Debug {
    /// Whether there is nobody to ask, no shadow either: nothing needs to be gathered.
    fn is_native(&self) -> bool;

    /// Answers for one request. A guest's bad answer never leaves this call: it becomes no verdict with `fallback` set.
    fn admit(&self, now: Micros, request: &AdmitRequest<'_>, load: &Load) -> Judged;

    /// A request that a policy accepted, or that a shadow was asked about, has ended. Never blocks; the policy hears of it in a batch, later.
    fn ended(&self, ending: Ending);
}

/// The host's own policy: who passes its limits is in.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl AdmitPolicy for AdmitAll {
    fn is_native(&self) -> bool {
        true
    }

    fn admit(&self, _now: Micros, _request: &AdmitRequest<'_>, _load: &Load) -> Judged {
        Judged::native(DecidedBy::native(0))
    }

    fn ended(&self, _ending: Ending) {}
}

impl Judged {
    /// Nobody was asked.
    #[must_use]
    pub fn native(decided_by: DecidedBy) -> Self {
        Self { verdict: None, decided_by, state: 0, fallback: None, shadow: 0 }
    }

    /// The author of a verdict that lets a request in, for its ending; `None` where no policy let it in.
    #[must_use]
    pub fn accepted(&self, at: Micros) -> Option<Accepted> {
        let enters = matches!(self.verdict, Some(Verdict::Accept | Verdict::AcceptAs(_)));
        enters.then_some(Accepted { generation: self.decided_by.generation, state: self.state, at })
    }
}
