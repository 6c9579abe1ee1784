//! The device driver: one OS thread per device that owns its replicas, each a Scheduler, an Executor and a scheduler guest.
//!
//! No locks: requests come through a bounded mailbox, cancels through a second one (so that a full mailbox never holds up
//! a cancel), results leave through each request's sink. Replicas come and go through a third one: a driver takes a finished one
//! in and gives an idle one back whole, so that neither packing nor freeing memory ever takes a step's time. The thread parks
//! when every replica is idle or waits for the masks of its requests; senders and masks unpark it. Not a tokio task: a step
//! computes for milliseconds and would stall the HTTP workers.
//!
//! Where a device computes on its own, the next step is begun shortly before the end of the one that computes, if nothing is to be
//! decided in it: so the device does not wait for tokens to be handed out. Until then requests are taken.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use pointsman_sched::batch::BatchPolicy;
use pointsman_sched::draft::model::DraftCounters;
use pointsman_sched::execute::{ExecuteError, Executor, PoolSize, StepOutput};
use pointsman_sched::ids::{Micros, ReplicaId, RequestId};
use pointsman_sched::observe::Observer;
use pointsman_sched::predict::StepSize;
use pointsman_sched::publish::ReplicaGauges;
use pointsman_sched::request::{CancelCause, Failure, Request, SinkEvent};
use pointsman_sched::retention::RetentionPolicy;
use pointsman_sched::sampler::{Desk, SamplerWorker, Started};
use pointsman_sched::scheduler::{Counters, Scheduler, Stage};
use pointsman_server::ports::SubmitError;
use pointsman_telemetry::{DraftMetrics, Event, EventKind, Metrics, Recorder, ReplicaMetrics};

use crate::clock::SystemClock;
use crate::pace::{Pace, size_of};

/// How long an idle driver sleeps at most; it is woken earlier by any message.
const IDLE: Duration = Duration::from_millis(100);
/// ... and at least, so that a deadline that is due already does not make it spin.
const SHORTEST_IDLE: Duration = Duration::from_micros(200);

/// How long before the end of a step the one behind it is begun: a share of the step, and at least so many microseconds.
const NOTICE_SHARE: Micros = 4;
const LEAST_NOTICE: Micros = 300;

/// A replica as its driver owns it.
pub(crate) struct DriverReplica {
    /// Its id in the catalog.
    pub id: ReplicaId,
    /// What to compute next.
    pub scheduler: Scheduler,
    /// Computes it.
    pub executor: Box<dyn Executor>,
    /// Orders it: the scheduler slot's guest, or the native policy.
    pub policy: Box<dyn BatchPolicy>,
    /// Says what its prefix cache gives up first.
    pub retention: Box<dyn RetentionPolicy>,
    /// Hands tokens to the sampler policy and its edits to the executor.
    pub sampler: Desk<Box<dyn SamplerWorker>>,
    /// Shared with the dispatcher.
    pub gauges: Arc<ReplicaGauges>,
    /// Resolved metric handles.
    pub metrics: ReplicaMetrics,
    /// Number of the variant's name in the event stream.
    pub variant: u32,
    /// How it does.
    pub pace: Pace,
    /// Steps that are begun and not finished; a second one only where the executor computes in halves.
    pub begun: VecDeque<Begun>,
}

/// A step that is begun and not finished.
#[derive(Debug)]
pub(crate) struct Begun {
    /// When the device, or planning it, came to it, and when its plan was made.
    start: Micros,
    scheduled: Micros,
    /// What the host took to plan and to begin it.
    host: Micros,
    size: StepSize,
    /// Of beginning it, or of all of it where it was computed whole.
    outcome: Result<(), ExecuteError>,
}

/// What every driver shares with the host.
#[derive(Clone, Debug)]
pub(crate) struct DriverContext {
    /// The clock.
    pub clock: Arc<SystemClock>,
    /// Where events go.
    pub recorder: Recorder,
    /// Metric families.
    pub metrics: Arc<Metrics>,
    /// A device that computes on its own hangs when it takes so long for a step.
    pub longest_step: Micros,
}

/// How long somebody waits for a pool or a cache to change, which is done between two steps: one that computes for longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Replicas that may come and go at once; who sends one more waits.
const MAX_CHANGES: usize = 16;

/// A replica that comes or goes.
enum Change {
    /// Is served from now on; the answer says so.
    Join(Box<DriverReplica>, SyncSender<()>),
    /// Comes back when its last request has ended.
    Leave(ReplicaId, SyncSender<Gone>),
    /// Comes back now; what it runs is ended.
    End(ReplicaId),
    /// Forgets its prefixes; the answer is how many blocks held one.
    ClearCache(ReplicaId, SyncSender<u32>),
    /// Has a pool of so many blocks once no step is begun; the answer is what it has then, if its device can do that.
    Resize(Resize),
}

/// A pool that is to have another size.
#[derive(Debug)]
struct Resize {
    replica: ReplicaId,
    n_blocks: u32,
    resized: SyncSender<Option<PoolSize>>,
}

/// A replica that its driver has given back.
#[derive(Debug)]
pub(crate) struct Gone {
    /// To be dropped by somebody who has the time.
    pub replica: Box<DriverReplica>,
    /// Requests that were ended for it.
    pub ended: u64,
}

/// The driver's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device serves no more; restart the host")]
pub(crate) struct DriverEnded;

/// The sending side of a running driver.
#[derive(Debug)]
pub(crate) struct DriverHandle {
    submit: SyncSender<(ReplicaId, Request)>,
    changes: SyncSender<Change>,
    cancel: SyncSender<(ReplicaId, RequestId, CancelCause)>,
    stop: Arc<AtomicBool>,
    lost: Arc<AtomicBool>,
    watch: Arc<Hang>,
    thread: Thread,
    join: Mutex<Option<JoinHandle<()>>>,
}

/// Since when a driver waits for its device: one that hangs returns from no call, so others must see it.
#[derive(Debug)]
struct Hang {
    clock: Arc<SystemClock>,
    longest_step: Micros,
    /// 0 while it waits for nothing.
    since: AtomicU64,
}

