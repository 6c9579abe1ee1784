//! API keys of the data plane as an operator writes them: in the configuration, in a file of their own, and made by
//! `pointsman key new`.
//!
//! A file of its own, because keys come and go while a host runs and nothing else of its configuration does: SIGHUP reads it
//! again. It holds hashes alone, so it may be kept where configurations are kept. What is wrong with it is said without
//! repeating what stands in it, because that may be a key by mistake.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, Subcommand, ValueEnum};
use pointsman_sched::ids::Priority;
use pointsman_server::{ApiKey, BadDigest, KeyDigest, KeyLimits, check_keys, is_key_name};
use serde::{Deserialize, Serialize};

use crate::config::ServerSection;
use crate::files::{self, FileError};

/// Begins every key, so that those who look for leaked secrets find it.
const PREFIX: &str = "pm-";

/// A key under its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ApiKeySection {
    /// `sha256:` and 64 hexadecimal digits.
    pub hash: String,
    /// Whose it is; its name where it says nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tenant: String,
    /// The highest that its requests may have.
    pub priority: PriorityName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<NonZeroU32>,
}

/// A priority as requests name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PriorityName {
    Critical,
    High,
    #[default]
    Normal,
    Low,
}

/// The whole file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct KeyFile {
    keys: BTreeMap<String, ApiKeySection>,
}

/// What is wrong with the keys; the operator's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    #[error("server.api_keys_file {0}")]
    File(#[from] FileError),
    #[error(
        "server.api_keys_file {path}{}: it holds tables [keys.NAME] with `hash` and, where wanted, `tenant`, `priority`, \
         `concurrent`, `requests_per_minute` and `tokens_per_minute` from 1, as `pointsman key new` prints them",
        at(*line)
    )]
    Shape { path: PathBuf, line: usize },
    #[error("server.api_keys_file {path} has no keys: nobody could send a request; make one with `pointsman key new`")]
    Empty { path: PathBuf },
    #[error("the API key `{name}`: {source}")]
    Hash { name: String, source: BadDigest },
    #[error(
        "server.api_keys holds a key in plain text; it takes hashes: name = {{ hash = \"sha256:...\" }}, as \
         `pointsman key new` prints it"
    )]
    PlainText,
    #[error(transparent)]
    Keys(#[from] pointsman_server::ConfigError),
}

/// `pointsman key ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make an API key: prints it, once, and what the host is told of it.
    #[command(
        after_help = "Examples:\n  pointsman key new acme\n  pointsman key new acme-batch --tenant acme --priority low --tokens-per-minute 100000"
    )]
    New(NewKey),
}

/// Flags of `key new`.
#[derive(Debug, Args)]
pub(crate) struct NewKey {
    /// What logs and errors call it: [a-z0-9-]{1,40}.
    name: String,
    /// Whose it is [default: its name].
    #[arg(long, default_value = "", hide_default_value = true)]
    tenant: String,
    /// Highest priority that its requests may have.
    #[arg(long, value_enum, default_value_t)]
    priority: PriorityName,
    /// Requests in flight [default: no limit but the host's].
    #[arg(long, value_name = "N")]
    concurrent: Option<NonZeroU32>,
    /// Requests per minute [default: no limit].
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and answers per minute [default: no limit].
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<NonZeroU32>,
}

fn at(line: usize) -> String {
    if line > 0 { format!(", line {line}") } else { String::new() }
}

impl From<PriorityName> for Priority {
    fn from(name: PriorityName) -> Self {
        match name {
            PriorityName::Critical => Self::Critical,
            PriorityName::High => Self::High,
            PriorityName::Normal => Self::Normal,
            PriorityName::Low => Self::Low,
        }
    }
}

// === reading ===

/// The keys of a configuration: its own and those of its file, read now.
///
/// # Errors
/// The file cannot be read, holds something else or no key; a hash is none; or keys cannot be told apart.
pub(crate) fn read(server: &ServerSection) -> Result<Vec<ApiKey>, KeyError> {
    let listed = server.api_keys.clone().into_iter();
    let filed = if server.has_key_file() { read_file(&server.api_keys_file)? } else { BTreeMap::new() };
    if server.has_key_file() && server.api_keys.is_empty() && filed.is_empty() {
        return Err(KeyError::Empty { path: server.api_keys_file.clone() });
    }
    let keys: Vec<ApiKey> = listed.chain(filed).map(|(name, section)| section.key(name)).collect::<Result<_, _>>()?;
    check_keys(&keys)?;
    Ok(keys)
}

fn read_file(path: &Path) -> Result<BTreeMap<String, ApiKeySection>, KeyError> {
    let (path, text) = (path.to_owned(), files::read_text(path)?);
    let parsed: Result<KeyFile, usize> = match path.extension().is_some_and(|extension| extension == "json") {
        true => serde_json::from_str(&text).map_err(|error| error.line()),
        false => toml::from_str(&text).map_err(|error: toml::de::Error| {
            error.span().map_or(0, |span| 1 + text[..span.start].matches('\n').count())
        }),
    };
    match parsed {
        Ok(file) => Ok(file.keys),
        Err(line) => Err(KeyError::Shape { path, line }),
    }
}

impl ApiKeySection {
    fn key(self, name: String) -> Result<ApiKey, KeyError> {
        let Self { hash, tenant, priority, concurrent, requests_per_minute, tokens_per_minute } = self;
        if !is_key_name(&name) {
            return Err(pointsman_server::ConfigError::KeyName { found: name.len() }.into());
        }
        let digest: KeyDigest = match hash.parse() {
            Ok(digest) => digest,
            Err(source) => return Err(KeyError::Hash { name, source }),
        };
        let tenant = if tenant.is_empty() { name.clone() } else { tenant };
        let limits = KeyLimits { concurrent, requests_per_minute, tokens_per_minute };
        Ok(ApiKey { name, digest, tenant, max_priority: priority.into(), limits })
    }
}

