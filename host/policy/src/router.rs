//! `RoutePolicy` with a router guest behind it.
//!
//! Runs on the thread that handles the request: one call costs about a microsecond, so handing it to another thread would
//! cost more than the call. An instance is taken from the generation's queue, called, and put back; when none is free, or
//! the guest faults or is off, the answer is `Abstain` with `fallback` set, and the native router decides.

use std::sync::Arc;

use pointsman_sched::ids::{Priority, RequestId};
use pointsman_sched::route::{
    Choice, NO_LABEL, Refusal, Rejection, ReplicaColumns, RequestNumbers, RoutePolicy, RouteRequest, Routed,
    check_choice, resolve,
};
use pointsman_telemetry::Micros;

use crate::bindings::router::exports::pointsman::policy::router as wit;
use crate::bindings::router::pointsman::policy::types;
use crate::config::Budgets;
use crate::engine::stopwatch_ns;
use crate::fault::{Call, Fault, FaultKind, truncate};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::{MAX_REPLICA_COLUMNS, MAX_REQUEST_NUMBERS, ReplicaColumn, RequestNumber, Wants};
use crate::shadow::{Case, Shadow, Verdict};
use crate::slot::{Deciding, SlotCore, slot_by_core};
use crate::upload::World;

/// Longest text of a rejection that a client sees, in bytes.
const MAX_MESSAGE: usize = 512;
/// Calls that a probe makes with each input, which also fault the shared code in.
const WARM_CALLS: usize = 16;

/// `world router-policy`.
pub(crate) struct RouterHook;

/// The slot `router`.
#[derive(Debug)]
pub struct RouterSlot {
    pub(crate) core: Arc<SlotCore<RouterHook>>,
}

slot_by_core!(RouterSlot);

impl RouterSlot {
    /// Who routes.
    #[must_use]
    pub fn deciding(&self) -> Deciding {
        self.core.deciding_now()
    }
}

impl RoutePolicy for RouterSlot {
    fn route(&self, now: Micros, request: &RouteRequest<'_>, replicas: &ReplicaColumns) -> Routed {
        let generation = self.core.enter();
        let asked = match &generation.guest {
            Some(guest) => {
                let arguments = Arguments { request, replicas, wants: &guest.wants };
                guest.ask(now, (Call::Route, guest.budgets().route), |i, hard| call(i, hard, now, &arguments))
            }
            None => Ok(Choice::Abstain),
        };
        let (choice, fallback) = match asked {
            Ok(choice) => (choice, None),
            Err(why) => (Choice::Abstain, Some(why)),
        };
        let routed = Routed { choice, decided_by: generation.decided_by.clone(), fallback };
        if let Some(shadow) = self.core.shadowed() {
            self::shadow(&shadow, RouterQuestion { now, request, replicas }, &routed.choice);
        }
        routed
    }
}

impl RouterSlot {
    /// What the shadow said of a request, if it was asked about it and that is not long ago.
    #[must_use]
    pub fn shadow_said(&self, request: RequestId) -> Option<Routed> {
        let case = self.core.case()?;
        let choice = case.answer_to(request.0)?;
        Some(Routed { choice, decided_by: case.candidate.decided_by.clone(), fallback: None })
    }
}

/// Inputs of one decision, for [`Runtime::ask_router`](crate::Runtime::ask_router).
#[derive(Clone, Copy, Debug)]
pub struct RouterQuestion<'a> {
    /// When.
    pub now: Micros,
    /// The request.
    pub request: &'a RouteRequest<'a>,
    /// The replicas.
    pub replicas: &'a ReplicaColumns,
}

/// The checked answer of an instance that serves nobody.
pub(crate) fn answer(
    instance: &mut Instance<RouterHook>,
    hard: Micros,
    wants: &Wants,
    question: RouterQuestion<'_>,
) -> Result<Choice, Fault> {
    let RouterQuestion { now, request, replicas } = question;
    call(instance, hard, now, &Arguments { request, replicas, wants })
}

/// Puts a decision to the shadow.
#[cold]
fn shadow(shadow: &Shadow<RouterHook>, question: RouterQuestion<'_>, said: &Choice) {
    if shadow.case.samples(question.request.id.0) {
        let wants = shadow.case.candidate.guest.as_ref().map(|guest| &guest.wants);
        shadow.put(0, || RouterSample::of(question, said, wants));
    }
}

