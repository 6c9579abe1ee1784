//! A steady step allocates nothing: counted, not promised. A test of its own, because it replaces the global allocator.
#![expect(unsafe_code, reason = "`GlobalAlloc` is an unsafe trait, and nothing else counts allocations")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use pointsman_sched::batch::{Answer, Attention, BadPlan, BatchPolicy, Budgets, Changes, NativeBatch, Plan, View};
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::draft::model::{DraftModel, DraftTerms};
use pointsman_sched::execute::{ExecuteError, Executor, Row, Sampled, StepOutput, StepPlan};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::retention::{BadRanking, BlockColumns, Ranking, RetentionPolicy};
use pointsman_sched::sampler::EditSource;
use pointsman_sched::scheduler::Scheduler;

thread_local! {
    /// Per thread, so that the test harness may allocate as it likes.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // A thread that is being torn down has no counter left, and nobody who reads it.
    let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: every call goes to `System` with the caller's own arguments; the counter is a plain cell and does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above, hence from `System`, with this `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as for `dealloc`; the caller's promises about `new_size` are passed on.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Debug)]
struct Discard;

impl TokenSink for Discard {
    fn push(&mut self, _event: SinkEvent) -> SinkState {
        SinkState::Open
    }
}

/// Reads everything and has no opinion: the cost of telling a policy, without its own.
#[derive(Debug, Default)]
struct Listener {
    follows: bool,
    n_calls: u64,
}

impl BatchPolicy for Listener {
    fn attend(&mut self, _now: Micros) -> Attention {
        if self.follows { Attention::Following } else { Attention::NeedsView }
    }

    fn generation(&self) -> u64 {
        1
    }

    fn wants_progress(&self) -> bool {
        true
    }

    fn resync(&mut self, _view: &View<'_>) {
        self.follows = true;
    }

    fn step(&mut self, _now: Micros, _budgets: &Budgets, changes: &Changes, plan: &mut Plan) -> Answer {
        self.n_calls += 1;
        plan.admit.extend_from_slice(&changes.arrived.id);
        Answer::Planned
    }

    fn refused(&mut self, _now: Micros, why: BadPlan) {
        panic!("{why}");
    }
}

/// Keeps every second block and evicts the others, last one first.
#[derive(Debug, Default)]
struct Librarian {
    n_calls: u64,
}

impl RetentionPolicy for Librarian {
    fn attend(&mut self, _now: Micros) -> Attention {
        Attention::Following
    }

    fn rank(&mut self, _now: Micros, _wanted: u32, blocks: &BlockColumns, ranking: &mut Ranking) -> bool {
        self.n_calls += 1;
        let rows = u32::try_from(blocks.len()).expect("few rows");
        ranking.keep.extend((0..rows).step_by(2));
        ranking.evict.extend((0..rows).skip(1).step_by(2));
        true
    }

    fn refused(&mut self, _now: Micros, why: BadRanking) {
        panic!("{why}");
    }
}

const MAX_RUNNING: u32 = 16;
const WARM_UP: u32 = 200;
const STEADY: u32 = 1_000;

fn scheduler() -> Scheduler {
    let config = Config {
        block_tokens: 16,
        n_blocks: 2_048,
        max_running: MAX_RUNNING,
        step_tokens: 256,
        max_waiting: 64,
        prefill_chunk: 64,
        starvation_us: 3_600_000_000,
        context_tokens: 8_192,
    };
    let sketch = Arc::new(PrefixSketch::new(config.n_blocks));
    Scheduler::new(config, 1, Arc::new(ReplicaGauges::default()), sketch).expect("a good configuration")
}

