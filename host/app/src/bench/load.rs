//! When requests are sent, and who counts them.
//!
//! Whoever asks hands each outcome to one collector, which owns the tally: nothing is locked while requests are timed, and a
//! run that is cut short, by time or by a signal, still has what came in before.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pointsman_sched::ids::Micros;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Exp};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::ask::{Outcome, Target};
use super::report::Tally;
use super::shape;
use crate::cli::BenchArgs;
use crate::clock::SystemClock;

/// Outcomes on their way to the collector.
const ON_THEIR_WAY: usize = 4_096;
/// Time between two looks of a person at the progress.
const PROGRESS: Duration = Duration::from_millis(500);
/// Indices of warm-up requests begin here, so that their prompts are not those of the run.
const WARM_UP: u64 = 1 << 63;

/// Asks until the requests or the time are spent.
pub(super) async fn run(args: &BenchArgs, target: Arc<Target>, clock: &Arc<SystemClock>) -> Tally {
    for index in 0..u64::from(args.warm_up) {
        target.ask(shape::body(args, &target.model, WARM_UP + index), clock.micros()).await;
    }
    let (tell, mut outcomes) = mpsc::channel(ON_THEIR_WAY);
    let sent = Arc::new(AtomicU64::new(0));
    let sender = Sender {
        args: Arc::new(args.clone()),
        target,
        clock: Arc::clone(clock),
        sent: Arc::clone(&sent),
        tell,
        until: args.seconds.map(|seconds| clock.micros() + seconds * 1_000_000),
    };
    let mut tally = Tally::start(clock.micros());
    let ending = args.seconds.map_or(Duration::MAX, Duration::from_secs);
    let ended = async { tokio::time::timeout(ending, tokio::signal::ctrl_c()).await };
    tokio::pin!(ended);
    let mut senders = JoinSet::new();
    match args.rate {
        Some(rate) => {
            let runtime = Handle::current();
            drop(senders.spawn_blocking(move || sender.open(rate, &runtime)));
        }
        None => {
            (0..args.concurrency).for_each(|_| drop(senders.spawn(sender.clone().closed())));
            // The collector goes on until the last sender is gone.
            drop(sender);
        }
    }
    let mut look = tokio::time::interval(PROGRESS);
    loop {
        tokio::select! {
            outcome = outcomes.recv() => match outcome {
                Some(outcome) => tally.add(outcome, args),
                None => break,
            },
            _ = look.tick() => progress(&tally, args, clock.micros()),
            _ = &mut ended => break,
        }
    }
    tally.end(sent.load(Ordering::Relaxed), clock.micros());
    progress(&tally, args, clock.micros());
    senders.abort_all();
    tally
}

#[derive(Clone)]
struct Sender {
    args: Arc<BenchArgs>,
    target: Arc<Target>,
    clock: Arc<SystemClock>,
    /// Number of the next request.
    sent: Arc<AtomicU64>,
    tell: mpsc::Sender<Outcome>,
    until: Option<Micros>,
}

impl Sender {
    /// The next request's number, if there is one more.
    fn next(&self) -> Option<u64> {
        if self.until.is_some_and(|until| self.clock.micros() >= until) {
            return None;
        }
        let take = |n: u64| (n < self.args.requests).then_some(n + 1);
        self.sent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()
    }

    async fn send(&self, index: u64, due: Micros) {
        let body = shape::body(&self.args, &self.target.model, index);
        // The prompt's making is not the server's time.
        let due = if self.args.rate.is_some() { due } else { self.clock.micros() };
        let outcome = self.target.ask(body, due).await;
        let _ = self.tell.send(outcome).await;
    }

    /// One client: asks again when it is answered.
    async fn closed(self) {
        while let Some(index) = self.next() {
            self.send(index, 0).await;
        }
    }

    /// Requests come as independent people send them: exponential times in between, `rate` a second on average.
    ///
    /// On a thread of its own: the runtime's timers have a resolution of a millisecond, which would be counted as the server's.
    #[expect(clippy::disallowed_methods, reason = "an open loop waits for the time and for nothing else")]
    fn open(self, rate: f64, runtime: &Handle) {
        let Ok(gap) = Exp::new(rate) else { return };
        let mut random = SmallRng::seed_from_u64(self.args.seed);
        let (start, mut after) = (self.clock.micros(), 0.0f64);
        let mut asked = JoinSet::new();
        // The collector leaves when the run is cut short.
        while let Some(index) = self.next().filter(|_| !self.tell.is_closed()) {
            after += gap.sample(&mut random);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds of a run")]
            let due = start + (after * 1e6) as u64;
            std::thread::sleep(Duration::from_micros(due.saturating_sub(self.clock.micros())));
            while asked.try_join_next().is_some() {}
            let sender = self.clone();
            if asked.len() < self.args.max_in_flight as usize {
                asked.spawn_on(async move { sender.send(index, due).await }, runtime);
            } else {
                let unsent = Outcome::Failed("not sent: --max-in-flight was reached".to_owned());
                asked.spawn_on(async move { drop(sender.tell.send(unsent).await) }, runtime);
            }
        }
        // Not `join_all`, which takes a request that was cut off for a fault.
        runtime.block_on(async { while asked.join_next().await.is_some() {} });
    }
}

/// A line that a person sees change; scripts see nothing.
fn progress(tally: &Tally, args: &BenchArgs, now: Micros) {
    let mut err = std::io::stderr();
    if args.json || !err.is_terminal() {
        return;
    }
    // Nobody reads it: no reason to end.
    let _ = write!(err, "\r\x1b[K{}", tally.line(args.requests, now)).and_then(|()| err.flush());
}
