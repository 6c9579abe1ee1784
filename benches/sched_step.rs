//! One scheduling step through the wasm boundary, with the deltas of a steady load: every step, 16 requests have arrived, the
//! 16 admitted before are running, the 16 before those are gone. Bar: 10 us per step, however many wait. The cost of the
//! boundary itself is in `call`.

use std::sync::Arc;
use std::time::Duration;

use pointsman::inputs::{BUDGETS, DELTAS, add, sequences};
use pointsman_benches::{each_call, header, now};
use pointsman_policy::{Activation, Runtime, RuntimeConfig, SchedulerGuest, Slot};
use pointsman_sched::batch::{Answer, Attention, BatchPolicy, Changes, Plan, SequenceColumns, View};
use pointsman_telemetry::{Metrics, Recorder};

struct Bench {
    runtime: Runtime,
    generation: u64,
}

impl Bench {
    /// A guest that follows, with `waiting` requests in its view.
    fn guest(&mut self, name: &str, config: &str, waiting: u64) -> SchedulerGuest {
        self.generation += 1;
        let slot = self.runtime.scheduler_slot("scheduler");
        let mut guest = slot.attach("bench");
        let path = pointsman_tests::root().join(format!("plugins/prebuilt/{name}.wasm"));
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let component = self.runtime.admit(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let generation = self.generation;
        let activation =
            Activation { slot: "scheduler".into(), generation, config: config.into(), ..Activation::default() };
        let prepared = self.runtime.prepare(&component, activation).unwrap_or_else(|e| panic!("{name}: {e}"));
        slot.publish(prepared).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(guest.attend(1), Attention::NeedsView);
        let tenants = [(1, "acme".into())];
        let (waiting, running) = (sequences(1..waiting + 1), SequenceColumns::default());
        guest.resync(&View {
            now: 1,
            seed: 1,
            budgets: &BUDGETS,
            tenants: &tenants,
            waiting: &waiting,
            running: &running,
        });
        assert_eq!(guest.attend(2), Attention::Following, "the resync was taken");
        guest
    }

    /// Steps with a steady load; the guest's own plan decides who is admitted.
    fn steady(&mut self, name: &str, waiting: u64) {
        let mut guest = self.guest(name, "{}", waiting);
        let mut next = waiting + 1;
        let mut changes = Changes::default();
        let mut plan = Plan::default();
        let mut running: Vec<u64> = Vec::new();
        let mut now = 2;
        let percentiles = each_call(2_000, 20_000, || {
            now += 1;
            plan.clear();
            let answer = guest.step(now, &BUDGETS, &changes, &mut plan);
            assert_eq!(answer, Answer::Planned);
            // What the host does with it, untimed parts included: they are the same small copies for every policy.
            changes.clear();
            changes.gone.append(&mut running);
            running.extend(plan.admit.iter().take(16));
            assert_eq!(running.len(), 16, "a steady load admits as many as arrive");
            changes.admitted.extend(&running);
            for _ in 0..DELTAS {
                add(&mut changes.arrived, next);
                next += 1;
            }
        });
        percentiles.print(&format!("{name}, {waiting} waiting, 16 deltas"), Some(Duration::from_micros(10)));
    }

    fn no_change(&mut self, name: &str) {
        let mut guest = self.guest(name, "{}", 1_024);
        let mut plan = Plan::default();
        let nothing = Changes::default();
        let percentiles = each_call(2_000, 20_000, || {
            plan.clear();
            guest.step(3, &BUDGETS, &nothing, &mut plan);
        });
        percentiles.print(&format!("{name}, 1024 waiting, no change"), None);
    }
}

fn main() {
    header("sched_step: one scheduling decision through the wasm boundary");
    let start = now();
    let clock = Arc::new(move || u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX) + 1);
    let config = RuntimeConfig { recycle_calls: u64::MAX, ..RuntimeConfig::default() };
    let runtime = Runtime::new(config, Arc::new(Metrics::new()), Recorder::new(1_024), clock);
    let mut bench = Bench { runtime: runtime.unwrap_or_else(|e| panic!("{e}")), generation: 0 };
    for name in ["sched-fcfs", "sched-shortest-first", "sched-priority"] {
        for waiting in [16, 128, 1_024] {
            bench.steady(name, waiting);
        }
        bench.no_change(name);
    }
}
