//! What the tests of this crate share: a runtime with a hand-driven clock, the prebuilt guests, and inputs.

#![expect(dead_code, reason = "each test binary uses its own part of this module")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pointsman_policy::{
    Activation, Budget, Budgets as PolicyBudgets, Component, FaultKind, FaultReport, Maintenance, Prepared, Runtime,
    RuntimeConfig,
};
use pointsman_sched::batch::{Budgets, Changes, SequenceColumns};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{ReplicaColumns, RequestNumbers, RouteRequest};
use pointsman_telemetry::{Metrics, Recorder};
use wit_component::{StringEncoding, embed_component_metadata};

/// A second of the host's clock.
pub(crate) const SECOND: u64 = 1_000_000;

/// A router written by hand: it counts in host-state and picks the row of that number. Layouts are those of the canonical ABI: `manifest` at 100, the answer of `get` at 200, `choice` at 220.
const COUNTER: &str = r#"(module
  (import "pointsman:policy/host-state@VERSION" "get" (func $get (param i32 i32 i32)))
  (import "pointsman:policy/host-state@VERSION" "set" (func $set (param i32 i32 i32 i32 i32)))
  (memory (export "memory") 2)
  (data (i32.const 16) "counter")
  (data (i32.const 32) "1.0.0")
  (data (i32.const 48) "n")
  (global $heap (mut i32) (i32.const 1024))
  (func (export "cabi_realloc") (param i32 i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and
      (i32.add (global.get $heap) (i32.sub (local.get $align) (i32.const 1)))
      (i32.sub (i32.const 0) (local.get $align))))
    (global.set $heap (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  (func (export "pointsman:policy/lifecycle@VERSION#init")
    (param i32 i32 i32 i32 i64 i32 i32 i32 i32 i32) (result i32)
    (i32.store (i32.const 104) (i32.const 16)) (i32.store (i32.const 108) (i32.const 7))
    (i32.store (i32.const 112) (i32.const 32)) (i32.store (i32.const 116) (i32.const 5))
    (i32.store (i32.const 128) (i32.const SCHEMA))
    (i32.const 100))
  (func (export "pointsman:policy/router@VERSION#route") (param $arguments i32) (result i32)
    (local $rows i32) (local $n i32)
    (local.set $rows (i32.load offset=116 (local.get $arguments)))
    (global.set $heap (i32.const 1024))
    (call $get (i32.const 48) (i32.const 1) (i32.const 200))
    (if (i32.load8_u (i32.const 200))
      (then (local.set $n (i32.load8_u (i32.load (i32.const 204))))))
    (i32.store8 (i32.const 300) (i32.add (local.get $n) (i32.const 1)))
    (call $set (i32.const 48) (i32.const 1) (i32.const 300) (i32.const 1) (i32.const 240))
    (i32.store8 (i32.const 220) (i32.const 1))
    (i32.store (i32.const 224) (i32.rem_u (local.get $n) (local.get $rows)))
    (i32.const 220)))"#;

/// [`COUNTER`] as a core module that says it was built against this version of the package: 0.1.x against the frozen one,
/// any other against the latest.
pub(crate) fn counter(version: &str, schema: u32) -> Vec<u8> {
    let (path, own) = match version.strip_prefix("0.1.") {
        Some(_) => ("../../wit/frozen/0.1.0/policy.wit", "@0.1.0;"),
        None => ("../../wit/policy.wit", "@0.2.0;"),
    };
    let package = std::fs::read_to_string(path).expect("a package").replacen(own, &format!("@{version};"), 1);
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_str(path, &package).expect("a package");
    let world = resolve.select_world(&[package], Some("router-policy")).expect("a world");
    let text = COUNTER.replace("SCHEMA", &schema.to_string()).replace("VERSION", version);
    let mut module = wat::parse_str(text).expect("text that assembles");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("a module");
    module
}

/// What the fixture of every world with a hard budget can do wrong, and what it counts as.
pub(crate) const MISDEEDS: [(&str, FaultKind); 4] = [
    ("trap", FaultKind::Trap),
    ("spin", FaultKind::Timeout),
    ("allocate", FaultKind::Memory),
    ("recurse", FaultKind::Trap),
];

/// A runtime, its clock, and the faults it told of.
pub(crate) struct Bench {
    pub(crate) runtime: Runtime,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) recorder: Recorder,
    pub(crate) now: Arc<AtomicU64>,
    pub(crate) faults: Arc<Mutex<Vec<FaultReport>>>,
    next_generation: AtomicU64,
}

