//! How people name a component: `native`, a digest, a built-in or a file, or a place in a registry, each but the first
//! with an optional pin, `@sha256:<hex>`.
//!
//! A pin makes a name that may come to mean something else (a file, a tag) mean one thing or nothing. On a registry
//! reference it is the digest of the manifest, as everywhere in that world, and the manifest names the bytes; elsewhere it
//! is the digest of the component itself.

use std::fmt;
use std::str::FromStr;

use pointsman_policy::Digest;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reference {
    /// The host's own policy.
    Native,
    /// A component that the host has.
    Digest(Digest),
    /// A built-in or a file.
    Named { name: String, pin: Option<Digest> },
    /// A manifest in a registry.
    Oci(OciReference),
}

/// `oci://registry/repository[:tag][@sha256:<manifest>]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OciReference {
    /// Host and port.
    pub registry: String,
    pub repository: String,
    /// `latest` when it is not named.
    pub tag: String,
    /// Digest of the manifest; the tag is then only for people.
    pub pin: Option<Digest>,
}

/// A name that cannot stand for anything.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReferenceError {
    #[error("`{0}`: a digest is `sha256:` and 64 lower-case hexadecimal digits")]
    Digest(String),
    #[error(
        "`{0}` names no repository; a registry reference is `oci://host/repository:tag`, with `@sha256:...` to pin it"
    )]
    NoRepository(String),
    #[error("`{reference}`: `{part}` is not a {what} of a registry reference")]
    Part { reference: String, part: String, what: &'static str },
}

/// Before the reference of a registry.
pub(crate) const OCI_SCHEME: &str = "oci://";

// === impl Reference ===

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let digest = |text: &str| Digest::parse(text).ok_or_else(|| ReferenceError::Digest(text.to_owned()));
        if text == "native" {
            return Ok(Self::Native);
        }
        if text.starts_with("sha256:") {
            return digest(text).map(Self::Digest);
        }
        let (name, pin) = match text.split_once("@sha256:") {
            Some((name, hex)) => (name, Some(digest(&format!("sha256:{hex}"))?)),
            None => (text, None),
        };
        match name.strip_prefix(OCI_SCHEME) {
            Some(rest) => OciReference::parse(rest, pin).map(Self::Oci),
            None => Ok(Self::Named { name: name.to_owned(), pin }),
        }
    }
}

// === impl OciReference ===

impl OciReference {
    fn parse(rest: &str, pin: Option<Digest>) -> Result<Self, ReferenceError> {
        let reference = || format!("{OCI_SCHEME}{rest}");
        let (registry, path) = rest.split_once('/').ok_or_else(|| ReferenceError::NoRepository(reference()))?;
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, tag),
            None => (path, "latest"),
        };
        let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let host = |b: u8| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b);
        let tag_byte = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        // A part may not begin or end with a separator, so `..` cannot climb out of the repository.
        let part = |part: &str| {
            let (first, last) = (part.bytes().next(), part.bytes().next_back());
            part.bytes().all(|b| lower(b) || b"._-".contains(&b)) && first.is_some_and(lower) && last.is_some_and(lower)
        };
        let good = [
            (registry, "host", !registry.is_empty() && registry.bytes().all(host)),
            (repository, "repository", repository.len() <= 255 && repository.split('/').all(part)),
            (tag, "tag", (1..=128).contains(&tag.len()) && tag.bytes().all(tag_byte) && !tag.starts_with(['.', '-'])),
        ];
        if let Some((part, what, _)) = good.into_iter().find(|(_, _, good)| !good) {
            return Err(ReferenceError::Part { reference: reference(), part: part.to_owned(), what });
        }
        Ok(Self { registry: registry.into(), repository: repository.into(), tag: tag.into(), pin })
    }
}

impl fmt::Display for OciReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { registry, repository, tag, pin } = self;
        write!(f, "{OCI_SCHEME}{registry}/{repository}:{tag}")?;
        pin.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let hex = "ab".repeat(32);
        let digest = Digest::parse(&format!("sha256:{hex}"));
        let named = |name: &str, pin: &Option<Digest>| Reference::Named { name: name.into(), pin: pin.clone() };
        let oci = |registry: &str, repository: &str, tag: &str, pin: &Option<Digest>| {
            let (registry, repository, tag) = (registry.into(), repository.into(), tag.into());
            Reference::Oci(OciReference { registry, repository, tag, pin: pin.clone() })
        };
        for (text, expect) in [
            ("native".to_owned(), Reference::Native),
            (format!("sha256:{hex}"), Reference::Digest(digest.clone().expect("a digest"))),
            ("route-weighted".to_owned(), named("route-weighted", &None)),
            ("route-weighted@0.1.0+abababab".to_owned(), named("route-weighted@0.1.0+abababab", &None)),
            (format!("./a/b.wasm@sha256:{hex}"), named("./a/b.wasm", &digest)),
            ("oci://ghcr.io/acme/policies/router:1.2".to_owned(), oci("ghcr.io", "acme/policies/router", "1.2", &None)),
            ("oci://localhost:5000/r".to_owned(), oci("localhost:5000", "r", "latest", &None)),
            (format!("oci://[::1]:5000/r:v1@sha256:{hex}"), oci("[::1]:5000", "r", "v1", &digest)),
        ] {
            assert_eq!(text.parse::<Reference>().expect(&text), expect);
        }
        for (text, expect) in [
            ("sha256:12", "64 lower-case"),
            ("a.wasm@sha256:12", "64 lower-case"),
            ("oci://host", "names no repository"),
            ("oci:///r", "is not a host"),
            ("oci://user@host/r", "is not a host"),
            ("oci://host/", "is not a repository"),
            ("oci://host/../etc", "is not a repository"),
            ("oci://host/a//b", "is not a repository"),
            ("oci://host/Big", "is not a repository"),
            ("oci://host/r:", "is not a tag"),
            ("oci://host/r:a b", "is not a tag"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }
}
