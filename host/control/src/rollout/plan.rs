//! The two documents that operators see: the plan with which they start a rollout, and the report that they read.
//!
//! They are this crate's own language, so that a guard is named alike in a request, a document, a report and the journal.

use serde::{Deserialize, Serialize};

use super::assign::Arm;
use super::document::{Evidence, Phase, RolloutDocument};
use super::ledger::Sums;
use super::spec::{Guard, Mode, OnRestart, Spec, Sticky};
use crate::deployment::Target;

/// What an operator writes: a mode, and whatever is not as usual.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    mode: Mode,
    steps: Option<Vec<u8>>,
    sample: Option<f64>,
    guards: Option<Vec<Guard>>,
    ttft_slo_ms: Option<u64>,
    itl_slo_ms: Option<u64>,
    alpha: Option<f64>,
    block_ms: Option<u64>,
    burn_in_ms: Option<u64>,
    settle_ms: Option<u64>,
    min_periods: Option<u32>,
    min_step_ms: Option<u64>,
    expected_periods: Option<u32>,
    max_periods: Option<u32>,
    auto_promote: Option<bool>,
    on_restart: Option<OnRestart>,
    sticky: Option<Sticky>,
    seed: Option<u64>,
}

/// What an operator reads.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The rollout.
    pub id: String,
    /// Its slot or alias.
    pub subject: String,
    /// How it compares.
    pub mode: Mode,
    /// Where it is.
    pub phase: Phase,
    /// The candidate's share in this step.
    pub percent: u8,
    /// Whether it waits for an operator to let it go on.
    pub ready: bool,
    /// What stops the ramp, in words.
    pub holds: Vec<String>,
    /// What the reader should know of the comparison, in words; the host's to fill in.
    pub caveats: Vec<String>,
    /// The numbers that decide.
    pub evidence: Evidence,
    /// What control did.
    pub control: ArmReport,
    /// What the candidate did.
    pub candidate: ArmReport,
    /// The policy that is tried; none between variants.
    pub target: Option<Target>,
    /// The plan, with every default.
    pub spec: Spec,
}

/// One arm of a report: all its requests so far, in whole periods.
#[derive(Clone, Debug, Serialize)]
pub struct ArmReport {
    /// Revision or variant.
    pub name: String,
    /// Requests, refused ones included.
    pub requests: u64,
    /// Share that was served within both SLOs.
    pub goodput: Option<f64>,
    /// Mean time to first token.
    pub ttft_mean_ms: Option<f64>,
    /// Mean time between tokens.
    pub itl_mean_ms: Option<f64>,
    /// Mean end-to-end time.
    pub e2e_mean_ms: Option<f64>,
    /// Share of prompt tokens expected in the prefix cache.
    pub cached: Option<f64>,
    /// Everything that was counted.
    pub counts: Sums,
    /// What its policy cost.
    pub policy: Option<PolicyCost>,
}

/// What a policy cost since it was prepared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PolicyCost {
    /// Calls of its guest.
    pub calls: u64,
    /// Their mean duration.
    pub call_mean_us: Option<f64>,
    /// Calls that ended in a fault.
    pub faults: u64,
    /// Decisions that the native policy took instead.
    pub fallbacks: u64,
}

// === impl Plan ===

impl Plan {
    /// The same plan, with this for one that does not say what stays at one arm.
    #[must_use]
    pub fn or_sticky(self, sticky: Sticky) -> Self {
        Self { sticky: self.sticky.or(Some(sticky)), ..self }
    }

