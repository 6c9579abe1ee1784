//! A file on its way in: a form with the file and its purpose, written to the shelf while it comes.
//!
//! Nothing of it is held in memory beyond one piece, and nothing of it stays unless it came whole.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use bytes::Bytes;
use futures_core::Stream;
use multer::{Constraints, Field, Multipart, SizeLimit};

use super::Desk;
use super::desk::StoredFile;
use crate::error::ApiError;

/// Time for a whole upload.
const UPLOAD_TIME: Duration = Duration::from_secs(600);
/// Time in which something of it must come.
const IDLE_TIME: Duration = Duration::from_secs(30);
/// What is written at once.
const PIECE: usize = 1 << 20;
/// Fields of a form, and bytes of one that is no file.
const MAX_FIELDS: usize = 16;
const MAX_FIELD: u64 = 1 << 10;
/// What a form may have around its file.
const MAX_FRAME: u64 = 64 << 10;
/// How long a client may ask for a file to be kept, as `OpenAI` bounds it.
const KEPT_SECONDS: std::ops::RangeInclusive<u64> = 3_600..=2_592_000;

/// A content that is not yet a file; dropped, it is removed.
#[derive(Debug)]
struct Arriving {
    desk: Arc<Desk>,
    id: String,
    bytes: u64,
    is_kept: bool,
}

/// A body that gives one chunk at a time, and no more than a frame of a form beyond what has been taken of its file: the reader of
/// forms takes all that there is, and keeps what it finds no end of.
#[derive(Debug)]
struct Paced {
    body: BodyDataStream,
    received: u64,
    delivered: Arc<AtomicU64>,
    /// Whether whoever asks gets nothing this time.
    rests: bool,
}

/// What a form said.
#[derive(Debug, Default)]
struct Form {
    file: Option<(Arriving, String)>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

/// Reads a form and keeps its file.
pub(super) async fn receive(desk: &Arc<Desk>, tenant: &str, request: Request) -> Result<StoredFile, ApiError> {
    let received = tokio::time::timeout(UPLOAD_TIME, Form::read(desk, request)).await;
    let limit_ms = u64::try_from(UPLOAD_TIME.as_millis()).unwrap_or(u64::MAX);
    let form = received.map_err(|_| ApiError::BodyTimeout { limit_ms })??;
    let kept = form.kept_seconds(desk.config.retention_seconds)?;
    match form.purpose.as_deref() {
        Some("batch") => {}
        None => return Err(ApiError::invalid("purpose", "`purpose` is required")),
        Some(other) => {
            let problem = format!("`purpose` must be batch, the one purpose of files here, found \"{other}\"");
            return Err(ApiError::invalid("purpose", problem));
        }
    }
    let Some((arriving, filename)) = form.file else {
        return Err(ApiError::invalid("file", "`file` is required: a part of the form with a file name"));
    };
    let now = desk.now();
    let file = StoredFile {
        id: arriving.id.clone(),
        tenant: tenant.to_owned(),
        filename,
        purpose: "batch".to_owned(),
        bytes: arriving.bytes,
        created_at: now,
        expires_at: now + kept,
    };
    // It goes with the work: where its client leaves meanwhile, the file is kept all the same, and not removed under it.
    let kept = desk.work(move |desk| {
        // All of it, and not the flag alone.
        let mut arriving = arriving;
        let kept = desk.keep(file)?;
        arriving.is_kept = true;
        Ok(kept)
    });
    kept.await?
}

// === impl Form ===

impl Form {
    async fn read(desk: &Arc<Desk>, request: Request) -> Result<Self, ApiError> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(kind)
            .map_err(|_| ApiError::invalid("", "a file is sent as multipart/form-data with a boundary"))?;
        let most = desk.config.max_file_bytes;
        let limits = Constraints::new().size_limit(SizeLimit::new().whole_stream(most.saturating_add(MAX_FRAME)));
        let delivered = Arc::new(AtomicU64::new(0));
        let body = request.into_body().into_data_stream();
        let paced = Paced { body, received: 0, delivered: Arc::clone(&delivered), rests: false };
        let mut parts = Multipart::with_constraints(paced, boundary, limits);
        let mut form = Self::default();
        for _ in 0..MAX_FIELDS {
            let Some(part) = in_time(parts.next_field(), most).await? else { return Ok(form) };
            match part.name() {
                Some("file") => form.file = Some(store(desk, part, &delivered).await?),
                Some("purpose") => form.purpose = Some(text(part, "purpose", most).await?),
                Some("expires_after[anchor]") => form.anchor = Some(text(part, "expires_after[anchor]", most).await?),
                Some("expires_after[seconds]") => {
                    form.seconds = Some(text(part, "expires_after[seconds]", most).await?)
                }
                _ => drop(text(part, "", most).await?),
            }
        }
        Err(ApiError::invalid("", format!("a form has at most {MAX_FIELDS} fields")))
    }