struct Driver {
    /// Index of its device in columns and events.
    device: u32,
    // Mailboxes go first: whoever waits for an answer hears that none comes before a device that may not answer either is given back.
    submits: Receiver<(ReplicaId, Request)>,
    cancels: Receiver<(ReplicaId, RequestId, CancelCause)>,
    changes: Receiver<Change>,
    /// Those that come back when they are idle, and to whom.
    leaving: Vec<(ReplicaId, SyncSender<Gone>)>,
    /// Pools that are to have another size.
    resizes: Vec<Resize>,
    replicas: Vec<DriverReplica>,
    stop: Arc<AtomicBool>,
    /// The device computes nothing any more.
    lost: Arc<AtomicBool>,
    watch: Arc<Hang>,
    context: DriverContext,
    output: StepOutput,
    /// Cancels taken from their mailbox and not yet carried out; as bounded as the mailbox.
    to_cancel: Vec<(ReplicaId, RequestId, CancelCause)>,
}

impl std::fmt::Debug for DriverReplica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverReplica").field("id", &self.id).finish_non_exhaustive()
    }
}

// === impl DriverHandle ===

impl DriverHandle {
    /// Starts the driver of a device, which has a name and an index. `mailbox` bounds the requests on their way, `max_in_flight` the cancels.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
        (name, device): (&str, u32),
        replicas: Vec<DriverReplica>,
        (mailbox, max_in_flight): (usize, usize),
        context: DriverContext,
    ) -> std::io::Result<Self> {
        let (submit, submits) = sync_channel(mailbox.max(1));
        // Two causes at most race for one request (client gone, asked): room for both.
        let (cancel, cancels) = sync_channel(2 * max_in_flight.max(1));
        let (change, changes) = sync_channel(MAX_CHANGES);
        let (stop, lost) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (clock, longest_step) = (Arc::clone(&context.clock), context.longest_step);
        let watch = Arc::new(Hang { clock, longest_step, since: AtomicU64::new(0) });
        let mut driver = Driver {
            device,
            replicas,
            submits,
            cancels,
            changes,
            leaving: Vec::new(),
            resizes: Vec::new(),
            stop: Arc::clone(&stop),
            lost: Arc::clone(&lost),
            watch: Arc::clone(&watch),
            context,
            output: StepOutput::default(),
            to_cancel: Vec::new(),
        };
        let join = std::thread::Builder::new().name(format!("driver-{name}")).spawn(move || driver.run())?;
        let thread = join.thread().clone();
        Ok(Self { submit, cancel, changes: change, stop, lost, watch, thread, join: Mutex::new(Some(join)) })
    }

    /// Hands the driver another replica, and waits until it takes requests.
    ///
    /// # Errors
    /// The driver has stopped; the replica is lost.
    pub(crate) fn join(&self, replica: DriverReplica) -> Result<(), DriverEnded> {
        let (joined, waits) = sync_channel(1);
        self.change(Change::Join(Box::new(replica), joined))?;
        waits.recv().map_err(|_| DriverEnded)
    }

    /// Asks for a replica to whom nobody sends requests any more: it comes once its last request has ended.
    ///
    /// # Errors
    /// The driver has stopped.
    pub(crate) fn leave(&self, replica: ReplicaId) -> Result<Receiver<Gone>, DriverEnded> {
        let (gone, comes) = sync_channel(1);
        self.change(Change::Leave(replica, gone))?;
        Ok(comes)
    }

    /// Ends what a replica still runs that is asked for.
    ///
    /// # Errors
    /// The driver has stopped.
    pub(crate) fn end(&self, replica: ReplicaId) -> Result<(), DriverEnded> {
        self.change(Change::End(replica))
    }

    /// Has a replica forget its prefixes; how many blocks held one. Waits for the steps that are under way on the device.
    ///
    /// # Errors
    /// The driver has stopped or hangs, or the replica has gone.
    pub(crate) fn clear_cache(&self, replica: ReplicaId) -> Result<u32, DriverEnded> {
        let (cleared, waits) = sync_channel(1);
        self.change_soon(Change::ClearCache(replica, cleared))?;
        waits.recv_timeout(PATIENCE).map_err(|_| DriverEnded)
    }

    /// Gives a replica's pool so many blocks, preempting who is in the way; what it has then, which is more where its requests need
    /// more, and less where the device has no more. `None` where the device keeps pools as they are, or refuses. Waits for the steps that
    /// are under way on the device.
    ///
    /// # Errors
    /// The driver has stopped or hangs, or the replica has gone.
    pub(crate) fn resize(&self, replica: ReplicaId, n_blocks: u32) -> Result<Option<PoolSize>, DriverEnded> {
        let (resized, waits) = sync_channel(1);
        self.change_soon(Change::Resize(Resize { replica, n_blocks, resized }))?;
        waits.recv_timeout(PATIENCE).map_err(|_| DriverEnded)
    }

    /// Never waits: where there is no room the driver hangs.
    fn change_soon(&self, change: Change) -> Result<(), DriverEnded> {
        let sent = self.changes.try_send(change).map_err(|_| DriverEnded);
        self.thread.unpark();
        sent
    }

    /// Waits where there is no room, at most for a step: never on a thread that serves.
    fn change(&self, change: Change) -> Result<(), DriverEnded> {
        let sent = self.changes.send(change).map_err(|_| DriverEnded);
        self.thread.unpark();
        sent
    }

    /// Puts a request into the mailbox. Never blocks.
    ///
    /// # Errors
    /// The mailbox is full or the driver has stopped; the request comes back.
    pub(crate) fn submit(&self, replica: ReplicaId, request: Request) -> Result<(), (Box<Request>, SubmitError)> {
        if self.lost.load(Ordering::Acquire) || self.watch.hangs() {
            return Err((Box::new(request), SubmitError::Stopped));
        }
        let sent = self.submit.try_send((replica, request)).map_err(|error| match error {
            TrySendError::Full((_, request)) => (Box::new(request), SubmitError::Full),
            TrySendError::Disconnected((_, request)) => (Box::new(request), SubmitError::Stopped),
        });
        self.thread.unpark();
        sent
    }

    /// Asks for the end of a request. Never blocks.
    pub(crate) fn cancel(&self, replica: ReplicaId, id: RequestId, cause: CancelCause) {
        // The bound holds two cancels for every request in flight, which is more than anybody sends.
        let _ = self.cancel.try_send((replica, id, cause));
        self.thread.unpark();
    }

    /// Whether the thread still runs, and for more than to end; a panic ends it, and a device that hangs keeps it.
    pub(crate) fn is_alive(&self) -> bool {
        let join = self.join.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = join.as_ref().is_some_and(|join| !join.is_finished());
        runs && !self.lost.load(Ordering::Acquire) && !self.watch.hangs()
    }

    /// Ends what still runs and waits for the thread.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.thread.unpark();
        let join = self.join.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(join) = join
            && join.join().is_err()
        {
            tracing::error!("a driver thread ended in a panic; its requests were lost");
        }
    }
}

