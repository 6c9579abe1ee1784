//! What became of the last requests, for whoever asks why: what admission policy and router saw and said, where they went,
//! when they reached each stage.
//!
//! A ring of shared records, each with a place of its own: entering one is a short lock of that place alone, and what follows
//! are relaxed stores into the record. The replica columns are kept as one list of numbers, because a request should not pay
//! for thirteen allocations that nobody may ever look at. A record is bounded by the number of replicas and by
//! [`RequestSeen`]'s longest text, so the ring is bounded in bytes too.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pointsman_sched::admit::{Judged, Load};
use pointsman_sched::ids::Micros;
use pointsman_sched::route::{Choice, ReplicaColumns, Resolved, RouteRequest, Routed, resolve};

use crate::admin::wire::calls::{AdmissionCall, AdmissionLine, DoorSeen, VerdictSeen};
use crate::admin::wire::decision::{
    Admission, Answer, Chosen, Decision, Explained, RequestSeen, RequestSummary, RouterLine, Stages, State, Tried,
};
use crate::dispatch::Placement;
use crate::error::ApiError;
use crate::ports::{Catalog, Replica};

/// Longest reason of an end that is kept, in bytes.
const MAX_REASON: usize = 256;

/// The last requests.
#[derive(Debug)]
pub(crate) struct Traces {
    places: Box<[Mutex<Option<Arc<Trace>>>]>,
    next: AtomicUsize,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Trace {
    id: Arc<str>,
    arrived: Micros,
    door: Option<Box<Doored>>,
    decided: OnceLock<Box<Decided>>,
    /// When it reached each stage, 0 for not yet.
    reached: [AtomicU64; N_STAGES],
    cached_tokens: AtomicU32,
    generated_tokens: AtomicU32,
    ended: OnceLock<(State, Cow<'static, str>)>,
    /// The upstreams that were asked.
    tried: Mutex<Vec<Tried>>,
}

/// The way of a request, in the order of [`Stages`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Admitted,
    Routed,
    Scheduled,
    FirstToken,
    Ended,
}

const N_STAGES: usize = 5;

/// A routing decision as it happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noted<'a> {
    pub(crate) now: Micros,
    pub(crate) request: &'a RouteRequest<'a>,
    pub(crate) replicas: &'a ReplicaColumns,
    pub(crate) routed: &'a Routed,
    pub(crate) call_us: u64,
    /// Where the first choice went, with its row.
    pub(crate) chosen: Option<(u32, &'a Placement)>,
}

/// A decision at the door.
#[derive(Debug)]
pub(crate) struct Doored {
    pub(crate) now: Micros,
    pub(crate) request: DoorSeen,
    pub(crate) load: Load,
    pub(crate) judged: Judged,
    pub(crate) call_us: u64,
}

/// A routing decision, kept.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) now: Micros,
    pub(crate) request: RequestSeen,
    replicas: Packed,
    routed: Routed,
    call_us: u64,
    chosen: Option<(u32, Arc<str>, Arc<str>)>,
}

/// [`ReplicaColumns`] as one list, column after column.
#[derive(Debug)]
struct Packed {
    rows: usize,
    numbers: Box<[u64]>,
    labels: Box<[Arc<str>]>,
}

// === impl Traces ===

impl Traces {
    /// Remembers this many requests; 0 remembers none.
    pub(crate) fn new(n_requests: usize) -> Self {
        Self { places: (0..n_requests).map(|_| Mutex::default()).collect(), next: AtomicUsize::new(0) }
    }

