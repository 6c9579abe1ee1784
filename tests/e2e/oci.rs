//! Components from registries: a minimal one inside this process, which can also misbehave, and the reference
//! implementation (Debian's `docker-registry`) where it is installed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pointsman_tests::{Host, root, skip};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::trust::{PROGRAM, keygen, pointsman};
use crate::wires::{self, Io};
use crate::{host, journal};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn component() -> Vec<u8> {
    std::fs::read(root().join("plugins/prebuilt/route-least-loaded.core.wasm")).expect("a component")
}

/// The manifest of an artifact with one layer, as `wkg` and `oras` push it.
fn manifest(layer: &[u8], layer_type: &str) -> Vec<u8> {
    let config = b"{}";
    let descriptor = |media_type: &str, bytes: &[u8]| json!({ "mediaType": media_type, "digest": sha256(bytes), "size": bytes.len() });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor("application/vnd.wasm.config.v0+json", config),
        "layers": [descriptor(layer_type, layer)],
    });
    manifest.to_string().into_bytes()
}

/// Status, headers and body.
type Fixed = (u16, String, Vec<u8>);

/// A registry of a few fixed answers, by path.
#[derive(Clone, Debug, Default)]
struct Registry {
    answers: Arc<Mutex<BTreeMap<String, Fixed>>>,
    /// Every request line and its `Authorization`.
    asked: Arc<Mutex<Vec<(String, String)>>>,
    /// Asks for this bearer token under `/v2/`.
    token: Option<&'static str>,
    /// Asks for this user and password: where there is a token, at the token service.
    user: Option<&'static str>,
    tls: bool,
}

impl Registry {
    /// Listens on loopback until the test ends; its host and port.
    fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let at = listener.local_addr().expect("bound").to_string();
        let (registry, own) = (self.clone(), at.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away half-way is none of the registry's business.
                let _ = registry.answer(if registry.tls { wires::tls(stream, &[]) } else { Box::new(stream) }, &own);
            }
        });
        at
    }

    fn put(&self, path: &str, status: u16, headers: &str, body: &[u8]) {
        let answer = (status, headers.to_owned(), body.to_vec());
        self.answers.lock().expect("no panic").insert(path.to_owned(), answer);
    }

    fn answer(&self, mut stream: Box<dyn Io>, own: &str) -> std::io::Result<()> {
        let mut reader = BufReader::new(&mut stream);
        let (mut line, mut authorization) = (String::new(), String::new());
        reader.read_line(&mut line)?;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case("authorization"))
            {
                assert!(!name.is_empty());
                value.trim().clone_into(&mut authorization);
            }
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        self.asked.lock().expect("no panic").push((path.clone(), authorization.clone()));
        let scheme = if self.tls { "https" } else { "http" };
        let bearer = format!("Bearer realm=\"{scheme}://{own}/token\",service=\"s\",scope=\"repository:a/b:pull\"");
        let (needs, challenge) = match (self.token, self.user) {
            (Some(token), _) if path.starts_with("/v2/") => (Some(format!("Bearer {token}")), bearer),
            (_, user) => (user.map(|user| format!("Basic {}", STANDARD.encode(user))), "Basic realm=\"r\"".to_owned()),
        };
        let challenge = format!("www-authenticate: {challenge}\r\n");
        let (status, headers, body) = match self.answers.lock().expect("no panic").get(&path) {
            _ if needs.is_some_and(|needs| needs != authorization) => (401, challenge, b"{}".to_vec()),
            Some(answer) => answer.clone(),
            None => (404, String::new(), b"{}".to_vec()),
        };
        write!(stream, "HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n", body.len())?;
        stream.write_all(&body)
    }
}

fn pull(host: &Host, reference: &str) -> pointsman_tests::Answer {
    host.admin("POST", "/admin/v1/components", &json!({ "component": reference }))
}

