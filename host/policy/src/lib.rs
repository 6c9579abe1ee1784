//! Policies as WebAssembly components: the only crate that names wasmtime.
//!
//! It implements the seams of `pointsman-sched` with a guest behind them and the native policy beside them. A guest can be
//! slow, wrong, malicious or gone: whatever it does becomes a [`Fault`] with a kind, the native policy answers, and the
//! slot's circuit decides whether the guest is asked again. It is not a general wasm host: a world per hook, three small
//! host interfaces, no WASI, no async.
//!
//! The life of a revision, and the module that owns each part:
//!
//! 1. upload: size, digest, world, package version, imports;
//! 2. compile: in a child process, cached; component: linked and type-checked;
//! 3. runtime: started with its configuration, probed, warmed ([`Runtime::prepare`]);
//! 4. slot: published by one pointer swap; the old generation drains (drain) and is freed;
//! 5. admission, router, scheduler, retention, sampler, telemetry: the calls; generation, circuit: what follows from a fault;
//!    shadow, with bystander, witness and listener for what a policy is told: calls whose answers are only compared;
//! 6. handover: what an instance gives to the one that takes its place.
#![deny(missing_docs)]

mod admission;
mod aside;
mod bindings;
mod bystander;
mod circuit;
mod compile;
mod component;
mod config;
mod drain;
mod endings;
mod engine;
mod fault;
mod generation;
mod handover;
mod host;
mod instance;
mod listener;
mod manifest;
mod resident;
mod retention;
mod router;
mod runtime;
mod sampler;
mod scheduler;
mod shadow;
mod slot;
mod state;
mod telemetry;
mod ticker;
mod upload;
mod versions;
mod witness;

/// The atomics of [`drain`]; tests/loom.rs puts loom's in their place.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

    /// Runs a test once; loom's runs it in every interleaving.
    #[cfg(test)]
    pub(crate) fn model(test: impl Fn() + Send + Sync + 'static) {
        test();
    }
}

pub use admission::{AdmissionQuestion, AdmissionSlot};
pub use circuit::Health;
pub use compile::{CacheError, CompileError, compile_child_main};
pub use component::Component;
pub use config::{
    Budget, BudgetChange, BudgetError, Budgets, Compile, CompileCommand, CompileLimits, Limits, Maintenance, OnFault,
    RuntimeConfig,
};
pub use engine::Allocation;
pub use fault::{Call, Fault, FaultKind, FaultListener, FaultReport};
pub use handover::{Handover, Inheritance};
pub use manifest::ManifestError;
pub use retention::{RetentionGuest, RetentionSlot};
pub use router::{RouterQuestion, RouterSlot};
pub use runtime::{ActivateError, Activation, Clock, Inspected, Role, Runtime, RuntimeError};
pub use sampler::{SampledReplica, SamplerPort, SamplerSlot};
pub use scheduler::{SchedulerGuest, SchedulerSlot};
pub use shadow::Compared;
pub use slot::{Arm, Deciding, Prepared, PublishError, Published, Slot, SlotStatus};
pub use state::MAX_NAMESPACE_BYTES;
pub use telemetry::{Alert, Severity, TelemetrySlot};
pub use upload::{Digest, UploadError, World, encode};
