//! HTTP/2 from clients: one connection, and what bounds the streams on it.
//!
//! What a connection of HTTP/1.1 is bounded by must hold for each stream, and hyper has no word for some of it. So a request
//! takes one of the listener's places as a connection does; who does not take his answer loses his stream and not the
//! connection, which may be a gateway's with the requests of many; and a connection without requests is closed after the time
//! in which one of HTTP/1.1 would be. A client that opens streams only to reset them (CVE-2023-44487) may open no more: h2 ends
//! it for those that nobody has looked at, and here is the bound on those whose handlers had begun. That bound is a rate, and its end
//! a goodbye, because a gateway's users hang up too and its connection carries the answers of others. Which of the two protocols
//! is spoken is settled before: by ALPN, or by the first bytes.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::rt::{Executor, Read, Write};
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use crate::places::{Connection, NoPlace, UnderWay};
use crate::serve::{Phase, reached};
use crate::unread;

/// Streams of a connection.
const MAX_STREAMS: u32 = 128;
/// Bytes of a request's body that may have come and not been read, and of all bodies of a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of an answer that wait for their client, as far as hyper asks.
const MAX_SEND_BYTES: usize = 64 << 10;
/// Of a frame of an answer, what is handed on at a time: hyper asks for the next when there is room, and gives all of one away.
const PIECE_BYTES: usize = 16 << 10;
/// Streams that a client has opened and reset before anybody looked; beyond, the connection ends.
const MAX_UNSEEN_RESETS: usize = 20;
/// Streams begun within a window and reset before their answer, soon after they came: with more of them than this, and more than half
/// of those begun in the window, the host says goodbye and lets the others end. Who resets on is cut off at a multiple of it.
const MAX_GIVEN_UP: u32 = 200;
const CUT_OFF: u32 = 4 * MAX_GIVEN_UP;
const SOON: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(10);
/// Silence after which a client is asked for a sign, and the time that it may take.
const PING: Duration = Duration::from_secs(30);
/// How long a client without requests may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

tokio::task_local! {
    /// Since when the client of a task's stream has owed it room for more.
    static OWED: Cell<Option<Instant>>;
}

/// What bounds a connection.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// Size of a head.
    pub(crate) max_header_bytes: u32,
    /// Time without requests.
    pub(crate) idle: Duration,
    /// Time in which a client must take at least a byte of its answer.
    pub(crate) write_timeout: Duration,
    /// Has a place of its own, and asks for the others.
    pub(crate) connection: Arc<Connection>,
    /// Of the rest of a body whose request is refused.
    pub(crate) unread: unread::Limits,
}

/// The streams of a connection.
#[derive(Debug)]
struct Streams {
    connection: Arc<Connection>,
    /// Whether a stream has the connection's own place.
    is_taken: AtomicBool,
    n_open: watch::Sender<u32>,
    recent: Mutex<Recent>,
    /// It is to end with the streams under way.
    is_misused: Notify,
    /// It is to end at once.
    is_cut_off: Notify,
}

/// The streams of a window.
#[derive(Debug)]
struct Recent {
    /// Its begin. After the goodbye there are no more windows: who is honest begins nothing then.
    since: Instant,
    n_begun: u32,
    /// Of these, the ones that were reset before their answer, soon.
    n_given_up: u32,
    is_goodbye_said: bool,
}

/// What becomes of a connection whose client resets too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Goodbye,
    CutOff,
}

/// One of them, while it is open.
#[derive(Debug)]
struct Stream {
    streams: Arc<Streams>,
    _under_way: UnderWay,
    /// None for the one that has the connection's own.
    place: Option<OwnedSemaphorePermit>,
    since: Instant,
    is_answered: bool,
}

/// An answer on its way.
#[derive(Debug)]
struct Answer {
    body: Body,
    /// Of its last frame, what is still to be handed on.
    rest: Bytes,
    /// None for a refusal.
    stream: Option<Stream>,
}

/// Runs the streams, each until it ends or its client takes nothing for too long.
#[derive(Clone, Debug)]
struct Runner {
    write_timeout: Duration,
}

