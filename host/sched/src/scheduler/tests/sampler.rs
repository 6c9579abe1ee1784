//! A sampler behind the desk: what it is shown, which edit holds when, and what its being late or gone costs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::batch::NativeBatch;
use crate::config::Config;
use crate::execute::{ExecuteError, StepOutput};
use crate::ids::{Micros, RequestId};
use crate::request::{CancelCause, Failure, FinishReason, Request, SinkEvent};
use crate::sampler::{Batch, Desk, Edit, Overheard, Reply, SamplerWorker, Started, Word};

use super::model::{self, Host, VOCABULARY, reference};
use super::{CONFIG, request};

/// The guest's end, in the hands of the test.
#[derive(Debug)]
struct Guest {
    active: bool,
    generation: u64,
    /// It says nothing of anybody.
    silent: bool,
    /// Replies are there when they are polled for.
    early: bool,
    /// Replies do not come at all.
    stuck: bool,
    /// Tokens seen of every request that it knows.
    seen: BTreeMap<u64, Vec<u32>>,
    /// All that it ever saw.
    history: BTreeMap<u64, Vec<u32>>,
    batch: Option<Batch>,
    waits: u32,
    ended: Vec<u64>,
    /// Nobody can say anything of even requests any more.
    refuses: bool,
    /// Another guest takes over with the next reply: it forbids what the one before dictated.
    renews: bool,
    /// Somebody follows requests beside it, and takes so many more steps.
    follows: bool,
    takes: u32,
    overheard: Vec<Overheard>,
}

#[derive(Debug)]
struct Worker(Arc<Mutex<Guest>>);

/// The one token that request `id` may get after `n` tokens. Odd requests are of no interest after their second token, and
/// those above 90 from the start.
fn wanted(id: u64, n: usize) -> Word {
    if id > 90 || (id % 2 == 1 && n >= 2) {
        return Word::Leave;
    }
    let token = u32::try_from(id * 20).expect("small") + u32::try_from(n).expect("small");
    Word::Edit(Arc::new(Edit::allow(vec![token], VOCABULARY).expect("one token")))
}

impl Guest {
    fn reply(&mut self) -> Option<Reply> {
        if self.stuck {
            return None;
        }
        let batch = self.batch.take()?;
        if batch.fresh {
            self.seen.clear();
        }
        let mut words = Vec::new();
        for started in &batch.started {
            let before = self.seen.insert(started.id.0, started.said.clone());
            assert!(before.is_none(), "{:?} starts twice", started.id);
            words.push((started.id, wanted(started.id.0, started.said.len())));
        }
        for &(id, token) in &batch.tokens {
            // A late guest has left a request of which a token is already on its way.
            let Some(seen) = self.seen.get_mut(&id.0) else {
                words.push((id, Word::Leave));
                continue;
            };
            seen.push(token);
            self.history.entry(id.0).or_default().push(token);
            words.push((id, wanted(id.0, seen.len())));
        }
        if self.silent {
            words.iter_mut().for_each(|(_, word)| *word = Word::Keep);
        }
        for (id, word) in &mut words {
            if self.refuses && id.0.is_multiple_of(2) {
                *word = Word::End;
            }
            if *word == Word::Leave {
                self.seen.remove(&id.0);
            }
        }
        for id in &batch.ended {
            self.ended.push(id.0);
            self.seen.remove(&id.0);
        }
        let another = |&id: &u64| {
            let dictated = dictated(id, 20);
            (RequestId(id), Word::Edit(Arc::new(Edit::forbid(dictated, VOCABULARY).expect("tokens that exist"))))
        };
        let renewed: Vec<_> = if self.renews { self.seen.keys().map(another).collect() } else { Vec::new() };
        if self.renews {
            words.iter_mut().for_each(|(_, word)| *word = Word::Keep);
        }
        Some(Reply { renewed, words, spent: batch, ..Reply::default() })
    }
}

impl SamplerWorker for Worker {
    fn attend(&mut self, _now: Micros) -> Option<u64> {
        let guest = self.0.lock().expect("one thread");
        guest.active.then_some(guest.generation)
    }

    fn send(&mut self, batch: Batch) -> Result<(), Batch> {
        let mut guest = self.0.lock().expect("one thread");
        assert!(guest.batch.is_none() && !batch.is_empty(), "one batch at a time");
        guest.batch = Some(batch);
        Ok(())
    }

    fn poll(&mut self) -> Option<Reply> {
        let mut guest = self.0.lock().expect("one thread");
        if guest.early { guest.reply() } else { None }
    }

    fn wait(&mut self) -> Option<Reply> {
        let mut guest = self.0.lock().expect("one thread");
        guest.waits += 1;
        guest.reply()
    }

