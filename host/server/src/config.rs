//! Configuration of the server, as a value: defaults here, read from file and environment by the app, checked once.

use std::fmt;
use std::time::Duration;

use crate::keys::{ApiKey, check_keys};

use crate::batch::BatchConfig;

/// Every bound of the server. Durations and sizes carry their unit in the name.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Generation requests in flight; the next ones get 429.
    pub max_requests: u32,
    /// Prompt tokens accepted and not yet computed; beyond, requests get 429.
    pub max_queued_tokens: u32,
    /// MiB for what answers say of their prompts, all together; beyond, requests get 429, and 400 where one alone is larger.
    pub prompt_scores_mib: u32,
    /// Size of a request body.
    pub max_body_bytes: usize,
    /// Time for a body to arrive.
    pub body_timeout_ms: u64,
    /// Time for the head of a request to arrive; so also the time that an idle connection is kept.
    pub header_timeout_ms: u64,
    /// Time in which a client must take at least a byte of its answer; beyond, the connection is closed, and what its request
    /// holds is free.
    pub write_timeout_ms: u64,
    /// Size of the head of a request.
    pub max_header_bytes: usize,
    /// Open connections per listener; beyond, those that have waited longest for a request are closed, and while all have one,
    /// new ones get 429.
    pub max_connections: usize,
    /// Time for running requests to finish once the host shuts down.
    pub grace_ms: u64,
    /// Deadline of a request that names none.
    pub default_timeout_ms: u64,
    /// Longest deadline that a request may name.
    pub max_timeout_ms: u64,
    /// Longest time that a request waits for a model that is loaded on demand; beyond, it gets 503.
    pub load_wait_ms: u64,
    /// Choices (`n`) of one prompt.
    pub max_choices: u32,
    /// Prompts of one completions request.
    pub max_prompts: u32,
    /// Prompts times choices of one request.
    pub max_rows: u32,
    /// Time for which a final answer leaves the device that both need to its draft; 0 computes both at once.
    pub draft_lead_ms: u64,
    /// Draft tokens of a step for requests that do not say; 0 for none.
    pub draft_tokens: u32,
    /// Memory of all compiled forms of texts and the masks made of them, together; beyond, requests get 429.
    pub max_grammar_bytes: usize,
    /// Compiled forms that are kept for the next request that asks for them; 0 keeps none.
    pub kept_forms: usize,
    /// Of that memory, what they may use; 0 keeps none.
    pub kept_form_bytes: usize,
    /// Memory of the response cache; 0 leaves it off.
    pub cache_bytes: usize,
    /// Time for which an answer is kept.
    pub cache_ttl_ms: u64,
    /// Events that a slow client may be behind, per choice; beyond, its request ends.
    pub sink_events: usize,
    /// Request headers that routers may ask for as `header.<name>`, lower case; a `*` at the end stands for any rest.
    pub route_headers: Vec<String>,
    /// Origins of web pages that may read answers, as browsers write them, or `*` for all of them; empty for none.
    pub cors_origins: Vec<String>,
    /// API keys; empty leaves the data plane open.
    pub api_keys: Vec<ApiKey>,
    /// Bearer tokens of the admin plane; at least one is required when it listens beyond loopback.
    pub admin_tokens: Vec<AdminToken>,
    /// Whether the admin plane listens beyond loopback, where the `Host` header is not checked.
    pub admin_remote: bool,
    /// Size of an uploaded component.
    pub max_component_bytes: usize,
    /// Requests that are remembered for `GET /admin/v1/requests/{id}`; 0 remembers none.
    pub explain_requests: usize,
    /// Files and batches.
    pub batch: BatchConfig,
    /// What `/version` says.
    pub version: String,
}

/// A token of the admin plane.
#[derive(Clone, Debug)]
pub struct AdminToken {
    /// What the journal calls its holder.
    pub name: String,
    /// What follows `Bearer `.
    pub token: Secret,
    /// What its holder may do.
    pub role: AdminRole,
}

/// What the holder of an admin token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminRole {
    /// Look.
    Read,
    /// Look and change.
    Operate,
}

