//! The scheduler's shadow: what a driver tells it, what it keeps of each replica, and how two plans compare.
//!
//! A scheduler is told what changes, so a shadow must hear everything or begin again. It follows a replica for a stretch of
//! steps, then rests for as long as its share says; a stretch begins with the whole view, which the scheduler shows it without
//! the active policy noticing. Where it falls behind, what it has heard is void, and it waits until there is room for a view.
//! A sample of single steps, each with a view of its own, would cost the driver a copy of every queue each time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use pointsman_sched::batch::{BadPlan, Budgets as StepBudgets, Changes, Plan, View};
use pointsman_telemetry::Micros;

use crate::aside::{Answered, OwnedView, Pace, Seat};
use crate::engine::stopwatch_ns;
use crate::fault::Call;
use crate::generation::Generation;
use crate::scheduler::{SchedulerHook, check_plan};
use crate::shadow::{Case, Post, Shadow, Verdict};

/// Steps that a shadow follows before it rests.
const STRETCH: u32 = 64;
/// Ids that have gone and that a plan may still name; as many as the scheduler remembers at least.
const REMEMBERED: usize = 1_024;

/// Ways in which two plans differ, in the order of [`SchedulerHook`]'s differences.
const OTHER_REFUSAL: usize = 0;
const OTHER_PREEMPTION: usize = 1;
const OTHER_ADMISSION: usize = 2;
const OTHER_PREFILL: usize = 3;

/// What a driver knows of the shadow of its replica.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    /// Whom it tells; another one begins anew. Not held, so that a replica without work does not keep one that has ended.
    shadow: Weak<Shadow<SchedulerHook>>,
    stage: Stage,
    /// Set by the shadow where what it hears in this stretch is void: it faulted, or was paused.
    lost: Arc<AtomicBool>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// It begins with a view, as soon as there is room for one.
    #[default]
    Begins,
    /// It hears of so many more steps.
    Follows(u32),
    /// It hears nothing for so many steps.
    Rests(u32),
}

/// What a driver tells.
pub(crate) struct SchedulerSample {
    replica: Arc<str>,
    news: News,
}

enum News {
    /// All there is, and where to say that it was lost.
    View(Box<OwnedView>, Arc<AtomicBool>),
    /// A step, and the plan that was used.
    Step(Box<Step>),
    /// The replica has gone.
    Gone,
}

struct Step {
    now: Micros,
    budgets: StepBudgets,
    changes: Changes,
    used: Plan,
}

/// What a stretch hears of.
pub(crate) struct Heard<'a> {
    pub(crate) now: Micros,
    pub(crate) budgets: &'a StepBudgets,
    pub(crate) changes: &'a Changes,
    /// What the active policy said to it.
    pub(crate) answer: &'a Answered,
}

/// What the shadow's thread keeps: a witness per replica.
pub(crate) type Witnesses = HashMap<Arc<str>, Witness>;

/// A guest that follows one replica.
pub(crate) struct Witness {
    post: Post<SchedulerHook>,
    /// Of no consequence here: its thread is its own.
    pace: Pace,
    /// Where the replica's driver looks whether this still follows.
    lost: Arc<AtomicBool>,
    /// Ids that a plan may name: of live requests, and of some that have gone.
    known: HashSet<u64>,
    gone: VecDeque<u64>,
}

// === impl Beside ===

impl Beside {
    fn meet(&mut self, shadow: &Arc<Shadow<SchedulerHook>>) {
        if !std::ptr::eq(self.shadow.as_ptr(), Arc::as_ptr(shadow)) {
            *self = Self { shadow: Arc::downgrade(shadow), ..Self::default() };
        }
    }

