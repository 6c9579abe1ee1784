//! `pointsman serve`: wires the crates together, says what is served, and takes it all down again.
//!
//! Order matters twice. Up: signals first, since nobody is killed by default as the first process of a container; then the data
//! directory's lock, then ports (a taken port must not cost a model load), then models and policies side by side, then a driver per
//! device, then HTTP. Down: HTTP stops admitting and lets requests finish,
//! then the drivers end what is left, then the observer sees the last events.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use pointsman_control::ModelsDocument;
use pointsman_engine::cuda::CodeOptions;
use pointsman_engine::{ComputePool, keep_little_freed};
use pointsman_policy::{Compile, CompileCommand, CompileLimits, Runtime, RuntimeConfig};
use pointsman_server::admin::wire::{self, HealthState, SlotRevision};
use pointsman_server::ports::{Catalog, Clock, EnginePort, ModelAdmin, PolicyAdmin};
use pointsman_server::record::Taps;
use pointsman_server::{
    AdminRole, AdminToken, ApiKey, BatchConfig, Listeners, Plane, Secret, ServerConfig, ServerParts, ServerState,
};
use pointsman_telemetry::{Metrics, Names, Recorder};
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

use crate::aliases::{AliasParts, Aliases};
use crate::cli::ServeArgs;
use crate::clock::SystemClock;
use crate::config::{BatchSection, Config, LogFormat, RoleName};
use crate::deploy::{Deploy, HostParts, fault_queue};
use crate::devices::{self, Place};
use crate::encoders::EncoderPool;
use crate::engine::Engine;
use crate::keys;
use crate::models::{LoadTerms, Loaded, Loader, compute_pool};
use crate::observer::{Observer, Watched};
use crate::roster::{Roster, RosterParts};
use crate::shelf::DiskShelf;
use crate::store::Store;
use crate::tls::Certificate;
use crate::trust::KeyRing;
use crate::upstreams::{self, UpstreamSection};

/// Largest compiled component.
const MAX_COMPILED_BYTES: usize = 256 << 20;
/// Connections that wait to be accepted; the kernel bounds it by `net.core.somaxconn`.
const BACKLOG: u32 = 4_096;
/// How long an upload waits for the compilation before it.
const COMPILE_QUEUE: Duration = Duration::from_secs(5);

/// What every part shares.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub clock: Arc<SystemClock>,
    pub metrics: Arc<Metrics>,
    pub recorder: Recorder,
    pub names: Arc<Names>,
    pub taps: Taps,
}

impl Shared {
    fn new(config: &Config) -> Self {
        Self {
            clock: Arc::new(SystemClock::start()),
            metrics: Arc::new(Metrics::new()),
            recorder: Recorder::new(config.policy.event_ring as usize),
            names: Arc::new(Names::default()),
            taps: Taps::default(),
        }
    }
}

/// A host that runs and has no listener yet.
#[derive(Debug)]
pub(crate) struct Assembled {
    pub state: Arc<ServerState>,
    engine: Arc<Engine>,
    roster: Arc<Roster>,
    deploy: Arc<Deploy>,
    observer: Observer,
}

/// Certificates of the planes that speak TLS.
#[derive(Clone, Debug)]
struct Certificates {
    data: Option<Certificate>,
    admin: Option<Certificate>,
}

/// Runs a host until a signal ends it.
///
/// # Errors
/// Anything that keeps it from serving, in words for the operator.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let config = configure(args)?;
    start_logging(&config)?;
    keep_little_freed();
    let workers = io_threads(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    let store = Arc::new(Store::open(&data_dir(&config)?)?);
    let certificates = Certificates { data: config.server.tls.load()?, admin: config.admin.tls.load()? };
    let listeners = runtime.block_on(async { listen(&config, &certificates) })?;
    warn_where_open(&config);
    let compile = compile_aside(&config)?;
    tracing::info!(
        data = %listeners.data.socket.local_addr()?,
        admin = %listeners.admin.socket.local_addr()?,
        "the ports are bound; requests are served when the models are loaded"
    );
    let starting = {
        let config = config.clone();
        runtime.spawn_blocking(move || Assembled::start(&config, &store, compile))
    };
    let started = start_until_signalled(starting, &mut signals);
    let bounds = server_config(&config, Vec::new());
    let Some(host) = runtime.block_on(pointsman_server::answer_until(&listeners, &bounds, started))? else {
        // A load may wait for a disk or a GPU; the data directory is as after a kill, which every start takes.
        runtime.shutdown_background();
        tracing::info!("stopped before it was ready");
        return Ok(());
    };
    for (plane, certificate) in certificates.each() {
        host.state.certificate_until(plane, certificate.valid.map(|valid| valid.until_s));
    }
    banner(&listeners, &host.engine.catalog(), &host.deploy)?;
    let Signals { ends, hangups } = signals;
    let served = runtime.block_on(serve_until_signalled(
        (listeners, ends),
        Arc::clone(&host.state),
        reload((&config, &certificates), (&host.state, &host.engine), hangups),
    ));
    // Requests that outlived the grace period hold the engine: their tasks go first.
    runtime.shutdown_timeout(Duration::from_secs(2));
    host.stop();
    tracing::info!("stopped");
    served
}

