//! Upstreams: OpenAI-compatible servers elsewhere (another Pointsman, vLLM, llama.cpp) as rows that the router may choose.
//!
//! A request for one leaves above tokenization: what goes out is the client's own body in OpenAI's form, and what comes back is
//! text in chunks, told through the same feed as tokens of a replica here. One [`Upstream`] is one server: its pooled
//! connections (`pool`, opened by `wire`, trusted by `trust`), how many requests are there, its probes, its circuit. Whoever
//! is sent there holds a `Seat`. The answer is read by `answer`, told by `relay`; what went wrong is a `Mishap`.

mod answer;
mod body;
mod circuit;
mod hedge;
mod load;
mod mishap;
mod pool;
mod relay;
mod trust;
mod wire;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use axum::http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use axum::http::{Method, Request, Response, Uri};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use pointsman_sched::ids::Micros;
use pointsman_sched::predict::Outlook;
use pointsman_sched::publish::ReplicaGauges;
use pointsman_telemetry::{Metrics, UpstreamMetrics, UpstreamOutcome};
use rustls::pki_types::ServerName;

use self::answer::{Answer, Said};
use self::circuit::{Circuit, Gate};
use self::hedge::Allowance;
use self::load::Load;
use self::pool::{Body, Pool, Worked};
use self::trust::Trust;
use self::wire::Connector;
use crate::config::Secret;
use crate::ports::Clock;

pub(crate) use self::body::{Onward, fold};
pub(crate) use self::mishap::{Blame, Mishap};
pub(crate) use self::relay::{Relay, RelayParts};
pub use self::trust::{Roots, RootsError};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Bytes of an upstream's metrics that are read.
const MAX_METRICS_BYTES: usize = 4 << 20;
/// Bytes of an error's body that are read.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// An end weighs 1/32, and so does a time to the first byte: as the columns of replicas here.
const WEIGHT: u32 = 32;
/// A kept connection that was closed shows it within this time; what fails later has been worked on.
const STALE: Micros = 1_000_000;
/// How often a request is sent to an upstream that has not begun it.
const MAX_SENDS: u32 = 3;

/// What is said of an upstream in the configuration.
#[derive(Clone, Debug)]
pub struct UpstreamTerms {
    /// As in `east`: for metrics, logs and errors.
    pub name: Arc<str>,
    /// As in `http://10.0.0.7:8000`; the paths of the API are put behind it.
    pub url: String,
    /// What is spoken there.
    pub protocol: Protocol,
    /// Who may vouch for it, where its URL is `https`.
    pub roots: Roots,
    /// What it calls the model.
    pub model: String,
    /// What follows `Bearer `.
    pub api_key: Option<Secret>,
    /// Requests that may be there.
    pub max_in_flight: u32,
    /// Connections that are opened at the start.
    pub connections: u32,
    /// Time for a connection to be there.
    pub connect_timeout: Duration,
    /// Time until the first event of an answer.
    pub first_byte_timeout: Duration,
    /// Time without that until another upstream is asked as well; zero: none is.
    pub hedge_after: Duration,
    /// Time without a byte in the middle of an answer.
    pub idle_timeout: Duration,
    /// Size of an answer.
    pub max_answer_bytes: usize,
    /// What answers 2xx while it is well.
    pub probe_path: String,
    /// Where it has metrics under vLLM's names, read with each probe; empty for none.
    pub metrics_path: String,
    /// Between two probes; zero for none.
    pub probe_interval: Duration,
    /// Probes in a row that fail until it is sent nothing.
    pub probe_failures: u32,
}

/// What is spoken to an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// Over TLS what it chooses of both, HTTP/2 first; HTTP/1.1 in the clear.
    #[default]
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2; in the clear without asking first.
    Http2,
}

/// An upstream that cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No URL, or one that this host cannot speak to.
    #[error("`{url}` must be http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]")]
    Url {
        /// What was configured.
        url: String,
    },
    /// Not a path.
    #[error("`{path}` is no path: it begins with `/`, as in `/health`")]
    Path {
        /// What was configured.
        path: String,
    },
    /// A key that no header can carry.
    #[error("its API key has letters that a header cannot carry")]
    Key,
    /// Nobody can vouch for it.
    #[error("its certificate cannot be checked: {0}")]
    Roots(#[from] RootsError),
}

