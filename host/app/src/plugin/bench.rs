//! `pointsman plugin bench`: what one call costs, next to the same decision in the host's own code, in one run.
//!
//! Inputs are made up and the same for every policy, so that two policies can be compared; whole calls are timed, with taking
//! an instance, lowering, the guest, the check of its answer, and metrics. Calls of a microsecond are timed one by one, the
//! clock's own cost (about 20 ns) included. A row ends after so many calls or a second, whichever comes first.

use std::io::Write;
use std::path::Path;

use anyhow::bail;
use pointsman_policy::{Budgets as CallBudgets, Component, Slot, World};
use pointsman_sched::batch::{Attention, BatchPolicy, Budgets, Changes, Plan, SequenceColumns, View};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{NativeRouter, ReplicaColumns, RequestNumbers, RoutePolicy, RouteRequest, resolve};
use pointsman_telemetry::{Event, EventKind, Names};

use super::host::{Trial, read};
use super::native::HostOrder;
use crate::cli::TrialArgs;
use crate::clock::SystemClock;

/// Rows of the table, by hook.
const REPLICAS: [u32; 3] = [1, 8, 64];
const WAITING: [u64; 3] = [16, 128, 1_024];
const EVENTS: [u64; 3] = [1, 64, 1_024];
/// The first calls of a row warm caches up and are left out: one in so many.
const WARM_UP: usize = 10;
/// Longest time for one row, in nanoseconds.
const ROW_NS: u64 = 1_000_000_000;
/// Arrivals, admissions and departures of a scheduling step.
const DELTAS: u64 = 16;

/// Percentiles of one row, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    p50: u64,
    p99: u64,
}

struct Bench<'a> {
    trial: Trial,
    clock: SystemClock,
    component: Component,
    with: &'a TrialArgs,
    calls: u32,
    generation: u64,
    out: &'a mut dyn Write,
}

/// Times a component at three sizes of input and prints a table.
///
/// # Errors
/// The component is refused, or faults on these inputs.
pub(crate) fn bench(path: &Path, with: &TrialArgs, calls: u32, out: &mut dyn Write) -> anyhow::Result<()> {
    let trial = Trial::new(&with.labels)?;
    let component = trial.runtime.admit(&read(path)?)?;
    let mut bench = Bench { trial, clock: SystemClock::start(), component, with, calls, generation: 0, out };
    let budgets = CallBudgets::default();
    match bench.component.world {
        World::Router => {
            bench.title("replicas", budgets.route.soft)?;
            REPLICAS.into_iter().try_for_each(|rows| bench.router(rows))
        }
        World::Scheduler => {
            bench.title("waiting", budgets.step.soft)?;
            WAITING.into_iter().try_for_each(|rows| bench.scheduler(rows))
        }
        World::Telemetry => {
            bench.title("events", budgets.on_events.soft)?;
            EVENTS.into_iter().try_for_each(|rows| bench.telemetry(rows))
        }
        other => bail!("a {other} cannot be timed: routers, schedulers and telemetry hooks can"),
    }
}

impl Bench<'_> {
    fn title(&mut self, unit: &str, soft_us: u64) -> anyhow::Result<()> {
        writeln!(self.out, "one call of a {}; soft budget {}", self.component.world, readable(soft_us * 1_000))?;
        let columns = ["policy p50", "p99", "native p50", "p99"];
        let [a, b, c, d] = columns;
        writeln!(self.out, "{unit:>10} {a:>12} {b:>10} {c:>12} {d:>10}")?;
        Ok(())
    }

    fn row(&mut self, rows: u64, slot: &dyn Slot, policy: Cost, native: Option<Cost>) -> anyhow::Result<()> {
        let (p50, p99) = native.map_or(("-".into(), "-".into()), |cost| (readable(cost.p50), readable(cost.p99)));
        writeln!(self.out, "{rows:>10} {:>12} {:>10} {p50:>12} {p99:>10}", readable(policy.p50), readable(policy.p99))?;
        match slot.status().last_fault {
            Some(fault) => bail!("the policy faulted with {rows} rows: {}: {}", fault.kind.as_str(), fault.message),
            None => Ok(()),
        }
    }

    /// Makes the component the slot's next generation.
    fn publish(&mut self, slot: &dyn Slot) -> anyhow::Result<()> {
        self.generation += 1;
        slot.publish(self.trial.prepare(&self.component, &self.with.config, self.generation)?)?;
        Ok(())
    }

    /// Times `call`, which is given a number that counts up.
    fn time(&self, mut call: impl FnMut(u64)) -> Cost {
        let mut samples = Vec::with_capacity(self.calls as usize);
        let start = self.clock.nanos();
        let mut before = start;
        for number in 1..=u64::from(self.calls) {
            if before - start > ROW_NS {
                break;
            }
            before = self.clock.nanos();
            call(number);
            samples.push(self.clock.nanos() - before);
        }
        percentiles(samples)
    }

    fn router(&mut self, rows: u32) -> anyhow::Result<()> {
        let slot = self.trial.runtime.router_slot("router");
        self.publish(&*slot)?;
        let columns = replicas(rows, &self.with.labels);
        let decide = |policy: &dyn RoutePolicy, seed: u64| {
            let routed = policy.route(seed, &request(seed), &columns);
            std::hint::black_box(resolve(&routed.choice, &columns, seed, |_| true));
        };
        let policy = self.time(|seed| decide(&*slot, seed));
        let native = self.time(|seed| decide(&NativeRouter, seed));
        self.row(rows.into(), &*slot, policy, Some(native))
    }

    fn scheduler(&mut self, waiting: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.scheduler_slot("scheduler");
        let mut guest = slot.attach("bench");
        self.publish(&*slot)?;
        let policy = self.steady(&mut guest, waiting);
        let native = self.steady(&mut HostOrder::default(), waiting);
        self.row(waiting, &*slot, policy, Some(native))
    }

    /// Steps of a steady load: in each, 16 have arrived, the 16 admitted before are running, the 16 before those are gone.
    fn steady(&self, policy: &mut dyn BatchPolicy, waiting: u64) -> Cost {
        let view = (sequences(1..waiting + 1), SequenceColumns::default());
        let tenants = [(1, "bench".into())];
        if policy.attend(1) == Attention::NeedsView {
            policy.resync(&View {
                now: 1,
                seed: 1,
                budgets: &BUDGETS,
                tenants: &tenants,
                waiting: &view.0,
                running: &view.1,
            });
        }
        let (mut changes, mut plan) = (Changes::default(), Plan::default());
        let mut running = Vec::new();
        let mut next = waiting + 1;
        let mut samples = Vec::with_capacity(self.calls as usize);
        let start = self.clock.nanos();
        for step in 0..u64::from(self.calls) {
            plan.clear();
            let before = self.clock.nanos();
            if policy.attend(step + 2) != Attention::Following || before - start > ROW_NS {
                break;
            }
            policy.step(step + 2, &BUDGETS, &changes, &mut plan);
            samples.push(self.clock.nanos() - before);
            changes.clear();
            changes.gone.append(&mut running);
            running.extend(plan.admit.iter().take(DELTAS as usize));
            changes.admitted.extend(&running);
            (0..DELTAS).for_each(|i| add(&mut changes.arrived, next + i));
            next += DELTAS;
        }
        percentiles(samples)
    }

    fn telemetry(&mut self, events: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.telemetry_slot(super::project::trial_slot(World::Telemetry));
        self.publish(&*slot)?;
        let names = Names::default();
        // All kinds in turn, from the first token on; the host leaves out those that the hook does not want.
        let kinds = EventKind::ALL.into_iter().cycle().skip(EventKind::FirstToken as usize).zip(0..events);
        let batch: Vec<Event> =
            kinds.map(|(kind, i)| Event { request: i + 1, a: i * 100, ..Event::new(i + 1, kind) }).collect();
        let policy = self.time(|now| drop(slot.on_events(now, &batch, &names, 0)));
        self.row(events, &*slot, policy, None)
    }
}

