//! Some replicas behind a router, on a clock that events move: the real scheduler, the real guests, and a device per replica
//! that says how long a step took.
//!
//! With a model of the device ([`Cost`]) a trace is a function of its seed, so a test can assert what a policy is worth. With
//! the real engine behind [`Device`] the same traces cost real steps: each replica's clock advances by what its own steps
//! took, as if it had the machine to itself, so four replicas need no four machines. Why not the whole host over HTTP:
//! what is compared is an order of work, and sockets would only add noise to both sides.

pub mod guests;
pub mod scenarios;
pub mod traces;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pointsman_policy::TelemetrySlot;
use pointsman_sched::batch::BatchPolicy;
use pointsman_sched::config::Config;
use pointsman_sched::draft::DraftMethod;
use pointsman_sched::execute::{Sampled, StepOutput, StepPlan};
use pointsman_sched::ids::{Micros, Priority, RequestId};
use pointsman_sched::prefix::chain_hashes;
use pointsman_sched::publish::{PrefixSketch, ReplicaGauges};
use pointsman_sched::request::{Request, Sampling, SinkEvent, SinkState, TokenSink};
use pointsman_sched::route::{
    Choice, DecidedBy, ReplicaColumns, RequestNumbers, Resolved, RoutePolicy, RouteRequest, Routed, resolve,
};
use pointsman_sched::scheduler::Scheduler;
use pointsman_telemetry::{Event, EventKind, Names};

use crate::rng::Rng;

/// Time between two rounds of the observer, as in the host.
const OBSERVER_PERIOD: Micros = 50_000;

/// One request of a trace.
#[derive(Clone, Debug)]
pub struct Ask {
    /// When it arrives.
    pub at: Micros,
    /// What the figures are grouped by.
    pub class: usize,
    /// Whose it is.
    pub tenant: u32,
    /// Its urgency.
    pub priority: Priority,
    /// Its conversation, 0 for none.
    pub session: u64,
    /// Token ids.
    pub prompt: Arc<[u32]>,
    /// Tokens to generate, all of which are generated.
    pub max_new: u32,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// Where it went; `None` when every queue was full.
    pub replica: Option<usize>,
    /// Time to the first token; 0 for a refused one.
    pub ttft: Micros,
    /// Time to the last token; 0 for a refused one.
    pub e2e: Micros,
}

/// Computes a step and says how long it took.
pub trait Device {
    /// Replaces the contents of `out`.
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros;
}

/// What a step costs: `fixed + prefill * prefill tokens + decode * decode tokens`, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Of every step.
    pub fixed_ns: u64,
    /// Of a token of a prefill chunk.
    pub prefill_ns: u64,
    /// Of a decode row.
    pub decode_ns: u64,
}

/// A replica before its first request.
pub struct Replica {
    /// Bounds of its scheduler.
    pub config: Config,
    /// Orders it.
    pub policy: Box<dyn BatchPolicy>,
    /// Computes for it.
    pub device: Box<dyn Device>,
}

/// Who decides and who watches; the replicas come beside it.
pub struct Policies<'a> {
    /// Chooses the replica.
    pub router: &'a dyn RoutePolicy,
    /// Sees the events.
    pub hook: Option<&'a TelemetrySlot>,
    /// The clock of the guests.
    pub clock: &'a AtomicU64,
}

/// The baseline of routers: one replica after the other.
#[derive(Debug, Default)]
pub struct RoundRobin(AtomicU64);

struct Live {
    scheduler: Scheduler,
    policy: Box<dyn BatchPolicy>,
    device: Box<dyn Device>,
    gauges: Arc<ReplicaGauges>,
    sketch: Arc<PrefixSketch>,
    block_tokens: u32,
    max_waiting: u32,
    out: StepOutput,
    /// End of the step in flight.
    busy_until: Option<Micros>,
    /// Not before this time is there anything to schedule, unless something arrives.
    sleeps_until: Micros,
}

struct Fleet<'a> {
    policies: &'a Policies<'a>,
    replicas: Vec<Live>,
    now: Micros,
    columns: ReplicaColumns,
    rng: Rng,
    names: Names,
    events: Vec<Event>,
    observed: Micros,
    fates: Vec<Fate>,
}

#[derive(Debug)]
struct Deaf;

impl TokenSink for Deaf {
    fn push(&mut self, _event: SinkEvent) -> SinkState {
        SinkState::Open
    }
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("config", &self.config).finish_non_exhaustive()
    }
}

