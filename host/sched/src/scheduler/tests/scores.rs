//! How likely a prompt is: said once, whole, whatever the chunks and preemptions in between, and never out of the cache.

use std::sync::Arc;

use crate::batch::{BatchPolicy, NativeBatch, Plan};
use crate::config::Config;
use crate::execute::StepOutput;
use crate::ids::RequestId;
use crate::request::{FinishReason, Request, ResourceExhausted, Sampling, SinkEvent};

use super::CONFIG;
use super::model::{self, Host, Scripted, reference, scores};

fn asking(id: u64, prompt: &[u32], max_new: u32, top: u8) -> Request {
    let sampling = Arc::new(Sampling { prompt_logprobs: Some(top), ..Sampling::default() });
    Request { sampling, ..model::request(id, prompt.to_vec(), max_new, CONFIG.block_tokens) }
}

fn events(host: &Host, id: u64) -> Vec<SinkEvent> {
    host.sent(id).events
}

#[test]
fn a_prompt_is_scored_once_before_the_first_token() {
    let prompt: Vec<u32> = (1..24).collect();
    for (n_prompt, max_new, top, prefill_chunk) in [
        (1, 0, 2, 8),
        (1, 3, 2, 8),
        (2, 0, 0, 8),
        (2, 1, 3, 1),
        (23, 0, 1, 5),
        (23, 4, 2, 1),
        (23, 4, 0, 8),
        (20, 2, 1, 4),
    ] {
        let case = format!("{n_prompt} tokens, {max_new} new, top {top}, chunks of {prefill_chunk}");
        let prompt = &prompt[..n_prompt];
        let mut host = Host::new(Config { prefill_chunk, ..CONFIG });
        // Somebody has left the whole prompt in the cache.
        host.submit(model::request(1, prompt.to_vec(), 4, CONFIG.block_tokens));
        host.run_until_idle(&mut NativeBatch);
        host.submit(asking(2, prompt, max_new, top));
        host.run_until_idle(&mut NativeBatch);
        let mut expect = vec![SinkEvent::Started { queued_us: 0, cached_tokens: 0 }];
        expect.extend((n_prompt > 1).then(|| SinkEvent::Scored(scores(prompt, top))));
        let tokens = reference(&asking(2, prompt, max_new, top));
        expect.extend(tokens.into_iter().map(|token| SinkEvent::Token {
            token,
            logprobs: None,
            drafted: Default::default(),
        }));
        expect.push(SinkEvent::Finished(FinishReason::Length));
        assert_eq!(events(&host, 2), expect, "{case}");
        // What it computed is as good for others as anything.
        host.submit(model::request(3, prompt.to_vec(), 1, CONFIG.block_tokens));
        host.run_until_idle(&mut NativeBatch);
        let cached_tokens = (n_prompt as u32 - 1) / CONFIG.block_tokens * CONFIG.block_tokens;
        assert_eq!(events(&host, 3)[0], SinkEvent::Started { queued_us: 0, cached_tokens }, "{case}");
    }
}

#[test]
fn a_preempted_prompt_goes_on_where_it_was() {
    // Room for one of the two alone.
    let config = Config { n_blocks: 8, prefill_chunk: 4, step_tokens: 8, max_running: 2, ..CONFIG };
    let prompt: Vec<u32> = (1..=20).collect();
    for n_steps in 1..5 {
        let mut host = Host::new(config);
        host.submit(asking(1, &prompt, 4, 1));
        let mut n_scored = 0;
        let mut step = |host: &mut Host, policy: &mut dyn BatchPolicy| {
            let seen = host.step_with(policy, |plan| plan.scored.len());
            n_scored += seen.unwrap_or(0);
            seen.is_some()
        };
        for _ in 0..n_steps {
            step(&mut host, &mut NativeBatch);
        }
        host.submit(model::request(2, vec![77; 16], 2, CONFIG.block_tokens));
        let plan = Plan { admit: vec![2], preempt: vec![1], ..Plan::default() };
        step(&mut host, &mut Scripted::new(plan));
        assert_eq!(host.scheduler.take_counters().preemptions, 1, "after {n_steps} steps");
        while step(&mut host, &mut NativeBatch) {}
        let said: Vec<SinkEvent> =
            events(&host, 1).into_iter().filter(|event| matches!(event, SinkEvent::Scored(_))).collect();
        assert_eq!(said, [SinkEvent::Scored(scores(&prompt, 1))], "after {n_steps} steps");
        assert_eq!(n_scored, prompt.len() - 1, "each of them once");
        assert_eq!(host.tokens(1), reference(&asking(1, &prompt, 4, 1)));
    }
}

#[test]
fn choices_that_are_scored_wait_for_nobody() {
    let mut host = Host::new(CONFIG);
    let prompt: Vec<u32> = (1..=20).collect();
    host.submit(asking(1, &prompt, 2, 1));
    host.submit(Request { fork_of: Some(RequestId(1)), ..asking(2, &prompt, 2, 1) });
    let rows = host.begin(&mut NativeBatch, &mut StepOutput::default());
    assert_eq!(rows, [1, 2]);
}

#[test]
fn a_prompt_alone_may_fill_the_context() {
    let whole: Vec<u32> = (0..CONFIG.context_tokens).collect();
    let mut host = Host::new(CONFIG);
    let refused = host.try_submit(asking(1, &whole, 1, 0)).expect_err("one too many");
    assert_eq!(refused, ResourceExhausted::Context { tokens: 65, limit: 64 }.into());
    host.submit(asking(1, &whole, 0, 0));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(
        events(&host, 1)[1..],
        [SinkEvent::Scored(scores(&whole, 0)), SinkEvent::Finished(FinishReason::Length)]
    );
    // Its last token is computed, unlike that of a text that goes on.
    let mut small = Host::new(Config { n_blocks: 4, ..CONFIG });
    let refused = small.try_submit(asking(1, &whole[..17], 0, 0)).expect_err("too long for the pool");
    assert_eq!(refused, ResourceExhausted::KvPool { needed: 5, total: 4 }.into());
}