/// Serves a connection until it ends, or, once the host drains, until its requests under way have ended.
pub(crate) async fn serve<I, S>(io: I, service: S, terms: Terms, phase: watch::Receiver<Phase>)
where
    I: Read + Write + Unpin + Send + 'static,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
{
    let (n_open, open) = watch::channel(0);
    let streams = Arc::new(Streams::new(terms.connection, n_open));
    let (opened, ending, unread) = (Arc::clone(&streams), phase.clone(), terms.unread);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let mut stream = opened.open();
        if stream.is_none() {
            tracing::debug!("a request of an open connection finds no place");
            request.extensions_mut().insert(NoPlace);
        }
        let (request, rest) = unread::lend(request);
        let answer = service.call(request.map(Body::new));
        let phase = ending.clone();
        async move {
            let response = answer.await?;
            if let Some(left) = rest.of_refusal(response.status()).filter(|_| stream.is_some()) {
                // The place may be somebody else's meanwhile.
                stream.take().into_iter().for_each(Stream::refused);
                unread::discard(left, unread, phase).await;
            }
            Ok::<_, Infallible>(response.map(|body| Answer::new(body, stream)))
        }
    });
    let mut builder = http2::Builder::new(Runner { write_timeout: terms.write_timeout });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(terms.max_header_bytes)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(MAX_SEND_BYTES)
        .max_pending_accept_reset_streams(MAX_UNSEEN_RESETS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let connection = builder.serve_connection(io, service);
    tokio::select! {
        () = until_over(connection, (phase, open), terms.idle, &streams) => {}
        () = streams.is_cut_off.notified() => {
            tracing::debug!("a client goes on resetting streams after the goodbye, and loses the connection");
        }
    }
}

/// Runs a connection until it ends; says goodbye when the host drains, nobody asks anything, or too much is reset.
async fn until_over(
    connection: impl GracefulConnection<Error = hyper::Error>,
    (mut phase, mut open): (watch::Receiver<Phase>, watch::Receiver<u32>),
    limit: Duration,
    streams: &Streams,
) {
    let mut connection = pin!(connection);
    let is_told = tokio::select! {
        ended = connection.as_mut() => return note(ended),
        () = reached(&mut phase, Phase::Draining) => true,
        () = idle(&mut open, limit) => false,
        () = streams.is_misused.notified() => {
            tracing::debug!("a client opens streams and resets them, and may open no more");
            false
        }
    };
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = connection => note(ended),
        // Who says nothing to that is gone, or holds the place on purpose. At the end of the host there is another limit.
        () = idle(&mut open, GOODBYE), if !is_told => {}
    }
}

/// Completes once no stream has been open for so long.
async fn idle(open: &mut watch::Receiver<u32>, limit: Duration) {
    loop {
        if open.wait_for(|n| *n == 0).await.is_err() {
            // The connection is gone with its streams, and whoever waits for that knows.
            return std::future::pending().await;
        }
        if tokio::time::timeout(limit, open.changed()).await.is_err() {
            return;
        }
    }
}

fn note(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

// === impl Streams ===

impl Streams {
    fn new(connection: Arc<Connection>, n_open: watch::Sender<u32>) -> Self {
        let (is_misused, is_cut_off) = (Notify::new(), Notify::new());
        let recent = Mutex::new(Recent::new(Instant::now()));
        Self { connection, is_taken: AtomicBool::new(false), n_open, recent, is_misused, is_cut_off }
    }

    /// A place for another stream; none where the listener is full.
    fn open(self: &Arc<Self>) -> Option<Stream> {
        let under_way = self.connection.begin()?;
        let place = match self.is_taken.swap(true, Ordering::Relaxed) {
            false => None,
            true => Some(self.connection.another_place()?),
        };
        self.n_open.send_modify(|n| *n += 1);
        let since = Instant::now();
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).begun(since);
        Some(Stream { streams: Arc::clone(self), _under_way: under_way, place, since, is_answered: false })
    }

    /// A stream is gone that had no answer yet.
    fn given_up(&self, begun: Instant) {
        let end = self.recent.lock().unwrap_or_else(PoisonError::into_inner).given_up(begun, Instant::now());
        match end {
            Some(End::Goodbye) => self.is_misused.notify_one(),
            Some(End::CutOff) => self.is_cut_off.notify_one(),
            None => {}
        }
    }
}

// === impl Recent ===

impl Recent {
    fn new(now: Instant) -> Self {
        Self { since: now, n_begun: 0, n_given_up: 0, is_goodbye_said: false }
    }

    fn begun(&mut self, now: Instant) {
        if !self.is_goodbye_said && now.duration_since(self.since) >= WINDOW {
            *self = Self::new(now);
        }
        self.n_begun = self.n_begun.saturating_add(1);
    }

