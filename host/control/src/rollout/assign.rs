//! Who is served by which arm: blocks of time for hooks that share capacity, hash buckets for arms that do not.
//!
//! Both are pure functions of the rollout's seed or id: no table of assignments to store, and a restart, a replay or another
//! node comes to the same answer. `rand` is not used because its streams may change between releases.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the two things compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// What served before.
    Control,
    /// What may serve from now on.
    Candidate,
}

/// Buckets that units hash into.
pub const BUCKETS: u16 = 10_000;

// === impl Arm ===

impl Arm {
    /// As in labels and documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Candidate => "candidate",
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The arms of a period's blocks, in order of time. A period is as short as the share allows: of 100/gcd(percent, 100)
/// blocks the candidate has exactly its share, at random places.
#[must_use]
pub(super) fn blocks(seed: u64, period: u64, percent: u8) -> Vec<Arm> {
    let percent = u64::from(percent.min(100));
    let common = gcd(percent, 100);
    let (n, n_candidate) = (100 / common, percent / common);
    let mut random = Random::new(seed, period);
    let mut arms: Vec<Arm> = (0..n).map(|i| if i < n_candidate { Arm::Candidate } else { Arm::Control }).collect();
    for last in (1..arms.len()).rev() {
        arms.swap(last, random.below(last as u64 + 1) as usize);
    }
    arms
}

/// The hash of a unit (tenant, session or request) in a rollout.
#[must_use]
pub fn unit_hash(rollout: &str, unit: &str) -> u64 {
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    // 0xff is in no UTF-8 text: salt and unit cannot be confused.
    let bytes = rollout.bytes().chain([0xff]).chain(unit.bytes());
    mixed(bytes.fold(0xcbf2_9ce4_8422_2325, fnv))
}

/// The bucket of a hash: 0 to 9,999.
#[must_use]
pub fn bucket(hash: u64) -> u16 {
    ((u128::from(hash) * u128::from(BUCKETS)) >> 64) as u16
}

/// The arm of a bucket: a unit that is once the candidate's stays so while the share grows.
#[must_use]
pub fn arm_of(bucket: u16, percent: u8) -> Arm {
    if bucket < u16::from(percent.min(100)) * (BUCKETS / 100) { Arm::Candidate } else { Arm::Control }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        Self(seed ^ mixed(stream.wrapping_add(0x9e37_79b9_7f4a_7c15)))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    /// A number below `bound`, by the high bits of a product; the bias is below 2^-57 for the bounds of a period.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_exactly_the_share_at_random_places() {
        for (percent, n, n_candidate) in
            [(0, 1, 0), (1, 100, 1), (5, 20, 1), (10, 10, 1), (25, 4, 1), (33, 100, 33), (50, 2, 1), (100, 1, 1)]
        {
            let mut firsts = 0;
            for period in 0..200 {
                let arms = blocks(7, period, percent);
                let candidates = arms.iter().filter(|a| **a == Arm::Candidate).count();
                assert_eq!((arms.len(), candidates), (n, n_candidate), "{percent}");
                assert_eq!(arms, blocks(7, period, percent), "a pure function");
                firsts += usize::from(arms[0] == Arm::Candidate);
            }
            let expected = 200 * usize::from(percent) / 100;
            assert!(firsts.abs_diff(expected) <= 30, "{percent} %: the candidate is first {firsts} times of 200");
        }
    }

    #[test]
    fn buckets_are_even_sticky_and_salted() {
        let units: Vec<String> = (0..20_000).map(|i| format!("tenant-{i}")).collect();
        let share = |salt: &str, percent| {
            units.iter().filter(|u| arm_of(bucket(unit_hash(salt, u)), percent) == Arm::Candidate).count() as f64
                / 20_000.0
        };
        for percent in [0, 1, 10, 50, 100] {
            let found = share("r1", percent);
            assert!((found - f64::from(percent) / 100.0).abs() < 0.015, "{percent} %: {found}");
        }
        let stays = |u: &String| {
            let bucket = bucket(unit_hash("r1", u));
            (1..100).all(|p| arm_of(bucket, p) == Arm::Control || arm_of(bucket, p + 1) == Arm::Candidate)
        };
        assert!(units.iter().all(stays), "growing shares move nobody back");
        let both = |u: &&String| ["r1", "r2"].iter().all(|r| arm_of(bucket(unit_hash(r, u)), 50) == Arm::Candidate);
        let both = units.iter().filter(both).count();
        assert!(both.abs_diff(5_000) < 300, "two rollouts split independently: {both}");
    }
}
