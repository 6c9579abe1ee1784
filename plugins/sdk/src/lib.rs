//! SDK for Pointsman policies in Rust.
//!
//! A policy is a plain type that implements [`Policy`] and one of [`Admission`], [`Router`], [`Scheduler`], [`Retention`],
//! [`Sampler`], [`Telemetry`]; one macro of the same name in small letters ([`router!`], ...) makes the component out of it, and
//! [`handover!`] adds a [`Handover`].
//! Nothing in a policy knows about WebAssembly: `cargo test` runs it natively, with [`testing`] in the place of the host.
//!
//! ```
//! use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, NoConfig, Policy, Replicas, Request, Router};
//!
//! struct Emptiest;
//!
//! impl Policy for Emptiest {
//!     type Config = NoConfig;
//!
//!     fn init(_: NoConfig, _: &HostInfo) -> Result<Self, String> {
//!         Ok(Self)
//!     }
//!
//!     fn manifest(&self) -> Manifest {
//!         pointsman_plugin::manifest!()
//!     }
//! }
//!
//! impl Router for Emptiest {
//!     fn route(&mut self, _now: Micros, _request: &Request, replicas: &Replicas) -> Choice {
//!         match replicas.rows().min_by_key(|replica| replica.queued_tokens) {
//!             Some(replica) => Choice::Pick(replica.row),
//!             None => Choice::Abstain,
//!         }
//!     }
//! }
//!
//! pointsman_plugin::router!(Emptiest);
//! ```
//!
//! Records are those of `wit/policy.wit`, where every field is documented. Lists arrive in an arena and cost next to
//! nothing; a policy may keep or change them like any other `Vec`. A panic is a trap: the host counts it, drops the
//! instance and decides by itself, and the message is in the host's log.

// The bindings name this crate as guests do.
extern crate self as pointsman_plugin;

mod config;
mod export;
mod hash;
mod host;
mod json;
mod queue;
mod rows;

#[cfg(any(target_arch = "wasm32", test))]
mod arena;
#[doc(hidden)]
pub mod bindings;

#[cfg(not(target_arch = "wasm32"))]
pub mod testing;

use serde::de::DeserializeOwned;

pub use bindings::admission::exports::pointsman::policy::admission::{Endings, Load, Request as AdmitRequest, Verdict};
pub use bindings::host::pointsman::policy::host_log::Level;
pub use bindings::host::pointsman::policy::host_state::Fault as StateFault;
pub use bindings::host::pointsman::policy::types::{Micros, Priority, Refusal, Rejection, RequestId};
pub use bindings::kv_retention::exports::pointsman::policy::kv_retention::{Blocks, Ranking};
pub use bindings::lifecycle::exports::pointsman::policy::lifecycle::{HostInfo, Manifest};
pub use bindings::router::exports::pointsman::policy::router::{Choice, Replicas, Request};
pub use bindings::sampler::exports::pointsman::policy::sampler::{Edit, Request as Started};
pub use bindings::scheduler::exports::pointsman::policy::scheduler::{Budgets, Changes, Plan, Rest, Sequences};
pub use bindings::telemetry::exports::pointsman::policy::telemetry::{Alert, Events, Severity};
pub use config::NoConfig;
#[doc(hidden)]
pub use export::{Component, Instance};
pub use hash::{NO_LABEL, label, mix, place, place_before};
pub use host::{log, metrics, state};
pub use queue::Queue;
pub use rows::{Block, Ending, Event, EventKind, Replica, Sequence};
#[doc(hidden)]
pub use wit_bindgen;

/// What every policy has: a configuration and a name.
pub trait Policy: Sized + 'static {
    /// What the operator may set. Derive `Deserialize` and say `#[serde(default, deny_unknown_fields)]`: the text is `{}`
    /// when nothing is set, and a misspelt field should be an error that names it.
    type Config: DeserializeOwned;

    /// Makes the policy; register metrics here. Runs once per instance.
    ///
    /// # Errors
    /// A sentence for the operator, who then keeps the policy that was active before.
    fn init(config: Self::Config, host: &HostInfo) -> Result<Self, String>;

    /// Name, version and wanted inputs; start from [`manifest!`].
    fn manifest(&self) -> Manifest;
}

/// Lets requests in.
pub trait Admission: Policy {
    /// Answers for one request that wants to enter. Several instances answer at once and none sees every request: what they
    /// must agree on belongs in [`state`].
    fn admit(&mut self, now: Micros, request: &AdmitRequest, load: &Load) -> Verdict;