/// A decision as a shadow is told of it.
pub(crate) struct RouterSample {
    now: Micros,
    /// With its texts beside it.
    request: RouteRequest<'static>,
    model: Box<str>,
    tenant: Box<str>,
    attributes: Vec<(Box<str>, Box<str>)>,
    replicas: ReplicaColumns,
    said: Choice,
}

impl RouterSample {
    fn of(question: RouterQuestion<'_>, said: &Choice, wants: Option<&Wants>) -> Self {
        let RouterQuestion { now, request, replicas } = question;
        let attributes = wants.map_or_else(Vec::new, |wants| wanted(request.attributes, wants));
        Self {
            now,
            request: RouteRequest {
                id: request.id,
                model: "",
                tenant: "",
                tenant_id: request.tenant_id,
                session: request.session,
                prefix: request.prefix,
                priority: request.priority,
                prompt_tokens: request.prompt_tokens,
                max_new_tokens: request.max_new_tokens,
                arrived: request.arrived,
                deadline: request.deadline,
                seed: request.seed,
                numbers: request.numbers,
                attributes: &[],
            },
            model: request.model.into(),
            tenant: request.tenant.into(),
            attributes: attributes.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            replicas: replicas.clone(),
            said: said.clone(),
        }
    }
}

/// Ways in which two routers differ, in the order of [`RouterHook::DIFFERENCES`].
const OTHER_REPLICA: usize = 0;
const WOULD_REFUSE: usize = 1;
const WOULD_SERVE: usize = 2;
const OTHER_REASON: usize = 3;

/// Compares what two answers come to where every replica has room: the row that each would try first.
fn compare(used: &Choice, shadow: &Choice, replicas: &ReplicaColumns, seed: u64) -> Verdict {
    let row = |choice| resolve(choice, replicas, seed, |_| true);
    match (used, shadow) {
        (Choice::Reject(used), Choice::Reject(shadow)) if used.reason == shadow.reason => Verdict::Agrees,
        (Choice::Reject(_), Choice::Reject(_)) => Verdict::Differs(OTHER_REASON),
        (Choice::Reject(_), _) => Verdict::Differs(WOULD_SERVE),
        (_, Choice::Reject(_)) => Verdict::Differs(WOULD_REFUSE),
        _ if row(used) == row(shadow) => Verdict::Agrees,
        _ => Verdict::Differs(OTHER_REPLICA),
    }
}

struct Arguments<'a> {
    request: &'a RouteRequest<'a>,
    replicas: &'a ReplicaColumns,
    wants: &'a Wants,
}

/// One call and the check of its answer.
#[inline]
fn call(
    instance: &mut Instance<RouterHook>,
    hard: Micros,
    now: Micros,
    arguments: &Arguments<'_>,
) -> Result<Choice, Fault> {
    let Arguments { request, replicas, wants } = *arguments;
    // A manifest names a column at most once, so there are places enough.
    let mut columns: [&[u64]; MAX_REPLICA_COLUMNS] = [&[]; MAX_REPLICA_COLUMNS];
    let n_columns = wants.replica.len().min(columns.len());
    for (place, column) in columns.iter_mut().zip(&wants.replica) {
        *place = replica_column(replicas, *column);
    }
    let numbers = wanted_numbers(&request.numbers, wants);
    let n_numbers = wants.request.len().min(numbers.len());
    let attributes = wanted(request.attributes, wants);
    let request = lower_request(request, &numbers[..n_numbers], &attributes);
    let replicas_arg = lower_replicas(replicas, &columns[..n_columns]);
    let choice = instance.call(hard, now, |guest, store| {
        guest.pointsman_policy_router().call_route(store, now, request, replicas_arg)
    })?;
    let choice = lift_choice(choice);
    check_choice(&choice, replicas.len()).map_err(|why| Fault::new(FaultKind::BadAnswer, why.to_string()))?;
    Ok(choice)
}

