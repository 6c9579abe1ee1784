//! The state of a rollout and the rules that move it: what a period's evidence decides, what an operator may ask for.
//!
//! Everything here is stored, journalled and replayed: [`RolloutDocument::observe`] and [`RolloutDocument::apply`] are the only
//! two ways in which a rollout changes, and neither reads a clock.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ledger::{Period, Sums};
use super::shadow::{Agreement, Answers};
use super::spec::{Class, Metric, Mode, Spec};
use super::stats::{CHI_SQUARE_0_001, Level, Moments, chi_square};
use crate::deployment::Target;

/// Periods in a row without data after which the ramp is held.
const MAX_BARREN: u32 = 3;
/// Share of requests decided by the other arm's policy beyond which the split is not what it says.
const MAX_MISPLACED: f64 = 0.01;
/// Share of requests that run on into the other arm's time beyond which blocks are too short.
const MAX_CROSSED: f64 = 0.3;
/// Requests before those shares mean anything.
const MIN_REQUESTS: u64 = 30;
/// Variance of the candidate's number of units, in millionths, before a deviation from it means anything.
const MIN_SPREAD: i64 = 10_000_000;

/// A rollout as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutDocument {
    /// Version of this layout: 1.
    pub format: u32,
    /// Its name, and the salt of its hashes.
    pub id: String,
    /// The slot, or `alias.<name>`.
    pub subject: String,
    /// Revision or variant that served before.
    pub control: String,
    /// Revision or variant that is tried.
    pub candidate: String,
    /// The policy to prepare again after a restart; none between variants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// The plan.
    pub spec: Spec,
    /// Where it is.
    pub phase: Phase,
    /// What is known so far.
    pub progress: Progress,
}

/// Where a rollout is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Phase {
    /// Under way.
    Running,
    /// Control serves until somebody resumes it.
    Paused {
        /// Why.
        why: String,
    },
    /// Control serves for good.
    Aborted {
        /// Why.
        cause: Cause,
    },
    /// The candidate serves for good.
    Promoted,
    /// A shadow has run its length; control serves.
    Completed,
}

/// What is known so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Place in the plan's steps.
    pub step: usize,
    /// Number of the next period.
    pub next_period: u64,
    /// Periods that counted.
    pub periods: u64,
    /// Of those, in this step.
    pub step_periods: u32,
    /// Their length together.
    pub step_ms: u64,
    /// Periods in a row that did not count.
    pub barren: u32,
    /// Whether the last of those were incomplete (events lost) rather than empty.
    pub stale: bool,
    /// Whether it waits for an operator to let it go on.
    pub ready: bool,
    /// What stops the ramp.
    pub holds: Vec<Hold>,
    /// Per guard: the control's periods and the differences.
    pub evidence: Vec<Compared>,
    /// Requests of the candidate beyond its share of each period's, in thousandths.
    pub deviations: Moments,
    /// Where units are split, these instead: units of the candidate beyond its share, in thousandths.
    pub units: Moments,
    /// All requests of control.
    pub control: Sums,
    /// All requests of the candidate.
    pub candidate: Sums,
    /// A shadow's shares that agree, one per period with answers, in millionths.
    pub agreement: Moments,
    /// All answers of a shadow.
    pub shadow: Answers,
}

/// One guard's sums over periods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// The control's means.
    pub control: Moments,
    /// Candidate less control.
    pub harm: Moments,
}

/// What stops the ramp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// No requests in both arms for three periods.
    NoTraffic,
    /// Events were lost, or switches came late, for three periods.
    StaleMetrics,
    /// The arms did not get the requests that the plan gives them (chi-square, p < 0.001).
    SampleRatio,
    /// More than 1 % of the requests were decided or served by the other arm.
    Exposure,
    /// More than 30 % of requests run on into the other arm's time: blocks are too short.
    ShortBlocks,
    /// A soft guard's harm is certain.
    SoftGuard(Metric),
}

/// Why a rollout was aborted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Cause {
    /// The candidate's guest misbehaved: its circuit opened, or it could not be started again.
    Hard {
        /// What it did.
        what: String,
    },
    /// The harm is certain.
    Guard {
        /// Of what.
        metric: Metric,
    },
    /// Somebody asked.
    Asked,
    /// The host could not carry it on.
    Host {
        /// What went wrong.
        what: String,
    },
}