/// One server elsewhere.
#[derive(Debug)]
pub struct Upstream {
    terms: UpstreamTerms,
    /// Scheme, host, port, and the path in front of the API's.
    origin: String,
    connector: Connector,
    authorization: Option<HeaderValue>,
    pool: Pool,
    clock: Arc<dyn Clock>,
    gauges: Arc<ReplicaGauges>,
    metrics: UpstreamMetrics,
    circuit: Mutex<Circuit>,
    hedges: Allowance,
    /// Probes that failed in a row.
    failed_probes: AtomicU32,
}

/// A request's place at an upstream, until its answer has been read.
#[derive(Debug)]
pub(crate) struct Seat {
    upstream: Arc<Upstream>,
    /// Prompt tokens that wait for its first byte.
    queued_tokens: u32,
    is_trial: bool,
    outcome: Option<UpstreamOutcome>,
}

/// An answer that has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    answer: Answer,
    first: Said,
}

// === impl Upstream ===

impl Upstream {
    /// Checks what was configured. Connections are opened by the first probes.
    ///
    /// # Errors
    /// What cannot work.
    pub fn new(terms: UpstreamTerms, clock: Arc<dyn Clock>, metrics: &Metrics) -> Result<Arc<Self>, UpstreamError> {
        let (uri, is_tls) = address(&terms.url)?;
        for path in [&terms.probe_path, &terms.metrics_path].into_iter().filter(|path| !path.is_empty()) {
            if !path.starts_with('/') || path.parse::<Uri>().is_err() {
                return Err(UpstreamError::Path { path: path.clone() });
            }
        }
        let base = terms.url.trim_end_matches('/');
        let origin = base.strip_suffix("/v1").unwrap_or(base).to_owned();
        let bearer = |key: &Secret| HeaderValue::from_str(&format!("Bearer {}", key.expose()));
        let authorization = terms.api_key.as_ref().map(bearer).transpose().map_err(|_| UpstreamError::Key)?;
        let authorization = authorization.map(|mut value| {
            value.set_sensitive(true);
            value
        });
        let metrics = metrics.upstream(&terms.name);
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let trust = match ServerName::try_from(host) {
            _ if !is_tls => None,
            Ok(name) => Some(Arc::new(Trust::new(name.to_owned(), terms.protocol, terms.roots.clone())?)),
            Err(_) => return Err(UpstreamError::Url { url: terms.url }),
        };
        let connector = Connector::new(uri, terms.connect_timeout, trust, metrics.clone());
        let pool = Pool::new(&connector, terms.protocol, (terms.max_in_flight, terms.connections));
        let gauges = Arc::new(ReplicaGauges::default());
        gauges.running_limit.store(terms.max_in_flight, Ordering::Relaxed);
        let (circuit, failed_probes) = (Mutex::default(), AtomicU32::new(0));
        metrics.up.set(1);
        Ok(Arc::new(Self {
            terms,
            origin,
            connector,
            authorization,
            pool,
            clock,
            gauges,
            metrics,
            circuit,
            hedges: Allowance::default(),
            failed_probes,
        }))
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.terms.name
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.terms.url
    }

    /// Opens a connection, over TLS to a server that is trusted, and closes it.
    ///
    /// # Errors
    /// It takes none, or is somebody else.
    pub async fn reach(&self) -> std::io::Result<()> {
        self.connector.reach().await
    }

    /// Takes other roots for the connections to come; without TLS there is nothing to take them.
    ///
    /// # Errors
    /// They cannot be used, and what was trusted before is.
    pub fn replace_roots(&self, roots: Roots) -> Result<(), RootsError> {
        self.connector.trust.as_ref().map_or(Ok(()), |trust| trust.replace(roots))
    }

    /// The load that routers see: what this host has there.
    #[must_use]
    pub fn gauges(&self) -> &Arc<ReplicaGauges> {
        &self.gauges
    }

