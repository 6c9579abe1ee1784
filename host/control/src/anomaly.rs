//! Notices when a replica is unlike its own past or unlike its peers, so that an operator hears of it before the clients.
//!
//! Pure: the app sums events into intervals and feeds them with their number; what is unusual comes back. Two tests on each
//! series, because they see different things: a control chart of the exponentially weighted mean (Roberts 1959) finds a small
//! shift that stays, a robust z-score (median and MAD, Iglewicz and Hoaglin 1993) finds a large one at once. A third compares
//! the replicas of one variant. It never acts: missing or thin data says nothing, and what to do is the operator's choice.

use std::collections::{BTreeMap, VecDeque};

/// A quantity that is watched. All of them are means over an interval, and more is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metric {
    /// Time to first token, in seconds.
    Ttft,
    /// End-to-end time per generated token, in seconds.
    TimePerToken,
    /// Share of requests that the host or the device failed.
    Failures,
}

/// One series: a metric of one replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeriesKey {
    /// What is measured.
    pub metric: Metric,
    /// Number of the variant that the replica serves: peers are compared within it.
    pub variant: u32,
    /// Number of the replica.
    pub replica: u32,
}

/// Observations of one interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// How many.
    pub count: u64,
    /// Their sum, in the metric's unit.
    pub sum: f64,
}

/// When something counts as unusual.
#[derive(Clone, Debug, PartialEq)]
pub struct AnomalyConfig {
    /// Weight of the newest interval in the moving mean, above 0 and at most 1.
    pub weight: f64,
    /// Width of the control limits, in standard deviations of the moving mean.
    pub limit: f64,
    /// Robust z-score from which one interval alone is unusual.
    pub outlier: f64,
    /// A replica is unlike its peers when it is this many times worse than their median.
    pub peer_ratio: f64,
    /// Intervals of the baseline.
    pub window: usize,
    /// Intervals that a baseline needs before it judges.
    pub min_intervals: usize,
    /// Observations that an interval needs to be judged or remembered.
    pub min_count: u64,
    /// Most series; beyond, new ones are not watched.
    pub max_series: usize,
}

/// How something is unusual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unusual {
    /// The moving mean left its control limits: a shift that stays.
    Drift {
        /// The moving mean.
        mean: f64,
        /// The upper control limit.
        limit: f64,
    },
    /// One interval far beyond the baseline.
    Outlier {
        /// Its robust z-score.
        z: f64,
    },
    /// Much worse than the replicas beside it.
    Peer {
        /// The median of the others.
        median: f64,
        /// How many others.
        peers: usize,
    },
}

/// A series that became unusual, or is usual again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finding {
    /// Which.
    pub series: SeriesKey,
    /// Mean of the interval.
    pub value: f64,
    /// Median of its baseline, where it has one.
    pub baseline: Option<f64>,
    /// How it is unusual; `None` when it is usual again.
    pub unusual: Option<Unusual>,
}

/// Every watched series.
#[derive(Clone, Debug)]
pub struct AnomalyWatch {
    config: AnomalyConfig,
    series: BTreeMap<SeriesKey, Series>,
}

#[derive(Clone, Debug, Default)]
struct Series {
    /// Means of past intervals that were usual.
    baseline: VecDeque<f64>,
    moving: Option<f64>,
    /// Intervals for which it has been unusual.
    alarmed: usize,
}

/// Consistency constant that makes the MAD of normal data its standard deviation.
const MAD_TO_SIGMA: f64 = 1.4826;
/// Spread below which a baseline is taken to be this share of its median: a series that hardly moves must not alarm at
/// every tick.
const MIN_RELATIVE_SIGMA: f64 = 0.05;
/// Smallest spread, for series whose median is zero, such as failures: a share of 1 %.
const MIN_SIGMA: f64 = 0.01;

// === impl AnomalyConfig ===

impl Default for AnomalyConfig {
    fn default() -> Self {
        Self {
            weight: 0.2,
            limit: 4.0,
            outlier: 8.0,
            peer_ratio: 2.0,
            window: 60,
            min_intervals: 12,
            min_count: 20,
            max_series: 1_024,
        }
    }
}

// === impl Metric ===

