//! Rollouts: a candidate beside a control, randomised, measured, guarded, and decided by rules that everybody can read.
//!
//! Pure like the rest of this crate: events and the time in, commands and journal entries out. The host executes the commands
//! on its slots; nothing here knows what a slot is made of. A period under way when the host dies is forgotten, so the document
//! needs no clock: it holds the evidence of whole periods only.

mod assign;
mod conduct;
mod document;
mod ledger;
mod plan;
mod shadow;
#[cfg(test)]
mod sim;
mod spec;
mod stats;

pub use assign::{Arm, BUCKETS, arm_of, bucket, unit_hash};
pub use conduct::{Command, Rollout};
pub use document::{
    AskError, Cause, Decision, Evidence, GuardEvidence, Hold, Phase, Progress, RolloutDocument, RolloutFormatError,
};
pub use ledger::{ArmPeriod, Outcome, Period, Seen, Split, Sums};
pub use plan::{ArmReport, Plan, PolicyCost, Report};
pub use shadow::{Agreement, Answers};
pub use spec::{Class, Guard, Metric, Mode, OnRestart, Spec, SpecError, Sticky};
pub use stats::Moments;
