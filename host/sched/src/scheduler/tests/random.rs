//! Random histories with an adversarial policy: whatever it proposes, the bookkeeping holds.

use std::sync::Arc;

use proptest::prelude::*;

use crate::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, Rest, View};
use crate::config::Config;
use crate::execute::{ExecuteError, StepOutput, StepPlan};
use crate::hash::mix;
use crate::ids::{Micros, Priority, RequestId};
use crate::request::{CancelCause, Request, Sampling, SinkEvent};
use crate::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy};
use crate::scheduler::Stage;

use super::model::{self, CIRCLE, Host, reference};

/// Small enough that everything runs out now and then.
pub(super) const CONFIG: Config = Config {
    block_tokens: 4,
    n_blocks: 12,
    max_running: 3,
    step_tokens: 8,
    max_waiting: 6,
    prefill_chunk: 5,
    starvation_us: 400,
    context_tokens: 48,
};

#[derive(Clone, Debug)]
enum Operation {
    Submit { family: u32, n_prompt: u32, max_new: u32, priority: u8, deadline: bool, closes_after: Option<usize> },
    Cancel(u64),
    Step,
    Fail,
    Resize(u32),
    ClearCache,
}

fn operation() -> impl Strategy<Value = Operation> {
    let closes_after = prop_oneof![9 => Just(None), 1 => (1usize..6).prop_map(Some)];
    let submit = (0u32..3, 1u32..30, 0u32..24, 0u8..4, prop::bool::weighted(0.1), closes_after).prop_map(
        |(family, n_prompt, max_new, priority, deadline, closes_after)| Operation::Submit {
            family,
            n_prompt,
            max_new,
            priority,
            deadline,
            closes_after,
        },
    );
    prop_oneof![
        4 => submit,
        1 => (1u64..40).prop_map(Operation::Cancel),
        12 => Just(Operation::Step),
        1 => Just(Operation::Fail),
        1 => (0..2 * CONFIG.n_blocks).prop_map(Operation::Resize),
        1 => Just(Operation::ClearCache),
    ]
}

/// Mirrors what it is told, checks that the mirror is consistent, and proposes anything.
#[derive(Debug, Default)]
struct Adversary {
    random: u64,
    waiting: Vec<u64>,
    running: Vec<u64>,
    gone: Vec<u64>,
    needs_view: bool,
    n_refused: u32,
    expect_refusal: Option<bool>,
}

impl Adversary {
    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random) % below
    }

    /// A random selection in random order, now and then with an entry that has gone.
    fn some(&mut self, from: &[u64]) -> Vec<u64> {
        let mut ids: Vec<u64> = from.iter().copied().filter(|_| self.random(2) == 0).collect();
        ids.sort_by_key(|&id| mix(id ^ self.random));
        if self.random(4) == 0
            && let Some(&gone) = self.gone.last()
        {
            ids.push(gone);
        }
        ids
    }
}

fn forget(list: &mut Vec<u64>, id: u64, what: &str) {
    let place = list.iter().position(|&other| other == id);
    list.remove(place.unwrap_or_else(|| panic!("{id} is {what} and was not where the policy saw it")));
}

impl BatchPolicy for Adversary {
    fn attend(&mut self, _now: Micros) -> Attention {
        match self.random(20) {
            0 => Attention::Native,
            1 => Attention::NeedsView,
            _ if self.needs_view => Attention::NeedsView,
            _ => Attention::Following,
        }
    }

    fn generation(&self) -> u64 {
        1
    }

    fn wants_progress(&self) -> bool {
        true
    }

    fn resync(&mut self, view: &View<'_>) {
        self.needs_view = false;
        (self.waiting, self.running) = (view.waiting.id.clone(), view.running.id.clone());
        self.gone.clear();
    }