impl Drop for DriverHandle {
    /// A start that failed leaves no thread behind that goes on with the weights; who wants to wait for it stops it.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Drop for Driver {
    /// However it ends, routers look for others; one that ends for what has become of its device says so.
    fn drop(&mut self) {
        const DOWN: u64 = 2;
        if self.lost.load(Ordering::Relaxed) || std::thread::panicking() {
            let event = Event::new(self.context.clock.micros(), EventKind::Device);
            self.context.recorder.record(Event { a: self.device.into(), b: DOWN, ..event });
        }
        self.replicas.iter().for_each(|replica| replica.gauges.gone.store(true, Ordering::Release));
    }
}

// === impl Hang ===

impl Hang {
    fn hangs(&self) -> bool {
        let since = self.since.load(Ordering::Relaxed);
        since > 0 && self.clock.micros().saturating_sub(since) > self.longest_step
    }

    /// Runs what waits for the device.
    fn during<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.since.store(self.clock.micros(), Ordering::Relaxed);
        let waited = wait();
        if self.hangs() {
            tracing::error!(
                "this device took longer than {} s for a step; it serves again",
                self.longest_step / 1_000_000
            );
        }
        self.since.store(0, Ordering::Relaxed);
        waited
    }
}

// === impl Driver ===

impl Driver {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            self.take_mail();
            let mut worked = false;
            for index in 0..self.replicas.len() {
                worked |= self.step(index);
            }
            self.resize_pools();
            self.let_go(|_| false);
            if !worked {
                std::thread::park_timeout(self.idle_time());
            }
        }
        self.take_mail();
        let is_lost = self.lost.load(Ordering::Acquire);
        for replica in &mut self.replicas {
            let end = if is_lost { End::Lost } else { End::Cancelled(CancelCause::Shutdown) };
            end_all(replica, end, &self.context);
        }
        self.let_go(|_| true);
    }

    /// Takes replicas in, and notes those that are to go.
    fn take_changes(&mut self) {
        while let Ok(change) = self.changes.try_recv() {
            match change {
                Change::Join(replica, joined) => {
                    self.replicas.push(*replica);
                    // Whoever asked may have gone.
                    let _ = joined.try_send(());
                }
                Change::Leave(id, gone) => self.leaving.push((id, gone)),
                Change::End(id) => self.let_go(|leaving| leaving == id),
                Change::ClearCache(id, cleared) => {
                    let replica = self.replicas.iter_mut().find(|replica| replica.id == id);
                    // Who has gone answers nobody.
                    let n = replica.map(|replica| replica.scheduler.clear_cache());
                    n.map(|n| cleared.try_send(n).ok());
                }
                Change::Resize(resize) => self.resizes.push(resize),
            }
        }
    }

    /// Gives pools the sizes that they are to have, where no step is begun that writes their blocks.
    fn resize_pools(&mut self) {
        let Self { replicas, resizes, context, .. } = self;
        resizes.retain(|resize| {
            let Some(replica) = replicas.iter_mut().find(|replica| replica.id == resize.replica) else { return false };
            if !replica.begun.is_empty() {
                return true;
            }
            let resized = replica.resize(resize.n_blocks, context);
            let _ = resize.resized.try_send(resized);
            false
        });
        self.look_for_loss();
    }

    /// Gives back replicas that are to go and have nothing more to do, or that must go now. A request that is on its way is
    /// waited for: it has reserved its place.
    fn let_go(&mut self, must: impl Fn(ReplicaId) -> bool) {
        let Self { replicas, leaving, context, .. } = self;
        leaving.retain(|(id, gone)| {
            let Some(at) = replicas.iter().position(|replica| replica.id == *id) else { return false };
            let replica = &replicas[at];
            let is_still = replica.scheduler.is_idle() && replica.begun.is_empty();
            let is_idle = is_still && replica.gauges.reserved_requests.load(Ordering::SeqCst) == 0;
            if !is_idle && !must(*id) {
                return true;
            }
            let mut replica = Box::new(replicas.remove(at));
            let ended = replica.scheduler.live().count() as u64;
            end_all(&mut replica, End::Cancelled(CancelCause::Unloaded), context);
            // Where nobody waits for it any more, it is dropped here.
            let _ = gone.try_send(Gone { replica, ended });
            false
        });
    }

    /// Takes replicas, requests, then cancels. The cancels are received first: whoever cancels has submitted before, so every request
    /// that such a cancel names is in the other mailbox by now.
    fn take_mail(&mut self) {
        self.take_changes();
        self.take_requests();
    }

    /// The same without replicas.
    fn take_requests(&mut self) {
        self.to_cancel.extend(self.cancels.try_iter());
        while let Ok((id, request)) = self.submits.try_recv() {
            self.take_request(id, request);
        }
        for (id, request, cause) in self.to_cancel.drain(..) {
            let now = self.context.clock.micros();
            if let Some(replica) = self.replicas.iter_mut().find(|r| r.id == id) {
                let mut observe = Watch::new(
                    &self.context.recorder,
                    (replica.id, replica.variant),
                    (&mut replica.sampler, &mut replica.pace),
                );
                replica.scheduler.cancel(request, cause, now, &mut observe);
            }
        }
    }

    fn take_request(&mut self, id: ReplicaId, mut request: Request) {
        let now = self.context.clock.micros();
        let Some(replica) = self.replicas.iter_mut().find(|r| r.id == id) else {
            // It was on its way for longer than its replica was given to end.
            request.sink.push(SinkEvent::Cancelled(CancelCause::Unloaded));
            return;
        };
        let tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        // Not only at a step: a request that comes after a swap is the new policy's.
        replica.sampler.attend(now, &replica.scheduler);
        let started = replica.sampler.hears_of(request.id).then(|| Started::of(&request));
        let (own, mask) = (request.id, request.mask.take());
        match replica.scheduler.submit(request, now) {
            Ok(()) => {
                replica.metrics.prompt_tokens.inc_by(tokens.into());
                started.into_iter().for_each(|started| replica.sampler.start(started));
                mask.into_iter().for_each(|mask| replica.sampler.constrain(own, mask));
            }
            Err((mut request, failure)) => {
                request.sink.push(SinkEvent::Failed(failure));
            }
        }
        replica.gauges.release(tokens);
    }

    /// One step of one replica; false when it had nothing to do, or only masks to wait for.
    fn step(&mut self, index: usize) -> bool {
        let Self { replicas, context, output, .. } = self;
        let replica = &mut replicas[index];
        if replica.begun.is_empty() && !replica.begin(context, output) {
            return false;
        }
        let may_go_ahead = self.listen(index);
        let Self { replicas, context, output, .. } = self;
        let replica = &mut replicas[index];
        if may_go_ahead {
            replica.begin_ahead(context);
        }
        match replica.executor.in_halves().is_some() {
            true => self.watch.during(|| replica.finish(context, output)),
            // A CPU may take its time for a prompt.
            false => replica.finish(context, output),
        }
        self.look_for_loss();
        true
    }

    /// Ends where the device has.
    fn look_for_loss(&mut self) {
        let Self { replicas, stop, lost, .. } = self;
        if !lost.load(Ordering::Relaxed) && replicas.iter().any(|replica| replica.executor.is_lost()) {
            tracing::error!("this device serves no more; other devices go on");
            lost.store(true, Ordering::Release);
            replicas.iter().for_each(|replica| replica.gauges.gone.store(true, Ordering::Release));
            stop.store(true, Ordering::Release);
        }
    }

    /// Whether one replica at most has work. Those of one device compute in turns: a step begun behind another would take the turn of
    /// the next one.
    fn is_alone(&self) -> bool {
        self.replicas.iter().filter(|replica| !replica.scheduler.is_idle()).count() <= 1
    }

    /// Takes requests until it is time to begin the step behind the one that computes: who comes until then waits for one step and
    /// not for two. Whether it can be begun.
    fn listen(&mut self, index: usize) -> bool {
        loop {
            let now = self.context.clock.micros();
            let is_over = self.stop.load(Ordering::Acquire) || !self.is_alone();
            let replica = &mut self.replicas[index];
            let is_resized = self.resizes.iter().any(|resize| resize.replica == replica.id);
            if is_over || is_resized || !replica.may_go_ahead(now) {
                return false;
            }
            let left = replica.due_ahead().saturating_sub(now);
            if left == 0 {
                return true;
            }
            std::thread::park_timeout(Duration::from_micros(left));
            self.take_requests();
        }
    }

    /// Until the next deadline of a waiting request, at most [`IDLE`].
    fn idle_time(&self) -> Duration {
        let now = self.context.clock.micros();
        let next = self.replicas.iter().filter_map(|r| r.scheduler.next_deadline()).min();
        next.map_or(IDLE, |at| Duration::from_micros(at.saturating_sub(now)).clamp(SHORTEST_IDLE, IDLE))
    }
}

