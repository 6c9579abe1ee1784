//! The index of files and batches, and the one place that changes what is stored of them.
//!
//! Every document is written before the index says so, under one lock: whoever reads the index sees what would be found after
//! a crash. All of it blocks, and runs on the blocking pool ([`Desk::work`]). Counts of answered lines are not written at each
//! line: the answers themselves say them.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pointsman_telemetry::Metrics;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

use super::BatchConfig;
use super::job::{Batch, Counts, Status};
use crate::error::ApiError;
use crate::ports::{Clock, Shelf};

/// Batches that are remembered after their end; the oldest are forgotten.
const MAX_ENDED: usize = 1_000;
/// Uploads at once: each has a piece in memory, and more of them would only share the disk.
const MAX_UPLOADS: usize = 16;

/// The document of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredFile {
    pub(crate) id: String,
    pub(crate) tenant: String,
    pub(crate) filename: String,
    /// `batch`, or `batch_output` of what the host wrote.
    pub(crate) purpose: String,
    pub(crate) bytes: u64,
    pub(crate) created_at: u64,
    pub(crate) expires_at: u64,
}

/// Files, batches, and who waits for them to change.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) shelf: Arc<dyn Shelf>,
    pub(crate) config: BatchConfig,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    index: Mutex<Index>,
    /// Of all files, those that are being written included. Beside the index, which is locked while a disk is waited for.
    bytes: AtomicU64,
    /// Places of uploads.
    pub(super) uploads: Arc<Semaphore>,
    /// Tells ids of one second apart, in their order.
    serial: AtomicU32,
    /// Whether a batch has come or changed since the runner looked.
    pub(crate) has_news: AtomicBool,
    pub(crate) news: Notify,
}

/// By id, which is in the order of creation.
#[derive(Debug, Default)]
struct Index {
    files: BTreeMap<String, StoredFile>,
    batches: BTreeMap<String, Batch>,
}

// === impl Desk ===

impl Desk {
    /// Reads what is stored. A document that cannot be read is left where it is, and so is everything that might be its own.
    pub(crate) fn open(
        shelf: Arc<dyn Shelf>,
        config: BatchConfig,
        clock: &Arc<dyn Clock>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let (mut index, mut readable) = (Index::default(), true);
        let documents = shelf.documents().unwrap_or_else(|error| {
            tracing::error!("files and batches cannot be read: {error}");
            readable = false;
            Vec::new()
        });
        for (id, text) in documents {
            let file = id.starts_with("file-").then(|| serde_json::from_slice::<StoredFile>(&text));
            let read = match file {
                Some(file) => file.map(|file| drop(index.files.insert(id.clone(), file))),
                None => serde_json::from_slice(&text).map(|batch| drop(index.batches.insert(id.clone(), batch))),
            };
            if let Err(error) = read {
                tracing::error!("the document of {id} is skipped: {error}");
                readable = false;
            }
        }
        let (clock, metrics) = (Arc::clone(clock), Arc::clone(metrics));
        let (serial, has_news, news) = (AtomicU32::new(0), AtomicBool::new(true), Notify::new());
        let (bytes, uploads) = (AtomicU64::new(0), Arc::new(Semaphore::new(MAX_UPLOADS)));
        let desk =
            Self { shelf, config, clock, metrics, index: Mutex::new(index), bytes, uploads, serial, has_news, news };
        desk.weigh(readable);
        desk.publish(&desk.index());
        desk
    }

