//! What a rollout is told: mode, steps, guards and limits, checked once, before anything is prepared.
//!
//! Plain data with defaults, so that a body with only a component and a mode is a sound experiment.

use serde::{Deserialize, Serialize};

use crate::slot::{ComponentRef, SlotName};

/// How candidate and control are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The candidate's share grows by steps, under guards.
    Canary,
    /// The whole host runs one or the other, half of the time each.
    Switchback,
    /// Each request, session or tenant belongs to one arm; for arms that share no capacity.
    Ab,
    /// The candidate is asked and never obeyed.
    Shadow,
}

/// What belongs to one arm in a split by requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sticky {
    /// All requests of a tenant.
    Tenant,
    /// All requests of a session; those without one by request.
    #[default]
    Session,
    /// Each request by itself.
    Request,
}

/// What a restart of the host does to a running rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnRestart {
    /// Control serves until somebody resumes it.
    #[default]
    Pause,
    /// It goes on with the evidence it had.
    Resume,
}

/// A harm that can be measured: more of it is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Share of requests that failed by a fault of host or device.
    ErrorRate,
    /// Share of requests refused.
    RejectionRate,
    /// Share of requests whose first token came later than the SLO, or never.
    TtftOverSlo,
    /// Share of requests whose mean time between tokens exceeds the SLO.
    ItlOverSlo,
    /// Mean end-to-end time in milliseconds; its margin is a share of the control's.
    E2eMean,
    /// Share of requests that were not served within both SLOs; refused and cancelled ones are among them.
    GoodputLoss,
}

/// What a guard does when the harm is certain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The rollout is aborted.
    #[default]
    Guard,
    /// The ramp stops.
    Hold,
}

/// One metric under watch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// What is measured.
    pub metric: Metric,
    /// Harm that is tolerated: a difference of shares, or for `e2e-mean` a share of the control's mean.
    pub margin: f64,
    /// What happens beyond.
    #[serde(default)]
    pub class: Class,
}

/// The whole plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// How it compares.
    pub mode: Mode,
    /// Percent of the candidate, ascending; one of 50 for a switchback, none for a shadow.
    pub steps: Vec<u8>,
    /// Share of the decisions that are put to a shadow, above 0 and at most 1; of the other modes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<f64>,
    /// What is watched.
    pub guards: Vec<Guard>,
    /// A first token later than this is over the SLO.
    pub ttft_slo_ms: u64,
    /// A mean time between tokens above this is over the SLO.
    pub itl_slo_ms: u64,
    /// Chance of a false abort in the whole rollout; shared by the guards.
    pub alpha: f64,
    /// Length of a block, during which one arm serves.
    pub block_ms: u64,
    /// Requests that arrive so soon after a switch count for neither arm.
    pub burn_in_ms: u64,
    /// Longest wait for the requests of a period to end.
    pub settle_ms: u64,
    /// Periods with data of both arms before a guard may decide, and in each step before the next; of a shadow, periods with
    /// answers before an interval is told.
    pub min_periods: u32,
    /// Shortest time in a step.
    pub min_step_ms: u64,
    /// Periods after which a decision is usually taken: there the confidence sequences are narrowest.
    pub expected_periods: u32,
    /// Periods after which an undecided rollout is paused.
    pub max_periods: u32,
    /// Whether it goes to the next step, and at the end makes the candidate active, by itself.
    pub auto_promote: bool,
    /// What a restart does.
    pub on_restart: OnRestart,
    /// What a unit of a split by requests is.
    pub sticky: Sticky,
    /// Where its randomness comes from.
    pub seed: u64,
}

