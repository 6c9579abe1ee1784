//! Scheduler: first come, first served, strictly.
//!
//! Requests start in the order in which they arrived at the host; one that was preempted comes back to its old place, so
//! work that was thrown away is done again before newer work. When memory is short the youngest goes first. Nothing can
//! starve and nobody needs tuning; the price is the head of the line: a long prompt delays all short ones behind it
//! (`sched-shortest-first` is the other choice). A step costs O(changes * log n).
//!
//! Configuration: none.

use pointsman_plugin::{Budgets, Changes, HostInfo, Manifest, Micros, NoConfig, Plan};
use pointsman_plugin::{Policy, Queue, Scheduler, Sequence, View};

/// The policy.
#[derive(Debug)]
pub struct Fcfs {
    queue: Queue<Micros>,
}

pointsman_plugin::scheduler!(Fcfs);

fn arrived(sequence: &Sequence) -> Micros {
    sequence.arrived
}

impl Policy for Fcfs {
    type Config = NoConfig;

    fn init(_config: NoConfig, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { queue: Queue::default() })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Scheduler for Fcfs {
    fn resync(&mut self, view: &View) {
        self.queue.resync(view, arrived);
    }

    fn step(&mut self, _now: Micros, budgets: &Budgets, changes: &Changes) -> Option<Plan> {
        self.queue.apply(changes, arrived);
        Some(self.queue.plan(budgets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::Rest;
    use pointsman_plugin::testing::{arrivals, budgets, sequence, start, view};

    #[test]
    fn the_order_is_that_of_arrival() {
        let at = |id, arrived| Sequence { arrived, ..sequence(id) };
        let mut fcfs: Fcfs = start("").expect("no configuration");
        fcfs.resync(&view(10, 4, &[at(1, 5), at(2, 3)], &[at(3, 1)]));
        let mut step = |places, changes: Changes| fcfs.step(20, &budgets(places), &changes).expect("a plan");
        for (places, changes, admit, preempt) in [
            (4, arrivals([]), vec![2, 1], vec![]),
            (3, arrivals([at(4, 4)]), vec![2, 4], vec![]),
            (3, Changes { admitted: vec![2], ..arrivals([at(5, 2)]) }, vec![5], vec![2]),
            (2, arrivals([]), vec![], vec![2, 3]),
            (9, Changes { preempted: vec![2], gone: vec![3], ..arrivals([]) }, vec![5, 2, 4, 1], vec![]),
        ] {
            let plan = step(places, changes);
            assert_eq!((plan.admit, plan.preempt, plan.rest), (admit, preempt, Rest::Hold));
        }
    }
}