    /// Enters a request, in the place of the oldest, with what an admission policy said of it.
    pub(crate) fn enter(&self, id: &Arc<str>, arrived: Micros, door: Option<Doored>) -> Arc<Trace> {
        let trace = Arc::new(Trace {
            id: Arc::clone(id),
            arrived,
            door: door.map(Box::new),
            decided: OnceLock::new(),
            reached: Default::default(),
            cached_tokens: AtomicU32::new(0),
            generated_tokens: AtomicU32::new(0),
            ended: OnceLock::new(),
            tried: Mutex::default(),
        });
        if !self.places.is_empty() {
            let place = self.next.fetch_add(1, Ordering::Relaxed) % self.places.len();
            let oldest = self.places[place].lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::clone(&trace));
            // Freed here and not under the lock.
            drop(oldest);
        }
        trace
    }

    /// Those that are remembered, newest first.
    pub(crate) fn newest(&self) -> impl Iterator<Item = Arc<Trace>> {
        let (n, next) = (self.places.len(), self.next.load(Ordering::Relaxed));
        let place = move |back: usize| next.wrapping_sub(1 + back).checked_rem(n).unwrap_or(0);
        (0..n.min(next))
            .filter_map(move |back| self.places[place(back)].lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The latest request of this id.
    pub(crate) fn find(&self, id: &str) -> Option<Arc<Trace>> {
        self.newest().find(|trace| *trace.id == *id)
    }

    /// How many it remembers.
    pub(crate) fn capacity(&self) -> usize {
        self.places.len()
    }
}

// === impl Trace ===

impl Trace {
    /// Notes when a stage was reached; only the first time counts.
    pub(crate) fn reached(&self, stage: Stage, now: Micros) {
        let at = now.max(1);
        let _ = self.reached[stage as usize].compare_exchange(0, at, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Notes prompt tokens that came from the cache.
    pub(crate) fn cached(&self, tokens: u32) {
        self.cached_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Counts a generated token.
    pub(crate) fn generated(&self) {
        self.generated_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes an upstream's own count of tokens.
    pub(crate) fn counted(&self, cached: u32, generated: u32) {
        self.cached_tokens.store(cached, Ordering::Relaxed);
        self.generated_tokens.store(generated, Ordering::Relaxed);
    }

    /// Notes that an upstream was asked, and what came of it. The router offers each of them once.
    pub(crate) fn tried(&self, replica: &Arc<str>, outcome: String, now: Micros) {
        let tried = Tried { replica: replica.to_string(), outcome, at_us: now.saturating_sub(self.arrived) };
        self.tried.lock().unwrap_or_else(PoisonError::into_inner).push(tried);
    }

    /// Keeps the decision for the first prompt.
    pub(crate) fn decided(&self, noted: &Noted<'_>) {
        self.reached(Stage::Routed, noted.now.saturating_add(noted.call_us));
        let _ = self.decided.set(Box::new(Decided::of(noted)));
    }

    /// Ended as asked.
    pub(crate) fn finished(&self, how: &'static str, now: Micros) {
        self.end(State::Finished, Cow::Borrowed(how), now);
    }

    /// The client went away.
    pub(crate) fn abandoned(&self, now: Micros) {
        self.end(State::Cancelled, Cow::Borrowed("the client went away"), now);
    }

    /// A draft whose final answer has ended.
    pub(crate) fn superseded(&self, now: Micros) {
        self.end(State::Cancelled, Cow::Borrowed("the final answer ended first"), now);
    }

    /// Ended by an error, before or after it was submitted.
    pub(crate) fn failed(&self, error: &ApiError, now: Micros) {
        let state = match error {
            ApiError::Cancelled | ApiError::SlowClient | ApiError::Deadline { .. } => State::Cancelled,
            error if error.reason().is_some() => State::Rejected,
            _ => State::Failed,
        };
        let mut text = error.to_string();
        text.truncate(text.floor_char_boundary(MAX_REASON));
        self.end(state, Cow::Owned(text), now);
    }

    fn end(&self, state: State, how: Cow<'static, str>, now: Micros) {
        if self.ended.set((state, how)).is_ok() {
            self.reached(Stage::Ended, now);
        }
    }

    /// The decision, if there was one.
    pub(crate) fn decision(&self) -> Option<&Decided> {
        self.decided.get().map(|decided| &**decided)
    }

    /// What was decided at the door, if a policy was asked.
    pub(crate) fn door(&self) -> Option<&Doored> {
        self.door.as_deref()
    }

    fn stages(&self) -> Stages {
        let at = |stage: Stage| match self.reached[stage as usize].load(Ordering::Relaxed) {
            0 => None,
            at => Some(at.saturating_sub(self.arrived)),
        };
        Stages {
            admitted: at(Stage::Admitted),
            routed: at(Stage::Routed),
            scheduled: at(Stage::Scheduled),
            first_token: at(Stage::FirstToken),
            ended: at(Stage::Ended),
        }
    }

    fn state(&self) -> (State, Option<String>) {
        self.ended.get().map_or((State::Running, None), |(state, how)| (*state, Some(how.to_string())))
    }

    /// All of it; who stood in the rows is looked up in the catalog.
    pub(crate) fn explain(&self, catalog: &Catalog) -> Explained {
        let (state, finish) = self.state();
        Explained {
            id: self.id.to_string(),
            state,
            finish,
            stages_us: self.stages(),
            cached_tokens: self.cached_tokens.load(Ordering::Relaxed),
            generated_tokens: self.generated_tokens.load(Ordering::Relaxed),
            admission: self.door().map(Doored::explain),
            decision: self.decision().map(|decided| decided.explain(catalog)),
            upstreams: self.tried.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            previous: None,
            shadow: None,
        }
    }

    /// One line of it.
    pub(crate) fn summary(&self) -> RequestSummary {
        let (state, finish) = self.state();
        let (decided, door) = (self.decision(), self.door().map(|door| &door.request));
        RequestSummary {
            id: self.id.to_string(),
            state,
            finish,
            model: decided.map(|d| &d.request.model).or(door.map(|d| &d.model)).cloned(),
            tenant: decided.map(|d| &d.request.tenant).or(door.map(|d| &d.tenant)).cloned(),
            replica: decided.and_then(|d| d.chosen.as_ref()).map(|(_, replica, _)| replica.to_string()),
            revision: decided.map(|d| d.routed.decided_by.revision.to_string()),
            generation: decided.map(|d| d.routed.decided_by.generation),
            stages_us: self.stages(),
            generated_tokens: self.generated_tokens.load(Ordering::Relaxed),
        }
    }
}

// === impl Doored ===

impl Doored {
    /// As a line of a recording.
    pub(crate) fn line(&self) -> AdmissionLine {
        let Self { now, request, load, judged, .. } = self;
        let answer = judged.verdict.as_ref().map(VerdictSeen::from);
        AdmissionLine {
            now: *now,
            call: AdmissionCall::Admit { request: request.clone(), load: *load, answer },
            revision: judged.decided_by.revision.to_string(),
            generation: judged.decided_by.generation,
        }
    }

    fn explain(&self) -> Admission {
        let Judged { verdict, decided_by, fallback, .. } = &self.judged;
        let fallback = fallback.map(|why| why.as_str());
        let stood_in = |why| format!("the policy did not answer ({why}): the request entered as it was");
        Admission {
            request: self.request.clone(),
            load: self.load,
            revision: decided_by.revision.to_string(),
            generation: decided_by.generation,
            answer: verdict.as_ref().map(VerdictSeen::from),
            call_us: self.call_us,
            fallback,
            clamps: fallback.map(stood_in).into_iter().collect(),
            previous: None,
            shadow: None,
        }
    }
}

// === impl Noted ===

impl Noted<'_> {
    /// As a line of a recording.
    pub(crate) fn line(&self) -> RouterLine {
        RouterLine {
            now: self.now,
            request: RequestSeen::of(self.request),
            replicas: self.replicas.clone(),
            answer: Answer::from(&self.routed.choice),
            revision: self.routed.decided_by.revision.to_string(),
            generation: self.routed.decided_by.generation,
            fallback: self.routed.fallback.is_some(),
            chosen: self.chosen.map(|(row, _)| row),
        }
    }
}

// === impl Decided ===

impl Decided {
    fn of(noted: &Noted<'_>) -> Self {
        let chosen = noted.chosen;
        Self {
            now: noted.now,
            request: RequestSeen::of(noted.request),
            replicas: Packed::of(noted.replicas),
            routed: noted.routed.clone(),
            call_us: noted.call_us,
            chosen: chosen.map(|(row, to)| (row, Arc::clone(&to.replica.name), Arc::clone(&to.variant.id))),
        }
    }

    /// What the router saw of the replicas.
    pub(crate) fn replicas(&self) -> ReplicaColumns {
        self.replicas.columns()
    }

    fn explain(&self, catalog: &Catalog) -> Decision {
        let replicas = self.replicas();
        let rows: Vec<String> = replicas.id.iter().map(|&id| name_of(catalog, id)).collect();
        Decision {
            request: self.request.clone(),
            clamps: self.clamps(&rows),
            replicas,
            rows,
            revision: self.routed.decided_by.revision.to_string(),
            generation: self.routed.decided_by.generation,
            answer: Answer::from(&self.routed.choice),
            call_us: self.call_us,
            fallback: self.routed.fallback.map(|why| why.as_str()),
            chosen: self.chosen.as_ref().map(|(row, replica, variant)| Chosen {
                row: *row,
                replica: replica.to_string(),
                variant: variant.to_string(),
            }),
        }
    }

    /// Rows that the policy named.
    fn named(&self) -> &[u32] {
        match &self.routed.choice {
            Choice::Pick(row) => std::slice::from_ref(row),
            Choice::Rank(rows) => rows,
            Choice::Abstain | Choice::Reject(_) => &[],
        }
    }

    /// Of those, the ones that had no room: what comes before the chosen row, or all where that is not among them.
    fn without_room(&self) -> &[u32] {
        let named = self.named();
        let chosen = self.chosen.as_ref().map(|(row, ..)| *row);
        let passed = named.iter().position(|row| Some(*row) == chosen).unwrap_or(named.len());
        &named[..passed]
    }

    fn clamps(&self, rows: &[String]) -> Vec<String> {
        let name = |row: u32| rows.get(row as usize).map_or("?", String::as_str);
        let full = self.without_room();
        let mut clamps: Vec<String> =
            full.iter().map(|&row| format!("row {row} ({}) had no room", name(row))).collect();
        if let Some(why) = self.routed.fallback {
            clamps.push(format!("the policy did not answer ({}): the native order decided", why.as_str()));
        } else if self.routed.choice == Choice::Abstain {
            clamps.push("the policy left it to the host: the native order decided".to_owned());
        } else if self.chosen.is_some() && full.len() == self.named().len() {
            clamps.push("no row that it named had room: the native order decided".to_owned());
        }
        if self.chosen.is_none() && !matches!(self.routed.choice, Choice::Reject(_)) {
            clamps.push("no replica took the request".to_owned());
        }
        clamps
    }

    /// The row to which another answer comes, given the recorded load.
    pub(crate) fn row_of(&self, answer: &Choice, catalog: &Catalog) -> Option<u32> {
        if matches!(answer, Choice::Reject(_)) {
            return None;
        }
        let replicas = self.replicas();
        let has_room = |row: usize| {
            let limit = find(catalog, replicas.id[row]).map_or(u32::MAX, |replica| replica.max_waiting);
            replicas.waiting[row] < limit && !self.without_room().iter().any(|&full| full as usize == row)
        };
        match resolve(answer, &replicas, self.request.seed, has_room) {
            Resolved::Row(row) => u32::try_from(row).ok(),
            Resolved::Full => None,
        }
    }
}

fn find(catalog: &Catalog, id: u32) -> Option<&Arc<Replica>> {
    catalog.variants.iter().flat_map(|variant| &variant.replicas).find(|replica| replica.id.0 == id)
}

fn name_of(catalog: &Catalog, id: u32) -> String {
    find(catalog, id).map_or_else(|| format!("replica {id}, unloaded since"), |replica| replica.name.to_string())
}

// === impl Packed ===

impl Packed {
    fn of(columns: &ReplicaColumns) -> Self {
        let ReplicaColumns {
            id,
            key,
            health,
            weight,
            waiting,
            running,
            running_limit,
            queued_tokens,
            free_blocks,
            total_blocks,
            cached_tokens,
            device,
            variant,
            load,
            errors,
            age,
            predicted_ttft,
            kind,
            labels,
        } = columns;
        let rows = id.len();
        let mut numbers = Vec::with_capacity(rows * (18 + labels.len()));
        for column in [key, device, variant, load, errors, age, predicted_ttft, kind] {
            numbers.extend_from_slice(column);
        }
        for column in
            [id, weight, waiting, running, running_limit, queued_tokens, free_blocks, total_blocks, cached_tokens]
        {
            numbers.extend(column.iter().map(|&n| u64::from(n)));
        }
        numbers.extend(health.iter().map(|&n| u64::from(n)));
        for (_, column) in labels {
            numbers.extend_from_slice(column);
        }
        Self { rows, numbers: numbers.into(), labels: labels.iter().map(|(name, _)| Arc::clone(name)).collect() }
    }

    fn columns(&self) -> ReplicaColumns {
        let mut columns = self.numbers.chunks_exact(self.rows.max(1));
        let mut long = || columns.next().unwrap_or_default().to_vec();
        let (key, device, variant) = (long(), long(), long());
        let (load, errors, age, predicted_ttft, kind) = (long(), long(), long(), long(), long());
        let mut short = || long().into_iter().map(|n| u32::try_from(n).unwrap_or(u32::MAX)).collect::<Vec<u32>>();
        let mut unpacked = ReplicaColumns {
            key,
            device,
            variant,
            load,
            errors,
            age,
            predicted_ttft,
            kind,
            labels: Vec::new(),
            id: short(),
            weight: short(),
            waiting: short(),
            running: short(),
            running_limit: short(),
            queued_tokens: short(),
            free_blocks: short(),
            total_blocks: short(),
            cached_tokens: short(),
            health: short().into_iter().map(|n| u8::try_from(n).unwrap_or(u8::MAX)).collect(),
        };
        unpacked.labels = self.labels.iter().map(|name| (Arc::clone(name), long())).collect();
        unpacked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_give_way_and_the_latest_of_an_id_is_found() {
        let traces = Traces::new(2);
        for (n, id) in ["a", "b", "a"].into_iter().enumerate() {
            traces.enter(&id.into(), n as u64, None);
        }
        let remembered: Vec<(String, u64)> = traces.newest().map(|t| (t.id.to_string(), t.arrived)).collect();
        assert_eq!(remembered, [("a".to_owned(), 2), ("b".to_owned(), 1)]);
        assert_eq!(traces.find("a").map(|t| t.arrived), Some(2));
        assert!(Traces::new(0).find("a").is_none());
        Traces::new(0).enter(&"a".into(), 1, None).finished("stop", 2);
    }

    #[test]
    fn columns_are_unpacked_as_they_were() {
        let columns = |n: u32| ReplicaColumns {
            id: (0..n).collect(),
            key: (0..n).map(|i| u64::MAX - u64::from(i)).collect(),
            health: (0..n).map(|i| u8::try_from(i).expect("few")).collect(),
            weight: (1..=n).collect(),
            waiting: (2..2 + n).collect(),
            running: (3..3 + n).collect(),
            running_limit: (4..4 + n).collect(),
            queued_tokens: (5..5 + n).collect(),
            free_blocks: (6..6 + n).collect(),
            total_blocks: (7..7 + n).collect(),
            cached_tokens: (8..8 + n).collect(),
            device: (9..9 + u64::from(n)).collect(),
            variant: (10..10 + u64::from(n)).collect(),
            load: (11..11 + u64::from(n)).collect(),
            errors: (12..12 + u64::from(n)).collect(),
            age: (13..13 + u64::from(n)).collect(),
            predicted_ttft: (14..14 + u64::from(n)).collect(),
            kind: (16..16 + u64::from(n)).collect(),
            labels: vec![("a".into(), (15..15 + u64::from(n)).collect()), ("b".into(), vec![u64::MAX; n as usize])],
        };
        for n in [0, 1, 3] {
            assert_eq!(Packed::of(&columns(n)).columns(), columns(n), "{n} rows");
        }
    }

    #[test]
    fn only_the_first_end_and_the_first_time_count() {
        let trace = Traces::new(1).enter(&"a".into(), 10, None);
        trace.reached(Stage::Admitted, 15);
        trace.reached(Stage::Admitted, 99);
        trace.finished("stop", 30);
        trace.abandoned(40);
        let explained = trace.explain(&Catalog::default());
        assert_eq!((explained.state, explained.finish.as_deref()), (State::Finished, Some("stop")));
        let stages = Stages { admitted: Some(5), ended: Some(20), ..Stages::default() };
        assert_eq!(explained.stages_us, stages);
    }
}
