//! Scheduler: critical before high before normal before low, first come first served within a class, with aging.
//!
//! A request's key is its arrival plus a handicap of `aging_ms` per class below critical, smallest first: whoever waits that
//! long rises by a class. All who wait age at the same rate, so keys are fixed at arrival and a step costs
//! O(changes * log n). Strict classes (an aging of hours) starve the low ones whenever the rest fills the replica; separate
//! queues with shares per class need a tuning that nobody does.
//!
//! When memory is short the last in this order is put back first. With `preempt` a full batch makes room, too: running
//! requests of a lower class than the best waiting one are offered, lowest first. Off by default, because what a preempted
//! request has computed is thrown away. Classes are compared as they were given, not as they aged, so that two requests
//! never preempt each other in turn.
//!
//! With `max_waiting`, a longer queue refuses the last in this order: under overload the low classes get the refusals, and
//! not whoever happens to come when the host's queue is full.
//!
//! Configuration: `aging_ms` (2000), `preempt` (false), `max_waiting` (0: the host's own limit). Keep `max_waiting` below the
//! host's `sched.max_waiting`, and three times `aging_ms` below its `sched.starvation_ms`: whom the host rescues goes before
//! everybody, critical ones too.

use pointsman_plugin::{Budgets, Changes, HostInfo, Manifest, Micros, Plan};
use pointsman_plugin::{Policy, Queue, RequestId, Scheduler, Sequence, View};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    aging_ms: u32,
    preempt: bool,
    max_waiting: u32,
}

/// Aged arrival, and the class that was given (0 critical to 3 low).
type Key = (Micros, u8);

/// The policy.
#[derive(Debug)]
pub struct Priorities {
    config: Config,
    queue: Queue<Key>,
}

pointsman_plugin::scheduler!(Priorities);

impl Default for Config {
    fn default() -> Self {
        Self { aging_ms: 2_000, preempt: false, max_waiting: 0 }
    }
}

impl Config {
    fn key(&self, sequence: &Sequence) -> Key {
        let handicap = u64::from(sequence.priority) * u64::from(self.aging_ms) * 1_000;
        (sequence.arrived.saturating_add(handicap), sequence.priority)
    }
}

impl Policy for Priorities {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { config, queue: Queue::default() })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Scheduler for Priorities {
    fn resync(&mut self, view: &View) {
        self.queue.resync(view, |sequence| self.config.key(sequence));
    }

    fn step(&mut self, _now: Micros, budgets: &Budgets, changes: &Changes) -> Option<Plan> {
        self.queue.apply(changes, |sequence| self.config.key(sequence));
        let mut plan = self.queue.plan(budgets);
        plan.drop = self.overflow();
        if self.config.preempt
            && plan.admit.is_empty()
            && let Some(((_, class), id)) = self.queue.waiting().next()
        {
            // One per step: the next step sees what came of it.
            let lower = self.queue.running().rev().filter(|((_, running), _)| *running > class);
            plan.preempt = lower.map(|(_, id)| id).collect();
            plan.admit.extend((!plan.preempt.is_empty()).then_some(id));
        }
        Some(plan)
    }
}

impl Priorities {
    /// Waiting requests beyond `max_waiting`, the last in line first.
    fn overflow(&self) -> Vec<RequestId> {
        let limit = self.config.max_waiting as usize;
        let excess = if limit == 0 { 0 } else { self.queue.waiting().len().saturating_sub(limit) };
        self.queue.waiting().rev().take(excess).map(|(_, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{arrivals, budgets, sequence, start, view};

    const SECOND: u64 = 1_000_000;
    const CRITICAL: u8 = 0;
    const HIGH: u8 = 1;
    const NORMAL: u8 = 2;
    const LOW: u8 = 3;

    fn of(id: u64, arrived: u64, priority: u8) -> Sequence {
        Sequence { arrived, priority, ..sequence(id) }
    }

    fn plan(config: &str, places: u32, waiting: &[Sequence], running: &[Sequence]) -> Plan {
        let mut policy: Priorities = start(config).expect("a valid configuration");
        policy.resync(&view(1, places, waiting, running));
        policy.step(2, &budgets(places), &arrivals([])).expect("a plan")
    }

    #[test]
    fn classes_go_first_and_age() {
        let queue = |low_since| [of(1, low_since, LOW), of(2, 40 * SECOND, HIGH), of(3, 40 * SECOND, CRITICAL)];
        for (config, low_since, expect) in [
            ("", 39 * SECOND, [3, 2, 1]),
            ("", 35 * SECOND, [3, 1, 2]),
            ("", 33 * SECOND, [1, 3, 2]),
            (r#"{"aging_ms": 10000}"#, 33 * SECOND, [3, 2, 1]),
        ] {
            assert_eq!(plan(config, 8, &queue(low_since), &[]).admit, expect, "{config} {low_since}");
        }
        assert_eq!(plan("", 8, &[of(7, 9, NORMAL), of(8, 4, NORMAL)], &[]).admit, [8, 7], "in order within a class");
    }

    #[test]
    fn a_full_batch_makes_room_only_when_told_to_and_only_for_a_higher_class() {
        let running = [of(1, 1, NORMAL), of(2, 2, LOW), of(3, 3, HIGH)];
        let preempts = r#"{"preempt": true}"#;
        for (config, class, admit, preempt) in [
            ("", CRITICAL, vec![], vec![2, 1, 3]),
            (preempts, CRITICAL, vec![9], vec![2, 1, 3]),
            (preempts, HIGH, vec![9], vec![2, 1]),
            (preempts, LOW, vec![], vec![]),
        ] {
            let plan = plan(config, 3, &[of(9, 4, class)], &running);
            assert_eq!((plan.admit, plan.preempt), (admit, preempt), "{config} {class}");
        }
        let with_room = plan(preempts, 4, &[of(9, 4, NORMAL)], &running);
        assert_eq!((with_room.admit, with_room.preempt), (vec![9], vec![2]), "for memory, those who stand behind it");
    }

    #[test]
    fn a_long_queue_refuses_the_last_in_line() {
        let queue = [of(1, 1, LOW), of(2, 2, CRITICAL), of(3, 3, NORMAL), of(4, 4, LOW), of(5, 5, HIGH)];
        for (config, refused) in
            [("", vec![]), (r#"{"max_waiting": 3}"#, vec![4, 1]), (r#"{"max_waiting": 5}"#, vec![])]
        {
            assert_eq!(plan(config, 0, &queue, &[]).drop, refused, "{config}");
        }
    }
}
