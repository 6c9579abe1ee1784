//! The connection loop: two listeners, bounded connections, bounded heads, a bounded goodbye.
//!
//! hyper directly and not `axum::serve`, which has no limit on connections, no header timeout and no bound on how long a
//! graceful shutdown may take. Nor its detection of the protocol, which waits for the first bytes for ever.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use hyper_util::service::TowerToHyperService;
use pointsman_telemetry::Metrics;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use crate::admin::guard::Peer;
use crate::config::ServerConfig;
use crate::places::{Connection, Counted, NoPlace, Places};
use crate::state::ServerState;
use crate::streams;
use crate::tls::{Chosen, Tls, Unshaken};
use crate::{admin_router, batch, data_router, unread};

/// How long to wait after `accept` failed, as it does when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are accepted between two turns of those that there are.
const ACCEPTED_AT_ONCE: usize = 4;

/// A last moment for connections that are still sending.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);

/// How long a TLS handshake may take, and no longer than the head of a request: a few round trips on the slowest of links.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The sockets, bound by the app, which knows their addresses.
#[derive(Debug)]
pub struct Listeners {
    /// For everybody.
    pub data: Plane,
    /// For operators.
    pub admin: Plane,
}

/// How far a host has come that serves connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Serving,
    /// What is under way may end; HTTP/2 has a word that says so.
    Draining,
    /// Connections end.
    Closing,
}

/// A socket, and how to speak on it.
#[derive(Debug)]
pub struct Plane {
    /// Bound.
    pub socket: TcpListener,
    /// In the clear without it.
    pub tls: Option<Arc<Tls>>,
}

impl From<TcpListener> for Plane {
    fn from(socket: TcpListener) -> Self {
        Self { socket, tls: None }
    }
}

/// Why serving cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The admin listener is reachable from elsewhere and the configuration does not expect that.
    #[error("the admin plane would listen on {0}, beyond loopback: configure a token and say that it is remote")]
    OpenAdmin(SocketAddr),
    /// A listener has no address.
    #[error("a listener has no local address: {0}")]
    Listener(#[from] std::io::Error),
}

/// Serves both planes until `shutdown` completes, then stops admitting, lets what runs finish within the grace period, and
/// closes what is left.
///
/// # Errors
/// The admin listener contradicts the configuration.
pub async fn serve(
    listeners: Listeners,
    state: Arc<ServerState>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let admin_at = listeners.admin.socket.local_addr()?;
    let guarded = state.config.admin_remote && !state.config.admin_tokens.is_empty();
    if !(admin_at.ip().is_loopback() || guarded) {
        return Err(ServeError::OpenAdmin(admin_at));
    }
    for (_, upstream) in state.engine.catalog().upstreams() {
        state.spawn(Arc::clone(upstream).watch());
    }
    let (phase, phases) = watch::channel(Phase::Serving);
    let mut planes = JoinSet::new();
    let both = [("data", listeners.data, data_router(&state)), ("admin", listeners.admin, admin_router(&state))];
    let bounds = Bounds::new(&state.config, &state.metrics);
    for (name, plane, router) in both {
        let (terms, phases) = (bounds.of(name), phases.clone());
        planes.spawn(async move { accept(&plane, router, terms, phases, Phase::Closing).await });
    }
    drop(phases);
    state.spawn(batch::run(Arc::clone(&state)));
    shutdown.await;
    state.drain();
    let _ = phase.send(Phase::Draining);
    tracing::info!(in_flight = state.in_flight(), "shutting down: requests in flight may finish");
    let grace = Duration::from_millis(state.config.grace_ms);
    if tokio::time::timeout(grace, state.admission.empty()).await.is_err() {
        tracing::warn!(in_flight = state.in_flight(), "the grace period is over; closing what is left");
    }
    state.stop_tasks().await;
    // Idle connections end at once; one that is still sending gets a last moment for its bytes.
    let _ = phase.send(Phase::Closing);
    let goodbye = async { while planes.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    planes.shutdown().await;
    Ok(())
}

/// What connections are held to.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    n_places: usize,
    header_timeout: Duration,
    write_timeout: Duration,
    max_header_bytes: usize,
    unread: unread::Limits,
    metrics: Arc<Metrics>,
}

impl Bounds {
    pub(crate) fn new(config: &ServerConfig, metrics: &Arc<Metrics>) -> Self {
        Self {
            n_places: config.max_connections,
            header_timeout: Duration::from_millis(config.header_timeout_ms),
            write_timeout: Duration::from_millis(config.write_timeout_ms),
            max_header_bytes: config.max_header_bytes,
            unread: unread::Limits::of(config),
            metrics: Arc::clone(metrics),
        }
    }

    /// With the places of a plane.
    pub(crate) fn of(&self, plane: &'static str) -> (Self, Arc<Places>) {
        (self.clone(), Places::new(plane, self.n_places, self.metrics.connections(plane)))
    }
}