    fn given_up(&mut self, begun: Instant, now: Instant) -> Option<End> {
        // One of an earlier window is in none of the numbers of this one.
        if begun < self.since || now.duration_since(begun) >= SOON {
            return None;
        }
        self.n_given_up = self.n_given_up.saturating_add(1);
        if self.is_goodbye_said {
            return (self.n_given_up >= CUT_OFF).then_some(End::CutOff);
        }
        self.is_goodbye_said = self.n_given_up > MAX_GIVEN_UP && self.n_given_up > self.n_begun / 2;
        self.is_goodbye_said.then_some(End::Goodbye)
    }
}

impl Stream {
    /// Its client has an answer, which takes no place.
    fn refused(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.place.is_none() {
            self.streams.is_taken.store(false, Ordering::Relaxed);
        }
        if !self.is_answered {
            self.streams.given_up(self.since);
        }
        self.streams.n_open.send_modify(|n| *n -= 1);
    }
}

// === impl Answer ===

impl Answer {
    fn new(body: Body, stream: Option<Stream>) -> Self {
        let mut answer = Self { body, rest: Bytes::new(), stream };
        if answer.body.is_end_stream() {
            answer.begins();
        }
        answer
    }

    /// Its head is on its way. Not before: a handler that finds its stream reset has an answer too, which nobody asks for more of.
    fn begins(&mut self) {
        self.stream.iter_mut().for_each(|stream| stream.is_answered = true);
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        // What h2 has been given nobody watches any more. So the last byte of all is for itself: there is room for it only when
        // there was room for all that comes before.
        let n_bytes = match self.rest.len() {
            n @ 2..=PIECE_BYTES if self.body.is_end_stream() => n - 1,
            n => n.min(PIECE_BYTES),
        };
        let piece = self.rest.split_to(n_bytes);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.begins();
        let polled = self.poll_piece(cx);
        // The next frame is asked for when there is room for it.
        let owed = matches!(polled, Poll::Ready(Some(_))).then(Instant::now);
        let _ = OWED.try_with(|since| since.set(owed));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, of_body) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(of_body.lower() + rest);
        of_body.upper().into_iter().for_each(|upper| hint.set_upper(upper + rest));
        hint
    }
}

// === impl Runner ===

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Runner {
    fn execute(&self, stream: F) {
        // A task of its own, which ends with its connection.
        TokioExecutor::new().execute(OWED.scope(Cell::new(None), until_stalled(stream, self.write_timeout)));
    }
}

/// Runs a stream; giving it up resets it.
async fn until_stalled(stream: impl Future<Output = ()>, limit: Duration) {
    let (mut stream, mut look) = (pin!(stream), pin!(tokio::time::sleep(limit)));
    poll_fn(|cx| {
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        while look.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let owed = OWED.with(Cell::get);
            if owed.is_some_and(|since| now.duration_since(since) >= limit) {
                tracing::debug!("a client does not take its answer, and loses the stream");
                return Poll::Ready(());
            }
            look.as_mut().reset(owed.unwrap_or(now) + limit);
        }
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_counts_by_the_window() {
        // Rounds of (streams begun, of these given up at once) and the time between two of them; at which given up one is said what.
        type Case = (&'static [(u32, u32)], u64, usize, &'static [(u32, End)]);
        let cases: [Case; 7] = [
            // A user who hangs up ten times a second, for two minutes; the same among many who do not.
            (&[(10, 10)], 1_000, 120, &[]),
            (&[(1_000, 450)], 1_000, 10, &[]),
            (&[(20, 20)], 1_000, 10, &[]),
            (&[(21, 21)], 1_000, 10, &[(201, End::Goodbye)]),
            (&[(200, 200), (0, 0)], 5_000, 100, &[]),
            (&[(300, 0), (151, 0), (200, 201)], 0, 1, &[]),
            // Who goes on has no new window, however slowly.
            (&[(100, 100)], 999, 8, &[(201, End::Goodbye), (800, End::CutOff)]),
        ];
        for (i, (rounds, pause_ms, n_times, expect)) in cases.into_iter().enumerate() {
            let mut now = Instant::now();
            let (mut recent, mut n_given_up, mut said) = (Recent::new(now), 0, Vec::new());
            for &(n_begun, given_up) in std::iter::repeat_n(rounds, n_times).flatten() {
                (0..n_begun).for_each(|_| recent.begun(now));
                for _ in 0..given_up {
                    n_given_up += 1;
                    said.extend(recent.given_up(now, now).map(|end| (n_given_up, end)));
                }
                now += Duration::from_millis(pause_ms);
            }
            assert_eq!(said, expect, "{i}");
            let of_before = now.checked_sub(Duration::from_secs(60)).unwrap_or(now);
            assert_eq!(recent.given_up(of_before, now), None, "{i}: it has waited");
        }
    }
}