/// A plan that is no sound experiment.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpecError {
    /// A split by requests between policies of one host.
    #[error(
        "mode `ab` is not an experiment in `{slot}`: both policies would share the replicas' batches, caches and queues and \
         change each other's latency; use `switchback`, which gives the whole host to one at a time"
    )]
    Shared {
        /// The slot.
        slot: String,
    },
    /// A comparison of policies that no request feels.
    #[error(
        "`{slot}` decides nothing, so there is nothing to compare: a hook is heard beside the others in any case; activate the \
         candidate with PUT as `telemetry.<another name>`"
    )]
    NoOutcome {
        /// The slot.
        slot: String,
    },
    /// A mode that is no experiment between variants.
    #[error(
        "mode `{mode}` compares policies of one host; between the variants of an alias use `canary` or `ab`, which split the \
         requests"
    )]
    NotForVariants {
        /// The mode.
        mode: &'static str,
    },
    /// A shadow whose answers have nothing to be compared with.
    #[error("the native scheduler writes no plans that could be compared; `sched-fcfs` orders requests as it does")]
    NoPlans,
    /// Steps that do not ascend within 1 to 100.
    #[error("`steps` must ascend within 1 to 100 percent, found {found:?}; for example [1, 5, 10, 25, 50, 100]")]
    Steps {
        /// What was given.
        found: Vec<u8>,
    },
    /// Steps where the mode has none.
    #[error("mode `{mode}` takes no `steps`: leave them out")]
    NoSteps {
        /// The mode.
        mode: &'static str,
    },
    /// A member that means nothing in the mode.
    #[error("mode `{mode}` takes no `{field}`: {why}")]
    NotInMode {
        /// The mode.
        mode: &'static str,
        /// Which.
        field: &'static str,
        /// Why.
        why: &'static str,
    },
    /// A number out of its range.
    #[error("`{field}` must be {range}, found {found}")]
    Range {
        /// Which.
        field: &'static str,
        /// Its range in words.
        range: &'static str,
        /// What was given.
        found: String,
    },
    /// A metric twice.
    #[error("two guards watch `{metric:?}`; keep one")]
    Twice {
        /// Which.
        metric: Metric,
    },
}

/// Longest block, burn-in, settling and step.
const MAX_MS: u64 = 24 * 3_600_000;

// === impl Mode ===

impl Mode {
    /// As in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Switchback => "switchback",
            Self::Ab => "ab",
            Self::Shadow => "shadow",
        }
    }
}

// === impl Metric ===

impl Metric {
    /// Every metric, in the order of its number.
    pub const ALL: [Self; 6] =
        [Self::ErrorRate, Self::RejectionRate, Self::TtftOverSlo, Self::ItlOverSlo, Self::E2eMean, Self::GoodputLoss];

    /// As in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ErrorRate => "error-rate",
            Self::RejectionRate => "rejection-rate",
            Self::TtftOverSlo => "ttft-over-slo",
            Self::ItlOverSlo => "itl-over-slo",
            Self::E2eMean => "e2e-mean",
            Self::GoodputLoss => "goodput-loss",
        }
    }
}

// === impl Spec ===

impl Spec {
    /// Whether the mode is an experiment between two policies of a slot.
    ///
    /// # Errors
    /// It is not; the error names the mode that is.
    pub fn check_slot(&self, slot: &SlotName) -> Result<(), SpecError> {
        match (slot, self.mode) {
            (SlotName::Telemetry(_), _) => Err(SpecError::NoOutcome { slot: slot.to_string() }),
            (_, Mode::Ab) => Err(SpecError::Shared { slot: slot.to_string() }),
            (_, Mode::Canary | Mode::Switchback | Mode::Shadow) => Ok(()),
        }
    }

    /// Whether the answers of two policies of a slot can be compared, where the mode compares them.
    ///
    /// # Errors
    /// One of them gives none.
    pub fn check_answers(&self, slot: &SlotName, policies: [&ComponentRef; 2]) -> Result<(), SpecError> {
        let makes_plans = *slot != SlotName::Scheduler || !policies.contains(&&ComponentRef::Native);
        if self.mode != Mode::Shadow || makes_plans { Ok(()) } else { Err(SpecError::NoPlans) }
    }

    /// Whether the mode is an experiment between two variants of an alias.
    ///
    /// # Errors
    /// It is not; the error names those that are.
    pub fn check_alias(&self) -> Result<(), SpecError> {
        match self.mode {
            Mode::Canary | Mode::Ab => Ok(()),
            Mode::Switchback | Mode::Shadow => Err(SpecError::NotForVariants { mode: self.mode.as_str() }),
        }
    }