// === impl DriverReplica ===

impl DriverReplica {
    /// Plans a step with everything known, and begins it; false where there is none.
    fn begin(&mut self, context: &DriverContext, output: &mut StepOutput) -> bool {
        let clock = &context.clock;
        let start = clock.micros();
        self.sampler.attend(start, &self.scheduler);
        end_failed(self, context, start);
        if self.sampler.is_stalled(start, &self.scheduler) {
            self.pace.idled(start);
            publish(self, &context.metrics);
            return false;
        }
        self.scheduler.review_cache(start, &mut *self.retention);
        let has_drafted = self.scheduler.propose(self.executor.draft_places(), |id| self.sampler.is_free(id));
        let drafted = if has_drafted { clock.micros() } else { start };
        let mut observe = Watch::new(&context.recorder, (self.id, self.variant), (&mut self.sampler, &mut self.pace));
        let Some(plan) = self.scheduler.schedule(start, &mut *self.policy, &mut observe) else {
            self.pace.idled(start);
            publish(self, &context.metrics);
            return false;
        };
        let scheduled = clock.micros();
        let size = size_of(plan);
        let (outcome, launched) = match self.executor.in_halves() {
            Some(halves) => {
                let outcome = halves.begin(plan, &mut self.sampler);
                (outcome, clock.micros())
            }
            // Computed whole: nothing of it is the host's.
            None => (self.executor.execute(plan, &mut self.sampler, output), scheduled),
        };
        if has_drafted {
            self.metrics.drafts.step.observe(seconds(start, drafted));
        }
        let host = launched.saturating_sub(drafted);
        self.note_begun([drafted, scheduled, launched], Begun { start, scheduled, host, size, outcome });
        true
    }

    /// Gives the pool so many blocks. Where it shrinks, the blocks go first and their memory after; where it grows, the other way.
    fn resize(&mut self, n_blocks: u32, context: &DriverContext) -> Option<PoolSize> {
        let now = context.clock.micros();
        let before = self.scheduler.config().n_blocks;
        let mut observe = Watch::new(&context.recorder, (self.id, self.variant), (&mut self.sampler, &mut self.pace));
        let sized = match n_blocks < before {
            // Asked whether it can before anybody makes room.
            true => self.executor.resize_pool(before).and_then(|sized| match sized {
                Some(_) => self.executor.resize_pool(self.scheduler.resize(n_blocks, now, &mut observe)),
                None => Ok(None),
            }),
            false => self.executor.resize_pool(n_blocks),
        };
        match sized {
            Ok(sized) => {
                let n_blocks = self.scheduler.resize(sized?.n_blocks, now, &mut observe);
                publish(self, &context.metrics);
                Some(PoolSize { n_blocks, ..sized? })
            }
            Err(error) => {
                tracing::error!(replica = self.id.0, "the memory of a KV pool cannot be changed: {error}");
                self.scheduler.resize(before, now, &mut observe);
                publish(self, &context.metrics);
                None
            }
        }
    }

