//! A host around the scheduler: a model engine whose output is a function of the whole text, sinks that remember, and a
//! scripted policy that writes down what it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use pointsman_telemetry::Event;

use crate::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, Plan, View};
use crate::config::Config;
use crate::draft::DraftMethod;
use crate::execute::{ExecuteError, Sampled, Score, StepOutput, StepPlan};
use crate::ids::{BlockId, Micros, Priority, RequestId};
use crate::prefix::{chain_hash, chain_hashes};
use crate::publish::{PrefixSketch, ReplicaGauges};
use crate::request::{CancelCause, Failure, Request, Sampling, SinkEvent, SinkState, TokenLogprobs, TokenSink};
use crate::retention::{BadRanking, BlockColumns, NativeRetention, Ranking, RetentionPolicy};
use crate::sampler::{Desk, Edit, EditSource, NativeSampler, SamplerWorker, Started};
use crate::scheduler::{Scheduler, Stage};

#[derive(Clone, Debug, Default)]
pub(super) struct Sent {
    pub(super) events: Vec<SinkEvent>,
    /// Tokens of the prompt, as they were computed.
    pub(super) prefilled: Vec<u32>,
    closes_after: Option<usize>,
}

#[derive(Debug, Default)]
struct Sink(Arc<Mutex<Sent>>);

impl TokenSink for Sink {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        let mut sent = self.0.lock().expect("one thread");
        let over = |e: &SinkEvent| matches!(e, SinkEvent::Finished(_) | SinkEvent::Cancelled(_) | SinkEvent::Failed(_));
        assert!(!sent.events.last().is_some_and(over), "an event after the last one");
        sent.events.push(event);
        let closed = sent.closes_after.is_some_and(|after| sent.events.len() >= after);
        if closed { SinkState::Closed } else { SinkState::Open }
    }

    fn prefilled(&mut self, tokens: u32) {
        self.0.lock().expect("one thread").prefilled.push(tokens);
    }
}

pub(super) fn request(id: u64, prompt: Vec<u32>, max_new_tokens: u32, block_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: 1,
        tenant_name: "t".into(),
        session: 0,
        priority: Priority::Normal,
        arrived: 0,
        deadline: 0,
        block_hashes: chain_hashes(&prompt, block_tokens).into(),
        prompt: prompt.into(),
        max_new_tokens,
        min_new_tokens: 0,
        stop_tokens: Arc::default(),
        sampling: Arc::new(Sampling::default()),
        attributes: Arc::default(),
        transient: false,
        draft_tokens: 0,
        draft_method: DraftMethod::Ngram,
        fork_of: None,
        mask: None,
        router_generation: 0,
        sink: Box::new(Sink::default()),
    }
}

/// Tokens that the model can say.
pub(super) const VOCABULARY: u32 = 1_009;

/// A text whose last token is one of these goes round the first five of them, but for one of the others now and then: such a
/// text repeats itself, so that drafts come true.
pub(super) const CIRCLE: std::ops::Range<u32> = 900..908;

/// What follows a text: its state, and its last token.
fn next_token((state, last): (u64, u32)) -> u32 {
    let some = |n: u64| u32::try_from(state / 12 % n).expect("small");
    match last.checked_sub(CIRCLE.start) {
        Some(0..8) if state.is_multiple_of(12) => CIRCLE.start + 5 + some(3),
        Some(at @ 0..5) => CIRCLE.start + (at + 1) % 5,
        Some(5..8) => CIRCLE.start + some(5),
        _ => u32::try_from(state % u64::from(VOCABULARY)).expect("small"),
    }
}

/// What the model generates for a request that is alone in the world.
pub(super) fn reference(request: &Request) -> Vec<u32> {
    let mut state = request.prompt.iter().fold(0, |state, &token| chain_hash(state, &[token]));
    let mut last = request.prompt.last().copied().expect("a prompt");
    let mut next = || {
        last = next_token((state, last));
        state = chain_hash(state, &[last]);
        last
    };
    (0..request.max_new_tokens).map(|_| next()).collect()
}

