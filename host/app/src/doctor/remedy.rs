//! What to change where a configuration is refused: one line for each kind of fault, with the key or the file that is at fault.
//!
//! Here and not in the errors, which say what is wrong to whoever starts a host: a start has room for one sentence.

use crate::config::ConfigError;

/// For an error of what reads flags, environment and file.
pub(super) fn remedy(error: &anyhow::Error) -> String {
    match error.downcast_ref::<ConfigError>() {
        Some(error) => of(error),
        None => "correct the flags: each model once, as --model NAME=PATH".into(),
    }
}

fn of(error: &ConfigError) -> String {
    match error {
        ConfigError::Read { path, .. } => format!("make {path} a file that this user can read, or name another with --config"),
        ConfigError::Syntax { origin, .. } => format!("correct {origin} at the line that is shown"),
        ConfigError::UnknownKey { key, origin, nearest: Some(nearest) } => {
            format!("write `{nearest}` in place of `{key}` in {origin}, or take it out")
        }
        ConfigError::UnknownKey { key, origin, nearest: None } => {
            format!("take `{key}` out of {origin}; pointsman.example.toml has every key")
        }
        ConfigError::Shape(_) => "give the key a value of the kind that pointsman.example.toml shows".into(),
        ConfigError::Value { key: "admin.listen", .. } => {
            "set admin.token (or a table under [admin.tokens]), or let admin.listen be a loopback address such as 127.0.0.1:8081"
                .into()
        }
        ConfigError::Value { key, found, rule } => format!("change `{key}` from {found} to what is allowed: {rule}"),
        ConfigError::UnknownComponent { slot, nearest, .. } => {
            let nearest = nearest.as_deref().unwrap_or("native");
            format!("set slots.{slot}.component to `{nearest}`, or to the path of a component that is there")
        }
        ConfigError::Component { slot, .. } => format!("correct slots.{slot}.component, or leave the line out"),
        ConfigError::Budget { slot, .. } => format!("correct slots.{slot}.budget, or leave it out for the host's own"),
        ConfigError::Trust(_) => "correct [trust]: public keys as `pointsman policy keygen` prints them".into(),
        ConfigError::Key(_) => {
            "put tables as `pointsman key new NAME` prints them into the file that server.api_keys_file names, readable for this user".into()
        }
        ConfigError::Upstream(_) => "correct the key of [upstreams] that is named, or leave the upstream out (docs/upstreams.md)".into(),
        ConfigError::Certificate(_) => "give cert_file and key_file of the section both, as files that this user can read (docs/tls.md)".into(),
        ConfigError::Registry { registry, .. } => format!("correct registries.\"{registry}\" (docs/trust.md)"),
        ConfigError::AdminToken { name, .. } => format!("correct admin.tokens.{name}, or leave it out"),
        ConfigError::NotInEnvironment { name, section } => {
            format!("unset {name}, and set `{section}` in the file that --config names")
        }
    }
}