    /// Whether it is sent requests.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.health().is_some()
    }

    /// What the column `health` says of it; none while it is sent nothing.
    pub(crate) fn health(&self) -> Option<u8> {
        // Without an interval nobody would find out that it is well again.
        let is_probed = !self.terms.probe_interval.is_zero();
        if is_probed && self.failed_probes.load(Ordering::Relaxed) >= self.terms.probe_failures {
            return None;
        }
        match self.circuit().gate(self.clock.now()) {
            Gate::Closed => Some(0),
            Gate::Trial => Some(2),
            Gate::Open => None,
        }
    }

    /// Takes a place; none where it is full, down, or on trial by another request.
    pub(crate) fn enter(self: &Arc<Self>, prompt_tokens: u32) -> Option<Seat> {
        let add = |n: u32| Some(n + 1).filter(|n| *n <= self.terms.max_in_flight);
        self.gauges.running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        let gate = match self.health() {
            None => Gate::Open,
            Some(_) => self.circuit().pass(self.clock.now()),
        };
        self.gauges.queued_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
        self.metrics.in_flight.inc();
        let is_trial = gate == Gate::Trial;
        let seat = Seat { upstream: Arc::clone(self), queued_tokens: prompt_tokens, is_trial, outcome: None };
        self.look();
        if gate == Gate::Open {
            seat.leave_unused();
            return None;
        }
        Some(seat)
    }

    /// The share of its places that are taken, in millionths.
    pub(crate) fn busy_ppm(&self) -> u32 {
        self.gauges.busy_ppm.load(Ordering::Relaxed)
    }

    /// Whether it has room, as far as one can see.
    pub(crate) fn has_room(&self) -> bool {
        self.gauges.running.load(Ordering::Relaxed) < self.terms.max_in_flight && self.is_up()
    }

    /// How long a request waits for it until another is asked as well; none where none is.
    pub(crate) fn hedge_after(&self) -> Option<Duration> {
        Some(self.terms.hedge_after).filter(|after| !after.is_zero())
    }

    /// Asks for another upstream for one more of its requests, where so many may be hedged.
    pub(crate) fn hedged<T>(&self, other: impl FnOnce() -> Option<T>) -> Option<T> {
        if !self.hedges.take() {
            return None;
        }
        let other = other();
        match other.is_some() {
            true => self.metrics.hedges.inc(),
            false => self.hedges.give_back(),
        }
        other
    }

    /// The other answered it.
    pub(crate) fn hedge_won(&self) {
        self.metrics.hedges_won.inc();
    }

    /// The other began to answer first, so long after this one was asked.
    pub(crate) fn outrun(&self, after: Micros) {
        // At least so long would it have taken: who is always outrun must not look quick.
        self.began_after(after);
    }

    /// It failed a request that somebody else took.
    pub(crate) fn retried(&self) {
        self.metrics.retries.inc();
    }

    /// Opens the connections of the start, then probes for ever.
    pub(crate) async fn watch(self: Arc<Self>) {
        let first: Vec<_> = (0..self.terms.connections).map(|_| self.probe()).collect();
        // One probe as far as health goes: an upstream that starts a moment after this host is not down for that.
        let mut probes = join(first).await;
        probes.sort_by_key(Result::is_err);
        if self.terms.probe_interval.is_zero() {
            return;
        }
        if let Some(best) = probes.into_iter().next() {
            self.probed(best);
        }
        loop {
            tokio::time::sleep(self.terms.probe_interval).await;
            self.probed(self.probe().await);
            if !self.terms.metrics_path.is_empty() {
                self.read_load().await;
            }
        }
    }

    async fn probe(&self) -> Result<(), Mishap> {
        self.get(&self.terms.probe_path, MAX_ERROR_BYTES).await.map(drop)
    }

    /// Shows routers what the upstream says of its load; where it does not answer, what it said last stands.
    async fn read_load(&self) {
        let Ok(text) = self.get(&self.terms.metrics_path, MAX_METRICS_BYTES).await else { return };
        Load::read(&String::from_utf8_lossy(&text), &self.terms.model).show(&self.gauges);
    }

    /// What stands at a path; an answer that is an error, or larger than `limit`, is none.
    async fn get(&self, path: &str, limit: usize) -> Result<Bytes, Mishap> {
        let ask = async {
            let response = self.send(self.request(Method::GET, path, Bytes::new())).await?;
            let status = response.status();
            // Read to its end: a connection with half an answer is not used again.
            let body = Limited::new(response.into_body(), limit).collect().await;
            let body = body.map(http_body_util::Collected::to_bytes).map_err(|_| Mishap::Broken)?;
            if status.is_success() { Ok(body) } else { Err(Mishap::status(status.as_u16(), &body, 0)) }
        };
        // An upstream that hangs is found out within about an interval.
        let limit = self.terms.first_byte_timeout.min(self.terms.probe_interval.max(Duration::from_secs(1)));
        tokio::time::timeout(limit, ask).await.unwrap_or(Err(Mishap::Silent { limit_ms: millis(limit) }))
    }

    fn probed(&self, probe: Result<(), Mishap>) {
        let most = self.terms.probe_failures;
        match probe {
            Ok(()) => {
                self.metrics.probes_good.inc();
                if self.failed_probes.swap(0, Ordering::Relaxed) >= most {
                    tracing::info!(upstream = &*self.terms.name, "an upstream is well again");
                }
            }
            Err(mishap) => {
                self.metrics.probes_bad.inc();
                let failed = self.failed_probes.load(Ordering::Relaxed).saturating_add(1);
                self.failed_probes.store(failed, Ordering::Relaxed);
                if failed == most {
                    let (upstream, mishap) = (&*self.terms.name, mishap.logged());
                    tracing::warn!(upstream, mishap, "an upstream fails its probes and is sent nothing");
                }
            }
        }
        self.look();
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        // Both parts have been parsed before, and the API's paths are constants.
        *request.uri_mut() = format!("{}{path}", self.origin).parse().unwrap_or_default();
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        request
    }

    /// Sends a request; again where the upstream has not begun it, as on a kept connection that turns out to be closed.
    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Body>, Mishap> {
        let began = self.clock.now();
        let mut n_sent = 1;
        loop {
            let (worked, error) = match self.pool.request(request.clone()).await {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            };
            let is_unbegun = match worked {
                Worked::No => true,
                Worked::Perhaps => self.clock.now().saturating_sub(began) < STALE,
                Worked::Yes => false,
            };
            if !is_unbegun || n_sent == MAX_SENDS {
                return Err(Mishap::of(&error));
            }
            n_sent += 1;
        }
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the gauges up to date that follow from others.
    fn look(&self) {
        let running = u64::from(self.gauges.running.load(Ordering::Relaxed));
        let busy = running * 1_000_000 / u64::from(self.terms.max_in_flight.max(1));
        self.gauges.busy_ppm.store(u32::try_from(busy).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.metrics.up.set(self.is_up().into());
    }

    /// What it took to the first byte, as routers see it: a step of that length, whatever the prompt.
    fn began_after(&self, took: Micros) {
        let before = self.gauges.outlook();
        let now_ns = took.saturating_mul(1_000);
        let step_ns = match before.step_tokens {
            0 => now_ns,
            _ => before.step_ns - before.step_ns / u64::from(WEIGHT) + now_ns / u64::from(WEIGHT),
        };
        self.gauges.look_ahead(Outlook { step_ns, token_ns: 0, step_tokens: u32::MAX });
    }

    fn ended(&self, outcome: UpstreamOutcome, is_trial: bool) {
        self.metrics.ended(outcome);
        let is_fault = match outcome {
            UpstreamOutcome::Answered | UpstreamOutcome::Refused | UpstreamOutcome::Saturated => false,
            UpstreamOutcome::Cancelled if is_trial => return self.circuit().untried(),
            UpstreamOutcome::Cancelled => return,
            _ => true,
        };
        let failed = self.gauges.failed_ppm.load(Ordering::Relaxed);
        let share = if is_fault { 1_000_000 / WEIGHT } else { 0 };
        self.gauges.failed_ppm.store(failed - failed / WEIGHT + share, Ordering::Relaxed);
        if !is_fault {
            return self.circuit().went_well(is_trial);
        }
        let opened = self.circuit().failed(self.clock.now(), is_trial);
        if opened {
            let outcome = outcome.as_str();
            tracing::warn!(
                upstream = &*self.terms.name,
                outcome,
                "an upstream failed too often and is left alone for a while"
            );
        }
    }
}

// === impl Seat ===

impl Seat {
    /// Where it is.
    pub(crate) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Whether it shows if the upstream is well again.
    pub(crate) fn is_trial(&self) -> bool {
        self.is_trial
    }

    /// Sends a request there and waits for the first event of its answer.
    pub(crate) async fn ask(&mut self, onward: &Onward, tag: &str) -> Result<Begun, Mishap> {
        let terms = &self.upstream.terms;
        self.upstream.hedges.earn();
        let limit = terms.first_byte_timeout;
        let began = self.upstream.clock.now();
        let silent = Err(Mishap::Silent { limit_ms: millis(limit) });
        let begun = tokio::time::timeout(limit, self.begin(onward, tag)).await.unwrap_or(silent);
        match &begun {
            Ok(_) => {
                let took = self.upstream.clock.now().saturating_sub(began);
                self.upstream.began_after(took);
                self.computed();
                // It works again: the others need not wait for the end of this answer.
                if std::mem::take(&mut self.is_trial) {
                    self.upstream.circuit().went_well(true);
                }
            }
            Err(mishap) => self.ended(mishap.outcome()),
        }
        begun
    }

    async fn begin(&self, onward: &Onward, tag: &str) -> Result<Begun, Mishap> {
        let terms = &self.upstream.terms;
        let response = self.post(onward, (tag, "text/event-stream")).await?;
        let kind =
            response.headers().get(CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes()).into_owned());
        if !kind.as_deref().unwrap_or_default().starts_with("text/event-stream") {
            return Err(Mishap::Garbled(format!("content of type `{}`", kind.as_deref().unwrap_or("none"))));
        }
        let mut answer = Answer::new(response.into_body(), terms.max_answer_bytes, terms.idle_timeout);
        let first = std::future::poll_fn(|cx| answer.poll_event(cx)).await;
        let first = Said::read(&first.unwrap_or(Err(Mishap::Broken))?, onward.n_choices)?;
        Ok(Begun { answer, first })
    }

    /// Sends a request there and reads the whole of its answer. Who asks says how it went, once he has understood it.
    pub(crate) async fn fetch(&mut self, onward: &Onward, tag: &str) -> Result<Bytes, Mishap> {
        let upstream = Arc::clone(&self.upstream);
        let terms = &upstream.terms;
        let began = upstream.clock.now();
        let posted = tokio::time::timeout(terms.first_byte_timeout, self.post(onward, (tag, "application/json"))).await;
        let response = posted.unwrap_or(Err(Mishap::Silent { limit_ms: millis(terms.first_byte_timeout) }))?;
        upstream.began_after(upstream.clock.now().saturating_sub(began));
        self.computed();
        let (mut body, mut whole) = (response.into_body(), BytesMut::new());
        loop {
            let frame = tokio::time::timeout(terms.idle_timeout, body.frame()).await;
            let Some(frame) = frame.map_err(|_| Mishap::Stalled { limit_ms: millis(terms.idle_timeout) })? else {
                return Ok(whole.freeze());
            };
            whole.extend_from_slice(&frame.map_err(|_| Mishap::Broken)?.into_data().unwrap_or_default());
            if whole.len() > terms.max_answer_bytes {
                return Err(Mishap::TooLarge { limit: terms.max_answer_bytes, is_event: false });
            }
        }
    }

    /// Sends a request there and waits for the head of an answer that is no error.
    async fn post(&self, onward: &Onward, (tag, accept): (&str, &'static str)) -> Result<Response<Body>, Mishap> {
        let upstream = &self.upstream;
        let mut request = upstream.request(Method::POST, onward.path, onward.write(&upstream.terms.model));
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        if let Ok(tag) = HeaderValue::from_str(tag) {
            headers.insert(REQUEST_ID, tag);
        }
        let response = upstream.send(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    /// Its prompt is not waiting any more.
    fn computed(&mut self) {
        let tokens = std::mem::take(&mut self.queued_tokens);
        self.upstream.gauges.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    /// How it went; what is said first counts.
    pub(crate) fn ended(&mut self, outcome: UpstreamOutcome) {
        if self.outcome.is_none() {
            self.outcome = Some(outcome);
            self.upstream.ended(outcome, self.is_trial);
        }
    }

    /// Nothing was sent.
    fn leave_unused(mut self) {
        self.outcome = Some(UpstreamOutcome::Cancelled);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.ended(UpstreamOutcome::Cancelled);
        self.computed();
        self.upstream.gauges.running.fetch_sub(1, Ordering::Relaxed);
        self.upstream.metrics.in_flight.dec();
        self.upstream.look();
    }
}

/// Reads why it refused.
async fn refusal(response: Response<Body>) -> Mishap {
    let status = response.status().as_u16();
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let body = Limited::new(response.into_body(), MAX_ERROR_BYTES).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    Mishap::status(status, &body, seconds.unwrap_or(0).saturating_mul(1_000))
}

/// Where it is, and whether TLS is spoken there.
fn address(url: &str) -> Result<(Uri, bool), UpstreamError> {
    // What stands before an `@` is a secret.
    let shown = if url.contains('@') { "...@..." } else { url };
    let bad = || UpstreamError::Url { url: shown.to_owned() };
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let is_tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(bad()),
    };
    if uri.host().is_none() || uri.query().is_some() || shown != url {
        return Err(bad());
    }
    Ok((uri, is_tls))
}

/// Runs some futures side by side on the task that asks.
async fn join<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in running.iter_mut().filter(|(_, output)| output.is_none()) {
            if let Poll::Ready(ready) = future.as_mut().poll(cx) {
                *output = Some(ready);
            }
        }
        if running.iter().all(|(_, output)| output.is_some()) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
