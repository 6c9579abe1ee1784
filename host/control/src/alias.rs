//! Which variant of a model serves whom: weights per alias, and a hash that keeps a tenant, a session or a request at one.
//!
//! An assignment is a pure function of alias, weights and unit: there is no table to store, and every host comes to the same
//! answer. Each variant has a run of buckets, in the order of the names; between two variants, growing the share of one moves
//! nobody back to the other. Rendezvous hashing would keep that for more than two, with logarithms of weights; operators
//! compare two.
//!
//! A rollout between two variants is a part of its alias's document, as one of policies is of its slot's: while it is under
//! way its share and its hash decide, the weights are what the alias returns to, and promoting it changes both in one write.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::deployment::{DocumentError, stored};
use crate::rollout::{Arm, BUCKETS, Phase, RolloutDocument, Spec, Sticky, arm_of, bucket, unit_hash};

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

/// What an operator wants to try in an alias.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredTrial {
    /// The variant.
    pub candidate: String,
    /// How.
    pub spec: Spec,
    /// Only if the alias's generation is this one.
    pub if_generation: Option<u64>,
}

/// An alias as it works, and its stored form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// What is being tried there, or was last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutDocument>,
    /// How many rollouts there have been: the next one's number less one.
    #[serde(default)]
    pub rollouts: u64,
    /// The journal's last line when this generation was stored: the line that tells of it comes after. 0 from older hosts.
    #[serde(default)]
    pub journal_before: u64,
    /// The same for the end of the last rollout.
    #[serde(default)]
    pub ended_before: u64,
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
    /// A rollout is under way there.
    #[error(
        "rollout {id} is under way in `{alias}`; promote or abort it first (POST /admin/v1/aliases/{alias}/rollouts/{id}/abort)"
    )]
    RollingOut {
        /// The alias.
        alias: String,
        /// The rollout.
        id: String,
    },
    /// Nothing to compare the candidate with.
    #[error(
        "a rollout needs one variant as control, and {found} of `{alias}` serve by weight; give one of them all the weight first, \
         as in PUT /admin/v1/aliases/{alias} {{\"weights\": {{\"<variant>\": 1}}}}"
    )]
    NoControl {
        /// The alias.
        alias: String,
        /// Variants with a weight.
        found: usize,
    },
    /// A variant against itself.
    #[error("`{variant}` serves the alias already; name another of its variants as candidate")]
    Itself {
        /// Which.
        variant: String,
    },
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned<'a> {
    /// The variant.
    pub variant: &'a str,
    /// Hash of what stays there.
    pub unit: u64,
    /// Whether a rollout under way assigned it.
    pub is_trial: bool,
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Aliases {
    by_name: BTreeMap<String, AliasDocument>,
    /// Percent of the candidate now, where a rollout is under way; 0 for one that is not here.
    shares: BTreeMap<String, u8>,
}

// === impl AliasDocument ===

impl AliasDocument {
    /// An alias that nobody has changed: the router chooses.
    fn fresh(alias: &str) -> Self {
        Self {
            format: 1,
            alias: alias.to_owned(),
            generation: 0,
            weights: BTreeMap::new(),
            sticky: Sticky::default(),
            rollout: None,
            rollouts: 0,
            journal_before: 0,
            ended_before: 0,
        }
    }

    /// Pretty JSON: people read these files.
    #[must_use]
    pub fn to_json(&self) -> String {
        stored(self)
    }

    /// Reads a stored document.
    ///
    /// # Errors
    /// It is malformed or of a newer host.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(bytes)?;
        document.rollout.as_ref().map_or(Ok(()), RolloutDocument::check)?;
        DocumentError::check(document.format).map(|()| document)
    }

    /// The rollout that is under way.
    #[must_use]
    pub fn rolling_out(&self) -> Option<&RolloutDocument> {
        self.rollout.as_ref().filter(|rollout| !rollout.phase.is_over())
    }

    /// The variant of a unit; none where the router chooses. `percent` is the candidate's share while a rollout is under way.
    #[must_use]
    pub fn assign(&self, unit: &Unit<'_>, percent: u8) -> Option<Assigned<'_>> {
        if let Some(rollout) = self.rolling_out() {
            // Salted by the rollout: the same tenants need not try everything first.
            let unit = unit.hash(&rollout.id, rollout.spec.sticky);
            let variant = match arm_of(bucket(unit), percent) {
                Arm::Control => &rollout.control,
                Arm::Candidate => &rollout.candidate,
            };
            return Some(Assigned { variant, unit, is_trial: true });
        }
        let total: u64 = self.weights.values().map(|weight| u64::from(*weight)).sum();
        if total == 0 {
            return None;
        }
        let unit = unit.hash(&self.alias, self.sticky);
        let mut place = u64::from(bucket(unit)) * total / u64::from(BUCKETS);
        for (variant, weight) in &self.weights {
            match place.checked_sub(u64::from(*weight)) {
                Some(rest) => place = rest,
                None => return Some(Assigned { variant, unit, is_trial: false }),
            }
        }
        None
    }

    /// Only the generation that the caller has seen.
    fn not_stale(&self, if_generation: Option<u64>) -> Result<(), AliasError> {
        match if_generation.filter(|expected| *expected != self.generation) {
            Some(expected) => Err(AliasError::Stale { alias: self.alias.clone(), active: self.generation, expected }),
            None => Ok(()),
        }
    }

    /// Only while no rollout is under way.
    fn not_rolling_out(&self) -> Result<(), AliasError> {
        match self.rolling_out() {
            Some(rollout) => Err(AliasError::RollingOut { alias: self.alias.clone(), id: rollout.id.clone() }),
            None => Ok(()),
        }
    }
}

