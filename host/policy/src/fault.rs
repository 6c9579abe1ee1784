//! What a guest did wrong, as a value. A fault never travels as a panic and never reaches a client: the native policy
//! answers, and the report goes to metrics, events, the log and whoever listens.
//!
//! The kinds are those of `pointsman_policy_faults_total`; the text is for the guest's author, so it keeps the wasm
//! backtrace, cut to a bound because a guest chooses how deep it traps.

use std::sync::Arc;

use pointsman_telemetry::Micros;
use wasmtime::{Trap, WasmBacktrace};

use crate::host::MemoryLimit;

/// Longest text of a fault, in bytes.
const MAX_MESSAGE: usize = 2_048;
/// Frames of a backtrace, and the longest name of one, in bytes.
const MAX_FRAMES: usize = 8;
const MAX_FRAME: usize = 160;

/// What kind of fault; numbers as in the `policy-fault` event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FaultKind {
    /// Used more CPU time than its hard budget.
    Timeout = 0,
    /// Trapped: unreachable, division by zero, stack overflow, out of bounds, ...
    Trap = 1,
    /// Asked for more memory or table entries than its cap.
    Memory = 2,
    /// Answered something that is no answer: an id that does not exist, too long a list, invalid text.
    BadAnswer = 3,
    /// Does not fit the host: imports, exports or instantiation.
    Link = 4,
}

/// Which call it happened in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// Instantiation: start functions and initial memory.
    Instantiate,
    /// `lifecycle.init`.
    Init,
    /// `admission.admit`.
    Admit,
    /// `admission.settle`.
    Settle,
    /// `router.route`.
    Route,
    /// `scheduler.resync`.
    Resync,
    /// `scheduler.step`.
    Step,
    /// `telemetry.on-events`.
    OnEvents,
    /// `kv-retention.rank`.
    Rank,
    /// `sampler.start`.
    Start,
    /// `sampler.next`.
    Next,
    /// `sampler.ended`.
    Ended,
    /// `handover.take-snapshot`.
    TakeSnapshot,
    /// `handover.restore`.
    Restore,
}

/// A fault without its context.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", .kind.as_str())]
pub struct Fault {
    /// What kind.
    pub kind: FaultKind,
    /// In words, for the guest's author.
    pub message: String,
}

/// A fault with its context: where, whose, when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// The slot.
    pub slot: Arc<str>,
    /// The revision that misbehaved.
    pub revision: Arc<str>,
    /// Its generation.
    pub generation: u64,
    /// The call.
    pub call: Call,
    /// What kind.
    pub kind: FaultKind,
    /// In words, for the guest's author.
    pub message: String,
    /// When, on the host's clock.
    pub at: Micros,
    /// How long the call had taken.
    pub took_us: u64,
}

/// Told of every fault, on the thread that met it: it must be quick and must not block.
pub type FaultListener = Arc<dyn Fn(&FaultReport) + Send + Sync>;

// === impl FaultKind ===

impl FaultKind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 5] = [Self::Timeout, Self::Trap, Self::Memory, Self::BadAnswer, Self::Link];

    /// The word used in metrics and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Trap => "trap",
            Self::Memory => "memory",
            Self::BadAnswer => "bad-answer",
            Self::Link => "link",
        }
    }
}

// === impl Call ===

impl Call {
    /// The word used in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Instantiate => "instantiate",
            Self::Init => "init",
            Self::Admit => "admit",
            Self::Settle => "settle",
            Self::Route => "route",
            Self::Resync => "resync",
            Self::Step => "step",
            Self::OnEvents => "on-events",
            Self::Rank => "rank",
            Self::Start => "start",
            Self::Next => "next",
            Self::Ended => "ended",
            Self::TakeSnapshot => "take-snapshot",
            Self::Restore => "restore",
        }
    }
}

// === impl Fault ===

