//! Sums events of replicas into intervals, asks control what is unusual about them, and says so in log, journal and metrics.
//!
//! On the observer thread, after the telemetry hooks: a hook is an operator's own opinion, this is the host's.

use std::collections::BTreeMap;

use pointsman_control::{AnomalyConfig, AnomalyWatch, Finding, Happened, Interval, Metric, SeriesKey, Unusual};
use pointsman_telemetry::{Event, EventKind, Metrics, Micros, NameKind, Names};

use crate::clock::seconds;

/// Length of an interval, in microseconds.
const INTERVAL_US: Micros = 10_000_000;

/// The watch and the interval that is being filled.
#[derive(Debug)]
pub(crate) struct Anomalies {
    watch: AnomalyWatch,
    open: BTreeMap<SeriesKey, Interval>,
    /// When the open interval ends.
    ends: Micros,
}

// === impl Anomalies ===

impl Anomalies {
    pub(crate) fn new(now: Micros) -> Self {
        Self { watch: AnomalyWatch::new(AnomalyConfig::default()), open: BTreeMap::new(), ends: now + INTERVAL_US }
    }

    /// Takes a batch of events.
    pub(crate) fn take(&mut self, events: &[Event]) {
        for event in events {
            match event.kind {
                EventKind::FirstToken => self.add(event, Metric::Ttft, seconds(event.a)),
                EventKind::Finished => {
                    self.add(event, Metric::TimePerToken, seconds(event.a) / event.b.max(1) as f64);
                    self.add(event, Metric::Failures, 0.0);
                }
                EventKind::Failed => self.add(event, Metric::Failures, 1.0),
                _ => {}
            }
        }
    }

    /// Closes the interval when it is over; what changed goes to `note` as well.
    pub(crate) fn close(&mut self, now: Micros, names: &Names, metrics: &Metrics, mut note: impl FnMut(Happened)) {
        if now < self.ends {
            return;
        }
        self.ends = now + INTERVAL_US;
        for finding in self.watch.interval(&std::mem::take(&mut self.open)) {
            let replica = names.name(NameKind::Replica, finding.series.replica);
            let (metric, detail) = (finding.series.metric.as_str(), detail(&finding));
            if finding.unusual.is_some() {
                metrics.alert("warning", "host");
                tracing::warn!(%replica, metric, value = finding.value, "unusual: {detail}");
            } else {
                tracing::info!(%replica, metric, value = finding.value, "{detail}");
            }
            note(Happened::Anomaly {
                replica: replica.to_string(),
                metric: metric.to_owned(),
                value: finding.value,
                baseline: finding.baseline,
                detail,
            });
        }
    }

    fn add(&mut self, event: &Event, metric: Metric, value: f64) {
        let key = SeriesKey { metric, variant: event.variant, replica: event.replica };
        let interval = self.open.entry(key).or_insert(Interval { count: 0, sum: 0.0 });
        interval.count += 1;
        interval.sum += value;
    }
}

fn detail(finding: &Finding) -> String {
    match finding.unusual {
        Some(Unusual::Drift { mean, limit }) => {
            format!("the moving mean {mean:.4} is above its control limit {limit:.4}")
        }
        Some(Unusual::Outlier { z }) => format!("{z:.0} robust standard deviations above its median"),
        Some(Unusual::Peer { median, peers }) => {
            format!("the median of the {peers} other replicas of this variant is {median:.4}")
        }
        None => "usual again".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_replica_is_journalled_by_name_once_and_again_when_it_recovered() {
        let (names, metrics) = (Names::default(), Metrics::new());
        let replica = names.intern(NameKind::Replica, "demo:f16@cpu");
        let mut anomalies = Anomalies::new(1);
        let mut noted = Vec::new();
        for interval in 1..=40_u64 {
            let ttft_us = if interval == 20 { 900_000 } else { 50_000 + interval % 3 * 1_000 };
            let first = Event { replica, variant: 1, a: ttft_us, ..Event::new(interval, EventKind::FirstToken) };
            anomalies.take(&[first; 30]);
            anomalies.close(1 + interval * INTERVAL_US, &names, &metrics, |what| noted.push((interval, what)));
        }
        let words: Vec<String> = noted
            .iter()
            .map(|(at, what)| match what {
                Happened::Anomaly { replica, metric, detail, .. } => format!("{at} {replica} {metric}: {detail}"),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(words.len(), 2, "{words:?}");
        assert!(words[0].starts_with("20 demo:f16@cpu time to first token: "), "{words:?}");
        assert!(words[1].ends_with("usual again"), "{words:?}");
        assert!(metrics.render().contains(r#"pointsman_alerts_total{severity="warning",source="host"} 1"#));
    }

    #[test]
    fn an_interval_closes_when_it_is_over_and_not_before() {
        let mut anomalies = Anomalies::new(1);
        anomalies.take(&[Event::new(2, EventKind::Failed)]);
        anomalies.close(INTERVAL_US, &Names::default(), &Metrics::new(), |_| ());
        assert_eq!(anomalies.open.len(), 1);
        anomalies.close(1 + INTERVAL_US, &Names::default(), &Metrics::new(), |_| ());
        assert!(anomalies.open.is_empty());
    }
}
