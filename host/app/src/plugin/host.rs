//! A runtime like the host's, for one guest and one thread: same limits, same checks, no server around it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use pointsman_policy::{Activation, Budget, Budgets, Component, Maintenance, Prepared, Runtime, RuntimeConfig};
use pointsman_telemetry::{Metrics, Recorder};

use super::project::trial_slot;
use crate::clock::SystemClock;

/// Room for the events of one trial; nobody reads them.
const EVENTS: usize = 64;

/// Where guests are tried out.
#[derive(Debug)]
pub(crate) struct Trial {
    /// The host's runtime.
    pub runtime: Runtime,
}

/// Shows what guests and the runtime log: a panic of a guest is only there.
pub(crate) fn log_to_stderr() {
    // A second call, in tests, is of no consequence.
    let _ = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .without_time()
        .with_target(false)
        .try_init();
}

/// Where compiled components are kept between commands, so that `bench` after `build` need not compile a Python guest for
/// ten seconds again; none without a home.
#[expect(clippy::disallowed_methods, reason = "the user's cache, where every program looks for it")]
fn cache_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("pointsman/compiled"))
}

/// Reads a component; a missing file says what to do.
///
/// # Errors
/// It cannot be read.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}: give a plugin folder or a .wasm file", path.display()))
}

fn patient() -> Budgets {
    let wide = |budget: Budget| Budget { hard: Budget::MOST, ..budget };
    let Budgets { admit, settle, route, step, resync, on_events, rank, edit, init } = Budgets::default();
    Budgets {
        admit: wide(admit),
        settle: wide(settle),
        route: wide(route),
        step: wide(step),
        resync: wide(resync),
        on_events: wide(on_events),
        rank: wide(rank),
        edit: wide(edit),
        init: wide(init),
    }
}

impl Trial {
    /// A runtime with the host's default limits, and these labels of replicas.
    ///
    /// # Errors
    /// wasmtime refuses this machine.
    pub(crate) fn new(labels: &[String]) -> anyhow::Result<Self> {
        Self::within(Budgets::default(), labels)
    }

    /// One whose calls have all the time that a budget can give: what is measured in thousands of them must not be stopped by
    /// what else the machine does.
    ///
    /// # Errors
    /// wasmtime refuses this machine.
    pub(crate) fn patient(labels: &[String]) -> anyhow::Result<Self> {
        Self::within(patient(), labels)
    }

    fn within(budgets: Budgets, labels: &[String]) -> anyhow::Result<Self> {
        let clock = SystemClock::start();
        // Instances stay for the whole trial, so that numbers are those of one warm instance.
        let config = RuntimeConfig {
            cache_dir: cache_dir(),
            maintenance: Maintenance::Manual,
            router_instances: 1,
            recycle_calls: u64::MAX,
            replica_labels: labels.to_vec(),
            budgets,
            ..RuntimeConfig::default()
        };
        let metrics = Arc::new(Metrics::new());
        let runtime =
            Runtime::new(config, Arc::clone(&metrics), Recorder::new(EVENTS), Arc::new(move || clock.micros()))?;
        Ok(Self { runtime })
    }

    /// Starts, probes and warms a component in the slot of its world.
    ///
    /// # Errors
    /// What the policy did wrong.
    pub(crate) fn prepare(
        &self,
        component: &Component,
        config: &serde_json::Value,
        generation: u64,
    ) -> anyhow::Result<Prepared> {
        let activation = Activation {
            slot: trial_slot(component.world).to_owned(),
            generation,
            config: config.to_string(),
            namespace: None,
            ..Activation::default()
        };
        Ok(self.runtime.prepare(component, activation)?)
    }
}
