//! Telemetry guests: they see batches of events on the observer thread and may raise alerts.
//!
//! Off the hot path, so a call may take milliseconds and the columns are gathered here, from records, into buffers that the
//! slot's only caller keeps.

use std::sync::{Arc, Mutex, PoisonError};

use pointsman_telemetry::{Event, EventKind, Micros, NameKind, Names};

use crate::bindings::telemetry::exports::pointsman::policy::telemetry as wit;
use crate::circuit::Admit;
use crate::config::Budgets;
use crate::fault::{Call, Fault, FaultKind, truncate};
use crate::instance::{Hook, Instance, ProbeFault, hook_bindings};
use crate::manifest::{EventColumn, Wants};
use crate::slot::{SlotCore, slot_by_core};
use crate::upload::World;

/// Most events of one call; a longer batch is cut into several.
const MAX_BATCH: usize = 4_096;
/// Most alerts of one call.
const MAX_ALERTS: usize = 32;
/// Longest title and text of an alert, in bytes.
const MAX_TITLE: usize = 200;
const MAX_TEXT: usize = 2_000;
/// The tables of names that a guest mirrors.
const NAME_KINDS: [NameKind; 3] = [NameKind::Tenant, NameKind::Replica, NameKind::Variant];

/// `world telemetry-hook`.
pub(crate) struct TelemetryHook;

/// A slot `telemetry.<name>`.
#[derive(Debug)]
pub struct TelemetrySlot {
    pub(crate) core: Arc<SlotCore<TelemetryHook>>,
    /// Only the observer thread calls; the lock is never contended and is not held during a call.
    pub(crate) buffers: Mutex<Columns>,
}

slot_by_core!(TelemetrySlot);

/// How urgent an alert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Worth a look.
    Warning,
    /// Someone should act.
    Critical,
}

/// Raised by a telemetry guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alert {
    /// How urgent.
    pub severity: Severity,
    /// One line.
    pub title: String,
    /// More.
    pub text: String,
    /// The slot.
    pub slot: Arc<str>,
    /// The revision.
    pub revision: Arc<str>,
}

/// Events as columns; the memory is kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    at: Vec<u64>,
    kind: Vec<u8>,
    request: Vec<u64>,
    replica: Vec<u32>,
    generation: Vec<u64>,
    tenant: Vec<u32>,
    a: Vec<u64>,
    b: Vec<u64>,
    extra: Vec<Vec<u64>>,
}

/// What an instance has been told: the highest number per kind of name.
#[derive(Debug, Default)]
pub(crate) struct Told {
    names: [u32; NAME_KINDS.len()],
}

/// One batch for one call.
#[derive(Clone, Copy)]
struct Batch<'a> {
    columns: &'a Columns,
    names: &'a Names,
    dropped: u64,
}

// === impl TelemetrySlot ===

impl TelemetrySlot {
    /// Shows a batch to the guest: those kinds of event that it wants, with the names that it has not seen. `dropped`
    /// counts the events that the ring lost. A guest that faults or is off misses the batch.
    pub fn on_events(&self, now: Micros, events: &[Event], names: &Names, dropped: u64) -> Vec<Alert> {
        let mut alerts = Vec::new();
        let mut columns = std::mem::take(&mut *self.buffers.lock().unwrap_or_else(PoisonError::into_inner));
        let mut dropped = dropped;
        for events in events.chunks(MAX_BATCH) {
            self.show(now, &mut columns, (events, names, std::mem::take(&mut dropped)), &mut alerts);
        }
        if dropped > 0 {
            self.show(now, &mut columns, (&[], names, dropped), &mut alerts);
        }
        *self.buffers.lock().unwrap_or_else(PoisonError::into_inner) = columns;
        alerts
    }

    /// Answers whoever prepares the next generation. To be called often, by the thread that calls
    /// [`on_events`](Self::on_events).
    pub fn attend(&self, now: Micros) {
        if let Some(guest) = &self.core.enter().guest {
            guest.answer_working(now);
        }
    }

    fn show(
        &self,
        now: Micros,
        columns: &mut Columns,
        (events, names, dropped): (&[Event], &Names, u64),
        alerts: &mut Vec<Alert>,
    ) {
        let generation = self.core.enter();
        let Some(guest) = &generation.guest else { return };
        columns.gather(events, &guest.wants);
        if columns.at.is_empty() && dropped == 0 {
            return;
        }
        let admit = guest.admit(now);
        let mut kept = if admit == Admit::No { None } else { guest.take_working() };
        if kept.is_none() && admit == Admit::Trial {
            guest.trial_withdrawn();
        }
        let what = (Call::OnEvents, guest.budgets().on_events);
        let batch = Batch { columns, names, dropped };
        let answer = guest.call(&mut kept, now, what, |instance, hard| call(instance, hard, now, batch));
        kept.into_iter().for_each(|instance| guest.keep_working(instance, now));
        let Some(raised) = answer else { return guest.fell_back() };
        if admit == Admit::Trial {
            guest.trial_passed(guest.last_number());
        }
        alerts.extend(raised.into_iter().map(|alert| lift_alert(alert, &self.core.name, &guest.revision)));
    }
}

