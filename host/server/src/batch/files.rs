//! `/v1/files`: what batches read and what they have written.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::desk::StoredFile;
use super::{Page, Turn, upload as form};
use crate::error::ApiError;
use crate::identity::Caller;
use crate::openai::json;
use crate::path::Path;
use crate::ports::Shelf;
use crate::state::ServerState;

/// Files of one page.
const MAX_PAGE: usize = 10_000;
/// What is read and sent at once.
const PIECE: usize = 256 << 10;

#[derive(Serialize)]
struct FileObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    expires_at: u64,
    filename: String,
    purpose: String,
    status: &'static str,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Ask {
    limit: Option<usize>,
    after: Option<String>,
    purpose: Option<String>,
}

impl From<StoredFile> for FileObject {
    fn from(file: StoredFile) -> Self {
        let StoredFile { id, filename, purpose, bytes, created_at, expires_at, .. } = file;
        Self { id, object: "file", bytes, created_at, expires_at, filename, purpose, status: "processed" }
    }
}

/// `POST /v1/files`.
pub(crate) async fn upload(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    request: Request,
) -> Result<Response, ApiError> {
    let uploads = Arc::clone(&state.batches.uploads);
    let _place = uploads.try_acquire_owned().map_err(|_| {
        let what = "as many files are being uploaded as this host takes at once".to_owned();
        ApiError::Saturated { what }
    })?;
    // A full store is said before the body is read.
    state.batches.work(|desk| desk.reserve(0)).await??;
    let file = form::receive(&state.batches, &caller.tenant, request).await?;
    Ok(json(&FileObject::from(file)))
}

/// `GET /v1/files`.
pub(crate) async fn files(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    ask: Result<Query<Ask>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(Ask { limit, after, purpose }) = ask.map_err(|error| ApiError::invalid("limit", error.body_text()))?;
    let turn = Turn { limit: Some(limit.unwrap_or(MAX_PAGE)), after };
    let files = state.batches.work(move |desk| desk.files(&caller.tenant, purpose.as_deref())).await?;
    let files = files.into_iter().map(FileObject::from).collect();
    Ok(json(&Page::of(files, |file| &file.id, &turn, MAX_PAGE)?))
}

/// `GET /v1/files/{id}`.
pub(crate) async fn file(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = state.batches.work(move |desk| desk.file(&caller.tenant, &id)).await??;
    Ok(json(&FileObject::from(file)))
}

/// `DELETE /v1/files/{id}`.
pub(crate) async fn delete_file(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Deleted {
        id: String,
        object: &'static str,
        deleted: bool,
    }
    let named = id.clone();
    state.batches.work(move |desk| desk.delete_file(&caller.tenant, &named)).await??;
    Ok(json(&Deleted { id, object: "file", deleted: true }))
}

/// `GET /v1/files/{id}/content`.
pub(crate) async fn content(
    State(state): State<Arc<ServerState>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = state.batches.work(move |desk| desk.file(&caller.tenant, &id)).await??;
    let content =
        Content { shelf: Arc::clone(&state.batches.shelf), id: file.id, at: 0, bytes: file.bytes, reading: None };
    let mut response = Response::new(Body::new(content));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(file.bytes));
    Ok(response)
}

/// A content as it is read, a piece at a time; one that is deleted meanwhile breaks off.
#[derive(Debug)]
struct Content {
    shelf: Arc<dyn Shelf>,
    id: String,
    at: u64,
    bytes: u64,
    reading: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

impl http_body::Body for Content {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        if this.at >= this.bytes {
            return Poll::Ready(None);
        }
        let (shelf, id, at) = (&this.shelf, &this.id, this.at);
        let reading = this.reading.get_or_insert_with(|| {
            let (shelf, id) = (Arc::clone(shelf), id.clone());
            tokio::task::spawn_blocking(move || shelf.read(&id, at, PIECE))
        });
        let read = ready!(Pin::new(reading).poll(cx)).map_err(io::Error::other).and_then(|read| read);
        this.reading = None;
        let read = read.and_then(|bytes| match bytes.is_empty() {
            true => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            false => Ok(bytes),
        });
        this.at = read.as_ref().map_or(this.bytes, |bytes| this.at + bytes.len() as u64);
        Poll::Ready(Some(read.map(|bytes| Frame::data(Bytes::from(bytes)))))
    }

    /// Known with the last piece, so that a client must take that too.
    fn is_end_stream(&self) -> bool {
        self.at >= self.bytes
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.saturating_sub(self.at))
    }
}
