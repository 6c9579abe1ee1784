//! Who may bring policies: a ring of Ed25519 public keys, and detached signatures of components.
//!
//! What is signed is one line, `pointsman-component-v1 sha256:<hex>`: the digest names the bytes, so that nobody needs them
//! at hand to sign or to check, and the words before it keep a signature from being one of something else. A signature is
//! 64 bytes; files and headers carry it in base64. It does not name its key: the ring is small and is tried whole.
//!
//! Built-in components carry no signature, since whoever could change them could change this check. For the same reason a
//! signature is no defence against somebody who can write the data directory: compiled code lies there too. Certificates
//! and transparency logs would be a network service that a start has to wait for; a key in the configuration is not.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_compact as ed25519;

use crate::config::TrustSection;

/// Stands before the digest in what is signed.
const SIGNED_WORDS: &str = "pointsman-component-v1";
/// First word of a secret key file.
const SECRET_WORDS: &str = "pointsman-secret-key-v1";
/// Most keys in the ring: each may be tried for each signature.
const MAX_KEYS: usize = 64;

/// The public keys whose signatures count, and whether a signature must be there.
#[derive(Clone, Debug)]
pub(crate) struct KeyRing {
    keys: Vec<(String, ed25519::PublicKey)>,
    required: bool,
}

/// A detached signature; whose, and whether it is good, only a ring can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature([u8; 64]);

/// A secret key, as `pointsman policy keygen` makes it.
pub(crate) struct SecretKey(ed25519::KeyPair);

/// What is wrong with a key, a signature or its absence.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error("trust.keys has {found} keys; {MAX_KEYS} is the most")]
    TooManyKeys { found: usize },
    #[error("trust.keys: `{0}` is not a key's name: it must match [a-z0-9-]{{1,40}}")]
    KeyName(String),
    #[error(
        "trust.keys.{name} is not an Ed25519 public key: 32 bytes in base64 or hex, as `pointsman policy keygen` prints it"
    )]
    BadKey { name: String },
    #[error("trust.keys.{name} and trust.keys.{other} are the same key")]
    SameKey { name: String, other: String },
    #[error("a signature is 64 bytes, raw or in base64; found {found} bytes that are neither")]
    BadSignature { found: usize },
    #[error(
        "no key of trust.keys has signed {digest} with this signature; sign it with `pointsman policy sign`, or add the signer's public key"
    )]
    UnknownSigner { digest: String },
    #[error(
        "{digest} is not signed, and trust.require_signature is on: sign it with `pointsman policy sign` and upload it again with the signature"
    )]
    Unsigned { digest: String },
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{0} is readable by others than its owner; make it private with `chmod 600`")]
    PublicSecret(PathBuf),
    #[error("{0} is not a secret key of `pointsman policy keygen`")]
    BadSecret(PathBuf),
}

/// What a signature of a component signs.
fn message(digest: &str) -> String {
    format!("{SIGNED_WORDS} {digest}")
}

// === impl KeyRing ===

impl KeyRing {
    /// Reads the ring of a configuration.
    ///
    /// # Errors
    /// A name or a key that is none, one that signs for everybody (a point of small order), or the same key twice.
    pub(crate) fn new(section: &TrustSection) -> Result<Self, TrustError> {
        if section.keys.len() > MAX_KEYS {
            return Err(TrustError::TooManyKeys { found: section.keys.len() });
        }
        let mut keys: Vec<(String, ed25519::PublicKey)> = Vec::new();
        for (name, text) in &section.keys {
            let good_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(1..=40).contains(&name.len()) || !name.bytes().all(good_byte) {
                return Err(TrustError::KeyName(name.clone()));
            }
            let bad = || TrustError::BadKey { name: name.clone() };
            let key = ed25519::PublicKey::new(from_text(text).ok_or_else(bad)?);
            key.validate().map_err(|_| bad())?;
            if let Some((other, _)) = keys.iter().find(|(_, known)| *known == key) {
                return Err(TrustError::SameKey { name: name.clone(), other: other.clone() });
            }
            keys.push((name.clone(), key));
        }
        Ok(Self { keys, required: section.require_signature })
    }