    /// Whether a step can be begun behind the one that computes.
    fn may_go_ahead(&mut self, now: Micros) -> bool {
        let is_one = self.begun.len() == 1 && self.begun.iter().all(|begun| begun.outcome.is_ok());
        let is_able = self.executor.in_halves().is_some();
        let places = self.executor.draft_places();
        is_one && is_able && self.scheduler.may_go_ahead(now, places, |id| self.sampler.is_free(id))
    }

    /// When to begin it: shortly before the one that computes can end, as far as that is known, else at once.
    fn due_ahead(&self) -> Micros {
        let expected = self.begun.front().map(|begun| (begun.start, self.pace.expects(begun.size)));
        expected.map_or(0, |(start, took)| start + took.saturating_sub(LEAST_NOTICE.max(took / NOTICE_SHARE)))
    }

    /// Begins the step behind the one that computes, unless a swap that is picked up now leaves something to decide.
    fn begin_ahead(&mut self, context: &DriverContext) {
        let (start, places) = (context.clock.micros(), self.executor.draft_places());
        let Some(halves) = self.executor.in_halves() else { return };
        self.sampler.attend(start, &self.scheduler);
        self.scheduler.review_cache(start, &mut *self.retention);
        let may = |id| self.sampler.is_free(id);
        let Some(plan) = self.scheduler.schedule_ahead(start, &mut *self.policy, places, may) else { return };
        let scheduled = context.clock.micros();
        let (size, outcome) = (size_of(plan), halves.begin(plan, &mut self.sampler));
        let launched = context.clock.micros();
        let host = launched.saturating_sub(start);
        self.note_begun([start, scheduled, launched], Begun { start, scheduled, host, size, outcome });
    }

    /// Keeps a step that was planned and launched at these times.
    fn note_begun(&mut self, [start, scheduled, launched]: [Micros; 3], begun: Begun) {
        self.begun.push_back(begun);
        self.metrics.step_schedule.observe(seconds(start, scheduled));
        if self.executor.in_halves().is_some() {
            self.metrics.step_launch.observe(seconds(scheduled, launched));
        }
    }

    /// Waits for the step that was begun first, whose results are in `output` where it was computed whole.
    fn finish(&mut self, context: &DriverContext, output: &mut StepOutput) {
        let (Some(begun), Some(plan)) = (self.begun.pop_front(), self.scheduler.in_flight()) else { return };
        let halves = self.executor.in_halves();
        let outcome = begun.outcome.and_then(|()| halves.map_or(Ok(()), |halves| halves.finish(plan, output)));
        let done = context.clock.micros();
        if outcome.is_ok() {
            self.sampler.sampled(plan, output);
        }
        if let Some(note) = self.executor.take_note() {
            tracing::warn!(replica = self.id.0, "{note}");
        }
        let failed = self.sampler.take_failed();
        let mut observe = Watch::new(&context.recorder, (self.id, self.variant), (&mut self.sampler, &mut self.pace));
        match outcome {
            Ok(()) => self.scheduler.complete(done, output, &mut observe),
            Err(error) => {
                tracing::error!(replica = self.id.0, "a step failed: {error}");
                self.scheduler.fail_step(done, &error, &mut observe);
            }
        }
        for (id, failure) in failed {
            self.scheduler.fail(id, failure, done, &mut observe);
        }
        // What was sampled is looked at while the next step runs.
        self.sampler.hand_over(done);
        self.pace.stepped(begun.size, begun.start, done);
        self.metrics.step_execute.observe(seconds(begun.scheduled, done));
        let step_tokens = self.scheduler.config().step_tokens;
        let n_tokens = begun.size.prefill_tokens + begun.size.decode_sequences;
        self.metrics.step_fill.set(f64::from(n_tokens) / f64::from(step_tokens.max(1)));
        // The device has come to it only now.
        for next in &mut self.begun {
            (next.start, next.scheduled) = (done, done);
        }
        publish(self, &context.metrics);
        let completed = context.clock.micros();
        self.metrics.step_complete.observe(seconds(done, completed));
        self.metrics.step_host.observe(seconds(done, completed + begun.host));
    }
}

fn seconds(from: Micros, to: Micros) -> f64 {
    to.saturating_sub(from) as f64 * 1e-6
}

/// Records a replica's events under its name, and tells its sampler and its pace of requests that end.
struct Watch<'a> {
    recorder: &'a Recorder,
    replica: ReplicaId,
    variant: u32,
    sampler: &'a mut Desk<Box<dyn SamplerWorker>>,
    pace: &'a mut Pace,
}

impl<'a> Watch<'a> {
    fn new(
        recorder: &'a Recorder,
        (replica, variant): (ReplicaId, u32),
        (sampler, pace): (&'a mut Desk<Box<dyn SamplerWorker>>, &'a mut Pace),
    ) -> Self {
        Self { recorder, replica, variant, sampler, pace }
    }
}

impl Observer for Watch<'_> {
    fn observe(&mut self, event: Event) {
        if matches!(event.kind, EventKind::Finished | EventKind::Failed | EventKind::Cancelled | EventKind::Rejected) {
            self.sampler.ended(RequestId(event.request));
        }
        if matches!(event.kind, EventKind::Finished | EventKind::Failed) {
            self.pace.ended(event.kind == EventKind::Failed);
        }
        self.recorder.record(Event { replica: self.replica.0, variant: self.variant, ..event });
    }
}

/// Why all that a replica runs ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Cancelled(CancelCause),
    /// Its device computes nothing any more.
    Lost,
}

/// Ends whatever a replica still runs.
fn end_all(replica: &mut DriverReplica, end: End, context: &DriverContext) {
    let now = context.clock.micros();
    let (sampler, pace) = (&mut replica.sampler, &mut replica.pace);
    let mut observe = Watch::new(&context.recorder, (replica.id, replica.variant), (sampler, pace));
    match end {
        End::Cancelled(cause) => replica.scheduler.shutdown(cause, now, &mut observe),
        End::Lost => replica.scheduler.fail_all(&Failure::DeviceLost, now, &mut observe),
    }
    // Whoever follows requests beside the policy hears of their end.
    replica.sampler.hand_over(now);
    publish(replica, &context.metrics);
}

