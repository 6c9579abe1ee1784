//! What a batch goes through, from `validating` to its end: a pure state machine over the document that is stored of it.
//!
//! Time is an argument, in Unix seconds. Each step says whether it may be taken from where the batch is; what it means for files
//! and for lines under way is the business of those who take it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Where a batch is, in `OpenAI`'s words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

/// The document of a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub(crate) id: String,
    pub(crate) tenant: String,
    /// The name of the API key that it came with.
    pub(crate) key: Option<String>,
    /// The route that answers its lines.
    pub(crate) endpoint: String,
    pub(crate) input: String,
    /// Where answers go. It becomes a file when the batch ends, unless it is empty.
    pub(crate) output: String,
    /// Where lines go that have none; the same holds for it.
    pub(crate) errors: String,
    pub(crate) window: String,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) status: Status,
    /// Its window was over before it was.
    pub(crate) late: bool,
    pub(crate) created_at: u64,
    pub(crate) expires_at: u64,
    pub(crate) in_progress_at: Option<u64>,
    pub(crate) finalizing_at: Option<u64>,
    pub(crate) cancelling_at: Option<u64>,
    /// When it ended, whichever way.
    pub(crate) ended_at: Option<u64>,
    /// Why it failed.
    pub(crate) faults: Vec<LineFault>,
    pub(crate) counts: Counts,
    /// Files that it has left: answers, and lines without one.
    pub(crate) has_output: bool,
    pub(crate) has_errors: bool,
}

/// Lines of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) total: u32,
    pub(crate) completed: u32,
    pub(crate) failed: u32,
}

/// What is wrong with a line of an input file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LineFault {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    /// From 1; none where it is the file's.
    pub(crate) line: Option<u32>,
}

/// Why lines that have no answer get none any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Expired,
    Cancelled,
}

// === impl Status ===

impl Status {
    pub(crate) const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

// === impl Batch ===

impl Batch {
    /// Its file was read: so many lines, or what is wrong with it. One that was cancelled meanwhile is left alone.
    pub(crate) fn validated(&mut self, checked: Result<u32, Vec<LineFault>>, now: u64) {
        if self.status != Status::Validating {
            return;
        }
        match checked {
            Ok(total) => {
                self.counts.total = total;
                (self.status, self.in_progress_at) = (Status::InProgress, Some(now));
            }
            Err(faults) => {
                self.faults = faults;
                (self.status, self.ended_at) = (Status::Failed, Some(now));
            }
        }
    }

    /// Asks for its end; one that is being cancelled, or was, stays as it is.
    ///
    /// # Errors
    /// It is about to end by itself, or has.
    pub(crate) fn cancel(&mut self, now: u64) -> Result<(), Status> {
        match self.status {
            Status::Validating | Status::InProgress => {
                (self.status, self.cancelling_at) = (Status::Cancelling, Some(now));
                Ok(())
            }
            Status::Cancelling | Status::Cancelled => Ok(()),
            other => Err(other),
        }
    }

    /// Whether its window is over and it works still.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        matches!(self.status, Status::Validating | Status::InProgress) && now >= self.expires_at
    }

    /// No line begins any more: all have their answers, or the window is over.
    pub(crate) fn finalize(&mut self, now: u64) {
        if matches!(self.status, Status::Validating | Status::InProgress) {
            self.late = self.is_due(now) && self.counts.completed + self.counts.failed < self.counts.total.max(1);
            (self.status, self.finalizing_at) = (Status::Finalizing, Some(now));
        }
    }

    /// Why lines that have no answer get none, where they get none.
    pub(crate) fn cut(&self) -> Option<Cut> {
        match self.status {
            Status::Cancelling => Some(Cut::Cancelled),
            Status::Finalizing if self.late => Some(Cut::Expired),
            _ => None,
        }
    }

    /// Its files are there.
    pub(crate) fn end(&mut self, counts: Counts, now: u64) {
        let status = match (self.status, self.late) {
            (Status::Cancelling, _) => Status::Cancelled,
            (Status::Finalizing, true) => Status::Expired,
            (Status::Finalizing, false) => Status::Completed,
            _ => return,
        };
        self.counts = counts;
        (self.status, self.ended_at) = (status, Some(now));
    }

    /// When it ended, where it ended in this way.
    pub(crate) fn ended_as(&self, status: Status) -> Option<u64> {
        self.ended_at.filter(|_| self.status == status)
    }
}
