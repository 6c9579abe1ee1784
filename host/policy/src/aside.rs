//! Where a scheduler guest computes that is over its soft budget: on a thread of its own, so that the device does not wait.
//!
//! The instance itself travels. A task takes it there with the changes (after a swap or a fault, with the view), and brings it
//! back with the plan, so that one thread at a time touches it and a driver only has to look whether it is there. The plan is
//! used at the boundary that finds it, one step late or more; until then the native policy decides, and the scheduler keeps
//! what changes. Whoever loses interest (a swap, a replica that goes) drops its end: the task then gives the instance back,
//! unless a plan of it was refused.
//!
//! Not a limit on how often the guest is asked: a guest that needs a millisecond for a good plan is worth having it, late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use pointsman_sched::batch::{Budgets as StepBudgets, Changes, Plan, SequenceColumns, View};
use pointsman_telemetry::Micros;

use crate::engine::cpu_ns;
use crate::fault::{Call, Fault};
use crate::generation::Guest;
use crate::instance::Instance;
use crate::scheduler::{Asked, SchedulerHook, resync, step};
use crate::slot::Stay;

/// Calls over the soft budget, of the last eight, that move a guest aside. It comes back when there are none.
const SLOW_CALLS: u32 = 3;

/// Which of a guest's last calls were over its soft budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pace {
    /// The last call in the lowest bit.
    over: u8,
}

/// Where an instance is asked, by whoever has it now.
pub(crate) struct Seat<'a> {
    pub(crate) guest: &'a Guest<SchedulerHook>,
    pub(crate) instance: &'a mut Option<Box<Instance<SchedulerHook>>>,
    pub(crate) pace: &'a mut Pace,
}

/// A [`View`] that outlives the boundary.
pub(crate) struct OwnedView {
    now: Micros,
    seed: u64,
    budgets: StepBudgets,
    tenants: Vec<(u32, Arc<str>)>,
    waiting: SequenceColumns,
    running: SequenceColumns,
}

/// One question, on its way.
pub(crate) struct Task {
    /// The replica, which may find its instance again where nobody waits for the task.
    pub(crate) owner: Arc<str>,
    pub(crate) stay: Arc<Stay<SchedulerHook>>,
    pub(crate) instance: Option<Box<Instance<SchedulerHook>>>,
    pub(crate) pace: Pace,
    /// Told first, where the guest starts anew.
    pub(crate) view: Option<OwnedView>,
    pub(crate) now: Micros,
    pub(crate) budgets: StepBudgets,
    pub(crate) changes: Changes,
    /// What came of it.
    pub(crate) answer: Answered,
    /// An earlier plan of the instance was refused meanwhile: it is not asked again.
    pub(crate) doomed: Arc<AtomicBool>,
}

/// What a guest said.
#[derive(Debug, Default)]
pub(crate) enum Answered {
    /// Nothing (yet), or it faulted.
    #[default]
    Nothing,
    /// That the native policy may decide.
    NoPlan,
    /// This.
    Plan(Plan),
}

/// The driver's end of the thread.
pub(crate) struct Aside {
    stay: Arc<Stay<SchedulerHook>>,
    todo: SyncSender<Task>,
    done: Receiver<Task>,
    is_out: bool,
    /// Of the task that is out.
    doomed: Arc<AtomicBool>,
}

/// The thread ended in a panic.
#[derive(Debug)]
pub(crate) struct Gone;

// === impl Pace ===

impl Pace {
    fn note(&mut self, over: bool) {
        self.over = (self.over << 1) | u8::from(over);
    }

    pub(crate) fn is_slow(self) -> bool {
        self.over.count_ones() >= SLOW_CALLS
    }

    pub(crate) fn is_quick(self) -> bool {
        self.over == 0
    }
}

// === impl Seat ===

impl Seat<'_> {
    /// Makes one call, and notes whether it was over the soft budget by the guest's own time.
    fn call<R>(
        &mut self,
        call: Call,
        now: Micros,
        work: impl FnOnce(&mut Instance<SchedulerHook>, Micros) -> Result<R, Fault>,
    ) -> Option<R> {
        let budgets = self.guest.budgets();
        let budget = if call == Call::Resync { budgets.resync } else { budgets.step };
        let started = cpu_ns();
        let answer = self.guest.call(self.instance, now, (call, budget), work);
        self.pace.note(cpu_ns() - started > budget.soft * 1_000);
        answer
    }

    /// Shows the view, where the guest starts anew, and asks for a plan.
    pub(crate) fn answer(&mut self, view: Option<OwnedView>, now: Micros, news: (&StepBudgets, &Changes)) -> Answered {
        let told = view.is_none_or(|view| self.resync(&view.view()));
        if told { self.step(now, news) } else { Answered::Nothing }
    }

    /// Shows the whole view; whether the guest took it.
    pub(crate) fn resync(&mut self, view: &View<'_>) -> bool {
        let wants = &self.guest.wants;
        self.call(Call::Resync, view.now, |instance, hard| resync(instance, hard, wants, view)).is_some()
    }

    /// Asks for a plan.
    pub(crate) fn step(&mut self, now: Micros, (budgets, changes): (&StepBudgets, &Changes)) -> Answered {
        let asked = Asked { wants: &self.guest.wants, budgets, changes };
        match self.call(Call::Step, now, |instance, hard| step(instance, hard, now, asked)) {
            Some(Some(plan)) => Answered::Plan(plan),
            Some(None) => Answered::NoPlan,
            None => Answered::Nothing,
        }
    }
}