    /// Fills in the defaults; `seed` is for a plan that names none.
    #[must_use]
    pub fn spec(self, seed: u64) -> Spec {
        let usual = Spec::of(self.mode, self.seed.unwrap_or(seed));
        Spec {
            steps: self.steps.unwrap_or(usual.steps),
            sample: self.sample.or(usual.sample),
            guards: self.guards.unwrap_or(usual.guards),
            ttft_slo_ms: self.ttft_slo_ms.unwrap_or(usual.ttft_slo_ms),
            itl_slo_ms: self.itl_slo_ms.unwrap_or(usual.itl_slo_ms),
            alpha: self.alpha.unwrap_or(usual.alpha),
            block_ms: self.block_ms.unwrap_or(usual.block_ms),
            burn_in_ms: self.burn_in_ms.unwrap_or(usual.burn_in_ms),
            settle_ms: self.settle_ms.unwrap_or(usual.settle_ms),
            min_periods: self.min_periods.unwrap_or(usual.min_periods),
            min_step_ms: self.min_step_ms.unwrap_or(usual.min_step_ms),
            expected_periods: self.expected_periods.unwrap_or(usual.expected_periods),
            max_periods: self.max_periods.unwrap_or(usual.max_periods),
            auto_promote: self.auto_promote.unwrap_or(usual.auto_promote),
            on_restart: self.on_restart.unwrap_or(usual.on_restart),
            sticky: self.sticky.unwrap_or(usual.sticky),
            ..usual
        }
    }
}

// === impl Report ===

impl Report {
    /// A report of a rollout as it is stored; costs are the host's to fill in.
    #[must_use]
    pub fn of(document: &RolloutDocument) -> Self {
        let progress = &document.progress;
        Self {
            id: document.id.clone(),
            subject: document.subject.clone(),
            mode: document.spec.mode,
            phase: document.phase.clone(),
            percent: document.percent(),
            ready: progress.ready,
            holds: progress.holds.iter().map(ToString::to_string).collect(),
            caveats: Vec::new(),
            evidence: document.evidence(),
            control: ArmReport::of(&document.control, &progress.control),
            candidate: ArmReport::of(&document.candidate, &progress.candidate),
            target: document.target.clone(),
            spec: document.spec.clone(),
        }
    }

    /// One of its arms.
    #[must_use]
    pub fn arm_mut(&mut self, arm: Arm) -> &mut ArmReport {
        match arm {
            Arm::Control => &mut self.control,
            Arm::Candidate => &mut self.candidate,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|error| unreachable!("a report is plain data: {error}"))
    }
}

impl ArmReport {
    fn of(name: &str, counts: &Sums) -> Self {
        let mean = |sum: u64, n: u64, scale: f64| (n > 0).then(|| sum as f64 / n as f64 * scale);
        Self {
            name: name.to_owned(),
            requests: counts.offered,
            goodput: mean(counts.good, counts.offered, 1.0),
            ttft_mean_ms: mean(counts.ttft_us, counts.first_tokens, 1e-3),
            itl_mean_ms: mean(counts.itl_us, counts.itl_n, 1e-3),
            e2e_mean_ms: mean(counts.e2e_us, counts.e2e_n, 1e-3),
            cached: mean(counts.cached_tokens, counts.prompt_tokens, 1.0),
            counts: counts.clone(),
            policy: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_a_mode_and_what_is_not_as_usual() {
        let plan: Plan = serde_json::from_str(r#"{"mode": "canary", "steps": [50], "alpha": 0.01}"#).expect("a plan");
        let spec = plan.spec(9);
        assert_eq!(spec, Spec { steps: vec![50], alpha: 0.01, ..Spec::of(Mode::Canary, 9) });
        for (json, expect) in [
            ("{}", "missing field `mode`"),
            (r#"{"mode": "bluegreen"}"#, "unknown variant `bluegreen`"),
            (r#"{"mode": "canary", "step": [1]}"#, "unknown field `step`"),
            (r#"{"mode": "canary", "guards": [{"metric": "latency", "margin": 1}]}"#, "unknown variant `latency`"),
        ] {
            let error = serde_json::from_str::<Plan>(json).expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn a_report_of_nothing_has_no_means() {
        let names = ["a@1".into(), "b@1".into()];
        let document = RolloutDocument::new("r-1".into(), "router".into(), names, Spec::of(Mode::Canary, 1));
        let report = Report::of(&document);
        assert_eq!((report.percent, report.control.e2e_mean_ms, report.control.goodput), (1, None, None));
        assert!(report.to_json().contains(r#""phase":{"is":"running"}"#), "{}", report.to_json());
    }
}
