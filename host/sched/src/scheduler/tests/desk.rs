//! Random histories of a sampler that is late, full, faulty, swapped, switched off or lost, with late masks beside it: nobody
//! gets a token that was not allowed, everybody ends, and nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use proptest::prelude::*;

use crate::batch::NativeBatch;
use crate::execute::{ExecuteError, StepOutput};
use crate::hash::mix;
use crate::ids::{Micros, RequestId};
use crate::mask::{MaskError, TokenMask, TokenSet};
use crate::request::{CancelCause, Request};
use crate::route::DecidedBy;
use crate::sampler::{Batch, Desk, Edit, Reply, SamplerWorker, Word};

use super::model::{self, CIRCLE, Host, VOCABULARY};
use super::random::CONFIG;

#[derive(Clone, Debug)]
enum Operation {
    /// With a mask that is asked so often in vain, or none.
    Submit {
        n_prompt: u32,
        max_new: u32,
        late: Option<u32>,
    },
    Cancel(u64),
    Step,
    FailStep,
    /// The next generation.
    Publish {
        closed: bool,
    },
    Native,
    /// The sampler's thread looks at what it has got.
    Work,
    /// It does so while there is no policy, which is back before the driver looks.
    WorkAway,
    Be(Manner),
    /// What it does next ends like this.
    Do(Deed),
    /// The thread is gone for good.
    Lose,
}

/// How the worker deals with the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Prompt,
    /// There when it is waited for.
    Slow,
    /// Not even then.
    Stuck,
    /// Takes nothing.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Answer,
    /// The guest and its spare.
    Fault,
    /// The host, while it asks the guest.
    Panic,
}

fn operation() -> impl Strategy<Value = Operation> {
    let late = prop_oneof![4 => Just(None), 1 => (0u32..40).prop_map(Some)];
    let submit = (1u32..12, 1u32..12, late);
    let manner = [Manner::Prompt, Manner::Slow, Manner::Stuck, Manner::Full];
    prop_oneof![
        5 => submit.prop_map(|(n_prompt, max_new, late)| Operation::Submit { n_prompt, max_new, late }),
        1 => (1u64..20).prop_map(Operation::Cancel),
        16 => Just(Operation::Step),
        1 => Just(Operation::FailStep),
        2 => any::<bool>().prop_map(|closed| Operation::Publish { closed }),
        1 => Just(Operation::Native),
        3 => Just(Operation::Work),
        2 => Just(Operation::WorkAway),
        3 => prop::sample::select(manner.to_vec()).prop_map(Operation::Be),
        1 => prop::sample::select(vec![Deed::Fault, Deed::Panic]).prop_map(Operation::Do),
    ]
}

/// The one token that `id` may get after `n` others, whoever is asked.
fn dictated(id: u64, n: usize) -> u32 {
    u32::try_from(mix(id << 16 | n as u64) % u64::from(VOCABULARY)).expect("small")
}

/// What a generation says of `id` after `n` tokens; each leaves others.
fn wanted(generation: u64, id: u64, n: usize) -> Word {
    match mix(generation << 32 ^ id).is_multiple_of(3) && n as u64 >= id % 4 {
        true => Word::Leave,
        false => Word::Edit(Arc::new(Edit::allow(vec![dictated(id, n)], VOCABULARY).expect("one token"))),
    }
}

/// The sampler's thread, and what its words allow.
#[derive(Debug)]
struct Sampler {
    /// What is published.
    active: Option<u64>,
    closed: bool,
    manner: Manner,
    deed: Deed,
    is_lost: bool,
    batch: Option<Batch>,
    owed: Vec<RequestId>,
    /// A reply, and whose.
    done: Option<(Option<u64>, Reply)>,
    /// Tokens of the requests that the guest knows; whether it knows all of it, and which generation it is.
    live: BTreeMap<u64, Vec<u32>>,
    synced: Option<u64>,
    /// Requests that were handed over, and of whose end nothing was said.
    handed: BTreeSet<u64>,
    /// What the driver was told last.
    attended: Option<u64>,
    /// There was no policy since the batch was sent: its words count for nothing.
    is_void: bool,
    /// Requests that may get anything: the policy has left them, or it could not say and is open.
    left: BTreeSet<u64>,
    loose: BTreeSet<u64>,
    /// Those that were such at some moment of the step.
    may: BTreeSet<u64>,
    /// Requests that may get nothing more.
    refused: BTreeSet<u64>,
}

