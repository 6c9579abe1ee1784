//! Telemetry hook: learns what requests cost on each replica, for `route-bandit`.
//!
//! The cost of a request is its time in service per token of work, over how crowded the batch was meanwhile: how slow the
//! replica is, and not how much it had to do. What waits there now a router sees in its columns, long before outcomes tell; a
//! queue that is part of the outcome is one that a router runs away from when it is gone. Work is the tokens generated,
//! `prompt_percent` of the prompt tokens computed, and `request_tokens` for the request itself, so that long and short
//! requests give comparable numbers. A failed request counts as one that took `failed_ms`: a replica must not look good by
//! failing. What clients cancelled counts for nothing.
//!
//! Service begins when the queue ends, which the first token's event tells; the batch is counted by first tokens and ends. At
//! most 8,192 requests are followed: those whose events were lost are forgotten, the oldest first.
//!
//! Each outcome loses half of its weight within `half_life_s`. The table goes to the host's state after every batch and is
//! read back by a new instance. Both policies must be told the same namespace: `"state_namespace": "outcomes"` in the
//! activation of this hook and of the router.
//!
//! Configuration: `half_life_s` (60), `prompt_percent` (10), `request_tokens` (16), `failed_ms` (30000).

use std::collections::BTreeMap;

use outcomes::{KEY, STATE_SCHEMA, Table, crowding};
use pointsman_plugin::{
    Alert, Event, EventKind, Events, HostInfo, Manifest, Micros, Policy, RequestId, Telemetry, state,
};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    half_life_s: u32,
    prompt_percent: u32,
    request_tokens: u32,
    failed_ms: u32,
}

/// The policy.
#[derive(Debug)]
pub struct Outcomes {
    config: Config,
    table: Table,
    /// When the table faded last; 0 before the first batch.
    faded: Micros,
    batches: Batches,
}

/// Requests with a first token and no end.
#[derive(Debug, Default)]
struct Batches {
    live: BTreeMap<RequestId, Live>,
    /// How many of them a replica has.
    sizes: BTreeMap<u32, u32>,
}

/// A request in service.
#[derive(Clone, Copy, Debug)]
struct Live {
    replica: u32,
    /// Time that it waited for its place.
    queued: Micros,
    /// Requests in its batch when it came, itself included.
    batch: u32,
}

pointsman_plugin::telemetry!(Outcomes);

/// Most requests that are followed; the host admits fewer by default.
const MAX_LIVE: usize = 8_192;

impl Default for Config {
    fn default() -> Self {
        Self { half_life_s: 60, prompt_percent: 10, request_tokens: 16, failed_ms: 30_000 }
    }
}

impl Policy for Outcomes {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.half_life_s == 0 || config.request_tokens == 0 {
            return Err("half_life_s and request_tokens must be at least 1".to_owned());
        }
        let table = state::get(KEY).map(|bytes| Table::decode(&bytes)).unwrap_or_default();
        Ok(Self { config, table, faded: 0, batches: Batches::default() })
    }

    fn manifest(&self) -> Manifest {
        let wants = [
            "column.prompt-tokens",
            "column.cached-tokens",
            "event.first-token",
            "event.finished",
            "event.failed",
            "event.cancelled",
        ];
        Manifest { state_schema: STATE_SCHEMA, ..pointsman_plugin::manifest!().wants(wants) }
    }
}

impl Telemetry for Outcomes {
    fn on_events(&mut self, now: Micros, events: &Events, _dropped: u64) -> Vec<Alert> {
        self.fade(now);
        let column = |place: usize, row: usize| events.extra.get(place).and_then(|c| c.get(row)).copied().unwrap_or(0);
        for (row, event) in events.rows().enumerate() {
            let served = match event.kind {
                EventKind::FirstToken => {
                    self.batches.enter(&event);
                    continue;
                }
                EventKind::Finished | EventKind::Failed | EventKind::Cancelled => self.batches.leave(event.request),
                _ => continue,
            };
            let (took, batch) = match (event.kind, served) {
                (EventKind::Finished, Some((live, batch))) => (event.a.saturating_sub(live.queued), batch),
                (EventKind::Failed, _) => (event.a.max(u64::from(self.config.failed_ms) * 1_000), 1),
                _ => continue,
            };
            let computed = column(0, row).saturating_sub(column(1, row));
            let work = u64::from(self.config.request_tokens)
                + event.b
                + computed.saturating_mul(u64::from(self.config.prompt_percent)) / 100;
            self.table.add(event.replica, took as f64 / work as f64 / crowding(batch));
        }
        // The table is bounded below a value's limit, and the namespace holds nothing else.
        let _ = state::set(KEY, &self.table.encode());
        Vec::new()
    }
}

impl Batches {
    fn enter(&mut self, event: &Event) {
        self.leave(event.request);
        if self.live.len() >= MAX_LIVE
            && let Some((&oldest, _)) = self.live.first_key_value()
        {
            self.leave(oldest);
        }
        let size = self.sizes.entry(event.replica).or_default();
        *size += 1;
        self.live.insert(event.request, Live { replica: event.replica, queued: event.b, batch: *size });
    }

    /// What is known of a request that ends, and how large its batch was in the mean.
    fn leave(&mut self, request: RequestId) -> Option<(Live, u32)> {
        let live = self.live.remove(&request)?;
        let left = self.sizes.get_mut(&live.replica)?;
        let batch = (live.batch + *left).div_ceil(2);
        *left -= 1;
        if *left == 0 {
            self.sizes.remove(&live.replica);
        }
        Some((live, batch))
    }
}

