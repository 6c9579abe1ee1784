//! What is deployed where, as a pure state machine: requests in, decisions and journal entries out.
//!
//! No files, clocks, threads, HTTP or wasm: the app feeds it the time and the outcome of each activation, and writes the
//! documents and journal lines that it returns. So the same journal always replays to the same state, and a crash between
//! two lines leaves one of two known states. Rollouts ([`rollout`]) are further events of the same machine.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod alias;
mod anomaly;
mod deployment;
mod journal;
mod models;
pub mod rollout;
mod safe_mode;
mod slot;

pub use alias::{AliasDocument, AliasError, Aliases, Assigned, DesiredAlias, DesiredTrial, Unit};
pub use anomaly::{AnomalyConfig, AnomalyWatch, Finding, Interval, Metric, SeriesKey, Unusual};
pub use deployment::{
    Budget, Deployment, Desired, DocumentError, Handover, OnFault, PlanError, Planned, Removal, SlotDocument,
    SlotState, Target,
};
pub use journal::{Actor, Entry, Happened, Intent, Journal, Why};
pub use models::{LoadedModel, ModelsDocument};
pub use safe_mode::SafeModeDocument;
pub use slot::{ComponentRef, SlotName, SlotNameError};