/// Threads that serve HTTP. Not one per core: tokio wakes a second one for what the first would have done, and where the cores
/// are few the engine needs them.
fn io_threads(config: &Config) -> usize {
    match config.server.io_threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2),
        n => n as usize,
    }
}

impl Assembled {
    /// Starts everything beneath the listeners.
    ///
    /// # Errors
    /// Anything that keeps it from serving, in words for the operator.
    pub(crate) fn start(config: &Config, store: &Arc<Store>, compile: Compile) -> anyhow::Result<Self> {
        let shared = Shared::new(config);
        let deploy = deployments(config, store, &shared, compile)?;
        let places = devices::find(&config.engine)?;
        let (pool, code) = (compute_pool(config)?, devices::code_options(&config.engine, &data_dir(config)?)?);
        let stored = store.models().unwrap_or_else(|error| {
            tracing::error!("what was loaded while the host ran is not served: {error}");
            ModelsDocument::empty()
        });
        let encoder_pool = EncoderPool::default();
        let pools = (&pool, &encoder_pool);
        let mut loaded = load_beside(config, &shared, &deploy, (&places, &code, pools, &stored))?;
        let (models, lost) = (std::mem::take(&mut loaded.models), std::mem::take(&mut loaded.lost));
        let draft_sources = Arc::clone(&loaded.draft_sources);
        upstreams::add(config, &shared, &mut loaded)?;
        let engine = Arc::new(Engine::start(config, &shared, &deploy, (places, loaded))?);
        let aliases = Aliases::start(AliasParts {
            deploy: Arc::clone(&deploy),
            store: Arc::clone(store),
            engine: Arc::clone(&engine) as Arc<dyn EnginePort>,
            clock: Arc::clone(&shared.clock),
            metrics: Arc::clone(&shared.metrics),
        });
        let roster = RosterParts {
            config: config.clone(),
            shared: shared.clone(),
            store: Arc::clone(store),
            deploy: Arc::clone(&deploy),
            engine: Arc::clone(&engine),
            aliases: Arc::clone(&aliases),
            pool,
            encoder_pool,
            code,
            draft_sources,
        };
        let roster = Arc::new(Roster::new(roster, models, lost));
        let observer = Observer::start(Watched {
            deploy: Arc::clone(&deploy),
            aliases: Arc::clone(&aliases),
            recorder: shared.recorder.clone(),
            names: Arc::clone(&shared.names),
            metrics: Arc::clone(&shared.metrics),
            clock: Arc::clone(&shared.clock),
            taps: shared.taps.clone(),
        })?;
        let state = ServerState::new(ServerParts {
            config: server_config(config, keys::read(&config.server)?),
            engine: Arc::clone(&engine) as Arc<dyn EnginePort>,
            admit: Arc::clone(&deploy.admission) as _,
            router: Arc::clone(&deploy.router) as _,
            policies: Arc::clone(&deploy) as _,
            aliases: aliases as _,
            models: Arc::clone(&roster) as Arc<dyn ModelAdmin>,
            clock: Arc::clone(&shared.clock) as Arc<dyn Clock>,
            metrics: Arc::clone(&shared.metrics),
            recorder: shared.recorder.clone(),
            names: Arc::clone(&shared.names),
            taps: shared.taps.clone(),
            shelf: Arc::new(DiskShelf::of(store)),
        })?;
        Ok(Self { state, engine, roster, deploy, observer })
    }

