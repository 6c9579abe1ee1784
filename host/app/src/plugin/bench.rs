//! `pointsman plugin bench`: what one call costs, next to the same decision in the host's own code, in one run.
//!
//! Inputs are made up and the same for every policy, so that two policies can be compared; whole calls are timed, with taking
//! an instance, lowering, the guest, the check of its answer, and metrics. Calls of a microsecond are timed one by one, the
//! clock's own cost (about 20 ns) included. A row ends after so many calls or a second, whichever comes first.

use std::io::Write;
use std::path::Path;

use anyhow::bail;
use pointsman_policy::{Budgets as CallBudgets, Component, SampledReplica, Slot, World};
use pointsman_sched::admit::{AdmitAll, AdmitPolicy};
use pointsman_sched::batch::{Attention, BatchPolicy, Changes, Plan, SequenceColumns, View};
use pointsman_sched::ids::RequestId;
use pointsman_sched::retention::{NativeRetention, Ranking, RetentionPolicy, check_ranking};
use pointsman_sched::route::{NativeRouter, RoutePolicy, resolve};
use pointsman_sched::sampler::{Batch, NativeSampler, SamplerWorker, Word};
use pointsman_telemetry::Names;

use super::host::{Trial, read};
use super::inputs::{
    self, BUDGETS, DELTAS, VOCABULARY, add, admit_request, blocks, events, replicas, request, sequences, started,
};
use super::native::HostOrder;
use crate::cli::TrialArgs;
use crate::clock::SystemClock;

/// Rows of the table, by hook.
const REPLICAS: [u32; 3] = [1, 8, 64];
const WAITING: [u64; 3] = [16, 128, 1_024];
const EVENTS: [u64; 3] = [1, 64, 1_024];
const TENANTS: [u64; 3] = [1, 8, 64];
const BLOCKS: [u64; 3] = [16, 128, 1_024];
const SAMPLED: [u64; 3] = [1, 8, 64];
/// The first calls of a row warm caches up and are left out: one in so many.
const WARM_UP: usize = 10;
/// Longest time for one row, in nanoseconds.
const ROW_NS: u64 = 1_000_000_000;
/// Waits of a sampler's port, of tens of milliseconds each, for a reply.
const PATIENCE: u32 = 1_000;
/// Blocks that the host says it needs.
const WANTED: u32 = 16;

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
    let trial = Trial::patient(&with.labels)?;
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
        World::Admission => {
            bench.title("tenants", budgets.admit.soft)?;
            TENANTS.into_iter().try_for_each(|rows| bench.admission(rows))
        }
        World::Retention => {
            bench.title("blocks", budgets.rank.soft)?;
            BLOCKS.into_iter().try_for_each(|rows| bench.retention(rows))
        }
        World::Sampler => {
            bench.title("requests", budgets.edit.soft)?;
            SAMPLED.into_iter().try_for_each(|rows| bench.sampler(rows))
        }
    }
}

impl Bench<'_> {
    fn title(&mut self, unit: &str, soft_us: u64) -> anyhow::Result<()> {
        let world = self.component.world;
        let article = if world == World::Admission { "an" } else { "a" };
        writeln!(self.out, "one call of {article} {world}; soft budget {}", readable(soft_us * 1_000))?;
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

    fn telemetry(&mut self, events_n: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.telemetry_slot(super::project::trial_slot(World::Telemetry));
        self.publish(&*slot)?;
        let (names, batch) = (Names::default(), events(events_n));
        let policy = self.time(|now| drop(slot.on_events(now, &batch, &names, 0)));
        self.row(events_n, &*slot, policy, None)
    }

    /// Requests of so many tenants in turn, at a door that is half full.
    fn admission(&mut self, tenants: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.admission_slot("admission");
        self.publish(&*slot)?;
        let (names, load) = (inputs::tenants(tenants), inputs::load());
        let ask = |policy: &dyn AdmitPolicy, number: u64| {
            if !policy.is_native() {
                drop(policy.admit(number, &admit_request(number, &names), &load));
            }
        };
        let policy = self.time(|number| ask(&*slot, number));
        let native = self.time(|number| ask(&AdmitAll, number));
        self.row(tenants, &*slot, policy, Some(native))
    }

    /// The same blocks again and again; their tenants are named once.
    fn retention(&mut self, n: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.retention_slot("kv-retention");
        let mut guest = slot.attach(&"bench".into());
        self.publish(&*slot)?;
        let policy = self.ranked(&mut guest, n);
        let native = self.ranked(&mut NativeRetention, n);
        self.row(n, &*slot, policy, Some(native))
    }

    fn ranked(&self, policy: &mut dyn RetentionPolicy, n: u64) -> Cost {
        let (mut blocks, mut ranking, mut seen) = (blocks(n), Ranking::default(), Vec::new());
        let names = std::mem::take(&mut blocks.new_tenants);
        self.time(|now| match policy.attend(now) {
            Attention::Native => {}
            attention => {
                ranking.clear();
                blocks.new_tenants = if attention == Attention::NeedsView { names.clone() } else { Vec::new() };
                if policy.rank(now, WANTED, &blocks, &mut ranking)
                    && let Err(why) = check_ranking(&ranking, blocks.len(), &mut seen)
                {
                    policy.refused(now, why);
                }
            }
        })
    }

    /// A token for each of so many requests, from the driver's hands into its hands again; those that the policy leaves start
    /// anew.
    fn sampler(&mut self, n: u64) -> anyhow::Result<()> {
        let slot = self.trial.runtime.sampler_slot("sampler");
        let replica = SampledReplica { name: "bench".into(), variant: "demo:f16".into(), vocabulary: VOCABULARY };
        let mut port = slot.attach(replica)?;
        self.publish(&*slot)?;
        let policy = self.sampled(&mut port, n);
        let native = self.sampled(&mut NativeSampler, n);
        self.row(n, &*slot, policy, Some(native))
    }

    fn sampled(&self, worker: &mut dyn SamplerWorker, n: u64) -> Cost {
        let mut left: Vec<u64> = (1..=n).collect();
        self.time(|now| {
            if worker.attend(now).is_none() {
                return;
            }
            let tokens = (1..=n).filter(|id| !left.contains(id)).map(|id| (RequestId(id), token(now, id)));
            let batch = Batch {
                now,
                tokens: tokens.collect(),
                started: left.iter().copied().map(started).collect(),
                ..Batch::default()
            };
            let sent = worker.send(batch).is_ok();
            // Whoever is late gets a word all the same.
            let reply = (0..PATIENCE).find_map(|_| if sent { worker.wait() } else { None }).unwrap_or_default();
            left.clear();
            left.extend(reply.words.iter().filter(|(_, word)| *word == Word::Leave).map(|(id, _)| id.0));
        })
    }
}

/// The token that a request gets at that turn.
fn token(turn: u64, id: u64) -> u32 {
    u32::try_from((turn * 31 + id) % u64::from(VOCABULARY)).unwrap_or(0)
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
            ("admit-token-bucket", json!({}), [" 1 ", " 8 ", " 64 "], None),
            ("kv-lru-with-pins", json!({ "min_hits": 2 }), [" 16 ", " 128 ", " 1024 "], None),
            ("sampler-allowlist", json!({ "allow": [7] }), [" 1 ", " 8 ", " 64 "], None),
            ("sampler-allowlist", json!({}), [" 1 ", " 8 ", " 64 "], None),
            ("fixture-retention", json!({ "do": "trap", "after": 40 }), [" 16 "; 3], Some("trap")),
            ("fixture-sampler", json!({ "do": "trap", "after": 40 }), [" 1 "; 3], Some("trap")),
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
