//! The closed vocabulary of things that happen, shared by every crate and, as columns, by telemetry guests.
//!
//! One flat `Copy` record instead of an enum with fields: it travels through a fixed-size ring without allocation and
//! becomes columns without a match per field. The meaning of `a` and `b` depends on the kind (docs/events.md).

/// Microseconds on the host's monotonic clock, counted from process start plus one (0 means "none").
pub type Micros = u64;

/// What happened. Kinds are appended, never renumbered: telemetry guests see the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A request passed admission. `a`: prompt tokens, `b`: requested new tokens.
    Admitted = 0,
    /// A replica was chosen. `a`: duration of the router call in nanoseconds, `b`: 1 when the native policy decided.
    Routed = 1,
    /// The first token was emitted. `a`: time to first token in microseconds, `b`: time in the queue in microseconds.
    FirstToken = 2,
    /// Ended normally. `a`: end-to-end microseconds, `b`: generated tokens.
    Finished = 3,
    /// Ended by a host or device fault. `a`: end-to-end microseconds, `b`: generated tokens.
    Failed = 4,
    /// Ended by the client or a deadline. `a`: end-to-end microseconds, `b`: generated tokens.
    Cancelled = 5,
    /// Refused before any work. `a`: reason (0 queue, 1 kv, 2 quota, 3 deadline, 4 policy), `b`: retry-after in milliseconds.
    Rejected = 6,
    /// Put back in the queue; its blocks were freed. `a`: blocks freed, `b`: tokens to recompute.
    Preempted = 7,
    /// One engine step. `a`: duration in microseconds, `b`: tokens computed.
    Step = 8,
    /// A guest misbehaved. `a`: kind (0 timeout, 1 trap, 2 memory, 3 bad answer, 4 link), `b`: call duration in microseconds.
    PolicyFault = 9,
    /// A slot's policy changed. `a`: new generation, `b`: publish duration in nanoseconds.
    Swap = 10,
    /// A device changed state. `a`: device index, `b`: state (0 up, 1 degraded, 2 down).
    Device = 11,
}

impl EventKind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 12] = [
        Self::Admitted,
        Self::Routed,
        Self::FirstToken,
        Self::Finished,
        Self::Failed,
        Self::Cancelled,
        Self::Rejected,
        Self::Preempted,
        Self::Step,
        Self::PolicyFault,
        Self::Swap,
        Self::Device,
    ];

    /// The name by which a guest's manifest asks for this kind, as in `event.first-token`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Routed => "routed",
            Self::FirstToken => "first-token",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Rejected => "rejected",
            Self::Preempted => "preempted",
            Self::Step => "step",
            Self::PolicyFault => "policy-fault",
            Self::Swap => "swap",
            Self::Device => "device",
        }
    }
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: Micros,
    /// What.
    pub kind: EventKind,
    /// Request id, 0 where no request is concerned.
    pub request: u64,
    /// Replica id, `u32::MAX` where none is concerned.
    pub replica: u32,
    /// Generation of the policy that decided, 0 for native.
    pub generation: u64,
    /// Interned tenant ([`crate::Names`]), 0 for none.
    pub tenant: u32,
    /// First number; see the kind.
    pub a: u64,
    /// Second number; see the kind.
    pub b: u64,
    /// Interned variant, 0 for none.
    pub variant: u32,
    /// 0 critical to 3 low.
    pub priority: u8,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u32,
    /// Interned variant to which the weights of its alias assigned the request, 0 for none. In `Admitted` and `Rejected` only;
    /// rollouts between variants read it, guests do not.
    pub assigned: u32,
    /// Hash of what stays at that variant: a tenant, a session or a request.
    pub unit: u64,
}

impl Event {
    /// An event of `kind` at `at` that concerns no request, replica or tenant yet; fill the rest by field update.
    #[must_use]
    pub fn new(at: Micros, kind: EventKind) -> Self {
        Self {
            at,
            kind,
            request: 0,
            replica: u32::MAX,
            generation: 0,
            tenant: 0,
            a: 0,
            b: 0,
            variant: 0,
            priority: 2,
            prompt_tokens: 0,
            cached_tokens: 0,
            assigned: 0,
            unit: 0,
        }
    }
}
