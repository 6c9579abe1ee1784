//! What a component says of itself in `init`, checked: its name and version become a metric label, a header and a line in
//! the journal, and the names it wants become columns.

use std::sync::Arc;

use pointsman_telemetry::EventKind;

use crate::upload::{Digest, World};

/// Longest name and version.
const MAX_NAME: usize = 64;
const MAX_VERSION: usize = 32;
/// Longest summary, in bytes.
const MAX_SUMMARY: usize = 200;
/// Most names in `wants`, and the longest one.
const MAX_WANTS: usize = 64;
const MAX_WANT: usize = 64;
/// Prefix of request headers that a router may read.
const HEADER: &str = "header.";
/// The beginning of the prompt, as a router may read it.
const PROMPT_HEAD: &str = "prompt-head";
/// Prefix of the operator's labels of replicas.
const LABEL: &str = "replica.label.";
/// Most labels of a host.
pub(crate) const MAX_LABELS: usize = 16;
/// Most columns and numbers of a call to a router: every name at most once.
pub(crate) const MAX_REPLICA_COLUMNS: usize = REPLICA_COLUMNS.len() + MAX_LABELS;
pub(crate) const MAX_REQUEST_NUMBERS: usize = REQUEST_NUMBERS.len();
pub(crate) const MAX_SEQUENCE_COLUMNS: usize = SEQUENCE_COLUMNS.len();

/// As the guest returned it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) wants: Vec<String>,
    pub(crate) state_schema: u32,
    pub(crate) summary: String,
}

/// Why a manifest was refused: the guest's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A name that cannot be a label.
    #[error("the manifest's name `{0}` must have 1 to 64 characters of a-z, A-Z, 0-9, `.`, `_` and `-`")]
    Name(String),
    /// A version that cannot be one.
    #[error("the manifest's version `{0}` must have 1 to 32 characters of a-z, A-Z, 0-9, `.` and `-`, as in 1.2.0")]
    Version(String),
    /// A summary that is no line.
    #[error("the manifest's summary has {0} bytes; it must be one line of at most 200")]
    Summary(usize),
    /// Too many names, or too long ones.
    #[error("the manifest wants {count} names of up to {longest} bytes; at most 64 names of 64 bytes are possible")]
    TooMany {
        /// How many.
        count: usize,
        /// Length of the longest.
        longest: usize,
    },
    /// A name twice.
    #[error("the manifest wants `{0}` twice; name every column once")]
    Twice(String),
    /// Names that this host does not know.
    #[error("the manifest wants {}, which this host cannot pass to a {world}; known are: {}", .unknown.join(", "), .known.join(", "))]
    UnknownWants {
        /// The world.
        world: World,
        /// The names.
        unknown: Vec<String>,
        /// All that are known.
        known: Vec<String>,
    },
}

/// `manifest.wants` in the terms of the seams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    /// Router: extra columns, in order.
    pub(crate) replica: Vec<ReplicaColumn>,
    /// Router and admission: numbers of the request, in order.
    pub(crate) request: Vec<RequestNumber>,
    /// Router, admission and sampler: attributes, in order.
    pub(crate) attributes: Vec<String>,
    /// Scheduler: the `progress` columns.
    pub(crate) progress: bool,
    /// Scheduler: extra columns, in order.
    pub(crate) sequence: Vec<SequenceColumn>,
    /// Telemetry: a bit per kind; all when none is named.
    pub(crate) events: u16,
    /// Telemetry: extra columns, in order.
    pub(crate) columns: Vec<EventColumn>,
}

/// Extra columns of `record replicas`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplicaColumn {
    Device,
    Variant,
    Load,
    Errors,
    Age,
    PredictedTtft,
    Kind,
    /// An operator's label, by the host's number for it.
    Label(u8),
}

/// `extra` of `record request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestNumber {
    Choices,
    TemperaturePpm,
    Stream,
    MinNewTokens,
    CachePrompt,
}

/// Extra columns of `record sequences`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SequenceColumn {
    Session,
    Prefix,
}

/// Extra columns of `record events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventColumn {
    Variant,
    Priority,
    PromptTokens,
    CachedTokens,
}

const REPLICA_COLUMNS: [(&str, ReplicaColumn); 7] = [
    ("replica.device", ReplicaColumn::Device),
    ("replica.variant", ReplicaColumn::Variant),
    ("replica.load", ReplicaColumn::Load),
    ("replica.errors", ReplicaColumn::Errors),
    ("replica.age", ReplicaColumn::Age),
    ("replica.predicted-ttft", ReplicaColumn::PredictedTtft),
    ("replica.kind", ReplicaColumn::Kind),
];
const REQUEST_NUMBERS: [(&str, RequestNumber); 5] = [
    ("request.choices", RequestNumber::Choices),
    ("request.temperature-ppm", RequestNumber::TemperaturePpm),
    ("request.stream", RequestNumber::Stream),
    ("request.min-new-tokens", RequestNumber::MinNewTokens),
    ("request.cache-prompt", RequestNumber::CachePrompt),
];
const SEQUENCE_COLUMNS: [(&str, SequenceColumn); 2] =
    [("seq.session", SequenceColumn::Session), ("seq.prefix", SequenceColumn::Prefix)];
