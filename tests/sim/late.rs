//! A guest over its soft budget: it computes aside, and its plans come back at moments that the seed decides.
//!
//! The soft budget is nothing, so that every machine finds every call too slow; and maintenance is by hand, so that it is the
//! operator of the history who lets the guest finish, now or many steps later.

use pointsman_policy::{Activation, BudgetChange, SchedulerGuest, Slot};
use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, View};
use pointsman_sched::ids::Micros;

use crate::guests::{Host, Role, SLOT};
use crate::rng::Rng;
use crate::world::{Options, Report, run};

/// What is counted besides the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lateness {
    pub(crate) late_plans: u64,
    pub(crate) fallbacks: u64,
    pub(crate) faults: u64,
}

struct Late {
    host: &'static Host,
    guest: SchedulerGuest,
    rng: Rng,
    /// Chance in a million, per boundary, that the guest is done.
    done_ppm: u64,
}

/// Lives a history with `role` computing aside.
pub(crate) fn run_late(seed: u64, role: &Role, options: &Options) -> (Report, Lateness) {
    let host = Host::get();
    let _turn = host.turn();
    let slot = host.runtime.scheduler_slot(SLOT);
    let guest = slot.attach("replica-0");
    let budget = BudgetChange { soft: Some(0), hard: Some(1_000_000), memory_bytes: None };
    let activation = Activation { budget, ..role.activation(1) };
    let prepared = host.runtime.prepare(host.component(role.guest), activation).expect("a guest that starts");
    slot.publish(prepared).expect("the first generation");
    let mut rng = Rng::new(seed ^ 0x6c61_7465_0000_0000);
    let done_ppm = rng.pick(&[150_000, 500_000, 900_000]);
    let report = run(seed, Box::new(Late { host, guest, rng, done_ppm }), options);
    let status = slot.status();
    slot.publish_native(2).expect("the newest generation");
    host.runtime.maintain();
    assert_eq!(slot.status().draining, 0, "seed {seed}: a task outlives its replica");
    let Some(faults) = status.faults.into_iter().reduce(|a, b| a + b) else { unreachable!("five kinds") };
    (report, Lateness { late_plans: status.late_plans, fallbacks: status.fallbacks, faults })
}

impl Late {
    fn moment(&mut self, now: Micros) {
        self.host.set_clock(now);
        if self.rng.chance(self.done_ppm) {
            self.host.runtime.maintain();
        }
    }
}

impl BatchPolicy for Late {
    fn attend(&mut self, now: Micros) -> Attention {
        self.moment(now);
        self.guest.attend(now)
    }

    fn generation(&self) -> u64 {
        self.guest.generation()
    }

    fn wants_progress(&self) -> bool {
        self.guest.wants_progress()
    }

    fn resync(&mut self, view: &View<'_>) {
        self.guest.resync(view);
    }

    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        self.guest.step(now, budgets, changes, plan)
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        self.moment(now);
        self.guest.refused(now, why);
    }

    fn stood_in(&mut self) {
        self.guest.stood_in();
    }
}
