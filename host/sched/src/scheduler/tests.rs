//! Tests of the scheduler against a model engine that computes real "text": its KV cells hold the hash of everything up to
//! their position, so a wrong block, a stale cache entry or a lost token changes the output of the request it hits.

mod desk;
mod drafts;
mod mask;
mod model;
mod random;
mod retention;
mod sampler;
mod scores;

use std::sync::Arc;

use crate::batch::{BadPlan, NativeBatch, Plan, Rest};
use crate::config::Config;
use crate::execute::{ExecuteError, Sampled, StepOutput, StepPlan};
use crate::ids::{Micros, Priority, RequestId};
use crate::request::{CancelCause, Failure, FinishReason, Request, ResourceExhausted, Sampling, SinkEvent};

use super::Stage;
use model::{Host, Scripted, Sent, reference};

const CONFIG: Config = Config {
    block_tokens: 4,
    n_blocks: 16,
    max_running: 4,
    step_tokens: 16,
    max_waiting: 8,
    prefill_chunk: 8,
    starvation_us: 1_000_000,
    context_tokens: 64,
};

/// A request with a prompt of its own.
fn request(id: u64, n_prompt: u32, max_new: u32) -> Request {
    let base = u32::try_from(id).expect("a small id") * 1_000;
    model::request(id, (base..base + n_prompt).collect(), max_new, CONFIG.block_tokens)
}

/// `(request, position, tokens, blocks, samples)` of every row.
fn rows(plan: &StepPlan) -> Vec<(u64, u32, u32, u32, bool)> {
    let len = |range: &std::ops::Range<u32>| range.end - range.start;
    plan.rows
        .iter()
        .map(|row| (row.request.0, row.position, len(&row.tokens), len(&row.blocks), row.sample.is_some()))
        .collect()
}

#[test]
fn decodes_come_first_and_prefills_fill_the_step() {
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 3, 8));
    let expect: [&[_]; 4] = [
        &[(1, 0, 3, 1, true)],
        // Request 2 arrives: its 18 tokens go in chunks of at most 8.
        &[(1, 3, 1, 1, true), (2, 0, 8, 2, false)],
        &[(1, 4, 1, 2, true), (2, 8, 8, 4, false)],
        &[(1, 5, 1, 2, true), (2, 16, 2, 5, true)],
    ];
    for (step, expect) in expect.into_iter().enumerate() {
        if step == 1 {
            host.submit(request(2, 18, 2));
        }
        assert_eq!(host.step_with(&mut NativeBatch, rows).as_deref(), Some(expect), "step {step}");
    }
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(1), reference(&request(1, 3, 8)));
    assert_eq!(host.tokens(2), reference(&request(2, 18, 2)));
    assert_eq!((host.sent(1).prefilled.clone(), host.sent(2).prefilled.clone()), (vec![], vec![8, 16]));
}

#[test]
fn a_step_is_planned_ahead_where_nothing_is_to_be_decided() {
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 3, 2));
    host.submit(Request { deadline: 50, ..request(2, 3, 8) });
    let ahead = |host: &mut Host, may: fn(RequestId) -> bool| {
        let plan = host.scheduler.schedule_ahead(host.now, &mut NativeBatch, u32::MAX, may)?;
        Some((rows(plan), plan.follows.clone()))
    };
    assert_eq!(ahead(&mut host, |_| true), None, "nothing is in flight");
    let mut out = StepOutput::default();
    assert_eq!(host.begin(&mut NativeBatch, &mut out), [1, 2]);
    assert_eq!(ahead(&mut host, |id| id.0 != 2), None, "somebody has a word in it");
    host.now = 50;
    assert_eq!(ahead(&mut host, |_| true), None, "a deadline has passed");
    host.now = 0;
    let both = (vec![(1, 3, 1, 1, true), (2, 3, 1, 1, true)], vec![0, 1]);
    assert_eq!(ahead(&mut host, |_| true), Some(both));
    assert_eq!(ahead(&mut host, |_| true), None, "one is planned already");
    host.finish(&mut out);
    // The first one ends with the step in flight.
    assert_eq!(ahead(&mut host, |_| true), Some((vec![(2, 4, 1, 2, true)], vec![1])));
    out.sampled = vec![Sampled { token: 5, logprobs: None }; 2];
    host.finish(&mut out);
    assert_eq!((host.tokens(1).len(), host.tokens(2).len(), host.ended.clone()), (2, 2, vec![1]));
    host.submit(request(3, 3, 8));
    assert_eq!(ahead(&mut host, |_| true), None, "somebody waits");
    host.cancel(3, CancelCause::Asked);
    host.cancel(2, CancelCause::Asked);
    assert_eq!(ahead(&mut host, |_| true), None, "nobody is left");
    out.sampled = vec![Sampled { token: 5, logprobs: None }];
    host.finish(&mut out);
    assert!(host.scheduler.in_flight().is_none() && host.scheduler.is_idle());
    assert_eq!(host.scheduler.block_counts().held, 0);
}