fn call(
    instance: &mut Instance<TelemetryHook>,
    hard: Micros,
    now: Micros,
    batch: Batch<'_>,
) -> Result<Vec<wit::Alert>, Fault> {
    let Batch { columns, names, dropped } = batch;
    let fresh: Vec<(usize, u32, Arc<str>)> = (0..NAME_KINDS.len())
        .flat_map(|kind| {
            let since = names.since(NAME_KINDS[kind], instance.local.names[kind]);
            since.into_iter().map(move |(number, name)| (kind, number, name))
        })
        .collect();
    let new_names: Vec<(&str, u32, &str)> =
        fresh.iter().map(|(kind, number, name)| (NAME_KINDS[*kind].as_str(), *number, &**name)).collect();
    let extra: Vec<&[u64]> = columns.extra.iter().map(Vec::as_slice).collect();
    let events = wit::Events {
        at: &columns.at,
        kind: &columns.kind,
        request: &columns.request,
        replica: &columns.replica,
        generation: &columns.generation,
        tenant: &columns.tenant,
        a: &columns.a,
        b: &columns.b,
        extra: &extra,
        new_names: &new_names,
    };
    let alerts = instance.call(hard, now, |guest, store| {
        guest.pointsman_policy_telemetry().call_on_events(store, now, events, dropped)
    })?;
    for (kind, number, _) in &fresh {
        instance.local.names[*kind] = instance.local.names[*kind].max(*number);
    }
    if alerts.len() > MAX_ALERTS {
        let text = format!("{} alerts for one batch; at most {MAX_ALERTS} are possible", alerts.len());
        return Err(Fault::new(FaultKind::BadAnswer, text));
    }
    Ok(alerts)
}

fn lift_alert(alert: wit::Alert, slot: &Arc<str>, revision: &Arc<str>) -> Alert {
    let (mut title, mut text) = (alert.title, alert.text);
    truncate(&mut title, MAX_TITLE);
    truncate(&mut text, MAX_TEXT);
    let severity = match alert.severity {
        wit::Severity::Info => Severity::Info,
        wit::Severity::Warning => Severity::Warning,
        wit::Severity::Critical => Severity::Critical,
    };
    Alert { severity, title, text, slot: Arc::clone(slot), revision: Arc::clone(revision) }
}

// === impl Severity ===

impl Severity {
    /// The word used in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

// === impl Columns ===

impl Columns {
    /// Replaces the contents by the wanted ones of `events`.
    fn gather(&mut self, events: &[Event], wants: &Wants) {
        for column in [&mut self.at, &mut self.request, &mut self.generation, &mut self.a, &mut self.b] {
            column.clear();
        }
        for column in [&mut self.replica, &mut self.tenant] {
            column.clear();
        }
        self.kind.clear();
        self.extra.resize_with(wants.columns.len(), Vec::new);
        self.extra.iter_mut().for_each(Vec::clear);
        for event in events.iter().filter(|event| wants.event(event.kind)) {
            self.at.push(event.at);
            self.kind.push(event.kind as u8);
            self.request.push(event.request);
            self.replica.push(event.replica);
            self.generation.push(event.generation);
            self.tenant.push(event.tenant);
            self.a.push(event.a);
            self.b.push(event.b);
            for (values, column) in self.extra.iter_mut().zip(&wants.columns) {
                values.push(match column {
                    EventColumn::Variant => u64::from(event.variant),
                    EventColumn::Priority => u64::from(event.priority),
                    EventColumn::PromptTokens => u64::from(event.prompt_tokens),
                    EventColumn::CachedTokens => u64::from(event.cached_tokens),
                });
            }
        }
    }
}

impl Hook for TelemetryHook {
    const WORLD: World = World::Telemetry;
    const MAX_ANSWER_BYTES: usize = 1 << 20;
    type Local = Told;
    hook_bindings!(Telemetry, telemetry, TelemetryIndices, Telemetry);

    fn probe(instance: &mut Instance<Self>, wants: &Wants, budgets: &Budgets, now: Micros) -> Result<(), ProbeFault> {
        let names = Names::default();
        let tenant = names.intern(NameKind::Tenant, "probe");
        let events: Vec<Event> = EventKind::ALL
            .iter()
            .map(|&kind| Event { request: 1, replica: 1, tenant, a: 1_000, b: 1, ..Event::new(now, kind) })
            .collect();
        let mut columns = Columns::default();
        for (case, events, dropped) in [("no events", &events[..0], 1), ("one event of each kind", &events[..], 0)] {
            columns.gather(events, wants);
            call(instance, budgets.on_events.hard, now, Batch { columns: &columns, names: &names, dropped })
                .map_err(|fault| ProbeFault { case, call: Call::OnEvents, fault })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wanted_kinds_and_columns_are_gathered() {
        let events: Vec<Event> = (0..4)
            .map(|i| Event {
                request: i,
                prompt_tokens: 10 + i as u32,
                ..Event::new(i, if i % 2 == 0 { EventKind::Finished } else { EventKind::Step })
            })
            .collect();
        let wants = Wants {
            events: 1 << EventKind::Finished as u8,
            columns: vec![EventColumn::PromptTokens, EventColumn::Priority],
            ..Wants::default()
        };
        let mut columns = Columns::default();
        for _ in 0..2 {
            columns.gather(&events, &wants);
            assert_eq!(columns.request, [0, 2]);
            assert_eq!(columns.kind, [3, 3]);
            assert_eq!(columns.extra, [vec![10, 12], vec![2, 2]]);
        }
    }
}
