//! The encoders' driver: one OS thread that owns every model for embeddings and gathers texts into batches.
//!
//! A thread and a compute pool of its own, beside the device drivers', so that a batch of texts takes turns with a step of a
//! generation instead of holding it up. A batch takes an input of each waiting request in turn: one text does not wait
//! behind a request of a thousand. An idle encoder may wait a little for more texts; under load batches fill by themselves.
//!
//! Models join and leave by messages in the same mailbox, taken between two batches. The thread is there also where no model is:
//! it waits in its mailbox and costs nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pointsman_engine::ComputePool;
use pointsman_sched::execute::ExecuteError;
use pointsman_sched::ids::Micros;
use pointsman_sched::request::Failure;
use pointsman_sched::scheduler::Stage;
use pointsman_server::ports::{EmbedJob, Embedded, SubmitError};
use pointsman_telemetry::{EncoderMetrics, Metrics};

use crate::clock::SystemClock;

/// What computes batches: the engine's encoder, or a test's.
pub(crate) trait Encode: Send {
    /// Tokens that a batch may have: at least those of the longest input.
    fn batch_tokens(&self) -> usize;

    /// One vector for each input.
    fn encode(&mut self, batch: &[&[u32]]) -> Result<Vec<Vec<f32>>, ExecuteError>;
}

/// A model, before the driver takes it.
pub(crate) struct NamedEncoder {
    /// What jobs call it.
    pub name: Arc<str>,
    /// Computes.
    pub encoder: Box<dyn Encode>,
}

/// What the driver shares with the host.
#[derive(Clone, Debug)]
pub(crate) struct EncoderTerms {
    /// The clock.
    pub clock: Arc<SystemClock>,
    /// Metric families.
    pub metrics: Arc<Metrics>,
    /// How long an idle encoder waits for more inputs.
    pub window: Duration,
    /// Jobs that may wait in the mailbox, and as many behind it.
    pub mailbox: usize,
}

/// Threads that compute for all encoders: their batches take turns, so they need one pool. Started for the first of them.
#[derive(Debug, Default)]
pub(crate) struct EncoderPool(Mutex<Option<ComputePool>>);

/// An encoder that has left, to be dropped by whoever asked for that; with how many jobs were ended for it.
pub(crate) struct GoneEncoder {
    pub encoder: Box<dyn Encode>,
    pub ended: u64,
}

/// What the driver's mailbox holds.
enum Message {
    Job(EmbedJob),
    Join(NamedEncoder),
    Leave(Leaving),
    /// Ends a wait.
    Wake,
}

/// A model that is to go.
struct Leaving {
    name: Arc<str>,
    /// When its jobs must have ended.
    end: Micros,
    gone: Sender<GoneEncoder>,
}

/// The sending side of a running driver.
#[derive(Debug)]
pub(crate) struct EncodersHandle {
    jobs: SyncSender<Message>,
    stop: Arc<AtomicBool>,
    join: Mutex<Option<JoinHandle<()>>>,
}

struct Driver {
    encoders: Vec<Served>,
    leaving: Vec<Leaving>,
    jobs: Receiver<Message>,
    stop: Arc<AtomicBool>,
    terms: EncoderTerms,
}

/// A model with what waits for it.
struct Served {
    name: Arc<str>,
    encoder: Box<dyn Encode>,
    queue: VecDeque<Pending>,
    metrics: EncoderMetrics,
}

/// A job with what has been computed of it.
struct Pending {
    job: EmbedJob,
    /// Of the first inputs, in their order.
    vectors: Vec<Vec<f32>>,
    /// Inputs behind them that are in the batch.
    taken: usize,
    /// From arrival to the first batch.
    queued_us: Option<Micros>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Job(_) => "Job",
            Self::Join(_) => "Join",
            Self::Leave(_) => "Leave",
            Self::Wake => "Wake",
        })
    }
}

// === impl EncoderPool ===

impl EncoderPool {
    /// Its threads have the priority of the thread that is the first to ask.
    ///
    /// # Errors
    /// The system refuses to start them.
    pub(crate) fn get(&self, n_threads: usize) -> anyhow::Result<ComputePool> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*pool {
            Some(pool) => Ok(pool.clone()),
            None => Ok(pool.insert(ComputePool::start(n_threads)?).clone()),
        }
    }
}

// === impl EncodersHandle ===