#[test]
fn a_pool_that_shrinks_preempts_who_is_in_the_way_and_keeps_who_needs_room() {
    let mut host = Host::new(CONFIG);
    // Of 3, 6 and 4 blocks when they are done; each has its prompt's blocks, from number 0 up.
    for (id, n_prompt, max_new) in [(1, 8, 5), (2, 8, 17), (3, 8, 9)] {
        host.submit(request(id, n_prompt, max_new));
    }
    (0..3).for_each(|_| drop(host.step_with(&mut NativeBatch, rows)));
    let running = |host: &Host| {
        let runs =
            |id: &u64| host.scheduler.inspect(RequestId(*id), 0).is_some_and(|(stage, _)| stage != Stage::Queued);
        (1..=3).filter(runs).collect::<Vec<u64>>()
    };
    assert_eq!(running(&host), [1, 2, 3]);
    // The second one needs 6 blocks, whoever asks for fewer; the third is beyond them, or shares them.
    host.resize(2);
    let total = |host: &Host| host.gauges.total_blocks.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((host.scheduler.config().n_blocks, total(&host)), (6, 6));
    assert!(running(&host).len() < 3, "nobody made room");
    host.scheduler.assert_consistent();
    let refused = host.try_submit(request(4, 20, 8)).expect_err("it needs 7");
    assert_eq!(refused, ResourceExhausted::KvPool { needed: 7, total: 6 }.into());
    host.run_until_idle(&mut NativeBatch);
    host.resize(99);
    assert_eq!(host.scheduler.config().n_blocks, CONFIG.n_blocks, "no more than it was made with");
    host.submit(request(4, 20, 8));
    host.run_until_idle(&mut NativeBatch);
    for (id, n_prompt, max_new) in [(1, 8, 5), (2, 8, 17), (3, 8, 9), (4, 20, 8)] {
        assert_eq!(host.tokens(id), reference(&request(id, n_prompt, max_new)), "request {id}");
    }
}

#[test]
fn a_cache_that_is_cleared_is_found_empty_and_fills_again() {
    let mut host = Host::new(CONFIG);
    let ask = |host: &mut Host, id: u64| {
        host.submit(model::request(id, (500..510).collect(), 3, CONFIG.block_tokens));
        host.run_until_idle(&mut NativeBatch);
        host.sent(id).events[0].clone()
    };
    let started = |cached_tokens| SinkEvent::Started { queued_us: 0, cached_tokens };
    assert_eq!(ask(&mut host, 1), started(0));
    assert_eq!(ask(&mut host, 2), started(8));
    // The prompt's two blocks, and one that the answer has filled.
    assert_eq!((host.scheduler.clear_cache(), host.scheduler.clear_cache()), (3, 0));
    assert_eq!(ask(&mut host, 3), started(0));
    assert_eq!(ask(&mut host, 4), started(8));
    // One that runs goes on, and what it holds is known again.
    host.submit(model::request(5, (500..510).collect(), 8, CONFIG.block_tokens));
    drop(host.step_with(&mut NativeBatch, rows));
    assert!(host.scheduler.clear_cache() > 0);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(5), reference(&model::request(5, (500..510).collect(), 8, CONFIG.block_tokens)));
    assert_eq!(ask(&mut host, 6), started(8));
}

#[test]
fn prefixes_are_reused_by_whole_blocks_and_the_last_token_is_computed() {
    for (n_first, n_second, expect_cached) in [(10, 10, 8), (8, 8, 4), (9, 12, 8), (4, 3, 0), (3, 10, 0)] {
        let mut host = Host::new(CONFIG);
        let prompt = |n: u32| (500..500 + n).collect::<Vec<_>>();
        host.submit(model::request(1, prompt(n_first), 1, CONFIG.block_tokens));
        host.run_until_idle(&mut NativeBatch);
        host.submit(model::request(2, prompt(n_second), 3, CONFIG.block_tokens));
        host.run_until_idle(&mut NativeBatch);
        let started = host.sent(2).events[0].clone();
        assert_eq!(started, SinkEvent::Started { queued_us: 0, cached_tokens: expect_cached }, "{n_first} {n_second}");
        assert_eq!(host.tokens(2), reference(&model::request(2, prompt(n_second), 3, CONFIG.block_tokens)));
    }
}