/// A change of a rollout; each is a line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// On to the next share.
    Step {
        /// Percent until now.
        from: u8,
        /// Percent from now on.
        to: u8,
    },
    /// The step has done all it should; an operator may let it go on.
    Ready {
        /// Percent.
        percent: u8,
    },
    /// The evidence no longer says so: it waits for more.
    NotReady {
        /// Percent.
        percent: u8,
    },
    /// The ramp stops; the share stays.
    Hold {
        /// Why.
        why: Vec<Hold>,
    },
    /// The ramp may go on.
    Release,
    /// Control serves until somebody resumes it.
    Pause {
        /// Why.
        why: String,
    },
    /// It goes on.
    Resume,
    /// Control serves for good.
    Abort {
        /// Why.
        cause: Cause,
    },
    /// The candidate serves for good.
    Promote,
    /// A shadow has run its length.
    Complete,
}

/// The numbers behind a decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Percent of the candidate.
    pub percent: u8,
    /// Periods that counted.
    pub periods: u64,
    /// Of those, in this step.
    pub step_periods: u32,
    /// Per guard.
    pub guards: Vec<GuardEvidence>,
    /// Statistic of the sample-ratio check; above 10.828 chance explains it less than once in a thousand times.
    pub chi_square: f64,
    /// Share of requests decided by the other arm's policy, or not served by the variant to which they were assigned.
    pub misplaced: f64,
    /// Share of requests that ran on into the other arm's time.
    pub crossed: f64,
    /// How a shadow answers; of the other modes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Agreement>,
}

/// One guard's numbers: shares, or milliseconds for `e2e-mean`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuardEvidence {
    /// What is measured.
    pub metric: Metric,
    /// What it does.
    pub class: Class,
    /// Periods in which both arms had data.
    pub n: u64,
    /// Mean of control.
    pub control: f64,
    /// Mean of the candidate.
    pub candidate: f64,
    /// Candidate less control.
    pub harm: f64,
    /// The harm is at least this, one-sided; above the margin the guard acts. Absent while nothing can be said.
    pub lower: Option<f64>,
    /// The harm is at most this, one-sided; below the margin the guard lets the ramp go on.
    pub upper: Option<f64>,
    /// Half-width of the two-sided interval, for the reader.
    pub plus_minus: Option<f64>,
    /// Harm that is tolerated.
    pub margin: f64,
}

/// Why an operator's wish is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It is over.
    #[error("rollout {id} is {phase}; start another")]
    Over {
        /// Which.
        id: String,
        /// Its phase.
        phase: &'static str,
    },
    /// There is no further step.
    #[error("rollout {id} is at its last step; promote it for good, without `step`")]
    LastStep {
        /// Which.
        id: String,
    },
    /// It runs.
    #[error("rollout {id} is not paused")]
    NotPaused {
        /// Which.
        id: String,
    },
    /// It does not run.
    #[error("rollout {id} is paused; resume it first")]
    Paused {
        /// Which.
        id: String,
    },
}

/// A document of a newer host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rollout document format {found}; this host reads format 1")]
pub struct RolloutFormatError {
    /// The number in the document.
    pub found: u32,
}

// === impl Phase ===

impl Phase {
    /// As in documents.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused { .. } => "paused",
            Self::Aborted { .. } => "aborted",
            Self::Promoted => "promoted",
            Self::Completed => "completed",
        }
    }

    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        !matches!(self, Self::Running | Self::Paused { .. })
    }
}

// === impl Decision ===

impl Decision {
    /// Whether nothing follows it.
    #[must_use]
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Abort { .. } | Self::Promote | Self::Complete)
    }
}

// === impl Hold ===

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTraffic => f.write_str("one of the arms got no requests for 3 periods"),
            Self::StaleMetrics => f.write_str("events were lost or switches missed for 3 periods; the host is overloaded"),
            Self::SampleRatio => f.write_str(
                "the arms did not get the requests that the plan gives them (chi-square, p < 0.001); do clients wait for answers before they ask again?",
            ),
            Self::Exposure => f.write_str("more than 1 % of the requests were decided or served by the other arm"),
            Self::ShortBlocks => {
                f.write_str("more than 30 % of the requests run on into the other arm's time; lengthen `block_ms`")
            }
            Self::SoftGuard(metric) => write!(f, "{} is worse than its margin", metric.as_str()),
        }
    }
}

// === impl GuardEvidence ===