    /// Ends what still runs and shows the hooks what is left.
    pub(crate) fn stop(self) {
        self.roster.stop();
        self.engine.stop();
        self.observer.stop();
    }
}

// === configuration ===

/// File, environment and flags, checked.
#[expect(clippy::disallowed_methods, reason = "the app reads the environment once, here")]
pub(crate) fn configure(args: &ServeArgs) -> anyhow::Result<Config> {
    configured(args, std::env::vars())
}

/// The same with an environment of its own.
pub(crate) fn configured(
    args: &ServeArgs,
    environment: impl Iterator<Item = (String, String)>,
) -> anyhow::Result<Config> {
    let mut config = Config::read(args.config.as_deref(), environment)?;
    if let Some(listen) = args.listen {
        config.server.listen = listen;
    }
    if let Some(admin) = args.admin {
        config.admin.listen = admin;
    }
    if let Some(folder) = &args.data_dir {
        config.data_dir.clone_from(folder);
    }
    config.safe_mode |= args.safe_mode;
    if !args.device.is_empty() {
        config.engine.devices.clone_from(&args.device);
    }
    config.engine.cuda_lib_dirs.extend(args.cuda_lib_dir.iter().cloned());
    if !args.precision.is_empty() {
        config.engine.precisions.clone_from(&args.precision);
    }
    for model in &args.model {
        let (name, path) = match model.split_once('=') {
            Some((name, path)) => (name.to_owned(), PathBuf::from(path)),
            None => {
                let path = PathBuf::from(model);
                let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
                let name = name.and_then(|n| n.to_str()).context("--model needs a NAME=PATH")?;
                (name.to_owned(), path)
            }
        };
        if let Some(other) = config.models.insert(name.clone(), path) {
            bail!("--model {name} is given twice (the other is {})", other.display());
        }
    }
    config.validate()?;
    Ok(config)
}

#[expect(clippy::disallowed_methods, reason = "the app reads the environment once, here")]
pub(crate) fn data_dir(config: &Config) -> anyhow::Result<PathBuf> {
    if !config.data_dir.as_os_str().is_empty() {
        return Ok(config.data_dir.clone());
    }
    let base = std::env::var_os("XDG_DATA_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")));
    Ok(base.context("neither XDG_DATA_HOME nor HOME is set; name a folder with --data-dir")?.join("pointsman"))
}

fn start_logging(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log.level)
        .with_context(|| format!("log.level = \"{}\" is not a tracing filter, such as \"info\"", config.log.level))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second start in one process (tests) keeps the first subscriber.
    let _ = match config.log.format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    Ok(())
}

fn server_config(config: &Config, api_keys: Vec<ApiKey>) -> ServerConfig {
    let server = &config.server;
    ServerConfig {
        max_requests: server.max_in_flight,
        max_queued_tokens: server.max_queued_tokens,
        prompt_scores_mib: server.prompt_scores_mib,
        max_body_bytes: usize::try_from(server.max_body_bytes).unwrap_or(usize::MAX),
        max_connections: server.max_connections as usize,
        header_timeout_ms: server.header_timeout_ms,
        body_timeout_ms: server.body_timeout_ms,
        write_timeout_ms: server.write_timeout_ms,
        max_choices: server.max_choices,
        max_rows: server.max_rows,
        draft_lead_ms: server.draft_lead_ms,
        draft_tokens: config.sched.draft_tokens,
        max_grammar_bytes: (server.max_grammar_mib as usize) << 20,
        kept_forms: server.kept_forms as usize,
        // What is kept must leave room for those in use.
        kept_form_bytes: (server.kept_forms_mib.min(server.max_grammar_mib / 2) as usize) << 20,
        cache_bytes: (server.response_cache_mib as usize) << 20,
        cache_ttl_ms: server.response_cache_ttl_s.saturating_mul(1_000),
        grace_ms: server.shutdown_grace_ms,
        api_keys,
        admin_tokens: admin_tokens(config),
        load_wait_ms: config.engine.load_wait_ms,
        route_headers: server.route_headers.clone(),
        cors_origins: server.cors_origins.clone(),
        admin_remote: !config.admin.listen.ip().is_loopback(),
        explain_requests: config.policy.explain_requests as usize,
        batch: batch_config(&config.batch),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..ServerConfig::default()
    }
}

