//! The host as a library: the same engine, policies, admission and routing as `pointsman serve`, without a socket.
//!
//! A program that embeds it submits requests as values and reads events; docs/embed.md tells how. What the routes take and
//! answer is what is taken and answered here, because both are one path (`pointsman_server::entry`). Policies are compiled in
//! this process, since the embedding program is not one that could be started again to do it.

use std::path::PathBuf;
use std::sync::Arc;

use pointsman_policy::Compile;
use pointsman_server::ServerState;
use pointsman_server::ports::EnginePort;
use serde_json::Value;

use crate::cli::ServeArgs;
use crate::config::ENV_PREFIX;
use crate::serve::{Assembled, configured, data_dir};
use crate::store::Store;

pub use pointsman_sched::ids::Priority;
pub use pointsman_server::entry::{Call, Ended, Event, Events, Fault, FaultKind, Many, Request};

/// How a host is started. The default serves the embedded demo model on the CPU.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// Where slots, components and the journal live; one host at a time uses it. None: the user's data directory.
    pub data_dir: Option<PathBuf>,
    /// A configuration file, as `pointsman serve` reads it. Its listeners do not count.
    pub file: Option<PathBuf>,
    /// Models besides the demo: name, and folder or .gguf file.
    pub models: Vec<(String, PathBuf)>,
    /// Where to serve, as in `cpu`, `cuda:0`, `null`; empty for what the configuration says.
    pub devices: Vec<String>,
    /// Single keys of the configuration over the file's, as in `("sched.max_running", "16")`.
    pub settings: Vec<(String, String)>,
}

/// A running host. Dropping it ends what still runs and waits for its threads.
#[derive(Debug)]
pub struct Host {
    state: Arc<ServerState>,
    /// There until it is dropped.
    assembled: Option<Assembled>,
}

impl Host {
    /// Loads the models and starts the drivers; blocks for as long as that takes.
    ///
    /// # Errors
    /// Anything that keeps it from serving, with what to change.
    pub fn start(config: HostConfig) -> anyhow::Result<Self> {
        let HostConfig { data_dir: folder, file, models, devices, settings } = config;
        let model = |(name, path): &(String, PathBuf)| format!("{name}={}", path.display());
        let args = ServeArgs {
            config: file,
            listen: None,
            admin: None,
            model: models.iter().map(model).collect(),
            device: devices,
            cuda_lib_dir: Vec::new(),
            precision: Vec::new(),
            data_dir: folder,
            safe_mode: false,
        };
        let variable =
            |(key, value): (String, String)| (format!("{ENV_PREFIX}{}", key.replace('.', "__").to_uppercase()), value);
        let config = configured(&args, settings.into_iter().map(variable))?;
        let store = Arc::new(Store::open(&data_dir(&config)?)?);
        let assembled = Assembled::start(&config, &store, Compile::InProcess)?;
        Ok(Self { state: Arc::clone(&assembled.state), assembled: Some(assembled) })
    }

    /// Admits, routes and submits a request; its events come as they are computed. Call it within a tokio runtime, whose
    /// timers keep the deadline. Dropping the events cancels the request, whatever stage it is in.
    ///
    /// # Errors
    /// It was refused; nothing of it runs.
    pub async fn submit(&self, request: Request) -> Result<Events, Fault> {
        self.state.submit(request).await
    }

    /// The whole answer of a request: the object that the route of its [`Call`] answers with.
    ///
    /// # Errors
    /// It was refused, or it failed on its way.
    pub async fn answer(&self, request: Request) -> Result<Value, Fault> {
        self.state.answer(request).await
    }

    /// The whole answers of many requests as they end, at most `at_most` of them under way, each with its place. A request
    /// is taken from `requests` when there is room for it. Dropping what is returned cancels what runs.
    pub fn submit_many<I>(&self, requests: I, at_most: usize) -> Many<I::IntoIter>
    where
        I: IntoIterator<Item = Request>,
    {
        self.state.submit_many(requests, at_most)
    }

    /// Admits nothing more, and waits until what was admitted is over.
    pub async fn drained(&self) {
        self.state.drained().await;
    }

    /// The drivers beneath admission and routing, for measurements of what these cost.
    #[must_use]
    pub fn engine(&self) -> Arc<dyn EnginePort> {
        self.state.engine()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(assembled) = self.assembled.take() {
            assembled.stop();
        }
    }
}