#[test]
fn generated_blocks_are_reused_by_the_next_turn() {
    let mut host = Host::new(CONFIG);
    let first = request(1, 6, 7);
    let answer = reference(&first);
    let turn: Vec<u32> = first.prompt.iter().copied().chain(answer).chain([9, 9]).collect();
    host.submit(first);
    host.run_until_idle(&mut NativeBatch);
    // 6 + 7 tokens, of which the last was never computed: three full blocks.
    host.submit(model::request(2, turn, 1, CONFIG.block_tokens));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.sent(2).events[0], SinkEvent::Started { queued_us: 0, cached_tokens: 12 });
}

#[test]
fn caching_is_off_without_hashes() {
    let mut host = Host::new(CONFIG);
    for id in [1, 2] {
        let mut request = request(7, 10, 2);
        request.id = RequestId(id);
        request.block_hashes = Arc::default();
        host.submit(request);
        host.run_until_idle(&mut NativeBatch);
    }
    assert_eq!(host.sent(2).events[0], SinkEvent::Started { queued_us: 0, cached_tokens: 0 });
    assert_eq!(host.scheduler.block_counts().cached, 0);
}

#[test]
fn order_is_priority_then_arrival() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    for (id, priority) in
        [(1, Priority::Low), (2, Priority::Normal), (3, Priority::Critical), (4, Priority::Normal), (5, Priority::High)]
    {
        host.submit(Request { priority, ..request(id, 4, 1) });
    }
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.ended, [3, 5, 2, 4, 1]);
}

#[test]
fn what_can_never_fit_is_refused_with_numbers() {
    let small = Config { n_blocks: 4, max_waiting: 2, ..CONFIG };
    for (config, n_prompt, max_new, expect) in [
        (small, 10, 7, None),
        (small, 10, 8, Some(ResourceExhausted::KvPool { needed: 5, total: 4 })),
        (small, 60, 4, Some(ResourceExhausted::KvPool { needed: 16, total: 4 })),
        (small, 60, 5, Some(ResourceExhausted::Context { tokens: 65, limit: 64 })),
        (small, 60, u32::MAX, Some(ResourceExhausted::Context { tokens: u32::MAX, limit: 64 })),
    ] {
        let mut host = Host::new(config);
        let refused = host.try_submit(request(1, n_prompt, max_new)).err();
        assert_eq!(refused, expect.map(Failure::Exhausted), "{n_prompt} + {max_new}");
        host.run_until_idle(&mut NativeBatch);
    }
    let mut host = Host::new(small);
    host.submit(request(1, 4, 1));
    host.submit(request(2, 4, 1));
    let full = Failure::Exhausted(ResourceExhausted::Queue { waiting: 2, limit: 2 });
    assert_eq!(host.try_submit(request(3, 4, 1)), Err(full));
    // A host that breaks the seam's promises fails one request and keeps the others.
    for broken in [request(4, 0, 1), request(1, 4, 1)] {
        assert!(matches!(host.try_submit(broken), Err(Failure::Engine(_))));
    }
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.ended, [1, 2]);
}

#[test]
fn a_cancel_frees_the_blocks_in_every_stage() {
    for (steps, expect) in [(0, Stage::Queued), (1, Stage::Prefilling), (3, Stage::Decoding)] {
        let mut host = Host::new(CONFIG);
        host.submit(Request { block_hashes: Arc::default(), ..request(1, 12, 20) });
        for _ in 0..steps {
            host.step(&mut NativeBatch);
        }
        assert_eq!(host.cancel(1, CancelCause::Asked), Some(expect));
        assert_eq!(host.scheduler.block_counts().free, CONFIG.n_blocks);
        assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Cancelled(CancelCause::Asked)));
        assert_eq!(host.cancel(1, CancelCause::Asked), None);
        assert!(host.scheduler.is_idle());
    }
}

#[test]
fn a_stop_string_is_a_good_end() {
    for (cause, stopped, cancelled) in [(CancelCause::StopString, 1, 0), (CancelCause::Asked, 0, 1)] {
        let mut host = Host::new(CONFIG);
        host.submit(request(1, 4, 5));
        host.step(&mut NativeBatch);
        host.cancel(1, cause);
        let counters = host.scheduler.take_counters();
        assert_eq!((counters.finished_stop, counters.cancelled.iter().sum::<u64>()), (stopped, cancelled), "{cause:?}");
    }
}

#[test]
fn who_closes_a_sink_can_still_say_why() {
    for (cause, stopped, cancelled) in [(CancelCause::StopString, 1, 0), (CancelCause::Asked, 0, 1)] {
        let mut host = Host::new(CONFIG);
        // Closed while the step computes that hands it the second token.
        host.submit_closing(request(1, 4, 30), 3);
        host.step(&mut NativeBatch);
        host.step(&mut NativeBatch);
        assert_eq!(host.sent(1).events.len(), 3, "started and two tokens");
        assert_eq!(host.cancel(1, cause), Some(Stage::Decoding));
        assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Cancelled(cause)));
        let counters = host.scheduler.take_counters();
        assert_eq!((counters.finished_stop, counters.cancelled.iter().sum::<u64>()), (stopped, cancelled), "{cause:?}");
        assert!(!host.step(&mut NativeBatch));
        assert!(host.scheduler.is_idle());
    }
}

