//! Drafts: what a request says does not depend on them, nor do its neighbours; and they take what nobody else needs.

use std::sync::Arc;

use crate::batch::NativeBatch;
use crate::config::Config;
use crate::draft::DraftMethod;
use crate::draft::model::{DraftModel, DraftTerms};
use crate::execute::{ExecuteError, Executor, StepOutput, StepPlan};
use crate::ids::RequestId;
use crate::mask::{MaskError, TokenMask};
use crate::request::{CancelCause, Failure, FinishReason, Request, Sampling, SinkEvent};
use crate::sampler::{Edit, EditSource};

use super::CONFIG;
use super::model::{self, CIRCLE, Host, reference};

const ROOMY: Config = Config { n_blocks: 64, max_running: 20, step_tokens: 40, ..CONFIG };

/// A request whose text repeats itself.
fn request(id: u64, max_new: u32, draft_tokens: u32) -> Request {
    let own = 2_000 + u32::try_from(id).expect("small");
    Request { draft_tokens, ..model::request(id, vec![own, 1, 2, 3, 4, CIRCLE.start], max_new, CONFIG.block_tokens) }
}

/// Drafts of a request's row, 0 without one.
fn drafts_of(plan: &StepPlan, id: u64) -> u32 {
    plan.rows.iter().find(|row| row.request.0 == id).map_or(0, |row| row.drafts)
}

/// Drafts that came true, and that did not, as the sink was told.
fn told(host: &Host, id: u64) -> (u32, u32) {
    host.sent(id).events.iter().fold((0, 0), |(yes, no), event| match event {
        SinkEvent::Token { drafted, .. } => (yes + u32::from(drafted.is_draft), no + drafted.rejected),
        _ => (yes, no),
    })
}

/// A row carries what it computes at the end of its history, drafts included.
fn histories_end_with_the_row(plan: &StepPlan) {
    for row in &plan.rows {
        let Some(sample) = row.sample.as_ref().filter(|sample| sample.sampling.needs_history()) else { continue };
        let end = sample.history.end + row.drafts;
        let history = &plan.history[sample.history.start as usize..end as usize];
        assert!(history.ends_with(plan.tokens_of(row)), "{row:?}");
    }
}

#[test]
fn a_text_is_the_same_with_drafts_and_takes_fewer_steps() {
    let sampling = Arc::new(Sampling { presence_penalty: 0.5, ..Sampling::default() });
    let mut n_steps = [0; 4];
    for id in 1..=60 {
        for (draft_tokens, n_steps) in [0, 1, 4, 16].into_iter().zip(&mut n_steps) {
            let mut host = Host::new(ROOMY);
            host.submit(Request { sampling: Arc::clone(&sampling), ..request(id, 40, draft_tokens) });
            while host.step_with(&mut NativeBatch, histories_end_with_the_row).is_some() {
                *n_steps += 1;
                let slot = host.scheduler.sequences.find(id);
                let spare = slot.map(|slot| {
                    let sequence = &host.scheduler.sequences[slot];
                    sequence.table.len() > sequence.n_tokens().div_ceil(ROOMY.block_tokens) as usize
                });
                assert_ne!(spare, Some(true), "blocks that only drafts needed go back");
            }
            assert_eq!(host.tokens(id), reference(&request(id, 40, 0)), "{id} with {draft_tokens} drafts");
            assert_eq!(host.sent(id).events.last(), Some(&SinkEvent::Finished(FinishReason::Length)));
            let counters = host.scheduler.take_counters();
            let (yes, no) = told(&host, id);
            assert_eq!((counters.accepted_tokens, counters.draft_tokens), (yes.into(), (yes + no).into()));
            assert_eq!(counters.generated_tokens, 40);
            // 45 of its 46 tokens are computed: the full blocks of them are found by the next turn, and no draft is.
            assert_eq!(host.scheduler.block_counts().cached, 45 / CONFIG.block_tokens);
        }
    }
    let [none, one, four, most] = n_steps;
    assert_eq!(none, 60 * 40);
    assert!(none > one && one > four && four >= most, "{n_steps:?}");
}