impl fmt::Debug for Policies<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policies").field("router", &self.router).field("hook", &self.hook).finish_non_exhaustive()
    }
}

// === impl Cost ===

impl Cost {
    /// Of this step.
    #[must_use]
    pub fn of(&self, plan: &StepPlan) -> Micros {
        let decodes = plan.rows.iter().filter(|row| row.tokens.len() == 1).count() as u64;
        let prefill = plan.tokens.len() as u64 - decodes;
        (self.fixed_ns + self.prefill_ns * prefill + self.decode_ns * decodes).div_ceil(1_000)
    }
}

impl Device for Cost {
    fn run(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Micros {
        out.sampled.clear();
        let n_samples = plan.rows.iter().filter(|row| row.sample.is_some()).count();
        out.sampled.extend((0..n_samples).map(|_| Sampled { token: 7, logprobs: None }));
        self.of(plan)
    }
}

// === impl RoundRobin ===

impl RoutePolicy for RoundRobin {
    fn route(&self, _now: Micros, _request: &RouteRequest<'_>, replicas: &ReplicaColumns) -> Routed {
        let turn = self.0.fetch_add(1, Ordering::Relaxed) % replicas.len().max(1) as u64;
        let choice = Choice::Pick(u32::try_from(turn).expect("few replicas"));
        Routed { choice, decided_by: DecidedBy::native(0), fallback: None }
    }
}

// === impl Fleet ===

/// Serves a trace to its end. The fates come in the order of the trace.
#[must_use]
pub fn serve(trace: &[Ask], replicas: Vec<Replica>, policies: &Policies<'_>, seed: u64) -> Vec<Fate> {
    let mut fleet = Fleet::new(replicas, policies, seed, trace.len());
    let mut asks = trace.iter().enumerate().peekable();
    while let Some(next) = fleet.next(asks.peek().map(|(_, ask)| ask.at)) {
        fleet.now = fleet.now.max(next);
        policies.clock.store(fleet.now, Ordering::Relaxed);
        while let Some((index, ask)) = asks.next_if(|(_, ask)| ask.at <= fleet.now) {
            fleet.arrive(index, ask);
        }
        for index in 0..fleet.replicas.len() {
            fleet.turn(index);
        }
        fleet.observe();
    }
    fleet.fates
}

impl<'a> Fleet<'a> {
    fn new(replicas: Vec<Replica>, policies: &'a Policies<'a>, seed: u64, n_asks: usize) -> Self {
        let live = replicas.into_iter().map(|replica| {
            let Replica { config, policy, device } = replica;
            let (gauges, sketch) = (Arc::new(ReplicaGauges::default()), Arc::new(PrefixSketch::new(config.n_blocks)));
            let scheduler = Scheduler::new(config, seed, Arc::clone(&gauges), Arc::clone(&sketch));
            Live {
                scheduler: scheduler.expect("a good configuration"),
                policy,
                device,
                gauges,
                sketch,
                block_tokens: config.block_tokens,
                max_waiting: config.max_waiting,
                out: StepOutput::default(),
                busy_until: None,
                sleeps_until: 0,
            }
        });
        Self {
            policies,
            replicas: live.collect(),
            now: 1,
            columns: ReplicaColumns::default(),
            rng: Rng::new(seed),
            names: Names::default(),
            events: Vec::new(),
            observed: 0,
            fates: vec![Fate::default(); n_asks],
        }
    }

    /// The next moment at which something happens; none when all is done.
    fn next(&self, arrival: Option<Micros>) -> Option<Micros> {
        let replicas = self.replicas.iter().filter_map(|replica| match replica.busy_until {
            Some(end) => Some(end),
            None if replica.scheduler.is_idle() => None,
            None => Some(replica.sleeps_until),
        });
        replicas.chain(arrival).min()
    }