    fn step(&mut self, _now: Micros, budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        assert!(budgets.free_blocks <= budgets.total_blocks);
        for &id in &changes.gone {
            let list = if self.waiting.contains(&id) { &mut self.waiting } else { &mut self.running };
            forget(list, id, "gone");
            self.gone.push(id);
        }
        for &id in &changes.preempted {
            forget(&mut self.running, id, "preempted");
            self.waiting.push(id);
        }
        self.waiting.extend_from_slice(&changes.arrived.id);
        for &id in &changes.admitted {
            forget(&mut self.waiting, id, "admitted");
            self.running.push(id);
        }
        for id in &changes.progress_id {
            assert!(self.running.contains(id), "{id} moved and does not run");
        }
        let (waiting, running) = (self.waiting.clone(), self.running.clone());
        let all: Vec<u64> = waiting.iter().chain(&running).copied().collect();
        // Often in the wrong list on purpose: that is skipped, not refused.
        plan.admit = self.some(&all);
        plan.preempt = self.some(&all);
        plan.prefill_id = self.some(&all);
        plan.prefill_tokens = plan.prefill_id.iter().map(|id| u32::try_from(mix(*id) % 12).expect("small")).collect();
        plan.rest = if self.random(2) == 0 { Rest::Hold } else { Rest::HostOrder };
        if self.random(12) == 0 {
            plan.drop = self.some(&all);
        }
        let spoil = self.random(10);
        match spoil {
            0 => plan.admit.push(1_000_000 + self.random),
            1 => plan.prefill_tokens.push(1),
            2 if !plan.preempt.is_empty() => plan.preempt.push(plan.preempt[0]),
            _ => {}
        }
        let spoiled = spoil < 2 || (spoil == 2 && !plan.preempt.is_empty());
        self.expect_refusal = Some(spoiled);
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, why: BadPlan) {
        assert_eq!(self.expect_refusal, Some(true), "{why}");
        self.n_refused += 1;
    }
}

/// Ranks cached blocks at random, with a mistake now and then, and checks what it is shown.
#[derive(Debug, Default)]
struct Mover {
    random: u64,
    named: Vec<u32>,
    expect_refusal: Option<bool>,
}

impl RetentionPolicy for Mover {
    fn attend(&mut self, _now: Micros) -> Attention {
        self.random = self.random.wrapping_add(1);
        match mix(self.random) % 20 {
            0 => Attention::Native,
            1 => {
                self.named.clear();
                Attention::NeedsView
            }
            _ => Attention::Following,
        }
    }

    fn rank(&mut self, now: Micros, _wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        assert!((1..=CONFIG.n_blocks as usize).contains(&blocks.len()));
        assert!(blocks.last_used.is_sorted(), "the host's own order");
        for row in 0..blocks.len() {
            assert!(blocks.created[row] <= blocks.last_used[row] && blocks.last_used[row] <= now);
            assert!(blocks.depth[row] < CONFIG.context_tokens / CONFIG.block_tokens);
        }
        self.named.extend(blocks.new_tenants.iter().map(|(tenant, _)| *tenant));
        self.named.dedup();
        assert!(blocks.tenant.iter().all(|tenant| self.named.contains(tenant)), "a number without a name");
        let mut rows: Vec<u32> = (0..).take(blocks.len()).collect();
        rows.sort_by_key(|&row| mix(u64::from(row) ^ self.random));
        for row in rows {
            match mix(self.random ^ u64::from(row) << 32) % 3 {
                0 => ranking.evict.push(row),
                1 => ranking.keep.push(row),
                _ => {}
            }
        }
        let spoil = mix(self.random).is_multiple_of(8);
        if spoil {
            ranking.keep.push(*ranking.evict.first().unwrap_or(&99));
        }
        self.expect_refusal = Some(spoil);
        true
    }

    fn refused(&mut self, _now: Micros, why: BadRanking) {
        assert_eq!(self.expect_refusal, Some(true), "{why}");
    }
}

/// Whether a request of the histories wants to know how likely its prompt is.
fn scored(n_prompt: usize) -> Option<u8> {
    n_prompt.is_multiple_of(3).then_some(n_prompt as u8 % 4)
}