#[test]
fn the_next_turn_finds_what_was_said() {
    for draft_tokens in [0, 5] {
        let mut host = Host::new(ROOMY);
        host.submit(request(1, 30, draft_tokens));
        host.run_until_idle(&mut NativeBatch);
        let turn = [&request(1, 30, 0).prompt[..], &host.tokens(1), &[9, CIRCLE.start]].concat();
        let next = || model::request(2, turn.clone(), 20, CONFIG.block_tokens);
        host.submit(Request { draft_tokens, ..next() });
        host.run_until_idle(&mut NativeBatch);
        // 36 tokens, of which the last was never computed.
        assert_eq!(host.sent(2).events[0], SinkEvent::Started { queued_us: 0, cached_tokens: 32 });
        assert_eq!(host.tokens(2), reference(&next()));
    }
}

#[test]
fn choices_of_a_prompt_draft_each_for_itself() {
    let mut host = Host::new(ROOMY);
    for id in [1, 2, 3] {
        let fork_of = (id > 1).then_some(RequestId(1));
        host.submit(Request { id: RequestId(id), fork_of, ..request(7, 10 * id as u32, 4 * (id as u32 - 1)) });
    }
    host.run_until_idle(&mut NativeBatch);
    let long = reference(&request(7, 30, 0));
    for id in [1, 2, 3] {
        assert_eq!(host.tokens(id), long[..10 * id as usize], "choice {id}");
    }
    assert_eq!(told(&host, 1), (0, 0), "it asked for none");
    assert!(told(&host, 2).0 > 0 && told(&host, 3).0 > 0);
}

/// A prompt twice round the circle that goes on with it for so many tokens: each is known from the first one on.
fn circling(n: u32) -> Vec<u32> {
    let prompt = |own: u32| -> Vec<u32> { [own].into_iter().chain(900..905).chain(900..905).collect() };
    let goes_on = |prompt: &Vec<u32>| {
        reference(&model::request(1, prompt.clone(), n, 4)).into_iter().eq((900..905).cycle().take(n as usize))
    };
    (1..).map(prompt).find(goes_on).expect("one that goes on")
}

#[test]
fn drafts_take_what_nobody_else_needs() {
    let (target, prompt) = (9, circling(2));
    // The scheduler, decodes beside, whether a long prefill is, tokens to generate, drafts asked for and had.
    for (config, n_decodes, prefill, max_new, asked, expect) in [
        (CONFIG, 0, false, 20, 2, 2),
        (CONFIG, 0, false, 20, 0, 0),
        // A token is chosen in `max_running` places.
        (CONFIG, 0, false, 20, 16, 3),
        (CONFIG, 2, false, 20, 16, 1),
        (CONFIG, 3, false, 20, 16, 0),
        (ROOMY, 0, false, 40, 99, 16),
        // The last token is chosen and not computed.
        (ROOMY, 0, false, 5, 16, 3),
        (ROOMY, 0, false, 2, 16, 0),
        // A prefill takes its chunk first.
        (Config { step_tokens: 12, max_running: 12, ..CONFIG }, 0, false, 20, 16, 11),
        (Config { step_tokens: 12, max_running: 12, ..CONFIG }, 0, true, 20, 16, 3),
        // It holds three full blocks, and one is left for the next growth.
        (Config { n_blocks: 4, context_tokens: 16, ..CONFIG }, 0, false, 5, 16, 0),
        (Config { n_blocks: 5, context_tokens: 16, ..CONFIG }, 0, false, 5, 16, 3),
    ] {
        let mut host = Host::new(config);
        for id in 0..n_decodes {
            host.submit(model::request(500 + id, vec![77], 40, CONFIG.block_tokens));
        }
        host.submit(Request {
            draft_tokens: asked,
            ..model::request(target, prompt.clone(), max_new, CONFIG.block_tokens)
        });
        while host.tokens(target).is_empty() {
            host.step(&mut NativeBatch);
        }
        // As if many had come true.
        let slot = host.scheduler.sequences.find(target).expect("it runs");
        host.scheduler.sequences[slot].drafts.learn(16, 16, 0);
        if prefill {
            host.submit(model::request(600, (0..30).collect(), 1, CONFIG.block_tokens));
        }
        let found = host.step_with(&mut NativeBatch, |plan| drafts_of(plan, target));
        assert_eq!(found, Some(expect), "{config:?}, {n_decodes} beside, {max_new} to generate, {asked} asked for");
    }
}