    /// Decides about a component that somebody brings: the name of the key that signed it.
    ///
    /// # Errors
    /// A signature that no key of the ring made, whether or not one is required; or none where one is.
    pub(crate) fn accept(&self, digest: &str, signature: Option<&Signature>) -> Result<Option<String>, TrustError> {
        match signature.map(|signature| self.signer(digest, signature)) {
            Some(Some(name)) => Ok(Some(name.to_owned())),
            Some(None) => Err(TrustError::UnknownSigner { digest: digest.to_owned() }),
            None if self.required => Err(TrustError::Unsigned { digest: digest.to_owned() }),
            None => Ok(None),
        }
    }

    /// Decides whether a stored component may work: while signatures are required, only one that a key of today's ring
    /// signed. A signature whose key has left the ring is as good as none.
    ///
    /// # Errors
    /// As for [`accept`](Self::accept), where signatures are required.
    pub(crate) fn may_work(&self, digest: &str, signature: Option<&Signature>) -> Result<(), TrustError> {
        if self.required { self.accept(digest, signature).map(drop) } else { Ok(()) }
    }

    /// The name of the key that made a signature.
    pub(crate) fn signer(&self, digest: &str, signature: &Signature) -> Option<&str> {
        let (message, signature) = (message(digest), ed25519::Signature::new(signature.0));
        let signed = |(_, key): &&(String, ed25519::PublicKey)| key.verify(&message, &signature).is_ok();
        self.keys.iter().find(signed).map(|(name, _)| name.as_str())
    }
}

// === impl Signature ===

impl Signature {
    /// Reads the content of a `.sig` file or of a header: 64 raw bytes, or base64 of them.
    ///
    /// # Errors
    /// It is neither.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TrustError> {
        if let Ok(raw) = bytes.try_into() {
            return Ok(Self(raw));
        }
        let text = std::str::from_utf8(bytes).ok().and_then(from_text);
        text.map(Self).ok_or(TrustError::BadSignature { found: bytes.len() })
    }

    /// Base64.
    pub(crate) fn to_text(self) -> String {
        STANDARD.encode(self.0)
    }
}

// === impl SecretKey ===

impl SecretKey {
    /// A fresh key.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub(crate) fn generate() -> io::Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let pair = ed25519::KeyPair::try_from_seed(ed25519::Seed::new(seed));
        pair.map(Self).map_err(io::Error::other)
    }

    /// Reads a file of [`write`](Self::write).
    ///
    /// # Errors
    /// It cannot be read, others can read it, or it holds something else.
    pub(crate) fn read(path: &Path) -> Result<Self, TrustError> {
        let fault = |source| TrustError::File { path: path.to_owned(), source };
        if fs::metadata(path).map_err(fault)?.permissions().mode() & 0o077 != 0 {
            return Err(TrustError::PublicSecret(path.to_owned()));
        }
        let text = fs::read_to_string(path).map_err(fault)?;
        let seed = text.trim_end().strip_prefix(SECRET_WORDS).and_then(|rest| from_text(rest.trim_start()));
        let pair = seed.and_then(|seed| ed25519::KeyPair::try_from_seed(ed25519::Seed::new(seed)).ok());
        pair.map(Self).ok_or_else(|| TrustError::BadSecret(path.to_owned()))
    }

    /// Writes the key to a new file that only its owner can read.
    ///
    /// # Errors
    /// The file exists or cannot be written.
    pub(crate) fn write(&self, path: &Path) -> Result<(), TrustError> {
        let fault = |source| TrustError::File { path: path.to_owned(), source };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fault)?;
        let line = format!("{SECRET_WORDS} {}\n", STANDARD.encode(*self.0.sk.seed()));
        file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).map_err(fault)
    }

    /// The public half in base64, as `trust.keys` takes it.
    pub(crate) fn public_text(&self) -> String {
        STANDARD.encode(*self.0.pk)
    }

    /// Signs a component by its digest.
    pub(crate) fn sign(&self, digest: &str) -> Signature {
        Signature(*self.0.sk.sign(message(digest), None))
    }
}