// === impl Answered ===

impl Answered {
    /// Nobody will use it.
    pub(crate) fn forget(&mut self, guest: &Guest<SchedulerHook>) {
        if matches!(std::mem::take(self), Self::Plan(_)) {
            guest.came_too_late();
        }
    }
}

// === impl OwnedView ===

impl From<&View<'_>> for OwnedView {
    fn from(view: &View<'_>) -> Self {
        Self {
            now: view.now,
            seed: view.seed,
            budgets: *view.budgets,
            tenants: view.tenants.to_vec(),
            waiting: view.waiting.clone(),
            running: view.running.clone(),
        }
    }
}

impl OwnedView {
    pub(crate) fn view(&self) -> View<'_> {
        let Self { now, seed, budgets, tenants, waiting, running } = self;
        View { now: *now, seed: *seed, budgets, tenants, waiting, running }
    }
}

// === impl Task ===

impl Task {
    fn work(&mut self) {
        let Self { stay, instance, pace, .. } = self;
        let Some(guest) = &stay.guest else { return };
        let mut seat = Seat { guest, instance, pace };
        self.answer = seat.answer(self.view.take(), self.now, (&self.budgets, &self.changes));
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let Some(guest) = &self.stay.guest else { return };
        self.answer.forget(guest);
        let Some(instance) = self.instance.take() else { return };
        let is_wrong = std::thread::panicking() || self.doomed.load(Ordering::Relaxed);
        if is_wrong { guest.discard(instance) } else { guest.park(&self.owner, instance) }
    }
}

// === impl Aside ===

impl Aside {
    /// Starts the thread.
    pub(crate) fn hire(stay: &Arc<Stay<SchedulerHook>>) -> std::io::Result<Self> {
        let (finished, done) = sync_channel(1);
        let todo = stay.shared().hire("policy-aside", 1, move |mut task: Task| {
            task.work();
            // Where nobody waits for it any more, dropping it gives the instance back.
            drop(finished.send(task));
        })?;
        if let Some(guest) = &stay.guest {
            guest.aside.fetch_add(1, Ordering::Relaxed);
        }
        Ok(Self { stay: Arc::clone(stay), todo, done, is_out: false, doomed: Arc::default() })
    }

    /// Whether a task is out.
    pub(crate) fn is_out(&self) -> bool {
        self.is_out
    }

    /// The instance that is out gave a plan that was refused: whoever has it in the end lets go of it.
    pub(crate) fn doom(&self) {
        self.doomed.store(self.is_out, Ordering::Relaxed);
    }

    /// For the task that goes out next.
    pub(crate) fn doomed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.doomed)
    }

    /// Sends a task; only when none is out.
    pub(crate) fn send(&mut self, task: Task) {
        self.is_out = true;
        // Refused only by a thread that is gone, which the next `take` finds out.
        drop(self.todo.try_send(task));
    }

    /// The task that was out, if it is done.
    pub(crate) fn take(&mut self) -> Result<Option<Task>, Gone> {
        if !self.is_out {
            return Ok(None);
        }
        match self.done.try_recv() {
            Ok(task) => {
                self.is_out = false;
                Ok(Some(task))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Gone),
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some(guest) = &self.stay.guest {
            guest.aside.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_slow_calls_of_eight_move_a_guest_and_eight_quick_ones_bring_it_back() {
        for (calls, slow, quick) in [
            ("", false, true),
            ("xx", false, false),
            ("x.x.x", true, false),
            ("x.......xx", false, false),
            ("xxx.......", false, false),
            ("xxx........", false, true),
            ("xxxxxxxx.....", true, false),
        ] {
            let mut pace = Pace::default();
            calls.bytes().for_each(|call| pace.note(call == b'x'));
            assert_eq!((pace.is_slow(), pace.is_quick()), (slow, quick), "{calls}");
        }
    }
}