#[test]
fn places_are_shared() {
    // Places of the executor, and drafts of rows that have four, one, none and four tokens proposed.
    for (places, expect) in [
        (u32::MAX, [4, 1, 0, 4]),
        (12, [3, 1, 0, 4]),
        (9, [2, 1, 0, 2]),
        (6, [1, 1, 0, 0]),
        (5, [1, 0, 0, 0]),
        (4, [0; 4]),
        (0, [0; 4]),
    ] {
        let mut host = Host::new(ROOMY);
        for (id, draft_tokens) in [(1, 4), (2, 1), (3, 0), (4, 4)] {
            host.submit(Request { draft_tokens, ..model::request(id, circling(12), 40, CONFIG.block_tokens) });
        }
        host.draft_places = 0;
        while host.tokens(4).is_empty() {
            host.step(&mut NativeBatch);
        }
        host.draft_places = places;
        for id in 1..=4 {
            let slot = host.scheduler.sequences.find(id).expect("it runs");
            host.scheduler.sequences[slot].drafts.learn(16, 16, 0);
        }
        let found = host.step_with(&mut NativeBatch, |plan| [1, 2, 3, 4].map(|id| drafts_of(plan, id)));
        assert_eq!(found, Some(expect), "{places} places");
    }
}

#[test]
fn no_step_is_planned_ahead_of_one_that_may_have_drafts() {
    let (ngram, model) = (DraftMethod::Ngram, DraftMethod::Model);
    // Method, tokens asked for, whether they were worth it, places; whether a step is planned.
    for (draft_method, draft_tokens, worth, places, expect) in [
        (ngram, 4, true, 8, false),
        (ngram, 0, true, 8, true),
        (ngram, 4, false, 8, true),
        (ngram, 4, true, 3, false),
        (ngram, 4, true, 2, true),
        // Nobody is there to draft.
        (model, 4, true, 8, true),
    ] {
        let mut host = Host::new(ROOMY);
        for (id, draft_tokens) in [(1, 0), (2, draft_tokens)] {
            let request = model::request(id, circling(12), 40, CONFIG.block_tokens);
            host.submit(Request { draft_tokens, draft_method, ..request });
        }
        while host.tokens(2).is_empty() {
            host.step(&mut NativeBatch);
        }
        let slot = host.scheduler.sequences.find(2).expect("it runs");
        host.scheduler.sequences[slot].drafts.learn(64, if worth { 64 } else { 0 }, 0);
        host.draft_places = 0;
        host.begin(&mut NativeBatch, &mut StepOutput::default());
        let planned = host.scheduler.schedule_ahead(host.now, &mut NativeBatch, places, |_| true).is_some();
        assert_eq!(planned, expect, "{draft_method:?} {draft_tokens} {worth} {places}");
    }
}

/// Allows everything.
#[derive(Debug)]
struct Anything;

impl TokenMask for Anything {
    fn advance(&mut self, _token: Option<u32>) {}

    fn mask(&mut self, _patience: std::time::Duration) -> Option<Result<Arc<Edit>, MaskError>> {
        Some(Ok(Arc::new(Edit::Bias(Box::from([])))))
    }
}

#[test]
fn what_somebody_else_has_a_word_in_is_not_drafted() {
    let mut host = Host::new(ROOMY);
    for id in [1, 2] {
        host.submit(request(id, 40, 4));
    }
    host.desk.constrain(RequestId(2), Box::new(Anything));
    host.run_until_idle(&mut NativeBatch);
    for id in [1, 2] {
        assert_eq!(host.tokens(id), reference(&request(id, 40, 0)), "{id}");
        assert_eq!(told(&host, id).0 > 0, id == 1, "{id}");
    }
}