/// Ends requests of which the sampler policy could not be asked since the last step, and that must not go on without it.
fn end_failed(replica: &mut DriverReplica, context: &DriverContext, now: Micros) {
    for (id, failure) in replica.sampler.take_failed() {
        let (sampler, pace) = (&mut replica.sampler, &mut replica.pace);
        let mut observe = Watch::new(&context.recorder, (replica.id, replica.variant), (sampler, pace));
        replica.scheduler.fail(id, failure, now, &mut observe);
    }
}

/// Adds what happened since the last time to the replica's metrics.
fn publish(replica: &mut DriverReplica, metrics: &Metrics) {
    let counted = replica.scheduler.take_counters();
    let m = &replica.metrics;
    let gauges = &replica.gauges;
    replica.pace.publish(gauges);
    m.running.set(i64::from(gauges.running.load(Ordering::Relaxed)));
    m.waiting.set(i64::from(gauges.waiting.load(Ordering::Relaxed)));
    let total = gauges.total_blocks.load(Ordering::Relaxed).max(1);
    let free = gauges.free_blocks.load(Ordering::Relaxed);
    m.kv_usage.set(1.0 - f64::from(free) / f64::from(total));
    m.pool.show(total);
    m.prefix_queries.inc_by(counted.prefix_query_tokens);
    m.prefix_hits.inc_by(counted.prefix_hit_tokens);
    m.kv_evicted.inc_by(counted.evicted_blocks);
    m.kv_cached.set(gauges.cached_blocks.load(Ordering::Relaxed).into());
    let held = u64::from(total.saturating_sub(free)) * u64::from(replica.scheduler.config().block_tokens);
    m.kv_slack.set(f64::from(gauges.slack_tokens.load(Ordering::Relaxed)) / held.max(1) as f64);
    m.generation_tokens.inc_by(counted.generated_tokens);
    publish_drafts(&mut replica.scheduler, &counted, &m.drafts);
    m.draft_tokens.inc_by(counted.draft_tokens);
    m.accepted_tokens.inc_by(counted.accepted_tokens);
    m.preemptions.inc_by(counted.preemptions);
    m.steps_ahead.inc_by(counted.steps_ahead);
    m.tokens_prefill.inc_by(counted.prefill_tokens);
    m.tokens_decode.inc_by(counted.decode_tokens);
    for (stage, n) in [Stage::Queued, Stage::Prefilling, Stage::Decoding].into_iter().zip(counted.cancelled) {
        for _ in 0..n {
            metrics.cancelled(stage.name());
        }
    }
}

