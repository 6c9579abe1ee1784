//! Asking the policy, and what is left of its answer: the drops are done here, the rest is read by `select`.
//!
//! The policy is asked to attend at every boundary and to decide only when there is a decision: something waits, or the
//! running sequences need more blocks than there are.

use crate::batch::{Answer, Attention, BatchPolicy, Budgets, SequenceColumns, View};
use crate::hash::mix;
use crate::ids::Micros;
use crate::observe::Observer;
use crate::request::Failure;
use crate::told::{Queues, Told};

use super::ending::Ending;
use super::{Scheduler, count};

impl Scheduler {
    /// Fills `self.plan`, or leaves it empty for the native plan.
    pub(super) fn consult(&mut self, now: Micros, policy: &mut dyn BatchPolicy, observer: &mut dyn Observer) {
        self.plan.clear();
        self.preempt_cursor = 0;
        self.generation = 0;
        let may_be_asked = self.attend(now, policy);
        if self.waiting.is_empty() && self.growth() <= self.kv.pool.available() {
            return;
        }
        if !may_be_asked {
            return policy.stood_in();
        }
        if !self.ask(now, policy) {
            return;
        }
        self.generation = policy.generation();
        self.counters.plans_followed += 1;
        self.drop_refused(now, observer);
        for (&id, &tokens) in self.plan.prefill_id.iter().zip(&self.plan.prefill_tokens) {
            if let Some(slot) = self.sequences.find(id) {
                self.sequences[slot].wish = Some(tokens);
            }
        }
    }

    /// Lets the policy pick up a swap. Whether it may be asked.
    pub(super) fn attend(&mut self, now: Micros, policy: &mut dyn BatchPolicy) -> bool {
        let attention = policy.attend(now);
        match attention {
            Attention::Native => {
                self.told.forget();
                false
            }
            Attention::Busy => false,
            Attention::Following | Attention::NeedsView => {
                if attention == Attention::NeedsView || !self.told.following {
                    self.resync(now, policy);
                }
                true
            }
        }
    }

    fn resync(&mut self, now: Micros, policy: &mut dyn BatchPolicy) {
        self.told.restart();
        self.view(now, |view| policy.resync(view));
    }

    /// Shows everything as it stands.
    fn view(&mut self, now: Micros, show: impl FnOnce(&View<'_>)) {
        let (mut waiting, mut running) = (SequenceColumns::default(), SequenceColumns::default());
        let queues = Queues { kv: &self.kv, waiting: &self.waiting, running: &self.running };
        Told::view(&mut self.sequences, queues, &mut waiting, &mut running);
        show(&View {
            now,
            seed: mix(self.seed ^ self.n_steps),
            budgets: &self.budgets(),
            tenants: self.told.tenants(),
            waiting: &waiting,
            running: &running,
        });
    }

    /// Whether the policy gave a plan that may be followed.
    fn ask(&mut self, now: Micros, policy: &mut dyn BatchPolicy) -> bool {
        let budgets = self.budgets();
        let queues = Queues { kv: &self.kv, waiting: &self.waiting, running: &self.running };
        self.told.difference(&mut self.sequences, queues, policy.wants_progress());
        let answer = policy.step(now, &budgets, &self.told.changes, &mut self.plan);
        self.told.changes.clear();
        if policy.wants_view() {
            self.view(now, |view| policy.show(view));
        }
        if answer == Answer::Native {
            self.plan.clear();
            return false;
        }
        if let Err(why) = self.told.check(&self.plan, &mut self.sequences) {
            policy.refused(now, why);
            self.plan.clear();
            self.counters.plans_refused += 1;
            return false;
        }
        true
    }

    fn drop_refused(&mut self, now: Micros, observer: &mut dyn Observer) {
        let refused = std::mem::take(&mut self.plan.drop);
        for &id in &refused {
            if let Some(slot) = self.sequences.find(id)
                && !self.sequences[slot].running
            {
                self.end(slot, Ending::Failed(Failure::DroppedByPolicy), now, observer);
            }
        }
        self.plan.drop = refused;
    }

    fn budgets(&self) -> Budgets {
        Budgets {
            step_tokens: self.config.step_tokens,
            running: self.config.max_running,
            free_blocks: self.kv.pool.available(),
            total_blocks: self.config.n_blocks,
            block_tokens: self.config.block_tokens,
            last_step: self.last_step.took,
            last_step_tokens: self.last_step.tokens,
        }
    }

    /// Blocks that the decodes of this step need beyond their tables.
    pub(super) fn growth(&self) -> u32 {
        let missing = |&slot| {
            let sequence = &self.sequences[slot];
            self.config.blocks_for(sequence.n_tokens()).saturating_sub(count(sequence.table.len()))
        };
        self.running.iter().map(missing).sum()
    }
}