#[test]
fn a_component_is_pulled_with_a_token_and_through_a_redirect() {
    let storage = Registry::default();
    let wasm = component();
    storage.put("/blob", 200, "", &wasm);
    let storage_at = storage.serve();
    let registry = Registry { token: Some("let-me-in"), ..Registry::default() };
    let manifest = manifest(&wasm, "application/wasm");
    registry.put("/v2/a/b/manifests/v1", 200, "", &manifest);
    registry.put(&format!("/v2/a/b/manifests/{}", sha256(&manifest)), 200, "", &manifest);
    let blob = format!("/v2/a/b/blobs/{}", sha256(&wasm));
    registry.put(&blob, 307, &format!("location: http://{storage_at}/blob\r\n"), b"");
    registry.put("/token?service=s&scope=repository%3Aa%2Fb%3Apull", 200, "", br#"{"token": "let-me-in"}"#);
    let at = registry.serve();
    let host = host(&[]);
    let pulled = pull(&host, &format!("oci://{at}/a/b:v1"));
    assert_eq!((pulled.status, &pulled.body["digest"]), (201, &json!(sha256(&wasm))), "{pulled:?}");
    let source = format!("oci://{at}/a/b:v1@{}", sha256(&manifest));
    let uploaded = journal(&host).into_iter().find(|e| e["event"] == "uploaded").expect("an entry");
    assert_eq!(uploaded["source"], json!(source));
    let asked = storage.asked.lock().expect("no panic").clone();
    assert_eq!(asked, [("/blob".to_owned(), String::new())], "the token stays with the registry");
    // The same by its pin, straight into a slot.
    let activated = host.activate("router", &source, json!({}));
    assert_eq!(activated.status, 200, "{activated:?}");
    let active = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    assert_eq!(active["component"], json!(sha256(&wasm)));
}

/// A host that knows how each of these registries is reached: `(host, its section)`.
fn host_with(folder: &std::path::Path, password: &str, registries: &[(&str, &str)]) -> Host {
    let file = folder.join("password");
    std::fs::write(&file, password).expect("a file");
    let (file, ca) = (file.display(), root().join("tests/e2e/registry.pem"));
    let sections = registries.iter().map(|(at, section)| {
        let section = section.replace("USER", &format!("username = \"ci\"\npassword_file = \"{file}\""));
        format!("[registries.\"{at}\"]\n{}\n", section.replace("CA", &format!("ca_file = \"{}\"", ca.display())))
    });
    Host::configured(PROGRAM, &sections.collect::<String>())
}

#[test]
fn a_private_registry_gets_the_credentials_and_nobody_else_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let wasm = component();
    let storage = Registry::default();
    storage.put("/blob", 200, "", &wasm);
    let storage_at = storage.serve();
    let user = Some("ci:let me in");
    let basic = Registry { user, ..Registry::default() };
    let bearer = Registry { user, token: Some("for-ci"), ..Registry::default() };
    let tls = Registry { user, token: Some("for-ci"), tls: true, ..Registry::default() };
    let open = Registry { tls: true, ..Registry::default() };
    let blob = format!("/v2/a/b/blobs/{}", sha256(&wasm));
    for registry in [&basic, &bearer, &tls, &open] {
        registry.put("/v2/a/b/manifests/v1", 200, "", &manifest(&wasm, "application/wasm"));
        registry.put(&blob, 200, "", &wasm);
        registry.put("/token?service=s&scope=repository%3Aa%2Fb%3Apull", 200, "", br#"{"token": "for-ci"}"#);
    }
    basic.put(&blob, 307, &format!("location: http://{storage_at}/blob\r\n"), b"");
    let registries = [&basic, &bearer, &tls, &open].map(Registry::serve);
    let sections = ["USER", "USER", "USER\nCA", "CA"];
    let known: Vec<(&str, &str)> = registries.iter().map(String::as_str).zip(sections).collect();
    let host = host_with(folder.path(), "let me in\n", &known);
    for at in &registries {
        let pulled = pull(&host, &format!("oci://{at}/a/b:v1"));
        assert!(matches!(pulled.status, 200 | 201), "{at}: {pulled:?}");
        assert_eq!(pulled.body["digest"], json!(sha256(&wasm)), "{at}");
    }
    let asked = |registry: &Registry| registry.asked.lock().expect("no panic").clone();
    let said = format!("Basic {}", STANDARD.encode("ci:let me in"));
    for (path, authorization) in asked(&bearer) {
        let expect = if path.starts_with("/token") { &said } else { "Bearer for-ci" };
        assert!(authorization.is_empty() || authorization == expect, "{path}: {authorization}");
    }
    assert!(asked(&open).iter().all(|(_, authorization)| authorization.is_empty()), "nobody asked for it");
    assert_eq!(asked(&storage), [("/blob".to_owned(), String::new())], "the credentials stay with the registry");
    // A registry that nobody gave credentials for, a wrong password, and a certificate that nobody vouches for.
    let nameless = Registry { user, ..Registry::default() }.serve();
    let [wrong, ..] = &registries;
    let other = tls.serve().replace("127.0.0.1", "localhost");
    let host =
        host_with(folder.path(), "guess", &[(wrong.as_str(), "USER"), (other.as_str(), "CA"), ("127.0.0.1:9", "USER")]);
    std::fs::remove_file(folder.path().join("password")).expect("it was there");
    for (at, status, part) in [
        (nameless.as_str(), 422, "set `username` and `password_file`"),
        (other.as_str(), 502, "cannot reach"),
        ("127.0.0.1:9", 500, "`password_file` of the registry 127.0.0.1:9"),
    ] {
        let answer = pull(&host, &format!("oci://{at}/a/b:v1"));
        let message = answer.body["error"]["message"].as_str().unwrap_or_default();
        assert!(answer.status == status && message.contains(part), "{at}: {answer:?}");
    }
    std::fs::write(folder.path().join("password"), "guess").expect("a file");
    let answer = pull(&host, &format!("oci://{wrong}/a/b:v1"));
    let message = answer.body["error"]["message"].as_str().unwrap_or_default();
    assert!(answer.status == 422 && message.contains("refuses the credentials of `ci`"), "{answer:?}");
    assert!(!message.contains("guess"), "{message}");
}

#[test]
fn a_storage_that_asks_for_credentials_gets_none_and_its_url_is_nobodys_business() {
    let folder = tempfile::tempdir().expect("a folder");
    let wasm = component();
    let user = Some("ci:let me in");
    // How the registry asks, and how the storage behind it does.
    let kinds =
        || [Registry { user, ..Registry::default() }, Registry { user, token: Some("t"), ..Registry::default() }];
    let (mut registries, mut storages) = (Vec::new(), Vec::new());
    for registry in kinds() {
        for storage in kinds() {
            let registry = Registry { answers: Arc::default(), asked: Arc::default(), ..registry.clone() };
            let location = format!("location: http://{}/v2/blob?sig=s3cret\r\n", storage.serve());
            registry.put("/v2/a/b/manifests/v1", 200, "", &manifest(&wasm, "application/wasm"));
            registry.put(&format!("/v2/a/b/blobs/{}", sha256(&wasm)), 307, &location, b"");
            registry.put("/token?service=s&scope=repository%3Aa%2Fb%3Apull", 200, "", br#"{"token": "t"}"#);
            storage.put("/v2/blob?sig=s3cret", 200, "", &wasm);
            registries.push(registry.serve());
            storages.push(storage);
        }
    }
    let known: Vec<(&str, &str)> = registries.iter().map(|at| (at.as_str(), "USER")).collect();
    let host = host_with(folder.path(), "let me in", &known);
    for (at, storage) in registries.iter().zip(&storages) {
        let answer = pull(&host, &format!("oci://{at}/a/b:v1"));
        let message = answer.body["error"]["message"].as_str().unwrap_or_default();
        assert!(answer.status == 502 && message.contains("/v2/blob, which refuses us"), "{answer:?}");
        assert!(!message.contains("s3cret"), "{message}");
        let asked = storage.asked.lock().expect("no panic").clone();
        assert_eq!(asked, [("/v2/blob?sig=s3cret".to_owned(), String::new())], "once, and no token service of its own");
    }
}

#[test]
fn a_signature_travels_with_the_manifest() {
    let folder = tempfile::tempdir().expect("a folder");
    let (key, file) = (folder.path().join("release.key"), folder.path().join("router.wasm"));
    let ring = keygen(&key);
    let wasm = component();
    std::fs::write(&file, &wasm).expect("a file");
    let text = |path: &std::path::Path| path.to_str().expect("a UTF-8 path").to_owned();
    pointsman(&["policy", "sign", &text(&file), "--key", &text(&key)]).expect("signed");
    let signature = std::fs::read_to_string(format!("{}.sig", text(&file))).expect("written");
    let mut signed: Value = serde_json::from_slice(&manifest(&wasm, "application/wasm")).expect("JSON");
    let registry = Registry::default();
    registry.put("/v2/r/manifests/unsigned", 200, "", signed.to_string().as_bytes());
    signed["annotations"] = json!({ "pointsman.signature": signature.trim() });
    registry.put("/v2/r/manifests/signed", 200, "", signed.to_string().as_bytes());
    registry.put(&format!("/v2/r/blobs/{}", sha256(&wasm)), 200, "", &wasm);
    let at = registry.serve();
    let config = format!(
        "[trust]\nrequire_signature = true\n[trust.keys]\n{ring}\n[slots.router]\ncomponent = \"oci://{at}/r:signed\"\n"
    );
    let host = Host::configured(PROGRAM, &config);
    let active = host.admin("GET", "/admin/v1/slots/router", &Value::Null).body["active"].clone();
    assert_eq!(active["component"], json!(sha256(&wasm)), "pulled by the configuration of a fresh host");
    let upload = |tag: &str| {
        let reference = format!("oci://{at}/r:{tag}");
        pointsman(&["policy", "upload", &reference, "--url", &host.admin])
    };
    assert!(upload("signed").expect("a good signature").contains("signed by release"));
    assert_eq!(host.activate("router", "native", json!({})).status, 200);
    assert_eq!(host.activate("router", &host.builtin("route-least-loaded"), json!({})).status, 200);
    let deleted = host.admin("DELETE", &format!("/admin/v1/components/{}", sha256(&wasm)), &Value::Null);
    assert_eq!(deleted.status, 204, "{deleted:?}");
    let refused = upload("unsigned").expect_err("no signature");
    assert!(refused.contains("is not signed"), "{refused}");
}

#[test]
fn a_registry_that_lies_gets_nothing_in() {
    let wasm = component();
    let (good, large) = (manifest(&wasm, "application/wasm"), format!("{:?}", vec![0; 8]).into_bytes());
    let registry = Registry::default();
    let put = |tag: &str, manifest: &[u8]| registry.put(&format!("/v2/r/manifests/{tag}"), 200, "", manifest);
    let other = |key: &str, value: Value| {
        let mut manifest: Value = serde_json::from_slice(&good).expect("JSON");
        manifest["layers"][0][key] = value;
        manifest.to_string().into_bytes()
    };
    put("docker", &manifest(&wasm, "application/vnd.oci.image.layer.v1.tar+gzip"));
    put("index", br#"{"schemaVersion": 2, "manifests": []}"#);
    put("html", b"<html>");
    put("damaged", &other("digest", json!(sha256(b"something else"))));
    put("short", &other("size", json!(wasm.len() - 1)));
    put("huge", &other("size", json!(1_u64 << 40)));
    put("md5", &other("digest", json!("md5:00")));
    put("away", &other("digest", json!(sha256(b"away"))));
    put("loop", &other("digest", json!(sha256(b"loop"))));
    let pin = sha256(&good);
    put(&pin, &large);
    registry.put(&format!("/v2/r/blobs/{}", sha256(&wasm)), 200, "", &wasm);
    registry.put(&format!("/v2/r/blobs/{}", sha256(b"something else")), 200, "", &wasm);
    registry.put(&format!("/v2/r/blobs/{}", sha256(b"away")), 302, "location: http://10.0.0.1/x\r\n", b"");
    let again = format!("/v2/r/blobs/{}", sha256(b"loop"));
    registry.put(&again, 302, &format!("location: {again}\r\n"), b"");
    let at = registry.serve();
    let closed = Registry { token: Some("never"), ..Registry::default() }.serve();
    let host = host(&[]);
    let before = host.admin("GET", "/admin/v1/components", &Value::Null).body;
    for (reference, status, part) in [
        (format!("oci://{at}/r:none"), 404, "check repository, tag and pin"),
        (format!("oci://{at}/r:docker"), 422, "0 WebAssembly layers"),
        (format!("oci://{at}/r:index"), 422, "0 WebAssembly layers"),
        (format!("oci://{at}/r:html"), 502, "the manifest"),
        (format!("oci://{at}/r:damaged"), 422, "has the digest"),
        (format!("oci://{at}/r:short"), 502, "limit"),
        (format!("oci://{at}/r:huge"), 413, "the limit is 33554432"),
        (format!("oci://{at}/r:md5"), 502, "`md5:00` is no sha256"),
        (format!("oci://{at}/r:away"), 502, "redirects and token services must be HTTPS"),
        (format!("oci://{at}/r:loop"), 502, "more than 3 redirects"),
        (format!("oci://{at}/r:x@{pin}"), 422, "the manifest has the digest"),
        (format!("oci://{closed}/r:x"), 422, "asks for credentials"),
        ("oci://127.0.0.1:1/r:x".to_owned(), 502, "cannot reach"),
        ("oci://127.0.0.1:1".to_owned(), 400, "names no repository"),
        ("route-weighted".to_owned(), 400, "not a registry reference"),
    ] {
        let answer = pull(&host, &reference);
        let said = answer.body["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(answer.status, status, "{reference}: {answer:?}");
        assert!(said.contains(part), "{reference}: {said}");
    }
    assert_eq!(host.admin("GET", "/admin/v1/components", &Value::Null).body, before);
}

/// Debian's `docker-registry`, the reference implementation, on a folder of its own; killed when dropped.
struct Distribution {
    child: Child,
    at: String,
    _folder: tempfile::TempDir,
}

impl Distribution {
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let config = format!(
            "version: 0.1\nlog: {{level: info, formatter: text}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:0', net: tcp}}\n",
            folder.path().display()
        );
        let path = folder.path().join("config.yml");
        std::fs::write(&path, config).expect("a file");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().ok()?;
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let said = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let rest = line.split_once("listening on ")?.1;
            Some(rest.split(['"', ',', ' ']).next().unwrap_or_default().to_owned())
        });
        // Keep reading, so that it never blocks on a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Some(Self { child, at: said.expect("it listens"), _folder: folder })
    }

    fn push(&self, host: &Host, tag: &str, manifest: &[u8], blobs: &[&[u8]]) {
        let base = format!("http://{}/v2/acme/router", self.at);
        for blob in blobs {
            let begun = host.send("POST", &format!("{base}/blobs/uploads/"), &[], b"");
            assert_eq!(begun.status, 202, "{begun:?}");
            let place = begun.headers.get("location").and_then(|v| v.to_str().ok()).expect("a place").to_owned();
            let join = if place.contains('?') { '&' } else { '?' };
            let url = format!("{place}{join}digest={}", sha256(blob));
            let put = host.send("PUT", &url, &[("content-type", "application/octet-stream")], blob);
            assert_eq!(put.status, 201, "{put:?}");
        }
        let put = host.send("PUT", &format!("{base}/manifests/{tag}"), &[("content-type", MANIFEST)], manifest);
        assert_eq!(put.status, 201, "{put:?}");
    }
}

impl Drop for Distribution {
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_reference_registry_serves_what_was_pushed_to_it() {
    let Some(registry) = Distribution::start() else {
        let _ = skip("oci", "Debian's `docker-registry` is not installed");
        return;
    };
    let host = host(&[]);
    let wasm = component();
    let manifest = manifest(&wasm, "application/wasm");
    registry.push(&host, "1.0", &manifest, &[&wasm, b"{}"]);
    for reference in [
        format!("oci://{}/acme/router:1.0", registry.at),
        format!("oci://{}/acme/router@{}", registry.at, sha256(&manifest)),
    ] {
        let pulled = pull(&host, &reference);
        assert!(matches!(pulled.status, 200 | 201), "{reference}: {pulled:?}");
        assert_eq!(pulled.body["digest"], json!(sha256(&wasm)));
        let activated = host.activate("router", &reference, json!({}));
        assert_eq!(activated.status, 200, "{activated:?}");
    }
    let missing = pull(&host, &format!("oci://{}/acme/router:2.0", registry.at));
    assert_eq!(missing.status, 404, "{missing:?}");
}