/// How likely the model finds each prompt token but the first, with so many others beside it.
pub(super) fn scores(prompt: &[u32], top: u8) -> Vec<TokenLogprobs> {
    let mut state = 0;
    let pairs = prompt.iter().zip(&prompt[1..]);
    let one = |(&token, &next): (&u32, &u32)| {
        state = chain_hash(state, &[token]);
        score_of((state, token), next, top)
    };
    pairs.map(one).collect()
}

/// What the model thinks of a token after a text.
fn score_of(text: (u64, u32), next: u32, top: u8) -> TokenLogprobs {
    let logprob = |token: u32| -((text.0 ^ u64::from(token)) as u16 as f32);
    let first = next_token(text);
    TokenLogprobs {
        chosen: logprob(next),
        top: (first..).take(top.into()).map(|token| (token, logprob(token))).collect(),
    }
}

pub(super) struct Host {
    pub(super) scheduler: Scheduler,
    pub(super) retention: Box<dyn RetentionPolicy>,
    pub(super) desk: Desk<Box<dyn SamplerWorker>>,
    pub(super) gauges: Arc<ReplicaGauges>,
    pub(super) now: Micros,
    /// Of the executor.
    pub(super) draft_places: u32,
    /// Steps are begun behind others where that may be.
    pub(super) ahead: bool,
    /// What such a step comes to.
    pub(super) behind: Option<StepOutput>,
    /// Those in whose tokens of the step that computes, or of the one behind it, nobody had a word.
    pub(super) free: [Vec<u64>; 2],
    /// Ids in the order in which they ended.
    pub(super) ended: Vec<u64>,
    sinks: BTreeMap<u64, Arc<Mutex<Sent>>>,
    /// The KV pool: per position of every block, the hash of the text up to there.
    cells: Vec<u64>,
    block_tokens: usize,
    /// Blocks of the step in flight.
    touched: Vec<BlockId>,
}

impl Host {
    pub(super) fn new(config: Config) -> Self {
        let gauges = Arc::new(ReplicaGauges::default());
        let sketch = Arc::new(PrefixSketch::new(config.n_blocks));
        Self {
            scheduler: Scheduler::new(config, 1, Arc::clone(&gauges), sketch).expect("a good configuration"),
            retention: Box::new(NativeRetention),
            desk: Desk::new(Box::new(NativeSampler)),
            gauges,
            now: 0,
            draft_places: u32::MAX,
            ahead: false,
            behind: None,
            free: Default::default(),
            ended: Vec::new(),
            sinks: BTreeMap::new(),
            cells: vec![0; (config.n_blocks * config.block_tokens) as usize],
            block_tokens: config.block_tokens as usize,
            touched: Vec::new(),
        }
    }

    pub(super) fn try_submit(&mut self, mut request: Request) -> Result<(), Failure> {
        let (id, sent) = (request.id.0, Arc::new(Mutex::new(Sent::default())));
        request.sink = Box::new(Sink(Arc::clone(&sent)));
        let started = Started::of(&request);
        self.scheduler.submit(request, self.now).map_err(|(_, failure)| failure)?;
        self.desk.start(started);
        self.sinks.insert(id, sent);
        Ok(())
    }

    /// What blocks held that go is lost.
    pub(super) fn resize(&mut self, n_blocks: u32) {
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        let observe = &mut |event| note((&mut *ended, &mut *desk), event);
        let n_blocks = self.scheduler.resize(n_blocks, self.now, observe);
        let kept = (n_blocks as usize * self.block_tokens).min(self.cells.len());
        self.cells[kept..].fill(u64::MAX);
    }

    pub(super) fn clear_cache(&mut self) {
        self.scheduler.clear_cache();
        assert_eq!(self.scheduler.block_counts().cached, 0);
    }

    pub(super) fn submit(&mut self, request: Request) {
        self.try_submit(request).expect("room");
    }

    pub(super) fn submit_closing(&mut self, request: Request, after: usize) {
        let id = request.id.0;
        self.submit(request);
        self.sinks[&id].lock().expect("one thread").closes_after = Some(after);
    }