#[test]
fn a_cancel_between_plan_and_completion_skips_the_row() {
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 4, 5));
    host.submit(request(2, 4, 5));
    let mut out = StepOutput::default();
    host.begin(&mut NativeBatch, &mut out);
    assert_eq!(host.cancel(1, CancelCause::Asked), Some(Stage::Prefilling));
    host.submit(request(3, 4, 5));
    host.finish(&mut out);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.sent(1).events.len(), 2, "started and cancelled");
    for id in [2, 3] {
        assert_eq!(host.tokens(id), reference(&request(id, 4, 5)));
    }
}

#[test]
fn a_preempted_stream_goes_on_as_if_nothing_had_happened() {
    // Two sequences of 8 + 24 tokens need 16 blocks; there are 10.
    for sampling in [Sampling::default(), Sampling { repetition_penalty: 1.5, ..Sampling::default() }] {
        let mut host = Host::new(Config { n_blocks: 10, ..CONFIG });
        for id in [1, 2] {
            host.submit(Request { sampling: Arc::new(sampling.clone()), ..request(id, 8, 24) });
        }
        host.run_until_idle(&mut NativeBatch);
        assert!(host.scheduler.take_counters().preemptions > 0, "the pool was never short");
        for id in [1, 2] {
            assert_eq!(host.tokens(id), reference(&request(id, 8, 24)), "request {id}");
        }
        assert_eq!(host.ended, [1, 2], "the latest admitted gives way");
    }
}

#[test]
fn what_is_preempted_gives_its_part_of_the_step_back() {
    let mut host = Host::new(Config { max_running: 1, step_tokens: 4, ..CONFIG });
    host.submit(request(1, 12, 1));
    host.step(&mut NativeBatch);
    host.submit(request(2, 6, 1));
    let mut policy = Scripted::new(Plan { admit: vec![2], preempt: vec![1], ..Plan::default() });
    assert_eq!(host.step_with(&mut policy, rows), Some(vec![(2, 0, 4, 1, false)]));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.ended, [2, 1]);
}

#[test]
fn the_lowest_priority_is_preempted_first() {
    let mut host = Host::new(Config { n_blocks: 10, ..CONFIG });
    host.submit(Request { priority: Priority::Low, ..request(1, 8, 24) });
    host.step(&mut NativeBatch);
    host.submit(Request { priority: Priority::High, ..request(2, 8, 24) });
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.ended, [2, 1]);
}

#[test]
fn a_failed_step_ends_its_sequences_once_and_leaves_nothing_cached() {
    let mut host = Host::new(Config { step_tokens: 4, max_running: 4, ..CONFIG });
    host.submit(request(1, 8, 4));
    host.submit(request(2, 8, 4));
    host.step(&mut NativeBatch);
    let mut out = StepOutput::default();
    host.begin(&mut NativeBatch, &mut out);
    let error = ExecuteError::Device { what: "lost".into() };
    host.fail(&error);
    let failed = |sent: &Sent| matches!(sent.events.last(), Some(SinkEvent::Failed(Failure::Engine(_))));
    assert!(failed(&host.sent(1)));
    assert!(!failed(&host.sent(2)), "it was not in the step");
    assert_eq!(host.scheduler.block_counts().cached, 0);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(2), reference(&request(2, 8, 4)));
}

#[test]
fn a_sequence_that_shares_a_spoiled_block_is_computed_again() {
    let mut host = Host::new(CONFIG);
    let prompt: Vec<u32> = (0..20).collect();
    host.submit(model::request(1, prompt[..9].to_vec(), 12, CONFIG.block_tokens));
    host.step(&mut NativeBatch);
    host.step(&mut NativeBatch);
    // Request 2 starts on the two blocks of request 1; then a policy pauses it, and the step that it is not in fails.
    host.submit(model::request(2, prompt.clone(), 3, CONFIG.block_tokens));
    host.step(&mut NativeBatch);
    let mut pause = Scripted::new(Plan { prefill_id: vec![2], prefill_tokens: vec![0], ..Plan::default() });
    host.submit(request(3, 12, 1));
    let mut out = StepOutput::default();
    assert_eq!(host.begin(&mut pause, &mut out), [1, 3]);
    assert_eq!(host.scheduler.inspect(RequestId(2), 0), Some((Stage::Prefilling, false)));
    host.fail(&ExecuteError::Device { what: "lost".into() });
    assert_eq!(host.scheduler.inspect(RequestId(2), 0), Some((Stage::Queued, false)));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(2), reference(&model::request(2, prompt, 3, CONFIG.block_tokens)));
}