    /// The active policy was asked: tells of it, and of its answer.
    pub(crate) fn step(&mut self, shadow: &Arc<Shadow<SchedulerHook>>, replica: &Arc<str>, heard: Heard<'_>) {
        self.meet(shadow);
        let no_plan = Plan::default();
        let used = match heard.answer {
            // The active policy faulted, and is told everything anew.
            Answered::Nothing => return self.lose(),
            Answered::NoPlan => &no_plan,
            Answered::Plan(plan) => plan,
        };
        if matches!(self.stage, Stage::Follows(_)) && self.lost.load(Ordering::Relaxed) {
            // A guest that cannot begin must not cost a view at every step.
            self.stage = Stage::Rests(STRETCH);
        }
        self.stage = match self.stage {
            Stage::Begins => {
                if !shadow.case.is_at_leisure() {
                    shadow.case.drop_some(1);
                }
                Stage::Begins
            }
            Stage::Rests(0 | 1) => Stage::Begins,
            Stage::Rests(left) => Stage::Rests(left - 1),
            Stage::Follows(left) => {
                let Heard { now, budgets, changes, .. } = heard;
                let step = || Step { now, budgets: *budgets, changes: changes.clone(), used: used.clone() };
                match (tell(shadow, replica, n_ids(changes, used), || News::Step(Box::new(step()))), left) {
                    (false, _) => Stage::Begins,
                    (true, 1) => Stage::Rests(rest(shadow.case.share_ppm())),
                    (true, left) => Stage::Follows(left - 1),
                }
            }
        };
    }

    /// Whether it would begin here.
    pub(crate) fn wants_view(&mut self, shadow: &Arc<Shadow<SchedulerHook>>) -> bool {
        self.meet(shadow);
        self.stage == Stage::Begins && shadow.case.is_at_leisure()
    }

    /// Begins.
    pub(crate) fn show(&mut self, shadow: &Arc<Shadow<SchedulerHook>>, replica: &Arc<str>, view: &View<'_>) {
        self.lost = Arc::default();
        let n_ids = view.waiting.id.len() + view.running.id.len();
        let shown = tell(shadow, replica, n_ids, || News::View(Box::new(view.into()), Arc::clone(&self.lost)));
        let whole = rest(shadow.case.share_ppm()) == 0;
        self.stage = match shown {
            true => Stage::Follows(if whole { u32::MAX } else { STRETCH }),
            false => Stage::Begins,
        };
    }

    /// Somebody else was told what has changed since: what it has heard is void.
    pub(crate) fn lose(&mut self) {
        if matches!(self.stage, Stage::Follows(_)) {
            self.stage = Stage::Begins;
        }
    }

    /// The replica goes.
    pub(crate) fn leave(&mut self, replica: &Arc<str>) {
        if let Some(shadow) = self.shadow.upgrade() {
            // Where that does not fit, the witness goes with the shadow.
            tell(&shadow, replica, 0, || News::Gone);
        }
    }
}

fn tell(shadow: &Shadow<SchedulerHook>, replica: &Arc<str>, n_ids: usize, news: impl FnOnce() -> News) -> bool {
    shadow.put(n_ids, || SchedulerSample { replica: Arc::clone(replica), news: news() })
}

/// Ids in a copy of both.
fn n_ids(changes: &Changes, used: &Plan) -> usize {
    let Changes { arrived, admitted, preempted, gone, progress_id, .. } = changes;
    let Plan { admit, preempt, drop, prefill_id, .. } = used;
    [&arrived.id, admitted, preempted, gone, progress_id, admit, preempt, drop, prefill_id].map(Vec::len).iter().sum()
}

/// Steps of rest after a stretch, so that the stretch is the share of both.
fn rest(share_ppm: u32) -> u32 {
    let share = u64::from(share_ppm.max(1));
    let steps = u64::from(STRETCH) * 1_000_000_u64.saturating_sub(share) / share;
    u32::try_from(steps).unwrap_or(u32::MAX)
}

// === impl Witness ===

/// What the shadow's thread does with what it hears.
pub(crate) fn hear(case: &Case<SchedulerHook>, witnesses: &mut Witnesses, sample: SchedulerSample) {
    let SchedulerSample { replica, news } = sample;
    match news {
        News::Gone => drop(witnesses.remove(&replica)),
        News::View(view, lost) => {
            let new = || Witness::new(&case.candidate, Arc::clone(&replica));
            let witness = witnesses.entry(Arc::clone(&replica)).or_insert_with(new);
            witness.lost = lost;
            witness.begin(&view);
        }
        News::Step(step) => {
            let started = stopwatch_ns();
            let verdict = witnesses.get_mut(&replica).map_or(Verdict::NoAnswer, |witness| witness.answer(&step));
            case.judged(verdict, stopwatch_ns() - started);
        }
    }
}