#[test]
fn a_client_that_goes_gets_nothing_more() {
    for after in 1..30 {
        let mut host = Host::new(ROOMY);
        host.submit_closing(request(1, 40, 6), after);
        host.run_until_idle(&mut NativeBatch);
        let (tokens, sent) = (host.tokens(1), host.sent(1).events);
        assert_eq!(tokens, reference(&request(1, 40, 0))[..tokens.len()]);
        assert_eq!(sent.last(), Some(&SinkEvent::Cancelled(CancelCause::ClientGone)), "after {after}");
        // The event at which it has gone, and the end.
        assert!(sent.len() <= after + 2, "{} events after {after}", sent.len());
    }
}

#[test]
fn an_output_without_what_follows_the_drafts_fails_the_step() {
    let mut host = Host::new(ROOMY);
    host.submit(request(1, 40, 4));
    host.submit(model::request(2, vec![5, 6, 7], 40, CONFIG.block_tokens));
    let mut out = StepOutput::default();
    while !host.begin(&mut NativeBatch, &mut out).is_empty() && out.after_drafts.is_empty() {
        host.finish(&mut out);
    }
    out.after_drafts.pop();
    host.finish(&mut out);
    for id in [1, 2] {
        assert!(matches!(host.sent(id).events.last(), Some(SinkEvent::Failed(Failure::Engine(_)))), "{id}");
    }
    assert!(out.after_drafts.is_empty() && host.scheduler.is_idle());
}

const LONG: Config = Config { context_tokens: 256, ..ROOMY };

/// Says what the model would, but for every so many-th token; counts the tokens that it computes.
struct Smaller {
    cells: Vec<u64>,
    wrong_every: u64,
    fails: bool,
    n_chosen: u64,
}

impl Executor for Smaller {
    fn execute(
        &mut self,
        plan: &StepPlan,
        edits: &mut dyn EditSource,
        out: &mut StepOutput,
    ) -> Result<(), ExecuteError> {
        histories_end_with_the_row(plan);
        if self.fails {
            return Err(ExecuteError::Malformed { what: "a fault" });
        }
        model::execute(plan, (&mut self.cells, CONFIG.block_tokens as usize), edits, out);
        for sampled in &mut out.sampled {
            self.n_chosen += 1;
            if self.n_chosen.is_multiple_of(self.wrong_every) {
                sampled.token = (sampled.token + 1) % model::VOCABULARY;
            }
        }
        Ok(())
    }
}

const TERMS: DraftTerms = DraftTerms {
    block_tokens: CONFIG.block_tokens,
    n_blocks: 64,
    max_rows: 8,
    step_tokens: 16,
    context_tokens: 200,
    vocabulary: 1 << 16,
    least_percent: 50,
};

fn drafted_by(config: Config, terms: DraftTerms, (wrong_every, fails): (u64, bool)) -> Host {
    let mut host = Host::new(config);
    let cells = vec![0; (terms.n_blocks * terms.block_tokens) as usize];
    let smaller = Smaller { cells, wrong_every, fails, n_chosen: 0 };
    host.scheduler.draft_with(DraftModel::new(Box::new(smaller), terms));
    host
}

/// One that asks for the draft model; its text does not repeat itself.
fn modelled(id: u64, n_prompt: u32, max_new: u32) -> Request {
    let prompt = (0..n_prompt).map(|i| 7 * i + 31 * u32::try_from(id).expect("small")).collect();
    let request = model::request(id, prompt, max_new, CONFIG.block_tokens);
    Request { draft_tokens: 5, draft_method: DraftMethod::Model, ..request }
}

fn held(host: &mut Host) -> u32 {
    host.scheduler.draft_model().expect("there is one").block_counts().held
}