/// The same of drafts, by method.
fn publish_drafts(scheduler: &mut Scheduler, counted: &Counters, drafts: &DraftMetrics) {
    drafts.ngram_proposed.inc_by(counted.draft_tokens - counted.model_draft_tokens);
    drafts.ngram_accepted.inc_by(counted.accepted_tokens - counted.model_accepted_tokens);
    drafts.model_proposed.inc_by(counted.model_draft_tokens);
    drafts.model_accepted.inc_by(counted.model_accepted_tokens);
    let Some(model) = scheduler.draft_model() else { return };
    let DraftCounters { tokens, no_room, .. } = model.take_counters();
    drafts.tokens.inc_by(tokens);
    drafts.no_room.inc_by(no_room);
    if let Some(error) = model.take_failure() {
        tracing::error!("a draft model failed; requests of that step go on without drafts: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::AtomicU32;

    use pointsman_sched::batch::NativeBatch;
    use pointsman_sched::config::Config;
    use pointsman_sched::draft::DraftMethod;
    use pointsman_sched::execute::{InHalves, StepPlan};
    use pointsman_sched::ids::Priority;
    use pointsman_sched::prefix::chain_hashes;
    use pointsman_sched::publish::PrefixSketch;
    use pointsman_sched::request::{Sampling, SinkState, TokenSink};
    use pointsman_sched::retention::NativeRetention;
    use pointsman_sched::sampler::{EditSource, NativeSampler};
    use pointsman_server::text::{TextFiles, TextModel};
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::null::NullExecutor;

    /// Counts how requests ended, and keeps what they got.
    #[derive(Clone, Debug, Default)]
    struct Ends {
        all: Arc<AtomicU32>,
        unloaded: Arc<AtomicU32>,
        lost: Arc<AtomicU32>,
        texts: Arc<Mutex<HashMap<u64, Vec<u32>>>>,
    }

    #[derive(Debug)]
    struct Sink {
        id: u64,
        ends: Ends,
        has_ended: bool,
    }

    impl TokenSink for Sink {
        fn push(&mut self, event: SinkEvent) -> SinkState {
            let is_end = matches!(event, SinkEvent::Finished(_) | SinkEvent::Cancelled(_) | SinkEvent::Failed(_));
            assert!(!(is_end && self.has_ended), "a request ends once");
            self.has_ended |= is_end;
            self.ends.all.fetch_add(is_end.into(), Ordering::Relaxed);
            let unloaded = event == SinkEvent::Cancelled(CancelCause::Unloaded);
            self.ends.unloaded.fetch_add(unloaded.into(), Ordering::Relaxed);
            let lost = event == SinkEvent::Failed(Failure::DeviceLost);
            self.ends.lost.fetch_add(lost.into(), Ordering::Relaxed);
            if let SinkEvent::Token { token, .. } = event {
                self.ends.texts.lock().expect("no panic").entry(self.id).or_default().push(token);
            }
            SinkState::Open
        }
    }

    impl Drop for Sink {
        fn drop(&mut self) {
            assert!(self.has_ended || std::thread::panicking(), "a request was lost");
        }
    }

    fn text() -> TextModel {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tokenizer.json");
        let tokenizer = std::fs::read(folder).expect("a file of the demo");
        let text = TextModel::from_files(&TextFiles { tokenizer: &tokenizer, ..TextFiles::default() });
        text.expect("a tokenizer")
    }

    fn context() -> DriverContext {
        DriverContext {
            clock: Arc::new(SystemClock::start()),
            recorder: Recorder::new(1_024),
            metrics: Arc::new(Metrics::new()),
            longest_step: 60_000_000,
        }
    }

    fn request(id: u64, rng: &mut StdRng, ends: &Ends) -> Request {
        let prompt: Vec<u32> = (0..rng.random_range(1..100)).map(|i| i % 7 + 1).collect();
        Request {
            id: RequestId(id),
            tenant: 0,
            tenant_name: "t".into(),
            session: 0,
            priority: Priority::Normal,
            arrived: 0,
            deadline: 0,
            block_hashes: chain_hashes(&prompt, 16).into(),
            prompt: prompt.into(),
            transient: false,
            draft_tokens: 0,
            draft_method: DraftMethod::Ngram,
            max_new_tokens: rng.random_range(1..300),
            min_new_tokens: 0,
            stop_tokens: Arc::default(),
            sampling: Arc::new(Sampling::default()),
            attributes: Arc::default(),
            fork_of: None,
            mask: None,
            router_generation: 0,
            sink: Box::new(Sink { id, ends: ends.clone(), has_ended: false }),
        }
    }

    fn replica(id: u32, step: Micros, context: &DriverContext, text: &TextModel) -> DriverReplica {
        let (gauges, sketch) = (Arc::<ReplicaGauges>::default(), Arc::new(PrefixSketch::new(64)));
        let config = Config {
            block_tokens: 16,
            n_blocks: 64,
            max_running: 8,
            step_tokens: 64,
            max_waiting: 64,
            prefill_chunk: 32,
            starvation_us: 1_000_000,
            context_tokens: 512,
        };
        DriverReplica {
            id: ReplicaId(id),
            scheduler: Scheduler::new(config, 1, Arc::clone(&gauges), sketch).expect("good sizes"),
            executor: Box::new(NullExecutor::new(text, step, Arc::clone(&context.clock))),
            policy: Box::new(NativeBatch),
            retention: Box::new(NativeRetention),
            sampler: Desk::new(Box::new(NativeSampler)),
            gauges,
            metrics: context.metrics.replica("m:f16", "cpu", 16, 64),
            variant: 1,
            pace: Pace::new(64),
            begun: VecDeque::new(),
        }
    }

    /// Requests of hosts that were asked for the same, two by two, have the same texts as far as they go: how many tokens that is.
    fn compare(texts: &HashMap<u64, Vec<u32>>, n_each: u64) -> usize {
        let text = |id: u64| texts.get(&id).map_or(&[][..], Vec::as_slice);
        let pairs = [0, 2 * n_each].into_iter().flat_map(|before| (before + 1..).take(n_each as usize));
        let same = pairs.map(|id| {
            let (whole, behind) = (text(id), text(id + n_each));
            let n = whole.len().min(behind.len());
            assert_eq!(whole[..n], behind[..n], "request {id}");
            n
        });
        same.sum()
    }

    /// Serves a few steps.
    struct Dying {
        inner: NullExecutor,
        steps: u32,
    }

    impl Executor for Dying {
        fn execute(
            &mut self,
            plan: &StepPlan,
            edits: &mut dyn EditSource,
            out: &mut StepOutput,
        ) -> Result<(), ExecuteError> {
            self.steps = self.steps.saturating_sub(1);
            match self.is_lost() {
                true => Err(ExecuteError::Lost { what: "it fell off the bus".into() }),
                false => self.inner.execute(plan, edits, out),
            }
        }

        fn is_lost(&self) -> bool {
            self.steps == 0
        }
    }

    /// Those of its step, those beside it and those that wait; whoever comes later is told at once.
    #[test]
    fn all_requests_of_a_lost_device_end_as_such() {
        let text = text();
        let context = context();
        let recorder = context.recorder.clone();
        let ends = Ends::default();
        let mut rng = StdRng::seed_from_u64(1);
        let mut replica = replica(1, 0, &context, &text);
        let inner = NullExecutor::new(&text, 0, Arc::clone(&context.clock));
        replica.executor = Box::new(Dying { inner, steps: 3 });
        let gauges = Arc::clone(&replica.gauges);
        // More than run at once, and none of them is done in three steps.
        for id in 0..20 {
            let request = Request { max_new_tokens: 100, ..request(id, &mut rng, &ends) };
            replica.scheduler.submit(request, 0).expect("there is room");
        }
        let driver = DriverHandle::start(("test", 3), vec![replica], (256, 512), context).expect("a thread");
        while driver.is_alive() {
            std::thread::yield_now();
        }
        let mut late = request(99, &mut rng, &ends);
        late.sink.push(SinkEvent::Failed(Failure::DeviceLost));
        let (_, error) = driver.submit(ReplicaId(1), late).expect_err("nobody takes it");
        assert_eq!(error, SubmitError::Stopped);
        driver.stop();
        assert!(gauges.gone.load(Ordering::Acquire));
        assert_eq!([&ends.lost, &ends.all].map(|n| n.load(Ordering::Relaxed)), [21, 21]);
        let mut events = Vec::new();
        recorder.drain(&mut events, 1_024);
        let told = events.iter().filter(|event| event.kind == EventKind::Device).map(|event| (event.a, event.b));
        assert_eq!(told.collect::<Vec<_>>(), [(3, 2)], "that it is down");
    }

    /// Waits in a step until it is let go.
    struct Hanging {
        inner: NullExecutor,
        go_on: Receiver<()>,
    }

    impl Executor for Hanging {
        fn execute(
            &mut self,
            plan: &StepPlan,
            edits: &mut dyn EditSource,
            out: &mut StepOutput,
        ) -> Result<(), ExecuteError> {
            self.inner.execute(plan, edits, out)
        }

        fn in_halves(&mut self) -> Option<&mut dyn InHalves> {
            Some(self)
        }
    }

    impl InHalves for Hanging {
        fn begin(&mut self, plan: &StepPlan, edits: &mut dyn EditSource) -> Result<(), ExecuteError> {
            self.inner.begin(plan, edits)
        }

        fn finish(&mut self, plan: &StepPlan, out: &mut StepOutput) -> Result<(), ExecuteError> {
            // The test has let it go for good.
            let _ = self.go_on.recv();
            self.inner.finish(plan, out)
        }
    }

    #[test]
    fn a_device_that_hangs_takes_no_requests_until_it_answers() {
        let (text, ends, mut rng) = (text(), Ends::default(), StdRng::seed_from_u64(1));
        let context = DriverContext { longest_step: 1_000, ..context() };
        let mut replica = replica(1, 0, &context, &text);
        let (lets_go, go_on) = sync_channel(0);
        let inner = NullExecutor::new(&text, 1, Arc::clone(&context.clock));
        replica.executor = Box::new(Hanging { inner, go_on });
        let driver = DriverHandle::start(("test", 3), vec![replica], (256, 512), context).expect("a thread");
        assert!(driver.submit(ReplicaId(1), request(1, &mut rng, &ends)).is_ok());
        while driver.is_alive() {
            std::thread::yield_now();
        }
        let (mut late, error) = driver.submit(ReplicaId(1), request(2, &mut rng, &ends)).expect_err("it hangs");
        assert_eq!(error, SubmitError::Stopped);
        late.sink.push(SinkEvent::Failed(Failure::DeviceLost));
        drop(lets_go);
        while !driver.is_alive() {
            std::thread::yield_now();
        }
        while ends.all.load(Ordering::Relaxed) < 2 {
            std::thread::yield_now();
        }
        assert_eq!(ends.lost.load(Ordering::Relaxed), 1, "the first one was answered");
        driver.stop();
    }

    /// Replicas come and go under load, with cancels wherever they fall: each request ends once, and what comes back holds
    /// nothing. Two hosts are asked for the same, one of which begins steps behind others: the texts are the same as far as they
    /// go. The threads race as they like; none of this depends on who wins.
    #[test]
    fn replicas_come_and_go_and_no_request_or_block_is_lost() {
        let (text, context) = (text(), context());
        let (mut next, ends) = (0, Ends::default());
        for seed in 0..4 {
            let mut rng = StdRng::seed_from_u64(seed / 2);
            // Steps that take time are computed in halves, long ones with an ear for who comes.
            let step = [0, 20, 0, 700][seed as usize];
            let resident = replica(1, step, &context, &text);
            let stays = Arc::clone(&resident.gauges);
            let driver =
                DriverHandle::start(("test", 3), vec![resident], (256, 512), context.clone()).expect("a thread");
            for round in 0..12 {
                let joins = replica(2, step, &context, &text);
                let gauges = Arc::clone(&joins.gauges);
                driver.join(joins).expect("it runs");
                for _ in 0..16 {
                    next += 1;
                    let (id, own) = if rng.random() { (2, &gauges) } else { (1, &stays) };
                    let request = request(next, &mut rng, &ends);
                    own.reserve(request.prompt.len() as u32);
                    driver.submit(ReplicaId(id), request).expect("room");
                    if rng.random_range(0..3) == 0 {
                        driver.cancel(ReplicaId(id), RequestId(next), CancelCause::Asked);
                    }
                }
                // The largest request needs 25 blocks.
                let (n_blocks, clears): (_, bool) = (rng.random_range(30..80), rng.random());
                let sized = driver.resize(ReplicaId(1), n_blocks).expect("it runs").expect("it can");
                assert_eq!(sized, PoolSize { n_blocks: n_blocks.min(64), bytes: 0, spare: 0 });
                assert_eq!(stays.total_blocks.load(Ordering::Relaxed), sized.n_blocks);
                assert!(!clears || driver.clear_cache(ReplicaId(1)).expect("it runs") <= sized.n_blocks);
                let coming = driver.leave(ReplicaId(2)).expect("it runs");
                let is_cut = round % 3 == 0;
                if is_cut {
                    driver.end(ReplicaId(2)).expect("it runs");
                }
                let before = ends.unloaded.load(Ordering::Relaxed);
                let Gone { replica, ended } = coming.recv().expect("it comes back");
                assert!(replica.scheduler.is_idle() && (is_cut || ended == 0), "seed {seed}, round {round}: {ended}");
                let load = |gauge: &AtomicU32| gauge.load(Ordering::Relaxed);
                assert_eq!((load(&gauges.free_blocks), load(&gauges.running), load(&gauges.waiting)), (64, 0, 0));
                assert!(is_cut || load(&gauges.reserved_requests) == 0);
                // One that comes too late is told so.
                next += 1;
                driver.submit(ReplicaId(2), request(next, &mut rng, &ends)).expect("room");
                let again = driver.leave(ReplicaId(2)).expect("it runs").recv();
                assert!(again.is_err(), "it has gone already");
                let too_late = (driver.resize(ReplicaId(2), 64), driver.clear_cache(ReplicaId(2)));
                assert_eq!(too_late, (Err(DriverEnded), Err(DriverEnded)));
                assert!(ends.unloaded.load(Ordering::Relaxed) > before || is_cut);
            }
            driver.resize(ReplicaId(1), 64).expect("it runs");
            driver.stop();
            assert_eq!(stays.free_blocks.load(Ordering::Relaxed), 64);
            assert_eq!(stays.reserved_requests.load(Ordering::Relaxed), 0);
        }
        assert_eq!(u64::from(ends.all.load(Ordering::Relaxed)), next, "each request ended, and once");
        let counted = context.metrics.replica("m:f16", "cpu", 16, 64);
        assert!(counted.steps_ahead.get() > 100, "steps are begun ahead");
        let n_steps = counted.step_host.get_sample_count();
        assert_eq!([&counted.step_complete, &counted.step_execute].map(|part| part.get_sample_count()), [n_steps; 2]);
        // One that was ended with its replica has no end.
        let parts = [&counted.step_schedule, &counted.step_launch, &counted.step_complete];
        let (host, parts) = (counted.step_host.get_sample_sum(), parts.map(|part| part.get_sample_sum()));
        assert!(parts[2] < host && host < parts.iter().sum::<f64>() + 1e-6, "{host} of {parts:?}");
        let n_compared = compare(&ends.texts.lock().expect("no panic"), next / 4);
        assert!(n_compared > 10_000, "{n_compared} tokens");
    }
}
