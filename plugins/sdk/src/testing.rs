//! A host for native tests: makes inputs, and keeps what a policy logs, counts and stores.
//!
//! Thread-local, so that tests run in parallel without seeing each other. Not a model of the scheduler or of time: a test
//! says what the host would have said, and looks at the answer.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::{AdmitRequest, Block, Blocks, Budgets, Changes, Ending, Endings, Event, Events, HostInfo, Level, Load};
use crate::{Policy, Priority, Replica, Replicas, Request, Sequence, Sequences, Started, View};

/// Starts a policy as the host would: with the text of its configuration.
///
/// # Errors
/// What the operator would read.
pub fn start<P: Policy>(config: &str) -> Result<P, String> {
    P::init(crate::config::parse(config)?, &host())
}

/// The first instance of the first generation of a slot `test`.
#[must_use]
pub fn host() -> HostInfo {
    HostInfo { slot: "test".into(), generation: 1, instance: 0, host_version: "0.1.0".into(), columns: Vec::new() }
}

/// A request of 100 prompt tokens and 50 new ones for the model `demo`, without session or deadline.
#[must_use]
pub fn request() -> Request {
    Request {
        id: 1,
        model: "demo".into(),
        tenant: "default".into(),
        tenant_id: 1,
        session: 0,
        prefix: 0,
        priority: Priority::Normal,
        prompt_tokens: 100,
        max_new_tokens: 50,
        arrived: 1,
        deadline: 0,
        seed: 0,
        extra: Vec::new(),
        attributes: Vec::new(),
    }
}

/// The same request at the door, of a tenant that may claim anything.
#[must_use]
pub fn admit_request() -> AdmitRequest {
    let request = request();
    AdmitRequest {
        id: request.id,
        model: request.model,
        tenant: request.tenant,
        tenant_id: request.tenant_id,
        session: request.session,
        priority: request.priority,
        highest: Priority::Critical,
        prompt_tokens: request.prompt_tokens,
        max_new_tokens: request.max_new_tokens,
        arrived: request.arrived,
        deadline: request.deadline,
        seed: request.seed,
        extra: Vec::new(),
        attributes: Vec::new(),
    }
}

/// An idle host with the default limits.
#[must_use]
pub fn load() -> Load {
    Load {
        in_flight: 0,
        in_flight_limit: 256,
        queued_tokens: 0,
        queued_tokens_limit: 262_144,
        tenant_in_flight: 0,
        tenant_queued_tokens: 0,
    }
}

/// Columns of these endings, of tenants with these names.
#[must_use]
pub fn endings(rows: impl IntoIterator<Item = Ending>, new_tenants: &[(u32, &str)]) -> Endings {
    let rows: Vec<Ending> = rows.into_iter().collect();
    Endings {
        id: rows.iter().map(|r| r.id).collect(),
        tenant: rows.iter().map(|r| r.tenant).collect(),
        outcome: rows.iter().map(|r| r.outcome).collect(),
        prompt_tokens: rows.iter().map(|r| r.prompt_tokens).collect(),
        cached_tokens: rows.iter().map(|r| r.cached_tokens).collect(),
        generated_tokens: rows.iter().map(|r| r.generated_tokens).collect(),
        max_new_tokens: rows.iter().map(|r| r.max_new_tokens).collect(),
        new_tenants: new_tenants.iter().map(|(number, name)| (*number, (*name).to_owned())).collect(),
    }
}

/// A healthy, idle replica with weight 1000, 8 places and 1,000 free blocks.
#[must_use]
pub fn replica(id: u32) -> Replica {
    Replica {
        id,
        key: u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        weight: 1_000,
        running_limit: 8,
        free_blocks: 1_000,
        total_blocks: 1_000,
        ..Replica::default()
    }
}

/// Columns of these rows; their `row` is their place.
#[must_use]
pub fn replicas(rows: impl IntoIterator<Item = Replica>) -> Replicas {
    let rows: Vec<Replica> = rows.into_iter().collect();
    Replicas {
        id: rows.iter().map(|r| r.id).collect(),
        key: rows.iter().map(|r| r.key).collect(),
        health: rows.iter().map(|r| r.health).collect(),
        weight: rows.iter().map(|r| r.weight).collect(),
        waiting: rows.iter().map(|r| r.waiting).collect(),
        running: rows.iter().map(|r| r.running).collect(),
        running_limit: rows.iter().map(|r| r.running_limit).collect(),
        queued_tokens: rows.iter().map(|r| r.queued_tokens).collect(),
        free_blocks: rows.iter().map(|r| r.free_blocks).collect(),
        total_blocks: rows.iter().map(|r| r.total_blocks).collect(),
        cached_tokens: rows.iter().map(|r| r.cached_tokens).collect(),
        extra: Vec::new(),
    }
}

