//! API keys of the data plane: who may send requests, as which tenant, how urgent, and how much.
//!
//! The host knows the SHA-256 of a key and never the key. A slow hash would protect words that people think up; a key is 256
//! random bits, and nobody finds those by trying, however fast the hash. A request's digest is compared with all of them, in a
//! time that does not tell which was near.
//!
//! Keys change while requests run: a ring is immutable and is replaced whole, a key that stays keeps what it has used, and a
//! request ends on the terms on which it began.

mod limits;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HeaderMap, HeaderName};
use axum::middleware::Next;
use axum::response::Response;
use pointsman_sched::ids::Priority;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub use self::limits::KeyLimits;
use self::limits::Meter;
pub(crate) use self::limits::Place;
use crate::config::ConfigError;
use crate::error::ApiError;
use crate::identity::bearer;
use crate::state::ServerState;

/// Where Anthropic's clients put their key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Most keys: each request is compared with all of them, and as many tenants have names of their own.
const MAX_KEYS: usize = 1_000;

/// What a digest is written after.
const ALGORITHM: &str = "sha256:";

/// A key of the data plane.
#[derive(Clone, Debug)]
pub struct ApiKey {
    /// What errors and logs call it.
    pub name: String,
    /// Of what follows `Bearer `.
    pub digest: KeyDigest,
    /// Whose it is.
    pub tenant: String,
    /// Highest priority that its requests may have.
    pub max_priority: Priority,
    /// How much it may ask for.
    pub limits: KeyLimits,
}

/// The SHA-256 of a key, written as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigest([u8; 32]);

/// A text that is no digest; the text is not repeated, because it may be the key itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key's hash is `sha256:` and 64 hexadecimal digits, as `pointsman key new` prints it")]
pub struct BadDigest;

/// The keys of one moment.
#[derive(Debug, Default)]
struct Ring(Vec<Arc<Holder>>);

/// A key and what its requests have used.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) key: ApiKey,
    meter: Arc<Meter>,
}

/// The keys of today. Without any the data plane is open.
#[derive(Debug)]
pub(crate) struct Keys(RwLock<Arc<Ring>>);

/// What a request has shown, for whoever asks who it is.
#[derive(Clone, Debug)]
pub(crate) enum Shown {
    Key(Arc<Holder>),
    Nothing,
    Unknown,
}

// === impl KeyDigest ===

impl KeyDigest {
    /// The digest of a key.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key).into())
    }
}

impl FromStr for KeyDigest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let hex = text.strip_prefix(ALGORITHM).filter(|hex| hex.len() == 64 && hex.is_ascii()).ok_or(BadDigest)?;
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            let digits = &hex[2 * i..2 * i + 2];
            // `from_str_radix` takes a sign.
            *byte = u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+')).ok_or(BadDigest)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ALGORITHM)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// === impl Ring ===

impl Ring {
    /// Checks the keys; those that `before` had go on with what they have used.
    fn new(keys: Vec<ApiKey>, before: &Self) -> Result<Self, ConfigError> {
        check_keys(&keys)?;
        let used: HashMap<KeyDigest, &Arc<Meter>> = before.0.iter().map(|old| (old.key.digest, &old.meter)).collect();
        let hold = |key: ApiKey| {
            let meter = used.get(&key.digest).map_or_else(Arc::default, |meter| Arc::clone(meter));
            Arc::new(Holder { key, meter })
        };
        Ok(Self(keys.into_iter().map(hold).collect()))
    }

    fn find(&self, headers: &HeaderMap) -> Shown {
        let shown = match (headers.get(AUTHORIZATION), headers.get(API_KEY)) {
            (Some(header), _) => bearer(header),
            (None, Some(header)) => header.to_str().ok(),
            (None, None) => return Shown::Nothing,
        };
        let Some(shown) = shown.filter(|shown| !shown.is_empty()) else { return Shown::Unknown };
        let digest = KeyDigest::of(shown);
        let same = |holder: &Holder| bool::from(holder.key.digest.0.ct_eq(&digest.0));
        let found = self.0.iter().fold(None, |found, holder| if same(holder) { Some(holder) } else { found });
        found.map_or(Shown::Unknown, |holder| Shown::Key(Arc::clone(holder)))
    }
}