impl Metric {
    /// Its name in alerts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ttft => "time to first token",
            Self::TimePerToken => "time per token",
            Self::Failures => "failed requests",
        }
    }

    /// Spread below which nothing of this metric counts.
    fn min_sigma(self, median: f64) -> f64 {
        let floor = if self == Self::Failures { MIN_SIGMA } else { f64::MIN_POSITIVE };
        (median * MIN_RELATIVE_SIGMA).max(floor)
    }
}

// === impl AnomalyWatch ===

impl AnomalyWatch {
    /// Watches nothing yet.
    #[must_use]
    pub fn new(config: AnomalyConfig) -> Self {
        Self { config, series: BTreeMap::new() }
    }

    /// Takes one interval of every series that had traffic in it and returns what changed between usual and unusual.
    pub fn interval(&mut self, seen: &BTreeMap<SeriesKey, Interval>) -> Vec<Finding> {
        let means: BTreeMap<SeriesKey, f64> = seen
            .iter()
            .filter(|(_, interval)| interval.count >= self.config.min_count)
            .map(|(key, interval)| (*key, interval.sum / interval.count as f64))
            .collect();
        let mut findings = Vec::new();
        for (&key, &value) in &means {
            if !self.series.contains_key(&key) && self.series.len() >= self.config.max_series {
                continue;
            }
            let series = self.series.entry(key).or_default();
            let judged = series.judge(&self.config, key.metric, value);
            let unusual = judged.or_else(|| unlike_peers(&self.config, key, value, &means));
            let was = series.alarmed > 0;
            series.learn(&self.config, value, unusual.is_some());
            if was != (series.alarmed > 0) {
                findings.push(Finding { series: key, value, baseline: series.median(), unusual });
            }
        }
        findings
    }
}

fn unlike_peers(
    config: &AnomalyConfig,
    key: SeriesKey,
    value: f64,
    means: &BTreeMap<SeriesKey, f64>,
) -> Option<Unusual> {
    let beside = |k: &&SeriesKey| k.metric == key.metric && k.variant == key.variant && k.replica != key.replica;
    let mut others: Vec<f64> = means.keys().filter(beside).map(|k| means[k]).collect();
    // Of two, nobody can say which one is the odd one.
    let peers = others.len();
    let median = (peers >= 2).then(|| median(&mut others))?;
    let bound = (median * config.peer_ratio).max(median + config.limit * key.metric.min_sigma(median));
    (value > bound).then_some(Unusual::Peer { median, peers })
}

// === impl Series ===

impl Series {
    fn median(&self) -> Option<f64> {
        let mut values: Vec<f64> = self.baseline.iter().copied().collect();
        (!values.is_empty()).then(|| median(&mut values))
    }

    /// Judges an interval by the baseline before it.
    fn judge(&mut self, config: &AnomalyConfig, metric: Metric, value: f64) -> Option<Unusual> {
        if self.baseline.len() < config.min_intervals {
            return None;
        }
        let centre = self.median()?;
        let mut deviations: Vec<f64> = self.baseline.iter().map(|x| (x - centre).abs()).collect();
        let sigma = (MAD_TO_SIGMA * median(&mut deviations)).max(metric.min_sigma(centre));
        let mean = config.weight * value + (1.0 - config.weight) * self.moving.unwrap_or(centre);
        self.moving = Some(mean);
        let z = (value - centre) / sigma;
        let limit = centre + config.limit * sigma * (config.weight / (2.0 - config.weight)).sqrt();
        if z > config.outlier {
            Some(Unusual::Outlier { z })
        } else if mean > limit {
            Some(Unusual::Drift { mean, limit })
        } else {
            None
        }
    }

    /// Remembers a usual interval. What stays unusual for a whole window is the new normal: the baseline starts again.
    fn learn(&mut self, config: &AnomalyConfig, value: f64, unusual: bool) {
        if unusual && self.alarmed < config.window {
            self.alarmed += 1;
            return;
        }
        if unusual {
            self.baseline.clear();
            self.moving = None;
        }
        self.alarmed = 0;
        if self.baseline.len() == config.window {
            self.baseline.pop_front();
        }
        self.baseline.push_back(value);
    }
}

