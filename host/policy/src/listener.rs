//! The sampler's shadow: it listens to requests from their start to their end, and the edits that it would have made are
//! compared with those that held.
//!
//! The replica's driver tells it of each step, and not the thread of the active policy: that one hears nothing of requests that
//! its policy has left, or that the native one serves, and whoever waits for its words would wait for the copies too. Compared is
//! what holds when a token is chosen and not the words: two policies that keep an edit and one that says it again do the same.
//!
//! One instance listens to all replicas, and it is the spare: those of the replicas must be there when it is promoted, because a
//! sampler may have been told to let no request go on without it.

use std::collections::BTreeMap;
use std::sync::Arc;

use pointsman_sched::ids::RequestId;
use pointsman_sched::sampler::{Edit, Overheard, Started, Word};
use pointsman_telemetry::Micros;

use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault};
use crate::generation::{Generation, Renewed};
use crate::instance::Instance;
use crate::sampler::{SampledReplica, SamplerHook, ended_call, next, start};
use crate::shadow::{Case, Post, Verdict};

/// Ways in which two samplers differ, in the order of [`SamplerHook`]'s differences.
const WOULD_EDIT: usize = 0;
const WOULD_FREE: usize = 1;
const OTHER_EDIT: usize = 2;

/// What a driver tells of a step.
pub(crate) struct SamplerSample {
    pub(crate) replica: SampledReplica,
    /// Something before it is missing: what ran here is followed no further.
    pub(crate) fresh: bool,
    pub(crate) heard: Overheard,
}

/// A guest that follows requests.
pub(crate) struct Listener {
    post: Post<SamplerHook>,
    /// Those of which it has heard everything, by id.
    live: BTreeMap<u64, Followed>,
    /// When something was heard last.
    now: Micros,
}

struct Followed {
    replica: Arc<str>,
    /// What it wants to hold now.
    edit: Option<Arc<Edit>>,
    /// It wants to hear no more of it.
    is_left: bool,
}

/// What the shadow's thread does with what it hears.
pub(crate) fn hear(case: &Case<SamplerHook>, listener: &mut Option<Listener>, sample: &SamplerSample) {
    let listener = listener.get_or_insert_with(|| Listener::new(&case.candidate));
    let started = stopwatch_ns();
    let mut verdicts = Vec::with_capacity(sample.heard.chosen.len());
    let is_answered = listener.hear(sample, &mut verdicts);
    let took_ns = stopwatch_ns() - started;
    case.judged_each(verdicts.into_iter().map(|verdict| (verdict, 1)), is_answered.then_some(took_ns));
}

/// Compares what holds for a token.
fn compare(used: Option<&Edit>, shadow: Option<&Edit>) -> Verdict {
    match (used, shadow) {
        (used, shadow) if used == shadow => Verdict::Agrees,
        (None, Some(_)) => Verdict::Differs(WOULD_EDIT),
        (Some(_), None) => Verdict::Differs(WOULD_FREE),
        _ => Verdict::Differs(OTHER_EDIT),
    }
}

// === impl Listener ===

impl Listener {
    fn new(candidate: &Arc<Generation<SamplerHook>>) -> Self {
        Self { post: Post::common(candidate), live: BTreeMap::new(), now: 0 }
    }

    /// Takes a step in, and says whether it was asked something and answered all of it.
    fn hear(&mut self, sample: &SamplerSample, verdicts: &mut Vec<Verdict>) -> bool {
        let SamplerSample { replica, fresh, heard: Overheard { now, started, chosen, ended } } = sample;
        self.now = *now;
        if *fresh {
            let here = |(id, followed): (&u64, &Followed)| (followed.replica == replica.name).then_some(RequestId(*id));
            let gone: Vec<RequestId> = self.live.iter().filter_map(here).collect();
            self.end(&gone);
        }
        let n_unanswered = self.start(replica, started);
        let mut round = Vec::with_capacity(chosen.len());
        for chosen in chosen {
            let Some(followed) = self.live.get(&chosen.request.0) else { continue };
            verdicts.push(compare(chosen.edit.as_deref(), followed.edit.as_deref()));
            if !followed.is_left && !ended.contains(&chosen.request) {
                round.push((chosen.request, chosen.token));
            }
        }
        let n_unanswered = n_unanswered + self.next(replica, &round);
        self.end(ended);
        verdicts.extend(std::iter::repeat_n(Verdict::NoAnswer, n_unanswered));
        n_unanswered == 0 && !(started.is_empty() && round.is_empty())
    }

