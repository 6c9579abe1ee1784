//! `AdmitPolicy` with an admission guest behind it.
//!
//! As routers, it runs on the thread that handles the request, on a warm instance from a pool; when none is free, or the
//! guest faults or is off, nobody has answered and the request enters as it is. What accepted requests came to waits in a
//! bounded queue for the observer thread, because a quota that learns of it 50 ms later is as good; whose business it then is
//! stands in `endings`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_queue::ArrayQueue;
use pointsman_sched::admit::{Accepted, AdmitPolicy, AdmitRequest, Ending, Judged, Load, Outcome, Verdict};
use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{DecidedBy, Fallback, RequestNumbers};
use pointsman_telemetry::{Micros, NameKind, Names};

use crate::bindings::admission::exports::pointsman::policy::admission as wit;
use crate::bindings::router::pointsman::policy::types;
use crate::bystander::{self, Bystander, DoorSample, Ended};
use crate::config::Budgets;
use crate::endings::{Ledger, MAX_ENDINGS};
use crate::fault::{Call, Fault, FaultKind};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::Wants;
use crate::router::{lift_rejection, lower_priority, wanted, wanted_numbers};
use crate::shadow::Case;
use crate::slot::{SlotCore, slot_by_core};
use crate::upload::World;

/// Most endings of one call.
pub(crate) const MAX_BATCH: usize = 1_024;
/// Calls that a probe makes with each input, which also fault the shared code in.
const WARM_CALLS: u64 = 16;

/// `world admission-policy`.
pub(crate) struct AdmissionHook;

/// The slot `admission`.
#[derive(Debug)]
pub struct AdmissionSlot {
    pub(crate) core: Arc<SlotCore<AdmissionHook>>,
    pub(crate) endings: ArrayQueue<Ending>,
    pub(crate) ledger: Mutex<Ledger>,
    pub(crate) forgotten: AtomicU64,
}

slot_by_core!(AdmissionSlot);

/// What an instance has been told: the highest number of a tenant's name.
#[derive(Debug, Default)]
pub(crate) struct Told {
    tenants: u32,
}

/// Endings as columns.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    id: Vec<u64>,
    tenant: Vec<u32>,
    outcome: Vec<u8>,
    prompt_tokens: Vec<u32>,
    cached_tokens: Vec<u32>,
    generated_tokens: Vec<u32>,
    max_new_tokens: Vec<u32>,
}

impl AdmitPolicy for AdmissionSlot {
    #[inline]
    fn is_native(&self) -> bool {
        self.core.is_native() && !self.core.is_shadowed()
    }

    fn admit(&self, now: Micros, request: &AdmitRequest<'_>, load: &Load) -> Judged {
        let mut judged = self.judge(now, request, load);
        if let Some(shadow) = self.core.shadowed() {
            judged.shadow = bystander::put(&shadow, AdmissionQuestion { now, request, load }, judged.verdict.as_ref());
        }
        judged
    }

