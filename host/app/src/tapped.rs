//! A scheduling policy with somebody listening: copies of its calls go to the scheduler's tap while one records.
//!
//! Around the policy and not inside it, because recordings are the server's and policies must not know. A recording has to
//! begin with the whole view, so the first decision after its start is made to need one; the guest gets it too, as after any
//! pause, for its next changes are counted from there. Nobody recording costs one relaxed load per step.

use std::sync::Arc;

use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, View};
use pointsman_sched::ids::Micros;
use pointsman_server::admin::wire::decision::{Line, PlanSeen, SchedulerCall, SchedulerLine};
use pointsman_server::record::Tap;

/// A policy and its tap.
pub(crate) struct Tapped<P> {
    inner: P,
    tap: Arc<Tap>,
    replica: Arc<str>,
    /// Number of the recording that has had the view and everything since; 0 for none.
    following: u64,
}

impl<P: BatchPolicy> Tapped<P> {
    /// Listens to `inner`, the policy of `replica`.
    pub(crate) fn new(inner: P, tap: &Arc<Tap>, replica: &Arc<str>) -> Self {
        Self { inner, tap: Arc::clone(tap), replica: Arc::clone(replica), following: 0 }
    }

    /// Records a call; after a line that did not fit, nothing until the next view.
    fn push(&mut self, now: Micros, budgets: &Budgets, call: SchedulerCall) {
        let line = SchedulerLine { replica: self.replica.to_string(), now, budgets: *budgets, call };
        if !self.tap.push(Line::Scheduler(Box::new(line))) {
            self.following = 0;
        }
    }
}

impl<P: BatchPolicy> BatchPolicy for Tapped<P> {
    fn attend(&mut self, now: Micros) -> Attention {
        let attention = self.inner.attend(now);
        let recording = self.tap.recording();
        if recording == 0 || !matches!(attention, Attention::Following | Attention::Busy) {
            self.following = 0;
            return attention;
        }
        if attention == Attention::Busy {
            return attention;
        }
        let begin = self.following != recording && self.tap.has_room();
        if begin { Attention::NeedsView } else { attention }
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn revision(&self) -> Arc<str> {
        self.inner.revision()
    }

    fn wants_progress(&self) -> bool {
        self.inner.wants_progress()
    }

    fn resync(&mut self, view: &View<'_>) {
        self.inner.resync(view);
        self.following = self.tap.recording();
        if self.following == 0 {
            return;
        }
        let call = SchedulerCall::Resync {
            seed: view.seed,
            tenants: view.tenants.iter().map(|(number, name)| (*number, name.to_string())).collect(),
            waiting: view.waiting.clone(),
            running: view.running.clone(),
        };
        self.push(view.now, view.budgets, call);
    }

    fn step(&mut self, now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        let recording = self.tap.recording();
        if recording == 0 {
            return self.inner.step(now, budgets, changes, plan);
        }
        // Who was asked: a guest that faults is gone afterwards.
        let (revision, generation) = (self.inner.revision().to_string(), self.inner.generation());
        let answer = self.inner.step(now, budgets, changes, plan);
        if self.following == recording {
            let planned = (answer == Answer::Planned).then(|| PlanSeen(plan.clone()));
            let call = SchedulerCall::Step { changes: changes.clone(), answer: planned, revision, generation };
            self.push(now, budgets, call);
        } else {
            self.tap.skip();
        }
        answer
    }

    fn refused(&mut self, now: Micros, why: BadPlan) {
        self.inner.refused(now, why);
    }

    fn wants_view(&mut self) -> bool {
        self.inner.wants_view()
    }

    fn show(&mut self, view: &View<'_>) {
        self.inner.show(view);
    }

    fn stood_in(&mut self) {
        self.inner.stood_in();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A policy that follows, and notes what it is given.
    #[derive(Default)]
    struct Following {
        views: u32,
        steps: u32,
        fresh: bool,
    }

    impl BatchPolicy for Following {
        fn attend(&mut self, _now: Micros) -> Attention {
            if self.fresh { Attention::NeedsView } else { Attention::Following }
        }

        fn generation(&self) -> u64 {
            3
        }

        fn resync(&mut self, _view: &View<'_>) {
            (self.views, self.fresh) = (self.views + 1, false);
        }

        fn step(&mut self, _now: Micros, _budgets: &Budgets, _changes: &Changes, plan: &mut Plan) -> Answer {
            self.steps += 1;
            plan.admit = vec![7];
            Answer::Planned
        }

        fn refused(&mut self, _now: Micros, _why: BadPlan) {}
    }

    /// One step boundary, as the scheduler does it.
    fn boundary(tapped: &mut Tapped<Following>) {
        let (budgets, none) = (Budgets::default(), pointsman_sched::batch::SequenceColumns::default());
        if tapped.attend(1) == Attention::NeedsView {
            let (tenants, waiting, running) = (&[(1, "t".into())][..], &none, &none);
            tapped.resync(&View { now: 1, seed: 2, budgets: &budgets, tenants, waiting, running });
        }
        assert_eq!(tapped.step(1, &budgets, &Changes::default(), &mut Plan::default()), Answer::Planned);
    }

    #[test]
    fn nobody_recording_changes_nothing() {
        let tap = Arc::new(Tap::default());
        let mut tapped = Tapped::new(Following { fresh: true, ..Following::default() }, &tap, &"m:f16@cpu".into());
        boundary(&mut tapped);
        boundary(&mut tapped);
        assert_eq!((tapped.inner.views, tapped.inner.steps, tapped.following), (1, 2, 0));
    }

    #[test]
    fn a_recording_begins_with_the_view_and_so_does_the_rest_after_a_gap() {
        let tap = Arc::new(Tap::default());
        let mut tapped = Tapped::new(Following::default(), &tap, &"m:f16@cpu".into());
        boundary(&mut tapped);
        let mut recording = tap.start().expect("nobody records");
        let mut taken = Vec::new();
        let mut calls = |tapped: &mut Tapped<Following>, n: u32| {
            (0..n).for_each(|_| boundary(tapped));
            taken.clear();
            recording.take_now(&mut taken);
            let word = |line: &Line| match line {
                Line::Scheduler(line) => match &line.call {
                    SchedulerCall::Resync { tenants, .. } => format!("view of {}", tenants[0].1),
                    SchedulerCall::Step { answer, generation, .. } => {
                        format!("{:?};g={generation}", answer.as_ref().map(|plan| &plan.0.admit))
                    }
                },
                other => panic!("{other:?}"),
            };
            taken.iter().map(word).collect::<Vec<_>>()
        };
        let step = "Some([7]);g=3";
        assert_eq!(calls(&mut tapped, 2), ["view of t", step, step]);
        assert_eq!(tapped.inner.views, 1, "the guest got it too");
        // More than fits: the rest is skipped until half of the queue is free again.
        assert_eq!(calls(&mut tapped, 5_000).last().map(String::as_str), Some(step));
        assert_eq!(calls(&mut tapped, 1), ["view of t", step]);
        drop(recording);
        boundary(&mut tapped);
        assert_eq!((tapped.following, tapped.inner.views), (0, 2));
    }
}