    fn start(&mut self, replica: &SampledReplica, started: &[Started]) -> usize {
        if started.is_empty() {
            return 0;
        }
        if self.post.renew(self.now) != Renewed::Not {
            // The one that has served long enough took what it knew with it.
            self.live.clear();
        }
        let words = if self.post.is_native() {
            Some(vec![Word::Leave; started.len()])
        } else {
            let now = self.now;
            self.ask(Call::Start, |instance, hard, wanted| start(instance, (hard, now), (replica, wanted), started))
        };
        let Some(words) = words else { return started.len() };
        for (started, word) in started.iter().zip(words) {
            let mut followed = Followed { replica: Arc::clone(&replica.name), edit: None, is_left: false };
            followed.take(word);
            self.live.insert(started.id.0, followed);
        }
        0
    }

    fn next(&mut self, replica: &SampledReplica, round: &[(RequestId, u32)]) -> usize {
        if round.is_empty() {
            return 0;
        }
        let (now, vocabulary) = (self.now, replica.vocabulary);
        let words = self.ask(Call::Next, |instance, hard, _| next(instance, (hard, now), vocabulary, round));
        let Some(words) = words else { return round.len() };
        for ((id, _), word) in round.iter().zip(words) {
            if let Some(followed) = self.live.get_mut(&id.0) {
                followed.take(word);
            }
        }
        0
    }

    fn end(&mut self, ended: &[RequestId]) {
        let gone = ended.iter().filter_map(|id| Some((id.0, self.live.remove(&id.0)?)));
        let ids: Vec<u64> = gone.filter(|(_, followed)| !followed.is_left).map(|(id, _)| id).collect();
        if !ids.is_empty() {
            let now = self.now;
            self.ask(Call::Ended, |instance, hard, _| ended_call(instance, (hard, now), &ids));
        }
    }

    /// What it answers; an instance that fails takes with it what it knows of every request.
    fn ask<R>(
        &mut self,
        call: Call,
        work: impl FnOnce(&mut Instance<SamplerHook>, Micros, &[String]) -> Result<R, Fault>,
    ) -> Option<R> {
        let now = self.now;
        let answer = self.post.parts().and_then(|(guest, instance)| {
            let what = (call, guest.budgets().edit);
            guest.call(instance, now, what, |instance, hard| work(instance, hard, &guest.wants.attributes))
        });
        if answer.is_none() {
            self.live.clear();
        }
        answer
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Its instance may serve others: of these it hears no more.
        let live: Vec<RequestId> = self.live.keys().map(|&id| RequestId(id)).collect();
        self.end(&live);
    }
}

// === impl Followed ===

impl Followed {
    fn take(&mut self, word: Word) {
        match word {
            Word::Leave => (self.edit, self.is_left) = (None, true),
            // No guest says that a request shall end.
            Word::Keep | Word::End => {}
            Word::Free => self.edit = None,
            Word::Edit(edit) => self.edit = Some(edit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_compare_by_what_holds_for_them() {
        let allow = |tokens: &[u32]| Some(Edit::Allow(tokens.into()));
        for (used, shadow, expect) in [
            (None, None, Verdict::Agrees),
            (allow(&[1, 2]), allow(&[1, 2]), Verdict::Agrees),
            (None, allow(&[1]), Verdict::Differs(WOULD_EDIT)),
            (allow(&[1]), None, Verdict::Differs(WOULD_FREE)),
            (allow(&[1]), allow(&[1, 2]), Verdict::Differs(OTHER_EDIT)),
            (allow(&[1]), Some(Edit::Forbid([1].into())), Verdict::Differs(OTHER_EDIT)),
        ] {
            assert_eq!(compare(used.as_ref(), shadow.as_ref()), expect, "{used:?} {shadow:?}");
        }
    }
}
