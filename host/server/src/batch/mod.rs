//! OpenAI Batch: files of requests, answered beneath everything else, by the way in that embedders use.
//!
//! `job` is what a batch goes through, as a pure state machine; `line` reads requests and writes answers; `desk` keeps files and
//! batches in the app's shelf and owns the index of both; `run` is the one task that answers lines while the host has room;
//! `files` and `routes` are the HTTP side. What is answered is known by reading the answers, so there is no second record of it
//! that could disagree after a crash: an answer is a whole line of the output, or it is computed again.

mod desk;
mod files;
mod job;
mod line;
mod routes;
mod run;
#[cfg(test)]
mod tests;
mod upload;

pub(crate) use self::desk::Desk;
pub(crate) use self::files::{content, delete_file, file, files, upload};
pub(crate) use self::routes::{batch, batches, cancel_batch, create_batch};
pub(crate) use self::run::run;

/// Bounds of files and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchConfig {
    /// Lines that are computed at once; 0 leaves batches where they are.
    pub max_in_flight: usize,
    /// Batches that have not ended; the next ones get 429.
    pub max_unfinished: usize,
    /// Lines of a file.
    pub max_lines: u32,
    /// Size of an uploaded file.
    pub max_file_bytes: u64,
    /// Files that are kept, uploaded and written; beyond, uploads get 429.
    pub max_files: usize,
    /// Size of all files together; beyond, uploads get 429 and no line begins.
    pub max_bytes: u64,
    /// How long files, and batches that have ended, are kept.
    pub retention_seconds: u64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            max_in_flight: 8,
            max_unfinished: 100,
            max_lines: 50_000,
            max_file_bytes: 200 << 20,
            max_files: 1_000,
            max_bytes: 4 << 30,
            retention_seconds: 30 * 24 * 3_600,
        }
    }
}

/// One page of a list, as `OpenAI`'s clients turn pages.
#[derive(Debug, serde::Serialize)]
struct Page<T> {
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

/// Which page.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Turn {
    limit: Option<usize>,
    /// The last one of the page before.
    after: Option<String>,
}

impl<T> Page<T> {
    /// The page that was asked for, of a list that is the newest first.
    fn of(all: Vec<T>, id: impl Fn(&T) -> &str, turn: &Turn, most: usize) -> Result<Self, crate::error::ApiError> {
        let limit = turn.limit.unwrap_or(most.min(20));
        if !(1..=most).contains(&limit) {
            let problem = format!("`limit` must be 1 to {most}, found {limit}");
            return Err(crate::error::ApiError::invalid("limit", problem));
        }
        let start = match &turn.after {
            None => 0,
            Some(after) => all.iter().position(|item| id(item) == after).map_or(all.len(), |place| place + 1),
        };
        let has_more = all.len() > start + limit;
        let data: Vec<T> = all.into_iter().skip(start).take(limit).collect();
        let [first_id, last_id] = [data.first(), data.last()].map(|item| item.map(|item| id(item).to_owned()));
        Ok(Self { object: "list", data, first_id, last_id, has_more })
    }
}