#[test]
fn a_draft_model_changes_no_answer_and_leaves_nothing_behind() {
    let history = Arc::new(Sampling { presence_penalty: 0.5, ..Sampling::default() });
    // Its sizes, every which token is wrong, whether it fails, and how many come true at least and at most, in percent.
    for (terms, wrong_every, fails, least, most) in [
        (TERMS, u64::MAX, false, 100, 100),
        (TERMS, 3, false, 30, 90),
        (TERMS, 1, false, 0, 0),
        (TERMS, 1, true, 0, 0),
        // A pool for one text, and for none; and one that is too short for the end of it.
        (DraftTerms { n_blocks: 12, ..TERMS }, 5, false, 30, 99),
        (DraftTerms { n_blocks: 2, ..TERMS }, 5, false, 0, 0),
        (DraftTerms { context_tokens: 30, ..TERMS }, 5, false, 30, 99),
        // Tokens that it does not know.
        (DraftTerms { vocabulary: 5, ..TERMS }, 5, false, 0, 0),
        (DraftTerms { max_rows: 1, ..TERMS }, 7, false, 30, 99),
    ] {
        let mut host = drafted_by(LONG, terms, (wrong_every, fails));
        let sampling = |id: u64| if id == 2 { Arc::clone(&history) } else { Arc::default() };
        for id in 1..=3 {
            host.submit(Request { sampling: sampling(id), ..modelled(id, 5 + 12 * id as u32, 40) });
        }
        host.run_until_idle(&mut NativeBatch);
        for id in 1..=3 {
            assert_eq!(host.tokens(id), reference(&modelled(id, 5 + 12 * id as u32, 40)), "{id} {terms:?}");
        }
        assert_eq!(held(&mut host), 0, "{terms:?}");
        let counters = host.scheduler.take_counters();
        let (came_true, all) = (counters.model_accepted_tokens, counters.model_draft_tokens);
        assert_eq!((came_true, all), (counters.accepted_tokens, counters.draft_tokens));
        let percent = came_true * 100 / all.max(1);
        assert!((least..=most).contains(&percent), "{came_true} of {all}, {wrong_every} {terms:?}");
        assert_eq!(all == 0, fails || terms.n_blocks == 2 || terms.vocabulary == 5, "{all} {terms:?}");
        let model = host.scheduler.draft_model().expect("there is one");
        assert_eq!(model.take_failure().is_some(), fails);
        assert_eq!(model.take_counters().no_room > 0, terms.n_blocks < 64, "{terms:?}");
    }
}

#[test]
fn a_draft_model_that_is_right_saves_steps_and_one_that_is_wrong_pauses() {
    for (wrong_every, most_steps, most_drafts) in [(u64::MAX, 70, 200), (1, 210, 110)] {
        let mut host = drafted_by(LONG, TERMS, (wrong_every, false));
        host.submit(Request { draft_tokens: 4, ..modelled(1, 6, 200 - 10) });
        let mut n_steps = 0;
        while host.step(&mut NativeBatch) {
            n_steps += 1;
        }
        let drafted = host.scheduler.take_counters().model_draft_tokens;
        assert!(n_steps <= most_steps && drafted <= most_drafts, "{n_steps} steps, {drafted} drafts");
        assert!(drafted >= 32, "{drafted}");
    }
}

#[test]
fn what_a_request_held_of_the_draft_model_goes_with_it() {
    // Cancelled, preempted for a pool that is too small, and ended by a stop token.
    let mut host = drafted_by(LONG, TERMS, (4, false));
    host.submit(modelled(1, 20, 60));
    while host.tokens(1).len() < 10 {
        host.step(&mut NativeBatch);
    }
    assert!(held(&mut host) > 0);
    host.cancel(1, CancelCause::Asked);
    assert_eq!(held(&mut host), 0);
    let small = Config { n_blocks: 20, ..LONG };
    let mut host = drafted_by(small, TERMS, (4, false));
    for id in 1..=3 {
        host.submit(modelled(id, 20, 40));
    }
    host.run_until_idle(&mut NativeBatch);
    for id in 1..=3 {
        assert_eq!(host.tokens(id), reference(&modelled(id, 20, 40)), "{id}");
    }
    assert!(host.scheduler.take_counters().preemptions > 0);
    assert_eq!(held(&mut host), 0);
    let said = reference(&modelled(4, 20, 40));
    let at = (5..40).find(|at| !said[..*at].contains(&said[*at])).expect("a token that is new");
    let mut host = drafted_by(LONG, TERMS, (u64::MAX, false));
    host.submit(Request { stop_tokens: Arc::from([said[at]]), ..modelled(4, 20, 40) });
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(4), said[..at]);
    assert_eq!(held(&mut host), 0);
}