fn request(id: u64, sampling: &Arc<Sampling>) -> Request {
    let base = u32::try_from(id).expect("few requests") * 1_000;
    let prompt: Vec<u32> = (base..base + 100).collect();
    Request {
        id: RequestId(id),
        tenant: 0,
        tenant_name: "".into(),
        session: 0,
        priority: Priority::Normal,
        arrived: 0,
        deadline: 0,
        block_hashes: chain_hashes(&prompt, 16).into(),
        prompt: prompt.into(),
        max_new_tokens: WARM_UP + STEADY + 100,
        min_new_tokens: 5,
        stop_tokens: Arc::from([7]),
        sampling: Arc::clone(sampling),
        attributes: Arc::default(),
        transient: false,
        draft_tokens: 0,
        draft_method: DraftMethod::Ngram,
        fork_of: None,
        mask: None,
        router_generation: 0,
        sink: Box::new(Discard),
    }
}

/// What is said at a position: the same every 50 of them.
fn said(position: u32) -> Sampled {
    Sampled { token: 1_000 + position % 50, logprobs: None }
}

/// Says what is said, before it is.
struct Foreseeing;

impl Executor for Foreseeing {
    fn execute(&mut self, plan: &StepPlan, _: &mut dyn EditSource, out: &mut StepOutput) -> Result<(), ExecuteError> {
        out.sampled.clear();
        let last = |row: &Row| row.position + row.tokens.end - row.tokens.start - 1;
        out.sampled.extend(plan.rows.iter().filter(|row| row.sample.is_some()).map(|row| said(last(row))));
        Ok(())
    }
}

fn draft_model() -> DraftModel {
    let terms = DraftTerms {
        block_tokens: 16,
        n_blocks: 2_048,
        max_rows: MAX_RUNNING,
        step_tokens: 64,
        context_tokens: 8_192,
        vocabulary: 1 << 16,
        least_percent: 50,
    };
    DraftModel::new(Box::new(Foreseeing), terms)
}

/// Allocations in `STEADY` decode steps, after a warm-up.
fn measure(
    policy: &mut dyn BatchPolicy,
    n_requests: u32,
    sampling: Sampling,
    (draft_method, draft_tokens): (DraftMethod, u32),
) -> u64 {
    let (mut scheduler, sampling) = (scheduler(), Arc::new(sampling));
    scheduler.draft_with(draft_model());
    for id in 1..=n_requests {
        let request = request(u64::from(id), &sampling);
        let max_new_tokens = request.max_new_tokens * (1 + draft_tokens);
        let request = Request { draft_tokens, draft_method, max_new_tokens, ..request };
        scheduler.submit(request, 0).map_err(|(_, failure)| failure).expect("room");
    }
    let places = || Vec::with_capacity(MAX_RUNNING as usize);
    let mut out = StepOutput { sampled: places(), after_drafts: places(), ..StepOutput::default() };
    let mut n_events = 0u64;
    let mut before = 0;
    for step in 0..WARM_UP + STEADY {
        if step == WARM_UP {
            before = ALLOCATIONS.get();
        }
        let now = Micros::from(step) * 5_000;
        scheduler.propose(u32::MAX, |_| true);
        let plan = scheduler.schedule(now, policy, &mut |_| n_events += 1).expect("work");
        for row in plan.rows.iter().filter(|row| row.sample.is_some()) {
            out.sampled.push(said(row.position));
            out.after_drafts.extend((1..=row.drafts).map(|i| said(row.position + i)));
        }
        scheduler.complete(now + 4_000, &mut out, &mut |_| n_events += 1);
    }
    assert!(before > 0, "the counter counts");
    assert_eq!(scheduler.n_running(), n_requests.min(MAX_RUNNING));
    let counters = scheduler.take_counters();
    let by_model = if draft_method == DraftMethod::Model { counters.accepted_tokens } else { 0 };
    assert_eq!(counters.model_accepted_tokens, by_model);
    let accepted = counters.accepted_tokens;
    assert!(accepted >= u64::from(STEADY * n_requests * draft_tokens), "{accepted} drafts came true");
    assert!(n_events >= u64::from(WARM_UP + STEADY));
    ALLOCATIONS.get() - before
}

