//! What the tests of this package share: a running host in a process of its own, and a small blocking client of it; and a
//! simulated [`fleet`] of replicas, which the benchmarks run on the real engine.
//!
//! A real process on real sockets, because that is what users run; a temporary data directory and ports chosen by the
//! system, so that tests run side by side. The host says on its first lines when it listens; for the rest there is [`looks`].
#![expect(
    clippy::missing_panics_doc,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness stops the test where it is"
)]

pub mod fleet;
pub mod large;
pub mod raw;
pub mod rng;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Name of the configuration file in the data directory, where a test has one.
const CONFIG: &str = "pointsman.toml";
/// Name of the file there for what the host logs, where a test reads it.
const LOG: &str = "host.log";

/// A running host; killed when dropped.
#[derive(Debug)]
pub struct Host {
    child: Child,
    /// Base URL of the data plane.
    pub data: String,
    /// Base URL of the admin plane.
    pub admin: String,
    folder: TempDir,
    program: PathBuf,
    agent: ureq::Agent,
}

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers by lower-case name.
    pub headers: ureq::http::HeaderMap,
    /// JSON where it is JSON, else a string.
    pub body: Value,
}

/// What one streamed generation said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streamed {
    /// Token ids in order.
    pub tokens: Vec<u64>,
    /// Their text.
    pub text: String,
    /// `stop`, `length`; empty when the stream broke off.
    pub finish: String,
    /// `x-pointsman-router` of the response.
    pub router: String,
}