#[derive(Debug)]
struct Worker(Arc<Mutex<Sampler>>);

impl Sampler {
    fn new() -> Self {
        Self {
            active: None,
            closed: false,
            manner: Manner::Prompt,
            deed: Deed::Answer,
            is_lost: false,
            batch: None,
            owed: Vec::new(),
            done: None,
            live: BTreeMap::new(),
            synced: None,
            handed: BTreeSet::new(),
            attended: None,
            is_void: false,
            left: BTreeSet::new(),
            loose: BTreeSet::new(),
            may: BTreeSet::new(),
            refused: BTreeSet::new(),
        }
    }

    /// What is said of a request whose words are lost.
    fn forsaken(&self) -> Word {
        if self.closed && self.active.is_some() { Word::End } else { Word::Leave }
    }

    fn work(&mut self) {
        let Some(batch) = self.batch.take() else { return };
        if batch.fresh {
            (self.live, self.handed) = (BTreeMap::new(), BTreeSet::new());
        }
        self.handed.extend(batch.started.iter().map(|started| started.id.0));
        for id in &batch.ended {
            assert!(self.handed.remove(&id.0), "{id:?} ended twice, or was never handed over");
        }
        let reply = match std::mem::replace(&mut self.deed, Deed::Answer) {
            Deed::Panic => self.panic(&batch),
            Deed::Fault => self.answer(&batch, None),
            Deed::Answer => self.answer(&batch, self.active),
        };
        batch.ended.iter().for_each(|id| drop(self.live.remove(&id.0)));
        self.done = Some((self.active, Reply { spent: batch, ..reply }));
    }

    fn panic(&mut self, batch: &Batch) -> Reply {
        self.synced = None;
        batch.owed().for_each(|id| drop(self.live.remove(&id.0)));
        let (word, is_forgotten) = (self.forsaken(), self.active.is_none());
        Reply { words: batch.owed().map(|id| (id, word.clone())).collect(), is_forgotten, ..Reply::default() }
    }

    /// The words of a guest, or of nobody.
    fn answer(&mut self, batch: &Batch, guest: Option<u64>) -> Reply {
        let by = |generation| DecidedBy { revision: "p".into(), generation };
        let mut reply = Reply { decided_by: self.active.map(by), ..Reply::default() };
        if self.active.is_none() {
            self.live.clear();
            reply.is_forgotten = true;
        }
        if let Some(generation) = guest
            && self.synced != guest
        {
            let says = |(id, tokens): (&u64, &Vec<u32>)| (RequestId(*id), wanted(generation, *id, tokens.len()));
            reply.renewed = self.live.iter().map(says).collect();
            self.forget_left(&reply.renewed);
        }
        self.synced = guest;
        let unanswered = if self.closed && self.active.is_some() { Word::End } else { Word::Keep };
        let says = |id, n| guest.map_or(unanswered.clone(), |generation| wanted(generation, id, n));
        for started in &batch.started {
            let before = self.live.insert(started.id.0, started.said.clone());
            assert!(before.is_none(), "{:?} starts twice", started.id);
            reply.words.push((started.id, says(started.id.0, started.said.len())));
        }
        for &(id, token) in &batch.tokens {
            let word = self.live.get_mut(&id.0).map_or(Word::Leave, |tokens| {
                tokens.push(token);
                says(id.0, tokens.len())
            });
            reply.words.push((id, word));
        }
        self.forget_left(&reply.words);
        reply
    }

    fn forget_left(&mut self, words: &[(RequestId, Word)]) {
        words.iter().filter(|(_, word)| *word == Word::Leave).for_each(|(id, _)| drop(self.live.remove(&id.0)));
    }

    fn note(&mut self) {
        self.may.extend(self.left.union(&self.loose));
    }

