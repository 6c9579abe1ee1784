//! The admission policy's shadow: what it is asked, how two verdicts compare, and which endings it hears of.
//!
//! It counts what it would have let in, so it must hear of the end of exactly that: of requests that it was asked about and
//! accepted, when they end, and of those that the active policy refused, at once, as of any that is rejected later on. Only its
//! own thread knows what it accepted, so the ends come there by the same queue as the questions, never before them; what does
//! not fit waits with whoever tells, because a count that misses an end never mends itself. For the same reason a pause stops
//! the questions alone. What the active policy had let in before is not its concern: its state is a copy, and `endings` tells
//! whoever has one.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use pointsman_sched::admit::{AdmitRequest, Ending, Load, Outcome, Verdict as Answer};
use pointsman_sched::ids::Priority;
use pointsman_sched::route::Fallback;
use pointsman_telemetry::{Micros, Names};

use crate::admission::{AdmissionHook, AdmissionQuestion, Columns, MAX_BATCH, admit, settle};
use crate::endings::MAX_ENDINGS;
use crate::engine::stopwatch_ns;
use crate::fault::Call;
use crate::manifest::Wants;
use crate::router::wanted;
use crate::shadow::{Case, Shadow, Verdict};

/// Ways in which two admission policies differ, in the order of [`AdmissionHook`]'s differences.
const WOULD_REFUSE: usize = 0;
const WOULD_SERVE: usize = 1;
const OTHER_REASON: usize = 2;
const OTHER_PRIORITY: usize = 3;

/// What the shadow's thread is told.
pub(crate) enum DoorSample {
    Asked(Box<Asked>),
    Ended(Ended),
}

/// A decision, and what came of it.
pub(crate) struct Asked {
    now: Micros,
    /// With its texts beside it.
    request: AdmitRequest<'static>,
    model: Box<str>,
    tenant: Box<str>,
    attributes: Vec<(Box<str>, Box<str>)>,
    load: Load,
    /// None where nobody answered: it entered as it was.
    said: Option<Answer>,
}

/// Requests that have ended, maybe none.
pub(crate) struct Ended {
    pub(crate) now: Micros,
    pub(crate) names: Arc<Names>,
    pub(crate) endings: Vec<Ending>,
}

/// What the shadow's thread keeps.
#[derive(Debug, Default)]
pub(crate) struct Bystander {
    /// Requests that it accepted, and that are inside; at most [`MAX_ENDINGS`], the newest.
    inside: BTreeSet<u64>,
    /// Ends that it has not taken in; no more than those.
    owed: VecDeque<Ending>,
}

/// Puts a decision to the shadow; its generation, or 0 where it is not asked.
#[cold]
pub(crate) fn put(shadow: &Shadow<AdmissionHook>, question: AdmissionQuestion<'_>, said: Option<&Answer>) -> u64 {
    if !shadow.case.samples(question.request.id.0) {
        return 0;
    }
    let wants = shadow.case.candidate.guest.as_ref().map(|guest| &guest.wants);
    let put = shadow.put(0, || DoorSample::Asked(Box::new(Asked::of(question, said, wants))));
    if put { shadow.case.candidate.number() } else { 0 }
}

/// What the shadow's thread does with what it hears.
pub(crate) fn hear(case: &Case<AdmissionHook>, memory: &mut Bystander, sample: DoorSample) {
    match sample {
        DoorSample::Asked(asked) => memory.answer(case, &asked),
        DoorSample::Ended(ended) => memory.settle(case, ended),
    }
}

/// The same while it is paused.
pub(crate) fn hear_paused(case: &Case<AdmissionHook>, memory: &mut Bystander, sample: DoorSample) {
    match sample {
        DoorSample::Asked(_) => case.drop_some(1),
        DoorSample::Ended(ended) => memory.settle(case, ended),
    }
}

/// Compares what two answers come to for a request with this priority.
fn compare(used: Option<&Answer>, shadow: &Answer, asked: Priority) -> Verdict {
    let enters_as = |answer: &Answer| match answer {
        Answer::Accept => Ok(asked),
        Answer::AcceptAs(priority) => Ok(*priority),
        Answer::Reject(rejection) => Err(rejection.reason),
    };
    match (used.map_or(Ok(asked), enters_as), enters_as(shadow)) {
        (used, shadow) if used == shadow => Verdict::Agrees,
        (Ok(_), Err(_)) => Verdict::Differs(WOULD_REFUSE),
        (Err(_), Ok(_)) => Verdict::Differs(WOULD_SERVE),
        (Err(_), Err(_)) => Verdict::Differs(OTHER_REASON),
        (Ok(_), Ok(_)) => Verdict::Differs(OTHER_PRIORITY),
    }
}

// === impl Asked ===