    /// How long the file is kept: as long as all, or for a shorter time that the client chose.
    fn kept_seconds(&self, retention: u64) -> Result<u64, ApiError> {
        if self.anchor.as_deref().is_some_and(|anchor| anchor != "created_at") {
            return Err(ApiError::invalid("expires_after.anchor", "`expires_after.anchor` must be created_at"));
        }
        let Some(seconds) = &self.seconds else { return Ok(retention) };
        let read = seconds.parse().ok().filter(|seconds| KEPT_SECONDS.contains(seconds));
        let (least, most) = (KEPT_SECONDS.start(), KEPT_SECONDS.end());
        let problem = format!("`expires_after.seconds` must be {least} to {most}, found \"{seconds}\"");
        read.map(|seconds: u64| seconds.min(retention))
            .ok_or_else(|| ApiError::invalid("expires_after.seconds", problem))
    }
}

/// Writes a file to the shelf as it comes.
async fn store(desk: &Arc<Desk>, mut part: Field<'_>, delivered: &AtomicU64) -> Result<(Arriving, String), ApiError> {
    let most = desk.config.max_file_bytes;
    let filename: String = part.file_name().unwrap_or("file").chars().filter(|c| !c.is_control()).take(255).collect();
    let mut arriving = Arriving { desk: Arc::clone(desk), id: desk.new_id("file-"), bytes: 0, is_kept: false };
    let mut piece = Vec::new();
    loop {
        let chunk = in_time(part.chunk(), most).await?;
        delivered.fetch_add(chunk.as_ref().map_or(0, |chunk| chunk.len() as u64), Ordering::Relaxed);
        piece.extend_from_slice(chunk.as_deref().unwrap_or_default());
        if piece.len() < PIECE && chunk.is_some() {
            continue;
        }
        let bytes = piece.len() as u64;
        if arriving.bytes + bytes > most {
            return Err(ApiError::TooLarge { limit: usize::try_from(most).unwrap_or(usize::MAX) });
        }
        let whole = std::mem::take(&mut piece);
        // It goes with the piece: where its client leaves meanwhile, it is removed after what is written now, not before.
        let written = desk.work(move |desk| {
            desk.reserve(bytes)?;
            arriving.bytes += bytes;
            desk.append(&arriving.id, &whole)?;
            Ok::<_, ApiError>(arriving)
        });
        arriving = written.await??;
        if chunk.is_none() {
            return Ok((arriving, filename));
        }
    }
}

/// A field that is no file.
async fn text(mut part: Field<'_>, name: &str, most: u64) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = in_time(part.chunk(), most).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > MAX_FIELD {
            return Err(ApiError::invalid(name, format!("a field of a form has at most {MAX_FIELD} bytes")));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(name, format!("`{name}` must be UTF-8")))
}

/// The next part of a form, from a client that goes on sending.
async fn in_time<T>(next: impl Future<Output = Result<T, multer::Error>>, most: u64) -> Result<T, ApiError> {
    let limit_ms = u64::try_from(IDLE_TIME.as_millis()).unwrap_or(u64::MAX);
    let next = tokio::time::timeout(IDLE_TIME, next).await.map_err(|_| ApiError::BodyTimeout { limit_ms })?;
    next.map_err(|error| broken(&error, most))
}

// === impl Paced ===

impl Stream for Paced {
    type Item = Result<Bytes, BoxError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rests) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = ready!(Pin::new(&mut self.body).poll_next(cx));
        let Some(Ok(chunk)) = next else { return Poll::Ready(next.map(|next| next.map_err(BoxError::from))) };
        (self.rests, self.received) = (true, self.received + chunk.len() as u64);
        let held = self.received.saturating_sub(self.delivered.load(Ordering::Relaxed));
        if held > MAX_FRAME + PIECE as u64 {
            return Poll::Ready(Some(Err("a form of which too much is no file".into())));
        }
        Poll::Ready(Some(Ok(chunk)))
    }
}

/// What is wrong with a form: its size, its end, or its shape.
fn broken(error: &multer::Error, most: u64) -> ApiError {
    match error {
        multer::Error::StreamSizeExceeded { .. } | multer::Error::FieldSizeExceeded { .. } => {
            ApiError::TooLarge { limit: usize::try_from(most).unwrap_or(usize::MAX) }
        }
        multer::Error::StreamReadFailed(_) => ApiError::BodyBroken,
        other => ApiError::invalid("", format!("the form cannot be read: {other}")),
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let (desk, id, bytes) = (Arc::clone(&self.desk), std::mem::take(&mut self.id), self.bytes);
        match tokio::runtime::Handle::try_current() {
            // Disks block, and whoever drops it may be a worker.
            Ok(runtime) => drop(runtime.spawn_blocking(move || desk.abandon(&id, bytes))),
            Err(_) => desk.abandon(&id, bytes),
        }
    }
}