impl EncodersHandle {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(encoders: Vec<NamedEncoder>, terms: EncoderTerms) -> std::io::Result<Self> {
        let (sender, jobs) = sync_channel(terms.mailbox.max(1));
        let stop = Arc::new(AtomicBool::new(false));
        let encoders = encoders.into_iter().map(|named| Served::new(named, &terms)).collect();
        let mut driver = Driver { encoders, leaving: Vec::new(), jobs, stop: Arc::clone(&stop), terms };
        let join = std::thread::Builder::new().name("encoders".into()).spawn(move || driver.run())?;
        Ok(Self { jobs: sender, stop, join: Mutex::new(Some(join)) })
    }

    /// Puts a job into the mailbox. Never blocks.
    ///
    /// # Errors
    /// The mailbox is full or the thread has ended.
    pub(crate) fn submit(&self, job: EmbedJob) -> Result<(), SubmitError> {
        self.jobs.try_send(Message::Job(job)).map_err(|error| match error {
            TrySendError::Full(_) => SubmitError::Full,
            TrySendError::Disconnected(_) => SubmitError::Stopped,
        })
    }

    /// Serves one more model. Waits for a place in the mailbox.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn join(&self, encoder: NamedEncoder) -> anyhow::Result<()> {
        self.jobs.send(Message::Join(encoder)).map_err(|_| anyhow::anyhow!("the encoders' thread has ended"))
    }

    /// Has a model given back once its jobs have ended, or when it is time; nothing where it is not served. Waits for that.
    pub(crate) fn leave(&self, name: &Arc<str>, end: Micros) -> Option<GoneEncoder> {
        let (gone, coming) = channel();
        self.jobs.send(Message::Leave(Leaving { name: Arc::clone(name), end, gone })).ok()?;
        coming.recv().ok()
    }

    /// Whether the thread still runs; a panic ends it.
    pub(crate) fn is_alive(&self) -> bool {
        let join = self.join.lock().unwrap_or_else(PoisonError::into_inner);
        join.as_ref().is_some_and(|join| !join.is_finished())
    }

    /// Drops what waits and waits for the thread.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // A full mailbox wakes it as well.
        let _ = self.jobs.try_send(Message::Wake);
        let join = self.join.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(join) = join
            && join.join().is_err()
        {
            tracing::error!("the encoders' thread ended in a panic; its requests were lost");
        }
    }
}

impl Drop for EncodersHandle {
    /// A start that failed leaves no thread behind that goes on with the weights; who wants to wait for it stops it.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A full mailbox wakes it as well.
        let _ = self.jobs.try_send(Message::Wake);
    }
}

// === impl Driver ===

impl Driver {
    fn run(&mut self) {
        while self.collect() {
            for index in 0..self.encoders.len() {
                self.step(index);
            }
        }
    }

    /// Takes what the mailbox holds; waits for a job when there is none. False when it is time to stop.
    fn collect(&mut self) -> bool {
        // Before a wait: who leaves may have been kept by a job that has just ended.
        self.let_go();
        if self.encoders.iter().all(|served| served.queue.is_empty()) {
            let Ok(message) = self.jobs.recv() else { return false };
            self.accept(message);
            if self.waiting() > 0 {
                self.gather();
            }
        }
        while self.waiting() < self.terms.mailbox.max(1) {
            let Ok(message) = self.jobs.try_recv() else { break };
            self.accept(message);
        }
        self.let_go();
        !self.stop.load(Ordering::Acquire)
    }