/// A text that never reaches a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// A value that cannot work. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Zero where at least one is needed.
    #[error("server.{key} must be at least 1")]
    Zero {
        /// The key.
        key: &'static str,
    },
    /// A default beyond its own limit.
    #[error("server.default_timeout_ms ({default}) exceeds server.max_timeout_ms ({max})")]
    Timeout {
        /// The default.
        default: u64,
        /// The limit.
        max: u64,
    },
    /// hyper needs 8 KiB to read a head.
    #[error("server.max_header_bytes must be at least 8192, found {found}")]
    HeaderBytes {
        /// What was configured.
        found: usize,
    },
    /// A key that cannot be told from another one, or whose tenant cannot be named.
    #[error("API key `{name}` {what}")]
    ApiKey {
        /// Its name.
        name: String,
        /// In words.
        what: &'static str,
    },
    /// A name that logs and errors could not carry.
    #[error("the name of an API key must match [a-z0-9-]{{1,40}}, found one of {found} bytes that does not")]
    KeyName {
        /// Its length: it may be a key by mistake.
        found: usize,
    },
    /// More keys than are compared at each request.
    #[error("{found} API keys; {most} are the most")]
    TooManyKeys {
        /// How many.
        found: usize,
        /// The most.
        most: usize,
    },
    /// A host that asks for keys and knows none.
    #[error("there are no API keys: nobody could send a request; make one with `pointsman key new`")]
    NoKeys,
    /// No origin.
    #[error(
        "cors_origins: `{found}` is none: write `*` alone, or scheme and host in lower case with no path, as in \
         `https://chat.example`"
    )]
    Origin {
        /// As it was written.
        found: String,
    },
    /// The admin plane would be open to the network.
    #[error("the admin plane listens beyond loopback and has no token: set admin.token, or a token under admin.tokens")]
    OpenAdmin,
    /// An admin token that says nothing.
    #[error("admin.tokens: the token of `{name}` is empty")]
    EmptyToken {
        /// Whose.
        name: String,
    },
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_requests: 1_024,
            max_queued_tokens: 1 << 20,
            prompt_scores_mib: 256,
            max_body_bytes: 8 << 20,
            body_timeout_ms: 30_000,
            header_timeout_ms: 60_000,
            write_timeout_ms: 30_000,
            max_header_bytes: 32 << 10,
            max_connections: 4_096,
            grace_ms: 30_000,
            default_timeout_ms: 600_000,
            max_timeout_ms: 3_600_000,
            load_wait_ms: 60_000,
            max_choices: 8,
            max_prompts: 16,
            max_rows: 64,
            draft_lead_ms: 500,
            draft_tokens: 0,
            max_grammar_bytes: 1 << 30,
            kept_forms: 256,
            kept_form_bytes: 64 << 20,
            cache_bytes: 0,
            cache_ttl_ms: 3_600_000,
            sink_events: 4_096,
            route_headers: Vec::new(),
            cors_origins: Vec::new(),
            api_keys: Vec::new(),
            admin_tokens: Vec::new(),
            admin_remote: false,
            max_component_bytes: 32 << 20,
            explain_requests: 1_024,
            batch: BatchConfig::default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl ServerConfig {
    /// Checks every value once.
    ///
    /// # Errors
    /// The first value that cannot work, by its key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive: [(&'static str, u64); 16] = [
            ("max_requests", self.max_requests.into()),
            ("max_queued_tokens", self.max_queued_tokens.into()),
            ("prompt_scores_mib", self.prompt_scores_mib.into()),
            ("max_body_bytes", self.max_body_bytes as u64),
            ("body_timeout_ms", self.body_timeout_ms),
            ("header_timeout_ms", self.header_timeout_ms),
            ("write_timeout_ms", self.write_timeout_ms),
            ("max_connections", self.max_connections as u64),
            ("default_timeout_ms", self.default_timeout_ms),
            ("max_choices", self.max_choices.into()),
            ("max_prompts", self.max_prompts.into()),
            ("max_rows", self.max_rows.into()),
            ("max_grammar_bytes", self.max_grammar_bytes as u64),
            ("cache_ttl_ms", self.cache_ttl_ms),
            ("sink_events", self.sink_events as u64),
            ("max_component_bytes", self.max_component_bytes as u64),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero { key });
        }
        if self.default_timeout_ms > self.max_timeout_ms {
            return Err(ConfigError::Timeout { default: self.default_timeout_ms, max: self.max_timeout_ms });
        }
        if self.max_header_bytes < 8_192 {
            return Err(ConfigError::HeaderBytes { found: self.max_header_bytes });
        }
        if let Some(found) = crate::cors::wrong(&self.cors_origins) {
            return Err(ConfigError::Origin { found: found.to_owned() });
        }
        check_keys(&self.api_keys)?;
        if let Some(empty) = self.admin_tokens.iter().find(|token| token.token.expose().is_empty()) {
            return Err(ConfigError::EmptyToken { name: empty.name.clone() });
        }
        if self.admin_remote && self.admin_tokens.is_empty() { Err(ConfigError::OpenAdmin) } else { Ok(()) }
    }

    pub(crate) fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }
}

// === impl Secret ===

impl Secret {
    /// Wraps a text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `other` is the same text, in a time that depends on its length alone.
    pub(crate) fn matches(&self, other: &str) -> bool {
        let (ours, theirs) = (self.0.as_bytes(), other.as_bytes());
        let difference = (0..theirs.len())
            .fold(ours.len() ^ theirs.len(), |acc, i| acc | usize::from(theirs[i] ^ ours[i % ours.len().max(1)]));
        difference == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_cannot_work_are_named() {
        let base = ServerConfig::default;
        let empty = AdminToken { name: "ci".into(), token: Secret::new(""), role: AdminRole::Read };
        for (config, expect) in [
            (ServerConfig { max_requests: 0, ..base() }, "server.max_requests must be at least 1"),
            (ServerConfig { default_timeout_ms: 9_999_999, ..base() }, "exceeds server.max_timeout_ms"),
            (ServerConfig { max_header_bytes: 100, ..base() }, "at least 8192, found 100"),
            (ServerConfig { admin_remote: true, ..base() }, "set admin.token"),
            (ServerConfig { admin_tokens: vec![empty], ..base() }, "the token of `ci` is empty"),
        ] {
            let error = config.validate().expect_err(expect).to_string();
            assert!(error.contains(expect), "{error}");
        }
        assert_eq!(base().validate(), Ok(()));
    }

    #[test]
    fn secrets_compare_whole_and_do_not_print() {
        let secret = Secret::new("abc");
        for (other, expect) in [("abc", true), ("ab", false), ("abcabc", false), ("abd", false), ("", false)] {
            assert_eq!(secret.matches(other), expect, "{other}");
        }
        assert_eq!(format!("{secret:?}"), "<secret>");
    }
}
