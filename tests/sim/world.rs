//! The world around one scheduler: when requests come and go, what fails, when a policy is swapped, and the loop that a
//! driver thread would turn, on a virtual clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use pointsman_sched::batch::BatchPolicy;
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::execute::{ExecuteError, Executor, StepOutput, StepPlan};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::prefix::{chain_hash, chain_hashes};
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{CancelCause, Failure, Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::retention::RetentionPolicy;
use pointsman_sched::sampler::NoEdits;
use pointsman_sched::scheduler::Scheduler;
use pointsman_telemetry::Event;
use pointsman_tests::fleet::Cost;

use crate::checks;
use crate::executor::{CIRCLE, ModelEngine};
use crate::policies::{Audited, Kind, Pending, Slot, Truth};
use crate::retention;
use crate::rng::Rng;

/// Everything about a history that is not the policy.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) config: Config,
    pub(crate) cost: Cost,
    pub(crate) n_requests: u32,
    /// Mean time between arrivals; they come in bursts around it.
    pub(crate) gap_us: u64,
    /// Chances in a million: per request ...
    pub(crate) cancel_ppm: u64,
    pub(crate) deadline_ppm: u64,
    /// ... and per step.
    pub(crate) fault_ppm: u64,
    pub(crate) swap_ppm: u64,
    /// Texts repeat themselves, and requests have drafts.
    pub(crate) drafts: bool,
    /// Steps are planned while the ones before them compute.
    pub(crate) ahead: bool,
}

/// What a history came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) submitted: u64,
    pub(crate) refused: u64,
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) failed: u64,
    pub(crate) dropped: u64,
    pub(crate) steps: u64,
    /// Of those, the ones that were planned ahead.
    pub(crate) steps_ahead: u64,
    pub(crate) preemptions: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) policy_calls: u64,
    pub(crate) plans_refused: u64,
    pub(crate) rankings: u64,
    pub(crate) rankings_refused: u64,
    pub(crate) swaps: u64,
    /// Rows of overdue requests.
    pub(crate) overdue_served: u64,
    /// Drafts that steps looked at, and those that came true.
    pub(crate) drafted: u64,
    pub(crate) accepted: u64,
    pub(crate) virtual_us: Micros,
    /// Hash of every event in order: two runs of a seed are the same history.
    pub(crate) digest: u64,
}

/// An accepted request, as the checks need it.
#[derive(Clone, Debug)]
pub(crate) struct Accepted {
    pub(crate) id: RequestId,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_new: u32,
    pub(crate) min_new: u32,
    pub(crate) stop: Vec<u32>,
}

#[derive(Debug, Default)]
struct Inbox {
    events: Vec<SinkEvent>,
    /// The client stops reading after so many events.
    closes_after: Option<usize>,
}

#[derive(Debug)]
struct Sink {
    id: u64,
    inbox: Arc<Mutex<Inbox>>,
    truth: Arc<Mutex<Truth>>,
}

impl TokenSink for Sink {
    fn push(&mut self, event: SinkEvent) -> SinkState {
        if matches!(event, SinkEvent::Finished(_) | SinkEvent::Cancelled(_) | SinkEvent::Failed(_)) {
            assert!(self.truth.lock().expect("one thread").live.remove(&self.id), "{} ended twice", self.id);
        }
        let mut inbox = self.inbox.lock().expect("one thread");
        inbox.events.push(event);
        let closed = inbox.closes_after.is_some_and(|after| inbox.events.len() >= after);
        if closed { SinkState::Closed } else { SinkState::Open }
    }
}

impl Options {
    /// A world drawn from a seed: from roomy to starved pools, from idle to overloaded.
    pub(crate) fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x6f70_7469_6f6e_7300);
        let max_running = rng.within(1, 12);
        let config = Config {
            block_tokens: rng.pick(&[1, 4, 16]),
            n_blocks: 0,
            max_running,
            step_tokens: max_running + rng.within(0, 64),
            max_waiting: rng.within(4, 60),
            prefill_chunk: rng.within(1, 48),
            starvation_us: u64::from(rng.within(2_000, 400_000)),
            context_tokens: 160,
        };
        // From just enough for the longest request to enough for everyone.
        let longest = config.context_tokens.div_ceil(config.block_tokens);
        let n_blocks = longest + rng.within(0, longest * max_running.div_ceil(2));
        Self {
            config: Config { n_blocks, ..config },
            cost: Cost { fixed_ns: 800_000, prefill_ns: 20_000, decode_ns: 30_000 },
            n_requests: 120,
            gap_us: u64::from(rng.within(500, 40_000)),
            cancel_ppm: 80_000,
            deadline_ppm: 60_000,
            fault_ppm: 4_000,
            swap_ppm: 0,
            drafts: false,
            ahead: rng.chance(500_000),
        }
    }
}

