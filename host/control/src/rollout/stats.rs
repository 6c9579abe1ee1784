//! Asymptotic confidence sequences and the sample-ratio test: the arithmetic behind every automatic decision of a rollout.
//!
//! The sequences (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic
//! confidence sequences", 2023) hold at every look at once, so a rollout may look after every period; a t-test repeated
//! like that would raise false alarms without bound. Sums are integers: a journal replays to the same bits.

use serde::{Deserialize, Serialize};

/// Count, sum and sum of squares of differences in micro-units; enough for a mean and a variance, exact in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// Values.
    pub n: u64,
    /// Their sum.
    pub sum: i64,
    /// Sum of their squares.
    pub squares: i64,
}

/// Level of a confidence sequence and the size at which it is narrowest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Level {
    /// Chance that the sequence ever misses the truth.
    pub alpha: f64,
    /// Number of values at which a decision is usually taken.
    pub expected: f64,
}

/// The chi-square value with one degree of freedom that chance exceeds once in a thousand times.
pub(super) const CHI_SQUARE_0_001: f64 = 10.828;

// === impl Moments ===

impl Moments {
    /// Takes one value in.
    pub fn add(&mut self, value: i64) {
        self.n += 1;
        self.sum = self.sum.saturating_add(value);
        self.squares = self.squares.saturating_add(value.saturating_mul(value));
    }

    /// Takes other values in.
    pub fn merge(&mut self, other: &Self) {
        self.n += other.n;
        self.sum = self.sum.saturating_add(other.sum);
        self.squares = self.squares.saturating_add(other.squares);
    }

    /// Mean; 0 of nothing.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.n == 0 { 0.0 } else { self.sum as f64 / self.n as f64 }
    }

    /// Sample variance; infinite below two values.
    #[must_use]
    pub fn variance(&self) -> f64 {
        if self.n < 2 {
            return f64::INFINITY;
        }
        let n = i128::from(self.n);
        let spread = n * i128::from(self.squares) - i128::from(self.sum) * i128::from(self.sum);
        spread.max(0) as f64 / (n * (n - 1)) as f64
    }
}

// === impl Level ===

impl Level {
    fn rho_squared(alpha: f64, expected: f64) -> f64 {
        let log = -2.0 * alpha.ln();
        (log + (log + 1.0).ln()) / expected
    }

    /// Half-width of the two-sided sequence: the mean of the truth lies within it, at every look, but for `alpha`.
    #[must_use]
    pub(super) fn two_sided(&self, values: &Moments) -> f64 {
        let rho_squared = Self::rho_squared(self.alpha, self.expected);
        Self::width(values, rho_squared, |root| (root / self.alpha).ln())
    }

    /// Distance from the mean to the one-sided bound, lower or upper.
    #[must_use]
    pub(super) fn one_sided(&self, values: &Moments) -> f64 {
        let rho_squared = Self::rho_squared(2.0 * self.alpha, self.expected);
        Self::width(values, rho_squared, |root| (1.0 + root / (2.0 * self.alpha)).ln())
    }

    fn width(values: &Moments, rho_squared: f64, log: impl Fn(f64) -> f64) -> f64 {
        let variance = values.variance();
        if !variance.is_finite() {
            return f64::INFINITY;
        }
        let n = values.n as f64;
        let grown = n * rho_squared + 1.0;
        variance.sqrt() * (2.0 * grown * log(grown.sqrt())).sqrt() / (n * rho_squared.sqrt())
    }
}

/// Chi-square statistic, with one degree of freedom, of the deviations of a split from its plan. Where time is split there is
/// one per period, measured against the spread of all of them and not against a Poisson count: requests come in bursts. Where
/// units are split there is one per unit, measured against the spread that chance gives it, because each unit is assigned by
/// itself.
#[must_use]
pub(super) fn chi_square(deviations: &Moments) -> f64 {
    if deviations.squares == 0 { 0.0 } else { (deviations.sum as f64).powi(2) / deviations.squares as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[i64]) -> Moments {
        let mut moments = Moments::default();
        values.iter().for_each(|v| moments.add(*v));
        moments
    }

    #[test]
    fn mean_and_variance_are_the_textbooks() {
        for (values, mean, variance) in [
            (&[][..], 0.0, f64::INFINITY),
            (&[5], 5.0, f64::INFINITY),
            (&[1, 2, 3, 4], 2.5, 5.0 / 3.0),
            (&[-1_000_000, 1_000_000], 0.0, 2e12),
            (&[7, 7, 7], 7.0, 0.0),
        ] {
            let found = moments(values);
            assert!((found.mean() - mean).abs() < 1e-12, "{values:?}: {}", found.mean());
            assert!(found.variance() == variance || (found.variance() / variance - 1.0).abs() < 1e-12, "{values:?}");
        }
    }

    #[test]
    fn half_widths_match_the_published_formula() {
        // n = 100, variance 1, alpha 0.05, N* = 100: rho^2 = (-2 ln 0.05 + ln(1 - 2 ln 0.05)) / 100 = 0.07937,
        // sqrt(2 * 8.937 * ln(sqrt(8.937) / 0.05)) / (100 * 0.28173) = 0.3035.
        let unit: Vec<i64> = (0..100).map(|i| if i % 2 == 0 { 995 } else { -995 }).collect();
        let values = moments(&unit);
        let level = Level { alpha: 0.05, expected: 100.0 };
        assert!((values.variance() / 1e6 - 1.0).abs() < 1e-3, "{}", values.variance());
        assert!((level.two_sided(&values) / 1_000.0 - 0.3035).abs() < 1e-3, "{}", level.two_sided(&values));
        // One-sided at 0.05: rho(0.1)^2 = (4.6052 + ln 5.6052) / 100 = 0.06329; ln(1 + sqrt(7.329) / 0.1) = 3.3349;
        // sqrt(2 * 7.329 * 3.3349) / (100 * 0.25157) = 0.2779.
        assert!((level.one_sided(&values) / 1_000.0 - 0.2779).abs() < 1e-3, "{}", level.one_sided(&values));
        assert_eq!(level.one_sided(&moments(&[3])), f64::INFINITY);
    }

    #[test]
    fn a_lopsided_split_is_seen_and_an_even_one_is_not() {
        let swing = |n: i64, size: i64, drift: i64| {
            moments(&(0..n).map(|i| drift + if i % 2 == 0 { size } else { -size }).collect::<Vec<_>>())
        };
        for (deviations, fails) in [
            (Moments::default(), false),
            (swing(100, 5_000, 0), false),
            (swing(100, 5_000, 1_000), false),
            (swing(100, 5_000, 2_000), true),
            (swing(10, 0, 9_000), false),
            (swing(12, 0, 9_000), true),
        ] {
            assert_eq!(chi_square(&deviations) > CHI_SQUARE_0_001, fails, "{deviations:?}");
        }
    }
}