    /// Hands the reply over, and takes note of what its words allow.
    fn deliver(&mut self) -> Option<Reply> {
        if !self.is_lost {
            self.work();
        }
        if self.is_lost && self.done.is_none() {
            let word = self.forsaken();
            let words = self.owed.drain(..).map(|id| (id, word.clone())).collect();
            self.done = Some((self.attended, Reply { words, ..Reply::default() }));
        }
        let (generation, reply) = self.done.take()?;
        let is_elsewhere = reply.decided_by.as_ref().is_some_and(|by| Some(by.generation) != self.attended);
        if std::mem::take(&mut self.is_void) || reply.is_forgotten || is_elsewhere {
            return Some(reply);
        }
        for (RequestId(id), word) in reply.renewed.iter().chain(&reply.words) {
            match word {
                Word::Leave if generation == self.attended => {
                    // Of a fresh instance, after one that could not say: it is ended, and has its token.
                    self.refused.remove(id);
                    self.left.insert(*id);
                }
                Word::Leave | Word::Free => {}
                Word::Keep => drop(self.loose.insert(*id)),
                Word::Edit(_) => {
                    self.left.remove(id);
                    self.loose.remove(id);
                }
                Word::End => drop(self.refused.insert(*id)),
            }
            self.note();
        }
        Some(reply)
    }
}

impl SamplerWorker for Worker {
    fn attend(&mut self, _now: Micros) -> Option<u64> {
        let mut sampler = self.0.lock().expect("one thread");
        if sampler.attended != sampler.active {
            // Whoever takes over is told of those that were left, and after native of everybody.
            sampler.left.clear();
            sampler.is_void = true;
            if sampler.active.is_none() {
                sampler.loose.clear();
                sampler.refused.clear();
            }
            sampler.may = sampler.loose.clone();
            sampler.attended = sampler.active;
        }
        sampler.attended
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        let mut sampler = self.0.lock().expect("one thread");
        assert!(sampler.batch.is_none() && sampler.done.is_none() && !batch.is_empty(), "one batch at a time");
        if sampler.manner == Manner::Full {
            return Err(batch);
        }
        sampler.is_void = false;
        sampler.owed = batch.owed().collect();
        sampler.batch = Some(batch).filter(|_| !sampler.is_lost);
        Ok(())
    }

    fn poll(&mut self) -> Option<Reply> {
        let mut sampler = self.0.lock().expect("one thread");
        matches!(sampler.manner, Manner::Prompt | Manner::Full).then(|| sampler.deliver()).flatten()
    }

    fn wait(&mut self) -> Option<Reply> {
        let mut sampler = self.0.lock().expect("one thread");
        (sampler.manner != Manner::Stuck).then(|| sampler.deliver()).flatten()
    }
}

/// Allows everything, each time after having been asked in vain so often.
#[derive(Debug)]
struct Lazy {
    late: u32,
    asked: u32,
}

impl TokenMask for Lazy {
    fn advance(&mut self, token: Option<u32>) {
        assert!(token.is_none() || self.asked > self.late, "a token was chosen without it");
        self.asked = 0;
    }

    fn mask(&mut self, _patience: Duration) -> Option<Result<Arc<Edit>, MaskError>> {
        self.asked += 1;
        let all = vec![u32::MAX; VOCABULARY.div_ceil(32) as usize];
        (self.asked > self.late).then(|| Ok(Arc::new(Edit::Only(TokenSet::from_words(all)))))
    }
}

struct History {
    host: Host,
    sampler: Arc<Mutex<Sampler>>,
    /// Tokens seen of every accepted request.
    accepted: BTreeMap<u64, usize>,
    next_id: u64,
    generation: u64,
}

impl History {
    fn new(ahead: bool) -> Self {
        let sampler = Arc::new(Mutex::new(Sampler::new()));
        let mut host = Host::new(CONFIG);
        host.ahead = ahead;
        host.desk = Desk::new(Box::new(Worker(Arc::clone(&sampler))));
        Self { host, sampler, accepted: BTreeMap::new(), next_id: 1, generation: 0 }
    }