impl Report {
    /// Adds another history's numbers.
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, number) in [
            (&mut self.submitted, other.submitted),
            (&mut self.refused, other.refused),
            (&mut self.finished, other.finished),
            (&mut self.cancelled, other.cancelled),
            (&mut self.failed, other.failed),
            (&mut self.dropped, other.dropped),
            (&mut self.steps, other.steps),
            (&mut self.steps_ahead, other.steps_ahead),
            (&mut self.preemptions, other.preemptions),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.policy_calls, other.policy_calls),
            (&mut self.plans_refused, other.plans_refused),
            (&mut self.rankings, other.rankings),
            (&mut self.rankings_refused, other.rankings_refused),
            (&mut self.swaps, other.swaps),
            (&mut self.overdue_served, other.overdue_served),
            (&mut self.drafted, other.drafted),
            (&mut self.accepted, other.accepted),
            (&mut self.virtual_us, other.virtual_us),
        ] {
            *sum += number;
        }
        self.digest = chain_hash(self.digest, &halves(other.digest));
    }
}

fn halves(word: u64) -> [u32; 2] {
    [u32::try_from(word >> 32).expect("half a word"), u32::try_from(word & 0xffff_ffff).expect("half a word")]
}

/// Lives one history to its end and checks it at every step. Panics with the seed where something is wrong.
pub(crate) fn run(seed: u64, policy: Box<dyn BatchPolicy>, options: &Options) -> Report {
    let mut world = World::new(seed, policy, options);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.live()));
    outcome.unwrap_or_else(|payload| {
        eprintln!("seed {seed} failed with {options:?}; add it to tests/sim/seeds.txt");
        std::panic::resume_unwind(payload)
    })
}

struct World<'a> {
    options: &'a Options,
    rng: Rng,
    now: Micros,
    scheduler: Scheduler,
    engine: ModelEngine,
    /// Steps that are begun and not finished, and how long each takes.
    begun: VecDeque<(Result<(), ExecuteError>, StepOutput, Micros)>,
    policy: Audited,
    retention: Box<dyn RetentionPolicy>,
    pending: Pending,
    truth: Arc<Mutex<Truth>>,
    next_arrival: Micros,
    n_arrived: u32,
    /// Cancels to come, by time.
    cancels: BTreeMap<(Micros, u64), CancelCause>,
    accepted: Vec<(Accepted, Arc<Mutex<Inbox>>)>,
    report: Report,
}

impl<'a> World<'a> {
    fn new(seed: u64, policy: Box<dyn BatchPolicy>, options: &'a Options) -> Self {
        let config = options.config;
        let sketch = Arc::new(PrefixSketch::new(config.n_blocks));
        let scheduler = Scheduler::new(config, seed, Arc::new(ReplicaGauges::default()), sketch);
        let truth = Arc::new(Mutex::new(Truth::default()));
        let (slot, pending) = Slot::new(policy);
        Self {
            options,
            rng: Rng::new(seed),
            now: 1,
            scheduler: scheduler.expect("the options make a good configuration"),
            engine: ModelEngine::new(config.n_blocks, config.block_tokens),
            begun: VecDeque::new(),
            policy: Audited::new(slot, Arc::clone(&truth)),
            retention: retention::of_seed(seed),
            pending,
            truth,
            next_arrival: 1,
            n_arrived: 0,
            cancels: BTreeMap::new(),
            accepted: Vec::new(),
            report: Report::default(),
        }
    }

    fn live(&mut self) -> Report {
        while self.n_arrived < self.options.n_requests || !self.scheduler.is_idle() || !self.begun.is_empty() {
            self.deliver();
            if self.rng.chance(self.options.swap_ppm) {
                let kind = self.rng.pick(&Kind::ALL);
                *self.pending.lock().expect("one thread") = Some(kind.policy(self.rng.next()));
                self.report.swaps += 1;
            }
            if !self.step() {
                self.sleep();
            }
            self.scheduler.assert_consistent();
        }
        self.close()
    }