impl GuardEvidence {
    fn of(spec: &Spec, place: usize, compared: &Compared) -> Self {
        let guard = spec.guards[place];
        // Millionths, or tenths of a millisecond.
        let scale = if guard.metric == Metric::E2eMean { 0.1 } else { 1e-6 };
        let (control, harm) = (compared.control.mean() * scale, compared.harm.mean() * scale);
        let expected = f64::from(spec.expected_periods);
        let one_sided =
            Level { alpha: spec.alpha / spec.guards.len() as f64, expected }.one_sided(&compared.harm) * scale;
        let two_sided = Level { alpha: spec.alpha, expected }.two_sided(&compared.harm) * scale;
        let known = |value: f64| value.is_finite().then_some(value);
        Self {
            metric: guard.metric,
            class: guard.class,
            n: compared.harm.n,
            control,
            candidate: control + harm,
            harm,
            lower: known(harm - one_sided),
            upper: known(harm + one_sided),
            plus_minus: known(two_sided),
            margin: if guard.metric == Metric::E2eMean { guard.margin * control } else { guard.margin },
        }
    }

    /// Enough periods, and the harm is certainly beyond the margin.
    fn is_harmful(&self, min_periods: u32) -> bool {
        self.n >= u64::from(min_periods) && self.lower.is_some_and(|lower| lower > self.margin)
    }

    /// Enough periods, and the harm is certainly within the margin.
    fn is_harmless(&self, min_periods: u32) -> bool {
        self.n >= u64::from(min_periods) && self.upper.is_some_and(|upper| upper <= self.margin)
    }
}

// === impl Progress ===

impl Progress {
    /// Takes a period in. One without both arms, where both should be, proves nothing.
    fn take(&mut self, spec: &Spec, period: &Period) {
        self.next_period = self.next_period.max(period.number + 1);
        self.control.add(&period.control.sums);
        self.candidate.add(&period.candidate.sums);
        if let Some(answers) = &period.shadow {
            return self.answered(period, answers);
        }
        let [control, candidate] = [&period.control, &period.candidate].map(|arm| arm.sums.offered > 0);
        let full = (control || period.percent == 100) && (candidate || period.percent == 0);
        if period.incomplete || !full {
            self.barren = self.barren.saturating_add(1);
            self.stale = period.incomplete;
            return;
        }
        self.barren = 0;
        self.periods += 1;
        if period.percent == spec.percent(self.step) {
            self.step_periods += 1;
            self.step_ms = self.step_ms.saturating_add(period.took_ms);
        }
        if period.percent == 0 || period.percent == 100 {
            return;
        }
        match &period.units {
            Some(units) => self.units.merge(units),
            None => self.deviations.add(deviation(period)),
        }
        for (guard, compared) in spec.guards.iter().zip(&mut self.evidence) {
            let place = guard.metric as usize;
            if let (Some(control), Some(candidate)) = (period.control.harm[place], period.candidate.harm[place]) {
                compared.control.add(control);
                compared.harm.add(candidate.saturating_sub(control));
            }
        }
    }
}

impl Progress {
    /// Statistic of the sample-ratio check, and whether there is enough to judge by it.
    fn sample_ratio(&self, min_periods: u32) -> (f64, bool) {
        match self.units.n {
            0 => (chi_square(&self.deviations), self.deviations.n >= u64::from(min_periods)),
            _ => (chi_square(&self.units), self.units.squares >= MIN_SPREAD),
        }
    }

    /// Takes a shadow's answers in. A period without any proves nothing, and harms nothing either.
    fn answered(&mut self, period: &Period, answers: &Answers) {
        self.shadow.add(answers);
        if let Some(share) = answers.share() {
            self.agreement.add(share);
            self.periods += 1;
            self.step_periods += 1;
            self.step_ms = self.step_ms.saturating_add(period.took_ms);
        }
    }
}

/// Requests of the candidate beyond what its share of the period's time gives it, in thousandths.
fn deviation(period: &Period) -> i64 {
    let [control, candidate] = [&period.control, &period.candidate];
    let exposed = (control.exposed_ms + candidate.exposed_ms).max(1);
    let total = u128::from(control.sums.offered + candidate.sums.offered);
    let expected = total * 1_000 * u128::from(candidate.exposed_ms) / u128::from(exposed);
    let found = u128::from(candidate.sums.offered) * 1_000;
    let wide = |n: u128| i64::try_from(n).unwrap_or(i64::MAX);
    wide(found).saturating_sub(wide(expected))
}