    fn sampler(&self) -> MutexGuard<'_, Sampler> {
        self.sampler.lock().expect("one thread")
    }

    fn submit(&mut self, (n_prompt, max_new): (u32, u32), late: Option<u32>) {
        let id = self.next_id;
        self.next_id += 1;
        let base = u32::try_from(id).expect("small") * 100;
        // What nobody has a word in repeats itself, and some of it is drafted.
        let prompt = (base..base + n_prompt - 1).chain([CIRCLE.start]).collect();
        let request = model::request(id, prompt, max_new, CONFIG.block_tokens);
        let request = Request { draft_tokens: max_new % 6, ..request };
        if self.host.try_submit(request).is_ok() {
            self.accepted.insert(id, 0);
            let mask = late.map(|late| Box::new(Lazy { late, asked: 0 }));
            mask.into_iter().for_each(|mask| self.host.desk.constrain(RequestId(id), mask));
        }
    }

    fn publish(&mut self, closed: bool) {
        self.generation += 1;
        let generation = self.generation;
        let mut sampler = self.sampler();
        (sampler.active, sampler.closed) = (Some(generation), closed);
    }

    fn apply(&mut self, operation: Operation) {
        self.host.now += 10;
        match operation {
            Operation::Submit { n_prompt, max_new, late } => self.submit((n_prompt, max_new), late),
            Operation::Cancel(id) => drop(self.host.cancel(id, CancelCause::Asked)),
            Operation::Step if self.host.desk.is_stalled(self.host.now, &self.host.scheduler) => {}
            Operation::Step => {
                self.sampler().may.clear();
                self.sampler().note();
                self.host.step(&mut NativeBatch);
                self.check();
            }
            Operation::FailStep => {
                let mut out = StepOutput::default();
                if !self.host.begin(&mut NativeBatch, &mut out).is_empty() {
                    self.host.fail(&ExecuteError::Device { what: "random".into() });
                }
            }
            Operation::Publish { closed } => self.publish(closed),
            Operation::Native => self.sampler().active = None,
            Operation::Work => self.sampler().work(),
            Operation::WorkAway => {
                let mut sampler = self.sampler();
                let active = sampler.active.take();
                sampler.work();
                sampler.active = active;
            }
            Operation::Be(manner) => self.sampler().manner = manner,
            Operation::Do(deed) => self.sampler().deed = deed,
            Operation::Lose => {
                let mut sampler = self.sampler();
                (sampler.is_lost, sampler.batch) = (true, None);
            }
        }
    }

    /// Looks at the tokens of a step.
    fn check(&mut self) {
        let sampler = self.sampler.lock().expect("one thread");
        for (&id, seen) in &mut self.accepted {
            let tokens = self.host.tokens(id);
            let fresh = &tokens[*seen..];
            // Who may have a word in the next ones may have come while these were computed.
            let was_free = self.host.ahead && self.host.free[0].contains(&id);
            if sampler.attended.is_some() && !fresh.is_empty() && !was_free {
                assert!(!sampler.refused.contains(&id), "{id} got {fresh:?} although it was refused: {sampler:?}");
                let expect: Vec<u32> = (*seen..tokens.len()).map(|n| dictated(id, n)).collect();
                assert!(
                    sampler.may.contains(&id) || fresh == expect,
                    "{id} got {fresh:?} after {seen} tokens, not {expect:?}: {sampler:?}"
                );
            }
            *seen = tokens.len();
        }
    }

    fn run_until_idle(&mut self) {
        for _ in 0..4_000 {
            if self.host.scheduler.is_idle() && self.host.behind.is_none() {
                break;
            }
            self.apply(Operation::Step);
        }
        assert!(self.host.scheduler.is_idle(), "{:?} {:?}", self.host.scheduler, self.sampler);
    }

    fn finish(mut self) {
        self.sampler().manner = Manner::Prompt;
        self.run_until_idle();
        // One more, so that whoever comes after native has been told.
        self.publish(false);
        self.submit((3, 3), None);
        self.run_until_idle();
        for _ in 0..3 {
            self.host.desk.attend(self.host.now, &self.host.scheduler);
        }
        let mut ended = self.host.ended.clone();
        ended.sort_unstable();
        assert_eq!(ended, self.accepted.keys().copied().collect::<Vec<_>>(), "each ends exactly once");
        assert_eq!(self.host.scheduler.block_counts().held, 0);
        assert!(self.host.desk.is_settled(), "{:?}", self.sampler);
        let sampler = self.sampler();
        assert!(sampler.is_lost || sampler.live.is_empty(), "the guest still knows {:?}", sampler.live);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn no_sampler_lets_out_what_it_has_not_allowed_or_holds_up_anybody(
        operations in prop::collection::vec(operation(), 1..160),
        ahead in any::<bool>(),
        lost_at in prop_oneof![2 => Just(None), 1 => (0usize..160).prop_map(Some)],
    ) {
        let mut history = History::new(ahead);
        history.publish(operations.len() % 2 == 0);
        for (i, operation) in operations.into_iter().enumerate() {
            if lost_at == Some(i) {
                history.apply(Operation::Lose);
            }
            history.apply(operation);
        }
        history.finish();
    }
}
