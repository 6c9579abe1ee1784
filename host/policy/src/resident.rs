//! A guest that one thread keeps: an instance of the slot's current generation, and what it takes to replace it.
//!
//! The thread never compiles, initializes or waits: when it has something to ask it finds out by two atomic reads whether its
//! generation is still the current one, and takes a warm instance from the new one if not. The guest holds no truth, so
//! after a swap, a fault or a pause its owner tells it everything again ([`Attention::NeedsView`]).
//!
//! A retention policy and a sampler are asked by [`Resident::attend`] and [`Resident::call`] as they are. A scheduler's plan may
//! come late, and from another thread, so it puts the same parts together in its own order.

use std::sync::Arc;

use pointsman_sched::batch::Attention;
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::circuit::Admit;
use crate::config::{Budget, Budgets};
use crate::fault::{Call, Fault};
use crate::generation::{Guest, Renewed};
use crate::instance::{Hook, Instance};
use crate::slot::{SlotCore, Stay};

/// The place of an instance that its owner keeps.
type Kept<H> = Option<Box<Instance<H>>>;

pub(crate) struct Resident<H: Hook> {
    pub(crate) core: Arc<SlotCore<H>>,
    /// Whose it is, for messages and for what is kept for it.
    pub(crate) owner: Arc<str>,
    /// The generation that it is inside of.
    pub(crate) generation: Arc<Stay<H>>,
    pub(crate) instance: Kept<H>,
    /// Whether the instance has been told everything.
    pub(crate) synced: bool,
    /// The last question of whoever prepares the next generation that was answered.
    answered: u64,
    /// Whether attending has made a call: nothing else is to be asked at this boundary.
    pub(crate) is_spent: bool,
}

impl<H: Hook> Resident<H> {
    /// Its instance is prepared by maintenance or by the next activation; until then there is none.
    pub(crate) fn new(core: &Arc<SlotCore<H>>, owner: &Arc<str>) -> Self {
        core.welcome(owner);
        Self {
            generation: Arc::new(core.stay()),
            core: Arc::clone(core),
            owner: Arc::clone(owner),
            instance: None,
            synced: false,
            answered: 0,
            is_spent: false,
        }
    }

    /// The guest of the generation, if the slot has one, in whatever state.
    #[inline]
    pub(crate) fn guest(&self) -> Option<&Guest<H>> {
        self.generation.guest.as_ref()
    }

    /// The guest, and the instance.
    #[inline]
    pub(crate) fn parts(&mut self) -> Option<(&Guest<H>, &mut Kept<H>)> {
        let Self { generation, instance, .. } = self;
        Some((generation.guest.as_ref()?, instance))
    }

    /// The generation that it is inside of.
    pub(crate) fn decided_by(&self) -> &DecidedBy {
        &self.generation.decided_by
    }

    /// Attributes that the guest wants.
    pub(crate) fn wanted_attributes(&self) -> &[String] {
        self.guest().map_or(&[], |guest| &guest.wants.attributes)
    }

    /// What its calls may take.
    pub(crate) fn budgets(&self) -> Budgets {
        self.guest().map_or(self.core.shared.config.budgets, |guest| *guest.budgets())
    }

    /// Whether another generation decides by now.
    #[inline]
    pub(crate) fn is_outdated(&self) -> bool {
        !self.core.is_current(&self.generation)
    }

    /// Leaves its generation, which keeps the instance for it, and enters the current one.
    pub(crate) fn move_on(&mut self) {
        if let Some(instance) = self.instance.take()
            && let Some(guest) = self.guest()
        {
            guest.park(&self.owner, instance);
        }
        self.generation = Arc::new(self.core.stay());
        (self.synced, self.answered) = (false, 0);
    }

    /// Picks up a swap, a restart, an open or a closing circuit. [`Attention::Native`] where there is nobody to ask.
    pub(crate) fn attend(&mut self, now: Micros) -> Attention {
        if self.is_outdated() {
            self.move_on();
        }
        self.hand_over(now);
        let Some(guest) = self.guest() else { return Attention::Native };
        // Only asked: the trial is for whoever makes a call, and there may be none to make here for a long time.
        let admit = guest.would_admit(now);
        if admit != Admit::No {
            self.be_seated(now);
        }
        self.synced &= admit == Admit::Yes;
        if admit == Admit::No || self.instance.is_none() {
            return Attention::Native;
        }
        if self.synced { Attention::Following } else { Attention::NeedsView }
    }

    /// Answers whoever prepares the next generation.
    #[inline]
    pub(crate) fn hand_over(&mut self, now: Micros) {
        self.is_spent = false;
        if self.guest().is_some_and(|guest| guest.is_asked(self.answered)) {
            self.answer(now);
        }
    }

    #[cold]
    fn answer(&mut self, now: Micros) {
        if self.instance.is_none() {
            // The first boundary since the last swap may be this one.
            self.be_seated(now);
        }
        let Self { generation, owner, instance, answered, .. } = self;
        let Some(guest) = &generation.guest else { return };
        self.is_spent = guest.answer(instance, owner, answered, now);
        self.synced &= self.instance.is_some();
    }

    /// Has a fresh instance where there is none, or a worn one that can be replaced at this boundary.
    #[inline]
    pub(crate) fn be_seated(&mut self, now: Micros) {
        if self.is_spent && self.instance.is_some() {
            return;
        }
        let Self { generation, owner, instance, .. } = self;
        let Some(guest) = &generation.guest else { return };
        let renewed = guest.renew(instance, owner, now);
        self.synced &= renewed == Renewed::Not && self.instance.is_some();
        self.is_spent |= renewed == Renewed::ByCalls;
    }

    /// Makes one call and deals with its fault; `None` when there is no answer, as where another replica is at its trial.
    pub(crate) fn call<R>(
        &mut self,
        call: Call,
        now: Micros,
        budget: Budget,
        work: impl FnOnce(&mut Instance<H>, Micros) -> Result<R, Fault>,
    ) -> Option<R> {
        let (guest, instance) = self.parts()?;
        instance.as_ref()?;
        let admit = guest.admit(now);
        let answer = if admit == Admit::No { None } else { guest.call(instance, now, (call, budget), work) };
        if admit == Admit::Trial && answer.is_some() {
            guest.trial_passed(guest.last_number());
        }
        self.synced &= answer.is_some();
        answer
    }

    /// The answer of the last call was refused by whoever asked: a fault of the guest.
    pub(crate) fn refused(&mut self, call: Call, now: Micros, why: &dyn std::fmt::Display) {
        let words = format!("{}: {why}", self.owner);
        let Some((guest, instance)) = self.parts() else { return };
        guest.refused(instance, (call, now), words);
        guest.fell_back();
        self.synced = false;
    }

    /// Lets go of an instance that has missed something which it cannot be told again.
    pub(crate) fn let_go(&mut self) {
        if let Some((guest, instance)) = self.parts() {
            instance.take().into_iter().for_each(|instance| guest.discard(instance));
        }
        self.synced = false;
    }

    /// Counts a decision that is taken without the guest.
    pub(crate) fn fell_back(&self) {
        if let Some(guest) = self.guest() {
            guest.fell_back();
        }
    }
}

impl<H: Hook> Drop for Resident<H> {
    fn drop(&mut self) {
        self.let_go();
        self.core.dismiss(&self.owner);
    }
}

impl<H: Hook> std::fmt::Debug for Resident<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resident")
            .field("owner", &self.owner)
            .field("generation", &**self.generation)
            .field("synced", &self.synced)
            .finish_non_exhaustive()
    }
}