/// A host that everybody may use is right on a machine of one's own, and seldom elsewhere.
pub(crate) fn is_open(config: &Config) -> bool {
    !config.server.listen.ip().is_loopback() && !config.server.needs_keys()
}

fn warn_where_open(config: &Config) {
    if is_open(config) {
        tracing::warn!(
            listen = %config.server.listen,
            "the data plane has no API keys: whoever reaches it may use it; make one with `pointsman key new`, or listen on \
             loopback"
        );
    }
}

fn batch_config(batch: &BatchSection) -> BatchConfig {
    BatchConfig {
        max_in_flight: batch.max_in_flight as usize,
        max_unfinished: batch.max_unfinished as usize,
        max_lines: batch.max_lines,
        max_file_bytes: u64::from(batch.max_file_mib) << 20,
        max_files: batch.max_files as usize,
        max_bytes: u64::from(batch.max_store_mib) << 20,
        retention_seconds: u64::from(batch.retention_hours) * 3_600,
    }
}

fn admin_tokens(config: &Config) -> Vec<AdminToken> {
    let token = |name: &str, token: &str, role: RoleName| AdminToken {
        name: name.to_owned(),
        token: Secret::new(token),
        role: match role {
            RoleName::Read => AdminRole::Read,
            RoleName::Operate => AdminRole::Operate,
        },
    };
    let first = Some(&*config.admin.token).filter(|text| !text.is_empty());
    let first = first.map(|text| token("token", text, RoleName::Operate));
    first.into_iter().chain(config.admin.tokens.iter().map(|(name, t)| token(name, &t.token, t.role))).collect()
}