    fn follows(&self, _request: RequestId) -> bool {
        self.0.lock().expect("one thread").follows
    }

    fn overhear(&mut self, heard: Overheard) -> bool {
        let mut guest = self.0.lock().expect("one thread");
        let takes = guest.takes > 0;
        guest.takes = guest.takes.saturating_sub(1);
        guest.overheard.push(heard);
        takes
    }
}

fn host(config: Config, early: bool) -> (Host, Arc<Mutex<Guest>>) {
    let guest = Guest {
        active: true,
        generation: 1,
        silent: false,
        early,
        stuck: false,
        seen: BTreeMap::new(),
        history: BTreeMap::new(),
        batch: None,
        waits: 0,
        ended: Vec::new(),
        refuses: false,
        renews: false,
        follows: false,
        takes: u32::MAX,
        overheard: Vec::new(),
    };
    let guest = Arc::new(Mutex::new(guest));
    let mut host = Host::new(config);
    host.desk = Desk::new(Box::new(Worker(Arc::clone(&guest))));
    host.desk.attend(0, &host.scheduler);
    (host, guest)
}

/// Lets the guest look at what was handed over last.
fn settle(host: &mut Host, guest: &Mutex<Guest>) {
    guest.lock().expect("one thread").early = true;
    for _ in 0..3 {
        host.desk.attend(host.now, &host.scheduler);
    }
}

fn steps(host: &mut Host, n: u32) {
    for _ in 0..n {
        host.step(&mut NativeBatch);
    }
}

fn dictated(id: u64, n: usize) -> Vec<u32> {
    let first = u32::try_from(id * 20).expect("small");
    (first..).take(n).collect()
}

#[test]
fn every_token_has_the_edit_that_its_predecessor_asked_for() {
    for early in [true, false] {
        let (mut host, guest) = host(CONFIG, early);
        for id in [2, 4, 91, 1, 92] {
            host.submit(request(id, 5, 6));
            host.step(&mut NativeBatch);
        }
        host.run_until_idle(&mut NativeBatch);
        settle(&mut host, &guest);
        for id in [2, 4] {
            assert_eq!(host.tokens(id), dictated(id, 6), "early: {early}");
        }
        assert_eq!(host.tokens(1)[..2], dictated(1, 2));
        let guest = guest.lock().expect("one thread");
        for id in [91, 92] {
            assert_eq!(host.tokens(id), reference(&request(id, 5, 6)), "a neighbour without a mask");
            assert!(!guest.history.contains_key(&id), "of no interest");
        }
        // Real tokens, each once, and none of the last: there is nothing after it.
        assert_eq!(guest.history, BTreeMap::from([(1, dictated(1, 2)), (2, dictated(2, 5)), (4, dictated(4, 5))]));
        assert!(guest.seen.is_empty(), "it has forgotten what has ended");
    }
}

#[test]
fn a_policy_that_cannot_say_anything_leaves_the_edits_of_the_one_before() {
    let (mut host, guest) = host(CONFIG, true);
    host.submit(request(2, 5, 8));
    steps(&mut host, 4);
    let n = host.tokens(2).len();
    assert!((1..6).contains(&n), "it runs");
    {
        let mut guest = guest.lock().expect("one thread");
        (guest.generation, guest.silent) = (2, true);
    }
    host.run_until_idle(&mut NativeBatch);
    let tokens = host.tokens(2);
    assert_eq!(tokens[..n], dictated(2, n));
    assert!(tokens.len() == 8 && tokens[n..].iter().all(|token| *token == tokens[n]), "{tokens:?}");
    assert!(dictated(2, n + 1).contains(&tokens[n]), "what was said last holds: {tokens:?}");
}

#[test]
fn a_sampler_sees_the_texts_that_it_wants() {
    let text = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let attributes = Arc::from([text("header.x-plan", "gold"), text("header.x-other", "1")]);
    let started = Started::of(&Request { attributes, ..request(2, 5, 6) });
    for (wanted, expect) in [
        (&[][..], &[][..]),
        (&["header.x-plan"], &[("header.x-plan", "gold")]),
        (&["header.x-absent", "header.x-other"], &[("header.x-other", "1")]),
    ] {
        let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(started.texts(&wanted), expect, "{wanted:?}");
    }
}

#[test]
fn a_preempted_request_keeps_its_edit() {
    let (mut host, guest) = host(Config { n_blocks: 10, ..CONFIG }, false);
    for id in [2, 4] {
        host.submit(request(id, 8, 24));
    }
    host.run_until_idle(&mut NativeBatch);
    assert!(host.scheduler.take_counters().preemptions > 0);
    // The last tokens of request 2 run into those of request 4: only the order counts.
    for id in [2, 4] {
        assert_eq!(host.tokens(id), dictated(id, 24));
    }
    assert!(guest.lock().expect("one thread").waits > 0);
}