// === making ===

/// `pointsman key ...`.
///
/// # Errors
/// A name or tenant that no host would take, or no randomness.
pub(crate) fn run(command: KeyCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    let KeyCommand::New(NewKey { name, tenant, priority, concurrent, requests_per_minute, tokens_per_minute }) =
        command;
    let mut bits = [0; 32];
    getrandom::fill(&mut bits).map_err(std::io::Error::other).context("no randomness for a key")?;
    let key = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bits));
    let hash = KeyDigest::of(&key).to_string();
    let section = ApiKeySection { hash, tenant, priority, concurrent, requests_per_minute, tokens_per_minute };
    check_keys(&[section.clone().key(name.clone())?])?;
    let lines = toml::to_string(&KeyFile { keys: BTreeMap::from([(name, section)]) }).context("cannot write TOML")?;
    writeln!(out, "the key, which is shown this once:\n\n{key}\n\nfor the file that server.api_keys_file names:\n")?;
    write!(out, "{lines}").context("cannot print")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const OTHER: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

    fn read_text(name: &str, text: &str) -> Result<Vec<ApiKey>, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("it can be written");
        let server = ServerSection { api_keys_file: path, ..ServerSection::default() };
        read(&server).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_toml_or_json() {
        let toml = format!(
            "[keys.ci]\nhash = \"{HASH}\"\n[keys.b]\nhash = \"{OTHER}\"\ntenant = \"acme\"\npriority = \"high\"\n\
             concurrent = 8\nrequests_per_minute = 600\ntokens_per_minute = 90000\n"
        );
        let json = serde_json::json!({"keys": {"ci": {"hash": HASH}, "b": {"hash": OTHER, "tenant": "acme",
            "priority": "high", "concurrent": 8, "requests_per_minute": 600, "tokens_per_minute": 90_000}}});
        for (name, text) in [("keys.toml", toml), ("keys.json", json.to_string())] {
            let keys = read_text(name, &text).expect("good keys");
            let terms = |key: &ApiKey| (key.name.clone(), key.tenant.clone(), key.max_priority);
            let expect = [("b", "acme", Priority::High), ("ci", "ci", Priority::Normal)];
            let expect = expect.map(|(name, tenant, priority)| (name.to_owned(), tenant.to_owned(), priority));
            assert_eq!(keys.iter().map(terms).collect::<Vec<_>>(), expect);
            let limits = KeyLimits {
                concurrent: NonZeroU32::new(8),
                requests_per_minute: NonZeroU32::new(600),
                tokens_per_minute: NonZeroU32::new(90_000),
            };
            assert_eq!((keys[0].limits, keys[1].limits), (limits, KeyLimits::default()));
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_secrets_are_not() {
        for (name, text, expect) in [
            ("keys.toml", "[keys]\n", "has no keys: nobody could send a request"),
            ("keys.toml", "", "has no keys: nobody could send a request"),
            ("keys.toml", "\n[keys.a]\nhash = \"pm-Secret\"\n", "the API key `a`: a key's hash is `sha256:`"),
            ("keys.toml", "[keys.pm-Secret]\ntenant = \"a\"\n", "must match [a-z0-9-]{1,40}, found one of 9 bytes"),
            ("keys.toml", "[keys.a]\nhash = pm-Secret\n", ", line 2: it holds tables"),
            ("keys.toml", "[keys]\na = \"pm-Secret\"\n", ", line 2: it holds tables"),
            ("keys.toml", "pm-Secret = \"acme\"\n", ", line 1: it holds tables"),
            ("keys.toml", "[keys.a]\nhash = \"x\"\nconcurrent = 0\n", ", line 3: "),
            ("keys.json", "{\n\"keys\": {\"a\": }}", ", line 2: it holds tables"),
            ("keys.json", "{\n\"keys\": {\"a\": \"pm-Secret\"}}", ", line 2: it holds tables"),
        ] {
            let error = read_text(name, text).expect_err(expect);
            assert!(error.contains(expect) && !error.contains("Secret"), "{error}");
        }
        let missing = ServerSection { api_keys_file: "/nowhere/keys.toml".into(), ..ServerSection::default() };
        assert!(matches!(read(&missing), Err(KeyError::File(_))));
    }

    #[test]
    fn a_new_key_is_known_by_what_is_printed_of_it() {
        let make = |name: &str| {
            let new = NewKey {
                name: name.into(),
                tenant: "acme".into(),
                priority: PriorityName::Low,
                concurrent: None,
                requests_per_minute: None,
                tokens_per_minute: NonZeroU32::new(5),
            };
            let mut out = Vec::new();
            run(KeyCommand::New(new), &mut out).map(|()| String::from_utf8(out).expect("UTF-8"))
        };
        let printed = make("ci").expect("a key");
        let secret = printed.lines().find(|line| line.starts_with(PREFIX)).expect("a key");
        let lines = &printed[printed.find("[keys").expect("a section")..];
        let keys = read_text("keys.toml", lines).expect("what it prints");
        assert_eq!(
            (keys[0].digest, keys[0].name.as_str(), keys[0].tenant.as_str()),
            (KeyDigest::of(secret), "ci", "acme")
        );
        assert_eq!(secret.len(), PREFIX.len() + 43, "256 bits");
        assert!(!printed.contains(make("ci").expect("another key").lines().nth(2).expect("a line")));
        assert!(make("C I").is_err());
    }
}
