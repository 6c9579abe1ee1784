//! The one task that works on batches: validates them, answers their lines while the host has room, and ends them.
//!
//! Lines are requests like any other, of the lowest priority and few at a time; none begins while any request waits for a
//! replica, so what batches take is what nobody else wants. Batches take turns, line by line, so that a small one does not wait
//! for a large one. Answers that are ready together are written and synced together. What takes long and is not a line (reading
//! a whole file, ending a batch, sweeping) is a chore beside it: no batch waits while another one's file is read.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pointsman_sched::ids::{Micros, Priority};
use serde_json::Value;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::Desk;
use super::desk::{StoredFile, disk};
use super::job::{Batch, Counts, Cut, Status};
use super::line::{Line, Lines, Raw, answered, check, number_of, unanswered};
use crate::entry::{self, Call, Request};
use crate::error::ApiError;
use crate::keys::Holder;
use crate::state::ServerState;

/// How often to look whether there is room, while lines wait for it.
const LOOK: Duration = Duration::from_millis(20);
/// How often to look at the clock otherwise.
const IDLE: Duration = Duration::from_secs(1);
/// Seconds between two looks for files whose time is over.
const SWEEP_SECONDS: u64 = 60;
/// Lines, and bytes of them, that are read ahead of a batch.
const AHEAD_LINES: usize = 32;
const AHEAD_BYTES: usize = 256 << 10;
/// Times that a line is tried where it, or what it does to the host, may be at fault.
const TRIES: u32 = 3;
/// Pause of a batch after the disk, or the host, refused it.
const PAUSE: Micros = 1_000_000;
/// Longest pause of a batch, whatever a policy says of one of its lines.
const LONGEST_PAUSE: Micros = 60_000_000;
/// Chores at once.
const MAX_CHORES: usize = 2;
/// What is read of one answer after a restart.
const MAX_ANSWER: usize = 64 << 20;

/// Works on batches until it is dropped.
pub(crate) async fn run(state: Arc<ServerState>) {
    let mut runner = Runner::new(state);
    loop {
        runner.refresh().await;
        runner.begin_lines().await;
        runner.wait().await;
    }
}

#[derive(Debug)]
struct Runner {
    state: Arc<ServerState>,
    desk: Arc<Desk>,
    works: BTreeMap<String, Work>,
    /// Whose turn it is.
    turns: VecDeque<String>,
    running: JoinSet<Done>,
    /// Line and batch behind each task.
    lines: HashMap<Id, (String, Arc<Line>)>,
    chores: JoinSet<Chored>,
    /// What chores are about: ids of batches, and a sweep without one.
    busy: HashSet<String>,
    next_sweep: u64,
}

/// What a chore was about, and the batch that is to be worked on.
type Chored = (String, Option<Box<Work>>);

/// A batch that is being worked on.
#[derive(Debug)]
struct Work {
    batch: Batch,
    call: Call,
    reader: Lines,
    /// Whether the reader has come to the end.
    is_read: bool,
    /// Numbers of the lines that have their answer.
    done: HashSet<u32>,
    /// Read and not begun, with how often each was tried.
    ahead: VecDeque<(Arc<Line>, u32)>,
    /// When the next line may begin.
    resumes: Micros,
    counts: Counts,
    /// Bytes of output and errors that are whole lines and synced.
    good: [u64; 2],
    tasks: HashMap<Id, (AbortHandle, u32)>,
}

/// A line that may begin.
#[derive(Debug)]
struct Next {
    id: String,
    line: Arc<Line>,
    tries: u32,
    /// Whose limits it counts against.
    holder: Option<Arc<Holder>>,
}

/// What a line came to.
#[derive(Debug)]
struct Done {
    request_id: Arc<str>,
    answered: Result<Vec<u8>, ApiError>,
}

/// What is to be written of a batch.
#[derive(Debug, Default)]
struct Gathered {
    output: Vec<u8>,
    errors: Vec<u8>,
    /// Numbers of the lines in it, with whether each has an answer.
    numbers: Vec<(Arc<Line>, bool)>,
}

// === impl Runner ===

impl Runner {
    fn new(state: Arc<ServerState>) -> Self {
        let desk = Arc::clone(&state.batches);
        Self {
            state,
            desk,
            works: BTreeMap::new(),
            turns: VecDeque::new(),
            running: JoinSet::new(),
            lines: HashMap::new(),
            chores: JoinSet::new(),
            busy: HashSet::new(),
            next_sweep: 0,
        }
    }

