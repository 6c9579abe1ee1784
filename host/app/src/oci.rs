//! Pulls a component from a registry: the few requests of the OCI distribution specification that a pull needs.
//!
//! Over `ureq`, which the command line has anyway; the ecosystem's client library is made for pushing images too and brings
//! a second HTTP client with its own TLS and connection pool for what is two GETs and a token. A pull is anonymous unless the
//! registry asks for credentials and the operator gave some; they go to that registry, or to the token service that it
//! names, and to nobody else. A pull trusts nothing on the way: every byte is checked against a digest, a manifest against the
//! pin where there is one. Plain HTTP is for loopback only, and only a registry on loopback may send us there. Every request
//! ends within 30 seconds, there are at most a dozen of them, and nothing larger than the limit is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pointsman_policy::Digest;
use serde::Deserialize;
use ureq::Body;
use ureq::http::header::{ACCEPT, AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use ureq::http::{HeaderMap, Request, Response, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use crate::config::RegistrySection;
use crate::reference::OciReference;

/// What registries serve a single artifact's manifest as.
const MANIFEST_TYPES: &str =
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
/// Types under which tools push WebAssembly, today's first.
const LAYER_TYPES: [&str; 4] = [
    "application/wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
    "application/vnd.bytecodealliance.component.v1+wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
];
/// Annotation of a manifest that carries the component's detached signature in base64.
pub(crate) const SIGNATURE_ANNOTATION: &str = "pointsman.signature";
/// The specification lets registries refuse larger manifests.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const MAX_TOKEN_BYTES: u64 = 64 << 10;
/// A password, or a file of certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Registries redirect to their storage once.
const MAX_REDIRECTS: usize = 3;
const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(30);

/// A component as a registry gave it.
#[derive(Debug)]
pub(crate) struct Pulled {
    pub bytes: Vec<u8>,
    /// The reference with the digest of its manifest: what was pulled, exactly.
    pub source: String,
    /// Text of the signature annotation.
    pub signature: Option<String>,
}

/// Why nothing was pulled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    // No URL here has a query or a user: in what a registry redirects to, those are credentials.
    #[error("cannot reach {url}: {source}")]
    Unreachable { url: String, source: Box<ureq::Error> },
    #[error("{url} answered {status}; the registry must be OCI-compatible")]
    Status { url: String, status: u16 },
    #[error("the registry has no {0}; check repository, tag and pin")]
    Missing(String),
    #[error("{0} asks for credentials; set `username` and `password_file` under `registries` in the configuration")]
    Credentials(String),
    #[error("{origin} refuses the credentials of `{username}`, or they may not read this repository")]
    WrongCredentials { origin: String, username: String },
    #[error("`{key}` of the registry {registry}, {}: {problem}", .path.display())]
    File { registry: String, key: &'static str, path: PathBuf, problem: String },
    #[error(
        "the registry sends us to `{0}`; redirects and token services must be HTTPS, or on loopback where the registry is"
    )]
    Redirect(String),
    #[error(
        "the registry sends us to {0}, which refuses us and gets no credentials; its redirects must bring what they need"
    )]
    Elsewhere(String),
    #[error("more than {MAX_REDIRECTS} redirects from {0}")]
    Redirects(String),
    #[error("{what} from {url} cannot be read: {detail}")]
    Malformed { what: &'static str, url: String, detail: String },
    #[error("the artifact has {} WebAssembly layers and must have one of the type {}; its layers are: {}", .found, LAYER_TYPES[0], .types.join(", "))]
    Layers { found: usize, types: Vec<String> },
    #[error("{what} has the digest {found} and must have {expected}: the registry's copy is damaged or was replaced")]
    Digest { what: &'static str, expected: String, found: String },
    #[error("the component has {size} bytes and the limit is {limit}")]
    TooLarge { size: u64, limit: u64 },
}

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
}

/// What a token service answers; registries use either name.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// One pull.
struct Pull {
    agent: ureq::Agent,
    /// Scheme, host and port of the registry.
    origin: String,
    /// Whether the registry is on loopback and spoken to in plain text.
    plain: bool,
    /// A user, and the header that says who it is.
    credentials: Option<(String, String)>,
    /// What the registry asked for.
    authorization: Option<String>,
}

