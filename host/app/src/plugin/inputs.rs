//! Made-up inputs of every hook, the same for every policy, so that two can be compared: `pointsman plugin bench` shows them to
//! the component of an author, the benchmarks of this repository to those that ship.
//!
//! Here, in the crate that everybody else may use, and not in two places: figures of the one are read beside those of the
//! other. Numbers spread a little, so that a policy has something to choose from; they are no model of traffic.

use std::ops::Range;
use std::sync::Arc;

use pointsman_sched::admit::{AdmitRequest, Load};
use pointsman_sched::batch::{Budgets, SequenceColumns};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::retention::BlockColumns;
use pointsman_sched::route::{ReplicaColumns, RequestNumbers, RouteRequest};
use pointsman_sched::sampler::Started;
use pointsman_telemetry::{Event, EventKind};

/// Arrivals, admissions and departures of a scheduling step.
pub const DELTAS: u64 = 16;

/// What a step of the scheduler may use.
pub const BUDGETS: Budgets = Budgets {
    step_tokens: 512,
    running: 64,
    free_blocks: 4_096,
    total_blocks: 8_192,
    block_tokens: 16,
    last_step: 4_000,
    last_step_tokens: 64,
};

/// Tokens in the vocabulary that samplers are told of.
pub const VOCABULARY: u32 = 2_048;

/// So many replicas, each with these labels.
#[must_use]
pub fn replicas(n: u32, labels: &[String]) -> ReplicaColumns {
    let same = |value: u64| vec![value; n as usize];
    let column = |f: fn(u32) -> u32| (0..n).map(f).collect::<Vec<u32>>();
    ReplicaColumns {
        id: column(|i| i),
        key: (0..n).map(|i| mixed(u64::from(i))).collect(),
        health: vec![0; n as usize],
        weight: column(|_| 1_000),
        waiting: column(|i| i * 7 % 5),
        running: column(|i| i * 3 % 11),
        running_limit: column(|_| 64),
        queued_tokens: column(|i| i * 131 % 1_999),
        free_blocks: column(|i| 500 - i % 400),
        total_blocks: column(|_| 500),
        cached_tokens: column(|i| i * 16 % 128),
        device: same(0),
        variant: same(1),
        load: same(500_000),
        errors: same(0),
        age: same(60_000_000),
        predicted_ttft: same(10_000),
        kind: same(0),
        labels: labels.iter().map(|label| (label.as_str().into(), same(1))).collect(),
    }
}

/// A request to be routed, from its number.
#[must_use]
pub fn request(number: u64) -> RouteRequest<'static> {
    RouteRequest {
        id: RequestId(number),
        model: "demo",
        tenant: "bench",
        tenant_id: 1,
        session: number % 64,
        prefix: 7,
        priority: Priority::Normal,
        prompt_tokens: 200,
        max_new_tokens: 64,
        arrived: 1,
        deadline: 0,
        seed: mixed(number),
        numbers: RequestNumbers::default(),
        attributes: &[],
    }
}

/// A request at the door, of one of so many tenants; `names` come from [`tenants`].
#[must_use]
pub fn admit_request(number: u64, names: &[String]) -> AdmitRequest<'_> {
    let tenant_id = u32::try_from(number % names.len().max(1) as u64).unwrap_or(0);
    AdmitRequest {
        id: RequestId(number),
        model: "demo",
        tenant: names.get(tenant_id as usize).map_or("bench", String::as_str),
        tenant_id: tenant_id + 1,
        session: number % 64,
        priority: Priority::Normal,
        highest: Priority::High,
        prompt_tokens: 200,
        max_new_tokens: 64,
        arrived: 1,
        deadline: 0,
        seed: mixed(number),
        numbers: RequestNumbers::default(),
        attributes: &[],
    }
}

/// Names of so many tenants.
#[must_use]
pub fn tenants(n: u64) -> Vec<String> {
    (0..n).map(|i| format!("tenant-{i}")).collect()
}

/// A host that is half full.
#[must_use]
pub fn load() -> Load {
    Load {
        in_flight: 128,
        in_flight_limit: 256,
        queued_tokens: 10_000,
        queued_tokens_limit: 262_144,
        tenant_in_flight: 4,
        tenant_queued_tokens: 800,
    }
}

/// Requests with these numbers, as a scheduler sees them.
#[must_use]
pub fn sequences(ids: Range<u64>) -> SequenceColumns {
    let mut columns = SequenceColumns::default();
    ids.for_each(|id| add(&mut columns, id));
    columns
}

/// Adds the request of that number.
pub fn add(columns: &mut SequenceColumns, id: u64) {
    let spread = u32::try_from(id * 37 % 400).unwrap_or(0);
    columns.id.push(id);
    columns.prompt_tokens.push(16 + spread);
    columns.cached_tokens.push(0);
    columns.computed_tokens.push(0);
    columns.generated_tokens.push(0);
    columns.max_new_tokens.push(16 + spread / 2);
    columns.held_blocks.push(0);
    columns.priority.push(u8::try_from(id % 4).unwrap_or(0));
    columns.tenant.push(1);
    columns.arrived.push(id * 10);
    columns.deadline.push(0);
    columns.prefix.push(id % 8);
    columns.session.push(id % 64);
}

/// So many cached blocks of prompts of eight blocks, least recently used first, of four tenants that are named.
#[must_use]
pub fn blocks(n: u64) -> BlockColumns {
    let mut columns = BlockColumns::with_room();
    for i in 0..n {
        let depth = u32::try_from(7 - i % 8).unwrap_or(0);
        columns.prefix.push(mixed(i));
        columns.depth.push(depth);
        columns.children.push(u32::from(depth < 7));
        columns.last_used.push(1 + i / 8 * 1_000);
        columns.created.push(1 + i / 16 * 1_000);
        columns.hits.push(u32::try_from(i * 7 % 5).unwrap_or(0));
        columns.tenant.push(u32::try_from(1 + i / 8 % 4).unwrap_or(1));
    }
    columns.new_tenants.extend((1..=4).map(|tenant| (tenant, Arc::from(format!("tenant-{tenant}")))));
    columns
}

/// A request that starts to generate, from its number.
#[must_use]
pub fn started(number: u64) -> Started {
    Started {
        id: RequestId(number),
        tenant: "bench".into(),
        stop_tokens: Arc::from([2]),
        prompt_tokens: 200,
        max_new_tokens: 64,
        attributes: Arc::from([]),
        said: Vec::new(),
    }
}

/// So many events of all kinds in turn, from the first token on; the host leaves out those that a hook does not want.
#[must_use]
pub fn events(n: u64) -> Vec<Event> {
    let kinds = EventKind::ALL.into_iter().cycle().skip(EventKind::FirstToken as usize);
    (0..n).zip(kinds).map(|(i, kind)| Event { request: i + 1, a: i * 100, ..Event::new(i + 1, kind) }).collect()
}

/// Bits that differ everywhere, as in the host.
fn mixed(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