/// The bytes of a prebuilt guest.
pub(crate) fn prebuilt(name: &str) -> Vec<u8> {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../plugins/prebuilt").join(name).with_extension("wasm");
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Bench {
    /// With maintenance by hand, so that nothing depends on timing.
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut RuntimeConfig)) -> Self {
        let faults: Arc<Mutex<Vec<FaultReport>>> = Arc::default();
        let now = Arc::new(AtomicU64::new(SECOND));
        let (told, clock) = (Arc::clone(&faults), Arc::clone(&now));
        let mut config = RuntimeConfig {
            maintenance: Maintenance::Manual,
            router_instances: 2,
            max_instances: 64,
            on_fault: Some(Arc::new(move |report| told.lock().expect("not poisoned").push(report.clone()))),
            ..RuntimeConfig::default()
        };
        // Which way a scheduler is called must not depend on how busy the machine is.
        config.budgets.step.soft = config.budgets.step.hard;
        change(&mut config);
        let (metrics, recorder) = (Arc::new(Metrics::new()), Recorder::new(1_024));
        let clock = Arc::new(move || clock.load(Ordering::Relaxed));
        let runtime = Runtime::new(config, Arc::clone(&metrics), recorder.clone(), clock).expect("a runtime");
        Self { runtime, metrics, recorder, now, faults, next_generation: AtomicU64::new(1) }
    }

    /// Where a misdeed meets its own limit and no other, in calls with this budget.
    pub(crate) fn for_fault(kind: FaultKind, budget: fn(&mut PolicyBudgets) -> &mut Budget) -> Self {
        Self::with(|config| {
            // Only the endless one may meet the deadline, however slow the machine is today.
            budget(&mut config.budgets).hard = if kind == FaultKind::Timeout { 10_000 } else { 2_000_000 };
            // Touching 64 MiB takes longer than the budget: whoever shall meet the cap gets a low one.
            config.memory_bytes = if kind == FaultKind::Memory { 4 << 20 } else { 64 << 20 };
        })
    }

    pub(crate) fn admit(&self, name: &str) -> Component {
        self.runtime.admit(&prebuilt(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn activation(&self, slot: &str, config: &str) -> Activation {
        let generation = self.next_generation.fetch_add(1, Ordering::Relaxed);
        Activation { slot: slot.to_owned(), generation, config: config.to_owned(), ..Activation::default() }
    }

    pub(crate) fn prepare(&self, component: &Component, slot: &str, config: &str) -> Prepared {
        let prepared = self.runtime.prepare(component, self.activation(slot, config));
        prepared.unwrap_or_else(|error| panic!("{slot} {config}: {error}"))
    }

    pub(crate) fn advance(&self, micros: u64) -> u64 {
        let now = self.now.fetch_add(micros, Ordering::Relaxed) + micros;
        self.runtime.maintain();
        now
    }

    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }
}

pub(crate) fn request(id: u64) -> RouteRequest<'static> {
    RouteRequest {
        id: RequestId(id),
        model: "demo",
        tenant: "acme",
        tenant_id: 1,
        session: id * 31,
        prefix: id * 17,
        priority: Priority::Normal,
        prompt_tokens: 128,
        max_new_tokens: 64,
        arrived: id,
        deadline: 0,
        seed: id.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        numbers: RequestNumbers::default(),
        attributes: &[],
    }
}

/// `n` replicas, the one at `idle` without work and the others busy.
pub(crate) fn replicas(n: u32, idle: u32) -> ReplicaColumns {
    let busy = |i: u32, value: u32| if i == idle { 0 } else { value };
    let column = |value: &dyn Fn(u32) -> u32| (0..n).map(value).collect::<Vec<u32>>();
    ReplicaColumns {
        id: column(&|i| i + 1),
        key: (0..n).map(|i| u64::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect(),
        health: vec![0; n as usize],
        weight: column(&|_| 1_000),
        waiting: column(&|i| busy(i, 3)),
        running: column(&|i| busy(i, 5)),
        running_limit: column(&|_| 16),
        queued_tokens: column(&|i| busy(i, 2_000)),
        free_blocks: column(&|_| 500),
        total_blocks: column(&|_| 1_000),
        cached_tokens: column(&|_| 0),
        device: vec![0; n as usize],
        variant: vec![1; n as usize],
        ..ReplicaColumns::default()
    }
}

pub(crate) fn budgets() -> Budgets {
    Budgets {
        step_tokens: 2_048,
        running: 64,
        free_blocks: 500,
        total_blocks: 1_000,
        block_tokens: 16,
        last_step: 5_000,
        last_step_tokens: 64,
    }
}

/// Waiting requests with these ids and prompt lengths.
pub(crate) fn sequences(rows: &[(u64, u32)]) -> SequenceColumns {
    let n = rows.len();
    SequenceColumns {
        id: rows.iter().map(|(id, _)| *id).collect(),
        prompt_tokens: rows.iter().map(|(_, tokens)| *tokens).collect(),
        cached_tokens: vec![0; n],
        computed_tokens: vec![0; n],
        generated_tokens: vec![0; n],
        max_new_tokens: vec![32; n],
        held_blocks: vec![0; n],
        priority: vec![2; n],
        tenant: vec![1; n],
        arrived: rows.iter().map(|(id, _)| *id).collect(),
        deadline: vec![0; n],
        session: vec![5; n],
        prefix: vec![6; n],
    }
}

pub(crate) fn arrivals(rows: &[(u64, u32)]) -> Changes {
    Changes { arrived: sequences(rows), ..Changes::default() }
}

/// Resident memory of this process, in bytes.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("the second number");
    pages * rustix::param::page_size() as u64
}
