//! Which admission policy hears of which ending: the one whose host-state counts the request.
//!
//! Not simply the one that is active: a rollout has two with a state each, and a request may end long after its policy was
//! replaced, off or bypassed. A policy that counts what is in flight would then give back what it never took, or never get back
//! what it did. So an ending follows the state in which the request may have been counted: to the policy that accepted it, to
//! its successor on the same state, and to a candidate whose copy was made in between. It waits while none of them can be
//! asked. Where host and guest are not exact to the call (a copy is made while a call is under way), an ending is told once too
//! often rather than once too rarely: a count that ends too low mends itself, one that ends too high never does.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;
use pointsman_sched::admit::{Accepted, Ending};
use pointsman_telemetry::Micros;

use crate::admission::AdmissionHook;
use crate::generation::Generation;
use crate::state::{StateStore, StateView};

/// Endings that wait for a guest; beyond, the oldest are forgotten and counted. As many are remembered after they were told.
pub(crate) const MAX_ENDINGS: usize = 8_192;

/// Endings that are owed to a policy, or were told lately.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Oldest first.
    owed: VecDeque<Owed>,
    /// Told to everybody who was there. A candidate that is being prepared may have the request in its copy and not its end.
    told: VecDeque<Owed>,
    /// Numbers of the states of the last round.
    states: Vec<u64>,
    /// Ends of requests that a shadow was asked about, until they are handed to it.
    pub(crate) unheard: VecDeque<Ending>,
}

#[derive(Debug)]
struct Owed {
    ending: Ending,
    /// States that have it, and since when.
    told: Vec<(u64, Micros)>,
}

/// Generations that may serve.
pub(crate) type Warm = [Arc<Generation<AdmissionHook>>];

fn state_of(generation: &Generation<AdmissionHook>) -> Option<&StateView> {
    generation.guest.as_ref().map(|guest| guest.state())
}

impl Owed {
    fn accepted(&self) -> (u64, Micros) {
        let Accepted { state, at, .. } = self.ending.accepted;
        (state, at)
    }

    fn is_owed_to(&self, generation: &Generation<AdmissionHook>) -> bool {
        state_of(generation).is_some_and(|state| state.holds(self.accepted(), &self.told))
    }
}

impl Ledger {
    /// Takes what has ended since. A state that was not there in the last round may be owed what the others have been told.
    pub(crate) fn collect(&mut self, endings: &ArrayQueue<Ending>, warm: &Warm) {
        let states: Vec<u64> = warm.iter().filter_map(|g| Some(state_of(g)?.number())).collect();
        if states.iter().any(|state| !self.states.contains(state)) {
            let told = std::mem::take(&mut self.told);
            self.owed.extend(told);
        }
        self.states = states;
        for ending in std::iter::from_fn(|| endings.pop()).take(MAX_ENDINGS) {
            if ending.shadow != 0 {
                self.unheard.push_back(ending);
            }
            self.owed.push_back(Owed { ending, told: Vec::new() });
        }
    }

    /// Places of the oldest endings that the generation at `place` is to hear, at most `most`. Of two that share a state the one
    /// that accepted the request hears of it.
    pub(crate) fn due(&self, warm: &Warm, place: usize, most: usize) -> Vec<usize> {
        let this = &warm[place];
        let number = state_of(this).map(StateView::number);
        let has_other_heir = |owed: &Owed| {
            let by = owed.ending.accepted.generation;
            let others = warm.iter().filter(|other| other.number() != this.number() && other.number() == by);
            others.into_iter().any(|other| state_of(other).map(StateView::number) == number)
        };
        let due = self.owed.iter().enumerate().filter(|(_, owed)| owed.is_owed_to(this) && !has_other_heir(owed));
        due.map(|(place, _)| place).take(most).collect()
    }

    /// The endings at these places.
    pub(crate) fn endings(&self, places: &[usize]) -> Vec<Ending> {
        places.iter().map(|&place| self.owed[place].ending).collect()
    }

    /// They are in the state of this number from now on.
    pub(crate) fn tell(&mut self, places: &[usize], state: u64, now: Micros) {
        places.iter().for_each(|&place| self.owed[place].told.push((state, now)));
    }

    /// Ends a round: what is owed to nobody any more goes. How many were forgotten for want of room.
    pub(crate) fn close(&mut self, warm: &Warm, states: &StateStore) -> u64 {
        for owed in std::mem::take(&mut self.owed) {
            // Also while the state has no guest: whoever comes back to it finds the request counted there.
            let waits =
                warm.iter().any(|generation| owed.is_owed_to(generation)) || states.holds(owed.accepted(), &owed.told);
            if waits {
                self.owed.push_back(owed);
            } else if !owed.told.is_empty() {
                self.told.push_back(owed);
            }
        }
        let beyond = |list: &VecDeque<Owed>| list.len().saturating_sub(MAX_ENDINGS);
        let (forgotten, old) = (beyond(&self.owed), beyond(&self.told));
        self.owed.drain(..forgotten);
        self.told.drain(..old);
        let unheard = self.unheard.len().saturating_sub(MAX_ENDINGS);
        self.unheard.drain(..unheard);
        (forgotten + unheard) as u64
    }
}
