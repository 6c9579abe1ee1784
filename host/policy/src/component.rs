//! An admitted component: identified, compiled, type-checked, and ready to be activated any number of times.
//!
//! Cheap to clone: the machine code is shared and goes with its last user, so that the host keeps exactly the components
//! that its slots, its history and its uploads name.

use std::fmt;
use std::sync::Arc;

use wasmtime::component::InstancePre;

use crate::bindings::router::RouterPolicyPre;
use crate::bindings::scheduler::SchedulerPolicyPre;
use crate::bindings::telemetry::TelemetryHookPre;
use crate::host::Host;
use crate::upload::{Digest, World};

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

/// Type-checked machine code of one world.
pub(crate) enum Code {
    Router(RouterPolicyPre<Host>),
    Scheduler(SchedulerPolicyPre<Host>),
    Telemetry(TelemetryHookPre<Host>),
}

impl Code {
    /// Looks up the world's exports; their types are checked at instantiation.
    pub(crate) fn new(world: World, linked: InstancePre<Host>) -> wasmtime::Result<Self> {
        Ok(match world {
            World::Router => Self::Router(RouterPolicyPre::new(linked)?),
            World::Scheduler => Self::Scheduler(SchedulerPolicyPre::new(linked)?),
            World::Telemetry => Self::Telemetry(TelemetryHookPre::new(linked)?),
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