    /// The defaults of a mode: the guards of every serving team, and blocks long enough for requests of a few seconds.
    #[must_use]
    pub fn of(mode: Mode, seed: u64) -> Self {
        let guard = |metric, margin| Guard { metric, margin, class: Class::Guard };
        let switchback = mode == Mode::Switchback;
        let guards = vec![
            guard(Metric::ErrorRate, 0.01),
            guard(Metric::RejectionRate, 0.02),
            guard(Metric::TtftOverSlo, 0.05),
            guard(Metric::ItlOverSlo, 0.05),
            guard(Metric::E2eMean, 0.10),
        ];
        Self {
            mode,
            steps: match mode {
                Mode::Canary => vec![1, 5, 10, 25, 50, 100],
                Mode::Switchback | Mode::Ab => vec![50],
                Mode::Shadow => vec![],
            },
            sample: (mode == Mode::Shadow).then_some(0.1),
            guards: if mode == Mode::Shadow { vec![] } else { guards },
            ttft_slo_ms: 2_000,
            itl_slo_ms: 200,
            alpha: 0.05,
            block_ms: if switchback { 60_000 } else { 20_000 },
            burn_in_ms: if switchback { 10_000 } else { 2_000 },
            settle_ms: 30_000,
            min_periods: if mode == Mode::Shadow { 20 } else { 10 },
            min_step_ms: 0,
            expected_periods: 100,
            max_periods: 10_000,
            auto_promote: false,
            on_restart: OnRestart::Pause,
            sticky: Sticky::default(),
            seed,
        }
    }

    /// Percent of the candidate in a step.
    #[must_use]
    pub fn percent(&self, step: usize) -> u8 {
        self.steps.get(step).copied().unwrap_or(0)
    }

    /// Share of the decisions that are put to a shadow, in millionths.
    #[must_use]
    pub fn sample_ppm(&self) -> u32 {
        self.sample.map_or(0, |share| (share.clamp(0.0, 1.0) * 1e6).ceil() as u32)
    }

    /// Checks every number.
    ///
    /// # Errors
    /// The first one that is wrong, with its range.
    pub fn check(&self) -> Result<(), SpecError> {
        let ascending = self.steps.windows(2).all(|w| w[0] < w[1]);
        let good_steps = match self.mode {
            Mode::Canary | Mode::Ab => !self.steps.is_empty(),
            Mode::Switchback if self.steps != [50] => return Err(SpecError::NoSteps { mode: self.mode.as_str() }),
            Mode::Shadow if !self.steps.is_empty() => return Err(SpecError::NoSteps { mode: self.mode.as_str() }),
            Mode::Switchback | Mode::Shadow => true,
        };
        if !ascending || !good_steps || self.steps.iter().any(|s| !(1..=100).contains(s)) {
            return Err(SpecError::Steps { found: self.steps.clone() });
        }
        let range = |field, range, found: String| Err(SpecError::Range { field, range, found });
        if !(self.alpha > 0.0 && self.alpha <= 0.2) {
            return range("alpha", "above 0 and at most 0.2", self.alpha.to_string());
        }
        for (field, ms, least) in [
            ("block_ms", self.block_ms, 100),
            ("burn_in_ms", self.burn_in_ms, 0),
            ("settle_ms", self.settle_ms, 0),
            ("min_step_ms", self.min_step_ms, 0),
            ("ttft_slo_ms", self.ttft_slo_ms, 1),
            ("itl_slo_ms", self.itl_slo_ms, 1),
        ] {
            if !(least..=MAX_MS).contains(&ms) {
                return range(field, "within a day, and `block_ms` at least 100", ms.to_string());
            }
        }
        if self.burn_in_ms >= self.block_ms {
            return range("burn_in_ms", "shorter than `block_ms`", self.burn_in_ms.to_string());
        }
        let counts = [self.min_periods, self.expected_periods, self.max_periods];
        if self.min_periods < 2 || counts.iter().any(|n| !(1..=1_000_000).contains(n)) {
            return range(
                "min_periods",
                "at least 2, and every number of periods at most 1000000",
                format!("{counts:?}"),
            );
        }
        self.check_sample().and_then(|()| self.check_guards())
    }

    /// What only a shadow has, and what it has not.
    fn check_sample(&self) -> Result<(), SpecError> {
        let mode = self.mode.as_str();
        let not = |field, why| Err(SpecError::NotInMode { mode, field, why });
        match (self.mode, self.sample) {
            (Mode::Shadow, _) if !self.guards.is_empty() => {
                not("guards", "its candidate answers no request; leave them out")
            }
            (Mode::Shadow, _) if self.auto_promote => {
                not("auto_promote", "to agree is not to be better; look at the report and promote it by hand")
            }
            (Mode::Shadow, Some(share)) if share > 0.0 && share <= 1.0 => Ok(()),
            (Mode::Shadow, found) => {
                let found = found.map_or("none".to_owned(), |share| share.to_string());
                Err(SpecError::Range { field: "sample", range: "above 0 and at most 1", found })
            }
            (_, Some(_)) => not("sample", "it measures every request; leave it out"),
            (_, None) => Ok(()),
        }
    }