    pub(super) fn sent(&self, id: u64) -> Sent {
        self.sinks[&id].lock().expect("one thread").clone()
    }

    pub(super) fn tokens(&self, id: u64) -> Vec<u32> {
        let token = |event: &SinkEvent| match event {
            SinkEvent::Token { token, .. } => Some(*token),
            _ => None,
        };
        self.sent(id).events.iter().filter_map(token).collect()
    }

    /// Plans and computes; the scheduler has not heard of the result yet. Says whose rows there are.
    pub(super) fn begin(&mut self, policy: &mut dyn BatchPolicy, out: &mut StepOutput) -> Vec<u64> {
        self.begin_with(policy, out, ids).unwrap_or_default()
    }

    /// The same, with a look at the plan.
    pub(super) fn begin_with<T>(
        &mut self,
        policy: &mut dyn BatchPolicy,
        out: &mut StepOutput,
        look: impl Fn(&StepPlan) -> T,
    ) -> Option<T> {
        match self.behind.take() {
            Some(behind) => *out = behind,
            None => self.compute(policy, out)?,
        }
        self.free.swap(0, 1);
        if self.ahead {
            self.compute_behind(policy, out);
        }
        let plan = self.scheduler.in_flight()?;
        self.touched.clone_from(&plan.blocks);
        self.desk.sampled(plan, out);
        Some(look(plan))
    }

    fn compute(&mut self, policy: &mut dyn BatchPolicy, out: &mut StepOutput) -> Option<()> {
        self.attend();
        self.scheduler.review_cache(self.now, &mut *self.retention);
        self.scheduler.propose(self.draft_places, |id| self.desk.is_free(id));
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        let plan = self.scheduler.schedule(self.now, policy, &mut |event| note((&mut *ended, &mut *desk), event))?;
        execute(plan, (&mut self.cells, self.block_tokens), desk, out);
        self.free[1] = ids(plan).into_iter().filter(|id| desk.is_free(RequestId(*id))).collect();
        Some(())
    }

    /// The step after the one that computes, whose result is `out`, as the driver begins it where it can.
    fn compute_behind(&mut self, policy: &mut dyn BatchPolicy, out: &StepOutput) {
        self.desk.attend(self.now, &self.scheduler);
        self.scheduler.review_cache(self.now, &mut *self.retention);
        let desk = &mut self.desk;
        // Also where somebody looks for drafts: it is no less right.
        let Some(plan) = self.scheduler.schedule_ahead(self.now, policy, 0, |id| desk.is_free(id)) else { return };
        let token = |place: &u32| out.sampled[*place as usize].token;
        let known = StepPlan {
            rows: plan.rows.clone(),
            tokens: plan.follows.iter().map(token).collect(),
            blocks: plan.blocks.clone(),
            ..StepPlan::default()
        };
        let mut behind = StepOutput::default();
        execute(&known, (&mut self.cells, self.block_tokens), desk, &mut behind);
        (self.behind, self.free[1]) = (Some(behind), ids(plan));
    }

    pub(super) fn finish(&mut self, out: &mut StepOutput) {
        let failed = self.desk.take_failed();
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        let mut observe = |event| note((&mut *ended, &mut *desk), event);
        self.scheduler.complete(self.now, out, &mut observe);
        for (id, error) in failed {
            self.scheduler.fail(id, error, self.now, &mut observe);
        }
        self.desk.hand_over(self.now);
        self.scheduler.assert_consistent();
    }

    /// What the driver does first: what the sampler has said holds from here on.
    fn attend(&mut self) {
        self.desk.attend(self.now, &self.scheduler);
        for (id, failure) in self.desk.take_failed() {
            let (ended, desk) = (&mut self.ended, &mut self.desk);
            let observe = &mut |event| note((&mut *ended, &mut *desk), event);
            self.scheduler.fail(id, failure, self.now, observe);
        }
    }