    /// Takes up what has come, and ends what has ended or must.
    async fn refresh(&mut self) {
        let now = self.desk.now();
        if now >= self.next_sweep && self.is_free("") {
            self.next_sweep = now + SWEEP_SECONDS;
            self.chore(String::new(), |desk| {
                desk.sweep();
                Ok(None)
            });
        }
        if self.desk.has_news.swap(false, Ordering::AcqRel) {
            for batch in self.desk.work(Desk::unfinished).await.unwrap_or_default() {
                self.take_up(batch);
            }
        }
        let over: Vec<String> = (self.works.values())
            .filter(|work| work.is_answered() || work.batch.cut().is_some() || work.batch.is_due(now))
            .map(|work| work.batch.id.clone())
            .collect();
        over.iter().for_each(|id| self.finish(id));
    }

    /// Whether a chore about this may begin.
    fn is_free(&self, id: &str) -> bool {
        self.chores.len() < MAX_CHORES && !self.busy.contains(id)
    }

    /// Begins a chore. One that the disk refuses ends after a pause, and is then tried again as the batch is stored.
    fn chore(&mut self, id: String, work: impl FnOnce(&Desk) -> Result<Option<Box<Work>>, ApiError> + Send + 'static) {
        self.busy.insert(id.clone());
        let desk = Arc::clone(&self.desk);
        self.chores.spawn(async move {
            let done = desk.work(work).await.and_then(|done| done);
            if let Err(error) = &done {
                tracing::error!(batch = id, %error, "a batch cannot be worked on; it is tried again");
                tokio::time::sleep(IDLE).await;
            }
            (id, done.ok().flatten())
        });
    }

    /// Goes on with what a chore has made ready, and looks what else there is.
    fn chored(&mut self, (id, work): Chored) {
        self.busy.remove(&id);
        if let Some(work) = work {
            self.turns.push_back(id.clone());
            self.works.insert(id, *work);
        }
        self.desk.has_news.store(true, Ordering::Release);
    }

    /// Validates a batch, or goes on with it; one that is being worked on has changed.
    fn take_up(&mut self, batch: Batch) {
        if let Some(work) = self.works.get_mut(&batch.id) {
            work.batch = Batch { counts: work.counts, ..batch };
        } else if self.is_free(&batch.id) {
            let max_line = self.state.config.max_body_bytes;
            self.chore(batch.id.clone(), move |desk| Work::take_up(desk, batch, max_line));
        }
    }

    /// Begins lines while there is room.
    async fn begin_lines(&mut self) {
        while self.running.len() < self.desk.config.max_in_flight && self.has_room() {
            let Some(Next { id, line, tries, holder }) = self.next_line().await else { return };
            let Some(work) = self.works.get_mut(&id) else { continue };
            let state = Arc::clone(&self.state);
            let body = line.body();
            let streams = body.get("stream").is_some_and(|stream| !matches!(stream, Value::Null | Value::Bool(false)));
            let request =
                Request::new(work.call, body).tenant(&work.batch.tenant).priority(Priority::Low).holder(holder);
            let task = self.running.spawn(async move {
                if streams {
                    let problem = "`stream` must be false in a batch: each answer is one line";
                    return Done { request_id: "".into(), answered: Err(ApiError::invalid("stream", problem)) };
                }
                let (request_id, answered) = entry::answer(&state, request).await;
                Done { request_id, answered }
            });
            work.tasks.insert(task.id(), (task.clone(), tries));
            self.lines.insert(task.id(), (id, line));
        }
    }

    /// Whether a line may begin: nobody waits for a replica, an encoder or a model that might need the room of the line's, and most
    /// of admission is free.
    fn has_room(&self) -> bool {
        let state = &self.state;
        let catalog = state.engine.catalog();
        let waits = |gauge: &std::sync::atomic::AtomicU32| gauge.load(Ordering::Relaxed) > 0;
        // What was on its way to a driver that ended is counted there for ever.
        let replicas = catalog.variants.iter().flat_map(|variant| &variant.replicas);
        let mut replicas = replicas.filter(|replica| !replica.gauges.gone.load(Ordering::Acquire));
        !state.admission.is_draining()
            && state.admission.in_flight() <= state.config.max_requests / 2
            && !waits(&state.embeddings)
            && !waits(&state.waiting_for_models)
            && !replicas.any(|replica| waits(&replica.gauges.waiting) || waits(&replica.gauges.reserved_requests))
    }