#[test]
fn texts_that_can_have_no_drafts_take_no_places() {
    // Sizes of the draft model, the first text's length, and drafts of its row and of two rows beside it that share two places.
    for (terms, n_first, expect) in [
        (TERMS, 10, [1, 1, 0]),
        // Too long for it, or for its pool; and with a token that it does not know.
        (DraftTerms { context_tokens: 60, ..TERMS }, 70, [0, 1, 1]),
        (DraftTerms { n_blocks: 16, ..TERMS }, 70, [0, 1, 1]),
        (DraftTerms { vocabulary: 1_100, ..TERMS }, 170, [0, 1, 1]),
        // Still being computed there, as it will be for a while.
        (TERMS, 190, [0, 1, 1]),
    ] {
        let mut host = drafted_by(Config { n_blocks: 256, ..LONG }, terms, (u64::MAX, false));
        host.draft_places = 5;
        for (id, n_prompt, max_new) in [(1, n_first, 40), (2, 6, 120), (3, 6, 120)] {
            host.submit(modelled(id, n_prompt, max_new));
        }
        while (1..=3).any(|id| host.tokens(id).is_empty()) {
            host.step(&mut NativeBatch);
        }
        // The first sees what can be told, and computes some of what is new.
        let mut found = None;
        for _ in 0..3 {
            found = host.step_with(&mut NativeBatch, |plan| [1, 2, 3].map(|id| drafts_of(plan, id)));
        }
        assert_eq!(found, Some(expect), "{n_first} {terms:?}");
    }
}

#[test]
fn a_text_that_does_not_fit_leaves_the_others_their_blocks() {
    // Two texts hold 5 of 12 blocks each, one of them not asked for lately: a third text's tokens, and the blocks held then.
    for (n_third, expect) in [(60, 10), (30, 10), (22, 11), (6, 12)] {
        let mut host = drafted_by(LONG, DraftTerms { n_blocks: 12, step_tokens: 64, ..TERMS }, (u64::MAX, false));
        let model = host.scheduler.draft_model().expect("there is one");
        let ask = |model: &mut DraftModel, id: u64, n: u32| {
            let request = modelled(id, n, 5);
            model.want(&request, &request.prompt, 2)
        };
        for asked in [&[1, 2][..], &[2], &[2]] {
            model.begin();
            asked.iter().for_each(|&id| assert_eq!(ask(model, id, 16), 2));
            assert!(model.draft(|_, _| ()));
        }
        assert_eq!(model.block_counts().held, 10);
        model.begin();
        assert_eq!(ask(model, 2, 16), 2);
        assert_eq!(ask(model, 3, n_third) > 0, expect > 10, "{n_third} tokens");
        assert_eq!(model.block_counts().held, expect, "{n_third} tokens");
        model.draft(|_, _| ());
    }
}

#[test]
fn a_step_says_whether_the_draft_model_computed() {
    // Tokens to generate, and whether it computed: not for the prompt, and not for a last token.
    for (max_new, expect) in [(2, &[false, false][..]), (3, &[false, true])] {
        let mut host = drafted_by(LONG, TERMS, (u64::MAX, false));
        host.submit(modelled(1, 6, max_new));
        let mut found = Vec::new();
        while !host.scheduler.is_idle() {
            found.push(host.scheduler.propose(u32::MAX, |_| true));
            let n_passes = host.scheduler.draft_model().expect("there is one").take_counters().steps;
            assert_eq!(n_passes, u64::from(found.ends_with(&[true])));
            host.step(&mut NativeBatch);
            host.scheduler.draft_model().expect("there is one").take_counters();
        }
        assert_eq!(found, expect, "{max_new} tokens");
    }
}