impl Witness {
    fn new(candidate: &Arc<Generation<SchedulerHook>>, replica: Arc<str>) -> Self {
        Self {
            post: Post::new(candidate, replica),
            pace: Pace::default(),
            lost: Arc::default(),
            known: HashSet::new(),
            gone: VecDeque::new(),
        }
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    fn begin(&mut self, view: &OwnedView) {
        let view = view.view();
        self.known = view.waiting.id.iter().chain(&view.running.id).copied().collect();
        self.gone.clear();
        self.post.renew(view.now);
        if !self.seat().is_some_and(|mut seat| seat.resync(&view)) {
            self.lose();
        }
    }

    /// Where it is asked, unless it has faulted too often.
    fn seat(&mut self) -> Option<Seat<'_>> {
        let Self { post, pace, .. } = self;
        let (guest, instance) = post.parts()?;
        Some(Seat { guest, instance, pace })
    }

    fn answer(&mut self, step: &Step) -> Verdict {
        let Step { now, budgets, changes, used } = step;
        if self.lost.load(Ordering::Relaxed) {
            return Verdict::NoAnswer;
        }
        self.learn(changes);
        let plan = match self.seat().map_or(Answered::Nothing, |mut seat| seat.step(*now, (budgets, changes))) {
            Answered::Nothing => {
                self.lose();
                return Verdict::NoAnswer;
            }
            Answered::NoPlan => Plan::default(),
            Answered::Plan(plan) => plan,
        };
        match check_plan(&plan, &self.known) {
            Ok(()) => compare(used, &plan),
            Err(why) => {
                self.refuse(*now, why);
                Verdict::NoAnswer
            }
        }
    }

    fn learn(&mut self, changes: &Changes) {
        self.known.extend(&changes.arrived.id);
        for id in &changes.gone {
            if self.gone.len() == REMEMBERED
                && let Some(oldest) = self.gone.pop_front()
            {
                self.known.remove(&oldest);
            }
            self.gone.push_back(*id);
        }
    }

    fn refuse(&mut self, now: Micros, why: BadPlan) {
        self.lose();
        self.post.refuse((Call::Step, now), &why);
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.lose();
    }
}

/// Compares two plans as they are written; the first list that differs names the kind.
fn compare(used: &Plan, shadow: &Plan) -> Verdict {
    let prefill =
        |plan: &Plan| plan.prefill_id.iter().copied().zip(plan.prefill_tokens.iter().copied()).collect::<Vec<_>>();
    if used.drop != shadow.drop {
        Verdict::Differs(OTHER_REFUSAL)
    } else if used.preempt != shadow.preempt {
        Verdict::Differs(OTHER_PREEMPTION)
    } else if (&used.admit, used.rest) != (&shadow.admit, shadow.rest) {
        Verdict::Differs(OTHER_ADMISSION)
    } else if prefill(used) != prefill(shadow) {
        Verdict::Differs(OTHER_PREFILL)
    } else {
        Verdict::Agrees
    }
}

#[cfg(test)]
mod tests {
    use pointsman_sched::batch::Rest;

    use super::*;

    #[test]
    fn a_stretch_is_its_share_of_stretch_and_rest() {
        for (share_ppm, expect) in [(1_000_000, 0), (500_000, 64), (100_000, 576), (10_000, 6_336), (1, 63_999_936)] {
            assert_eq!(rest(share_ppm), expect, "{share_ppm}");
        }
    }

    #[test]
    fn the_first_list_that_differs_names_the_kind() {
        let base = || Plan { admit: vec![2, 1], prefill_id: vec![3], prefill_tokens: vec![64], ..Plan::default() };
        for (other, expect) in [
            (base(), Verdict::Agrees),
            (Plan { admit: vec![1, 2], ..base() }, Verdict::Differs(OTHER_ADMISSION)),
            (Plan { rest: Rest::Hold, ..base() }, Verdict::Differs(OTHER_ADMISSION)),
            (Plan { preempt: vec![9], admit: vec![], ..base() }, Verdict::Differs(OTHER_PREEMPTION)),
            (Plan { drop: vec![9], preempt: vec![9], ..base() }, Verdict::Differs(OTHER_REFUSAL)),
            (Plan { prefill_tokens: vec![65], ..base() }, Verdict::Differs(OTHER_PREFILL)),
        ] {
            assert_eq!(compare(&base(), &other), expect, "{other:?}");
        }
    }
}