    /// The next line of the next batch that has one.
    async fn next_line(&mut self) -> Option<Next> {
        let now = self.state.clock.now();
        if !self.desk.has_room() {
            return None;
        }
        for _ in 0..self.turns.len() {
            let id = self.turns.pop_front()?;
            self.turns.push_back(id.clone());
            let Some(work) = self.works.get_mut(&id).filter(|work| work.may_begin(now)) else { continue };
            let holder = match self.state.keys.holder(&work.batch.tenant, work.batch.key.as_deref()) {
                Ok(holder) if has_share(holder.as_deref(), now) => holder,
                Ok(_) => continue,
                // Its tenant may have another key before the window is over.
                Err(_) => {
                    work.resumes = now + PAUSE;
                    continue;
                }
            };
            while work.ahead.is_empty() && work.read_ahead(&self.desk).await {}
            if work.ahead.is_empty() && !work.is_read {
                work.resumes = now + PAUSE;
            }
            if let Some((line, tries)) = work.ahead.pop_front() {
                return Some(Next { id, line, tries, holder });
            }
        }
        None
    }

    /// Waits until a line has ended, something has changed, or it is time to look again.
    async fn wait(&mut self) {
        let now = self.state.clock.now();
        let is_full = self.running.len() >= self.desk.config.max_in_flight;
        let begins = !is_full && self.works.values().any(|work| work.has_lines() && work.may_begin(now));
        let (has_running, has_chores) = (!self.running.is_empty(), !self.chores.is_empty());
        let desk = Arc::clone(&self.desk);
        tokio::select! {
            Some(ended) = self.running.join_next_with_id(), if has_running => self.gather(ended).await,
            Some(Ok(chored)) = self.chores.join_next(), if has_chores => self.chored(chored),
            () = desk.news.notified() => {}
            () = tokio::time::sleep(if begins { LOOK } else { IDLE }) => {}
        }
    }

    /// Writes the answers that are ready.
    async fn gather(&mut self, first: Result<(Id, Done), JoinError>) {
        let mut gathered: BTreeMap<String, Gathered> = BTreeMap::new();
        let mut next = Some(first);
        while let Some(ended) = next {
            let (task, done) = match ended {
                Ok((task, done)) => (task, Some(done)),
                Err(error) => (error.id(), None),
            };
            if let Some((id, line)) = self.lines.remove(&task)
                && let Some(work) = self.works.get_mut(&id)
            {
                let now = self.state.clock.now();
                work.ended(gathered.entry(id).or_default(), (task, line), done, now);
            }
            next = self.running.try_join_next_with_id();
        }
        for (id, gathered) in gathered {
            if let Some(work) = self.works.get_mut(&id) {
                work.record(&self.desk, gathered, self.state.clock.now()).await;
            }
        }
    }

    /// Ends a batch: what runs of it is cancelled, lines without an answer are told so, its files are kept.
    fn finish(&mut self, id: &str) {
        if !self.is_free(id) {
            return;
        }
        let Some(mut work) = self.works.remove(id) else { return };
        self.turns.retain(|turn| turn != id);
        for (task, (handle, _)) in work.tasks.drain() {
            handle.abort();
            self.lines.remove(&task);
        }
        let max_line = self.state.config.max_body_bytes;
        self.chore(id.to_owned(), move |desk| work.finish(desk, max_line).map(|()| None));
    }
}

// === impl Work ===

impl Work {
    /// Validates a batch, or reads how far it came in an earlier life. Blocks. None for one that has ended meanwhile.
    fn take_up(desk: &Desk, mut batch: Batch, max_line: usize) -> Result<Option<Box<Self>>, ApiError> {
        let call = Call::ALL.into_iter().find(|call| call.path() == batch.endpoint).ok_or(ApiError::Internal)?;
        if batch.status == Status::Validating && !batch.is_due(desk.now()) {
            let lines = Lines::new(&desk.shelf, &batch.input, max_line);
            let checked = check(lines, &batch.endpoint, desk.config.max_lines);
            let checked = checked.map_err(|error| disk("a file of requests cannot be read", &error))?;
            let now = desk.now();
            (batch, ()) = desk.change(&batch.id, |batch| batch.validated(checked, now))?;
        }
        if batch.status.is_over() {
            return Ok(None);
        }
        let mut done = HashSet::new();
        let (completed, output) = read_done(desk, &batch.output, &mut done)?;
        let (failed, errors) = read_done(desk, &batch.errors, &mut done)?;
        let counts = Counts { total: batch.counts.total, completed, failed };
        desk.recount(&batch.id, counts);
        batch.counts = counts;
        let reader = Lines::new(&desk.shelf, &batch.input, max_line);
        Ok(Some(Box::new(Self {
            batch,
            call,
            reader,
            is_read: false,
            done,
            ahead: VecDeque::new(),
            resumes: 0,
            counts,
            good: [output, errors],
            tasks: HashMap::new(),
        })))
    }

