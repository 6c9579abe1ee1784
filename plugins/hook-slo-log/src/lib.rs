//! Telemetry hook: counts requests whose time to the first token or end-to-end time is over the objective, and raises an
//! alert when too many are.
//!
//! Time is cut into windows of `window_s` on the host's clock. The first event past a window's end closes it: one log line,
//! and one alert if the share of late requests was over `alert_percent` in at least `min_requests`. One alert per window at
//! most, because an alert per late request is silenced within a day. Windows instead of a moving average: the number in the
//! alert is one that an operator can recount. A window closes with the traffic; without traffic nothing is late.
//!
//! Failed requests count as late: a policy must not look good by failing. What the clients cancelled counts for nothing.
//!
//! Configuration: `ttft_ms` (1000), `e2e_ms` (30000), `window_s` (60), `alert_percent` (5), `min_requests` (20).

use pointsman_plugin::metrics::{Counter, Gauge};
use pointsman_plugin::{Alert, Event, EventKind, Events, HostInfo, Manifest, Micros, Policy, Severity, Telemetry, log};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    ttft_ms: u32,
    e2e_ms: u32,
    window_s: u32,
    alert_percent: u32,
    min_requests: u32,
}

/// The policy.
#[derive(Debug)]
pub struct SloLog {
    config: Config,
    late: Counter,
    checked: Counter,
    late_share: Gauge,
    window: Window,
}

/// What happened since `start`; both objectives count.
#[derive(Debug, Default)]
struct Window {
    start: Micros,
    checked: u32,
    late: u32,
    dropped: u64,
}

pointsman_plugin::telemetry!(SloLog);

impl Default for Config {
    fn default() -> Self {
        Self { ttft_ms: 1_000, e2e_ms: 30_000, window_s: 60, alert_percent: 5, min_requests: 20 }
    }
}

impl Policy for SloLog {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.window_s == 0 || config.alert_percent > 100 {
            return Err("window_s must be at least 1 and alert_percent at most 100".to_owned());
        }
        Ok(Self {
            config,
            late: Counter::register_labeled("slo_late_total", "Requests over an objective.", "objective"),
            checked: Counter::register_labeled(
                "slo_checked_total",
                "Requests compared with an objective.",
                "objective",
            ),
            late_share: Gauge::register("slo_late_ratio", "Share of late ones in the last window."),
            window: Window::default(),
        })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!().wants(["event.first-token", "event.finished", "event.failed"])
    }
}

impl Telemetry for SloLog {
    fn on_events(&mut self, _now: Micros, events: &Events, dropped: u64) -> Vec<Alert> {
        let mut alerts = Vec::new();
        for event in events.rows() {
            if event.at >= self.window.start + u64::from(self.config.window_s) * 1_000_000 {
                alerts.extend(self.close());
                self.window = Window { start: event.at, ..Window::default() };
            }
            self.count(&event);
        }
        self.window.dropped += dropped;
        alerts
    }
}

impl SloLog {
    fn count(&mut self, event: &Event) {
        let (objective, late) = match event.kind {
            EventKind::FirstToken => ("ttft", event.a > u64::from(self.config.ttft_ms) * 1_000),
            EventKind::Finished => ("e2e", event.a > u64::from(self.config.e2e_ms) * 1_000),
            EventKind::Failed => ("e2e", true),
            _ => return,
        };
        self.checked.add_for(objective, 1.0);
        self.window.checked += 1;
        if late {
            self.late.add_for(objective, 1.0);
            self.window.late += 1;
        }
    }

    fn close(&self) -> Option<Alert> {
        let Window { checked, late, dropped, .. } = self.window;
        if checked == 0 {
            return None;
        }
        self.late_share.set(f64::from(late) / f64::from(checked));
        let numbers = format!(
            "{late} of {checked} over {} ms to the first token or {} ms end to end, in {} s ({dropped} events lost)",
            self.config.ttft_ms, self.config.e2e_ms, self.config.window_s
        );
        log::info(&numbers);
        let over = u64::from(late) * 100 > u64::from(checked) * u64::from(self.config.alert_percent);
        let alert = Alert { severity: Severity::Warning, title: "latency objective missed".to_owned(), text: numbers };
        (over && checked >= self.config.min_requests).then_some(alert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;

    const SECOND: u64 = 1_000_000;

    fn event(at_s: u64, kind: EventKind, took_ms: u64) -> Event {
        Event { at: at_s * SECOND, kind, a: took_ms * 1_000, ..Event::default() }
    }

    fn hook(config: &str) -> SloLog {
        testing::start(config).expect("a valid configuration")
    }

    #[test]
    fn late_ones_are_counted_per_objective() {
        let mut hook = hook("");
        let rows = [
            event(100, EventKind::FirstToken, 1_001),
            event(101, EventKind::FirstToken, 1_000),
            event(102, EventKind::Finished, 30_001),
            event(103, EventKind::Failed, 5),
            event(104, EventKind::Cancelled, 99_000),
        ];
        assert_eq!(hook.on_events(1, &testing::events(rows), 0), []);
        for (name, objective, expect) in [
            ("slo_late_total", "ttft", 1.0),
            ("slo_checked_total", "ttft", 2.0),
            ("slo_late_total", "e2e", 2.0),
            ("slo_checked_total", "e2e", 2.0),
        ] {
            assert_eq!(testing::metric(name, Some(objective)), Some(expect), "{name} {objective}");
        }
    }

    #[test]
    fn a_bad_window_raises_one_alert_and_a_small_or_good_one_none() {
        let window = |n: u64, n_late: u64| {
            let mut hook = hook(r#"{"min_requests": 10}"#);
            let took_ms = |i| if i < n_late { 2_000 } else { 10 };
            let rows = (0..n).map(|i| event(100 + i, EventKind::FirstToken, took_ms(i)));
            let mut alerts = hook.on_events(1, &testing::events(rows), 3);
            alerts.extend(hook.on_events(2, &testing::events([event(160, EventKind::FirstToken, 9)]), 0));
            alerts.extend(hook.on_events(3, &testing::events([event(161, EventKind::FirstToken, 9)]), 0));
            alerts
        };
        for (n, n_late, n_alerts) in [(20, 2, 1), (20, 20, 1), (20, 1, 0), (9, 9, 0)] {
            assert_eq!(window(n, n_late).len(), n_alerts, "{n_late} of {n}");
        }
        let expect = "2 of 20 over 1000 ms to the first token or 30000 ms end to end, in 60 s (3 events lost)";
        assert_eq!(window(20, 2)[0].text, expect);
        assert!(testing::logged().iter().any(|(_, line)| line == expect));
        assert_eq!(testing::metric("slo_late_ratio", None), Some(0.1));
    }
}