/// Fetches the component that a reference names, of at most `limit` bytes. Blocks.
///
/// # Errors
/// What the registry did; nothing was kept.
pub(crate) fn pull(
    reference: &OciReference,
    registry: Option<&RegistrySection>,
    limit: u64,
) -> Result<Pulled, PullError> {
    let mut pull = Pull::new(&reference.registry, registry)?;
    let repository = format!("{}/v2/{}", pull.origin, reference.repository);
    let name = reference.pin.as_ref().map_or(reference.tag.as_str(), Digest::as_str);
    let url = format!("{repository}/manifests/{name}");
    let bytes = pull.get(&url, MANIFEST_TYPES, MAX_MANIFEST_BYTES, "manifest")?;
    let digest = Digest::of(&bytes);
    same("the manifest", reference.pin.as_ref().map_or(digest.as_str(), Digest::as_str), &digest)?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| PullError::Malformed {
        what: "the manifest",
        url,
        detail: e.to_string(),
    })?;
    let layer = only_layer(&manifest.layers)?;
    if layer.size > limit {
        return Err(PullError::TooLarge { size: layer.size, limit });
    }
    let expected = Digest::parse(&layer.digest).ok_or_else(|| PullError::Malformed {
        what: "the layer's digest",
        url: repository.clone(),
        detail: format!("`{}` is no sha256", layer.digest),
    })?;
    let bytes = pull.get(&format!("{repository}/blobs/{expected}"), "*/*", layer.size, "component")?;
    same("the component", expected.as_str(), &Digest::of(&bytes))?;
    let source = OciReference { pin: Some(digest), ..reference.clone() }.to_string();
    Ok(Pulled { bytes, source, signature: manifest.annotations.get(SIGNATURE_ANNOTATION).cloned() })
}

fn same(what: &'static str, expected: &str, found: &Digest) -> Result<(), PullError> {
    let error = || PullError::Digest { what, expected: expected.to_owned(), found: found.to_string() };
    if expected == found.as_str() { Ok(()) } else { Err(error()) }
}

fn only_layer(layers: &[Descriptor]) -> Result<&Descriptor, PullError> {
    let wasm: Vec<&Descriptor> = layers.iter().filter(|l| LAYER_TYPES.contains(&l.media_type.as_str())).collect();
    match wasm[..] {
        [layer] => Ok(layer),
        _ => {
            let types = layers.iter().take(8).map(|layer| layer.media_type.clone()).collect();
            Err(PullError::Layers { found: wasm.len(), types })
        }
    }
}

// === impl Pull ===

impl Pull {
    fn new(registry: &str, section: Option<&RegistrySection>) -> Result<Self, PullError> {
        let local = format!("http://{registry}").parse::<Uri>().is_ok_and(|uri| is_loopback(&uri));
        let file = |key, path: &Path| {
            read(path).map_err(|problem| PullError::File {
                registry: registry.to_owned(),
                key,
                path: path.to_owned(),
                problem,
            })
        };
        let ca_file = section.map(|section| section.ca_file.as_path()).filter(|path| !path.as_os_str().is_empty());
        let roots = ca_file.map(|path| {
            certificates(&file("ca_file", path)?).ok_or_else(|| {
                let problem = "it holds no certificate in PEM".to_owned();
                PullError::File { registry: registry.to_owned(), key: "ca_file", path: path.to_owned(), problem }
            })
        });
        let roots = roots.transpose()?.unwrap_or(RootCerts::PlatformVerifier);
        let user = section.filter(|section| !section.username.is_empty());
        let credentials = user.map(|RegistrySection { username, password_file, .. }| {
            let password = file("password_file", password_file)?;
            let pair = [username.as_bytes(), b":", password.trim_ascii_end()].concat();
            Ok((username.clone(), format!("Basic {}", STANDARD.encode(pair))))
        });
        let credentials = credentials.transpose()?;
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_global(Some(REQUEST))
            .tls_config(TlsConfig::builder().root_certs(roots).build());
        // A proxy is for the world outside.
        let config = if local { config.proxy(None) } else { config };
        let plain = local && ca_file.is_none();
        let scheme = if plain { "http" } else { "https" };
        let (agent, origin) = (config.build().into(), format!("{scheme}://{registry}"));
        Ok(Self { agent, origin, plain, credentials, authorization: None })
    }

    /// The body of a resource, of at most `limit` bytes; with credentials or a token where the registry asks for them.
    fn get(&mut self, url: &str, accept: &str, limit: u64, what: &'static str) -> Result<Vec<u8>, PullError> {
        let (mut response, mut at) = self.follow(url, accept)?;
        // A place that the registry redirects to may ask for credentials, and gets none.
        if response.status() == 401 && self.authorization.is_none() && self.is_ours(&at) {
            self.authorization = Some(self.authorize(response.headers())?);
            (response, at) = self.follow(url, accept)?;
        }
        match response.status().as_u16() {
            200 => body(&mut response, url, limit, what),
            401 | 403 if !self.is_ours(&at) => Err(PullError::Elsewhere(shown(&at))),
            401 | 403 => Err(self.refused()),
            404 => Err(PullError::Missing(url.trim_start_matches(&self.origin).to_owned())),
            status => Err(PullError::Status { url: url.to_owned(), status }),
        }
    }

