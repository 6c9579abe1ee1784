//! Which variant of a model serves whom: weights per alias, and a hash that keeps a tenant, a session or a request at one.
//!
//! An assignment is a pure function of alias, weights and unit: there is no table to store, and every host comes to the same
//! answer. Each variant has a run of buckets, in the order of the names; between two variants, growing the share of one moves
//! nobody back to the other. Rendezvous hashing would keep that for more than two, with logarithms of weights; operators
//! compare two.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::deployment::DocumentError;
use crate::rollout::{BUCKETS, Sticky, bucket};

/// Largest weight: with it, a weight of 1 is one bucket.
const MAX_WEIGHT: u32 = BUCKETS as u32;
/// Most variants of an alias.
const MAX_VARIANTS: usize = 64;

/// What an operator wants of an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredAlias {
    /// Weight by variant; none at all leaves the choice to the router.
    pub weights: BTreeMap<String, u32>,
    /// What stays at one variant.
    pub sticky: Sticky,
    /// Only if the alias's generation is this one.
    pub if_generation: Option<u64>,
}

/// An alias as it works, and its stored form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AliasDocument {
    /// Version of this layout: 1.
    pub format: u32,
    /// Which alias.
    pub alias: String,
    /// +1 at every change, never reused.
    pub generation: u64,
    /// Weight by variant; none at all leaves the choice to the router.
    pub weights: BTreeMap<String, u32>,
    /// What stays at one variant.
    pub sticky: Sticky,
}

/// Why an alias stays as it is. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AliasError {
    /// Somebody was faster.
    #[error("the generation of `{alias}` is {active}, not {expected}; read the alias again and decide anew")]
    Stale {
        /// The alias.
        alias: String,
        /// Its generation.
        active: u64,
        /// What the caller expected.
        expected: u64,
    },
    /// A weight out of bounds.
    #[error("the weight of `{variant}` is {weight}; weights are 0 to {MAX_WEIGHT}")]
    Weight {
        /// Whose.
        variant: String,
        /// The weight.
        weight: u32,
    },
    /// Nobody would serve.
    #[error("no weight is above 0; give one, or no weights at all to leave the choice to the router")]
    NoWeight,
    /// Too many of them.
    #[error("{found} variants have weights; {MAX_VARIANTS} is the most")]
    TooMany {
        /// How many.
        found: usize,
    },
}

/// Who asks for an alias.
#[derive(Clone, Copy, Debug)]
pub struct Unit<'a> {
    /// Its tenant.
    pub tenant: &'a str,
    /// Hash of its session, 0 without one.
    pub session: u64,
    /// Number of the request.
    pub request: u64,
}

/// Every alias that was ever changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases {
    by_name: BTreeMap<String, AliasDocument>,
}

// === impl AliasDocument ===

impl AliasDocument {
    /// An alias that nobody has changed: the router chooses.
    fn fresh(alias: &str) -> Self {
        Self { format: 1, alias: alias.to_owned(), generation: 0, weights: BTreeMap::new(), sticky: Sticky::default() }
    }

    /// Pretty JSON: people read these files.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_else(|error| unreachable!("a document is plain data: {error}"))
    }

    /// Reads a stored document.
    ///
    /// # Errors
    /// It is malformed or of a newer host.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(bytes)?;
        if document.format == 1 { Ok(document) } else { Err(DocumentError::Format { found: document.format }) }
    }

    /// The variant of a unit; none where the router chooses.
    #[must_use]
    pub fn assign(&self, unit: &Unit<'_>) -> Option<&str> {
        let total: u64 = self.weights.values().map(|weight| u64::from(*weight)).sum();
        if total == 0 {
            return None;
        }
        let bucket = match (self.sticky, unit.session) {
            (Sticky::Tenant, _) => bucket(&self.alias, unit.tenant),
            (Sticky::Session, session @ 1..) => bucket(&self.alias, &session.to_string()),
            (Sticky::Session, 0) | (Sticky::Request, _) => bucket(&self.alias, &unit.request.to_string()),
        };
        let mut place = u64::from(bucket) * total / u64::from(BUCKETS);
        for (variant, weight) in &self.weights {
            match place.checked_sub(u64::from(*weight)) {
                Some(rest) => place = rest,
                None => return Some(variant),
            }
        }
        None
    }
}

// === impl Aliases ===

impl Aliases {
    /// An alias as it works; the router chooses in one that nobody has changed.
    #[must_use]
    pub fn get(&self, alias: &str) -> AliasDocument {
        self.by_name.get(alias).cloned().unwrap_or_else(|| AliasDocument::fresh(alias))
    }

    /// The variant of a unit; none where the router chooses.
    #[must_use]
    pub fn assign(&self, alias: &str, unit: &Unit<'_>) -> Option<&str> {
        self.by_name.get(alias)?.assign(unit)
    }