impl Asked {
    fn of(question: AdmissionQuestion<'_>, said: Option<&Answer>, wants: Option<&Wants>) -> Self {
        let AdmissionQuestion { now, request, load } = question;
        let attributes = wants.map_or_else(Vec::new, |wants| wanted(request.attributes, wants));
        Self {
            now,
            request: AdmitRequest { model: "", tenant: "", attributes: &[], ..*request },
            model: request.model.into(),
            tenant: request.tenant.into(),
            attributes: attributes.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            load: *load,
            said: said.cloned(),
        }
    }

    /// As of a request that is refused after all.
    fn refused(&self) -> Ending {
        let AdmitRequest { id, tenant_id, prompt_tokens, max_new_tokens, .. } = self.request;
        Ending {
            id,
            tenant: tenant_id,
            outcome: Outcome::Rejected,
            prompt_tokens,
            cached_tokens: 0,
            generated_tokens: 0,
            max_new_tokens,
            accepted: Default::default(),
            shadow: 0,
        }
    }
}

// === impl Bystander ===

impl Bystander {
    fn answer(&mut self, case: &Case<AdmissionHook>, asked: &Asked) {
        let attributes: Vec<(&str, &str)> = asked.attributes.iter().map(|(name, value)| (&**name, &**value)).collect();
        let request =
            AdmitRequest { model: &asked.model, tenant: &asked.tenant, attributes: &attributes, ..asked.request };
        let (now, started) = (asked.now, stopwatch_ns());
        let answer = match &case.candidate.guest {
            Some(guest) => guest.consult(now, (Call::Admit, guest.budgets().admit), |instance, hard| {
                admit(instance, hard, now, (&request, &asked.load, &guest.wants))
            }),
            None => Ok(Answer::Accept),
        };
        let took_ns = stopwatch_ns() - started;
        let Ok(answer) = answer else { return case.judged(Verdict::NoAnswer, took_ns) };
        case.judged(compare(asked.said.as_ref(), &answer, request.priority), took_ns);
        match (&asked.said, &answer) {
            (_, Answer::Reject(_)) => {}
            (Some(Answer::Reject(_)), _) => {
                self.owed.push_back(asked.refused());
                if self.owed.len() > MAX_ENDINGS {
                    self.owed.pop_front();
                }
            }
            _ => {
                self.inside.insert(request.id.0);
                if self.inside.len() > MAX_ENDINGS {
                    self.inside.pop_first();
                }
            }
        }
        case.keep(request.id.0, answer);
    }

    fn settle(&mut self, case: &Case<AdmissionHook>, Ended { now, names, endings }: Ended) {
        self.owed.extend(endings.into_iter().filter(|ending| self.inside.remove(&ending.id.0)));
        let excess = self.owed.len().saturating_sub(MAX_ENDINGS);
        self.owed.drain(..excess);
        let Some(guest) = &case.candidate.guest else { return self.owed.clear() };
        while !self.owed.is_empty() {
            let n = self.owed.len().min(MAX_BATCH);
            let columns = Columns::of(self.owed.range(..n));
            let told = guest.consult(now, (Call::Settle, guest.budgets().settle), |instance, hard| {
                settle(instance, hard, now, (&columns, &names))
            });
            // As of the active policy: a batch whose call fails is lost, and what cannot be told now waits.
            if !matches!(told, Ok(()) | Err(Fallback::Fault(_))) {
                return;
            }
            self.owed.drain(..n);
        }
    }
}

#[cfg(test)]
mod tests {
    use pointsman_sched::route::{Refusal, Rejection};

    use super::*;

    #[test]
    fn verdicts_compare_by_what_they_come_to() {
        let reject =
            |reason, retry_after_ms| Answer::Reject(Rejection { reason, retry_after_ms, message: String::new() });
        let normal = || Answer::AcceptAs(Priority::Normal);
        for (used, shadow, expect) in [
            (None, Answer::Accept, Verdict::Agrees),
            (Some(Answer::Accept), normal(), Verdict::Agrees),
            (Some(Answer::Accept), Answer::AcceptAs(Priority::Low), Verdict::Differs(OTHER_PRIORITY)),
            (None, reject(Refusal::Quota, 5), Verdict::Differs(WOULD_REFUSE)),
            (Some(reject(Refusal::Quota, 5)), normal(), Verdict::Differs(WOULD_SERVE)),
            (Some(reject(Refusal::Quota, 5)), reject(Refusal::Quota, 9), Verdict::Agrees),
            (Some(reject(Refusal::Quota, 5)), reject(Refusal::NotAllowed, 5), Verdict::Differs(OTHER_REASON)),
        ] {
            assert_eq!(compare(used.as_ref(), &shadow, Priority::Normal), expect, "{used:?} {shadow:?}");
        }
    }
}
