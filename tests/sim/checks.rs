//! What must hold after every plan and at the end of every history, whatever the policy, the faults and the clients do.

use std::collections::BTreeSet;

use pointsman_sched::config::Config;
use pointsman_sched::execute::StepPlan;
use pointsman_sched::ids::{Micros, RequestId};
use pointsman_sched::request::{FinishReason, SinkEvent};
use pointsman_sched::scheduler::{Scheduler, Stage};

use crate::executor::reference;
use crate::world::Accepted;

/// A plan stays within every budget and says what the seam promises.
pub(crate) fn plan_is_feasible(plan: &StepPlan, config: &Config) {
    assert!(plan.tokens.len() <= config.step_tokens as usize, "{} tokens in a step", plan.tokens.len());
    assert!(plan.rows.len() <= config.max_running as usize, "{} rows", plan.rows.len());
    let (mut n_tokens, mut n_blocks) = (0, 0);
    let mut ids = Vec::new();
    let chosen = plan.rows.iter().filter(|row| row.sample.is_some()).map(|row| 1 + row.drafts).sum::<u32>();
    assert!(chosen <= config.max_running, "{chosen} tokens are chosen");
    for row in &plan.rows {
        assert_eq!((row.tokens.start, row.blocks.start), (n_tokens, n_blocks), "rows follow one another");
        (n_tokens, n_blocks) = (row.tokens.end, row.blocks.end);
        let len = row.tokens.end - row.tokens.start;
        assert!((1..=config.prefill_chunk).contains(&(len - row.drafts)), "a chunk of {len}");
        assert!(row.drafts == 0 || row.sample.is_some() && len == 1 + row.drafts, "drafts after {len} tokens");
        let pages = u32::try_from(plan.blocks_of(row).len()).expect("a short table");
        assert_eq!(pages, (row.position + len).div_ceil(config.block_tokens), "the table covers the row and no more");
        ids.push(row.request);
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), plan.rows.len(), "a sequence has two rows");
}

/// Those who wait.
pub(crate) fn queued(scheduler: &Scheduler, live: &BTreeSet<u64>, now: Micros) -> BTreeSet<RequestId> {
    let waits = |id: &RequestId| scheduler.inspect(*id, now).is_some_and(|(stage, _)| stage == Stage::Queued);
    live.iter().map(|&id| RequestId(id)).filter(waits).collect()
}

/// While an overdue request waits, nobody who is not overdue leaves the queue. `queued` are those who waited before the step;
/// returns how many rows are overdue ones.
pub(crate) fn nobody_passes_the_overdue(
    scheduler: &Scheduler,
    planned: &[RequestId],
    queued: &BTreeSet<RequestId>,
    now: Micros,
) -> u64 {
    // Requests that the step refused are gone.
    let starved = queued.iter().find(|id| scheduler.inspect(**id, now) == Some((Stage::Queued, true)));
    let mut n_overdue = 0;
    for id in planned {
        let (_, is_overdue) =
            scheduler.inspect(*id, now).unwrap_or_else(|| panic!("{id:?} is planned and does not live"));
        assert!(is_overdue || starved.is_none() || !queued.contains(id), "{id:?} passes the overdue {starved:?}");
        n_overdue += u64::from(is_overdue);
    }
    n_overdue
}

/// A request got the right tokens, in the right order, and one last word.
pub(crate) fn the_answer_is_right(request: &Accepted, events: &[SinkEvent]) {
    let id = request.id;
    let tokens: Vec<u32> = events
        .iter()
        .filter_map(|event| if let SinkEvent::Token { token, .. } = event { Some(*token) } else { None })
        .collect();
    let expect = reference(&request.prompt, request.max_new, request.min_new, &request.stop);
    assert!(tokens.len() <= expect.len(), "{id:?} got more tokens than it asked for");
    assert_eq!(tokens, expect[..tokens.len()], "{id:?} was answered from wrong KV");
    match events.last() {
        Some(SinkEvent::Finished(reason)) => {
            assert_eq!(tokens.len(), expect.len(), "{id:?} ended too early");
            let is_length = *reason == FinishReason::Length;
            assert_eq!(is_length, tokens.len() == request.max_new as usize, "{id:?} ended with {reason:?}");
        }
        Some(SinkEvent::Cancelled(_) | SinkEvent::Failed(_)) => {}
        other => panic!("{id:?} never ended: {other:?}"),
    }
    let is_last = |e: &&SinkEvent| matches!(e, SinkEvent::Finished(_) | SinkEvent::Cancelled(_) | SinkEvent::Failed(_));
    assert_eq!(events.iter().filter(is_last).count(), 1, "{id:?} ended more than once");
}