const EVENT_COLUMNS: [(&str, EventColumn); 4] = [
    ("column.variant", EventColumn::Variant),
    ("column.priority", EventColumn::Priority),
    ("column.prompt-tokens", EventColumn::PromptTokens),
    ("column.cached-tokens", EventColumn::CachedTokens),
];

fn names<T>(table: &[(&'static str, T)]) -> impl Iterator<Item = String> {
    table.iter().map(|(name, _)| (*name).to_owned())
}

/// Every name that this host can pass to guests of `world`, as `host-info.columns` lists them; `labels` are those that the
/// operator gave to replicas.
pub(crate) fn known_names(world: World, labels: &[String]) -> Vec<String> {
    match world {
        World::Admission => names(&REQUEST_NUMBERS).collect(),
        World::Router => {
            let labels = labels.iter().map(|label| format!("{LABEL}{label}"));
            let texts = [PROMPT_HEAD.to_owned()];
            names(&REPLICA_COLUMNS).chain(labels).chain(names(&REQUEST_NUMBERS)).chain(texts).collect()
        }
        World::Scheduler => ["progress".to_owned()].into_iter().chain(names(&SEQUENCE_COLUMNS)).collect(),
        World::Retention | World::Sampler => Vec::new(),
        World::Telemetry => {
            let events = EventKind::ALL.iter().map(|kind| format!("event.{}", kind.name()));
            events.chain(names(&EVENT_COLUMNS)).collect()
        }
    }
}

fn lookup<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

// === impl Manifest ===

impl Manifest {
    /// `name@version+<first eight digits of the digest>`.
    pub(crate) fn revision(&self, digest: &Digest) -> Arc<str> {
        format!("{}@{}+{}", self.name, self.version, digest.short()).into()
    }

    /// Checks everything and resolves `wants`.
    pub(crate) fn check(&self, world: World, labels: &[String]) -> Result<Wants, ManifestError> {
        let good = |text: &str, limit: usize, marks: &[u8]| {
            (1..=limit).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || marks.contains(&b))
        };
        let shown = |text: &str| text.chars().take(MAX_NAME).collect::<String>();
        if !good(&self.name, MAX_NAME, b"._-") {
            return Err(ManifestError::Name(shown(&self.name)));
        }
        if !good(&self.version, MAX_VERSION, b".-") {
            return Err(ManifestError::Version(shown(&self.version)));
        }
        if self.summary.len() > MAX_SUMMARY || self.summary.chars().any(char::is_control) {
            return Err(ManifestError::Summary(self.summary.len()));
        }
        let longest = self.wants.iter().map(String::len).max().unwrap_or(0);
        if self.wants.len() > MAX_WANTS || longest > MAX_WANT {
            return Err(ManifestError::TooMany { count: self.wants.len(), longest });
        }
        let twice = self.wants.iter().enumerate().find(|(i, name)| self.wants[..*i].contains(name));
        if let Some((_, name)) = twice {
            return Err(ManifestError::Twice(name.clone()));
        }
        let mut wants = Wants::default();
        let unknown: Vec<String> = self.wants.iter().filter(|name| !wants.add(world, labels, name)).cloned().collect();
        if unknown.is_empty() {
            if wants.events == 0 {
                wants.events = u16::MAX;
            }
            return Ok(wants);
        }
        let mut known = known_names(world, labels);
        if matches!(world, World::Admission | World::Router | World::Sampler) {
            known.push(format!("{HEADER}<name>"));
        }
        Err(ManifestError::UnknownWants { world, unknown, known })
    }
}

// === impl Wants ===

impl Wants {
    /// Adds a name; says whether it is known.
    fn add(&mut self, world: World, labels: &[String], name: &str) -> bool {
        match world {
            World::Admission => self.add_of_request(name),
            World::Router => {
                let label = |name: &str| {
                    let place =
                        labels.iter().position(|label| label == name.strip_prefix(LABEL).unwrap_or_default())?;
                    u8::try_from(place).ok().map(ReplicaColumn::Label)
                };
                if let Some(column) = lookup(&REPLICA_COLUMNS, name).or_else(|| label(name)) {
                    self.replica.push(column);
                    return true;
                }
                if name == PROMPT_HEAD {
                    self.attributes.push(name.to_owned());
                    return true;
                }
                self.add_of_request(name)
            }
            World::Scheduler => {
                if let Some(column) = lookup(&SEQUENCE_COLUMNS, name) {
                    self.sequence.push(column);
                    return true;
                }
                self.progress |= name == "progress";
                name == "progress"
            }
            World::Retention => false,
            World::Sampler => self.add_header(name),
            World::Telemetry => {
                if let Some(column) = lookup(&EVENT_COLUMNS, name) {
                    self.columns.push(column);
                    return true;
                }
                let event = name.strip_prefix("event.").unwrap_or_default();
                let kind = EventKind::ALL.iter().find(|kind| kind.name() == event);
                self.events |= kind.map_or(0, |&kind| 1 << kind as u8);
                kind.is_some()
            }
        }
    }

    /// Adds what is known of a request before its prompt is looked at.
    fn add_of_request(&mut self, name: &str) -> bool {
        if let Some(number) = lookup(&REQUEST_NUMBERS, name) {
            self.request.push(number);
            return true;
        }
        self.add_header(name)
    }

    fn add_header(&mut self, name: &str) -> bool {
        let header = name.strip_prefix(HEADER).is_some_and(|header| !header.is_empty());
        if header {
            self.attributes.push(name.to_owned());
        }
        header
    }

    /// Whether a telemetry guest gets events of this kind.
    pub(crate) fn event(&self, kind: EventKind) -> bool {
        self.events & (1 << kind as u8) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, version: &str, wants: &[&str]) -> Manifest {
        let wants = wants.iter().map(|w| (*w).to_owned()).collect();
        Manifest { name: name.into(), version: version.into(), wants, state_schema: 0, summary: String::new() }
    }

    #[test]
    fn names_and_versions_are_labels() {
        for (name, version, good) in [
            ("least-loaded", "1.0.0", true),
            ("a", "0.1.0-rc.1", true),
            ("", "1.0.0", false),
            ("a b", "1.0.0", false),
            ("a@b", "1.0.0", false),
            ("a", "", false),
            ("a", "1+2", false),
            (&"n".repeat(65), "1.0.0", false),
        ] {
            assert_eq!(manifest(name, version, &[]).check(World::Router, &[]).is_ok(), good, "{name} {version}");
        }
        for (summary, good) in [("", true), ("Picks the emptiest.", true), ("a\nb", false), (&"s".repeat(201), false)] {
            let manifest = Manifest { summary: summary.to_owned(), ..manifest("a", "1.0.0", &[]) };
            assert_eq!(manifest.check(World::Router, &[]).is_ok(), good, "{summary}");
        }
        let digest = Digest::of(b"");
        assert_eq!(&*manifest("a", "1.2.0", &[]).revision(&digest), "a@1.2.0+e3b0c442");
    }

    #[test]
    fn wants_are_resolved_or_refused_with_the_known_names() {
        let labels = ["price".to_owned(), "region".to_owned()];
        let wants = |world, names: &[&str]| manifest("a", "1.0.0", names).check(world, &labels);
        let names = ["replica.label.region", "replica.variant", "header.x-plan", "request.stream", "prompt-head"];
        let router = wants(World::Router, &names).expect("known");
        assert_eq!(router.replica, [ReplicaColumn::Label(1), ReplicaColumn::Variant]);
        assert_eq!(router.request, [RequestNumber::Stream]);
        assert_eq!(router.attributes, ["header.x-plan", "prompt-head"]);
        let door = wants(World::Admission, &["header.x-plan", "request.stream"]).expect("known");
        assert_eq!((door.attributes, door.request), (vec!["header.x-plan".to_owned()], vec![RequestNumber::Stream]));
        assert_eq!(wants(World::Sampler, &["header.x-plan"]).expect("known").attributes, ["header.x-plan"]);
        let scheduler = wants(World::Scheduler, &["seq.prefix", "progress", "seq.session"]).expect("known");
        assert!(scheduler.progress);
        assert_eq!(scheduler.sequence, [SequenceColumn::Prefix, SequenceColumn::Session]);
        let hook = wants(World::Telemetry, &["event.finished", "column.priority"]).expect("known");
        assert!(hook.event(EventKind::Finished) && !hook.event(EventKind::Step));
        assert_eq!(hook.columns, [EventColumn::Priority]);
        assert!(EventKind::ALL.iter().all(|&k| wants(World::Telemetry, &[]).expect("none").event(k)), "none: all");
        for (world, name) in [
            (World::Router, "progress"),
            (World::Router, "header."),
            (World::Router, "replica.label.colour"),
            (World::Router, "replica.label."),
            (World::Router, "seq.session"),
            (World::Scheduler, "seq.age"),
            (World::Sampler, "request.stream"),
            (World::Retention, "header.x-plan"),
            (World::Telemetry, "event.unheard"),
        ] {
            let error = wants(world, &[name]).expect_err(name).to_string();
            let known = known_names(world, &labels).join(", ");
            assert!(error.contains(name) && error.contains(&known), "{error}");
        }
        assert!(matches!(wants(World::Router, &["header.x"; 2]), Err(ManifestError::Twice(_))));
        assert!(matches!(wants(World::Router, &["header.x"; 65]), Err(ManifestError::TooMany { count: 65, .. })));
    }
}