    /// One turn of the crank; false when there was nothing to compute.
    fn step(&mut self) -> bool {
        if self.begun.is_empty() && !self.begin() {
            return false;
        }
        if self.options.ahead {
            self.begin_ahead();
        }
        let Some((result, mut out, took)) = self.begun.pop_front() else { return false };
        // What happens while the step is in flight reaches the scheduler before the step's end.
        self.now += took;
        self.deliver();
        let digest = &mut self.report.digest;
        match result {
            Ok(()) => self.scheduler.complete(self.now, &mut out, &mut |event| note(digest, event)),
            Err(error) => self.scheduler.fail_step(self.now, &error, &mut |event| note(digest, event)),
        }
        true
    }

    fn begin(&mut self) -> bool {
        self.scheduler.review_cache(self.now, &mut *self.retention);
        if self.options.drafts {
            // Some may have none, as if they were masked.
            self.scheduler.propose(u32::MAX, |id| !id.0.is_multiple_of(11));
        }
        let digest = &mut self.report.digest;
        let queued = checks::queued(&self.scheduler, &self.truth.lock().expect("one thread").live, self.now);
        let plan = self.scheduler.schedule(self.now, &mut self.policy, &mut |event| note(digest, event));
        let Some(plan) = plan else { return false };
        let planned: Vec<RequestId> = plan.rows.iter().map(|row| row.request).collect();
        self.begun.push_back(compute(&mut self.engine, plan, self.options, &mut self.rng));
        self.report.overdue_served += checks::nobody_passes_the_overdue(&self.scheduler, &planned, &queued, self.now);
        true
    }

    fn begin_ahead(&mut self) {
        self.scheduler.review_cache(self.now, &mut *self.retention);
        // As above.
        let may = |id: RequestId| !id.0.is_multiple_of(11);
        let Some(plan) = self.scheduler.schedule_ahead(self.now, &mut self.policy, 0, may) else { return };
        assert!(!plan.follows.is_empty());
        self.begun.push_back(compute(&mut self.engine, plan, self.options, &mut self.rng));
    }

    /// Nothing to compute: time goes on to the next thing that can change that.
    fn sleep(&mut self) {
        let arrival = (self.n_arrived < self.options.n_requests).then_some(self.next_arrival);
        let cancel = self.cancels.keys().next().map(|&(at, _)| at);
        let next = arrival.into_iter().chain(cancel).chain(self.scheduler.next_deadline()).min();
        match next {
            Some(next) => {
                assert!(next > self.now || arrival.is_some_and(|at| at <= self.now), "the driver would spin");
                self.now = self.now.max(next);
            }
            None => assert!(self.scheduler.is_idle(), "nothing will ever happen to {:?}", self.scheduler),
        }
    }