/// Columns of these rows, in this order; tenants are named `tenant-<number>`, all of them new.
#[must_use]
pub fn blocks(rows: impl IntoIterator<Item = Block>) -> Blocks {
    let rows: Vec<Block> = rows.into_iter().collect();
    let tenants: BTreeMap<u32, String> = rows.iter().map(|r| (r.tenant, format!("tenant-{}", r.tenant))).collect();
    Blocks {
        prefix: rows.iter().map(|r| r.prefix).collect(),
        depth: rows.iter().map(|r| r.depth).collect(),
        children: rows.iter().map(|r| r.children).collect(),
        last_used: rows.iter().map(|r| r.last_used).collect(),
        created: rows.iter().map(|r| r.created).collect(),
        hits: rows.iter().map(|r| r.hits).collect(),
        tenant: rows.iter().map(|r| r.tenant).collect(),
        new_tenants: tenants.into_iter().collect(),
    }
}

/// A request that starts, of 100 prompt tokens and 50 new ones, with the stop token 2 in a vocabulary of 1,000.
#[must_use]
pub fn started(id: u64) -> Started {
    Started {
        id,
        tenant: "default".into(),
        variant: "demo:f16".into(),
        vocabulary: 1_000,
        stop_tokens: vec![2],
        prompt_tokens: 100,
        max_new_tokens: 50,
        attributes: Vec::new(),
    }
}

/// A waiting request of 100 prompt tokens and 50 new ones, of normal priority.
#[must_use]
pub fn sequence(id: u64) -> Sequence {
    Sequence { id, prompt_tokens: 100, max_new_tokens: 50, priority: 2, arrived: 1, ..Sequence::default() }
}

/// Columns of these rows.
#[must_use]
pub fn sequences(rows: impl IntoIterator<Item = Sequence>) -> Sequences {
    let rows: Vec<Sequence> = rows.into_iter().collect();
    Sequences {
        id: rows.iter().map(|r| r.id).collect(),
        prompt_tokens: rows.iter().map(|r| r.prompt_tokens).collect(),
        cached_tokens: rows.iter().map(|r| r.cached_tokens).collect(),
        computed_tokens: rows.iter().map(|r| r.computed_tokens).collect(),
        generated_tokens: rows.iter().map(|r| r.generated_tokens).collect(),
        max_new_tokens: rows.iter().map(|r| r.max_new_tokens).collect(),
        held_blocks: rows.iter().map(|r| r.held_blocks).collect(),
        priority: rows.iter().map(|r| r.priority).collect(),
        tenant: rows.iter().map(|r| r.tenant).collect(),
        arrived: rows.iter().map(|r| r.arrived).collect(),
        deadline: rows.iter().map(|r| r.deadline).collect(),
        extra: Vec::new(),
    }
}

/// Budgets of a small replica in which `running` sequences may run.
#[must_use]
pub fn budgets(running: u32) -> Budgets {
    Budgets {
        step_tokens: 512,
        running,
        free_blocks: 1_000,
        total_blocks: 1_000,
        block_tokens: 16,
        last_step: 5_000,
        last_step_tokens: 100,
    }
}

/// A view at time `now` with these waiting and running requests, in which `budget` may run.
#[must_use]
pub fn view(now: u64, budget: u32, waiting: &[Sequence], running: &[Sequence]) -> View {
    View {
        now,
        seed: 0,
        budgets: budgets(budget),
        tenants: Vec::new(),
        waiting: sequences(waiting.iter().copied()),
        running: sequences(running.iter().copied()),
    }
}

/// Changes in which these requests arrived and nothing else happened; fill the rest by field update.
#[must_use]
pub fn arrivals(rows: impl IntoIterator<Item = Sequence>) -> Changes {
    Changes {
        new_tenants: Vec::new(),
        arrived: sequences(rows),
        admitted: Vec::new(),
        preempted: Vec::new(),
        gone: Vec::new(),
        progress_id: Vec::new(),
        progress_computed: Vec::new(),
        progress_generated: Vec::new(),
        progress_blocks: Vec::new(),
    }
}

/// Columns of these events.
#[must_use]
pub fn events(rows: impl IntoIterator<Item = Event>) -> Events {
    let rows: Vec<Event> = rows.into_iter().collect();
    Events {
        at: rows.iter().map(|r| r.at).collect(),
        kind: rows.iter().map(|r| r.kind as u8).collect(),
        request: rows.iter().map(|r| r.request).collect(),
        replica: rows.iter().map(|r| r.replica).collect(),
        generation: rows.iter().map(|r| r.generation).collect(),
        tenant: rows.iter().map(|r| r.tenant).collect(),
        a: rows.iter().map(|r| r.a).collect(),
        b: rows.iter().map(|r| r.b).collect(),
        extra: Vec::new(),
        new_names: Vec::new(),
    }
}

