//! The observer thread: hands events to telemetry hooks and ended requests to the admission policy, in batches, and journals
//! what guests did, off every hot path.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use pointsman_sched::admit::Ending;
use pointsman_sched::route::DecidedBy;
use pointsman_server::admin::wire::calls::{AdmissionCall, AdmissionLine, EndingSeen};
use pointsman_server::admin::wire::decision::Line;
use pointsman_server::record::Taps;
use pointsman_telemetry::{Event, Metrics, Micros, NameKind, Names, Recorder};

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
/// Alerts of one hook in an hour that reach log and journal; the others are counted in metrics. The journal is bounded too, and
/// what people did must not be pushed out of it by a hook that never stops.
const MAX_ALERTS: u32 = 60;
const HOUR: Micros = 3_600_000_000;

/// The running observer.
#[derive(Debug)]
pub(crate) struct Observer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Alerts that were told in the hour at hand, by hook.
#[derive(Debug, Default)]
struct Told {
    hour: u64,
    alerts: BTreeMap<String, u32>,
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
            let (mut anomalies, mut told) = (Anomalies::new(watched.clock.micros()), Told::default());
            while !stopped.load(Ordering::Acquire) {
                watched.round(&mut events, &mut anomalies, &mut told);
                std::thread::park_timeout(PERIOD);
            }
            watched.round(&mut events, &mut anomalies, &mut told);
        };
        let thread = std::thread::Builder::new().name("observer".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Shows the hooks what is left and waits for the thread.
    pub(crate) fn stop(mut self) {
        if self.end().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the observer thread ended in a panic");
        }
    }

    fn end(&mut self) -> Option<JoinHandle<()>> {
        self.stop.store(true, Ordering::Release);
        self.thread.take().inspect(|thread| thread.thread().unpark())
    }
}

impl Drop for Observer {
    /// A start that failed leaves no thread behind.
    fn drop(&mut self) {
        self.end();
    }
}

impl Watched {
    fn round(&self, events: &mut Vec<Event>, anomalies: &mut Anomalies, told: &mut Told) {
        for _ in 0..MAX_BATCHES {
            events.clear();
            let drained = self.recorder.drain(events, BATCH);
            self.metrics.events_dropped(drained.dropped);
            if drained.taken > 0 || drained.dropped > 0 {
                self.deploy.show_rollouts(events, drained.dropped);
                self.aliases.show_rollouts(events, drained.dropped);
                self.show(events, drained.dropped, told);
                anomalies.take(events);
            }
            if drained.taken < BATCH {
                break;
            }
        }
        self.deploy.telemetry.load().values().for_each(|slot| slot.attend(self.clock.micros()));
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

    fn show(&self, events: &[Event], dropped: u64, told: &mut Told) {
        for (name, slot) in self.deploy.telemetry.load().iter() {
            let now = self.clock.micros();
            for alert in &slot.on_events(now, events, &self.names, dropped) {
                self.metrics.alert(alert.severity.as_str(), name);
                if told.admits(name, now) {
                    self.deploy.alert(name, alert);
                }
            }
        }
    }
}

impl Told {
    /// Whether one more may be told.
    fn admits(&mut self, hook: &str, now: Micros) -> bool {
        let hour = now / HOUR;
        if hour != self.hour {
            *self = Self { hour, alerts: BTreeMap::new() };
        }
        let alerts = self.alerts.entry(hook.to_owned()).or_default();
        *alerts = alerts.saturating_add(1);
        *alerts <= MAX_ALERTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_never_stops_leaves_room_in_the_journal() {
        let mut told = Told::default();
        for (hook, now, expect) in [("a", 1, 60), ("a", 2, 0), ("b", 3, 60), ("a", HOUR, 60), ("b", 2 * HOUR - 1, 60)] {
            let n = (0..1_000).filter(|_| told.admits(hook, now)).count();
            assert_eq!(n, expect, "{hook} at {now}");
        }
    }
}