#[test]
fn nobody_gets_a_token_before_the_policy_has_spoken() {
    // Before its first token, and after its first.
    for n_before in [0, 1] {
        let (mut host, guest) = host(CONFIG, false);
        for id in [2, 4, 91] {
            host.submit(request(id, 5, 6));
        }
        steps(&mut host, n_before);
        guest.lock().expect("one thread").stuck = true;
        steps(&mut host, 3);
        assert_eq!(guest.lock().expect("one thread").waits, n_before + 3, "one wait per step, however many rows");
        assert_eq!(host.tokens(4), dictated(4, n_before as usize), "its row is computed again and again");
        assert_eq!(host.tokens(91).len(), 4 * n_before as usize, "a request that was left goes on");
        guest.lock().expect("one thread").stuck = false;
        host.run_until_idle(&mut NativeBatch);
        for id in [2, 4] {
            assert_eq!(host.tokens(id), dictated(id, 6), "{n_before}");
        }
        assert_eq!(host.tokens(91), reference(&request(91, 5, 6)), "{n_before}");
        assert_eq!(guest.lock().expect("one thread").history[&4], dictated(4, 5), "real tokens only");
    }
}

#[test]
fn a_withheld_row_can_be_cancelled_and_freed() {
    let (mut host, guest) = host(Config { n_blocks: 10, ..CONFIG }, false);
    for id in [2, 4] {
        host.submit(request(id, 8, 24));
    }
    guest.lock().expect("one thread").stuck = true;
    steps(&mut host, 3);
    host.cancel(2, CancelCause::Asked);
    // The policy goes while its word is on the way, and comes back: what it said then does not count any more.
    guest.lock().expect("one thread").active = false;
    host.step(&mut NativeBatch);
    assert_eq!(host.tokens(4), reference(&request(4, 8, 24))[..1], "free at once");
    let mut state = guest.lock().expect("one thread");
    (state.active, state.stuck) = (true, false);
    drop(state);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(4)[1..], dictated(4, 24)[1..]);
    assert!(host.tokens(2).is_empty(), "it never got one");
}

#[test]
fn a_request_of_which_nobody_can_say_anything_gets_no_more_token_and_ends() {
    for early in [true, false] {
        let (mut host, guest) = host(CONFIG, early);
        host.submit(request(2, 5, 6));
        host.submit(request(1, 5, 6));
        steps(&mut host, 2);
        guest.lock().expect("one thread").refuses = true;
        // Known from the start, and new.
        host.submit(request(4, 5, 6));
        host.run_until_idle(&mut NativeBatch);
        let (known, fresh) = (host.sent(2).events, host.sent(4).events);
        let tokens = host.tokens(2);
        assert_eq!(tokens, dictated(2, tokens.len()), "early: {early}: none without the policy");
        assert!(tokens.len() < 6 && known.last() == Some(&SinkEvent::Failed(Failure::Unanswered)), "{known:?}");
        assert_eq!((host.tokens(4), fresh.last()), (vec![], Some(&SinkEvent::Failed(Failure::Unanswered))));
        assert_eq!(host.tokens(1).len(), 6, "another one goes on");
    }
}

#[test]
fn a_guest_that_takes_over_says_what_it_wants_of_those_that_run() {
    let (mut host, guest) = host(CONFIG, false);
    host.submit(request(2, 4, 6));
    for _ in 0..3 {
        host.step(&mut NativeBatch);
    }
    guest.lock().expect("one thread").renews = true;
    host.run_until_idle(&mut NativeBatch);
    let tokens = host.tokens(2);
    assert_eq!(tokens[..3], dictated(2, 3));
    assert!(tokens[3..].iter().all(|token| !dictated(2, 20).contains(token)), "{tokens:?}");
}

#[test]
fn ends_are_told_once_and_only_of_what_is_known() {
    let (mut host, guest) = host(CONFIG, true);
    let stop = Arc::from(dictated(4, 3));
    host.submit(request(2, 4, 9));
    host.submit(Request { stop_tokens: Arc::clone(&stop), ..request(4, 4, 9) });
    // Cancelled before it was handed over: the guest never hears of it.
    host.submit(request(6, 4, 9));
    host.cancel(6, CancelCause::Asked);
    host.step(&mut NativeBatch);
    host.cancel(2, CancelCause::Asked);
    host.step(&mut NativeBatch);
    assert_eq!(host.sent(4).events.last(), Some(&SinkEvent::Finished(FinishReason::Stop(80))));
    // A failed step ends its requests, and what they had asked for.
    host.submit(request(8, 4, 9));
    host.step(&mut NativeBatch);
    let mut out = StepOutput::default();
    host.begin(&mut NativeBatch, &mut out);
    host.fail(&ExecuteError::Device { what: "lost".into() });
    settle(&mut host, &guest);
    let guest = guest.lock().expect("one thread");
    let mut ended = guest.ended.clone();
    ended.sort_unstable();
    assert_eq!(ended, [2, 4, 8]);
    assert_eq!(guest.history.get(&4), None, "a stop token ends it, so nothing follows");
    assert!(guest.seen.is_empty());
}