    /// Checks a wish; returns the document to store and then to [`put`](Self::put).
    ///
    /// # Errors
    /// A stale `if_generation`, or weights that cannot work.
    pub fn plan(&self, alias: &str, desired: DesiredAlias) -> Result<AliasDocument, AliasError> {
        let active = self.get(alias).generation;
        if let Some(expected) = desired.if_generation.filter(|expected| *expected != active) {
            return Err(AliasError::Stale { alias: alias.to_owned(), active, expected });
        }
        let weights = desired.weights;
        if weights.len() > MAX_VARIANTS {
            return Err(AliasError::TooMany { found: weights.len() });
        }
        if let Some((variant, weight)) = weights.iter().find(|(_, weight)| **weight > MAX_WEIGHT) {
            return Err(AliasError::Weight { variant: variant.clone(), weight: *weight });
        }
        if !weights.is_empty() && weights.values().all(|weight| *weight == 0) {
            return Err(AliasError::NoWeight);
        }
        Ok(AliasDocument { generation: active + 1, weights, sticky: desired.sticky, ..AliasDocument::fresh(alias) })
    }

    /// Makes a document the truth: a planned one once it is stored, a stored one at the start.
    pub fn put(&mut self, document: AliasDocument) {
        self.by_name.insert(document.alias.clone(), document);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired(weights: &[(&str, u32)], sticky: Sticky) -> DesiredAlias {
        let weights = weights.iter().map(|(variant, weight)| ((*variant).to_owned(), *weight)).collect();
        DesiredAlias { weights, sticky, if_generation: None }
    }

    fn document(weights: &[(&str, u32)], sticky: Sticky) -> AliasDocument {
        Aliases::default().plan("m", desired(weights, sticky)).expect("good weights")
    }

    #[test]
    fn shares_are_as_the_weights() {
        for (weights, sticky) in [
            (&[("a", 1), ("b", 1)][..], Sticky::Tenant),
            (&[("a", 90), ("b", 10)], Sticky::Session),
            (&[("a", 0), ("b", 9_999), ("c", 1)], Sticky::Request),
            (&[("a", 3), ("b", 0), ("c", 5), ("d", 2)], Sticky::Tenant),
        ] {
            let document = document(weights, sticky);
            let total: u32 = weights.iter().map(|(_, weight)| weight).sum();
            let mut counts: BTreeMap<String, u32> = BTreeMap::new();
            for i in 0..40_000_u64 {
                let tenant = format!("tenant-{i}");
                let unit = Unit { tenant: &tenant, session: i + 1, request: i };
                *counts.entry(document.assign(&unit).expect("weights").to_owned()).or_default() += 1;
            }
            for (variant, weight) in weights {
                let found = f64::from(counts.get(*variant).copied().unwrap_or(0)) / 40_000.0;
                let expect = f64::from(*weight) / f64::from(total);
                assert!((found - expect).abs() < 0.01, "{weights:?} {variant}: {found}");
                assert!(*weight > 0 || found == 0.0, "a weight of 0 gets nobody");
            }
        }
    }

    #[test]
    fn what_sticks_stays() {
        let unit = |tenant, session, request| Unit { tenant, session, request };
        for (sticky, one, other) in [
            (Sticky::Tenant, unit("t", 1, 1), unit("t", 2, 2)),
            (Sticky::Session, unit("t", 1, 1), unit("u", 1, 2)),
            (Sticky::Request, unit("t", 1, 1), unit("u", 2, 1)),
        ] {
            let weights: Vec<(String, u32)> = (0..50).map(|i| (format!("v{i:02}"), 1)).collect();
            let weights: Vec<(&str, u32)> =
                weights.iter().map(|(variant, weight)| (variant.as_str(), *weight)).collect();
            let document = document(&weights, sticky);
            assert_eq!(document.assign(&one), document.assign(&other), "{sticky:?}");
        }
        let halves = document(&[("a", 1), ("b", 1)], Sticky::Session);
        let without: Vec<_> = (0..64).map(|request| halves.assign(&unit("t", 0, request))).collect();
        assert!(without.contains(&Some("a")) && without.contains(&Some("b")), "without a session by request");
        for session in 1..2_000 {
            let at =
                |a, b| document(&[("a", a), ("b", b)], Sticky::Session).assign(&unit("t", session, 0)) == Some("a");
            assert!(!at(10, 90) || at(50, 50), "a growing share moves nobody back");
        }
    }

    #[test]
    fn wishes_are_checked() {
        let mut aliases = Aliases::default();
        for (weights, error) in [
            (&[("a", 0)][..], Some(AliasError::NoWeight)),
            (&[("a", 10_001)], Some(AliasError::Weight { variant: "a".into(), weight: 10_001 })),
            (&[("a", 10_000), ("b", 0)], None),
            (&[], None),
        ] {
            assert_eq!(aliases.plan("m", desired(weights, Sticky::Tenant)).err(), error, "{weights:?}");
        }
        let unit = Unit { tenant: "t", session: 0, request: 0 };
        for generation in 1..3 {
            let planned = aliases.plan("m", desired(&[("a", 1)], Sticky::Tenant)).expect("a good wish");
            assert_eq!(planned.generation, generation);
            assert_eq!(AliasDocument::parse(planned.to_json().as_bytes()).expect("just written"), planned);
            aliases.put(planned);
        }
        assert_eq!((aliases.assign("m", &unit), aliases.assign("other", &unit)), (Some("a"), None));
        let stale = DesiredAlias { if_generation: Some(1), ..desired(&[], Sticky::Tenant) };
        assert!(matches!(aliases.plan("m", stale), Err(AliasError::Stale { active: 2, expected: 1, .. })));
        let newer = aliases.get("m").to_json().replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(AliasDocument::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
        aliases.put(aliases.plan("m", desired(&[], Sticky::Tenant)).expect("no weights"));
        assert_eq!(aliases.assign("m", &unit), None);
    }
}