/// Ten times what policies have: a call from which somebody takes the core must not be a timeout. No more, because what a guest
/// that spins keeps waiting has its own bounds. No scheduler is so slow that it computes aside.
const BUDGETS: &str = "
[slots.admission.budget]
hard_ms = 100
[slots.router.budget]
hard_ms = 100
[slots.scheduler.budget]
hard_ms = 100
soft_us = 100000
[slots.kv-retention.budget]
hard_ms = 100
[slots.sampler.budget]
hard_ms = 100
[slots.\"telemetry.slo-log\".budget]
hard_ms = 500
";
/// Longest wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers to look with for what must happen; they end when it should have long ago. Counts of looks would run out on a machine
/// that looks faster than it works.
#[expect(clippy::disallowed_methods, reason = "a wait for another process, whose end is told by looking")]
pub fn looks() -> impl Iterator<Item = usize> {
    let until = Instant::now() + PATIENCE;
    (0..).take_while(move |n| {
        // What is waited for may be that of a thread behind all others.
        std::thread::sleep(Duration::from_millis(u64::from(*n > 0)));
        Instant::now() < until
    })
}

/// Writes a configuration, with [`BUDGETS`] where it has none.
fn configure(folder: &Path, config: &str) {
    let budgets = if config.contains(".budget]") { "" } else { BUDGETS };
    std::fs::write(folder.join(CONFIG), format!("{config}{budgets}")).expect("a temporary file");
}

impl Host {
    /// Starts `program` on an empty data directory. `settings` are environment variables such as `SCHED__MAX_RUNNING`.
    #[must_use]
    pub fn start(program: &str, settings: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        configure(folder.path(), "");
        Self::start_in(Path::new(program), folder, settings)
    }

    /// As a user starts it, with the budgets that policies have by themselves: for what is measured.
    #[must_use]
    pub fn shipped(program: &str, config: &str, settings: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        if !config.is_empty() {
            std::fs::write(folder.path().join(CONFIG), config).expect("a temporary file");
        }
        Self::start_in(Path::new(program), folder, settings)
    }

    /// As [`start`](Self::start), with a configuration file.
    #[must_use]
    pub fn configured(program: &str, config: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        configure(folder.path(), config);
        Self::start_in(Path::new(program), folder, &[])
    }

    /// As [`configured`](Self::configured), with everything from `debug` on in its [`log`](Self::log).
    #[must_use]
    pub fn logged(program: &str, config: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        configure(folder.path(), config);
        std::fs::write(folder.path().join(LOG), "").expect("a temporary file");
        Self::start_in(Path::new(program), folder, &[("LOG__LEVEL", "debug")])
    }

    /// As [`logged`](Self::logged), in another environment.
    #[must_use]
    pub fn surrounded(program: &str, config: &str, variables: &[(&str, &Path)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        configure(folder.path(), config);
        std::fs::write(folder.path().join(LOG), "").expect("a temporary file");
        let mut command = Command::new(program);
        command.envs(variables.iter().copied());
        Self::spawn(command, folder, &[("LOG__LEVEL", "info")])
    }

    /// What a host of [`logged`](Self::logged) has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder().join(LOG)).expect("the host was started with a log")
    }

    /// Kills the host and starts it again with another configuration file.
    #[must_use]
    pub fn reconfigure(self, config: &str) -> Self {
        configure(self.folder(), config);
        self.restart(&[])
    }

    /// Kills the host without a word of warning and starts it again on the same data directory.
    #[must_use]
    pub fn restart(mut self, settings: &[(&str, &str)]) -> Self {
        self.kill();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"));
        Self::start_in(&self.program.clone(), folder, settings)
    }

    fn start_in(program: &Path, folder: TempDir, settings: &[(&str, &str)]) -> Self {
        Self::spawn(Command::new(program), folder, settings)
    }

    fn spawn(mut command: Command, folder: TempDir, settings: &[(&str, &str)]) -> Self {
        let program = PathBuf::from(command.get_program());
        command.arg("serve").arg("--data-dir").arg(folder.path());
        let config = folder.path().join(CONFIG);
        if config.is_file() {
            command.arg("--config").arg(config);
        }
        command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).env("POINTSMAN_LOG__LEVEL", "warn");
        for (key, value) in settings {
            command.env(format!("POINTSMAN_{key}"), value);
        }
        let log = folder.path().join(LOG);
        if log.is_file() {
            command.stderr(std::fs::File::options().append(true).open(log).expect("a temporary file"));
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the host starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut lines = BufReader::new(stdout).lines();
        let mut url = |label: &str| {
            let found = lines.by_ref().map_while(Result::ok).find_map(|line| {
                let rest = line.trim().strip_prefix(label)?.trim().to_owned();
                rest.split_whitespace().next().map(str::to_owned)
            });
            found.unwrap_or_else(|| panic!("the host ended before it said `{label}`"))
        };
        let data = url("api");
        let admin = url("admin");
        // Keep reading, so that the host never blocks on a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(600)));
        Self { child, data, admin, folder, program, agent: config.build().into() }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, named as in `-HUP`.
    ///
    /// # Panics
    /// It is gone, or there is no `kill`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// The data directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Resident memory of the host in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the host runs on Linux");
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("a running process has it");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number of KiB") * 1_024
    }

    fn kill(&mut self) {
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a request to a full URL.
    #[must_use]
    pub fn send(&self, method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.to_vec()).expect("a request");
        let mut answer = self.agent.run(request).unwrap_or_else(|e| panic!("{method} {url}: {e}"));
        // Not as a string, which the client builds bit by bit: benchmarks measure the host.
        let bytes = answer.body_mut().read_to_vec().unwrap_or_default();
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| text());
        Answer { status: answer.status().as_u16(), headers: answer.headers().clone(), body }
    }

    /// GET on the data plane.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", &format!("{}{path}", self.data), &[], b"")
    }

    /// POST of JSON on the data plane.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.send("POST", &format!("{}{path}", self.data), &headers, body.to_string().as_bytes())
    }

    /// Any method on the admin plane, with JSON (`Value::Null` for none).
    #[must_use]
    pub fn admin(&self, method: &str, path: &str, body: &Value) -> Answer {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, &format!("{}{path}", self.admin), &[("content-type", "application/json")], text.as_bytes())
    }

    /// Uploads a component; its digest.
    #[must_use]
    pub fn upload(&self, bytes: &[u8]) -> String {
        let url = format!("{}/admin/v1/components", self.admin);
        let answer = self.send("POST", &url, &[("content-type", "application/wasm")], bytes);
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
        answer.body["digest"].as_str().expect("a digest").to_owned()
    }

    /// Activates a component; the answer of the admin plane.
    #[must_use]
    pub fn activate(&self, slot: &str, component: &str, config: Value) -> Answer {
        self.admin("PUT", &format!("/admin/v1/slots/{slot}"), &json!({ "component": component, "config": config }))
    }

    /// The digest of a built-in component.
    #[must_use]
    pub fn builtin(&self, name: &str) -> String {
        let listed = self.admin("GET", "/admin/v1/components", &Value::Null);
        let rows = listed.body["data"].as_array().unwrap_or_else(|| panic!("{listed:?}"));
        let found = rows.iter().find(|c| c["name"].as_str().is_some_and(|n| n.split('@').next() == Some(name)));
        found.and_then(|c| c["digest"].as_str()).unwrap_or_else(|| panic!("no built-in {name}: {rows:?}")).to_owned()
    }

    /// Streams a completion as NDJSON, whose token events carry ids.
    ///
    /// # Errors
    /// The request was refused or the stream broke off, in words.
    pub fn stream(&self, body: &Value) -> Result<Streamed, String> {
        self.stream_heard(body, |_| ())
    }

    /// As [`stream`](Self::stream), with every event as it comes.
    ///
    /// # Errors
    /// The same.
    pub fn stream_heard(&self, body: &Value, mut heard: impl FnMut(&Value)) -> Result<Streamed, String> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let request = ureq::http::Request::post(format!("{}/v1/completions", self.data))
            .header("content-type", "application/json")
            .header("accept", "application/x-ndjson")
            .body(body.to_string());
        let answer = self.agent.run(request.expect("a request")).map_err(|e| e.to_string())?;
        let mut streamed = Streamed {
            router: answer
                .headers()
                .get("x-pointsman-router")
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default()
                .to_owned(),
            ..Streamed::default()
        };
        if !answer.status().is_success() {
            let status = answer.status();
            return Err(format!("{status}: {}", answer.into_body().read_to_string().unwrap_or_default()));
        }
        for line in BufReader::new(answer.into_body().into_reader()).lines() {
            let event: Value = serde_json::from_str(&line.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
            if event["event"] == "error" {
                return Err(event["error"].to_string());
            }
            heard(&event);
            streamed.take(&event);
        }
        if streamed.finish.is_empty() { Err("the stream broke off".into()) } else { Ok(streamed) }
    }
}