/// Whether logs and errors may carry it.
#[must_use]
pub fn is_key_name(name: &str) -> bool {
    let good_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=40).contains(&name.len()) && name.bytes().all(good_byte)
}

/// Names and tenants that can be told apart and sent in headers, and each key once.
///
/// # Errors
/// The first key that cannot work, by its name.
pub fn check_keys(keys: &[ApiKey]) -> Result<(), ConfigError> {
    if keys.len() > MAX_KEYS {
        return Err(ConfigError::TooManyKeys { found: keys.len(), most: MAX_KEYS });
    }
    let (mut names, mut digests) = (HashSet::new(), HashSet::new());
    for ApiKey { name, digest, tenant, .. } in keys {
        // A bad name is not repeated: it may be the key itself.
        if !is_key_name(name) {
            return Err(ConfigError::KeyName { found: name.len() });
        }
        let what = if !(1..=128).contains(&tenant.len()) || !tenant.bytes().all(|b| b.is_ascii_graphic()) {
            "has a tenant that is not 1 to 128 visible ASCII characters"
        } else if tenant == "other" {
            "has the tenant `other`, which stands for those beyond 1,000"
        } else if *digest == KeyDigest::of("") {
            "has the hash of an empty text"
        } else if !names.insert(name) {
            "is listed twice"
        } else if !digests.insert(digest) {
            "has the hash of another name"
        } else {
            continue;
        };
        return Err(ConfigError::ApiKey { name: name.clone(), what });
    }
    Ok(())
}

// === impl Keys ===

impl Keys {
    pub(crate) fn new(keys: Vec<ApiKey>) -> Result<Self, ConfigError> {
        Ok(Self(RwLock::new(Arc::new(Ring::new(keys, &Ring::default())?))))
    }

    fn ring(&self) -> Arc<Ring> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether requests need a key.
    pub(crate) fn are_needed(&self) -> bool {
        !self.ring().0.is_empty()
    }

    /// Whose limits count for what a tenant asked for earlier, with the key of this name: that key's, or those of another one
    /// that the tenant has. `None` where none is needed.
    pub(crate) fn holder(&self, tenant: &str, name: Option<&str>) -> Result<Option<Arc<Holder>>, ApiError> {
        let ring = self.ring();
        if ring.0.is_empty() {
            return Ok(None);
        }
        let own = |holder: &&Arc<Holder>| holder.key.tenant == tenant;
        let same = ring.0.iter().filter(own).find(|holder| Some(holder.key.name.as_str()) == name);
        let found = same.or_else(|| ring.0.iter().find(own)).cloned();
        found.map(Some).ok_or(ApiError::ApiKey { problem: "the tenant has no API key any more" })
    }

    /// Takes other keys. None at all are refused: they would open the data plane, or close it to everybody.
    pub(crate) fn replace(&self, keys: Vec<ApiKey>) -> Result<(), ConfigError> {
        if keys.is_empty() {
            return Err(ConfigError::NoKeys);
        }
        let mut ring = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *ring = Arc::new(Ring::new(keys, &ring)?);
        Ok(())
    }
}

/// Middleware: finds the key of a request, and tells its holder on every response what is left of its limits.
pub(crate) async fn meter(State(state): State<Arc<ServerState>>, mut request: Request, next: Next) -> Response {
    let ring = state.keys.ring();
    if ring.0.is_empty() {
        return next.run(request).await;
    }
    let shown = ring.find(request.headers());
    drop(ring);
    request.extensions_mut().insert(shown.clone());
    let mut response = next.run(request).await;
    if let Shown::Key(holder) = shown {
        holder.meter.headers(&holder.key.limits, state.clock.now(), response.headers_mut());
    }
    response
}