    /// Arrivals and cancels that are due.
    fn deliver(&mut self) {
        while self.n_arrived < self.options.n_requests && self.next_arrival <= self.now {
            self.n_arrived += 1;
            self.arrive();
            let gap = self.options.gap_us;
            // Bursts: half of the arrivals follow at once, the others after twice the mean.
            self.next_arrival += if self.rng.chance(500_000) { 0 } else { self.rng.below(4 * gap) };
        }
        while let Some(entry) = self.cancels.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let ((_, id), cause) = entry.remove_entry();
            let digest = &mut self.report.digest;
            self.scheduler.cancel(RequestId(id), cause, self.now, &mut |event| note(digest, event));
        }
    }

    fn arrive(&mut self) {
        let id = RequestId(u64::from(self.n_arrived));
        let wanted = self.draw(id);
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        if self.rng.chance(self.options.cancel_ppm / 4) {
            inbox.lock().expect("one thread").closes_after = Some(self.rng.within(1, 10) as usize);
        }
        let sink = Sink { id: id.0, inbox: Arc::clone(&inbox), truth: Arc::clone(&self.truth) };
        let tenant = self.rng.within(1, 5);
        let deadline =
            if self.rng.chance(self.options.deadline_ppm) { self.now + self.rng.below(100_000) + 1 } else { 0 };
        let request = Request {
            id,
            tenant,
            tenant_name: format!("tenant-{tenant}").into(),
            session: id.0,
            priority: self.rng.pick(&[Priority::Critical, Priority::High, Priority::Normal, Priority::Low]),
            arrived: self.now,
            deadline,
            block_hashes: chain_hashes(&wanted.prompt, self.options.config.block_tokens).into(),
            prompt: wanted.prompt.clone().into(),
            max_new_tokens: wanted.max_new,
            min_new_tokens: wanted.min_new,
            stop_tokens: wanted.stop.clone().into(),
            sampling: Arc::new(Sampling::default()),
            attributes: Arc::default(),
            transient: false,
            draft_tokens: if self.options.drafts { u32::try_from(id.0 % 18).expect("small") } else { 0 },
            draft_method: DraftMethod::Ngram,
            fork_of: None,
            mask: None,
            router_generation: 0,
            sink: Box::new(sink),
        };
        if self.rng.chance(self.options.cancel_ppm) {
            self.cancels.insert((self.now + self.rng.below(60_000), id.0), CancelCause::Asked);
        }
        match self.scheduler.submit(request, self.now) {
            Ok(()) => {
                self.report.submitted += 1;
                self.truth.lock().expect("one thread").live.insert(id.0);
                self.accepted.push((wanted, inbox));
            }
            Err((_, Failure::Exhausted(_))) => self.report.refused += 1,
            Err((_, failure)) => panic!("{failure}"),
        }
    }

    /// A conversation of one of a few families, so that prefixes are shared; lengths are mostly short, sometimes long.
    fn draw(&mut self, id: RequestId) -> Accepted {
        let rng = &mut self.rng;
        let (family, own) = (rng.within(0, 4) * 10_000, u32::try_from(id.0).expect("few requests") * 7);
        let long = rng.chance(150_000);
        let n_shared = rng.within(1, if long { 80 } else { 30 });
        let n_own = rng.within(0, if long { 40 } else { 10 });
        let mut prompt: Vec<u32> =
            (0..n_shared).map(|i| family + i).chain((0..n_own).map(|i| 50_000 + own + i)).collect();
        let max_new = rng.within(1, if long { 40 } else { 30 });
        let min_new = if rng.chance(200_000) { rng.within(0, max_new + 1) } else { 0 };
        let mut stop: Vec<u32> =
            if rng.chance(400_000) { (0..60).map(|_| rng.within(0, 997)).collect() } else { Vec::new() };
        if self.options.drafts {
            prompt.push(CIRCLE.start);
            if !stop.is_empty() {
                stop.push(CIRCLE.start + 6);
            }
        }
        Accepted { id, prompt, max_new, min_new, stop }
    }

    /// The books at the end.
    fn close(&mut self) -> Report {
        assert_eq!(self.scheduler.block_counts().held, 0, "a block was leaked");
        assert!(self.truth.lock().expect("one thread").live.is_empty());
        for (request, inbox) in &self.accepted {
            let events = std::mem::take(&mut inbox.lock().expect("one thread").events);
            checks::the_answer_is_right(request, &events);
            let count = match events.last() {
                Some(SinkEvent::Finished(_)) => &mut self.report.finished,
                Some(SinkEvent::Cancelled(_)) => &mut self.report.cancelled,
                Some(SinkEvent::Failed(Failure::DroppedByPolicy)) => &mut self.report.dropped,
                _ => &mut self.report.failed,
            };
            *count += 1;
        }
        let counters = self.scheduler.take_counters();
        (self.report.steps, self.report.steps_ahead) = (counters.steps, counters.steps_ahead);
        self.report.preemptions = counters.preemptions;
        self.report.cached_tokens = counters.prefix_hit_tokens;
        self.report.plans_refused = counters.plans_refused;
        self.report.rankings = counters.rankings_followed;
        self.report.rankings_refused = counters.rankings_refused;
        (self.report.drafted, self.report.accepted) = (counters.draft_tokens, counters.accepted_tokens);
        self.report.policy_calls = self.truth.lock().expect("one thread").calls;
        self.report.virtual_us = self.now;
        let counted = counters.finished_stop + counters.finished_length;
        assert_eq!(counted, self.report.finished, "the counters agree with the sinks");
        std::mem::take(&mut self.report)
    }
}

/// Computes a checked plan, unless it fails; and how long that takes.
fn compute(
    engine: &mut ModelEngine,
    plan: &StepPlan,
    options: &Options,
    rng: &mut Rng,
) -> (Result<(), ExecuteError>, StepOutput, Micros) {
    checks::plan_is_feasible(plan, &options.config);
    let mut out = StepOutput::default();
    engine.fails_next = rng.chance(options.fault_ppm);
    let result = engine.execute(plan, &mut NoEdits, &mut out);
    (result, out, options.cost.of(plan))
}

/// Folds an event into the digest of a history.
fn note(digest: &mut u64, event: Event) {
    let words = [event.at, event.kind as u64, event.request, event.generation, event.a, event.b];
    for word in words {
        *digest = chain_hash(*digest, &halves(word));
    }
}