    fn ended(&self, ending: Ending) {
        if self.endings.force_push(ending).is_some() {
            self.forgotten.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl AdmissionSlot {
    fn judge(&self, now: Micros, request: &AdmitRequest<'_>, load: &Load) -> Judged {
        let generation = self.core.enter();
        let decided_by = generation.decided_by.clone();
        let Some(guest) = &generation.guest else { return Judged::native(decided_by) };
        let asked = (request, load, &guest.wants);
        match guest.ask(now, (Call::Admit, guest.budgets().admit), |i, hard| admit(i, hard, now, asked)) {
            // After the call: a copy that was promoted meanwhile has what the call wrote.
            Ok(verdict) => {
                let state = guest.state().number();
                Judged { verdict: Some(verdict), state, ..Judged::native(decided_by) }
            }
            Err(why) => Judged { fallback: Some(why), ..Judged::native(decided_by) },
        }
    }

    /// What the shadow said of a request, if it was asked about it and that is not long ago.
    #[must_use]
    pub fn shadow_said(&self, request: RequestId) -> Option<Judged> {
        let case = self.core.case()?;
        let verdict = Some(case.answer_to(request.0)?);
        Some(Judged { verdict, ..Judged::native(case.candidate.decided_by.clone()) })
    }
}

/// Inputs of one decision, for [`Runtime::ask_admission`](crate::Runtime::ask_admission).
#[derive(Clone, Copy, Debug)]
pub struct AdmissionQuestion<'a> {
    /// When.
    pub now: Micros,
    /// The request.
    pub request: &'a AdmitRequest<'a>,
    /// What the host carries.
    pub load: &'a Load,
}

/// The checked answer of an instance that serves nobody.
pub(crate) fn answer(
    instance: &mut Instance<AdmissionHook>,
    hard: Micros,
    wants: &Wants,
    question: AdmissionQuestion<'_>,
) -> Result<Verdict, Fault> {
    let AdmissionQuestion { now, request, load } = question;
    admit(instance, hard, now, (request, load, wants))
}

impl AdmissionSlot {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells guests what became of the requests that are counted in their state; for a thread off every hot path. `heard` is
    /// shown each batch that a guest has taken in. Nobody is called while the slots are bypassed, or while a circuit is open:
    /// what ends waits. A batch whose call fails is lost: how far it came cannot be known.
    pub fn settle(&self, now: Micros, names: &Arc<Names>, heard: &mut dyn FnMut(&DecidedBy, &[Ending])) {
        let forgotten = self.forgotten.swap(0, Ordering::Relaxed);
        if forgotten > 0 {
            tracing::warn!(
                slot = &*self.core.name,
                forgotten,
                "endings came faster than the admission policy took them"
            );
        }
        if self.core.is_bypassed() {
            return;
        }
        // Taken out, because no lock is held while a guest runs; nobody else settles meanwhile.
        let mut ledger = std::mem::take(&mut *self.ledger());
        let warm = self.core.warm();
        ledger.collect(&self.endings, &warm);
        self.tell_shadow(now, names, &mut ledger.unheard);
        for (place, generation) in warm.iter().enumerate() {
            let Some(guest) = &generation.guest else { continue };
            for _ in 0..=MAX_ENDINGS / MAX_BATCH {
                let due = ledger.due(&warm, place, MAX_BATCH);
                if due.is_empty() {
                    break;
                }
                let endings = ledger.endings(&due);
                let columns = Columns::of(&endings);
                let tell =
                    |instance: &mut Instance<AdmissionHook>, hard| settle(instance, hard, now, (&columns, names));
                let told = guest.consult(now, (Call::Settle, guest.budgets().settle), tell);
                if matches!(told, Ok(()) | Err(Fallback::Fault(_))) {
                    // After the call: a copy that was made meanwhile may lack what it wrote.
                    ledger.tell(&due, guest.state().number(), (self.core.shared.clock)());
                }
                match told {
                    // What a shadow takes in is no call of a policy that decides.
                    Ok(()) if guest.state().is_draft() => {}
                    Ok(()) => heard(&generation.decided_by, &endings),
                    Err(_) => break,
                }
            }
        }
        let forgotten = ledger.close(&warm, &self.core.shared.states);
        self.forgotten.fetch_add(forgotten, Ordering::Relaxed);
        *self.ledger() = ledger;
    }

    /// Hands the shadow the ends of requests that were put to it, once where there are none: it may owe itself some. What does
    /// not fit waits.
    fn tell_shadow(&self, now: Micros, names: &Arc<Names>, unheard: &mut VecDeque<Ending>) {
        let Some(shadow) = self.core.any_shadow() else { return unheard.clear() };
        let number = shadow.case.candidate.number();
        unheard.retain(|ending| ending.shadow == number);
        loop {
            let n = unheard.len().min(MAX_BATCH);
            let endings = || unheard.range(..n).copied().collect();
            if !shadow.offer(n, || DoorSample::Ended(Ended { now, names: Arc::clone(names), endings: endings() })) {
                return;
            }
            unheard.drain(..n);
            if unheard.is_empty() {
                return;
            }
        }
    }
}

/// One question and the check of its answer.
#[inline]
pub(crate) fn admit(
    instance: &mut Instance<AdmissionHook>,
    hard: Micros,
    now: Micros,
    (request, load, wants): (&AdmitRequest<'_>, &Load, &Wants),
) -> Result<Verdict, Fault> {
    let attributes = wanted(request.attributes, wants);
    let numbers = wanted_numbers(&request.numbers, wants);
    let asked = wit::Request {
        id: request.id.0,
        model: request.model,
        tenant: request.tenant,
        tenant_id: request.tenant_id,
        session: request.session,
        priority: lower_priority(request.priority),
        highest: lower_priority(request.highest),
        prompt_tokens: request.prompt_tokens,
        max_new_tokens: request.max_new_tokens,
        arrived: request.arrived,
        deadline: request.deadline,
        seed: request.seed,
        extra: &numbers[..wants.request.len().min(numbers.len())],
        attributes: &attributes,
    };
    let load = wit::Load {
        in_flight: load.in_flight,
        in_flight_limit: load.in_flight_limit,
        queued_tokens: load.queued_tokens,
        queued_tokens_limit: load.queued_tokens_limit,
        tenant_in_flight: load.tenant_in_flight,
        tenant_queued_tokens: load.tenant_queued_tokens,
    };
    let verdict = instance
        .call(hard, now, |guest, store| guest.pointsman_policy_admission().call_admit(store, now, asked, load))?;
    match verdict {
        wit::Verdict::Accept => Ok(Verdict::Accept),
        wit::Verdict::AcceptAs(priority) => match lift_priority(priority) {
            given if given < request.highest => {
                let text = format!("accepts as {given:?}, and the highest that it may give is {:?}", request.highest);
                Err(Fault::new(FaultKind::BadAnswer, text))
            }
            given => Ok(Verdict::AcceptAs(given)),
        },
        wit::Verdict::Reject(rejection) => Ok(Verdict::Reject(lift_rejection(rejection))),
    }
}

pub(crate) fn settle(
    instance: &mut Instance<AdmissionHook>,
    hard: Micros,
    now: Micros,
    (columns, names): (&Columns, &Names),
) -> Result<(), Fault> {
    let fresh = names.since(NameKind::Tenant, instance.local.tenants);
    let new_tenants: Vec<(u32, &str)> = fresh.iter().map(|(number, name)| (*number, &**name)).collect();
    let endings = wit::Endings {
        id: &columns.id,
        tenant: &columns.tenant,
        outcome: &columns.outcome,
        prompt_tokens: &columns.prompt_tokens,
        cached_tokens: &columns.cached_tokens,
        generated_tokens: &columns.generated_tokens,
        max_new_tokens: &columns.max_new_tokens,
        new_tenants: &new_tenants,
    };
    instance.call(hard, now, |guest, store| guest.pointsman_policy_admission().call_settle(store, now, endings))?;
    instance.local.tenants = new_tenants.last().map_or(instance.local.tenants, |(number, _)| *number);
    Ok(())
}

fn lift_priority(priority: types::Priority) -> Priority {
    match priority {
        types::Priority::Critical => Priority::Critical,
        types::Priority::High => Priority::High,
        types::Priority::Normal => Priority::Normal,
        types::Priority::Low => Priority::Low,
    }
}

impl Columns {
    pub(crate) fn of<'a>(endings: impl IntoIterator<Item = &'a Ending>) -> Self {
        let mut columns = Self::default();
        endings.into_iter().for_each(|ending| columns.push(ending));
        columns
    }

    fn push(&mut self, ending: &Ending) {
        self.id.push(ending.id.0);
        self.tenant.push(ending.tenant);
        self.outcome.push(ending.outcome as u8);
        self.prompt_tokens.push(ending.prompt_tokens);
        self.cached_tokens.push(ending.cached_tokens);
        self.generated_tokens.push(ending.generated_tokens);
        self.max_new_tokens.push(ending.max_new_tokens);
    }
}

// === probe ===

impl Hook for AdmissionHook {
    const WORLD: World = World::Admission;
    const MAX_ANSWER_BYTES: usize = 64 << 10;
    type Local = Told;
    const DIFFERENCES: &'static [&'static str] = &["would-refuse", "would-serve", "other-reason", "other-priority"];
    hook_bindings!(Admission, admission, AdmissionIndices, Admission, DoorSample, Bystander, Verdict);

    fn shadow(case: &Case<Self>, memory: &mut Bystander, sample: DoorSample) {
        bystander::hear(case, memory, sample);
    }

    fn shadow_paused(case: &Case<Self>, memory: &mut Bystander, sample: DoorSample) {
        bystander::hear_paused(case, memory, sample);
    }

    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        let attributes: Vec<(&str, &str)> = wants.attributes.iter().map(|name| (name.as_str(), "probe")).collect();
        let full = Load { in_flight: 256, queued_tokens: 262_144, tenant_in_flight: 200, ..probe_load() };
        for (case, load) in [("an idle host", probe_load()), ("a full host", full)] {
            for turn in 1..=WARM_CALLS {
                let request = probe_request(turn, now, &attributes);
                admit(instance, budgets.admit.hard, now, (&request, &load, wants)).map_err(|fault| ProbeFault {
                    case,
                    call: Call::Admit,
                    fault,
                })?;
            }
        }
        let names = Names::default();
        let tenant = names.intern(NameKind::Tenant, "probe");
        let mut columns = Columns::default();
        for outcome in [Outcome::Finished, Outcome::Failed, Outcome::Cancelled, Outcome::Rejected] {
            let id = RequestId(1 + outcome as u64);
            let (prompt_tokens, cached_tokens, generated_tokens, max_new_tokens) = (100, 16, 8, 16);
            columns.push(&Ending {
                id,
                tenant,
                outcome,
                prompt_tokens,
                cached_tokens,
                generated_tokens,
                max_new_tokens,
                accepted: Accepted::default(),
                shadow: 0,
            });
        }
        settle(instance, budgets.settle.hard, now, (&columns, &names)).map_err(|fault| ProbeFault {
            case: "one ending of each kind",
            call: Call::Settle,
            fault,
        })
    }
}

fn probe_load() -> Load {
    Load { in_flight_limit: 256, queued_tokens_limit: 262_144, ..Load::default() }
}

fn probe_request<'a>(turn: u64, now: Micros, attributes: &'a [(&'a str, &'a str)]) -> AdmitRequest<'a> {
    AdmitRequest {
        id: RequestId(turn),
        model: "probe",
        tenant: "probe",
        tenant_id: 1,
        session: turn,
        priority: Priority::Normal,
        highest: Priority::High,
        prompt_tokens: 100,
        max_new_tokens: 16,
        arrived: now,
        deadline: 0,
        seed: turn.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        numbers: RequestNumbers::default(),
        attributes,
    }
}