    fn has_lines(&self) -> bool {
        !self.ahead.is_empty() || !self.is_read
    }

    fn may_begin(&self, now: Micros) -> bool {
        self.batch.status == Status::InProgress && self.resumes <= now && self.has_lines()
    }

    /// Whether every line has its answer.
    fn is_answered(&self) -> bool {
        let finalizes = self.batch.status == Status::Finalizing;
        finalizes || (self.batch.status == Status::InProgress && !self.has_lines() && self.tasks.is_empty())
    }

    /// Reads the next lines, and keeps those that have no answer; false where there are none, or the file cannot be read now.
    async fn read_ahead(&mut self, desk: &Arc<Desk>) -> bool {
        if self.is_read {
            return false;
        }
        // A copy: one that fails, or panics, half-way through a line leaves ours where it is.
        let (mut reader, endpoint) = (self.reader.clone(), self.batch.endpoint.clone());
        let read = desk.work(move |_| {
            let (mut lines, mut bytes) = (Vec::new(), 0);
            while lines.len() < AHEAD_LINES && bytes < AHEAD_BYTES {
                let next = reader.next().map_err(|error| disk("a file of requests cannot be read", &error))?;
                let Some(raw) = next else { return Ok((reader, lines, true)) };
                bytes += raw.text.len();
                // It was validated: what is no request now has been changed under us, and is not answered.
                lines.extend(raw.parse(&endpoint));
            }
            Ok::<_, ApiError>((reader, lines, false))
        });
        let Ok((reader, lines, is_read)) = read.await.and_then(|read| read) else { return false };
        (self.reader, self.is_read) = (reader, is_read);
        let done = &self.done;
        let open = lines.into_iter().filter(|line| !done.contains(&line.number));
        self.ahead.extend(open.map(|line| (Arc::new(line), 0)));
        true
    }

    /// Puts what a line came to where it belongs: its answer, the fault that it is, or another try.
    fn ended(&mut self, out: &mut Gathered, (task, line): (Id, Arc<Line>), done: Option<Done>, now: Micros) {
        let tries = self.tasks.remove(&task).map_or(0, |(_, tries)| tries) + 1;
        let (request_id, answered_with) = match done {
            Some(done) => (done.request_id, done.answered),
            None => ("".into(), Err(ApiError::Internal)),
        };
        match answered_with {
            Ok(body) => {
                out.output.extend(answered(&self.batch.id, &line, (&request_id, 200), &body));
                out.numbers.push((line, true));
            }
            Err(error) if again(&error, tries) => {
                self.resumes = now + (Micros::from(error.retry_after_ms()) * 1_000).min(LONGEST_PAUSE);
                self.ahead.push_back((line, tries));
            }
            Err(error) => {
                let status = error.status().as_u16();
                out.errors.extend(answered(&self.batch.id, &line, (&request_id, status), error.json().as_bytes()));
                out.numbers.push((line, false));
            }
        }
    }

    /// Writes what was gathered. Where the disk refuses, the lines are computed again later.
    async fn record(&mut self, desk: &Arc<Desk>, gathered: Gathered, now: Micros) {
        let Gathered { output, errors, numbers } = gathered;
        let (answers, faults): (Vec<_>, Vec<_>) = numbers.into_iter().partition(|(_, is_answer)| *is_answer);
        let Batch { id, output: output_id, errors: errors_id, .. } = &self.batch;
        let parts = [(output_id.clone(), output, answers), (errors_id.clone(), errors, faults)];
        for ((file, text, lines), good) in parts.into_iter().zip(&mut self.good) {
            let mut counts = self.counts;
            for (_, is_answer) in &lines {
                *(if *is_answer { &mut counts.completed } else { &mut counts.failed }) += 1;
            }
            let (id, before) = (id.clone(), *good);
            let recorded = desk.work(move |desk| desk.record(&id, (&file, before), &text, counts)).await;
            let Ok(after) = recorded.and_then(|recorded| recorded) else {
                self.resumes = now + PAUSE;
                self.ahead.extend(lines.into_iter().map(|(line, _)| (line, 0)));
                continue;
            };
            (*good, self.counts) = (after, counts);
            self.done.extend(lines.iter().map(|(line, _)| line.number));
        }
    }

