//! What a scheduling policy has been told, and the check of what it answers.
//!
//! The policy mirrors the queues from net differences (`record changes` in wit/policy.wit), so this module keeps, per
//! sequence, how the policy last saw it and, in a list, which ones changed since. Everything is bounded: the list names
//! live sequences, `gone` only ids that were shown, and of older ids a ring remembers as many as there can be requests.
//! A policy that does not follow (native, or an open circuit) costs nothing: its notes are dropped and it starts again
//! from the whole view.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::batch::{BadPlan, Changes, Plan, SequenceColumns};
use crate::hash::{IntMap, IntSet};
use crate::ids::RequestId;
use crate::kv::Kv;
use crate::request::Request;
use crate::sequence::{Progress, Sequence, Shown, Slab, Slot, count};
use crate::waiting::WaitingQueue;

/// Ids to remember at least after they have gone.
const MIN_REMEMBERED: usize = 1_024;

/// Tenants that are named to policies; interned names are capped below this.
const MAX_TENANTS: usize = 4_096;

#[derive(Debug)]
pub(crate) struct Told {
    /// Whether differences suffice.
    pub(crate) following: bool,
    pub(crate) changes: Changes,
    /// Sequences that differ from what was shown, first change first; may name some that have gone.
    dirty: Vec<(Slot, RequestId)>,
    dirty_bound: usize,
    /// Ids that were shown and have gone: which the plan may still name.
    remembered: Remembered,
    tenants: Vec<(u32, Arc<str>)>,
    known_tenants: IntSet<u32>,
    n_tenants_shown: usize,
    /// Number of the list that the plan check is reading.
    mark: u64,
}

#[derive(Debug)]
struct Remembered {
    ids: VecDeque<u64>,
    marks: IntMap<u64, u64>,
    bound: usize,
}

/// The queues, as far as telling needs them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queues<'a> {
    pub(crate) kv: &'a Kv,
    pub(crate) waiting: &'a WaitingQueue,
    pub(crate) running: &'a [Slot],
}

impl Told {
    /// `capacity`: how many sequences can live at once.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            following: false,
            changes: Changes::default(),
            dirty: Vec::new(),
            dirty_bound: 2 * capacity,
            remembered: Remembered::new(capacity.max(MIN_REMEMBERED)),
            tenants: Vec::new(),
            known_tenants: IntSet::default(),
            n_tenants_shown: 0,
            mark: 0,
        }
    }

    /// Learns the name of a request's tenant.
    pub(crate) fn meet(&mut self, request: &Request) {
        if self.tenants.len() < MAX_TENANTS && self.known_tenants.insert(request.tenant) {
            self.tenants.push((request.tenant, Arc::clone(&request.tenant_name)));
        }
    }

    /// The name of a tenant that has been met.
    pub(crate) fn tenant(&self, number: u32) -> Option<&Arc<str>> {
        self.tenants.iter().find(|(known, _)| *known == number).map(|(_, name)| name)
    }

    pub(crate) fn tenants(&self) -> &[(u32, Arc<str>)] {
        &self.tenants
    }

    /// Notes that a sequence arrived, was admitted or was preempted.
    pub(crate) fn changed(&mut self, slot: Slot, sequences: &mut Slab) {
        if !self.following || sequences[slot].dirty {
            return;
        }
        if self.dirty.len() >= self.dirty_bound {
            self.dirty.retain(|&(slot, id)| sequences.holds(slot, id));
        }
        sequences[slot].dirty = true;
        self.dirty.push((slot, sequences[slot].request.id));
    }

    /// Notes that a sequence has ended.
    pub(crate) fn gone(&mut self, sequence: &Sequence) {
        if self.following && sequence.shown != Shown::Never {
            self.changes.gone.push(sequence.request.id.0);
            self.remembered.push(sequence.request.id.0);
        }
    }

    /// The policy does not follow: everything noted for it is void.
    pub(crate) fn forget(&mut self) {
        self.following = false;
    }

    /// The policy starts from the whole view.
    pub(crate) fn restart(&mut self) {
        self.following = true;
        self.changes.clear();
        self.dirty.clear();
        self.remembered.clear();
        self.n_tenants_shown = self.tenants.len();
    }

    /// Fills the columns with everything as it stands, and takes it as shown: to a policy that starts, or to one that has just
    /// been told the difference, for which that changes nothing.
    pub(crate) fn view(
        sequences: &mut Slab,
        queues: Queues<'_>,
        waiting: &mut SequenceColumns,
        running: &mut SequenceColumns,
    ) {
        for ticket in queues.waiting.tickets() {
            show(&mut sequences[ticket.slot], queues.kv, waiting);
        }
        for &slot in queues.running {
            show(&mut sequences[slot], queues.kv, running);
        }
    }

    /// Completes `changes` (whose `gone` has been kept up) to the net difference since the last call.
    pub(crate) fn difference(&mut self, sequences: &mut Slab, queues: Queues<'_>, wants_progress: bool) {
        let changes = &mut self.changes;
        changes.new_tenants.extend_from_slice(&self.tenants[self.n_tenants_shown..]);
        self.n_tenants_shown = self.tenants.len();
        let mut admitted = std::mem::take(&mut self.dirty);
        admitted.retain(|&(slot, id)| {
            if !sequences.holds(slot, id) {
                return false;
            }
            let sequence = &mut sequences[slot];
            let before = sequence.shown;
            match (before, sequence.running) {
                (Shown::Never, _) => show(sequence, queues.kv, &mut changes.arrived),
                (Shown::Running, false) => {
                    changes.preempted.push(id.0);
                    sequence.shown_progress.computed = 0;
                    sequence.shown_progress.blocks = 0;
                }
                (Shown::Waiting | Shown::Running, _) => {}
            }
            sequence.dirty = false;
            sequence.shown = if sequence.running { Shown::Running } else { Shown::Waiting };
            sequence.running && before != Shown::Running
        });
        admitted.sort_unstable_by_key(|&(slot, _)| sequences[slot].admission);
        changes.admitted.extend(admitted.iter().map(|&(_, id)| id.0));
        admitted.clear();
        self.dirty = admitted;
        if wants_progress {
            for &slot in queues.running {
                report(&mut sequences[slot], queues.kv, changes);
            }
        }
    }

    /// Whether a plan names only what it may, in lists of sane lengths.
    pub(crate) fn check(&mut self, plan: &Plan, sequences: &mut Slab) -> Result<(), BadPlan> {
        let (ids, tokens) = (count(plan.prefill_id.len()), count(plan.prefill_tokens.len()));
        if ids != tokens {
            return Err(BadPlan::Lengths { ids, tokens });
        }
        let limit = count(sequences.len() + self.remembered.ids.len());
        for list in [&plan.admit, &plan.preempt, &plan.drop, &plan.prefill_id] {
            let len = count(list.len());
            if len > limit {
                return Err(BadPlan::TooLong { len, limit });
            }
            self.mark += 1;
            for &id in list {
                let mark = match sequences.find(id) {
                    Some(slot) => Some(&mut sequences[slot].mark),
                    None => self.remembered.marks.get_mut(&id),
                };
                let earlier = std::mem::replace(mark.ok_or(BadPlan::UnknownId(id))?, self.mark);
                if earlier == self.mark {
                    return Err(BadPlan::Duplicate(id));
                }
            }
        }
        Ok(())
    }
}