#[test]
fn a_wrong_number_of_tokens_fails_the_step() {
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 4, 4));
    let mut out = StepOutput::default();
    host.begin(&mut NativeBatch, &mut out);
    out.sampled.clear();
    host.finish(&mut out);
    assert!(matches!(host.sent(1).events.last(), Some(SinkEvent::Failed(Failure::Engine(_)))));
}

#[test]
fn stop_tokens_end_a_request_and_are_banned_before_the_minimum() {
    let whole = reference(&request(1, 4, 6));
    let mut host = Host::new(CONFIG);
    host.submit(Request { stop_tokens: Arc::from([whole[2]]), ..request(1, 4, 6) });
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(1), whole[..2]);
    assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Finished(FinishReason::Stop(whole[2]))));

    let mut host = Host::new(CONFIG);
    host.submit(Request { stop_tokens: Arc::from([whole[2]]), min_new_tokens: 4, ..request(1, 4, 6) });
    let banned = |plan: &StepPlan| plan.rows[0].sample.as_ref().is_some_and(|sample| sample.banned.is_some());
    let seen: Vec<_> = std::iter::from_fn(|| host.step_with(&mut NativeBatch, banned)).collect();
    assert_eq!(seen, [true, true, true, true, false, false]);
    assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Finished(FinishReason::Length)));
}

#[test]
fn history_is_carried_only_where_sampling_needs_it() {
    let penalised = Arc::new(Sampling { presence_penalty: 0.5, ..Sampling::default() });
    for (sampling, expect) in [(Arc::default(), [(0, 0), (0, 0)]), (penalised, [(4, 4), (5, 4)])] {
        let mut host = Host::new(CONFIG);
        host.submit(Request { sampling, ..request(1, 4, 2) });
        let history = |plan: &StepPlan| {
            let sample = plan.rows[0].sample.as_ref().expect("a sampling row");
            (sample.history.end - sample.history.start, sample.history_prompt)
        };
        let seen: Vec<_> = std::iter::from_fn(|| host.step_with(&mut NativeBatch, history)).collect();
        assert_eq!(seen, expect);
    }
}

#[test]
fn a_deadline_ends_a_request_queued_or_running() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    host.submit(Request { deadline: 50, ..request(1, 4, 30) });
    host.submit(Request { deadline: 60, ..request(2, 4, 30) });
    host.step(&mut NativeBatch);
    assert_eq!(host.scheduler.next_deadline(), Some(50));
    host.now = 50;
    host.step(&mut NativeBatch);
    assert_eq!(host.ended, [1]);
    host.now = 60;
    host.step(&mut NativeBatch);
    assert_eq!(host.ended, [1, 2]);
    assert_eq!(host.sent(2).events.last(), Some(&SinkEvent::Cancelled(CancelCause::Deadline)));
    assert_eq!(host.scheduler.next_deadline(), None);
}

#[test]
fn a_closed_sink_ends_its_request_within_a_step() {
    for (after, expect) in [(1, 2), (3, 4)] {
        let mut host = Host::new(CONFIG);
        host.submit_closing(request(1, 4, 30), after);
        host.step(&mut NativeBatch);
        host.run_until_idle(&mut NativeBatch);
        assert_eq!(host.sent(1).events.len(), expect);
        assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Cancelled(CancelCause::ClientGone)));
    }
}

#[test]
fn shutdown_ends_everything() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    host.submit(request(1, 4, 9));
    host.submit(request(2, 4, 9));
    host.step(&mut NativeBatch);
    host.shutdown();
    assert!(host.scheduler.is_idle());
    for id in [1, 2] {
        assert_eq!(host.sent(id).events.last(), Some(&SinkEvent::Cancelled(CancelCause::Shutdown)));
    }
}

#[test]
fn bad_plans_are_refused_as_a_whole() {
    let ids = |ids: &[u64]| ids.to_vec();
    for (plan, expect) in [
        (Plan { admit: ids(&[2, 1]), ..Plan::default() }, None),
        (Plan { admit: ids(&[2, 99]), ..Plan::default() }, Some(BadPlan::UnknownId(99))),
        (Plan { drop: ids(&[2, 2]), ..Plan::default() }, Some(BadPlan::Duplicate(2))),
        (Plan { admit: ids(&[1]), drop: ids(&[2]), ..Plan::default() }, None),
        (Plan { preempt: ids(&[1, 2, 1]), ..Plan::default() }, Some(BadPlan::TooLong { len: 3, limit: 2 })),
        (Plan { prefill_id: ids(&[1]), ..Plan::default() }, Some(BadPlan::Lengths { ids: 1, tokens: 0 })),
    ] {
        let mut host = Host::new(Config { max_running: 1, ..CONFIG });
        host.submit(request(1, 4, 1));
        host.submit(request(2, 4, 1));
        let mut policy = Scripted::new(plan.clone());
        host.step(&mut policy);
        assert_eq!(policy.refused, expect.into_iter().collect::<Vec<_>>(), "{plan:?}");
        let first = if expect.is_none() { 2 } else { 1 };
        assert_eq!(host.ended[0], first, "{plan:?}");
    }
}