    /// What accepted requests came to, in batches and later. Any instance may get any ending.
    fn settle(&mut self, _now: Micros, _endings: &Endings) {}
}

/// Chooses the replica that serves a request.
pub trait Router: Policy {
    /// Answers for one request. Several instances answer at once and none sees every request.
    fn route(&mut self, now: Micros, request: &Request, replicas: &Replicas) -> Choice;
}

/// Orders the work of one replica.
pub trait Scheduler: Policy {
    /// The whole view, after start, swap or trap: forget everything and take this.
    fn resync(&mut self, view: &View);

    /// What should happen in this step; none leaves it to the host's own plan.
    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes) -> Option<Plan>;
}

/// Ranks what the prefix cache of one replica gives up first.
pub trait Retention: Policy {
    /// Which of these blocks go first and which last; none leaves it to the host's own order.
    fn rank(&mut self, now: Micros, wanted: u32, blocks: &Blocks) -> Option<Ranking>;
}

/// Limits or biases which tokens the requests of one replica get next.
///
/// A request may be started more than once: a host that had to drop an instance tells the next one of every request that it
/// has not left, with its tokens from the first on.
pub trait Sampler: Policy {
    /// Requests that start to generate; one edit each, in order.
    fn start(&mut self, now: Micros, requests: &[Started]) -> Vec<Edit>;

    /// The tokens that were just sampled, one each; one edit each, in order, for the token after it.
    fn next(&mut self, now: Micros, ids: &[RequestId], tokens: &[u32]) -> Vec<Edit>;

    /// Requests that have ended: forget them.
    fn ended(&mut self, ids: &[RequestId]);
}

/// Watches what happens.
pub trait Telemetry: Policy {
    /// A batch of events, oldest first, and how many the host had to drop before them. Returns alerts to raise.
    fn on_events(&mut self, now: Micros, events: &Events, dropped: u64) -> Vec<Alert>;
}

/// Hands what was learned to the instance that takes this one's place, when the slot is swapped or the host replaces an
/// instance that has served long; [`handover!`] exports it. For schedulers, retention policies, samplers and telemetry hooks.
///
/// An optimization: an instance that comes after a fault or a restart of the host starts without it. What follows on `restore`
/// is what every new instance is told, such as a scheduler's `resync`: keep there what was restored.
pub trait Handover: Policy {
    /// Number of the layout of the bytes; another one for another layout.
    const LAYOUT: u32 = 1;

    /// What the layout is called between all policies, because any policy may follow on this one: a successor that does not say
    /// the same is not shown the bytes. Made of the policy's name and [`LAYOUT`](Self::LAYOUT).
    fn schema(&self) -> u32 {
        hash::schema(&self.manifest().name, Self::LAYOUT)
    }

    /// What is worth to be carried over, at most 1 MiB; none for nothing. Called between two calls of the policy, which goes
    /// on serving.
    fn snapshot(&mut self) -> Option<Vec<u8>>;

    /// What the instance before this one gave, after `init` and before any other call.
    ///
    /// # Errors
    /// A sentence for the operator: another instance starts cold, or the swap is refused, as the operator has asked.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), String>;
}

impl Manifest {
    /// Asks for extra inputs by name, such as `replica.device`, `header.x-plan` or `event.finished`.
    #[must_use]
    pub fn wants<const N: usize>(mut self, names: [&str; N]) -> Self {
        self.wants = names.map(String::from).to_vec();
        self
    }
}

/// Everything that a scheduler is told by `resync`.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The host's clock.
    pub now: Micros,
    /// Random bits for the policy's own use.
    pub seed: u64,
    /// What a step may spend.
    pub budgets: Budgets,
    /// Names of the tenants seen so far.
    pub tenants: Vec<(u32, String)>,
    /// Waiting requests, in the host's order.
    pub waiting: Sequences,
    /// Running requests, in the order of admission.
    pub running: Sequences,
}

/// The [`Manifest`] of the crate that calls it: name, version and description (one line) of its package, no extra inputs.
#[macro_export]
macro_rules! manifest {
    () => {
        $crate::Manifest {
            name: ::std::string::String::from(env!("CARGO_PKG_NAME")),
            version: ::std::string::String::from(env!("CARGO_PKG_VERSION")),
            wants: ::std::vec::Vec::new(),
            state_schema: 0,
            summary: ::std::string::String::from(env!("CARGO_PKG_DESCRIPTION")),
        }
    };
}

// The example of the README is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
