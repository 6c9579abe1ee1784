//! Names of slots and references to components: the words in which operators and documents speak.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A place where a policy works.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SlotName {
    /// Lets requests in.
    Admission,
    /// Chooses the replica of a request.
    Router,
    /// Orders the work of each replica.
    Scheduler,
    /// Ranks what the prefix cache gives up first.
    KvRetention,
    /// Limits or biases tokens.
    Sampler,
    /// Watches events; any number, by name (`telemetry.<name>`).
    Telemetry(String),
}

/// A slot that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotNameError {
    /// No such kind of slot.
    #[error(
        "there is no slot `{0}`; slots are `admission`, `router`, `scheduler`, `kv-retention`, `sampler` and `telemetry.<name>`"
    )]
    Unknown(String),
    /// A telemetry slot with a bad name.
    #[error("`{0}` is not a telemetry slot: its name must match [a-z0-9-]{{1,40}}, as in `telemetry.slo-log`")]
    BadTelemetryName(String),
}

/// A component, by the digest of its bytes, or the host's own policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ComponentRef {
    /// The host's own policy.
    #[default]
    Native,
    /// `sha256:<hex>` of the uploaded bytes.
    Digest(String),
}

// === impl SlotName ===

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admission => f.write_str("admission"),
            Self::Router => f.write_str("router"),
            Self::Scheduler => f.write_str("scheduler"),
            Self::KvRetention => f.write_str("kv-retention"),
            Self::Sampler => f.write_str("sampler"),
            Self::Telemetry(name) => write!(f, "telemetry.{name}"),
        }
    }
}

impl FromStr for SlotName {
    type Err = SlotNameError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let good_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        match s {
            "admission" => Ok(Self::Admission),
            "router" => Ok(Self::Router),
            "scheduler" => Ok(Self::Scheduler),
            "kv-retention" => Ok(Self::KvRetention),
            "sampler" => Ok(Self::Sampler),
            _ => match s.strip_prefix("telemetry.") {
                Some(name) if (1..=40).contains(&name.len()) && name.bytes().all(good_byte) => {
                    Ok(Self::Telemetry(name.to_owned()))
                }
                Some(_) => Err(SlotNameError::BadTelemetryName(s.to_owned())),
                None => Err(SlotNameError::Unknown(s.to_owned())),
            },
        }
    }
}

impl TryFrom<String> for SlotName {
    type Error = SlotNameError;

    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<SlotName> for String {
    fn from(slot: SlotName) -> Self {
        slot.to_string()
    }
}

// === impl ComponentRef ===

impl fmt::Display for ComponentRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Digest(digest) => digest,
        })
    }
}

impl From<String> for ComponentRef {
    fn from(s: String) -> Self {
        if s == "native" { Self::Native } else { Self::Digest(s) }
    }
}

impl From<ComponentRef> for String {
    fn from(component: ComponentRef) -> Self {
        component.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_parse_and_print() {
        for name in ["admission", "router", "scheduler", "kv-retention", "sampler", "telemetry.slo-log", "telemetry.0"]
        {
            assert_eq!(name.parse::<SlotName>().map(|s| s.to_string()), Ok(name.to_owned()));
        }
        for name in ["", "Router", "telemetry", "telemetry.", "telemetry.A", "telemetry.a b", "sampler.x"] {
            assert!(name.parse::<SlotName>().is_err(), "{name}");
        }
        assert!(format!("telemetry.{}", "a".repeat(41)).parse::<SlotName>().is_err());
    }
}