    /// Counts what contents there are, and removes those of nothing, as a crash leaves them of an upload.
    fn weigh(&self, readable: bool) {
        let index = self.index();
        let unfinished = index.batches.values().filter(|batch| !batch.status.is_over());
        let written: HashSet<String> =
            unfinished.flat_map(|batch| [batch.output.clone(), batch.errors.clone()]).collect();
        for (id, bytes) in self.shelf.contents().unwrap_or_default() {
            let is_known = index.files.contains_key(&id) || written.contains(&id);
            if is_known || !readable {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
            } else if let Err(error) = self.shelf.remove(&id) {
                tracing::warn!("what is left of {id} cannot be removed: {error}");
            }
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what may block where it may.
    pub(crate) async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let desk = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&desk)).await.map_err(|_| ApiError::Internal)
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.unix_seconds()
    }

    /// A new id; those of a later second, or made later by this process, come later in the order of texts.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:08x}{serial:08x}{:08x}", self.now(), self.clock.random() & 0xffff_ffff)
    }

    fn publish(&self, index: &Index) {
        for status in Status::ALL {
            let n = index.batches.values().filter(|batch| batch.status == status).count();
            self.metrics.batches(status.as_str(), n);
        }
    }

    fn tell(&self) {
        self.has_news.store(true, Ordering::Release);
        self.news.notify_one();
    }

    // === files ===

    /// Whether there is room for so many bytes more; they are counted from now on.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), ApiError> {
        let BatchConfig { max_files, max_bytes, .. } = self.config;
        if self.index().files.len() >= max_files {
            let what = format!("{max_files} files are kept, the most of this host");
            return Err(ApiError::StorageFull { what });
        }
        let add = |kept: u64| kept.checked_add(bytes).filter(|sum| *sum <= max_bytes);
        let added = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        added.map(drop).map_err(|kept| {
            let what = format!("files of {kept} bytes are kept and {max_bytes} are the most of this host");
            ApiError::StorageFull { what }
        })
    }

    /// Whether lines may be answered: their answers need room too.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.config.max_bytes
    }

    /// Appends to a content that has been reserved.
    pub(crate) fn append(&self, id: &str, bytes: &[u8]) -> Result<(), ApiError> {
        self.shelf.append(id, bytes).map_err(|error| disk("a file takes no more", &error))
    }

    /// Removes a content that did not become a file.
    pub(crate) fn abandon(&self, id: &str, reserved: u64) {
        self.release(reserved);
        if let Err(error) = self.shelf.remove(id) {
            tracing::warn!("what is left of {id} cannot be removed: {error}");
        }
    }

    fn release(&self, bytes: u64) {
        let subtract = |kept: u64| Some(kept.saturating_sub(bytes));
        // It cannot fail: there is always a difference.
        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, subtract);
    }

    /// Makes a content a file, for good.
    pub(crate) fn keep(&self, file: StoredFile) -> Result<StoredFile, ApiError> {
        let text = serde_json::to_vec(&file).unwrap_or_default();
        let kept = self.shelf.sync(&file.id).and_then(|()| self.shelf.write_document(&file.id, &text));
        kept.map_err(|error| disk("a file cannot be kept", &error))?;
        self.index().files.insert(file.id.clone(), file.clone());
        Ok(file)
    }

    /// A file of this tenant.
    pub(crate) fn file(&self, tenant: &str, id: &str) -> Result<StoredFile, ApiError> {
        let index = self.index();
        let file = index.files.get(id).filter(|file| file.tenant == tenant);
        file.cloned().ok_or_else(|| ApiError::NotKept { what: "file", id: id.to_owned() })
    }

    /// Files of this tenant, the newest first.
    pub(crate) fn files(&self, tenant: &str, purpose: Option<&str>) -> Vec<StoredFile> {
        let wanted = |file: &&StoredFile| file.tenant == tenant && purpose.is_none_or(|wanted| wanted == file.purpose);
        self.index().files.values().rev().filter(wanted).cloned().collect()
    }

    /// Deletes a file that no unfinished batch reads.
    pub(crate) fn delete_file(&self, tenant: &str, id: &str) -> Result<(), ApiError> {
        self.file(tenant, id)?;
        let mut index = self.index();
        if let Some(batch) = index.user_of(id) {
            let problem = format!("the batch `{}` uses this file: cancel it, or wait until it has ended", batch.id);
            return Err(ApiError::InUse { problem });
        }
        self.remove(&mut index, id).map_err(|error| disk("a file cannot be deleted", &error))
    }

    fn remove(&self, index: &mut Index, id: &str) -> io::Result<()> {
        self.shelf.remove(id)?;
        if let Some(file) = index.files.remove(id) {
            self.release(file.bytes);
        }
        Ok(())
    }

    // === batches ===

    /// Takes a batch on.
    pub(crate) fn create(&self, batch: Batch) -> Result<Batch, ApiError> {
        let mut index = self.index();
        let unfinished = index.batches.values().filter(|batch| !batch.status.is_over()).count();
        if unfinished >= self.config.max_unfinished {
            let what = format!("{unfinished} batches have not ended, the most of this host");
            return Err(ApiError::Saturated { what });
        }
        // What it writes needs room, also if it is cancelled at once.
        if index.files.len() >= self.config.max_files || !self.has_room() {
            let what = "as many files, or bytes of them, are kept as this host keeps".to_owned();
            return Err(ApiError::StorageFull { what });
        }
        // It may have been deleted since it was looked at.
        if !index.files.contains_key(&batch.input) {
            return Err(ApiError::NotKept { what: "file", id: batch.input });
        }
        self.write(&batch)?;
        index.batches.insert(batch.id.clone(), batch.clone());
        self.publish(&index);
        drop(index);
        self.tell();
        Ok(batch)
    }

    fn write(&self, batch: &Batch) -> Result<(), ApiError> {
        let text = serde_json::to_vec(batch).unwrap_or_default();
        self.shelf.write_document(&batch.id, &text).map_err(|error| disk("a batch cannot be stored", &error))
    }

    /// A batch of this tenant.
    pub(crate) fn batch(&self, tenant: &str, id: &str) -> Result<Batch, ApiError> {
        let index = self.index();
        let batch = index.batches.get(id).filter(|batch| batch.tenant == tenant);
        batch.cloned().ok_or_else(|| ApiError::NotKept { what: "batch", id: id.to_owned() })
    }

    /// Batches of this tenant, the newest first.
    pub(crate) fn batches(&self, tenant: &str) -> Vec<Batch> {
        self.index().batches.values().rev().filter(|batch| batch.tenant == tenant).cloned().collect()
    }

    /// Batches that have not ended, the oldest first.
    pub(crate) fn unfinished(&self) -> Vec<Batch> {
        self.index().batches.values().filter(|batch| !batch.status.is_over()).cloned().collect()
    }

    /// Changes a batch: written first, then true.
    pub(crate) fn change<T>(&self, id: &str, change: impl FnOnce(&mut Batch) -> T) -> Result<(Batch, T), ApiError> {
        let mut index = self.index();
        let found = index.batches.get(id).cloned();
        let mut batch = found.ok_or_else(|| ApiError::NotKept { what: "batch", id: id.to_owned() })?;
        let result = change(&mut batch);
        if index.batches.get(id) != Some(&batch) {
            self.write(&batch)?;
            index.batches.insert(id.to_owned(), batch.clone());
            self.publish(&index);
            drop(index);
            self.tell();
        }
        Ok((batch, result))
    }

    /// Writes whole lines to one of a batch's files behind what is good of it, for good, and then counts them; how much is good now.
    pub(crate) fn record(
        &self,
        batch: &str,
        (id, good): (&str, u64),
        text: &[u8],
        counts: Counts,
    ) -> Result<u64, ApiError> {
        if text.is_empty() {
            return Ok(good);
        }
        self.trim(id, good)?;
        if let Err(error) = self.shelf.append(id, text).and_then(|()| self.shelf.sync(id)) {
            // What is not sure to last is computed again. Where it cannot be cut off now, it is before anything else is written.
            drop(self.trim(id, good));
            return Err(disk("answers of a batch cannot be written", &error));
        }
        self.bytes.fetch_add(text.len() as u64, Ordering::Relaxed);
        if let Some(batch) = self.index().batches.get_mut(batch) {
            let Counts { completed, failed, .. } = batch.counts;
            self.metrics.batch_lines(counts.completed.saturating_sub(completed), counts.failed.saturating_sub(failed));
            batch.counts = counts;
        }
        Ok(good + text.len() as u64)
    }

    /// Cuts off what a write that failed has left behind what is good of a content.
    pub(crate) fn trim(&self, id: &str, good: u64) -> Result<(), ApiError> {
        let length = self.shelf.length(id).map_err(|error| disk("answers of a batch cannot be read", &error))?;
        let trimmed = if length > good { self.shelf.cut(id, good) } else { Ok(()) };
        trimmed.map_err(|error| disk("answers of a batch cannot be mended", &error))
    }

    /// What a batch's own answers say after a restart.
    pub(crate) fn recount(&self, id: &str, counts: Counts) {
        if let Some(batch) = self.index().batches.get_mut(id) {
            batch.counts = counts;
        }
    }

    /// Forgets files whose time is over, and batches that ended long ago.
    pub(crate) fn sweep(&self) {
        let now = self.now();
        let over = |file: &&StoredFile| file.expires_at <= now;
        let over: Vec<String> = self.index().files.values().filter(over).map(|file| file.id.clone()).collect();
        for id in over {
            // The lock again for each: nobody waits for more than one of them.
            let mut index = self.index();
            if index.user_of(&id).is_none()
                && let Err(error) = self.remove(&mut index, &id)
            {
                tracing::warn!("the expired file {id} cannot be removed: {error}");
            }
        }
        let index = self.index();
        let ended = |batch: &&Batch| batch.status.is_over();
        let mut surplus = index.batches.values().filter(ended).count().saturating_sub(MAX_ENDED);
        let mut old = Vec::new();
        for batch in index.batches.values().filter(ended) {
            let is_old = batch.ended_at.is_some_and(|at| at + self.config.retention_seconds <= now);
            if is_old || surplus > 0 {
                surplus = surplus.saturating_sub(1);
                old.push(batch.id.clone());
            }
        }
        drop(index);
        for id in old {
            let mut index = self.index();
            match self.shelf.remove(&id) {
                Ok(()) => drop(index.batches.remove(&id)),
                Err(error) => tracing::warn!("the old batch {id} cannot be removed: {error}"),
            }
        }
        self.publish(&self.index());
    }
}

// === impl Index ===

impl Index {
    /// A batch that has not ended and reads or writes this file.
    fn user_of(&self, file: &str) -> Option<&Batch> {
        let uses = |batch: &&Batch| [&*batch.input, &*batch.output, &*batch.errors].contains(&file);
        self.batches.values().filter(|batch| !batch.status.is_over()).find(uses)
    }
}

/// What a disk refuses is the host's fault; the log has the details.
pub(super) fn disk(what: &'static str, error: &io::Error) -> ApiError {
    tracing::error!("{what}: {error}");
    ApiError::Disk { what }
}