fn replica_column(replicas: &ReplicaColumns, column: ReplicaColumn) -> &[u64] {
    match column {
        ReplicaColumn::Device => &replicas.device,
        ReplicaColumn::Variant => &replicas.variant,
        ReplicaColumn::Load => &replicas.load,
        ReplicaColumn::Errors => &replicas.errors,
        ReplicaColumn::Age => &replicas.age,
        ReplicaColumn::PredictedTtft => &replicas.predicted_ttft,
        ReplicaColumn::Kind => &replicas.kind,
        ReplicaColumn::Label(place) => replicas.labels.get(usize::from(place)).map_or(&[], |(_, column)| column),
    }
}

fn request_number(numbers: &RequestNumbers, number: RequestNumber) -> u64 {
    match number {
        RequestNumber::Choices => numbers.choices,
        RequestNumber::TemperaturePpm => numbers.temperature_ppm,
        RequestNumber::Stream => numbers.stream,
        RequestNumber::MinNewTokens => numbers.min_new_tokens,
        RequestNumber::CachePrompt => numbers.cache_prompt,
    }
}

/// Those numbers of a request that the guest wants; a manifest names each at most once.
pub(crate) fn wanted_numbers(numbers: &RequestNumbers, wants: &Wants) -> [u64; MAX_REQUEST_NUMBERS] {
    let mut row = [0; MAX_REQUEST_NUMBERS];
    for (place, number) in row.iter_mut().zip(&wants.request) {
        *place = request_number(numbers, *number);
    }
    row
}

/// Those texts of a request that the guest wants.
pub(crate) fn wanted<'a>(attributes: &[(&'a str, &'a str)], wants: &Wants) -> Vec<(&'a str, &'a str)> {
    if wants.attributes.is_empty() {
        return Vec::new();
    }
    attributes.iter().copied().filter(|(name, _)| wants.attributes.iter().any(|wanted| wanted == name)).collect()
}

pub(crate) fn lower_priority(priority: Priority) -> types::Priority {
    match priority {
        Priority::Critical => types::Priority::Critical,
        Priority::High => types::Priority::High,
        Priority::Normal => types::Priority::Normal,
        Priority::Low => types::Priority::Low,
    }
}

fn lower_request<'a>(
    request: &RouteRequest<'a>,
    extra: &'a [u64],
    attributes: &'a [(&'a str, &'a str)],
) -> wit::Request<'a> {
    wit::Request {
        id: request.id.0,
        model: request.model,
        tenant: request.tenant,
        tenant_id: request.tenant_id,
        session: request.session,
        prefix: request.prefix,
        priority: lower_priority(request.priority),
        prompt_tokens: request.prompt_tokens,
        max_new_tokens: request.max_new_tokens,
        arrived: request.arrived,
        deadline: request.deadline,
        seed: request.seed,
        extra,
        attributes,
    }
}

fn lower_replicas<'a>(replicas: &'a ReplicaColumns, extra: &'a [&'a [u64]]) -> wit::Replicas<'a> {
    wit::Replicas {
        id: &replicas.id,
        key: &replicas.key,
        health: &replicas.health,
        weight: &replicas.weight,
        waiting: &replicas.waiting,
        running: &replicas.running,
        running_limit: &replicas.running_limit,
        queued_tokens: &replicas.queued_tokens,
        free_blocks: &replicas.free_blocks,
        total_blocks: &replicas.total_blocks,
        cached_tokens: &replicas.cached_tokens,
        extra,
    }
}

fn lift_choice(choice: wit::Choice) -> Choice {
    match choice {
        wit::Choice::Abstain => Choice::Abstain,
        wit::Choice::Pick(row) => Choice::Pick(row),
        wit::Choice::Rank(rows) => Choice::Rank(rows),
        wit::Choice::Reject(rejection) => Choice::Reject(lift_rejection(rejection)),
    }
}

pub(crate) fn lift_rejection(rejection: types::Rejection) -> Rejection {
    let mut message = rejection.message;
    truncate(&mut message, MAX_MESSAGE);
    let reason = match rejection.reason {
        types::Refusal::Overloaded => Refusal::Overloaded,
        types::Refusal::Quota => Refusal::Quota,
        types::Refusal::NotAllowed => Refusal::NotAllowed,
        types::Refusal::CannotMeetDeadline => Refusal::CannotMeetDeadline,
    };
    Rejection { reason, retry_after_ms: rejection.retry_after_ms, message }
}

