//! Identities and small words that every part of the host shares. Newtypes, because a request, a replica and a block are
//! all integers that would otherwise be mixed up without a word from the compiler.

pub use pointsman_telemetry::Micros;

/// Identity of a request for its whole life; unique within a process, never reused, never 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A variant of a model on a device, with its own scheduler and KV pool. Unique within a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub u32);

/// A page of the KV pool: `block_tokens` positions of every layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Urgency, highest first; columns carry it as 0 to 3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Priority {
    /// Before everything else.
    Critical = 0,
    /// Interactive traffic that someone waits for.
    High = 1,
    /// The default.
    #[default]
    Normal = 2,
    /// Batch work.
    Low = 3,
}