// === impl RolloutDocument ===

impl RolloutDocument {
    /// A rollout that has not begun: running, with no evidence.
    #[must_use]
    pub fn new(id: String, subject: String, [control, candidate]: [String; 2], spec: Spec) -> Self {
        let evidence = vec![Compared::default(); spec.guards.len()];
        let progress = Progress { evidence, ..Progress::default() };
        Self { format: 1, id, subject, control, candidate, target: None, spec, phase: Phase::Running, progress }
    }

    /// What a restart leaves of it: which units were counted is forgotten, so they are counted anew.
    #[must_use]
    pub fn recalled(mut self) -> Self {
        self.progress.units = Moments::default();
        self
    }

    /// Percent of the candidate in this step.
    #[must_use]
    pub fn percent(&self) -> u8 {
        self.spec.percent(self.progress.step)
    }

    /// Checks a document that was read from disk.
    ///
    /// # Errors
    /// A newer host wrote it.
    pub fn check(&self) -> Result<(), RolloutFormatError> {
        if self.format == 1 { Ok(()) } else { Err(RolloutFormatError { found: self.format }) }
    }

    /// The numbers as they stand.
    #[must_use]
    pub fn evidence(&self) -> Evidence {
        let progress = &self.progress;
        let total = (progress.control.offered + progress.candidate.offered).max(1) as f64;
        let guards = progress.evidence.iter().take(self.spec.guards.len()).enumerate();
        Evidence {
            percent: self.percent(),
            periods: progress.periods,
            step_periods: progress.step_periods,
            guards: guards.map(|(i, compared)| GuardEvidence::of(&self.spec, i, compared)).collect(),
            chi_square: progress.sample_ratio(self.spec.min_periods).0,
            misplaced: (progress.control.misplaced + progress.candidate.misplaced) as f64 / total,
            crossed: (progress.control.crossed + progress.candidate.crossed) as f64 / total,
            shadow: (self.spec.mode == Mode::Shadow)
                .then(|| Agreement::of(&self.spec, &progress.agreement, &progress.shadow)),
        }
    }

    /// Takes a period in and decides. Decisions that end the rollout come last and are the last.
    pub fn observe(&mut self, period: &Period) -> Vec<Decision> {
        if self.phase != Phase::Running {
            return Vec::new();
        }
        self.progress.take(&self.spec, period);
        let evidence = self.evidence();
        let decisions = self.decide(&evidence);
        decisions.iter().for_each(|decision| self.apply(decision));
        decisions
    }

    fn decide(&self, evidence: &Evidence) -> Vec<Decision> {
        let min = self.spec.min_periods;
        let harmful = |class| evidence.guards.iter().filter(move |g| g.class == class && g.is_harmful(min));
        if let Some(guard) = harmful(Class::Guard).next() {
            return vec![Decision::Abort { cause: Cause::Guard { metric: guard.metric } }];
        }
        let mut holds = self.faults_of_the_experiment(evidence);
        holds.extend(harmful(Class::Hold).map(|guard| Hold::SoftGuard(guard.metric)));
        let mut decisions = Vec::new();
        if holds != self.progress.holds {
            let release = holds.is_empty();
            decisions.push(if release { Decision::Release } else { Decision::Hold { why: holds.clone() } });
        }
        let done = holds.is_empty() && self.is_step_done(evidence);
        decisions.extend(match (done, self.progress.ready) {
            (true, _) => self.onward(),
            (false, true) => Some(Decision::NotReady { percent: self.percent() }),
            (false, false) => None,
        });
        let bound = self.progress.periods >= u64::from(self.spec.max_periods);
        if bound && !decisions.iter().any(|d| matches!(d, Decision::Promote)) && !(done && self.progress.ready) {
            decisions.push(match self.spec.mode {
                Mode::Shadow => Decision::Complete,
                _ => Decision::Pause { why: format!("undecided after {} periods", self.spec.max_periods) },
            });
        }
        decisions
    }