#[test]
fn a_thousand_steady_steps_allocate_nothing() {
    let with_history = Sampling { repetition_penalty: 1.1, ..Sampling::default() };
    let mut listener = Listener::default();
    let none = (DraftMethod::Ngram, 0);
    assert_eq!(measure(&mut NativeBatch, MAX_RUNNING, Sampling::default(), none), 0, "native, nothing waits");
    assert_eq!(measure(&mut NativeBatch, MAX_RUNNING + 9, Sampling::default(), none), 0, "native, a queue");
    assert_eq!(measure(&mut NativeBatch, MAX_RUNNING, with_history.clone(), none), 0, "native, with histories");
    for method in [DraftMethod::Ngram, DraftMethod::Model] {
        assert_eq!(
            measure(&mut NativeBatch, 4, with_history.clone(), (method, 2)),
            0,
            "native, with drafts: {method:?}"
        );
    }
    assert_eq!(measure(&mut listener, MAX_RUNNING + 9, Sampling::default(), none), 0, "a policy that is called");
    assert!(listener.n_calls >= u64::from(STEADY), "a queue is something to decide about");
}

#[test]
fn a_thousand_steps_ahead_allocate_nothing() {
    for sampling in [Sampling::default(), Sampling { repetition_penalty: 1.1, ..Sampling::default() }] {
        let (mut scheduler, sampling) = (scheduler(), Arc::new(sampling));
        for id in 1..=u64::from(MAX_RUNNING) {
            scheduler.submit(request(id, &sampling), 0).map_err(|(_, failure)| failure).expect("room");
        }
        let mut out = StepOutput { sampled: Vec::with_capacity(MAX_RUNNING as usize), ..StepOutput::default() };
        let (mut before, mut n_ahead) = (0, 0);
        for step in 0..WARM_UP + STEADY {
            if step == WARM_UP {
                (before, n_ahead) = (ALLOCATIONS.get(), 0);
            }
            if scheduler.in_flight().is_none() {
                scheduler.schedule(step.into(), &mut NativeBatch, &mut |_| {}).expect("work");
            }
            n_ahead +=
                u32::from(scheduler.schedule_ahead(step.into(), &mut NativeBatch, MAX_RUNNING, |_| true).is_some());
            let rows = scheduler.in_flight().into_iter().flat_map(|plan| &plan.rows);
            out.sampled.extend(rows.filter(|row| row.sample.is_some()).map(|row| said(row.position)));
            scheduler.complete(step.into(), &mut out, &mut |_| {});
        }
        assert_eq!((ALLOCATIONS.get() - before, n_ahead), (0, STEADY));
    }
}

#[test]
fn ranking_a_cache_under_pressure_allocates_nothing() {
    let (mut scheduler, sampling) = (scheduler(), Arc::new(Sampling::default()));
    let mut out = StepOutput { sampled: Vec::with_capacity(MAX_RUNNING as usize), ..StepOutput::default() };
    let mut retention = Librarian::default();
    let mut allocations = 0;
    // Prompts of their own, one after the other: 2,048 blocks hold the last 341 of them.
    for id in 1..=1_500u64 {
        let request = Request { max_new_tokens: 1, ..request(id, &sampling) };
        scheduler.submit(request, id).map_err(|(_, failure)| failure).expect("room");
        while !scheduler.is_idle() {
            let before = ALLOCATIONS.get();
            scheduler.review_cache(id, &mut retention);
            if id > 500 {
                allocations += ALLOCATIONS.get() - before;
            }
            let plan = scheduler.schedule(id, &mut NativeBatch, &mut |_| {}).expect("work");
            let n_samples = plan.rows.iter().filter(|row| row.sample.is_some()).count();
            out.sampled.extend((0..n_samples).map(|_| Sampled { token: 1_000, logprobs: None }));
            scheduler.complete(id, &mut out, &mut |_| {});
        }
    }
    assert_eq!(allocations, 0);
    assert!((20..60).contains(&retention.n_calls), "asked {} times", retention.n_calls);
}
