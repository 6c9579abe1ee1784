//! What a shadow's answers come to: counts per period, and the share that agrees with its confidence interval.
//!
//! The unit is the period, as in the other modes: decisions of one moment are alike, so answers are never taken for
//! independent. Agreement is evidence that a candidate does the same, not that it does better: no guard reads it, and nothing
//! is promoted by it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::spec::Spec;
use super::stats::{Level, Moments};

/// How a shadow answered, in a period or in all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Answers {
    /// Answers that come to the same as the active policy's.
    pub agreed: u64,
    /// Answers that do not, by kind.
    pub differed: BTreeMap<String, u64>,
    /// Decisions without an answer: the candidate faulted, or was off after a fault.
    pub unanswered: u64,
    /// Decisions of the sample that were not put to it, because it was behind.
    pub dropped: u64,
    /// Median time of its last calls, in nanoseconds.
    pub call_p50_ns: u64,
    /// The 99th percentile of the same.
    pub call_p99_ns: u64,
}

/// The numbers of a shadow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Periods with answers.
    pub n: u64,
    /// Mean of the periods' shares that agree. Absent before the first.
    pub share: Option<f64>,
    /// The share is at least this, at every look but for `alpha`. Absent before `min_periods`.
    pub lower: Option<f64>,
    /// The share is at most this.
    pub upper: Option<f64>,
    /// Everything that was counted.
    pub answers: Answers,
}

// === impl Answers ===

impl Answers {
    /// Decisions in which two answers were compared.
    #[must_use]
    pub fn compared(&self) -> u64 {
        self.differed.values().fold(self.agreed, |sum, n| sum.saturating_add(*n))
    }

    /// The share that agrees, in millionths; nothing where nothing was compared.
    pub(super) fn share(&self) -> Option<i64> {
        let compared = u128::from(self.compared());
        (compared > 0).then(|| i64::try_from(u128::from(self.agreed) * 1_000_000 / compared).unwrap_or(i64::MAX))
    }

    /// What has come since `before`; the times are the latest.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let earlier = |kind: &str| before.differed.get(kind).copied().unwrap_or(0);
        let differed = self.differed.iter().map(|(kind, n)| (kind.clone(), n.saturating_sub(earlier(kind))));
        Self {
            agreed: self.agreed.saturating_sub(before.agreed),
            differed: differed.filter(|(_, n)| *n > 0).collect(),
            unanswered: self.unanswered.saturating_sub(before.unanswered),
            dropped: self.dropped.saturating_sub(before.dropped),
            ..*self
        }
    }

    /// Adds what came later; its times are the latest, if it has any.
    pub fn add(&mut self, later: &Self) {
        for (kind, n) in &later.differed {
            let sum = self.differed.entry(kind.clone()).or_default();
            *sum = sum.saturating_add(*n);
        }
        for (sum, more) in [
            (&mut self.agreed, later.agreed),
            (&mut self.unanswered, later.unanswered),
            (&mut self.dropped, later.dropped),
        ] {
            *sum = sum.saturating_add(more);
        }
        if later.call_p99_ns > 0 {
            (self.call_p50_ns, self.call_p99_ns) = (later.call_p50_ns, later.call_p99_ns);
        }
    }
}

// === impl Agreement ===

impl Agreement {
    pub(super) fn of(spec: &Spec, shares: &Moments, answers: &Answers) -> Self {
        let level = Level { alpha: spec.alpha, expected: f64::from(spec.expected_periods) };
        let (mean, width) = (shares.mean() * 1e-6, level.two_sided(shares) * 1e-6);
        // Of a few periods, an asymptotic sequence says more than it knows.
        let enough = shares.n >= u64::from(spec.min_periods);
        let bound = |value: f64| (enough && value.is_finite()).then(|| value.clamp(0.0, 1.0));
        Self {
            n: shares.n,
            share: (shares.n > 0).then_some(mean),
            lower: bound(mean - width),
            upper: bound(mean + width),
            answers: answers.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::Mode;
    use super::*;

    fn answers(agreed: u64, differed: &[(&str, u64)]) -> Answers {
        let differed = differed.iter().map(|(kind, n)| ((*kind).to_owned(), *n)).collect();
        Answers { agreed, differed, unanswered: 1, dropped: 2, call_p50_ns: agreed, call_p99_ns: agreed }
    }

    #[test]
    fn periods_add_up_to_what_was_counted() {
        let (first, second) = (answers(3, &[("a", 1)]), answers(10, &[("a", 1), ("b", 4)]));
        let later = second.since(&first);
        let expect = Answers { unanswered: 0, dropped: 0, call_p50_ns: 10, call_p99_ns: 10, ..answers(7, &[("b", 4)]) };
        assert_eq!(later, expect);
        let mut sum = first;
        sum.add(&later);
        assert_eq!(sum, second);
        sum.add(&Answers::default());
        assert_eq!(sum, second, "a quiet period changes no time");
    }

    #[test]
    fn the_share_is_a_mean_of_periods_with_an_interval() {
        let spec = Spec { min_periods: 2, ..Spec::of(Mode::Shadow, 1) };
        for (periods, share, lower, upper) in [
            (&[][..], None, None, None),
            (&[answers(0, &[])], None, None, None),
            (&[answers(1, &[("a", 1)])], Some(0.5), None, None),
            (&[answers(9, &[]), answers(1, &[])], Some(1.0), Some(1.0), Some(1.0)),
            (&[answers(90, &[]), answers(0, &[("a", 1)])], Some(0.5), Some(0.0), Some(1.0)),
        ] {
            let mut shares = Moments::default();
            periods.iter().filter_map(Answers::share).for_each(|share| shares.add(share));
            let found = Agreement::of(&spec, &shares, &Answers::default());
            assert_eq!((found.share, found.lower, found.upper), (share, lower, upper), "{periods:?}");
        }
    }
}
