//! An admitted component: identified, compiled, type-checked, and ready to be activated any number of times.
//!
//! Cheap to clone: the machine code is shared and goes with its last user, so that the host keeps exactly the components
//! that its slots, its history and its uploads name.

use std::fmt;
use std::sync::Arc;

use wasmtime::Store;
use wasmtime::component::InstancePre;

use crate::bindings::handover::{Handover, HandoverIndices};
use crate::bindings::{admission, kv_retention, router, sampler, scheduler, telemetry};
use crate::host::Host;
use crate::instance::Hook;
use crate::upload::{Digest, World};
use crate::versions::{Lifecycle, LifecycleIndices};

/// A component that this host has admitted.
#[derive(Clone)]
pub struct Component {
    /// Of the uploaded bytes.
    pub digest: Digest,
    /// Which hook it implements.
    pub world: World,
    /// The package it was built against, as in `pointsman:policy@0.1.0`.
    pub package: Arc<str>,
    /// Of the upload, in bytes.
    pub size: u64,
    /// Time from bytes to checked machine code, in milliseconds.
    pub compile_ms: f64,
    /// Whether the machine code was there already.
    pub cached: bool,
    pub(crate) code: Arc<Code>,
}

/// Linked machine code of one world.
pub(crate) enum Code {
    Admission(Linked<admission::AdmissionIndices>),
    Router(Linked<router::RouterIndices>),
    Scheduler(Linked<scheduler::SchedulerIndices>),
    Telemetry(Linked<telemetry::TelemetryIndices>),
    Retention(Linked<kv_retention::KvRetentionIndices>),
    Sampler(Linked<sampler::SamplerIndices>),
}

/// Machine code with its imports, and where it has the two interfaces that it must export, and the one that it may.
#[derive(Clone)]
pub(crate) struct Linked<I> {
    pre: InstancePre<Host>,
    lifecycle: LifecycleIndices,
    handover: Option<HandoverIndices>,
    hook: I,
}

/// The interfaces of an instance.
pub(crate) struct Exports<B> {
    pub(crate) lifecycle: Lifecycle,
    pub(crate) handover: Option<Handover>,
    pub(crate) hook: B,
}

impl Code {
    /// Looks up the world's exports; their types are checked at instantiation.
    pub(crate) fn new(world: World, hands_over: bool, pre: InstancePre<Host>) -> wasmtime::Result<Self> {
        let handover = hands_over.then(|| HandoverIndices::new(&pre)).transpose()?;
        Ok(match world {
            World::Admission => Self::Admission(Linked::new(admission::AdmissionIndices::new(&pre)?, handover, pre)?),
            World::Router => Self::Router(Linked::new(router::RouterIndices::new(&pre)?, handover, pre)?),
            World::Scheduler => Self::Scheduler(Linked::new(scheduler::SchedulerIndices::new(&pre)?, handover, pre)?),
            World::Telemetry => Self::Telemetry(Linked::new(telemetry::TelemetryIndices::new(&pre)?, handover, pre)?),
            World::Retention => {
                Self::Retention(Linked::new(kv_retention::KvRetentionIndices::new(&pre)?, handover, pre)?)
            }
            World::Sampler => Self::Sampler(Linked::new(sampler::SamplerIndices::new(&pre)?, handover, pre)?),
        })
    }
}

impl<I> Linked<I> {
    fn new(hook: I, handover: Option<HandoverIndices>, pre: InstancePre<Host>) -> wasmtime::Result<Self> {
        Ok(Self { lifecycle: LifecycleIndices::new(&pre)?, handover, hook, pre })
    }

    /// Whether it exports `handover`.
    pub(crate) fn hands_over(&self) -> bool {
        self.handover.is_some()
    }

    /// Runs start functions and checks the types of the exports.
    pub(crate) fn instantiate<H: Hook<Indices = I>>(
        &self,
        store: &mut Store<Host>,
    ) -> wasmtime::Result<Exports<H::Bindings>> {
        let instance = self.pre.instantiate(&mut *store)?;
        Ok(Exports {
            lifecycle: self.lifecycle.load(store, &instance)?,
            handover: self.handover.as_ref().map(|handover| handover.load(&mut *store, &instance)).transpose()?,
            hook: H::load(&self.hook, store, &instance)?,
        })
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Component")
            .field("digest", &self.digest)
            .field("world", &self.world)
            .field("package", &self.package)
            .field("size", &self.size)
            .field("compile_ms", &self.compile_ms)
            .field("cached", &self.cached)
            .finish_non_exhaustive()
    }
}