/// Accepts connections until the phase `last`, then waits for those it has. A thousand clients that come at once let whoever is
/// served have a turn after every few of them: else no stream would go on before each of the thousand has been listened to.
pub(crate) async fn accept(
    plane: &Plane,
    router: Router,
    (bounds, places): (Bounds, Arc<Places>),
    mut phase: watch::Receiver<Phase>,
    last: Phase,
) {
    let mut connections = JoinSet::new();
    for n in 1usize.. {
        while connections.try_join_next().is_some() {}
        if n.is_multiple_of(ACCEPTED_AT_ONCE) {
            tokio::task::yield_now().await;
        }
        // One waits for a place here, the next ones in the kernel's backlog.
        let next = async {
            let (stream, from) = plane.socket.accept().await?;
            io::Result::Ok((stream, from, places.take().await))
        };
        let accepted = tokio::select! {
            biased;
            () = reached(&mut phase, last) => break,
            accepted = next => accepted,
        };
        match accepted {
            Ok((stream, from, seat)) => {
                let connected = Arc::clone(&seat.connection);
                let accepted = Accepted { stream, from: from.ip(), tls: plane.tls.clone(), connected };
                let connection = connection(accepted, router.clone(), bounds.clone(), phase.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = connection => {}
                        () = seat.connection.is_told() => {}
                    }
                    drop(seat);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

/// A connection that nobody has read from.
struct Accepted {
    stream: TcpStream,
    from: IpAddr,
    tls: Option<Arc<Tls>>,
    connected: Arc<Connection>,
}

/// One connection, from its first byte to its last.
fn connection(
    Accepted { stream, from, tls, connected }: Accepted,
    router: Router,
    Bounds { header_timeout, write_timeout, max_header_bytes, unread, metrics, .. }: Bounds,
    mut phase: watch::Receiver<Phase>,
) -> impl Future<Output = ()> + use<> {
    // Tokens are small writes that must not wait for an acknowledgement.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    // A client that stops reading must not hold its request's place for as long as it likes.
    let timed = move |stream: TcpStream| {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(write_timeout));
        Box::pin(stream)
    };
    let terms = streams::Terms {
        max_header_bytes: u32::try_from(max_header_bytes).unwrap_or(u32::MAX),
        idle: header_timeout,
        write_timeout,
        connection: Arc::clone(&connected),
        unread,
    };
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header_timeout).max_buf_size(max_header_bytes);
    builder.keep_alive(!connected.is_spare());
    async move {
        let service = router.map_request(move |mut request: Request<Body>| {
            request.extensions_mut().insert(Peer(from));
            request
        });
        let service = TowerToHyperService::new(service);
        let Some(tls) = tls else {
            let begun = tokio::select! {
                begun = tokio::time::timeout(header_timeout, begins_http2(&stream)) => begun,
                () = reached(&mut phase, Phase::Closing) => return,
            };
            let Ok(Ok(is_http2)) = begun else { return };
            let stream = TokioIo::new(timed(stream));
            return match is_http2 {
                true => streams::serve(stream, service, terms, phase).await,
                false => {
                    let service = counted(service, connected, (unread, phase.clone()));
                    until_told(builder.serve_connection(stream, service), phase).await;
                }
            };
        };
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(HANDSHAKE.min(header_timeout), tls.shake(stream, timed)) => shaken,
            () = reached(&mut phase, Phase::Closing) => return,
        };
        match shaken.unwrap_or(Err(Unshaken::Slow)) {
            Ok((stream, Chosen::Http2)) => streams::serve(TokioIo::new(stream), service, terms, phase).await,
            Ok((stream, Chosen::Http1)) => {
                let service = counted(service, connected, (unread, phase.clone()));
                until_told(builder.serve_connection(TokioIo::new(stream), service), phase).await;
            }
            Err(error) => {
                metrics.tls_failure(error.reason());
                tracing::debug!(%error, "a connection ended before its first request");
            }
        }
    }
}

/// A service of HTTP/1.1 whose connection is busy from the end of a head to that of its answer.
fn counted<S>(
    service: S,
    connection: Arc<Connection>,
    (unread, phase): (unread::Limits, watch::Receiver<Phase>),
) -> impl Service<Request<Incoming>, Response = Response<Counted>, Error = Infallible, Future: Send> + Send
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send,
    S::Future: Send,
{
    service_fn(move |mut request: Request<Incoming>| {
        let mut under_way = connection.begin();
        if under_way.is_none() {
            request.extensions_mut().insert(NoPlace);
        }
        let (request, rest) = unread::lend(request);
        let answer = service.call(request.map(Body::new));
        let (connection, phase) = (Arc::clone(&connection), phase.clone());
        async move {
            let response = answer.await?;
            if let Some(left) = rest.of_refusal(response.status()).filter(|_| under_way.is_some()) {
                // The place may be somebody else's meanwhile.
                drop(under_way.take());
                unread::discard(left, unread, phase).await;
                under_way = connection.begin();
            }
            Ok(response.map(|body| Counted::new(body, under_way)))
        }
    })
}

/// Whether a client begins with HTTP/2 without having asked: no method begins as that does (RFC 9113, 3.4). One that sends its
/// first three bytes apart is taken for HTTP/1.1.
async fn begins_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; 3];
    let n = stream.peek(&mut first).await?;
    Ok(first[..n] == *b"PRI")
}

/// Serves a connection; once told to stop, its request under way and no other.
async fn until_told(connection: impl GracefulConnection<Error = hyper::Error>, mut phase: watch::Receiver<Phase>) {
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = reached(&mut phase, Phase::Closing) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

/// Completes when the host has come so far, or when the one who would say so is gone.
pub(crate) async fn reached(phase: &mut watch::Receiver<Phase>, least: Phase) {
    let _ = phase.wait_for(|phase| *phase >= least).await;
}