// === impl Remembered ===

impl Remembered {
    fn new(bound: usize) -> Self {
        Self { ids: VecDeque::new(), marks: IntMap::default(), bound }
    }

    fn push(&mut self, id: u64) {
        if self.ids.len() >= self.bound
            && let Some(oldest) = self.ids.pop_front()
        {
            self.marks.remove(&oldest);
        }
        self.ids.push_back(id);
        self.marks.insert(id, 0);
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.marks.clear();
    }
}

fn progress(sequence: &Sequence, kv: &Kv) -> Progress {
    Progress {
        computed: sequence.computed.min(sequence.prompt_tokens()),
        generated: sequence.generated(),
        blocks: kv.n_private(&sequence.table),
    }
}

/// Appends a sequence as it is, and takes it as shown.
fn show(sequence: &mut Sequence, kv: &Kv, columns: &mut SequenceColumns) {
    let now = progress(sequence, kv);
    let request = &sequence.request;
    columns.id.push(request.id.0);
    columns.prompt_tokens.push(sequence.prompt_tokens());
    columns.cached_tokens.push(sequence.cached_on_arrival);
    columns.computed_tokens.push(now.computed);
    columns.generated_tokens.push(now.generated);
    columns.max_new_tokens.push(request.max_new_tokens);
    columns.held_blocks.push(now.blocks);
    columns.priority.push(request.priority as u8);
    columns.tenant.push(request.tenant);
    columns.arrived.push(request.arrived);
    columns.deadline.push(request.deadline);
    columns.session.push(request.session);
    columns.prefix.push(request.block_hashes.first().copied().unwrap_or(0));
    sequence.shown = if sequence.running { Shown::Running } else { Shown::Waiting };
    sequence.shown_progress = now;
    sequence.dirty = false;
}

fn report(sequence: &mut Sequence, kv: &Kv, changes: &mut Changes) {
    let now = progress(sequence, kv);
    if std::mem::replace(&mut sequence.shown_progress, now) != now {
        changes.progress_id.push(sequence.request.id.0);
        changes.progress_computed.push(now.computed);
        changes.progress_generated.push(now.generated);
        changes.progress_blocks.push(now.blocks);
    }
}
