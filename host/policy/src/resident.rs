//! A guest that one thread keeps: an instance of the slot's current generation, and what it takes to replace it.
//!
//! The thread never compiles, initializes or waits: when it has something to ask it finds out by two atomic reads whether its
//! generation is still the current one, and takes a warm instance from the new one if not. The guest holds no truth, so
//! after a swap, a fault or a pause its owner tells it everything again ([`Attention::NeedsView`]).

use std::sync::Arc;

use pointsman_sched::batch::Attention;
use pointsman_sched::route::DecidedBy;
use pointsman_telemetry::Micros;

use crate::circuit::Admit;
use crate::config::{Budget, Budgets};
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind};
use crate::generation::CallContext;
use crate::instance::{Hook, Instance};
use crate::slot::{SlotCore, Stay};
use crate::upload::World;

pub(crate) struct Resident<H: Hook> {
    pub(crate) core: Arc<SlotCore<H>>,
    /// Whose it is, for messages.
    owner: Arc<str>,
    /// The generation that it is inside of.
    generation: Stay<H>,
    instance: Option<Box<Instance<H>>>,
    /// Whether the instance has been told everything.
    pub(crate) synced: bool,
    /// The last question of whoever prepares the next generation that was answered.
    answered: u64,
}

impl<H: Hook> Resident<H> {
    /// Its instance is prepared by maintenance or by the next activation; until then there is none.
    pub(crate) fn new(core: &Arc<SlotCore<H>>, owner: &Arc<str>) -> Self {
        core.want(1);
        Self {
            generation: core.stay(),
            core: Arc::clone(core),
            owner: Arc::clone(owner),
            instance: None,
            synced: false,
            answered: 0,
        }
    }

    /// Whether the slot has a guest, in whatever state.
    pub(crate) fn has_guest(&self) -> bool {
        self.generation.guest.is_some()
    }

    /// The generation that it is inside of.
    pub(crate) fn decided_by(&self) -> &DecidedBy {
        &self.generation.decided_by
    }

    /// Attributes that the guest wants.
    pub(crate) fn wanted_attributes(&self) -> &[String] {
        self.generation.guest.as_ref().map_or(&[], |guest| &guest.wants.attributes)
    }

    /// Picks up a swap, a restart, an open or a closing circuit. [`Attention::Native`] where there is nobody to ask.
    pub(crate) fn attend(&mut self, now: Micros) -> Attention {
        if !self.core.is_current(&self.generation) {
            self.leave();
            self.generation = self.core.stay();
            (self.synced, self.answered) = (false, 0);
        }
        self.hand_over(now);
        let Some(guest) = &self.generation.guest else { return Attention::Native };
        // Only asked: the trial is for whoever makes a call, and there may be none to make here for a long time.
        let admit = guest.would_admit(now);
        let is_fresh = admit != Admit::No && guest.renew(&mut self.instance, &self.owner, now);
        self.synced &= admit == Admit::Yes && !is_fresh && self.instance.is_some();
        if admit == Admit::No || self.instance.is_none() {
            return Attention::Native;
        }
        if self.synced { Attention::Following } else { Attention::NeedsView }
    }

    /// Answers whoever prepares the next generation.
    fn hand_over(&mut self, now: Micros) {
        let Some(guest) = &self.generation.guest else { return };
        if !guest.is_asked(self.answered) {
            return;
        }
        // The first boundary since the last swap may be this one.
        if guest.renew(&mut self.instance, &self.owner, now) {
            self.synced = false;
        }
        guest.answer(&mut self.instance, &self.owner, &mut self.answered, now);
        self.synced &= self.instance.is_some();
    }

    /// Makes one call and deals with its fault; `None` when there is no answer, as where another replica is at its trial.
    pub(crate) fn call<R>(
        &mut self,
        call: Call,
        now: Micros,
        budget: Budget,
        work: impl FnOnce(&mut Instance<H>, Micros) -> Result<R, Fault>,
    ) -> Option<R> {
        let (Some(guest), Some(instance)) = (&self.generation.guest, &mut self.instance) else { return None };
        let admit = guest.admit(now);
        if admit == Admit::No {
            self.synced = false;
            return None;
        }
        let number = guest.begin();
        let started = stopwatch_ns();
        let answer = work(instance, budget.hard);
        let took_ns = stopwatch_ns() - started;
        guest.took(took_ns, budget.soft);
        match answer {
            Ok(answer) => {
                if admit == Admit::Trial {
                    guest.trial_passed(number);
                }
                Some(answer)
            }
            Err(fault) => {
                if let Some(poisoned) = self.instance.take() {
                    guest.discard(poisoned);
                }
                self.synced = false;
                guest.fault(CallContext { call, number, now, took_us: took_ns / 1_000 }, fault);
                None
            }
        }
    }

    /// The answer of the last call was refused by whoever asked: a fault of the guest.
    pub(crate) fn refused(&mut self, call: Call, now: Micros, why: &dyn std::fmt::Display) {
        let Some(guest) = &self.generation.guest else { return };
        if let Some(wrong) = self.instance.take() {
            guest.discard(wrong);
        }
        self.synced = false;
        let fault = Fault::new(FaultKind::BadAnswer, format!("{}: {why}", self.owner));
        guest.fault(CallContext { call, number: guest.last_number(), now, took_us: 0 }, fault);
        guest.fell_back();
    }

    /// Counts a decision that is taken without the guest.
    pub(crate) fn fell_back(&self) {
        if let Some(guest) = &self.generation.guest {
            guest.fell_back();
        }
    }

    /// Gives back everything that belongs to the generation. It may be asked again: it starts from a view.
    fn leave(&mut self) {
        if let (Some(guest), Some(instance)) = (&self.generation.guest, self.instance.take()) {
            // What a sampler's instance knows of requests cannot be taken back from it, as a view would.
            if H::WORLD == World::Sampler { guest.discard(instance) } else { guest.park(&self.owner, instance) }
        }
    }

    /// What its calls may take.
    pub(crate) fn budgets(&self) -> Budgets {
        self.generation.guest.as_ref().map_or(self.core.shared.config.budgets, |guest| *guest.budgets())
    }
}

impl<H: Hook> Drop for Resident<H> {
    fn drop(&mut self) {
        if let (Some(guest), Some(instance)) = (&self.generation.guest, self.instance.take()) {
            guest.discard(instance);
        }
        self.leave();
        self.core.dismiss(&self.owner);
    }
}

impl<H: Hook> std::fmt::Debug for Resident<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resident")
            .field("owner", &self.owner)
            .field("generation", &*self.generation)
            .field("synced", &self.synced)
            .finish_non_exhaustive()
    }
}