impl Fault {
    /// A fault found by the host's own checks.
    pub(crate) fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        truncate(&mut message, MAX_MESSAGE);
        Self { kind, message }
    }

    /// What an error of a call amounts to. Whatever is neither a trap nor our own limiter comes from lifting the answer:
    /// a bad pointer, invalid UTF-8, an unknown case, or more data than the host takes.
    pub(crate) fn of_call(error: &wasmtime::Error) -> Self {
        let kind = if error.is::<MemoryLimit>() {
            FaultKind::Memory
        } else {
            match error.downcast_ref::<Trap>() {
                Some(Trap::Interrupt) => FaultKind::Timeout,
                Some(_) => FaultKind::Trap,
                None => FaultKind::BadAnswer,
            }
        };
        Self::new(kind, describe(error))
    }

    /// The same for instantiation, where an error that is not a trap means that guest and host do not fit.
    pub(crate) fn of_instantiation(error: &wasmtime::Error) -> Self {
        let fault = Self::of_call(error);
        if fault.kind == FaultKind::BadAnswer { Self { kind: FaultKind::Link, ..fault } } else { fault }
    }
}

/// The cause first, then where: the innermost frames of the guest, one a line. wasmtime demangles names in the text of a
/// backtrace only, so that text is taken apart: an address, ` - `, and a name with the hashes of its crates in brackets.
fn describe(error: &wasmtime::Error) -> String {
    let mut text = error.root_cause().to_string();
    let backtrace = error.downcast_ref::<WasmBacktrace>().map(WasmBacktrace::to_string).unwrap_or_default();
    for name in backtrace.lines().filter_map(|line| line.split_once(" - ")).map(|(_, name)| name).take(MAX_FRAMES) {
        let mut name = without_hashes(name);
        truncate(&mut name, MAX_FRAME);
        text.push_str("\n  in ");
        text.push_str(&name);
    }
    text
}

/// `name` without its `[0123456789abcdef]`.
fn without_hashes(name: &str) -> String {
    let mut parts = name.split('[');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(']') {
            Some((hash, rest)) if hash.bytes().all(|b| b.is_ascii_hexdigit()) => text.push_str(rest),
            _ => {
                text.push('[');
                text.push_str(part);
            }
        }
    }
    text
}

/// Cuts `text` to at most `limit` bytes, at a character.
pub(crate) fn truncate(text: &mut String, limit: usize) {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_event_and_words_those_of_the_metric() {
        for (number, kind) in FaultKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number);
        }
        let words: Vec<_> = FaultKind::ALL.iter().map(|k| k.as_str()).collect();
        assert_eq!(words, ["timeout", "trap", "memory", "bad-answer", "link"]);
    }

    #[test]
    fn errors_become_kinds() {
        for (error, kind) in [
            (wasmtime::Error::from(Trap::Interrupt), FaultKind::Timeout),
            (wasmtime::Error::from(Trap::StackOverflow), FaultKind::Trap),
            (wasmtime::Error::from(MemoryLimit { wanted: 2, limit: 1 }), FaultKind::Memory),
            (wasmtime::Error::msg("invalid utf-8"), FaultKind::BadAnswer),
        ] {
            assert_eq!(Fault::of_call(&error).kind, kind, "{error:?}");
        }
        assert_eq!(Fault::of_instantiation(&wasmtime::Error::msg("x")).kind, FaultKind::Link);
    }

    #[test]
    fn names_are_shown_without_hashes() {
        for (name, expect) in [
            ("m.wasm!a[d6ecabd32e751d41]::b", "m.wasm!a::b"),
            ("<a[0f]::T as b[1e]::U>::f", "<a::T as b::U>::f"),
            ("f::<[u8; 4]>", "f::<[u8; 4]>"),
            ("f", "f"),
        ] {
            assert_eq!(without_hashes(name), expect);
        }
    }

    #[test]
    fn texts_are_cut_at_a_character() {
        for (text, limit, expect) in [("abc", 3, "abc"), ("abcd", 3, "abc"), ("aé", 2, "a"), ("é", 1, "")] {
            let mut text = text.to_owned();
            truncate(&mut text, limit);
            assert_eq!(text, expect);
        }
    }
}