#[test]
fn without_a_policy_everybody_is_free_at_once() {
    let (mut host, guest) = host(CONFIG, true);
    host.submit(request(2, 4, 6));
    host.step(&mut NativeBatch);
    guest.lock().expect("one thread").active = false;
    host.run_until_idle(&mut NativeBatch);
    let tokens = host.tokens(2);
    assert_eq!(tokens[0], 40);
    assert!(tokens[1..].iter().all(|token| !dictated(2, 9).contains(token)), "{tokens:?}");
    // A policy that comes later has a say from the next token on.
    host.submit(request(4, 4, 6));
    host.step(&mut NativeBatch);
    guest.lock().expect("one thread").active = true;
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(4)[0], reference(&request(4, 4, 6))[0]);
    assert_eq!(host.tokens(4)[1..], dictated(4, 6)[1..]);
    host.submit(request(6, 4, 3));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(6), dictated(6, 3));
}

/// What was told of a request: how often it started, its tokens with the only one that was allowed (0: any), how often it ended.
fn told(guest: &Guest, id: u64) -> (usize, Vec<(u32, u32)>, usize) {
    let heard = &guest.overheard;
    let only = |edit: Option<&Edit>| match edit {
        Some(Edit::Allow(tokens)) => tokens[0],
        _ => 0,
    };
    let chosen = heard.iter().flat_map(|heard| &heard.chosen).filter(|chosen| chosen.request.0 == id);
    (
        heard.iter().flat_map(|heard| &heard.started).filter(|started| started.id.0 == id).count(),
        chosen.map(|chosen| (chosen.token, only(chosen.edit.as_deref()))).collect(),
        heard.iter().flat_map(|heard| &heard.ended).filter(|ended| ended.0 == id).count(),
    )
}

#[test]
fn whoever_follows_a_request_hears_every_token_with_the_edit_that_held() {
    for active in [true, false] {
        let (mut host, guest) = host(CONFIG, false);
        guest.lock().expect("one thread").active = active;
        host.submit(request(6, 5, 6));
        steps(&mut host, 1);
        guest.lock().expect("one thread").follows = true;
        for id in [2, 1] {
            // A text that repeats itself, token by token all the same.
            let prompt = vec![900, 901, 902, 903, 904, 900];
            host.submit(Request { draft_tokens: 4, ..model::request(id, prompt, 12, CONFIG.block_tokens) });
        }
        host.run_until_idle(&mut NativeBatch);
        host.desk.attend(host.now, &host.scheduler);
        let guest = guest.lock().expect("one thread");
        assert_eq!(told(&guest, 6), (0, vec![], 0), "it ran before");
        for id in [2, 1] {
            let with_edit = |(n, token): (usize, u32)| match wanted(id, n) {
                Word::Edit(_) if active => (token, token),
                _ => (token, 0),
            };
            let tokens = host.tokens(id).into_iter().enumerate().map(with_edit).collect();
            assert_eq!(told(&guest, id), (1, tokens, 1), "{id}, active: {active}");
        }
        assert_eq!(guest.waits > 0, active, "nobody waits for whoever follows");
    }
}

#[test]
fn a_step_that_is_not_taken_ends_what_is_followed() {
    let (mut host, guest) = host(CONFIG, false);
    let mut state = guest.lock().expect("one thread");
    (state.active, state.follows, state.takes) = (false, true, 2);
    drop(state);
    host.submit(request(2, 5, 6));
    steps(&mut host, 4);
    let n_told = guest.lock().expect("one thread").overheard.len();
    assert_eq!(n_told, 3, "the third is not taken, and the fourth is not told");
    guest.lock().expect("one thread").takes = u32::MAX;
    host.submit(request(4, 5, 2));
    host.run_until_idle(&mut NativeBatch);
    host.desk.attend(host.now, &host.scheduler);
    let mut guest = guest.lock().expect("one thread");
    assert_eq!(told(&guest, 4).0, 1);
    guest.overheard.drain(..n_told);
    assert_eq!(told(&guest, 2), (0, vec![], 0), "followed no further");
}