fn check_bounds(plan: &StepPlan) {
    assert!(plan.tokens.len() <= CONFIG.step_tokens as usize);
    assert!(plan.rows.len() <= CONFIG.max_running as usize);
    let mut ids: Vec<_> = plan.rows.iter().map(|row| row.request).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), plan.rows.len(), "a sequence has two rows");
    for row in &plan.rows {
        let n_tokens = row.tokens.end - row.tokens.start;
        assert!((1..=CONFIG.prefill_chunk).contains(&(n_tokens - row.drafts)));
        let n_blocks = row.blocks.end - row.blocks.start;
        assert_eq!(n_blocks, (row.position + n_tokens).div_ceil(CONFIG.block_tokens));
    }
}

struct History {
    host: Host,
    policy: Adversary,
    /// Prompt and length of every accepted request, to compare its output with.
    accepted: Vec<(u64, Vec<u32>, u32)>,
    next_id: u64,
}

impl History {
    fn new(seed: u64) -> Self {
        let policy = Adversary { random: seed, needs_view: true, ..Adversary::default() };
        let mut host = Host::new(CONFIG);
        host.ahead = !seed.is_multiple_of(3);
        // Half of the histories evict in the host's own order.
        if seed.is_multiple_of(2) {
            host.retention = Box::new(Mover { random: mix(seed), ..Mover::default() });
        }
        Self { host, policy, accepted: Vec::new(), next_id: 1 }
    }

    fn apply(&mut self, operation: Operation) {
        self.host.now += 10;
        match operation {
            Operation::Submit { family, n_prompt, max_new, priority, deadline, closes_after } => {
                // Three families of prompts share prefixes within each.
                let mut prompt: Vec<u32> = (1..n_prompt).map(|i| family * 100 + i).collect();
                // One family's texts repeat themselves.
                prompt.push(if family == 2 { CIRCLE.start } else { family * 100 });
                let id = self.next_id;
                self.next_id += 1;
                let now = self.host.now;
                let request = Request {
                    priority: [Priority::Critical, Priority::High, Priority::Normal, Priority::Low][priority as usize],
                    deadline: if deadline { now + 100 } else { 0 },
                    arrived: now,
                    tenant: family,
                    sampling: Arc::new(Sampling {
                        presence_penalty: f32::from(priority),
                        prompt_logprobs: scored(prompt.len()),
                        ..Sampling::default()
                    }),
                    draft_tokens: max_new % 6,
                    ..model::request(id, prompt.clone(), max_new, CONFIG.block_tokens)
                };
                let accepted = match closes_after {
                    None => self.host.try_submit(request).is_ok(),
                    Some(_) if self.host.scheduler.n_waiting() >= CONFIG.max_waiting => false,
                    Some(_) if n_prompt + max_new > CONFIG.context_tokens.min(self.pool_tokens()) => false,
                    Some(after) => {
                        self.host.submit_closing(request, after);
                        true
                    }
                };
                if accepted {
                    self.accepted.push((id, prompt, max_new));
                }
            }
            Operation::Cancel(id) => {
                self.host.cancel(id, CancelCause::Asked);
            }
            Operation::Step => {
                let mut out = StepOutput::default();
                let queued: Vec<u64> = self
                    .accepted
                    .iter()
                    .map(|(id, ..)| *id)
                    .filter(|id| self.stage(*id).0 == Some(Stage::Queued))
                    .collect();
                let planned = self.host.begin_with(&mut self.policy, &mut out, |plan| {
                    check_bounds(plan);
                    plan.rows.iter().map(|row| row.request.0).collect::<Vec<_>>()
                });
                let planned = planned.unwrap_or_default();
                self.check_starvation(&queued, &planned);
                if !planned.is_empty() {
                    self.host.finish(&mut out);
                }
            }
            Operation::Fail => {
                let mut out = StepOutput::default();
                if !self.host.begin(&mut self.policy, &mut out).is_empty() {
                    self.host.fail(&ExecuteError::Device { what: "random".into() });
                }
            }
            // Not while the engine computes.
            Operation::Resize(_) if self.host.behind.is_some() => {}
            Operation::Resize(n_blocks) => {
                let before = self.host.scheduler.config().n_blocks;
                self.host.resize(n_blocks);
                self.check_resized(n_blocks, before);
            }
            Operation::ClearCache => self.host.clear_cache(),
        }
        self.host.scheduler.assert_consistent();
    }