    fn arrive(&mut self, index: usize, ask: &Ask) {
        let id = RequestId(index as u64 + 1);
        let block_tokens = self.replicas[0].block_tokens;
        let hashes: Arc<[u64]> = chain_hashes(&ask.prompt, block_tokens).into();
        self.look(&hashes, ask);
        let tenant = format!("tenant-{}", ask.tenant);
        let request = RouteRequest {
            id,
            model: "demo",
            tenant: &tenant,
            tenant_id: ask.tenant,
            session: ask.session,
            prefix: hashes.first().copied().unwrap_or(0),
            priority: ask.priority,
            prompt_tokens: u32::try_from(ask.prompt.len()).expect("a short prompt"),
            max_new_tokens: ask.max_new,
            arrived: ask.at,
            deadline: 0,
            seed: self.rng.next(),
            numbers: RequestNumbers::default(),
            attributes: &[],
        };
        let routed = self.policies.router.route(self.now, &request, &self.columns);
        assert!(routed.fallback.is_none(), "the router failed: {routed:?}");
        let has_room = |row: usize| {
            let replica: &Live = &self.replicas[row];
            replica.scheduler.n_waiting() < replica.max_waiting
        };
        let Resolved::Row(row) = resolve(&routed.choice, &self.columns, request.seed, has_room) else { return };
        let request = Request {
            id,
            tenant: ask.tenant,
            tenant_name: tenant.into(),
            session: ask.session,
            priority: ask.priority,
            arrived: ask.at,
            deadline: 0,
            prompt: Arc::clone(&ask.prompt),
            block_hashes: hashes,
            max_new_tokens: ask.max_new,
            min_new_tokens: 0,
            stop_tokens: Arc::default(),
            sampling: Arc::new(Sampling::default()),
            attributes: Arc::default(),
            transient: false,
            draft_tokens: 0,
            draft_method: DraftMethod::Ngram,
            fork_of: None,
            mask: None,
            router_generation: routed.decided_by.generation,
            sink: Box::new(Deaf),
        };
        let replica = &mut self.replicas[row];
        replica.scheduler.submit(request, self.now).expect("it has room and the request fits");
        replica.sleeps_until = self.now;
        self.fates[index].replica = Some(row);
    }

    /// The columns that a router is shown.
    fn look(&mut self, hashes: &[u64], ask: &Ask) {
        self.columns.clear();
        let c = &mut self.columns;
        for (index, replica) in (0_u32..).zip(&self.replicas) {
            let load = |gauge: &std::sync::atomic::AtomicU32| gauge.load(Ordering::Relaxed);
            let gauges = &replica.gauges;
            let cached = replica.sketch.leading_hits(hashes) * replica.block_tokens as usize;
            c.id.push(index);
            c.key.push(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            c.health.push(0);
            c.weight.push(1_000);
            c.waiting.push(load(&gauges.waiting));
            c.running.push(load(&gauges.running));
            c.running_limit.push(load(&gauges.running_limit));
            c.queued_tokens.push(load(&gauges.queued_tokens));
            c.free_blocks.push(load(&gauges.free_blocks));
            c.total_blocks.push(load(&gauges.total_blocks));
            c.cached_tokens.push(u32::try_from(cached.min(ask.prompt.len() - 1)).expect("a short prompt"));
            c.device.push(u64::from(index));
            c.variant.push(1);
        }
    }

    /// Ends the step of a replica that is due and begins the next one.
    fn turn(&mut self, index: usize) {
        let replica = &mut self.replicas[index];
        let (events, fates) = (&mut self.events, &mut self.fates);
        let mut note = |event: Event| {
            if let Some(fate) = event.request.checked_sub(1).map(|ask| &mut fates[usize::try_from(ask).expect("few")]) {
                match event.kind {
                    EventKind::FirstToken => fate.ttft = event.a,
                    EventKind::Finished => fate.e2e = event.a,
                    EventKind::Rejected => fate.replica = None,
                    _ => {}
                }
            }
            events.push(Event { replica: u32::try_from(index).expect("few replicas"), ..event });
        };
        if replica.busy_until.is_some_and(|end| end <= self.now) {
            replica.busy_until = None;
            replica.scheduler.complete(self.now, &mut replica.out, &mut note);
        }
        if replica.busy_until.is_some() || replica.scheduler.is_idle() {
            return;
        }
        match replica.scheduler.schedule(self.now, &mut *replica.policy, &mut note) {
            Some(plan) => replica.busy_until = Some(self.now + replica.device.run(plan, &mut replica.out).max(1)),
            None => {
                let next = replica.scheduler.next_deadline().unwrap_or(Micros::MAX);
                replica.sleeps_until = next.max(self.now + 1);
            }
        }
    }

    /// A round of the observer, where one is due.
    fn observe(&mut self) {
        if self.now < self.observed + OBSERVER_PERIOD {
            return;
        }
        self.observed = self.now;
        if let Some(hook) = self.policies.hook {
            let alerts = hook.on_events(self.now, &self.events, &self.names, 0);
            assert!(alerts.is_empty(), "{alerts:?}");
        }
        self.events.clear();
    }
}