/// A listener whose backlog holds a thousand clients that come at once: of those that find it full, each tries again a second
/// later.
fn bound(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

fn listen(config: &Config, certificates: &Certificates) -> anyhow::Result<Listeners> {
    let bind = |what: &str, key: &str, at: SocketAddr| {
        bound(at).with_context(|| format!("cannot listen on {at} for the {what} plane; choose another with --{key}"))
    };
    let data = bind("data", "listen", config.server.listen)?;
    let admin = bind("admin", "admin", config.admin.listen)?;
    let plane = |socket, certificate: &Option<Certificate>| Plane {
        socket,
        tls: certificate.as_ref().map(|certificate| Arc::clone(&certificate.tls)),
    };
    Ok(Listeners { data: plane(data, &certificates.data), admin: plane(admin, &certificates.admin) })
}

// === impl Certificates ===

impl Certificates {
    /// Those that there are, by plane.
    fn each(&self) -> impl Iterator<Item = (&'static str, &Certificate)> {
        let both = [("data", &self.data), ("admin", &self.admin)];
        both.into_iter().filter_map(|(plane, certificate)| Some((plane, certificate.as_ref()?)))
    }
}

// === parts ===

/// Policies are compiled by this program again, in a child that can be killed.
fn compile_aside(config: &Config) -> anyhow::Result<Compile> {
    let program = std::env::current_exe().context("cannot find this program to compile policies with")?;
    Ok(Compile::Child {
        command: CompileCommand { program, args: vec!["__compile".into()] },
        limits: CompileLimits {
            time: Duration::from_millis(config.policy.compile_timeout_ms),
            memory_bytes: config.policy.compile_memory_mib << 20,
            max_output_bytes: MAX_COMPILED_BYTES,
            queue: COMPILE_QUEUE,
        },
    })
}

fn deployments(config: &Config, store: &Arc<Store>, shared: &Shared, compile: Compile) -> anyhow::Result<Arc<Deploy>> {
    let faults = fault_queue();
    let told = Arc::clone(&faults);
    let clock = Arc::clone(&shared.clock);
    let runtime = RuntimeConfig {
        cache_dir: Some(store.compiled()),
        compile,
        router_instances: config.policy.router_instances,
        replica_labels: config.label_names(),
        on_fault: Some(Arc::new(move |report| {
            told.force_push(report.clone());
        })),
        ..RuntimeConfig::default()
    };
    let now = Arc::new(move || clock.micros());
    let runtime = Runtime::new(runtime, Arc::clone(&shared.metrics), shared.recorder.clone(), now)?;
    let parts = HostParts {
        clock: Arc::clone(&shared.clock),
        metrics: Arc::clone(&shared.metrics),
        trust: KeyRing::new(&config.trust)?,
        budgets: config.budgets(),
        registries: config.registries.clone(),
        faults,
    };
    Ok(Deploy::new(runtime, Arc::clone(store), parts, config.safe_mode))
}

/// What each slot would have after a start on this store, and whether its safe mode is on. The policies are started, and then
/// dropped.
///
/// # Errors
/// wasmtime refuses this machine, or the key ring is none.
pub(crate) fn try_policies(config: &Config, store: &Arc<Store>) -> anyhow::Result<(bool, Vec<wire::Slot>)> {
    let deploy = deployments(config, store, &Shared::new(config), compile_aside(config)?)?;
    deploy.start(config);
    Ok((deploy.safe_reason().is_some(), deploy.slots()))
}

/// Loads the models while the policies of the stored deployment are brought back.
fn load_beside(
    config: &Config,
    shared: &Shared,
    deploy: &Arc<Deploy>,
    (places, code, (pool, encoder_pool), stored): (
        &[Place],
        &CodeOptions,
        (&ComputePool, &EncoderPool),
        &ModelsDocument,
    ),
) -> anyhow::Result<Loaded> {
    let created = shared.clock.unix_millis() / 1_000;
    std::thread::scope(|scope| {
        let policies = scope.spawn(|| deploy.start(config));
        let (started, clock) = (shared.clock.micros(), &shared.clock);
        let terms = LoadTerms { places, code, created, started, clock, pool, encoder_pool };
        let loaded = Loader::new(config, &shared.names, terms).load_all(stored);
        if policies.join().is_err() {
            bail!("bringing the policies back ended in a panic; --safe-mode serves without them");
        }
        loaded
    })
}

// === what a person sees ===

/// Says the URLs, the models, the active policies and a line to try. The labels are read by scripts: keep them.
fn banner(listeners: &Listeners, catalog: &Catalog, deploy: &Deploy) -> anyhow::Result<()> {
    let url = |plane: &Plane| {
        let scheme = if plane.tls.is_some() { "https" } else { "http" };
        plane.socket.local_addr().map(|at| format!("{scheme}://{at}"))
    };
    let (data, admin) = (url(&listeners.data)?, url(&listeners.admin)?);
    let encoders = catalog.encoders.iter().map(|encoder| &*encoder.name);
    let models: Vec<&str> = catalog.variants.iter().map(|v| &*v.id).chain(encoders).collect();
    let mut lines = vec![
        format!("Pointsman {} is ready", env!("CARGO_PKG_VERSION")),
        format!("  {:<18} {data}", "api"),
        format!("  {:<18} {admin}", "admin"),
        format!("  {:<18} {}", "models", models.join(", ")),
    ];
    if !catalog.on_demand.is_empty() {
        lines.push(format!("  {:<18} {}", "on demand", catalog.on_demand.join(", ")));
    }
    for (replica, upstream) in catalog.upstreams() {
        lines.push(format!("  {:<18} {replica} at {}", "upstream", upstream.url()));
    }
    for slot in deploy.slots() {
        let SlotRevision { revision, generation, .. } = &slot.active;
        let failed = slot.health.reason.filter(|_| slot.health.state != HealthState::Closed);
        let who = if slot.slot == "sampler" && deploy.refuses_all() { "nobody" } else { "native" };
        let failed = failed.map_or(String::new(), |reason| format!("  ({who} serves: {reason})"));
        lines.push(format!("  {:<18} {revision};g={generation}{failed}", slot.slot));
    }
    let generator = catalog.variants.first().map(|variant| &variant.alias).or(catalog.on_demand.first());
    let (path, model, input) = match generator {
        Some(model) => {
            let messages = r#""messages": [{"role": "user", "content": "What is ownership?"}]"#;
            ("chat/completions", &**model, messages)
        }
        None => ("embeddings", models.first().copied().unwrap_or("MODEL"), r#""input": "What is ownership?""#),
    };
    lines.push("Try:".into());
    lines.push(format!("  curl {data}/v1/{path} -H 'content-type: application/json' \\"));
    lines.push(format!("    -d '{{\"model\": \"{model}\", {input}}}'\n"));
    // A reader that went away (`| head`) is no reason not to serve.
    let _ = std::io::stdout().lock().write_all(lines.join("\n").as_bytes());
    Ok(())
}

/// What was started; nothing where a signal came first.
async fn start_until_signalled(
    starting: JoinHandle<anyhow::Result<Assembled>>,
    signals: &mut Signals,
) -> anyhow::Result<Option<Assembled>> {
    tokio::select! {
        started = starting => started.context("the start ended in a panic; this is a bug of the host")?.map(Some),
        () = signals.ends.next() => Ok(None),
    }
}

/// Serves until a signal, then lets requests finish; a second signal ends them.
async fn serve_until_signalled(
    (listeners, mut ends): (Listeners, Ends),
    state: Arc<ServerState>,
    reloading: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let first = tokio::sync::Notify::new();
    let signalled = async {
        ends.next().await;
        tracing::info!("stopping: requests in flight may finish; a second signal ends them");
        first.notify_one();
        ends.next().await;
    };
    tokio::select! {
        served = pointsman_server::serve(listeners, state, first.notified()) => served.context("serving ended"),
        () = signalled => bail!("ended by a second signal; requests in flight were cut off"),
        () = reloading => Ok(()),
    }
}

/// Reads the file of API keys, the certificates and the authorities of upstreams again at each SIGHUP, for ever.
async fn reload(
    (config, certificates): (&Config, &Certificates),
    (state, engine): (&ServerState, &Engine),
    mut hangups: Signal,
) {
    let has_certificates = certificates.data.is_some() || certificates.admin.is_some();
    let has_authorities = config.upstreams.values().any(UpstreamSection::has_ca);
    let has_files = config.server.has_key_file() || has_certificates || has_authorities;
    while hangups.recv().await.is_some() {
        if !has_files {
            tracing::warn!(
                "SIGHUP changes nothing: the configuration names no file of API keys, certificate or `ca_file`"
            );
        }
        if config.server.has_key_file() {
            reload_keys(config, state).await;
        }
        for (plane, certificate) in certificates.each() {
            reload_certificate(plane, certificate.clone(), state).await;
        }
        for (name, section) in config.upstreams.iter().filter(|(_, section)| section.has_ca()) {
            reload_authorities(name, section, (state, engine)).await;
        }
    }
    std::future::pending().await
}

async fn reload_keys(config: &Config, state: &ServerState) {
    let server = config.server.clone();
    let read = tokio::task::spawn_blocking(move || keys::read(&server)).await;
    let read = read.map_err(anyhow::Error::from).and_then(|read| Ok(read?));
    match read.and_then(|keys| Ok(state.replace_keys(keys)?)) {
        Ok(()) => tracing::info!("the API keys have been read again"),
        Err(error) => tracing::error!(%error, "the API keys stay what they were"),
    }
}

async fn reload_certificate(plane: &str, certificate: Certificate, state: &ServerState) {
    let read = tokio::task::spawn_blocking(move || certificate.reload()).await;
    let read = read.map_err(anyhow::Error::from).and_then(|read| Ok(read?));
    state.certificate_read(plane, read.is_ok());
    match read {
        Ok(valid) => {
            state.certificate_until(plane, valid.map(|valid| valid.until_s));
            tracing::info!(plane, "a certificate has been read again");
        }
        Err(error) => tracing::error!(plane, %error, "a certificate stays what it was"),
    }
}

async fn reload_authorities(name: &str, section: &UpstreamSection, (state, engine): (&ServerState, &Engine)) {
    let section = section.clone();
    let read = tokio::task::spawn_blocking(move || section.roots()).await;
    let read = read.map_err(anyhow::Error::from).and_then(|read| read);
    let catalog = engine.catalog();
    let replaced = read.and_then(|roots| {
        let upstream = catalog.upstreams().find(|(_, upstream)| **upstream.name() == *name);
        Ok(upstream.map_or(Ok(()), |(_, upstream)| upstream.replace_roots(roots))?)
    });
    state.certificate_read("upstreams", replaced.is_ok());
    match replaced {
        Ok(()) => tracing::info!(upstream = name, "the authorities of an upstream have been read again"),
        Err(error) => tracing::error!(upstream = name, %error, "the authorities of an upstream stay what they were"),
    }
}

/// What the host listens to from its first moment on. SIGHUP always: unheard, it would end the host.
struct Signals {
    ends: Ends,
    hangups: Signal,
}

/// SIGINT and SIGTERM.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let ends = Ends { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? };
        Ok(Self { ends, hangups: listen(SignalKind::hangup())? })
    }
}

impl Ends {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