impl Streamed {
    fn take(&mut self, event: &Value) {
        match event["event"].as_str() {
            // What a draft said.
            Some("replace") => (self.tokens, self.text) = Default::default(),
            Some("token") => {
                self.tokens.extend(event["token"].as_u64());
                self.text.push_str(event["text"].as_str().unwrap_or_default());
            }
            Some("finished") => {
                self.text.push_str(event["text"].as_str().unwrap_or_default());
                self.finish = event["finish_reason"].as_str().unwrap_or_default().to_owned();
            }
            _ => {}
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a process a signal, named as in `-HUP`.
///
/// # Panics
/// There is no such process, or no `kill`.
pub fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()), "no {name} for {process}");
}

/// Whether a tool is required: `POINTSMAN_REQUIRE=a,b`.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one switch of the test suite")]
pub fn required(tool: &str) -> bool {
    std::env::var("POINTSMAN_REQUIRE").unwrap_or_default().split(',').any(|t| t == tool)
}

/// Says that a test is skipped for want of a tool; where the tool is required, that is a failure.
#[must_use]
pub fn skip(tool: &str, why: &str) -> bool {
    assert!(!required(tool), "{tool} is required here: {why}");
    #[expect(clippy::print_stderr, reason = "a skip must be seen")]
    {
        eprintln!("skipped: {why}");
    }
    true
}

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is inside the workspace").to_owned()
}