/// The key of a request whose extensions are these; `None` where none is needed. Whoever has not come through [`meter`] is
/// refused while keys are needed.
pub(crate) fn required(
    state: &ServerState,
    extensions: &axum::http::Extensions,
) -> Result<Option<Arc<Holder>>, ApiError> {
    match extensions.get() {
        Some(Shown::Key(holder)) => Ok(Some(Arc::clone(holder))),
        Some(Shown::Unknown) => Err(ApiError::ApiKey { problem: "the API key is not known" }),
        None if !state.keys.are_needed() => Ok(None),
        Some(Shown::Nothing) | None => Err(ApiError::ApiKey { problem: "an API key is required" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, secret: &str) -> ApiKey {
        ApiKey {
            name: name.into(),
            digest: KeyDigest::of(secret),
            tenant: "t".into(),
            max_priority: Priority::Normal,
            limits: KeyLimits::default(),
        }
    }

    #[test]
    fn digests_are_read_as_they_are_written() {
        // The test vector of FIPS 180 for "abc".
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyDigest::of("abc").to_string(), abc);
        assert_eq!(abc.parse(), Ok(KeyDigest::of("abc")));
        assert_eq!(abc.to_uppercase().replace("SHA", "sha").parse(), Ok(KeyDigest::of("abc")));
        let signed = abc.replacen("ba", "+a", 1);
        let wide = format!("sha256:{}", "é".repeat(32));
        for bad in ["", "abc", &abc[7..], &abc[..70], &format!("{abc}0"), &signed, &wide, &abc.replace('f', "g")] {
            assert_eq!(bad.parse::<KeyDigest>(), Err(BadDigest), "{bad}");
        }
    }

    #[test]
    fn keys_that_cannot_work_are_named_and_secrets_are_not() {
        let tenant = |tenant: &str| ApiKey { tenant: tenant.into(), ..key("a", "k") };
        let many = (0..=MAX_KEYS).map(|i| key(&format!("k{i}"), &format!("k{i}"))).collect();
        for (keys, expect) in [
            (vec![key("a", "k"), key("b", "k")], "API key `b` has the hash of another name"),
            (vec![key("a", "k"), key("a", "l")], "API key `a` is listed twice"),
            (vec![key("pm-Secret", "k")], "[a-z0-9-]{1,40}, found one of 9 bytes that does not"),
            (vec![tenant("other")], "API key `a` has the tenant `other`"),
            (vec![key("a", "")], "API key `a` has the hash of an empty text"),
            (vec![tenant("")], "API key `a` has a tenant that is not"),
            (vec![tenant("a b")], "API key `a` has a tenant that is not"),
            (many, "1001 API keys; 1000 are the most"),
        ] {
            let error = Keys::new(keys).expect_err(expect).to_string();
            assert!(error.contains(expect) && !error.contains("Secret"), "{error}");
        }
    }

    #[test]
    fn a_key_that_stays_goes_on_with_what_it_has_used() {
        let keys = Keys::new(vec![key("a", "1"), key("b", "2")]).expect("good keys");
        let before = keys.ring();
        keys.replace(vec![key("a", "3"), key("c", "2")]).expect("good keys");
        let after = keys.ring();
        assert!(Arc::ptr_eq(&before.0[1].meter, &after.0[1].meter), "another name, the same key");
        assert!(!Arc::ptr_eq(&before.0[0].meter, &after.0[0].meter), "the same name, another key");
        assert!(keys.replace(Vec::new()).is_err_and(|error| error.to_string().contains("no API keys")));
        assert!(keys.replace(vec![key("A", "1")]).is_err());
        assert!(Arc::ptr_eq(&keys.ring(), &after), "what cannot work changes nothing");
    }
}
