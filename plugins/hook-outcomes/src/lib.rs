//! Telemetry hook: learns what requests cost on each replica, for `route-bandit`.
//!
//! The cost of a request is its time from end to end per token of work, the queue counted in: a client does not care why a
//! replica is slow. Work is the tokens generated, `prompt_percent` of the prompt tokens computed, and `request_tokens` for
//! the request itself, so that long and short requests give comparable numbers. A failed request counts as one that took
//! `failed_ms`: a replica must not look good by failing. What clients cancelled counts for nothing.
//!
//! Each outcome loses half of its weight within `half_life_s`. The table goes to the host's state after every batch and is
//! read back by a new instance. Both policies must be told the same namespace: `"state_namespace": "outcomes"` in the
//! activation of this hook and of the router.
//!
//! Configuration: `half_life_s` (60), `prompt_percent` (10), `request_tokens` (16), `failed_ms` (30000).

use outcomes::{KEY, STATE_SCHEMA, Table};
use pointsman_plugin::{Alert, EventKind, Events, HostInfo, Manifest, Micros, Policy, Telemetry, state};
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
}

pointsman_plugin::telemetry!(Outcomes);

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
        Ok(Self { config, table, faded: 0 })
    }

    fn manifest(&self) -> Manifest {
        let wants = ["event.finished", "event.failed", "column.prompt-tokens", "column.cached-tokens"];
        Manifest { state_schema: STATE_SCHEMA, ..pointsman_plugin::manifest!().wants(wants) }
    }
}

impl Telemetry for Outcomes {
    fn on_events(&mut self, now: Micros, events: &Events, _dropped: u64) -> Vec<Alert> {
        self.fade(now);
        let column = |place: usize, row: usize| events.extra.get(place).and_then(|c| c.get(row)).copied().unwrap_or(0);
        for (row, event) in events.rows().enumerate() {
            let took = match event.kind {
                EventKind::Finished => event.a,
                EventKind::Failed => event.a.max(u64::from(self.config.failed_ms) * 1_000),
                _ => continue,
            };
            let computed = column(0, row).saturating_sub(column(1, row));
            let work = u64::from(self.config.request_tokens)
                + event.b
                + computed.saturating_mul(u64::from(self.config.prompt_percent)) / 100;
            self.table.add(event.replica, took as f64 / work as f64);
        }
        // The table is bounded below a value's limit, and the namespace holds nothing else.
        let _ = state::set(KEY, &self.table.encode());
        Vec::new()
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
    use pointsman_plugin::{Event, testing};

    const SECOND: u64 = 1_000_000;

    fn batch(rows: &[(EventKind, u32, u64, u64)], prompt: u64, cached: u64) -> Events {
        let event = |&(kind, replica, took_ms, tokens): &(EventKind, u32, u64, u64)| Event {
            kind,
            replica,
            a: took_ms * 1_000,
            b: tokens,
            ..Event::default()
        };
        let columns = vec![vec![prompt; rows.len()], vec![cached; rows.len()]];
        Events { extra: columns, ..testing::events(rows.iter().map(event)) }
    }

    fn stored() -> Table {
        Table::decode(&state::get(KEY).expect("a table"))
    }

    #[test]
    fn costs_are_per_token_of_work_and_failures_cost_more() {
        let mut hook: Outcomes = testing::start("").expect("a valid configuration");
        let rows = [
            (EventKind::Finished, 1, 100, 64),
            (EventKind::Failed, 2, 10, 64),
            (EventKind::Failed, 3, 40_000, 64),
            (EventKind::Cancelled, 4, 99_000, 1),
        ];
        // 16 for the request, 64 generated, a tenth of 200 computed.
        assert_eq!(hook.on_events(SECOND, &batch(&rows, 300, 100), 0), []);
        let means: Vec<_> = stored().rows().iter().map(|row| (row.replica, row.mean)).collect();
        assert_eq!(means, [(1, 1_000.0), (2, 300_000.0), (3, 400_000.0)]);
    }

    #[test]
    fn a_new_instance_goes_on_and_half_is_gone_after_a_half_life() {
        let config = r#"{"half_life_s": 10, "request_tokens": 1, "prompt_percent": 0}"#;
        let mut hook: Outcomes = testing::start(config).expect("a valid configuration");
        hook.on_events(100 * SECOND, &batch(&[(EventKind::Finished, 1, 10, 9)], 8, 0), 0);
        let mut hook: Outcomes = testing::start(config).expect("a valid configuration");
        hook.on_events(100 * SECOND, &batch(&[], 0, 0), 0);
        for tenth in 1..=100 {
            hook.on_events(100 * SECOND + tenth * SECOND / 10, &batch(&[], 0, 0), 0);
        }
        let stored = stored();
        let row = stored.get(1).expect("the outcome of the first instance");
        assert!((0.5..0.51).contains(&row.n) && row.mean == 1_000.0, "{row:?}");
    }

    #[test]
    fn nonsense_is_refused() {
        let error = testing::start::<Outcomes>(r#"{"half_life_s": 0}"#).expect_err("no half-life");
        assert!(error.contains("half_life_s"), "{error}");
    }
}