    /// Writes what is left to write and ends the batch. Blocks; where it fails, doing it again goes on from there.
    fn finish(mut self, desk: &Desk, max_line: usize) -> Result<(), ApiError> {
        let now = desk.now();
        for (id, good) in [&self.batch.output, &self.batch.errors].into_iter().zip(self.good) {
            desk.trim(id, good)?;
        }
        let counts = self.counts;
        let finalize = |batch: &mut Batch| {
            batch.counts = counts;
            batch.finalize(now);
        };
        (self.batch, ()) = desk.change(&self.batch.id, finalize)?;
        if let Some(cut) = self.batch.cut().filter(|_| self.batch.counts.total > 0) {
            self.cut(desk, cut, max_line)?;
        }
        let Batch { tenant, output, errors, .. } = self.batch.clone();
        let mut kept = [false; 2];
        for ((kept, bytes), (id, what)) in kept.iter_mut().zip(self.good).zip([(output, "output"), (errors, "error")]) {
            if bytes > 0 {
                let filename = format!("{}_{what}.jsonl", self.batch.id);
                let (created_at, expires_at) = (now, now + desk.config.retention_seconds);
                let (tenant, purpose) = (tenant.clone(), "batch_output".to_owned());
                desk.keep(StoredFile { id, tenant, filename, purpose, bytes, created_at, expires_at })?;
                *kept = true;
            }
        }
        let counts = self.counts;
        desk.change(&self.batch.id, |batch| {
            [batch.has_output, batch.has_errors] = kept;
            batch.end(counts, now);
        })?;
        Ok(())
    }

    /// Tells every line without an answer why it gets none.
    fn cut(&mut self, desk: &Desk, cut: Cut, max_line: usize) -> Result<(), ApiError> {
        let mut lines = Lines::new(&desk.shelf, &self.batch.input, max_line);
        let mut text = Vec::new();
        let mut told = Vec::new();
        loop {
            let raw = lines.next().map_err(|error| disk("a file of requests cannot be read", &error))?;
            if text.len() >= AHEAD_BYTES || (raw.is_none() && !text.is_empty()) {
                let mut counts = self.counts;
                counts.failed += u32::try_from(told.len()).unwrap_or(u32::MAX);
                self.good[1] = desk.record(&self.batch.id, (&self.batch.errors, self.good[1]), &text, counts)?;
                self.counts = counts;
                self.done.extend(told.drain(..));
                text.clear();
            }
            let Some(raw) = raw else { return Ok(()) };
            if !self.done.contains(&raw.number)
                && let Ok(line) = raw.parse(&self.batch.endpoint)
            {
                text.extend(unanswered(&self.batch, &line, cut));
                told.push(raw.number);
            }
        }
    }
}

/// Whether a line that failed is tried again: always where the host, or a quota, is full; a few times where a retry may help, as
/// where its model could not be loaded.
fn again(error: &ApiError, tries: u32) -> bool {
    let waits = matches!(error.status().as_u16(), 429 | 503) && !matches!(error, ApiError::NotLoaded { .. });
    error.retryable() && (waits || tries < TRIES)
}

/// Whether half of what a key may use is free: what runs beneath everything else leaves the other half to its tenant's own requests.
fn has_share(holder: Option<&Holder>, now: Micros) -> bool {
    holder.is_none_or(|holder| holder.is_half_free(now))
}

/// Marks the lines that a file of answers answers, and cuts off what a crash has left behind them: it was never sure to last,
/// and need not be whole. How many there are, and their bytes.
fn read_done(desk: &Desk, id: &str, done: &mut HashSet<u32>) -> Result<(u32, u64), ApiError> {
    let fault = |error: io::Error| disk("answers of a batch cannot be read", &error);
    let mut lines = Lines::new(&desk.shelf, id, MAX_ANSWER);
    let (mut found, mut good) = (0, 0);
    while let Some(raw) = lines.next().map_err(fault)?
        && let (Some(number), Raw { end: Some(end), .. }) = (number_of(&raw), &raw)
    {
        done.insert(number);
        (found, good) = (found + 1, *end);
    }
    desk.trim(id, good)?;
    Ok((found, good))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_whose_model_cannot_be_loaded_ends_and_one_that_finds_the_host_full_waits() {
        let not_loaded = || ApiError::NotLoaded { model: "m".into(), why: "x".into(), retry_after_ms: 1_000 };
        for (error, tries, expect) in [
            (ApiError::Draining, TRIES, true),
            (not_loaded(), 0, true),
            (not_loaded(), TRIES, false),
            (ApiError::Internal, 0, false),
        ] {
            assert_eq!(again(&error, tries), expect, "{error} after {tries}");
        }
    }
}