    /// The step in flight fails, and leaves garbage in every block that it could touch.
    pub(super) fn fail(&mut self, error: &ExecuteError) {
        for block in &self.touched {
            let start = block.0 as usize * self.block_tokens;
            self.cells[start..start + self.block_tokens].fill(0xdead);
        }
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        self.scheduler.fail_step(self.now, error, &mut |event| note((&mut *ended, &mut *desk), event));
        self.scheduler.assert_consistent();
    }

    /// Whether there was anything to compute.
    pub(super) fn step(&mut self, policy: &mut dyn BatchPolicy) -> bool {
        self.step_with(policy, |_| ()).is_some()
    }

    /// A whole step, with a look at its plan.
    pub(super) fn step_with<T>(&mut self, policy: &mut dyn BatchPolicy, look: impl Fn(&StepPlan) -> T) -> Option<T> {
        let mut out = StepOutput::default();
        let seen = self.begin_with(policy, &mut out, look)?;
        self.finish(&mut out);
        Some(seen)
    }

    pub(super) fn run_until_idle(&mut self, policy: &mut dyn BatchPolicy) {
        for _ in 0..10_000 {
            if self.scheduler.is_idle() && self.behind.is_none() {
                let counts = self.scheduler.block_counts();
                assert_eq!(counts.held, 0, "{counts:?}");
                return;
            }
            self.step(policy);
        }
        panic!("still busy: {:?}", self.scheduler);
    }

    pub(super) fn cancel(&mut self, id: u64, cause: CancelCause) -> Option<Stage> {
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        let stage =
            self.scheduler.cancel(RequestId(id), cause, self.now, &mut |event| note((&mut *ended, &mut *desk), event));
        self.scheduler.assert_consistent();
        stage
    }

    pub(super) fn shutdown(&mut self) {
        let (ended, desk) = (&mut self.ended, &mut self.desk);
        self.scheduler.shutdown(CancelCause::Shutdown, self.now, &mut |event| note((&mut *ended, &mut *desk), event));
        self.scheduler.assert_consistent();
    }
}

fn ids(plan: &StepPlan) -> Vec<u64> {
    plan.rows.iter().map(|row| row.request.0).collect()
}

type TestDesk = Desk<Box<dyn SamplerWorker>>;

fn note((ended, desk): (&mut Vec<u64>, &mut TestDesk), event: Event) {
    use pointsman_telemetry::EventKind::{Cancelled, Failed, Finished, Rejected};
    if matches!(event.kind, Cancelled | Failed | Finished | Rejected) {
        ended.push(event.request);
        desk.ended(RequestId(event.request));
    }
}

/// Computes every row from the cell before its first position.
pub(super) fn execute(
    plan: &StepPlan,
    (cells, block_tokens): (&mut [u64], usize),
    edits: &mut dyn EditSource,
    out: &mut StepOutput,
) {
    out.sampled.clear();
    out.after_drafts.clear();
    out.scores.clear();
    let mut states = Vec::new();
    for row in &plan.rows {
        let table = plan.blocks_of(row);
        let cell = |position: usize| table[position / block_tokens].0 as usize * block_tokens + position % block_tokens;
        let position = row.position as usize;
        let mut state = position.checked_sub(1).map_or(0, |before| cells[cell(before)]);
        let tokens = plan.tokens_of(row);
        let n_known = tokens.len() - row.drafts as usize;
        for (i, &token) in tokens.iter().enumerate() {
            state = chain_hash(state, &[token]);
            cells[cell(position + i)] = state;
            states.push((state, token));
            let Some(sample) = row.sample.as_ref().filter(|_| i + 1 >= n_known) else { continue };
            let banned = sample.banned.as_deref().unwrap_or(&[]);
            let edit = edits.edit(row.request);
            assert!(edit.is_none() || row.drafts == 0, "nobody may have a word in what is drafted");
            let may = |token: &u32| match edit.as_deref() {
                Some(Edit::Allow(tokens)) => tokens.contains(token),
                Some(Edit::Forbid(tokens)) => !tokens.contains(token),
                Some(Edit::Only(set)) => set.contains(*token),
                Some(Edit::Bias(_)) | None => true,
            };
            let first = next_token((state, token));
            let mut all = (first..VOCABULARY).chain(0..first);
            let token = all.find(|token| !banned.contains(token) && may(token)).expect("few are banned");
            let chosen = if i + 1 == n_known { &mut out.sampled } else { &mut out.after_drafts };
            chosen.push(Sampled { token, logprobs: None });
        }
    }
    for Score { after, next, top } in &plan.scores {
        assert_eq!(after.len(), next.len());
        let both = after.clone().zip(next.clone());
        let score = |(i, next): (u32, u32)| score_of(states[i as usize], plan.scored[next as usize], *top);
        out.scores.extend(both.map(score));
    }
}