#[test]
fn an_id_that_has_gone_is_skipped_until_the_policy_is_replaced() {
    let mut host = Host::new(CONFIG);
    let mut policy = Scripted::new(Plan::default());
    host.submit(request(1, 4, 1));
    host.step(&mut policy);
    policy.plan = Plan { admit: vec![1, 2], ..Plan::default() };
    host.submit(request(2, 4, 1));
    host.step(&mut policy);
    assert_eq!((host.ended.clone(), policy.refused.clone()), (vec![1, 2], vec![]));
    // The next one was never shown request 1.
    policy.needs_view = true;
    policy.plan = Plan { admit: vec![1], ..Plan::default() };
    host.submit(request(3, 4, 1));
    host.step(&mut policy);
    assert_eq!(policy.refused, [BadPlan::UnknownId(1)]);
}

#[test]
fn differences_are_net_and_in_order() {
    let mut host = Host::new(Config { max_running: 2, n_blocks: 6, ..CONFIG });
    let mut policy = Scripted::new(Plan::default());
    policy.wants_progress = true;
    host.step(&mut policy);
    assert_eq!(policy.log, ["view waiting [] running []"]);
    host.submit(request(1, 8, 9));
    host.submit(request(2, 4, 1));
    host.submit(request(3, 4, 1));
    host.cancel(3, CancelCause::Asked);
    host.step(&mut policy);
    host.submit(request(4, 4, 4));
    host.step(&mut policy);
    host.submit(request(5, 4, 1));
    // Request 4 may be put back for 5.
    policy.plan = Plan { admit: vec![5], preempt: vec![4], ..Plan::default() };
    host.step(&mut policy);
    policy.plan = Plan::default();
    host.step(&mut policy);
    host.cancel(1, CancelCause::Asked);
    host.submit(request(6, 4, 1));
    host.step(&mut policy);
    assert_eq!(
        policy.log[1..],
        [
            // Request 3 came and left in between: it is in none.
            "tenants 1 arrived [1, 2] admitted [] preempted [] gone [] progress []",
            "tenants 0 arrived [4] admitted [1] preempted [] gone [2] progress [(1, 8, 1, 2)]",
            "tenants 0 arrived [5] admitted [4] preempted [] gone [] progress [(1, 8, 2, 3), (4, 4, 1, 1)]",
            "tenants 0 arrived [] admitted [] preempted [4] gone [5] progress [(1, 8, 3, 3)]",
            "tenants 0 arrived [6] admitted [4] preempted [] gone [1] progress [(4, 4, 2, 2)]",
        ]
    );
}

#[test]
fn admissions_are_told_in_their_order() {
    let mut host = Host::new(CONFIG);
    for id in 1..=3 {
        host.submit(request(id, 4, 9));
    }
    let mut policy = Scripted::new(Plan { admit: vec![3, 1, 2], ..Plan::default() });
    host.step(&mut policy);
    host.submit(request(4, 4, 9));
    host.step(&mut policy);
    assert_eq!(policy.log[2], "tenants 0 arrived [4] admitted [3, 1, 2] preempted [] gone [] progress []");
}

#[test]
fn a_policy_that_returns_starts_from_the_whole_view() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    let mut policy = Scripted::new(Plan::default());
    host.submit(request(1, 4, 9));
    host.step(&mut policy);
    host.submit(Request { priority: Priority::Low, ..request(2, 4, 9) });
    host.submit(Request { priority: Priority::High, ..request(3, 4, 9) });
    host.step(&mut NativeBatch);
    host.step(&mut policy);
    assert_eq!(policy.log[2], "view waiting [3, 2] running [1]");
    assert_eq!(policy.log[3], "tenants 0 arrived [] admitted [] preempted [] gone [] progress []");
}

#[test]
fn nobody_is_held_or_paused_beyond_the_bound() {
    let bound = CONFIG.starvation_us;
    let hold = Plan { rest: Rest::Hold, ..Plan::default() };
    let pause = Plan { prefill_id: vec![1], prefill_tokens: vec![0], ..Plan::default() };
    for plan in [hold, pause] {
        let mut host = Host::new(CONFIG);
        let mut policy = Scripted::new(plan.clone());
        host.submit(request(1, 4, 2));
        assert!(!host.step(&mut policy), "{plan:?}");
        let due = host.scheduler.next_deadline();
        assert_eq!(due, Some(bound + 1), "the driver must wake up for it");
        host.now = bound;
        assert!(!host.step(&mut policy));
        host.now = bound + 1;
        assert!(host.step(&mut policy), "{plan:?}");
        host.run_until_idle(&mut policy);
        assert_eq!(host.tokens(1), reference(&request(1, 4, 2)));
    }
}