/// Median and 99th percentile of all but the first tenth.
fn percentiles(mut samples: Vec<u64>) -> Cost {
    samples.drain(..samples.len() / WARM_UP);
    samples.sort_unstable();
    let at = |percent: usize| samples.get(samples.len() * percent / 100).copied().unwrap_or(0);
    Cost { p50: at(50), p99: at(99) }
}

/// Nanoseconds in the unit that people read.
fn readable(nanos: u64) -> String {
    let value = nanos as f64;
    match nanos {
        0..=999 => format!("{nanos} ns"),
        1_000..=999_999 => format!("{:.2} us", value / 1e3),
        _ => format!("{:.2} ms", value / 1e6),
    }
}

// === made-up inputs ===

const BUDGETS: Budgets = Budgets {
    step_tokens: 512,
    running: 64,
    free_blocks: 4_096,
    total_blocks: 8_192,
    block_tokens: 16,
    last_step: 4_000,
    last_step_tokens: 64,
};

fn replicas(n: u32, labels: &[String]) -> ReplicaColumns {
    let same = |value: u64| vec![value; n as usize];
    let column = |f: fn(u32) -> u32| (0..n).map(f).collect::<Vec<u32>>();
    ReplicaColumns {
        id: column(|i| i),
        key: (0..n).map(|i| u64::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect(),
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
        labels: labels.iter().map(|label| (label.as_str().into(), same(1))).collect(),
    }
}

fn request(seed: u64) -> RouteRequest<'static> {
    RouteRequest {
        id: RequestId(seed),
        model: "demo",
        tenant: "bench",
        tenant_id: 1,
        session: seed % 64,
        prefix: 7,
        priority: Priority::Normal,
        prompt_tokens: 200,
        max_new_tokens: 64,
        arrived: 1,
        deadline: 0,
        // All bits, as in the host.
        seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        numbers: RequestNumbers::default(),
        attributes: &[],
    }
}

fn sequences(ids: std::ops::Range<u64>) -> SequenceColumns {
    let mut columns = SequenceColumns::default();
    ids.for_each(|id| add(&mut columns, id));
    columns
}

fn add(columns: &mut SequenceColumns, id: u64) {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_size_and_a_fault_is_named() {
        let prebuilt =
            |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../plugins/prebuilt/{name}.wasm"));
        for (name, config, sizes, fault) in [
            ("route-least-loaded", json!({}), [" 1 ", " 8 ", " 64 "], None),
            ("sched-fcfs", json!({}), [" 16 ", " 128 ", " 1024 "], None),
            ("hook-slo-log", json!({}), [" 1 ", " 64 ", " 1024 "], None),
            ("fixture-router", json!({ "do": "trap", "after": 40 }), [" 1 "; 3], Some("trap")),
        ] {
            let mut said = Vec::new();
            let outcome = bench(&prebuilt(name), &TrialArgs { config, labels: Vec::new() }, 100, &mut said);
            let said = String::from_utf8_lossy(&said).into_owned();
            assert!(sizes.iter().all(|size| said.contains(size)), "{name}: {said}");
            match (outcome, fault) {
                (Ok(()), None) => {}
                (Err(error), Some(fault)) => assert!(error.to_string().contains(fault), "{name}: {error}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn percentiles_are_those_of_the_samples() {
        assert_eq!(percentiles((1..=1_000).collect()), Cost { p50: 551, p99: 992 });
        assert_eq!(percentiles(Vec::new()), Cost { p50: 0, p99: 0 });
    }
}