// === impl Unit ===

impl Unit<'_> {
    fn hash(&self, salt: &str, sticky: Sticky) -> u64 {
        match (sticky, self.session) {
            (Sticky::Tenant, _) => unit_hash(salt, self.tenant),
            (Sticky::Session, session @ 1..) => unit_hash(salt, &session.to_string()),
            (Sticky::Session, 0) | (Sticky::Request, _) => unit_hash(salt, &self.request.to_string()),
        }
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
    pub fn assign(&self, alias: &str, unit: &Unit<'_>) -> Option<Assigned<'_>> {
        self.by_name.get(alias)?.assign(unit, self.share(alias))
    }

    /// Percent of the candidate now.
    #[must_use]
    pub fn share(&self, alias: &str) -> u8 {
        self.shares.get(alias).copied().unwrap_or(0)
    }

    /// Gives the candidate of the rollout under way this share from now on.
    pub fn set_share(&mut self, alias: &str, percent: u8) {
        self.shares.insert(alias.to_owned(), percent);
    }

    /// Checks a wish; returns the document to store and then to [`put`](Self::put).
    ///
    /// # Errors
    /// A stale `if_generation`, a rollout under way, or weights that cannot work.
    pub fn plan(&self, alias: &str, desired: DesiredAlias) -> Result<AliasDocument, AliasError> {
        let document = self.get(alias);
        document.not_rolling_out()?;
        document.not_stale(desired.if_generation)?;
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
        Ok(AliasDocument { generation: document.generation + 1, weights, sticky: desired.sticky, ..document })
    }

    /// Checks the wish to try a variant beside the one that serves; returns the rollout, and the document with it to store and
    /// then to [`put`](Self::put). It has no share yet.
    ///
    /// # Errors
    /// A stale `if_generation`, a rollout under way, or no other variant that serves alone.
    pub fn plan_rollout(
        &self,
        alias: &str,
        desired: DesiredTrial,
    ) -> Result<(RolloutDocument, AliasDocument), AliasError> {
        let DesiredTrial { candidate, spec, if_generation } = desired;
        let mut document = self.get(alias);
        document.not_rolling_out()?;
        document.not_stale(if_generation)?;
        let serving: Vec<&String> = document.weights.iter().filter(|(_, w)| **w > 0).map(|(v, _)| v).collect();
        let control = match serving.as_slice() {
            [control] => (*control).clone(),
            found => return Err(AliasError::NoControl { alias: alias.to_owned(), found: found.len() }),
        };
        if control == candidate {
            return Err(AliasError::Itself { variant: control });
        }
        document.rollouts += 1;
        let subject = format!("alias.{alias}");
        let id = format!("{subject}-{}", document.rollouts);
        let rollout = RolloutDocument::new(id, subject, [control, candidate], spec);
        document.rollout = Some(rollout.clone());
        Ok((rollout, document))
    }

    /// The document of an alias whose rollout has changed since this line of the journal, to store and then to
    /// [`put`](Self::put). One that is promoted gives its candidate all the weight.
    #[must_use]
    pub fn rolled(&self, alias: &str, rollout: RolloutDocument, journal: u64) -> AliasDocument {
        let mut document = self.get(alias);
        if rollout.phase == Phase::Promoted && document.rolling_out().is_some() {
            let weight = document.weights.values().copied().max().unwrap_or(1);
            document.weights = [(rollout.candidate.clone(), weight)].into();
            document.generation += 1;
            document.journal_before = journal;
        }
        if rollout.phase.is_over() {
            document.ended_before = journal;
        }
        document.rollout = Some(rollout);
        document
    }

    /// Makes a document the truth: a planned one once it is stored, a stored one at the start.
    pub fn put(&mut self, document: AliasDocument) {
        if document.rolling_out().is_none() {
            self.shares.remove(&document.alias);
        }
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
                *counts.entry(document.assign(&unit, 0).expect("weights").variant.to_owned()).or_default() += 1;
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
            assert_eq!(document.assign(&one, 0), document.assign(&other, 0), "{sticky:?}");
        }
        let halves = document(&[("a", 1), ("b", 1)], Sticky::Session);
        let to = |document: &AliasDocument, unit: Unit<'_>| {
            document.assign(&unit, 0).map(|assigned| assigned.variant.to_owned()).expect("weights")
        };
        let without: Vec<_> = (0..64).map(|request| to(&halves, unit("t", 0, request))).collect();
        assert!(["a", "b"].iter().all(|v| without.iter().any(|w| w == v)), "without a session by request");
        for session in 1..2_000 {
            let at = |a, b| to(&document(&[("a", a), ("b", b)], Sticky::Session), unit("t", session, 0)) == "a";
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
        assert_eq!(aliases.assign("m", &unit).map(|assigned| assigned.variant), Some("a"));
        assert_eq!(aliases.assign("other", &unit), None);
        let stale = DesiredAlias { if_generation: Some(1), ..desired(&[], Sticky::Tenant) };
        assert!(matches!(aliases.plan("m", stale), Err(AliasError::Stale { active: 2, expected: 1, .. })));
        let newer = aliases.get("m").to_json().replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(AliasDocument::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
        aliases.put(aliases.plan("m", desired(&[], Sticky::Tenant)).expect("no weights"));
        assert_eq!(aliases.assign("m", &unit), None);
    }

    #[test]
    fn a_rollout_takes_its_share_and_leaves_one_variant() {
        use crate::rollout::{Cause, Decision, Mode};
        let trial = |candidate: &str, if_generation| {
            let spec = Spec { sticky: Sticky::Tenant, ..Spec::of(Mode::Canary, 1) };
            DesiredTrial { candidate: candidate.into(), spec, if_generation }
        };
        let start = |weights: &[(&str, u32)]| {
            let mut aliases = Aliases::default();
            aliases.put(aliases.plan("m", desired(weights, Sticky::Session)).expect("good weights"));
            aliases
        };
        for (weights, trial, error) in [
            (&[][..], trial("b", None), AliasError::NoControl { alias: "m".into(), found: 0 }),
            (&[("a", 1), ("b", 1)], trial("b", None), AliasError::NoControl { alias: "m".into(), found: 2 }),
            (&[("a", 7), ("b", 0)], trial("a", Some(1)), AliasError::Itself { variant: "a".into() }),
            (&[("a", 7)], trial("b", Some(2)), AliasError::Stale { alias: "m".into(), active: 1, expected: 2 }),
        ] {
            assert_eq!(start(weights).plan_rollout("m", trial).err(), Some(error), "{weights:?}");
        }
        let served = |aliases: &Aliases, tenant: usize| {
            let tenant = format!("tenant-{tenant}");
            let unit = Unit { tenant: &tenant, session: 1, request: 1 };
            aliases.assign("m", &unit).expect("one of two").variant.to_owned()
        };
        let share = |aliases: &Aliases| (0..2_000).filter(|t| served(aliases, *t) == "b").count();
        for (promoted, after) in [(true, ("b", 2, 2_000)), (false, ("a", 1, 0))] {
            let mut aliases = start(&[("a", 7), ("b", 0)]);
            let (mut rollout, document) = aliases.plan_rollout("m", trial("b", Some(1))).expect("a good wish");
            assert_eq!(AliasDocument::parse(document.to_json().as_bytes()).expect("just written"), document);
            aliases.put(document);
            let busy = aliases.plan("m", desired(&[("b", 1)], Sticky::Session));
            assert!(matches!(busy, Err(AliasError::RollingOut { id, .. }) if id == "alias.m-1"));
            assert_eq!(share(&aliases), 0, "nobody before its first period");
            let mut tried = Vec::new();
            for percent in [10, 50] {
                aliases.set_share("m", percent);
                assert!(share(&aliases).abs_diff(20 * usize::from(percent)) < 70, "{percent}: {}", share(&aliases));
                assert!(tried.iter().all(|t| served(&aliases, *t) == "b"), "a growing share moves nobody back");
                tried = (0..2_000).filter(|t| served(&aliases, *t) == "b").collect();
            }
            rollout.apply(&if promoted { Decision::Promote } else { Decision::Abort { cause: Cause::Asked } });
            aliases.put(aliases.rolled("m", rollout.clone(), 0));
            aliases.put(aliases.rolled("m", rollout, 0));
            let document = aliases.get("m");
            let weight = document.weights.iter().find(|(_, w)| **w > 0).map(|(v, w)| (v.as_str(), *w));
            assert_eq!((weight, document.generation, share(&aliases)), (Some((after.0, 7)), after.1, after.2));
            let another = trial(if promoted { "a" } else { "b" }, None);
            let (next, _) = aliases.plan_rollout("m", another).expect("another");
            assert_eq!(next.id, "alias.m-2", "an id is not given twice");
        }
    }
}