/// The median; of an even number the mean of the middle two. `values` is not empty.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let mid = values.len() / 2;
    if values.len() % 2 == 1 { values[mid] } else { (values[mid - 1] + values[mid]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(replica: u32) -> SeriesKey {
        SeriesKey { metric: Metric::Ttft, variant: 1, replica }
    }

    /// A deterministic noise of -1 to 1.
    fn noise(n: u64) -> f64 {
        let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((x >> 11) as f64 / (1_u64 << 53) as f64).mul_add(2.0, -1.0)
    }

    fn feed(watch: &mut AnomalyWatch, values: &[(SeriesKey, f64)], count: u64) -> Vec<Finding> {
        let seen = values.iter().map(|(k, v)| (*k, Interval { count, sum: v * count as f64 })).collect();
        watch.interval(&seen)
    }

    /// Feeds 40 usual intervals around 1 with 10 % of noise.
    fn usual() -> AnomalyWatch {
        let mut watch = AnomalyWatch::new(AnomalyConfig::default());
        for n in 0..40 {
            assert_eq!(feed(&mut watch, &[(key(1), 0.1_f64.mul_add(noise(n), 1.0))], 50), []);
        }
        watch
    }

    #[test]
    fn a_jump_is_seen_at_once_and_a_shift_within_a_few_intervals() {
        for (value, within) in [(3.0, 1), (1.3, 6)] {
            let mut watch = usual();
            let at = (1..=within).find(|_| !feed(&mut watch, &[(key(1), value)], 50).is_empty());
            assert!(at.is_some(), "{value} was not noticed within {within} intervals");
        }
        let mut watch = usual();
        for n in 0..500 {
            assert_eq!(feed(&mut watch, &[(key(1), 0.1_f64.mul_add(noise(n + 99), 1.0))], 50), [], "interval {n}");
        }
    }

    #[test]
    fn an_alarm_is_raised_once_and_ends_once() {
        let mut watch = usual();
        let raised = feed(&mut watch, &[(key(1), 9.0)], 50);
        assert!(matches!(raised[..], [Finding { unusual: Some(Unusual::Outlier { .. }), .. }]), "{raised:?}");
        assert_eq!(feed(&mut watch, &[(key(1), 9.0)], 50), []);
        // The moving mean needs a while to come back.
        let ends: usize = (0..20).map(|_| feed(&mut watch, &[(key(1), 1.0)], 50).len()).sum();
        assert_eq!(ends, 1);
    }

    #[test]
    fn thin_or_missing_data_says_nothing() {
        let mut watch = usual();
        assert_eq!(feed(&mut watch, &[(key(1), 9.0)], AnomalyConfig::default().min_count - 1), []);
        assert_eq!(feed(&mut watch, &[], 50), []);
        assert_eq!(feed(&mut watch, &[(key(2), 9.0)], 50), [], "no baseline, no peers");
    }

    #[test]
    fn a_replica_is_compared_with_its_peers_of_the_same_variant() {
        let mut watch = AnomalyWatch::new(AnomalyConfig::default());
        let other = SeriesKey { variant: 2, ..key(9) };
        assert_eq!(feed(&mut watch, &[(key(1), 1.0), (key(2), 5.0), (other, 1.0)], 50), [], "one peer is not enough");
        let found = feed(&mut watch, &[(key(1), 1.0), (key(2), 5.0), (key(3), 1.2)], 50);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].series, found[0].unusual), (key(2), Some(Unusual::Peer { median: 1.1, peers: 2 })));
    }

    #[test]
    fn what_stays_becomes_the_new_normal() {
        let mut watch = usual();
        let window = AnomalyConfig::default().window;
        let found: Vec<bool> = (0..=window)
            .flat_map(|_| feed(&mut watch, &[(key(1), 2.0)], 50))
            .map(|finding| finding.unusual.is_some())
            .collect();
        assert_eq!(found.first(), Some(&true), "raised");
        assert_eq!(found.len(), 2, "and ended: {found:?}");
        assert!((0..30).all(|_| feed(&mut watch, &[(key(1), 2.0)], 50).is_empty()));
    }

    #[test]
    fn a_rare_failure_is_not_an_anomaly_and_many_are() {
        let failures = SeriesKey { metric: Metric::Failures, ..key(1) };
        let mut watch = AnomalyWatch::new(AnomalyConfig::default());
        (0..20).for_each(|_| assert_eq!(feed(&mut watch, &[(failures, 0.0)], 100), []));
        assert_eq!(feed(&mut watch, &[(failures, 0.01)], 100), []);
        assert_eq!(feed(&mut watch, &[(failures, 0.5)], 100).len(), 1);
    }
}