/// Answers the same plan every time.
#[derive(Debug)]
pub(super) struct Scripted {
    pub(super) plan: Plan,
    pub(super) needs_view: bool,
    pub(super) wants_progress: bool,
    pub(super) refused: Vec<BadPlan>,
    pub(super) log: Vec<String>,
}

impl Scripted {
    pub(super) fn new(plan: Plan) -> Self {
        Self { plan, needs_view: true, wants_progress: false, refused: Vec::new(), log: Vec::new() }
    }
}

impl BatchPolicy for Scripted {
    fn attend(&mut self, _now: Micros) -> Attention {
        if self.needs_view { Attention::NeedsView } else { Attention::Following }
    }

    fn generation(&self) -> u64 {
        7
    }

    fn wants_progress(&self) -> bool {
        self.wants_progress
    }

    fn resync(&mut self, view: &View<'_>) {
        self.needs_view = false;
        self.log.push(format!("view waiting {:?} running {:?}", view.waiting.id, view.running.id));
    }

    fn step(&mut self, _now: Micros, _budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        let progress: Vec<_> = (0..changes.progress_id.len())
            .map(|i| {
                let (id, computed) = (changes.progress_id[i], changes.progress_computed[i]);
                (id, computed, changes.progress_generated[i], changes.progress_blocks[i])
            })
            .collect();
        self.log.push(format!(
            "tenants {} arrived {:?} admitted {:?} preempted {:?} gone {:?} progress {progress:?}",
            changes.new_tenants.len(),
            changes.arrived.id,
            changes.admitted,
            changes.preempted,
            changes.gone
        ));
        plan.clone_from(&self.plan);
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, why: BadPlan) {
        self.refused.push(why);
    }
}

/// What a [`Librarian`] was asked, and is to say.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    pub(super) attention: Option<Attention>,
    /// What to keep, as a tenant; and what to evict first.
    pub(super) keep: Option<u32>,
    pub(super) evict: Option<u32>,
    /// Answers nonsense.
    pub(super) spoil: bool,
    /// `(wanted, rows, new tenants)` of every call.
    pub(super) calls: Vec<(u32, usize, Vec<u32>)>,
    pub(super) refused: Vec<BadRanking>,
}

/// A retention policy that ranks by tenant; the test holds the other end.
#[derive(Debug, Default)]
pub(super) struct Librarian(pub(super) Arc<Mutex<Shelf>>);

impl RetentionPolicy for Librarian {
    fn attend(&mut self, _now: Micros) -> Attention {
        self.0.lock().expect("one thread").attention.unwrap_or(Attention::Following)
    }

    fn rank(&mut self, _now: Micros, wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        let mut shelf = self.0.lock().expect("one thread");
        let met = blocks.new_tenants.iter().map(|(tenant, _)| *tenant).collect();
        shelf.calls.push((wanted, blocks.len(), met));
        let of = |tenant: Option<u32>| (0u32..).zip(&blocks.tenant).filter(move |(_, t)| Some(**t) == tenant);
        ranking.evict.extend(of(shelf.evict).map(|(row, _)| row));
        ranking.keep.extend(of(shelf.keep).map(|(row, _)| row));
        if shelf.spoil {
            ranking.keep.push(u32::try_from(blocks.len()).expect("few rows"));
        }
        shelf.evict.is_some() || shelf.keep.is_some() || shelf.spoil
    }

    fn refused(&mut self, _now: Micros, why: BadRanking) {
        self.0.lock().expect("one thread").refused.push(why);
    }
}
