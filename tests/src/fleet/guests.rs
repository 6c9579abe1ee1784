//! The committed guests on the clock of a simulation.
//!
//! Budgets are so wide that no machine is too slow for them: a timeout would make a result depend on who else computes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pointsman_policy::{
    Activation, Budget, Budgets, Compile, Maintenance, RouterSlot, Runtime, RuntimeConfig, Slot, TelemetrySlot,
};
use pointsman_sched::batch::BatchPolicy;
use pointsman_telemetry::{Metrics, Recorder};

use crate::root;

/// A runtime and its clock.
#[derive(Debug)]
pub struct Guests {
    runtime: Runtime,
    /// What the guests are told the time is.
    pub clock: Arc<AtomicU64>,
}

impl Default for Guests {
    fn default() -> Self {
        Self::start()
    }
}

impl Guests {
    /// Starts a runtime.
    #[must_use]
    pub fn start() -> Self {
        let clock = Arc::new(AtomicU64::new(1));
        let wide = Budget { soft: 60_000_000, hard: 60_000_000 };
        let config = RuntimeConfig {
            compile: Compile::InProcess,
            maintenance: Maintenance::Manual,
            budgets: Budgets {
                admit: wide,
                settle: wide,
                route: wide,
                step: wide,
                resync: wide,
                on_events: wide,
                init: wide,
                edit: wide,
                rank: wide,
            },
            max_instances: 32,
            router_instances: 2,
            ..RuntimeConfig::default()
        };
        let time = Arc::clone(&clock);
        let now = Arc::new(move || time.load(Ordering::Relaxed));
        let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(64), now).expect("a runtime");
        Self { runtime, clock }
    }

    /// A router; `namespace` is its host-state, if it shares one.
    #[must_use]
    pub fn router(&self, name: &str, config: &str, namespace: Option<&str>) -> Arc<RouterSlot> {
        let slot = self.runtime.router_slot("router");
        self.publish(&*slot, ("router", name, config), namespace);
        slot
    }

    /// A telemetry hook.
    #[must_use]
    pub fn hook(&self, name: &str, config: &str, namespace: Option<&str>) -> Arc<TelemetrySlot> {
        let slot = self.runtime.telemetry_slot("telemetry.hook");
        self.publish(&*slot, ("telemetry.hook", name, config), namespace);
        slot
    }

    /// A scheduler for one replica.
    #[must_use]
    pub fn scheduler(&self, name: &str, config: &str) -> Box<dyn BatchPolicy> {
        let slot = self.runtime.scheduler_slot("scheduler");
        let guest = slot.attach("replica-0");
        self.publish(&*slot, ("scheduler", name, config), None);
        Box::new(guest)
    }

    fn publish(&self, slot: &dyn Slot, (at, name, config): (&str, &str, &str), namespace: Option<&str>) {
        let path = root().join(format!("plugins/prebuilt/{name}.wasm"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let component = self.runtime.admit(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let generation = slot.status().generation + 1;
        let namespace = namespace.map(str::to_owned);
        let activation =
            Activation { slot: at.into(), generation, config: config.into(), namespace, ..Activation::default() };
        let prepared = self.runtime.prepare(&component, activation);
        let prepared = prepared.unwrap_or_else(|error| panic!("{name} {config}: {error}"));
        slot.publish(prepared).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