    /// Waits for more inputs, until the window has passed or a batch is full.
    fn gather(&mut self) {
        let end = self.terms.clock.micros().saturating_add(self.terms.window.as_micros() as Micros);
        while !self.stop.load(Ordering::Acquire) && self.encoders.iter().all(|served| !served.is_full()) {
            let left = end.saturating_sub(self.terms.clock.micros());
            if left == 0 {
                return;
            }
            match self.jobs.recv_timeout(Duration::from_micros(left)) {
                Ok(message) => self.accept(message),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn accept(&mut self, message: Message) {
        let job = match message {
            Message::Job(job) => job,
            Message::Join(named) => return self.encoders.push(Served::new(named, &self.terms)),
            Message::Leave(leaving) => return self.leaving.push(leaving),
            Message::Wake => return,
        };
        match self.encoders.iter_mut().find(|served| served.name == job.encoder) {
            Some(served) => served.queue.push_back(Pending { job, vectors: Vec::new(), taken: 0, queued_us: None }),
            // Its model has gone since: whoever asked hears of a driver that serves no more.
            None => tracing::debug!("a job for `{}`, which is not served, was dropped", job.encoder),
        }
    }

    /// Gives back the models that are to go and have nothing to do, or no more time for it.
    fn let_go(&mut self) {
        let Self { encoders, leaving, terms, .. } = self;
        leaving.retain(|leaving| {
            let Some(at) = encoders.iter().position(|served| served.name == leaving.name) else { return false };
            let is_over = encoders[at].queue.is_empty() || terms.clock.micros() >= leaving.end;
            if is_over {
                let Served { encoder, queue, .. } = encoders.remove(at);
                // Whoever asked may have gone.
                let _ = leaving.gone.send(GoneEncoder { encoder, ended: queue.len() as u64 });
            }
            !is_over
        });
    }

    fn waiting(&self) -> usize {
        self.encoders.iter().map(|served| served.queue.len()).sum()
    }

    /// One batch of one model.
    fn step(&mut self, index: usize) {
        let (served, terms) = (&mut self.encoders[index], &self.terms);
        let start = terms.clock.micros();
        served.drop_the_dead(start, &terms.metrics);
        let mut batch = served.take();
        served.metrics.waiting.set(count(served.queue.len()));
        served.metrics.running.set(count(batch.len()));
        if batch.is_empty() {
            return;
        }
        for pending in &mut batch {
            pending.queued_us.get_or_insert(start.saturating_sub(pending.job.arrived));
        }
        let inputs: Vec<&[u32]> = batch.iter().flat_map(Pending::inputs).collect();
        let tokens = inputs.iter().map(|tokens| tokens.len() as u64).sum();
        let encoded = served.encoder.encode(&inputs);
        served.metrics.step.observe(terms.clock.micros().saturating_sub(start) as f64 * 1e-6);
        match encoded {
            Ok(vectors) => {
                served.metrics.tokens.inc_by(tokens);
                served.metrics.prompt_tokens.inc_by(tokens);
                served.give_back(batch, vectors);
            }
            Err(error) => {
                tracing::error!("a batch of `{}` failed: {error}", served.name);
                // Whoever asked may have gone.
                batch
                    .into_iter()
                    .for_each(|one| drop(one.job.reply.send(Err(Failure::Engine(error.to_string().into())))));
            }
        }
        served.metrics.running.set(0);
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

// === impl Served ===

impl Served {
    fn new(NamedEncoder { name, encoder }: NamedEncoder, terms: &EncoderTerms) -> Self {
        Self { metrics: terms.metrics.encoder(&name, "cpu"), queue: VecDeque::new(), name, encoder }
    }

    /// Whether what waits fills a batch.
    fn is_full(&self) -> bool {
        let inputs = self.queue.iter().flat_map(|pending| &pending.job.inputs);
        inputs.map(Vec::len).sum::<usize>() >= self.encoder.batch_tokens()
    }

    /// Forgets jobs that nobody waits for.
    fn drop_the_dead(&mut self, now: Micros, metrics: &Metrics) {
        self.queue.retain(|pending| {
            let dead = pending.job.reply.is_closed() || pending.job.deadline <= now;
            if dead {
                let stage = if pending.queued_us.is_some() { Stage::Prefilling } else { Stage::Queued };
                metrics.cancelled(stage.name());
            }
            !dead
        });
    }

    /// Jobs of the next batch, each with how many of its inputs are in it: one of each in turn, as long as they fit.
    fn take(&mut self) -> Vec<Pending> {
        let mut room = self.encoder.batch_tokens();
        let mut batch: Vec<Pending> = Vec::new();
        while let Some(mut pending) = self.queue.pop_front_if(|pending| pending.next() <= room) {
            room -= pending.next();
            pending.taken = 1;
            batch.push(pending);
        }
        let mut before = 0;
        while before != room {
            before = room;
            for pending in &mut batch {
                let next = pending.next();
                if (1..=room).contains(&next) {
                    room -= next;
                    pending.taken += 1;
                }
            }
        }
        batch
    }

    /// Answers the jobs that are complete and puts the others behind those that wait.
    fn give_back(&mut self, batch: Vec<Pending>, vectors: Vec<Vec<f32>>) {
        let mut vectors = vectors.into_iter();
        for mut pending in batch {
            pending.vectors.extend(vectors.by_ref().take(std::mem::take(&mut pending.taken)));
            if pending.vectors.len() < pending.job.inputs.len() {
                self.queue.push_back(pending);
                continue;
            }
            let Pending { job, vectors, queued_us, .. } = pending;
            // Whoever asked may have gone.
            drop(job.reply.send(Ok(Embedded { vectors, queued_us: queued_us.unwrap_or(0) })));
        }
    }
}

// === impl Pending ===

impl Pending {
    /// Inputs that are in the batch.
    fn inputs(&self) -> impl Iterator<Item = &[u32]> {
        self.job.inputs.iter().skip(self.vectors.len()).take(self.taken).map(Vec::as_slice)
    }

    /// Tokens of the first input that is in no batch yet; 0 where there is none.
    fn next(&self) -> usize {
        self.job.inputs.get(self.vectors.len() + self.taken).map_or(0, Vec::len)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// Notes the lengths of each batch. A vector is the first token; the token 9 fails its batch.
    struct Fake {
        batches: Batches,
    }

    impl Encode for Fake {
        fn batch_tokens(&self) -> usize {
            10
        }

        fn encode(&mut self, batch: &[&[u32]]) -> Result<Vec<Vec<f32>>, ExecuteError> {
            let lengths = batch.iter().map(|tokens| tokens.len()).collect();
            self.batches.lock().expect("unpoisoned").push(lengths);
            match batch.iter().any(|tokens| tokens[0] == 9) {
                true => Err(ExecuteError::Malformed { what: "as asked" }),
                false => Ok(batch.iter().map(|tokens| vec![tokens[0] as f32]).collect()),
            }
        }
    }

    /// Lengths of the inputs of each batch.
    type Batches = Arc<Mutex<Vec<Vec<usize>>>>;
    type Reply = oneshot::Receiver<Result<Embedded, Failure>>;

    fn job(inputs: &[(u32, usize)]) -> (EmbedJob, Reply) {
        let (reply, replied) = oneshot::channel();
        let inputs = inputs.iter().map(|&(token, n)| vec![token; n]).collect();
        (EmbedJob { encoder: "e".into(), inputs, arrived: 0, deadline: Micros::MAX, reply }, replied)
    }

    /// A driver without a thread, with this in its mailbox.
    fn driver(jobs: Vec<EmbedJob>) -> (Driver, Batches, SyncSender<Message>) {
        let batches = Batches::default();
        let metrics = Arc::new(Metrics::new());
        let served = Served {
            name: "e".into(),
            encoder: Box::new(Fake { batches: Arc::clone(&batches) }),
            queue: VecDeque::new(),
            metrics: metrics.encoder("e", "cpu"),
        };
        let (sender, receiver) = sync_channel(16);
        jobs.into_iter().for_each(|job| sender.try_send(Message::Job(job)).expect("room"));
        let terms =
            EncoderTerms { clock: Arc::new(SystemClock::start()), metrics, window: Duration::ZERO, mailbox: 16 };
        let (encoders, leaving) = (vec![served], Vec::new());
        (Driver { encoders, leaving, jobs: receiver, stop: Arc::default(), terms }, batches, sender)
    }

    fn vectors(mut replied: Reply) -> Vec<f32> {
        replied.try_recv().expect("answered").expect("good").vectors.concat()
    }

    #[test]
    fn batches_take_turns_and_answers_keep_their_order() {
        let (large, large_reply) = job(&[(1, 4), (2, 4), (3, 4), (4, 4), (5, 1)]);
        let (small, small_reply) = job(&[(6, 3)]);
        let (wide, wide_reply) = job(&[(7, 10)]);
        let (mut driver, batches, _sender) = driver(vec![large, small, wide]);
        for _ in 0..4 {
            assert!(driver.collect());
            driver.step(0);
        }
        // The small one shares the first batch; then the wide one is served before the rest of the large one.
        assert_eq!(*batches.lock().expect("unpoisoned"), [vec![4, 3], vec![10], vec![4, 4], vec![4, 1]]);
        assert_eq!(vectors(large_reply), [1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!((vectors(small_reply), vectors(wide_reply)), (vec![6.0], vec![7.0]));
        let text = driver.terms.metrics.render();
        for line in [
            r#"vllm:prompt_tokens_total{model_name="e"} 30"#,
            r#"vllm:num_requests_running{engine="cpu",model_name="e"} 0"#,
            r#"pointsman_tokens_total{device="cpu",phase="embed",variant="e"} 30"#,
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }

    #[test]
    fn jobs_that_nobody_waits_for_are_forgotten() {
        let (gone, reply) = job(&[(1, 1)]);
        drop(reply);
        let (mut late, late_reply) = job(&[(2, 1)]);
        late.deadline = 0;
        let (good, good_reply) = job(&[(3, 1)]);
        let (mut driver, batches, _sender) = driver(vec![gone, late, good]);
        assert!(driver.collect());
        driver.step(0);
        assert_eq!(*batches.lock().expect("unpoisoned"), [[1]]);
        assert_eq!(vectors(good_reply), [3.0]);
        assert!(late_reply.blocking_recv().is_err());
        assert!(driver.terms.metrics.render().contains(r#"pointsman_cancelled_total{stage="queued"} 2"#));
    }

    #[test]
    fn a_model_joins_and_leaves_when_its_jobs_have_ended_or_its_time() {
        // Until when its job may take; how many are ended, and whether that job is answered.
        for (end, ended, is_answered) in [(Micros::MAX, 0, true), (0, 1, false)] {
            let (own, reply) = job(&[(1, 1)]);
            let (mut driver, batches, sender) = driver(Vec::new());
            let encoder = Box::new(Fake { batches: Arc::clone(&batches) });
            sender.try_send(Message::Join(NamedEncoder { name: "f".into(), encoder })).expect("room");
            sender.try_send(Message::Job(EmbedJob { encoder: "f".into(), ..own })).expect("room");
            let (gone, coming) = channel();
            sender.try_send(Message::Leave(Leaving { name: "f".into(), end, gone })).expect("room");
            let thread = std::thread::spawn(move || {
                driver.run();
                driver
            });
            let gone = coming.recv_timeout(Duration::from_secs(20)).expect("it leaves without another message");
            assert_eq!((gone.ended, reply.blocking_recv().is_ok()), (ended, is_answered));
            let (late, late_reply) = job(&[(1, 1)]);
            sender.try_send(Message::Job(EmbedJob { encoder: "f".into(), ..late })).expect("room");
            drop(sender);
            let driver = thread.join().expect("it ends with its mailbox");
            assert_eq!((driver.encoders.len(), driver.leaving.len()), (1, 0));
            assert!(late_reply.blocking_recv().is_err(), "nobody serves it any more");
        }
    }

    #[test]
    fn a_fault_fails_its_batch_alone() {
        let (bad, mut bad_reply) = job(&[(9, 6)]);
        let (good, good_reply) = job(&[(1, 6)]);
        let (mut driver, _, _sender) = driver(vec![bad, good]);
        for _ in 0..2 {
            assert!(driver.collect());
            driver.step(0);
        }
        assert!(matches!(bad_reply.try_recv().expect("answered"), Err(Failure::Engine(_))));
        assert_eq!(vectors(good_reply), [1.0]);
    }

    #[test]
    fn a_window_gathers_until_a_batch_is_full() {
        let (first, first_reply) = job(&[(1, 6)]);
        let (second, second_reply) = job(&[(2, 4)]);
        let (third, _third_reply) = job(&[(3, 1)]);
        let (mut driver, batches, _sender) = driver(vec![first, second, third]);
        // Longer than any test runs: only a full batch ends it.
        driver.terms.window = Duration::from_secs(3_600);
        assert!(driver.collect());
        driver.step(0);
        assert_eq!(*batches.lock().expect("unpoisoned"), [[6, 4]]);
        assert_eq!((vectors(first_reply), vectors(second_reply)), (vec![1.0], vec![2.0]));
    }

    #[test]
    fn a_stop_ends_the_thread_and_what_waits() {
        let batches = Batches::default();
        let terms = EncoderTerms {
            clock: Arc::new(SystemClock::start()),
            metrics: Arc::new(Metrics::new()),
            window: Duration::from_secs(3_600),
            mailbox: 4,
        };
        let encoder = NamedEncoder { name: "e".into(), encoder: Box::new(Fake { batches: Arc::clone(&batches) }) };
        let handle = EncodersHandle::start(vec![encoder], terms).expect("a thread");
        let (waits, reply) = job(&[(1, 1)]);
        handle.submit(waits).expect("room");
        handle.stop();
        assert!(reply.blocking_recv().is_err() && !handle.is_alive());
        assert_eq!(handle.submit(job(&[(1, 1)]).0), Err(SubmitError::Stopped));
        assert!(batches.lock().expect("unpoisoned").is_empty());
    }
}