#[test]
fn an_overdue_request_takes_the_place_of_one_that_is_not() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    host.submit(Request { priority: Priority::Critical, ..request(1, 4, 30) });
    host.submit(Request { priority: Priority::Low, ..request(2, 4, 3) });
    host.step(&mut NativeBatch);
    host.now = CONFIG.starvation_us + 1;
    // A policy cannot preempt it again, nor admit others before it.
    host.submit(request(3, 4, 1));
    let mut policy = Scripted::new(Plan { admit: vec![3], preempt: vec![2], ..Plan::default() });
    host.run_until_idle(&mut policy);
    assert_eq!(host.ended[0], 2);
    assert_eq!(host.tokens(1), reference(&request(1, 4, 30)));
}

#[test]
fn nobody_is_preempted_in_vain() {
    // 11 blocks are asked for and 16 there are: 6 stay with request 1, so the 4 of request 3 would not do.
    for offered in [true, false] {
        let mut host = Host::new(CONFIG);
        host.submit(request(1, 24, 1));
        host.submit(request(2, 44, 1));
        host.submit(request(3, 13, 3));
        let hold = Plan { rest: Rest::Hold, ..Plan::default() };
        let mut policy = Scripted::new(Plan { admit: vec![3], ..hold.clone() });
        host.step(&mut policy);
        policy.plan = if offered {
            Plan { admit: vec![1], ..hold.clone() }
        } else {
            // Both are overdue now: the older one is rescued, the other cannot be.
            host.now = CONFIG.starvation_us + 1;
            hold.clone()
        };
        host.step(&mut policy);
        policy.plan = Plan { admit: vec![2], preempt: vec![3], ..hold };
        host.step(&mut policy);
        let stages = [1, 2, 3].map(|id| host.scheduler.inspect(RequestId(id), host.now).map(|(stage, _)| stage));
        assert_eq!(stages, [Some(Stage::Prefilling), Some(Stage::Queued), Some(Stage::Decoding)], "{offered}");
        assert_eq!(host.scheduler.take_counters().preemptions, 0, "{offered}");
        host.run_until_idle(&mut NativeBatch);
        assert_eq!(host.tokens(3), reference(&request(3, 13, 3)));
    }
}

#[test]
fn a_policy_can_drop_only_what_waits() {
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    let mut policy = Scripted::new(Plan::default());
    host.submit(request(1, 4, 2));
    host.step(&mut policy);
    host.submit(request(2, 4, 2));
    policy.plan = Plan { drop: vec![1, 2], ..Plan::default() };
    host.step(&mut policy);
    host.run_until_idle(&mut policy);
    assert_eq!(host.sent(2).events, [SinkEvent::Failed(Failure::DroppedByPolicy)]);
    assert_eq!(host.sent(1).events.last(), Some(&SinkEvent::Finished(FinishReason::Length)));
}

#[test]
fn gauges_and_counters_say_what_happened() {
    use std::sync::atomic::Ordering::Relaxed;
    let mut host = Host::new(Config { max_running: 1, ..CONFIG });
    host.submit(request(1, 9, 3));
    host.submit(request(2, 5, 1));
    let gauges = Arc::clone(&host.gauges);
    let read =
        || [&gauges.waiting, &gauges.running, &gauges.queued_tokens, &gauges.free_blocks].map(|g| g.load(Relaxed));
    assert_eq!(read(), [2, 0, 14, 16]);
    host.step(&mut NativeBatch);
    assert_eq!(read(), [1, 1, 6, 13]);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(read(), [0, 0, 0, 16], "cached blocks count as free");
    let counters = host.scheduler.take_counters();
    assert_eq!((counters.prefill_tokens, counters.decode_tokens, counters.generated_tokens), (14, 2, 4));
    assert_eq!((counters.finished_length, counters.prefix_query_tokens, counters.prefix_hit_tokens), (2, 14, 0));
    assert_eq!(host.scheduler.take_counters(), super::Counters::default());
    let expect: Micros = 0;
    assert_eq!(host.now, expect);
}

