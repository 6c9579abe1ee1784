//! Connections to one upstream: kept and used again by hyper's client, and its requests spread over a few of them.
//!
//! HTTP/1.1 has a connection for every request under way. HTTP/2 has one for many, and hyper's client keeps one: past the
//! streams that its server allows, requests would wait within it unseen. So there is a client for each of a few connections,
//! called a lane, and a request takes the lane with the fewest: as many lanes as it needs for no connection to have more than
//! the 100 streams that servers are asked to allow (RFC 9113, 6.5.2). Not a pool of our own: what is hard about one, the
//! races between a request and the end of its connection, hyper has solved.

use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{Extensions, Request, Response};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pointsman_telemetry::UpstreamMetrics;

use super::Protocol;
use super::wire::{self, Connector};
use crate::held::Held;

/// Size of the head of a response.
const MAX_HEAD_BYTES: u32 = 64 << 10;
/// Lines of the head of a response.
const MAX_HEADERS: usize = 100;
/// How long an idle connection is kept; below what servers usually keep theirs, so that this side closes first.
const IDLE: Duration = Duration::from_secs(55);
/// Streams of a connection.
const MAX_STREAMS: u32 = 100;
/// Bytes of a stream that may have come and not been read.
const STREAM_WINDOW: u32 = 64 << 10;
/// Bytes of a connection; those of all its streams, so that clients that do not read hold up no others.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;
/// How long a connection with open streams may be silent until it is asked for a sign, and how long that may take: found out
/// before a request on it gives up.
const PING: Duration = Duration::from_secs(10);
const PONG: Duration = Duration::from_secs(5);
/// Streams that were given up and may still be sent something; what comes for others counts as a fault of the connection.
const MAX_LATE_STREAMS: usize = 1_024;

/// Connections to one upstream.
#[derive(Debug)]
pub(super) struct Pool {
    lanes: Vec<Client<Connector, Full<Bytes>>>,
    /// Whether all of them speak HTTP/2.
    is_h2: bool,
    /// Requests on each lane.
    loads: Arc<Mutex<Vec<u32>>>,
    metrics: UpstreamMetrics,
}

/// A request's place on a lane, until its answer has been read.
#[derive(Debug)]
pub(super) struct Place {
    loads: Arc<Mutex<Vec<u32>>>,
    lane: usize,
    /// Whether there was no other on it.
    is_first: bool,
}

/// The body of a response; dropping it gives up the rest.
pub(super) type Body = Held<Incoming, Place>;

/// What a failed request says of whether it was worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worked {
    /// Its server has said that it was not.
    No,
    /// Its connection had carried others, and ended: its server may have closed it in the very moment.
    Perhaps,
    /// It may well have been.
    Yes,
}

fn held(loads: &Mutex<Vec<u32>>) -> MutexGuard<'_, Vec<u32>> {
    loads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What HTTP/2 says of an error, where it says something.
pub(super) fn h2_error(error: &Error) -> Option<&h2::Error> {
    error.source()?.source()?.downcast_ref()
}

/// How far a request had come; whether the pool is of HTTP/2 alone, and whether it shares its lane.
fn worked(error: &Error, is_h2: bool, shares: bool) -> Worked {
    if let Some(error) = h2_error(error) {
        // Streams that a GOAWAY leaves out have not been begun; those that it lets end fail otherwise, if they do.
        let is_refused =
            error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM));
        return if is_refused { Worked::No } else { Worked::Yes };
    }
    let cause = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
    if cause.is_some_and(hyper::Error::is_canceled) {
        // Its connection ended before the request had left.
        return Worked::No;
    }
    let (Some(info), Some(false)) = (error.connect_info(), cause.map(hyper::Error::is_parse)) else {
        return Worked::Yes;
    };
    let mut extensions = Extensions::new();
    info.get_extras(&mut extensions);
    // A connection that ends under several requests was in use, and not about to be closed for want of any.
    let is_busy = shares && (is_h2 || info.is_negotiated_h2());
    if wire::was_used(&extensions) && !is_busy { Worked::Perhaps } else { Worked::Yes }
}

// === impl Pool ===

impl Pool {
    /// For so many requests at once; `connections` are as many as will be opened at the start.
    pub(super) fn new(connector: &Connector, protocol: Protocol, (requests, connections): (u32, u32)) -> Self {
        let lanes = match (protocol, &connector.trust) {
            (Protocol::Http1, _) | (Protocol::Auto, None) => 1,
            (Protocol::Http2, _) | (Protocol::Auto, Some(_)) => connections.max(requests.div_ceil(MAX_STREAMS)).max(1),
        };
        // Its tasks are one per connection and request; they end with the connection, which ends with the pool.
        let lane = |_| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .timer(TokioTimer::new())
                .pool_idle_timeout(IDLE)
                .pool_max_idle_per_host(requests.div_ceil(lanes) as usize)
                .http1_max_buf_size(MAX_HEAD_BYTES as usize)
                .http1_max_headers(MAX_HEADERS)
                .http2_only(protocol == Protocol::Http2)
                .http2_initial_stream_window_size(STREAM_WINDOW)
                .http2_initial_connection_window_size(CONNECTION_WINDOW)
                .http2_max_header_list_size(MAX_HEAD_BYTES)
                .http2_keep_alive_interval(PING)
                .http2_keep_alive_timeout(PONG)
                .http2_max_concurrent_reset_streams(MAX_LATE_STREAMS)
                .build(connector.clone())
        };
        let loads = Arc::new(Mutex::new(vec![0; lanes as usize]));
        let is_h2 = protocol == Protocol::Http2;
        Self { lanes: (0..lanes).map(lane).collect(), is_h2, loads, metrics: connector.metrics.clone() }
    }

    /// Sends a request on the lane with the fewest. Where that fails: with how far it had come.
    pub(super) async fn request(&self, request: Request<Full<Bytes>>) -> Result<Response<Body>, (Worked, Error)> {
        let place = self.place();
        let sent = self.lanes[place.lane].request(request).await;
        let response = sent.map_err(|error| (worked(&error, self.is_h2, !place.is_first), error))?;
        wire::arrived(response.extensions(), &self.metrics);
        Ok(response.map(|incoming| Body::new(incoming, place)))
    }

    fn place(&self) -> Place {
        let mut loads = held(&self.loads);
        // The first of equals: what is seldom needed becomes idle, and is closed.
        let lane = (0..loads.len()).min_by_key(|lane| loads[*lane]).unwrap_or_default();
        loads[lane] += 1;
        Place { loads: Arc::clone(&self.loads), lane, is_first: loads[lane] == 1 }
    }
}

// === impl Place ===

impl Drop for Place {
    fn drop(&mut self) {
        held(&self.loads)[self.lane] -= 1;
    }
}