    /// Reasons not to believe the numbers.
    fn faults_of_the_experiment(&self, evidence: &Evidence) -> Vec<Hold> {
        let progress = &self.progress;
        let mut holds = Vec::new();
        if self.spec.mode == Mode::Shadow {
            // There is no ramp to stop.
            return holds;
        }
        if progress.barren >= MAX_BARREN {
            holds.push(if progress.stale { Hold::StaleMetrics } else { Hold::NoTraffic });
        }
        if progress.sample_ratio(self.spec.min_periods).1 && evidence.chi_square > CHI_SQUARE_0_001 {
            holds.push(Hold::SampleRatio);
        }
        if progress.control.offered + progress.candidate.offered >= MIN_REQUESTS {
            if evidence.misplaced > MAX_MISPLACED {
                holds.push(Hold::Exposure);
            }
            if evidence.crossed > MAX_CROSSED {
                holds.push(Hold::ShortBlocks);
            }
        }
        holds
    }

    /// Enough time, enough periods, and no guard that could still be harmed.
    fn is_step_done(&self, evidence: &Evidence) -> bool {
        let (progress, spec) = (&self.progress, &self.spec);
        spec.mode != Mode::Shadow
            && progress.barren == 0
            && progress.step_periods >= spec.min_periods
            && progress.step_ms >= spec.min_step_ms
            && evidence.guards.iter().filter(|g| g.class == Class::Guard).all(|g| g.is_harmless(spec.min_periods))
    }

    /// What comes after a step that is done.
    fn onward(&self) -> Option<Decision> {
        let next = self.spec.steps.get(self.progress.step + 1);
        match next {
            _ if !self.spec.auto_promote => {
                (!self.progress.ready).then_some(Decision::Ready { percent: self.percent() })
            }
            Some(&to) => Some(Decision::Step { from: self.percent(), to }),
            None => Some(Decision::Promote),
        }
    }

    /// Carries a decision out on the document.
    pub fn apply(&mut self, decision: &Decision) {
        let progress = &mut self.progress;
        match decision {
            Decision::Step { .. } => {
                progress.step = (progress.step + 1).min(self.spec.steps.len().saturating_sub(1));
                (progress.step_periods, progress.step_ms, progress.ready) = (0, 0, false);
            }
            Decision::Ready { .. } => progress.ready = true,
            Decision::NotReady { .. } => progress.ready = false,
            Decision::Hold { why } => progress.holds.clone_from(why),
            Decision::Release => progress.holds.clear(),
            Decision::Pause { why } => self.phase = Phase::Paused { why: why.clone() },
            Decision::Resume => {
                (progress.barren, progress.stale) = (0, false);
                self.phase = Phase::Running;
            }
            Decision::Abort { cause } => self.phase = Phase::Aborted { cause: cause.clone() },
            Decision::Promote => self.phase = Phase::Promoted,
            Decision::Complete => self.phase = Phase::Completed,
        }
    }

    /// What an operator's `promote` comes to: the candidate for good, or only the next step.
    ///
    /// # Errors
    /// It is over, or there is no next step.
    pub fn ask_promote(&self, step_only: bool) -> Result<Decision, AskError> {
        self.not_over()?;
        if !step_only {
            return Ok(Decision::Promote);
        }
        if self.phase != Phase::Running {
            return Err(AskError::Paused { id: self.id.clone() });
        }
        let next = self.spec.steps.get(self.progress.step + 1);
        let to = *next.ok_or_else(|| AskError::LastStep { id: self.id.clone() })?;
        Ok(Decision::Step { from: self.percent(), to })
    }

    /// What an operator's `abort` comes to.
    ///
    /// # Errors
    /// It is over.
    pub fn ask_abort(&self) -> Result<Decision, AskError> {
        self.not_over()?;
        Ok(Decision::Abort { cause: Cause::Asked })
    }

    /// What an operator's `pause` comes to.
    ///
    /// # Errors
    /// It does not run.
    pub fn ask_pause(&self) -> Result<Decision, AskError> {
        self.not_over()?;
        match self.phase {
            Phase::Running => Ok(Decision::Pause { why: "asked".into() }),
            _ => Err(AskError::Paused { id: self.id.clone() }),
        }
    }

    /// What an operator's `resume` comes to.
    ///
    /// # Errors
    /// It is not paused.
    pub fn ask_resume(&self) -> Result<Decision, AskError> {
        self.not_over()?;
        match self.phase {
            Phase::Paused { .. } => Ok(Decision::Resume),
            _ => Err(AskError::NotPaused { id: self.id.clone() }),
        }
    }

    fn not_over(&self) -> Result<(), AskError> {
        if self.phase.is_over() {
            return Err(AskError::Over { id: self.id.clone(), phase: self.phase.as_str() });
        }
        Ok(())
    }
}