#[test]
fn choices_of_a_prompt_wait_for_its_prefill_and_share_its_blocks() {
    let choice = |id: u64, first: u64| Request {
        id: RequestId(id),
        fork_of: (id != first).then_some(RequestId(first)),
        ..request(7, 10, 5)
    };
    // Without a full block there is nothing to wait for.
    for (n_prompt, expect) in [(10, &[1][..]), (3, &[1, 2, 3])] {
        let mut host = Host::new(CONFIG);
        for id in [1, 2, 3] {
            let short = request(7, n_prompt, 5);
            host.submit(Request { prompt: short.prompt, block_hashes: short.block_hashes, ..choice(id, 1) });
        }
        let first = host.step_with(&mut NativeBatch, |plan| plan.rows.iter().map(|row| row.request.0).collect());
        assert_eq!(first, Some(expect.to_vec()), "a prompt of {n_prompt}");
        host.run_until_idle(&mut NativeBatch);
        for id in [1, 2, 3] {
            assert_eq!(host.tokens(id), reference(&request(7, n_prompt, 5)), "choice {id}");
        }
    }
    let mut host = Host::new(CONFIG);
    (1..=3).for_each(|id| host.submit(choice(id, 1)));
    while host.tokens(3).len() < 2 {
        host.step(&mut NativeBatch);
    }
    // Two blocks of 4 tokens shared by three; each its own with the rest of the prompt and what it said.
    assert_eq!(host.scheduler.block_counts().held, 2 + 3);
    for id in [2, 3] {
        assert_eq!(host.sent(id).events[0], SinkEvent::Started { queued_us: 0, cached_tokens: 8 });
    }
}

#[test]
fn a_prompt_that_is_not_to_be_cached_leaves_nothing() {
    for (transient, kept) in [(false, 5), (true, 0)] {
        let mut host = Host::new(CONFIG);
        for id in [1, 2, 3] {
            // Choices end one after the other; the last one goes on to a block of its own.
            let last = request(7, 10, 2 + id as u32 * 2);
            let fork_of = (id > 1).then_some(RequestId(1));
            host.submit(Request { id: RequestId(id), fork_of, transient, ..last });
        }
        while host.tokens(3).is_empty() {
            host.step(&mut NativeBatch);
        }
        assert_eq!(host.sent(3).events[0], SinkEvent::Started { queued_us: 0, cached_tokens: 8 }, "they share");
        host.run_until_idle(&mut NativeBatch);
        for id in [1, 2, 3] {
            let long = reference(&request(7, 10, 8));
            assert_eq!(host.tokens(id), long[..2 + 2 * id as usize], "choice {id}");
        }
        let counts = host.scheduler.block_counts();
        assert_eq!((counts.held, counts.cached > 0), (0, kept > 0), "{counts:?}");
        host.scheduler.assert_consistent();
    }
}

#[test]
fn a_choice_whose_first_is_gone_or_held_goes_on() {
    let fork = |id: u64| Request { fork_of: Some(RequestId(1)), ..request(id, 10, 2) };
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 10, 2));
    host.submit(fork(2));
    host.cancel(1, CancelCause::Asked);
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(2).len(), 2, "the first was cancelled");
    // A policy holds the first for ever: the bound on starvation frees the other.
    let mut host = Host::new(CONFIG);
    host.submit(request(1, 10, 2));
    host.submit(fork(2));
    let mut policy = Scripted::new(Plan { admit: vec![2], rest: Rest::Hold, ..Plan::default() });
    assert!(!host.step(&mut policy), "nobody runs");
    host.now = CONFIG.starvation_us + 1;
    host.run_until_idle(&mut policy);
    assert_eq!((host.tokens(1).len(), host.tokens(2).len()), (2, 2));
}

#[test]
fn what_the_pool_does_is_published() {
    use std::sync::atomic::Ordering::Relaxed;
    let mut host = Host::new(CONFIG);
    // 16 blocks of 4: a prompt of 10 and 2 tokens leave two cached blocks and give the third back.
    host.submit(request(1, 10, 2));
    host.step(&mut NativeBatch);
    assert_eq!(host.gauges.slack_tokens.load(Relaxed), 2, "10 tokens in three blocks");
    host.run_until_idle(&mut NativeBatch);
    host.step(&mut NativeBatch);
    let (cached, evicted) = (&host.gauges.cached_blocks, &host.gauges.evicted_blocks);
    assert_eq!((cached.load(Relaxed), evicted.load(Relaxed), host.gauges.slack_tokens.load(Relaxed)), (2, 0, 0));
    host.submit(Request { id: RequestId(2), ..request(1, 10, 2) });
    host.run_until_idle(&mut NativeBatch);
    let (queries, hits) = (&host.gauges.prefix_query_tokens, &host.gauges.prefix_hit_tokens);
    assert_eq!((queries.load(Relaxed), hits.load(Relaxed)), (20, 8));
    host.submit(request(3, 60, 2));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.gauges.evicted_blocks.load(Relaxed), 2);
    assert_eq!(host.scheduler.take_counters().evicted_blocks, 2);
    assert_eq!(host.scheduler.take_counters().evicted_blocks, 0);
}