    /// Follows redirects by hand: the token is for the registry alone, and not every place is one to go to.
    /// Returns where it ended, too.
    fn follow(&self, url: &str, accept: &str) -> Result<(Response<Body>, String), PullError> {
        let mut at = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::get(&at).header(ACCEPT, accept);
            if let Some(said) = self.authorization.as_ref().filter(|_| self.is_ours(&at)) {
                request = request.header(AUTHORIZATION, said);
            }
            let request = request.body(()).map_err(|_| PullError::Redirect(shown(&at)))?;
            let unreachable = |source| PullError::Unreachable { url: shown(&at), source: Box::new(source) };
            let response = self.agent.run(request).map_err(unreachable)?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, at));
            }
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
            at = if to.starts_with('/') { format!("{}{to}", origin(&at)) } else { to.to_owned() };
            self.check_place(&at)?;
        }
        Err(PullError::Redirects(url.to_owned()))
    }

    /// Whether a URL is the registry's own.
    fn is_ours(&self, url: &str) -> bool {
        url.strip_prefix(&self.origin).is_some_and(|rest| rest.starts_with('/'))
    }

    fn check_place(&self, url: &str) -> Result<(), PullError> {
        let uri = url.parse::<Uri>().ok();
        let allowed = uri.filter(|uri| uri.host().is_some()).is_some_and(|uri| match uri.scheme_str() {
            Some("https") => true,
            Some("http") => self.plain && is_loopback(&uri),
            _ => false,
        });
        if allowed { Ok(()) } else { Err(PullError::Redirect(shown(url))) }
    }

    /// The registry, or its token service, does not let us read.
    fn refused(&self) -> PullError {
        match &self.credentials {
            Some((username, _)) => {
                PullError::WrongCredentials { origin: self.origin.clone(), username: username.clone() }
            }
            None => PullError::Credentials(self.origin.clone()),
        }
    }

    /// What the registry asks for: a token, or else the credentials themselves.
    fn authorize(&self, headers: &HeaderMap) -> Result<String, PullError> {
        let challenges = || headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|text| text.to_str().ok());
        if let Some(challenge) = challenges().find_map(challenge_of) {
            return Ok(format!("Bearer {}", self.token(&challenge)?));
        }
        let asks = challenges().any(|text| scheme_of(text).eq_ignore_ascii_case("basic"));
        let basic = self.credentials.as_ref().filter(|_| asks).map(|(_, basic)| basic.clone());
        basic.ok_or_else(|| PullError::Credentials(self.origin.clone()))
    }

    /// A token from the service that the registry names; for everybody where there are no credentials.
    fn token(&self, challenge: &BTreeMap<String, String>) -> Result<String, PullError> {
        let realm = challenge.get("realm").ok_or_else(|| self.refused())?;
        self.check_place(realm)?;
        let mut request = self.agent.get(realm);
        if let Some((_, basic)) = &self.credentials {
            request = request.header(AUTHORIZATION, basic);
        }
        for key in ["service", "scope"] {
            if let Some(value) = challenge.get(key) {
                request = request.query(key, value);
            }
        }
        let unreachable = |source| PullError::Unreachable { url: shown(realm), source: Box::new(source) };
        let mut response = request.call().map_err(unreachable)?;
        match response.status().as_u16() {
            200 => {}
            status @ 500.. => return Err(PullError::Status { url: shown(realm), status }),
            _ => return Err(self.refused()),
        }
        let bytes = body(&mut response, realm, MAX_TOKEN_BYTES, "token")?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|e| PullError::Malformed {
            what: "the token",
            url: shown(realm),
            detail: e.to_string(),
        })?;
        token.token.or(token.access_token).ok_or_else(|| self.refused())
    }
}

fn body(response: &mut Response<Body>, url: &str, limit: u64, what: &'static str) -> Result<Vec<u8>, PullError> {
    // The limit of `ureq` is the first number of bytes that is too many.
    let read = response.body_mut().with_config().limit(limit + 1).read_to_vec();
    read.map_err(|e| PullError::Malformed { what, url: shown(url), detail: e.to_string() })
}