    fn check_guards(&self) -> Result<(), SpecError> {
        for (i, guard) in self.guards.iter().enumerate() {
            if !(0.0..=10.0).contains(&guard.margin) {
                let (field, range) = ("guards.margin", "0 to 10");
                return Err(SpecError::Range { field, range, found: guard.margin.to_string() });
            }
            if self.guards[..i].iter().any(|other| other.metric == guard.metric) {
                return Err(SpecError::Twice { metric: guard.metric });
            }
        }
        if self.mode != Mode::Shadow && self.guards.is_empty() {
            let range = "1 to 6 guards: without one nothing could stop the candidate";
            return Err(SpecError::Range { field: "guards", range, found: "none".into() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_every_mode_are_sound() {
        for mode in [Mode::Canary, Mode::Switchback, Mode::Ab, Mode::Shadow] {
            assert_eq!(Spec::of(mode, 1).check(), Ok(()), "{mode:?}");
        }
    }

    #[test]
    fn a_mode_that_is_no_experiment_in_its_slot_names_the_one_that_is() {
        let telemetry = SlotName::Telemetry("x".into());
        for (slot, mode, expect) in [
            (SlotName::Router, Mode::Canary, None),
            (SlotName::Scheduler, Mode::Switchback, None),
            (SlotName::Router, Mode::Ab, Some("use `switchback`")),
            (SlotName::Scheduler, Mode::Ab, Some("use `switchback`")),
            (telemetry.clone(), Mode::Canary, Some("`telemetry.<another name>`")),
            (telemetry, Mode::Shadow, Some("decides nothing, so there is nothing to compare")),
            (SlotName::Router, Mode::Shadow, None),
            (SlotName::Scheduler, Mode::Shadow, None),
            (SlotName::Sampler, Mode::Shadow, None),
            (SlotName::KvRetention, Mode::Shadow, None),
            (SlotName::Admission, Mode::Shadow, None),
        ] {
            let found = Spec::of(mode, 1).check_slot(&slot).err().map(|e| e.to_string());
            assert_eq!(found.is_some(), expect.is_some(), "{slot} {mode:?}");
            assert!(found.unwrap_or_default().contains(expect.unwrap_or_default()), "{slot} {mode:?}");
        }
    }

    #[test]
    fn variants_are_compared_by_requests() {
        for (mode, fits) in [(Mode::Canary, true), (Mode::Ab, true), (Mode::Switchback, false), (Mode::Shadow, false)] {
            assert_eq!(Spec::of(mode, 1).check_alias().is_ok(), fits, "{mode:?}");
        }
    }

    #[test]
    fn an_unsound_plan_says_what_to_change() {
        type Spoil = fn(&mut Spec);
        let rows: [(Mode, Spoil, &str); 15] = [
            (Mode::Canary, |s| s.steps = vec![], "`steps` must ascend"),
            (Mode::Canary, |s| s.steps = vec![5, 5], "`steps` must ascend"),
            (Mode::Canary, |s| s.steps = vec![0, 5], "`steps` must ascend"),
            (Mode::Canary, |s| s.alpha = 0.0, "`alpha` must be above 0"),
            (Mode::Canary, |s| s.alpha = f64::NAN, "`alpha` must be above 0"),
            (Mode::Canary, |s| s.block_ms = 10, "`block_ms` must be"),
            (Mode::Canary, |s| s.burn_in_ms = s.block_ms, "`burn_in_ms` must be shorter"),
            (Mode::Canary, |s| s.min_periods = 1, "`min_periods` must be at least 2"),
            (Mode::Canary, |s| s.guards.push(s.guards[0]), "two guards watch"),
            (Mode::Canary, |s| s.guards.clear(), "nothing could stop the candidate"),
            (Mode::Canary, |s| s.sample = Some(0.1), "takes no `sample`"),
            (Mode::Shadow, |s| s.sample = Some(0.0), "`sample` must be above 0"),
            (Mode::Shadow, |s| s.sample = Some(f64::NAN), "`sample` must be above 0"),
            (Mode::Shadow, |s| s.guards = Spec::of(Mode::Canary, 1).guards, "takes no `guards`"),
            (Mode::Shadow, |s| s.auto_promote = true, "promote it by hand"),
        ];
        for (mode, spoil, expect) in rows {
            let mut spec = Spec::of(mode, 1);
            spoil(&mut spec);
            let error = spec.check().expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
        let spec = Spec { steps: vec![10, 50], ..Spec::of(Mode::Switchback, 1) };
        assert_eq!(spec.check(), Err(SpecError::NoSteps { mode: "switchback" }));
    }
}