impl Hook for RouterHook {
    const WORLD: World = World::Router;
    const MAX_ANSWER_BYTES: usize = 1 << 20;
    type Local = ();
    const DIFFERENCES: &'static [&'static str] = &["other-replica", "would-refuse", "would-serve", "other-reason"];
    hook_bindings!(Router, router, RouterIndices, Router, RouterSample, (), Choice);

    fn shadow(case: &Case<Self>, _memory: &mut (), sample: RouterSample) {
        let RouterSample { now, request, model, tenant, attributes, replicas, said } = sample;
        let attributes: Vec<(&str, &str)> = attributes.iter().map(|(name, value)| (&**name, &**value)).collect();
        let request = RouteRequest { model: &model, tenant: &tenant, attributes: &attributes, ..request };
        let started = stopwatch_ns();
        let asked = match &case.candidate.guest {
            Some(guest) => {
                let arguments = Arguments { request: &request, replicas: &replicas, wants: &guest.wants };
                guest.consult(now, (Call::Route, guest.budgets().route), |i, hard| call(i, hard, now, &arguments))
            }
            None => Ok(Choice::Abstain),
        };
        let took_ns = stopwatch_ns() - started;
        let Ok(choice) = asked else { return case.judged(Verdict::NoAnswer, took_ns) };
        case.judged(compare(&said, &choice, &replicas, request.seed), took_ns);
        case.keep(request.id.0, choice);
    }

    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        let attributes: Vec<(&str, &str)> = wants.attributes.iter().map(|name| (name.as_str(), "probe")).collect();
        for (case, rows) in [("one replica", 1), ("three replicas", 3)] {
            let replicas = probe_replicas(rows, wants);
            for turn in 0..WARM_CALLS {
                let request = probe_request(turn as u64, now, &attributes);
                let arguments = Arguments { request: &request, replicas: &replicas, wants };
                call(instance, budgets.route.hard, now, &arguments).map_err(|fault| ProbeFault {
                    case,
                    call: Call::Route,
                    fault,
                })?;
            }
        }
        Ok(())
    }
}

fn probe_request<'a>(turn: u64, now: Micros, attributes: &'a [(&'a str, &'a str)]) -> RouteRequest<'a> {
    RouteRequest {
        id: pointsman_sched::ids::RequestId(turn + 1),
        model: "probe",
        tenant: "probe",
        tenant_id: 1,
        session: turn,
        prefix: turn,
        priority: Priority::Normal,
        prompt_tokens: 100,
        max_new_tokens: 16,
        arrived: now,
        deadline: 0,
        seed: turn.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        numbers: RequestNumbers { choices: 1, cache_prompt: 1, ..RequestNumbers::default() },
        attributes,
    }
}

/// Replicas of rising load, the last one full. They have every label that is wanted, and the first of none.
fn probe_replicas(rows: u32, wants: &Wants) -> ReplicaColumns {
    let labels = wants.replica.iter().filter_map(|column| match column {
        ReplicaColumn::Label(place) => Some(usize::from(*place) + 1),
        _ => None,
    });
    let label = || (0..rows).map(|i| if i == 0 { NO_LABEL } else { i.into() }).collect();
    let rising = |unit: u64| (0..rows).map(|i| u64::from(i) * unit).collect::<Vec<u64>>();
    let column = |value: fn(u32) -> u32| (0..rows).map(value).collect::<Vec<u32>>();
    ReplicaColumns {
        id: column(|i| i + 1),
        key: (0..rows).map(|i| u64::from(i) + 11).collect(),
        health: vec![0; rows as usize],
        weight: column(|_| 1_000),
        waiting: column(|i| i * 4),
        running: column(|i| i * 8),
        running_limit: column(|_| 16),
        queued_tokens: column(|i| i * 1_000),
        free_blocks: column(|i| 100_u32.saturating_sub(i * 50)),
        total_blocks: column(|_| 100),
        cached_tokens: column(|i| i * 16),
        device: (0..rows).map(u64::from).collect(),
        variant: vec![1; rows as usize],
        load: rising(300_000),
        errors: rising(1_000),
        age: rising(60_000_000),
        predicted_ttft: rising(20_000),
        kind: (0..rows).map(|i| u64::from(i % 2)).collect(),
        labels: (0..labels.max().unwrap_or(0)).map(|_| ("probe".into(), label())).collect(),
    }
}