/// A file that is not endless.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The certificates in a PEM file; none is a mistake.
pub(crate) fn certificates(pem: &[u8]) -> Option<RootCerts> {
    let found = parse_pem(pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let found: Vec<Certificate<'static>> = found.collect();
    (!found.is_empty()).then(|| found.into())
}

/// `scheme://host:port` of a URL.
fn origin(url: &str) -> &str {
    let after = url.find("://").map_or(0, |at| at + 3);
    let end = url[after..].find('/').map_or(url.len(), |at| after + at);
    &url[..end]
}

/// A URL as far as it is nobody's secret: without user, query and fragment.
fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default();
    let name = host.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// The first word of a challenge.
fn scheme_of(header: &str) -> &str {
    header.trim().split(' ').next().unwrap_or_default()
}

/// The parameters of a `Bearer` challenge, such as `Bearer realm="https://a/token",scope="repository:x:pull,push"`.
fn challenge_of(header: &str) -> Option<BTreeMap<String, String>> {
    let (scheme, mut rest) = header.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut parameters = BTreeMap::new();
    while let Some((key, after)) = rest.split_once('=') {
        let (value, tail) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        parameters.insert(key.trim_matches([',', ' ']).to_ascii_lowercase(), value.to_owned());
        rest = tail;
    }
    Some(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let header =
            r#"Bearer realm="https://auth.example/token", service="registry", scope="repository:a/b:pull,push""#;
        let challenge = challenge_of(header).expect("a bearer challenge");
        let expect =
            [("realm", "https://auth.example/token"), ("scope", "repository:a/b:pull,push"), ("service", "registry")];
        assert_eq!(challenge, expect.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(challenge_of(r#"bearer realm=x,service=y"#).expect("unquoted").len(), 2);
        assert_eq!(challenge_of(r#"Basic realm="x""#), None);
        assert_eq!(challenge_of("Bearer"), None);
    }

    fn anonymous(registry: &str) -> Pull {
        Pull::new(registry, None).expect("nothing to read")
    }

    #[test]
    fn only_loopback_is_spoken_to_in_plain_text() {
        for (registry, origin) in [
            ("ghcr.io", "https://ghcr.io"),
            ("localhost:5000", "http://localhost:5000"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("[::1]:5000", "http://[::1]:5000"),
            ("127.0.0.1.example", "https://127.0.0.1.example"),
        ] {
            assert_eq!(anonymous(registry).origin, origin);
        }
        for (registry, place, allowed) in [
            ("ghcr.io", "https://storage.example/x", true),
            ("ghcr.io", "http://storage.example/x", false),
            ("ghcr.io", "http://127.0.0.1:8081/admin", false),
            ("ghcr.io", "file:///etc/passwd", false),
            ("ghcr.io", "", false),
            ("ghcr.io", "https:///x?sig=secret", false),
            ("localhost:5000", "http://127.0.0.1:5001/x", true),
            ("localhost:5000", "http://storage.example/x", false),
        ] {
            assert_eq!(anonymous(registry).check_place(place).is_ok(), allowed, "{registry} -> {place}");
        }
        assert_eq!(origin("https://a.example:5/b/c"), "https://a.example:5");
    }

    #[test]
    fn an_error_shows_no_credentials_of_a_url() {
        for (url, expect) in [
            ("https://ghcr.io/v2/a/manifests/1", "https://ghcr.io/v2/a/manifests/1"),
            ("https://s.example/blob?sig=secret&se=1", "https://s.example/blob"),
            ("https://s.example?sig=a/b@c", "https://s.example"),
            ("https://user:secret@s.example:5/blob#x", "https://s.example:5/blob"),
            ("https://a@b:secret@s.example/x@y", "https://s.example/x@y"),
            ("blob?sig=secret", "blob"),
            ("", ""),
        ] {
            assert_eq!(shown(url), expect, "{url}");
            let refused = anonymous("ghcr.io").check_place(&url.replace("https", "ftp")).expect_err("neither");
            assert!(!refused.to_string().contains("secret"), "{refused}");
        }
    }

    #[test]
    fn an_artifact_has_one_layer_of_wasm() {
        let layers = |types: &[&str]| -> Vec<Descriptor> {
            types.iter().map(|t| Descriptor { media_type: (*t).into(), digest: String::new(), size: 0 }).collect()
        };
        for (types, good) in [
            (&["application/wasm"][..], true),
            (&["text/plain", "application/vnd.wasm.content.layer.v1+wasm"], true),
            (&[], false),
            (&["application/vnd.oci.image.layer.v1.tar+gzip"], false),
            (&["application/wasm", "application/wasm"], false),
        ] {
            assert_eq!(only_layer(&layers(types)).is_ok(), good, "{types:?}");
        }
    }
}