    /// The pool has as many blocks as asked for, or what those who live need.
    fn check_resized(&self, asked: u32, before: u32) {
        let asked = asked.clamp(1, CONFIG.n_blocks);
        let now = self.host.scheduler.config().n_blocks;
        assert!(now <= before.max(asked), "{asked} blocks instead of {before}: {now}");
        // The last token that is generated is never computed.
        let tokens = |request: &Request| request.prompt.len() as u32 + request.max_new_tokens.saturating_sub(1);
        let needs = self.host.scheduler.live().map(|(request, _)| tokens(request).div_ceil(CONFIG.block_tokens));
        let needed = needs.max().unwrap_or(0);
        assert_eq!(now, asked.max(needed), "{needed} are needed");
    }

    fn pool_tokens(&self) -> u32 {
        self.host.scheduler.config().n_blocks * CONFIG.block_tokens
    }

    fn stage(&self, id: u64) -> (Option<Stage>, bool) {
        let inspected = self.host.scheduler.inspect(RequestId(id), self.host.now);
        (inspected.map(|(stage, _)| stage), inspected.is_some_and(|(_, is_overdue)| is_overdue))
    }

    /// While someone overdue waits, nobody who is not overdue leaves the queue: nobody passes.
    fn check_starvation(&self, queued: &[u64], planned: &[u64]) {
        let mut waiting = self.accepted.iter().map(|(id, ..)| *id);
        let Some(starved) = waiting.find(|id| self.stage(*id) == (Some(Stage::Queued), true)) else { return };
        for id in planned.iter().filter(|id| queued.contains(id)) {
            assert!(self.stage(*id).1, "{id} passes the overdue {starved}");
        }
    }

    /// Who asked hears once how likely its prompt was, before the first token; nobody else does.
    fn check_scores(&self, id: u64, prompt: &[u32]) {
        let asked = scored(prompt.len()).filter(|_| prompt.len() > 1);
        let events = self.host.sent(id).events;
        let said: Vec<&SinkEvent> = events.iter().filter(|event| matches!(event, SinkEvent::Scored(_))).collect();
        if let [said] = said[..] {
            assert_eq!(*said, SinkEvent::Scored(model::scores(prompt, asked.expect("it asked"))), "request {id}");
        }
        let is_whole = events.iter().any(|event| matches!(event, SinkEvent::Token { .. } | SinkEvent::Finished(_)));
        assert_eq!(said.len(), usize::from(asked.is_some() && (is_whole || !said.is_empty())), "request {id}");
        let first = events.iter().find(|event| matches!(event, SinkEvent::Scored(_) | SinkEvent::Token { .. }));
        assert!(said.is_empty() || first == Some(said[0]), "request {id}");
    }

    fn finish(mut self) {
        for _ in 0..4_000 {
            if self.host.scheduler.is_idle() && self.host.behind.is_none() {
                break;
            }
            self.apply(Operation::Step);
        }
        assert!(self.host.scheduler.is_idle(), "{:?}", self.host.scheduler);
        assert_eq!(self.host.scheduler.block_counts().held, 0);
        let mut ended = self.host.ended.clone();
        ended.sort_unstable();
        assert_eq!(ended, self.accepted.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), "each ends exactly once");
        for (id, prompt, max_new) in &self.accepted {
            let expect = reference(&model::request(*id, prompt.clone(), *max_new, CONFIG.block_tokens));
            let tokens = self.host.tokens(*id);
            assert_eq!(tokens, expect[..tokens.len()], "request {id} was answered from wrong KV");
            if let Some(SinkEvent::Finished(_)) = self.host.sent(*id).events.last() {
                assert_eq!(tokens.len(), expect.len());
            }
            self.check_scores(*id, prompt);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_books(seed in any::<u64>(), operations in prop::collection::vec(operation(), 1..160)) {
        let mut history = History::new(seed);
        for operation in operations {
            history.apply(operation);
        }
        history.finish();
    }
}