/// Takes what was logged on this thread so far.
#[must_use]
pub fn logged() -> Vec<(Level, String)> {
    HOST.with_borrow_mut(|host| std::mem::take(&mut host.log))
}

/// The last value of a gauge, the sum of a counter, the number of observations of a histogram; of the series with this
/// label value, or of the one without. None before the first record.
#[must_use]
pub fn metric(name: &str, label_value: Option<&str>) -> Option<f64> {
    let key = (name.to_owned(), label_value.map(str::to_owned));
    HOST.with_borrow(|host| host.values.get(&key).copied())
}

#[derive(Default)]
struct Host {
    log: Vec<(Level, String)>,
    metrics: Vec<(String, MetricKind)>,
    values: BTreeMap<(String, Option<String>), f64>,
    state: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq)]
enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::default();
}

/// `interface host-log`.
pub(crate) mod host_log {
    use super::{HOST, Level};

    pub(crate) fn log(level: Level, message: &str) {
        HOST.with_borrow_mut(|host| host.log.push((level, message.to_owned())));
    }
}

/// `interface host-metrics`.
pub(crate) mod host_metrics {
    use super::{HOST, MetricKind};

    fn register(name: &str, kind: MetricKind) -> u32 {
        HOST.with_borrow_mut(|host| {
            let known = host.metrics.iter().position(|metric| metric.0 == name && metric.1 == kind);
            let handle = known.unwrap_or_else(|| {
                host.metrics.push((name.to_owned(), kind));
                host.metrics.len() - 1
            });
            u32::try_from(handle).unwrap_or(u32::MAX)
        })
    }

    pub(crate) fn counter(name: &str, _help: &str, _label: Option<&str>) -> u32 {
        register(name, MetricKind::Counter)
    }

    pub(crate) fn gauge(name: &str, _help: &str, _label: Option<&str>) -> u32 {
        register(name, MetricKind::Gauge)
    }

    pub(crate) fn histogram(name: &str, _help: &str, _label: Option<&str>, _buckets: &[f64]) -> u32 {
        register(name, MetricKind::Histogram)
    }

    pub(crate) fn record_value(handle: u32, value: f64, label_value: Option<&str>) {
        HOST.with_borrow_mut(|host| {
            let Some((name, kind)) = host.metrics.get(handle as usize).cloned() else { return };
            let series = host.values.entry((name, label_value.map(str::to_owned))).or_default();
            *series = match kind {
                MetricKind::Counter => *series + value,
                MetricKind::Gauge => value,
                MetricKind::Histogram => *series + 1.0,
            };
        });
    }
}

/// `interface host-state`, without its limits.
pub(crate) mod host_state {
    use super::HOST;
    use crate::StateFault;

    pub(crate) fn get(key: &str) -> Option<Vec<u8>> {
        HOST.with_borrow(|host| host.state.get(key).cloned())
    }

    pub(crate) fn set(key: &str, value: &[u8]) -> Result<(), StateFault> {
        HOST.with_borrow_mut(|host| host.state.insert(key.to_owned(), value.to_owned()));
        Ok(())
    }

    pub(crate) fn compare_and_set(key: &str, expected: Option<&[u8]>, value: &[u8]) -> Result<bool, StateFault> {
        let holds = get(key).as_deref() == expected;
        if holds {
            set(key, value)?;
        }
        Ok(holds)
    }

    pub(crate) fn delete(key: &str) {
        HOST.with_borrow_mut(|host| host.state.remove(key));
    }
}

#[cfg(test)]
mod tests {
    use crate::metrics::{Counter, Gauge, Histogram};
    use crate::{Level, log, state, testing};

    #[test]
    fn the_host_remembers() {
        log::warn("careful");
        assert_eq!(testing::logged(), [(Level::Warn, "careful".to_owned())]);
        assert!(testing::logged().is_empty());

        let late = Counter::register_labeled("late", "requests", "tenant");
        late.add_for("a", 2.0);
        late.add_for("a", 1.0);
        let load = Gauge::register("load", "share");
        load.set(2.0);
        load.set(0.5);
        Histogram::register("size", "tokens", &[1.0, 2.0]).observe(1.5);
        for (name, label, expect) in
            [("late", Some("a"), Some(3.0)), ("late", None, None), ("load", None, Some(0.5)), ("size", None, Some(1.0))]
        {
            assert_eq!(testing::metric(name, label), expect, "{name}");
        }

        assert_eq!(state::compare_and_set("k", Some(b"0"), b"1"), Ok(false));
        assert_eq!(state::compare_and_set("k", None, b"1"), Ok(true));
        assert_eq!(state::get("k").as_deref(), Some(b"1".as_slice()));
        state::delete("k");
        assert_eq!(state::get("k"), None);
    }
}
