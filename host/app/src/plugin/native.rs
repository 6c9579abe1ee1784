//! The host's own order as a policy that can be asked: priority, then arrival.
//!
//! In the host nobody asks: its waiting queue is kept in this order and a step takes from the front. Here it stands beside a
//! guest, to be compared with it in time and in decisions, and so it follows the same deltas as the guest does.

use std::collections::{BTreeSet, HashMap};

use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, SequenceColumns, View};
use pointsman_telemetry::Micros;

/// Priority, arrival, id.
type Key = (u8, Micros, u64);

/// Who waits, in the host's order.
#[derive(Debug, Default)]
pub(crate) struct HostOrder {
    known: HashMap<u64, Key>,
    waiting: BTreeSet<Key>,
    synced: bool,
}

impl HostOrder {
    /// Whether a request waits.
    pub(crate) fn waits(&self, id: u64) -> bool {
        self.known.get(&id).is_some_and(|key| self.waiting.contains(key))
    }

    fn add(&mut self, rows: &SequenceColumns, waits: bool) {
        for row in 0..rows.len() {
            let key = (rows.priority[row], rows.arrived[row], rows.id[row]);
            self.known.insert(rows.id[row], key);
            if waits {
                self.waiting.insert(key);
            }
        }
    }
}

impl BatchPolicy for HostOrder {
    fn attend(&mut self, _now: Micros) -> Attention {
        if self.synced { Attention::Following } else { Attention::NeedsView }
    }

    fn generation(&self) -> u64 {
        0
    }

    fn resync(&mut self, view: &View<'_>) {
        (self.known, self.waiting, self.synced) = (HashMap::new(), BTreeSet::new(), true);
        self.add(view.waiting, true);
        self.add(view.running, false);
    }

    fn step(&mut self, _now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        for id in &changes.gone {
            if let Some(key) = self.known.remove(id) {
                self.waiting.remove(&key);
            }
        }
        let known = |id: &u64| self.known.get(id).copied();
        self.waiting.extend(changes.preempted.iter().filter_map(known));
        self.add(&changes.arrived, true);
        for key in changes.admitted.iter().filter_map(|id| self.known.get(id)) {
            self.waiting.remove(key);
        }
        let running = self.known.len() - self.waiting.len();
        let free = (budgets.running as usize).saturating_sub(running);
        plan.admit.extend(self.waiting.iter().take(free).map(|(.., id)| id));
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, _why: BadPlan) {}
}
