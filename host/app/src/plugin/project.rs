//! A plugin folder: what `new` writes into `plugin.toml` and the other commands read from it.
//!
//! The file has three lines because everything else is the language's own business: dependencies are in its manifest, the
//! policy's name and version in its source.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use pointsman_policy::World;
use serde::{Deserialize, Serialize};

/// The file that makes a folder a plugin.
pub(crate) const MANIFEST: &str = "plugin.toml";
/// Longest name: it becomes file names, a package name and a metric label.
const MAX_NAME: usize = 40;

/// Which hook a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Chooses the replica that serves a request.
    Router,
    /// Orders the work of a replica.
    Scheduler,
    /// Watches what happens.
    Telemetry,
    /// Lets requests in.
    Admission,
    /// Ranks what the prefix cache gives up first.
    KvRetention,
    /// Limits or biases the next token.
    Sampler,
}

/// What a plugin is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Lang {
    /// Rust, with the SDK in the folder.
    Rust,
    /// JavaScript, on QuickJS.
    Js,
    /// Python, on CPython.
    Python,
    /// C, compiled by zig.
    C,
}

/// The name of a plugin: letters, digits and `-`, a letter first, in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Name(String);

/// `plugin.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// Of the folder, the built file and the policy.
    pub name: Name,
    /// Which hook it is for.
    pub kind: Kind,
    /// What it is written in.
    pub lang: Lang,
}

/// A plugin folder.
#[derive(Clone, Debug)]
pub(crate) struct Project {
    /// Where it is.
    pub folder: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

impl Kind {
    /// The world that it implements, by name.
    pub(crate) fn world(self) -> &'static str {
        match self {
            Self::Router => "router-policy",
            Self::Scheduler => "scheduler-policy",
            Self::Telemetry => "telemetry-hook",
            Self::Admission => "admission-policy",
            Self::KvRetention => "kv-retention-policy",
            Self::Sampler => "sampler-policy",
        }
    }

    /// What its template does, for the operator who lists policies.
    pub(crate) fn summary(self) -> &'static str {
        match self {
            Self::Router => "Least work first.",
            Self::Scheduler => "Short prompts first, with aging.",
            Self::Telemetry => "Counts late first tokens.",
            Self::Admission => "So many requests of a tenant at once.",
            Self::KvRetention => "Blocks that several requests found go last.",
            Self::Sampler => "No token too often in a row.",
        }
    }

    /// The word of the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Scheduler => "scheduler",
            Self::Telemetry => "telemetry",
            Self::Admission => "admission",
            Self::KvRetention => "kv-retention",
            Self::Sampler => "sampler",
        }
    }

    /// A slot that it goes into.
    pub(crate) fn slot(self, name: &Name) -> String {
        match self {
            Self::Telemetry => format!("telemetry.{name}"),
            slot => slot.as_str().to_owned(),
        }
    }

    /// The command that takes it out again. A slot that starts empty has nothing to roll back to.
    pub(crate) fn undo(self, name: &Name) -> String {
        let slot = self.slot(name);
        match self {
            Self::Router | Self::Scheduler => format!("pointsman policy rollback {slot}"),
            _ => format!("pointsman policy activate {slot} native"),
        }
    }
}

/// The slot in which a component of this world is tried out.
pub(crate) fn trial_slot(world: World) -> &'static str {
    match world {
        World::Admission => "admission",
        World::Router => "router",
        World::Scheduler => "scheduler",
        World::Telemetry => "telemetry.trial",
        World::Retention => "kv-retention",
        World::Sampler => "sampler",
    }
}

impl Project {
    /// Reads a plugin folder.
    ///
    /// # Errors
    /// It is not one, or its manifest is not.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(MANIFEST);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "{} is no plugin folder: cannot read {}; `pointsman plugin new` makes one",
                folder.display(),
                path.display()
            )
        })?;
        let manifest = toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))?;
        Ok(Self { folder: folder.to_owned(), manifest })
    }

    /// Where the built component goes.
    pub(crate) fn wasm(&self) -> PathBuf {
        self.folder.join(format!("{}.wasm", self.manifest.name))
    }
}

/// The component behind what a person names: a plugin folder that was built, or a file.
///
/// # Errors
/// There is none.
pub(crate) fn wasm(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let wasm = Project::open(path)?.wasm();
    if !wasm.is_file() {
        bail!("{} is not built yet: run `pointsman plugin build {}`", path.display(), path.display());
    }
    Ok(wasm)
}

// === impl Name ===

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let good =
            text.starts_with(|c: char| c.is_ascii_lowercase()) && !text.ends_with('-') && text.bytes().all(known);
        if good && text.len() <= MAX_NAME {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "a name has lower-case letters, digits and `-`, starts with a letter and has at most {MAX_NAME} characters"
        ))
    }
}

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_package_names() {
        for (text, good) in [
            ("my-router", true),
            ("r2", true),
            ("", false),
            ("-a", false),
            ("a-", false),
            ("2a", false),
            ("My", false),
            ("a_b", false),
            ("a/b", false),
            (&"a".repeat(41), false),
        ] {
            assert_eq!(text.parse::<Name>().is_ok(), good, "{text}");
        }
    }

    #[test]
    fn a_folder_that_is_no_plugin_says_how_to_make_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = format!("{:#}", wasm(folder.path()).expect_err("empty"));
        assert!(error.contains("`pointsman plugin new` makes one"), "{error}");
        let manifest = "name = \"mine\"\nkind = \"router\"\nlang = \"c\"\n";
        std::fs::write(folder.path().join(MANIFEST), manifest).expect("a file");
        let error = format!("{:#}", wasm(folder.path()).expect_err("not built"));
        assert!(error.contains("is not built yet: run `pointsman plugin build"), "{error}");
        std::fs::write(folder.path().join(MANIFEST), manifest.replace("router", "rooter")).expect("a file");
        let error = format!("{:#}", wasm(folder.path()).expect_err("misspelt"));
        assert!(error.contains("unknown variant `rooter`"), "{error}");
    }
}