impl Outcomes {
    /// A half-life in many small steps of `1 / (1 + x)`, which needs no exponential; one long step fades a little less.
    fn fade(&mut self, now: Micros) {
        let before = std::mem::replace(&mut self.faded, now);
        // A new instance does not know how old the table is: fresh, in all likelihood.
        let passed = if before == 0 { 0.0 } else { now.saturating_sub(before) as f64 };
        let half_life = f64::from(self.config.half_life_s) * 1e6;
        self.table.fade(1.0 / (1.0 + std::f64::consts::LN_2 * passed / half_life));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;

    const SECOND: u64 = 1_000_000;

    /// Events of requests: kind, request, replica, milliseconds (of a first token: in the queue), generated tokens.
    fn batch(rows: &[(EventKind, u64, u32, u64, u64)], prompt: u64, cached: u64) -> Events {
        let event = |&(kind, request, replica, ms, tokens): &(EventKind, u64, u32, u64, u64)| {
            let (a, b) = if kind == EventKind::FirstToken { (0, ms * 1_000) } else { (ms * 1_000, tokens) };
            Event { kind, request, replica, a, b, ..Event::default() }
        };
        let columns = vec![vec![prompt; rows.len()], vec![cached; rows.len()]];
        Events { extra: columns, ..testing::events(rows.iter().map(event)) }
    }

    fn stored() -> Table {
        Table::decode(&state::get(KEY).expect("a table"))
    }

    fn means() -> Vec<(u32, f64)> {
        stored().rows().iter().map(|row| (row.replica, row.mean)).collect()
    }

    #[test]
    fn costs_are_time_in_service_per_token_of_work_and_failures_cost_more() {
        use EventKind::{Cancelled, Failed, Finished, FirstToken};
        let mut hook: Outcomes = testing::start("").expect("a valid configuration");
        let rows = [
            (FirstToken, 11, 1, 40, 0),
            (Finished, 11, 1, 140, 64),
            (Failed, 12, 2, 10, 64),
            (Failed, 13, 3, 40_000, 64),
            (FirstToken, 14, 4, 0, 0),
            (Cancelled, 14, 4, 99_000, 1),
            // Its first token was not seen.
            (Finished, 15, 5, 100, 64),
        ];
        // 16 for the request, 64 generated, a tenth of 200 computed; alone in the batch.
        assert_eq!(hook.on_events(SECOND, &batch(&rows, 300, 100), 0), []);
        let alone = crowding(1);
        assert_eq!(means(), [(1, 1_000.0 / alone), (2, 300_000.0 / alone), (3, 400_000.0 / alone)]);
        assert!(hook.batches.live.is_empty() && hook.batches.sizes.is_empty());
    }

    #[test]
    fn a_full_batch_is_not_a_slow_replica() {
        use EventKind::{Finished, FirstToken};
        let config = r#"{"request_tokens": 1, "prompt_percent": 0}"#;
        let mut hook: Outcomes = testing::start(config).expect("a valid configuration");
        // Five at once on replica 1, each taking as much longer as its batch was larger.
        let of = |batch: u32| crowding(batch) as u64;
        let mut rows: Vec<_> = (1..=5).map(|id| (FirstToken, id, 1, 7, 0)).collect();
        rows.push((FirstToken, 6, 2, 0, 0));
        rows.extend((1..=5).map(|id| (Finished, id, 1, 7 + of(3), 9)));
        rows.push((Finished, 6, 2, of(1), 9));
        hook.on_events(SECOND, &batch(&rows, 8, 0), 0);
        assert_eq!(means(), [(1, 100.0), (2, 100.0)]);
    }

    #[test]
    fn what_never_ends_is_forgotten() {
        let mut hook: Outcomes = testing::start("").expect("a valid configuration");
        let rows: Vec<_> = (1..=10_000).map(|id| (EventKind::FirstToken, id, 1, 0, 0)).collect();
        hook.on_events(SECOND, &batch(&rows, 8, 0), 0);
        assert_eq!((hook.batches.live.len(), hook.batches.sizes.get(&1)), (MAX_LIVE, Some(&8_192)));
        assert!(hook.batches.leave(1).is_none() && hook.batches.leave(10_000).is_some());
    }

    #[test]
    fn a_new_instance_goes_on_and_half_is_gone_after_a_half_life() {
        let config = r#"{"half_life_s": 10, "request_tokens": 1, "prompt_percent": 0}"#;
        let mut hook: Outcomes = testing::start(config).expect("a valid configuration");
        let rows = [(EventKind::FirstToken, 1, 1, 0, 0), (EventKind::Finished, 1, 1, 10, 9)];
        hook.on_events(100 * SECOND, &batch(&rows, 8, 0), 0);
        let mut hook: Outcomes = testing::start(config).expect("a valid configuration");
        hook.on_events(100 * SECOND, &batch(&[], 0, 0), 0);
        for tenth in 1..=100 {
            hook.on_events(100 * SECOND + tenth * SECOND / 10, &batch(&[], 0, 0), 0);
        }
        let stored = stored();
        let row = stored.get(1).expect("the outcome of the first instance");
        assert!((0.5..0.51).contains(&row.n) && row.mean == 1_000.0 / crowding(1), "{row:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        let error = testing::start::<Outcomes>(r#"{"half_life_s": 0}"#).expect_err("no half-life");
        assert!(error.contains("half_life_s"), "{error}");
    }
}