/// Exactly `N` bytes from hex or base64; where a text could be both, its length decides.
fn from_text<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.trim();
    if text.len() == 2 * N && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        return Some(bytes);
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";

    fn key(seed: u8) -> SecretKey {
        SecretKey(ed25519::KeyPair::from_seed(ed25519::Seed::new([seed; 32])))
    }

    fn ring(keys: &[(&str, &str)], require_signature: bool) -> Result<KeyRing, TrustError> {
        let keys = keys.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        KeyRing::new(&TrustSection { keys, require_signature })
    }

    #[test]
    fn a_signature_counts_for_its_component_and_its_key_only() {
        let (alice, bob) = (key(1), key(2));
        let both = [("alice", alice.public_text()), ("bob", bob.public_text())];
        let both = both.each_ref().map(|(name, text)| (*name, text.as_str()));
        let good = alice.sign(DIGEST);
        let mut torn = good;
        torn.0[17] ^= 1;
        let other = alice.sign(&DIGEST.replace("2c26", "2c27"));
        let bare = Signature(*alice.0.sk.sign(DIGEST, None));
        for (keys, required, signature, expect) in [
            (&both[..], true, Some(good), Ok(Some("alice"))),
            (&both, true, Some(bob.sign(DIGEST)), Ok(Some("bob"))),
            (&both[1..], true, Some(good), Err("no key of trust.keys has signed")),
            (&both[1..], false, Some(good), Err("no key of trust.keys has signed")),
            (&both, false, Some(torn), Err("no key of trust.keys")),
            (&both, true, Some(other), Err("no key of trust.keys")),
            (&both, true, Some(bare), Err("no key of trust.keys")),
            (&both, true, None, Err("is not signed")),
            (&both, false, None, Ok(None)),
            (&[], true, Some(good), Err("no key of trust.keys")),
        ] {
            let found = ring(keys, required).expect("a good ring").accept(DIGEST, signature.as_ref());
            match (found, expect) {
                (Ok(found), Ok(expect)) => assert_eq!(found.as_deref(), expect),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (found, expect) => panic!("{found:?}, expected {expect:?}"),
            }
        }
        let ring = ring(&both[1..], false).expect("a good ring");
        assert!(ring.may_work(DIGEST, Some(&good)).is_ok(), "a key may leave the ring while none is required");
    }

    #[test]
    fn keys_are_read_from_base64_and_hex_and_bad_ones_refused() {
        let text = key(1).public_text();
        let hex: String = key(1).0.pk.iter().map(|b| format!("{b:02x}")).collect();
        for (name, text, part) in [
            ("a", text.as_str(), ""),
            ("a", hex.as_str(), ""),
            ("A", text.as_str(), "not a key's name"),
            ("", text.as_str(), "not a key's name"),
            ("a", "", "not an Ed25519 public key"),
            ("a", &text[1..], "not an Ed25519 public key"),
            // Of small order: such a key would take one signature for every message.
            ("a", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "not an Ed25519 public key"),
        ] {
            match ring(&[(name, text)], true) {
                Ok(_) => assert_eq!(part, "", "{text}"),
                Err(error) => assert!(!part.is_empty() && error.to_string().contains(part), "{error}"),
            }
        }
        let twice = ring(&[("a", &text), ("b", &hex)], true).expect_err("the same key twice").to_string();
        assert!(twice.contains("the same key"), "{twice}");
    }

    #[test]
    fn signatures_are_read_raw_and_in_base64() {
        let signature = key(1).sign(DIGEST);
        let text = signature.to_text();
        for bytes in [&signature.0[..], text.as_bytes(), format!("{text}\n").as_bytes()] {
            assert_eq!(Signature::parse(bytes).expect("a signature"), signature);
        }
        for bytes in [&b""[..], b"abc", &signature.0[1..], &text.as_bytes()[4..]] {
            assert!(Signature::parse(bytes).is_err(), "{bytes:?}");
        }
        // Deterministic, so that a release that signs again publishes the same file.
        assert_eq!(key(1).sign(DIGEST), signature);
    }

    #[test]
    fn secret_keys_are_private_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let made = SecretKey::generate().expect("randomness");
        made.write(&path).expect("a new file");
        assert_eq!(fs::metadata(&path).expect("written").permissions().mode() & 0o777, 0o600);
        assert_eq!(SecretKey::read(&path).expect("its own file").public_text(), made.public_text());
        assert!(made.write(&path).is_err(), "a key is never overwritten");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("one's own file");
        assert!(matches!(SecretKey::read(&path), Err(TrustError::PublicSecret(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("one's own file");
        fs::write(&path, "something else").expect("one's own file");
        assert!(matches!(SecretKey::read(&path), Err(TrustError::BadSecret(_))));
    }
}
