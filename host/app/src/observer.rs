//! The observer thread: hands events to telemetry hooks and ended requests to the admission policy, in batches, and journals
//! what guests did, off every hot path.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pointsman_sched::admit::Ending;
use pointsman_sched::route::DecidedBy;
use pointsman_server::admin::wire::calls::{AdmissionCall, AdmissionLine, EndingSeen};
use pointsman_server::admin::wire::decision::Line;
use pointsman_server::record::Taps;
use pointsman_telemetry::{Event, Metrics, NameKind, Names, Recorder};

use crate::aliases::Aliases;
use crate::anomaly::Anomalies;
use crate::clock::SystemClock;
use crate::deploy::Deploy;

/// Time between two rounds.
const PERIOD: Duration = Duration::from_millis(50);
/// Events per round and hook.
const BATCH: usize = 4_096;

/// Batches per round: when events come faster than hooks take them, the ring drops the oldest and faults are still
/// journalled.
const MAX_BATCHES: usize = 8;
/// Alerts of one hook per batch that reach log and journal; the others are counted in metrics.
const MAX_ALERTS: usize = 4;

/// The running observer.
#[derive(Debug)]
pub(crate) struct Observer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// What the observer reads.
#[derive(Debug)]
pub(crate) struct Watched {
    /// Where hooks are.
    pub deploy: Arc<Deploy>,
    /// Where rollouts between variants are.
    pub aliases: Arc<Aliases>,
    /// Where events come from.
    pub recorder: Recorder,
    /// Names behind their numbers.
    pub names: Arc<Names>,
    /// Counts what was lost.
    pub metrics: Arc<Metrics>,
    /// Time for the hooks.
    pub clock: Arc<SystemClock>,
    /// Where what policies hear is recorded.
    pub taps: Taps,
}

impl Observer {
    /// Starts the thread.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(watched: Watched) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || {
            let mut events = Vec::with_capacity(BATCH);
            let mut anomalies = Anomalies::new(watched.clock.micros());
            while !stopped.load(Ordering::Acquire) {
                watched.round(&mut events, &mut anomalies);
                std::thread::park_timeout(PERIOD);
            }
            watched.round(&mut events, &mut anomalies);
        };
        let thread = std::thread::Builder::new().name("observer".into()).spawn(run)?;
        Ok(Self { stop, thread })
    }

    /// Shows the hooks what is left and waits for the thread.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            tracing::error!("the observer thread ended in a panic");
        }
    }
}

impl Watched {
    fn round(&self, events: &mut Vec<Event>, anomalies: &mut Anomalies) {
        for _ in 0..MAX_BATCHES {
            events.clear();
            let drained = self.recorder.drain(events, BATCH);
            self.metrics.events_dropped(drained.dropped);
            if drained.taken > 0 || drained.dropped > 0 {
                self.deploy.show_rollouts(events, drained.dropped);
                self.aliases.show_rollouts(events, drained.dropped);
                self.show(events, drained.dropped);
                anomalies.take(events);
            }
            if drained.taken < BATCH {
                break;
            }
        }
        self.deploy.tick_rollouts();
        self.aliases.tick_rollouts();
        self.deploy.admission.settle(self.clock.micros(), &self.names, &mut |by, endings| self.record(by, endings));
        self.deploy.journal_faults();
        anomalies.close(self.clock.micros(), &self.names, &self.metrics, |what| self.deploy.note("host", what));
    }

    /// Records endings that the admission policy has taken in.
    fn record(&self, by: &DecidedBy, endings: &[Ending]) {
        if self.taps.admission.recording() == 0 {
            return;
        }
        let tenants: BTreeSet<u32> = endings.iter().map(|ending| ending.tenant).collect();
        let name = |number| (number, self.names.name(NameKind::Tenant, number).to_string());
        let call = AdmissionCall::Settle {
            tenants: tenants.into_iter().map(name).collect(),
            endings: endings.iter().map(EndingSeen::from).collect(),
        };
        let (now, revision, generation) = (self.clock.micros(), by.revision.to_string(), by.generation);
        self.taps.admission.push(Line::Admission(Box::new(AdmissionLine { now, call, revision, generation })));
    }

    fn show(&self, events: &[Event], dropped: u64) {
        for (name, slot) in self.deploy.telemetry.load().iter() {
            let alerts = slot.on_events(self.clock.micros(), events, &self.names, dropped);
            for (n, alert) in alerts.iter().enumerate() {
                self.metrics.alert(alert.severity.as_str(), name);
                if n < MAX_ALERTS {
                    self.deploy.alert(name, alert);
                }
            }
        }
    }
}
